"""DynFed: every client its own bit-width, from its resources and its training dynamics; the server distils from chosen teachers.

Reference:
    He et al. DynFed. ACM Multimedia 2025, doi 10.1145/3746027.3755451.

==============  ==========================================================================================
paper           here
==============  ==========================================================================================
c_k, c_p        ``resources.memory_mb``, `memory_per_bit` (eq. 2)
cap_k           `resource_cap`: the most bits this client can afford, in [b_min, B_max]
b_k, eta        ``server.state["bits"]``, `eta` (eq. 4)
G_k             ``scalars["grad_norm"]``, the mean gradient norm of the local steps; or the fall of the loss
Q(D_k)          the uplink codec, ``Quantize(InstructedBits())`` (eq. 3)
p-bar, U, S     `dynfed_lightning.teachers` (eq. 5-9)
L               `dynfed_lightning.distill.ServerDistiller` (eq. 10-11)
==============  ==========================================================================================

Where the paper is silent or contradicts itself, this is what runs: eq. 2's level is used as a bit-width; eq. 4 is clipped to
cap_k, without which memory plays no part; the quantiser's scale is the largest magnitude of a bucket, not the whole vector's L2
norm; a link too slow for the round's deadline caps the bits like memory does. The default teachers are this
package's own `Balanced`, which expects a public set mixed about like the clients' data; ``distillation="competence"`` does not,
and ``distillation="active"`` is the paper's choice. See `dynfed_lightning.competence` for why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch

from dynfed_lightning.algorithm import Client, CodecLike, Received, Reply, Server, Update
from dynfed_lightning.algorithms._distil import average_and_distil
from dynfed_lightning.algorithms.fedavg import FedAvg
from dynfed_lightning.bits import InstructedBits
from dynfed_lightning.callbacks import GradientNorm
from dynfed_lightning.codec import Codec
from dynfed_lightning.distill import Distillation
from dynfed_lightning.errors import ClientFailure
from dynfed_lightning.local import LocalExecutor
from dynfed_lightning.resources import Resources
from dynfed_lightning.stages import Quantize
from dynfed_lightning.teachers import TeacherContext
from dynfed_lightning.tensors import difference, load_weights, weights_of

_SIGNALS = ("grad_norm", "loss_delta", "random", None)


def resource_cap(
    resources: Resources,
    bits: tuple[int, int],
    *,
    memory_per_bit: float = 2048.0,
    deadline: float | None = None,
    num_values: int = 0,
    bucket: int = 512,
) -> int:
    """Eq. 2: ``clip(floor(c_k / c_p), b_min, B_max)``; with a link and a deadline, at most the bits that can be sent in time.

    Args:
        resources: of the client; what it does not report does not limit it.
        bits: (b_min, B_max).
        memory_per_bit: c_p in MB.
        deadline: seconds for an upload, or None.
        num_values: values in an update.
        bucket: values that share a scale (4 bytes each).

    >>> [resource_cap(Resources(memory_mb=m), (2, 8)) for m in (1000, 2048, 6200, 16383, 40000)]
    [2, 2, 3, 7, 8]
    """
    low, high = bits
    cap = float(high)
    if resources.memory_mb is not None:
        cap = min(cap, math.floor(resources.memory_mb / memory_per_bit))
    if deadline is not None and resources.bandwidth_mbps is not None and num_values:
        sendable = resources.bandwidth_mbps * 1e6 / 8 * deadline  # bytes
        scales = 4 * math.ceil(num_values / bucket)
        cap = min(cap, math.floor((sendable - scales) * 8 / num_values))
    return int(min(max(cap, low), high))


def adjusted_bits(bits: float, ratio: float, *, eta: float, low: int, high: int, cap: int) -> float:
    """Eq. 4: ``clip(b_k + eta (G_k / max_j G_j - b_k / B_max), b_min, cap_k)``; stays real-valued.

    >>> adjusted_bits(4.0, 1.0, eta=1.0, low=2, high=8, cap=7)
    4.5
    >>> adjusted_bits(2.1, 0.0, eta=1.0, low=2, high=8, cap=7)
    2.0
    """
    return float(min(max(bits + eta * (ratio - bits / high), low), cap))


class DynFed(FedAvg):
    """Adaptive bits up, distillation on the server.

    Args:
        bits: ``(b_min, B_max)`` within 1..8 for adaptive bits, one integer for the same bits everywhere (FedPAQ's uplink),
            None for float32. b_min is at least 2: at one bit the quantiser is biased.
        signal: what eq. 4 follows: ``"grad_norm"``, ``"loss_delta"`` (the abstract's: the fall of the loss), ``"random"``
            (uniform in [b_min, cap_k], the paper's ablation) or None (b_k stays at cap_k).
        eta: step of eq. 4, >= 0.
        memory_per_bit: c_p of eq. 2, in MB.
        deadline: seconds an upload may take; with it, a client's reported bandwidth caps its bits too.
        distillation: a `Distillation`, the name of a teacher policy (`Distillation.named`), or None for plain averaging.
        bucket: values that share a scale.
        downlink: codec of what the server sends, or bits, e.g. ``8``; default float32.

    Label counts are uploaded once per client where the teacher policy needs them (C integers, counted as bytes); they tell
    the server how many rows of each class a client has. ``distillation="active"`` does without.
    """

    def __init__(
        self,
        bits: tuple[int, int] | int | None = (2, 8),
        *,
        signal: str | None = "grad_norm",
        eta: float = 1.0,
        memory_per_bit: float = 2048.0,
        deadline: float | None = None,
        distillation: Distillation | str | None = "balanced",
        bucket: int = 512,
        downlink: CodecLike = None,
    ) -> None:
        if not (
            bits is None or isinstance(bits, (tuple, list)) or (isinstance(bits, int) and not isinstance(bits, bool))
        ):
            raise TypeError(f"Expected `bits` to be (b_min, B_max), an integer or None, but got {bits!r}.")
        if not (distillation is None or isinstance(distillation, (str, Distillation))):
            raise TypeError(
                f"Expected `distillation` to be a Distillation, a policy's name or None, but got {type(distillation).__name__}."
            )
        self.adaptive = isinstance(bits, (tuple, list))
        if self.adaptive:
            self.low, self.high = _check_range(bits)
            quantize = Quantize(InstructedBits(), bucket=bucket)
        else:
            quantize = Quantize(bits, bucket=bucket)  # type: ignore[arg-type]
            self.low = self.high = bits or 8  # type: ignore[assignment]
        super().__init__(uplink=Codec() if bits is None else Codec(quantize), downlink=downlink)
        if signal not in _SIGNALS:
            raise ValueError(f"Expected `signal` to be one of {_SIGNALS}, but got {signal!r}.")
        if not eta >= 0:
            raise ValueError(f"Expected `eta` to be a number >= 0, but got {eta}.")
        if not memory_per_bit > 0:
            raise ValueError(f"Expected `memory_per_bit` to be a positive number of MB, but got {memory_per_bit}.")
        if deadline is not None and not deadline > 0:
            raise ValueError(f"Expected `deadline` to be a positive number of seconds or None, but got {deadline}.")
        self.bits = bits
        self.signal = signal
        self.eta = eta
        self.memory_per_bit = memory_per_bit
        self.deadline = deadline
        self.bucket = bucket
        self.distillation = Distillation.named(distillation) if isinstance(distillation, str) else distillation
        self.requires_public = self.distillation is not None

    reply_scalars = ("loss", "grad_norm")

    def setup(self, server: Server, executor: LocalExecutor) -> None:
        """Start every client's bits at its cap."""
        super().setup(server, executor)
        for name in ("bits", "loss", "labels"):
            server.state.setdefault(name, {})  # by client id as text, so that a checkpoint can hold it

    # -------------------------------------------------------------------- bits

    def cap(self, server: Server, client_id: int) -> int:
        """cap_k of eq. 2."""
        return resource_cap(
            server.resources(client_id),
            (self.low, self.high),
            memory_per_bit=self.memory_per_bit,
            deadline=self.deadline,
            num_values=sum(s.numel for s in server.schema() if not s.raw),
            bucket=self.bucket,
        )

    def instruct(self, server: Server, client_id: int) -> dict[str, Any]:
        """``round(b_k)``, and whether the label counts are still to be sent."""
        told: dict[str, Any] = {}
        if self.adaptive:
            cap = self.cap(server, client_id)
            if self.signal == "random":
                draw = torch.randint(self.low, cap + 1, (), generator=server.rng(client_id))
                told["bits"] = int(draw)
            else:
                told["bits"] = math.floor(server.state["bits"].get(str(client_id), float(cap)) + 0.5)
        if self._needs("label_counts") and str(client_id) not in server.state["labels"]:
            told["labels"] = 1
        return told

    def _needs(self, what: str) -> bool:
        return self.distillation is not None and what in self.distillation.needs

    def client_step(self, client: Client, module: L.LightningModule, received: Received) -> Update:
        """Train; upload the update (quantised by the codec), G_k and the loss, and once the label counts."""
        norm = GradientNorm()
        names = load_weights(module, received.tensors)
        result = client.fit(module, callbacks=[norm])
        update = Update(
            difference(weights_of(module, names), received.tensors),
            scalars={**result.scalars(), "grad_norm": norm.value},
        )
        if received.scalars.get("labels"):
            update.counters["labels"] = client.data.label_counts().tolist()
        return update

    def _adapt(self, server: Server, replies: Sequence[Reply]) -> None:
        """Eq. 4 for the clients of this round."""
        bits, losses = server.state["bits"], server.state["loss"]
        if self.signal == "grad_norm":
            signal = {r.client_id: r.scalars["grad_norm"] for r in replies}
        else:
            # A client's first round has no earlier loss to fall from: its bits stay.
            seen = [r for r in replies if str(r.client_id) in losses]
            signal = {r.client_id: max(0.0, losses[str(r.client_id)] - r.scalars["loss"]) for r in seen}
        top = max(signal.values(), default=0.0)
        for k, g in signal.items():
            cap = self.cap(server, k)
            ratio = g / top if top > 0 else 0.0
            before = bits.get(str(k), float(cap))
            bits[str(k)] = adjusted_bits(before, ratio, eta=self.eta, low=self.low, high=self.high, cap=cap)
        losses.update({str(r.client_id): r.scalars["loss"] for r in replies})

    # ------------------------------------------------------------------ server

    def check_reply(self, server: Server, reply: Reply) -> None:
        """Label counts must be there when they were asked for, and add up to the client's rows."""
        super().check_reply(server, reply)
        labels = reply.counters.get("labels")
        if labels is None:
            if self._needs("label_counts") and str(reply.client_id) not in server.state["labels"]:
                raise ClientFailure(
                    "malformed", f"Expected client {reply.client_id} to send its label counts, but got none."
                )
        elif len(labels) != server.num_classes or sum(labels) != reply.num_examples:
            raise ClientFailure(
                "malformed",
                f"Expected {server.num_classes} label counts that sum to {reply.num_examples}, but client {reply.client_id} "
                f"sent {len(labels)} that sum to {sum(labels)}.",
            )

    def server_step(self, server: Server, replies: Sequence[Reply]) -> None:
        """Average; distil from the clients' models into the average; adapt the bits."""
        if self.adaptive and self.signal in ("grad_norm", "loss_delta"):
            self._adapt(server, replies)
        if self.distillation is None:
            super().server_step(server, replies)
            return
        for r in replies:
            if "labels" in r.counters:
                server.state["labels"][str(r.client_id)] = r.counters["labels"]
        steps = None if self.bits is None else [r.decoded.steps() for r in replies]
        average_and_distil(server, replies, self.distillation, self._context(server, replies), steps)

    def _context(self, server: Server, replies: Sequence[Reply]) -> TeacherContext:
        """What the server knows of the replies besides their predictions."""
        labels: Mapping[str, list[int]] = server.state["labels"]
        counts = [labels[str(r.client_id)] for r in replies if str(r.client_id) in labels]
        known = (
            torch.tensor(list(labels.values())) if labels else None
        )  # of every client heard so far, not only this cohort
        return TeacherContext(
            num_examples=torch.tensor([r.num_examples for r in replies]),
            bits=None if self.bits is None else torch.tensor([_reply_bits(r) for r in replies]),
            label_counts=torch.tensor(counts) if counts and len(counts) == len(replies) else None,
            class_prior=None if known is None else known.sum(0),
            losses=torch.tensor([r.scalars["loss"] for r in replies]),
            max_bits=self.high if self.adaptive else 8,
            generator=server.rng(1),
        )


def _reply_bits(reply: Reply) -> float:
    """The bits a reply's weights came with."""
    return float(max((b for b in reply.decoded.bits.values() if b is not None), default=8))


def _check_range(bits: Any) -> tuple[int, int]:
    if len(bits) != 2 or not all(isinstance(b, int) for b in bits) or not 2 <= bits[0] <= bits[1] <= 8:
        raise ValueError(f"Expected `bits` to be (b_min, B_max) with 2 <= b_min <= B_max <= 8, but got {tuple(bits)}.")
    return bits[0], bits[1]
