"""DAdaQuant: quantisation levels that double when training stalls, spread over clients by their weight.

Reference:
    Hoenig, Zhao, Mullins. DAdaQuant: Doubly-adaptive quantization for communication-efficient Federated Learning.
    ICML 2022, arXiv 2111.00465, section 3.

=============  ==========================================================================================
paper          here
=============  ==========================================================================================
G_t            ``sum_k (n_k / n) F_k``, the clients' mean training loss
G^_t           ``state["smoothed"]``: ``0.9 G^_t-1 + 0.1 G_t`` (psi = 0.9)
phi            `patience`: rounds after which a G^ that has not fallen doubles q; default a tenth of the run
q_t            ``state["levels"]``, at most `max_levels`
q_k            ``sqrt(a / b) v_k^(2/3)``, ``v_k = n_k / n``, ``a = sum_j v_j^(2/3)``, ``b = sum_j v_j^2 / q^2``
=============  ==========================================================================================

q levels each side need ``ceil(log2(q + 1)) + 1`` bits a value. All the levels that this many bits hold are used
(``2^(bits-1) - 1 >= q``): the same bytes, a finer grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dynfed_lightning.algorithm import CodecLike, Reply, Server
from dynfed_lightning.algorithms.fedavg import FedAvg
from dynfed_lightning.bits import InstructedBits
from dynfed_lightning.codec import Codec
from dynfed_lightning.local import LocalExecutor
from dynfed_lightning.stages import Quantize


def client_levels(q: float, examples: Mapping[int, int]) -> dict[int, int]:
    """Levels per client at the least total for the variance that `q` levels for all would give (section 3.3).

    Args:
        q: levels if all clients had the same.
        examples: rows of each sampled client.
    """
    total = sum(examples.values())
    v = {k: n / total for k, n in examples.items()}
    a = sum(x ** (2 / 3) for x in v.values())
    b = sum(x**2 / q**2 for x in v.values())
    return {k: max(1, round(math.sqrt(a / b) * x ** (2 / 3))) for k, x in v.items()}


def levels_to_bits(levels: int) -> int:
    """``ceil(log2(levels + 1)) + 1``: levels each side, and the sign.

    >>> [levels_to_bits(q) for q in (1, 2, 3, 4, 7, 8, 127)]
    [2, 3, 3, 4, 4, 5, 8]
    """
    return math.ceil(math.log2(levels + 1)) + 1


class DAdaQuant(FedAvg):
    """FedAvg with doubly-adaptive quantisation.

    Args:
        patience: rounds after which a smoothed loss that has not fallen doubles the levels; default a tenth of the rounds.
        min_levels: levels each side at the start.
        max_levels: the most; 127 is 8 bits.
        smoothing: of the loss, in [0, 1).
        per_client: spread the levels over clients by weight (the second adaptation).
        bucket: values that share a scale.
        downlink: see `FedAvg`.
    """

    reply_scalars = ("loss",)

    def __init__(
        self,
        *,
        patience: int | None = None,
        min_levels: int = 1,
        max_levels: int = 127,
        smoothing: float = 0.9,
        per_client: bool = True,
        bucket: int = 512,
        downlink: CodecLike = None,
    ) -> None:
        super().__init__(uplink=Codec(Quantize(InstructedBits(), bucket=bucket)), downlink=downlink)
        if patience is not None and patience < 1:
            raise ValueError(f"Expected `patience` to be a positive number of rounds, but got {patience}.")
        if not 1 <= min_levels <= max_levels <= 127:
            raise ValueError(
                f"Expected 1 <= `min_levels` <= `max_levels` <= 127, but got {min_levels} and {max_levels}."
            )
        if not 0 <= smoothing < 1:
            raise ValueError(f"Expected `smoothing` to be in [0, 1), but got {smoothing}.")
        self.patience = patience
        self.min_levels = min_levels
        self.max_levels = max_levels
        self.smoothing = smoothing
        self.per_client = per_client

    def setup(self, server: Server, executor: LocalExecutor) -> None:
        """Start at `min_levels`."""
        super().setup(server, executor)
        server.state.setdefault("levels", self.min_levels)
        server.state.setdefault("history", [])  # smoothed losses since the levels last changed

    def instruct(self, server: Server, client_id: int) -> dict[str, Any]:
        """This client's bits."""
        q = server.state["levels"]
        if self.per_client:
            q = client_levels(q, {k: server.num_examples(k) for k in server.cohort})[client_id]
        return {"bits": levels_to_bits(min(q, self.max_levels))}

    def server_step(self, server: Server, replies: Sequence[Reply]) -> None:
        """Average; then adapt the levels to the smoothed training loss."""
        super().server_step(server, replies)
        total = sum(r.num_examples for r in replies)
        loss = sum(r.scalars["loss"] * r.num_examples for r in replies) / total
        previous = server.state.get("smoothed", loss)
        smoothed = self.smoothing * previous + (1 - self.smoothing) * loss
        patience = self.patience or max(1, (server.num_rounds or 100) // 10)
        history = [*server.state["history"], smoothed][-(patience + 1) :]
        if len(history) > patience and history[-1] >= history[0]:
            server.state["levels"] = min(2 * server.state["levels"], self.max_levels)
            history = []
        server.state.update(smoothed=smoothed, history=history)
        server.metrics["levels"] = float(server.state["levels"])
