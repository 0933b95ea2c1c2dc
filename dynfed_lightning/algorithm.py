"""The contract of a method: what the server sends, what a client does, what the server makes of the replies.

An `Algorithm` never sees bytes; a codec never sees an algorithm. Between them, whatever a client or the server passes on goes
through ``encode`` and ``decode``, so each side works with what it decoded and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from dynfed_lightning.codec import Codec, Decoded, as_codec
from dynfed_lightning.errors import ClientFailure
from dynfed_lightning.schema import Schema
from dynfed_lightning.seeds import derive_seed
from dynfed_lightning.stages import Quantize, Stage
from dynfed_lightning.tensors import Tensors, added, load_weights, travelling, weights_of

if TYPE_CHECKING:
    from dynfed_lightning.data import ClientData, PublicSet
    from dynfed_lightning.local import FitResult, LocalExecutor
    from dynfed_lightning.resources import Resources

CodecLike = Codec | Stage | list[Stage] | int | None


@dataclass
class Update:
    """What a client uploads.

    Args:
        tensors: named tensors matching the algorithm's uplink schema; the codec encodes them.
        scalars: small finite numbers (loss, gradient norm); travel as JSON and are counted.
        counters: small lists of integers (label counts); travel as JSON and are counted.
    """

    tensors: Tensors
    scalars: dict[str, float] = field(default_factory=dict)
    counters: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class Received:
    """What a client decoded at the start of its round.

    Args:
        tensors: what `Algorithm.broadcast` sent, as decoded (lossy where the downlink is); other clients of this process may
            hold the same tensors, so never edit them in place.
        scalars: what `Algorithm.instruct` sent to this client.
        round: the round, from 0.
        num_rounds: the total planned, None if open-ended.
    """

    tensors: Tensors
    scalars: Mapping[str, Any]
    round: int
    num_rounds: int | None


@dataclass
class Reply:
    """What the server decoded of one client's upload.

    Args:
        client_id: who.
        tensors: decoded tensors (float32 on the CPU unless the schema says otherwise).
        scalars: numbers the client sent.
        counters: integer lists the client sent.
        num_examples: how many rows it trained on (weight in the mean).
        num_bytes: length of the whole message as it travelled.
        decoded: what the codec knows of the payload: bits and quantiser step per tensor.
    """

    client_id: int
    tensors: Tensors
    scalars: dict[str, float]
    counters: dict[str, list[int]]
    num_examples: int
    num_bytes: int
    decoded: Decoded


@dataclass
class Client:
    """One client during one round: its data, what it can afford, and what it remembers between rounds.

    ``state`` is persisted only if the round succeeds: replace tensors in it, never edit them in place.
    """

    id: int
    data: ClientData
    resources: Resources
    state: dict[str, Any]
    round: int
    num_rounds: int | None
    seed: int
    executor: LocalExecutor

    @property
    def num_examples(self) -> int:
        """Rows this client trains on."""
        return self.data.num_examples

    def fit(self, module: L.LightningModule, callbacks: Sequence[L.Callback] = ()) -> FitResult:
        """Train `module` in place on this client's data with the federation's local executor.

        Raises:
            ClientFailure: the training loss became NaN or infinite (``nan_loss``), or no step was taken (``no_data``).
        """
        return self.executor.fit(
            module,
            self.data,
            callbacks=callbacks,
            round=self.round,
            num_rounds=self.num_rounds,
            seed=self.seed,
        )


class Server:
    """The server's side: the global module, its pseudo-gradient step, and what the algorithm remembers.

    Args:
        module: the global model (the federation's child module; its parameters are what the outer Trainer optimises).
        new_module: makes a fresh copy of the user's module, never attached to a Trainer (for teachers, students).
        num_clients: how many clients are registered.
        num_examples: rows of each registered client, as announced when it joined.
        resources: what each registered client announced it can afford.
        num_classes: C, or None where the task has none.
        public: the public set, or None.
        seed: the run's seed.
        probe: gives a batch of the clients' form, for checks before training; None where there is none.
    """

    def __init__(
        self,
        module: L.LightningModule,
        *,
        new_module: Callable[[], L.LightningModule],
        num_clients: int,
        num_examples: Callable[[int], int],
        resources: Callable[[int], Resources],
        num_classes: int | None,
        public: PublicSet | None,
        seed: int,
        probe: Callable[[], Any] | None = None,
    ) -> None:
        self.module = module
        self.new_module = new_module
        self.num_clients = num_clients
        self.num_examples = num_examples
        self.resources = resources
        self.num_classes = num_classes
        self.public = public
        self.seed = seed
        self.probe = probe
        self.round = 0
        self.num_rounds: int | None = None
        self.cohort: list[int] = []
        self.state: dict[
            str, Any
        ] = {}  # the algorithm's memory: tensors, numbers, strings, lists and dicts, checkpointed
        self.metrics: dict[str, float] = {}  # the algorithm's own columns for this round
        self.client_metrics: dict[int, dict[str, float]] = {}  # and per client, e.g. its share as a teacher
        self.received: Tensors = {}  # what this round's clients hold; equals what was broadcast unless the downlink is lossy

    def weights(self) -> Tensors:
        """Copies of what travels of the global module."""
        return weights_of(self.module)

    def schema(self) -> Schema:
        """Names, shapes, dtypes of `weights`, statistics marked raw."""
        live, raw = travelling(self.module)
        return Schema.of(live, raw=raw)

    def client_weights(self, reply: Reply) -> Tensors:
        """The weights ``w_hat_k`` of a client as the server knows them: what the client was sent plus its decoded update."""
        live, _ = travelling(self.module)
        return added({n: self.received[n] for n in live}, reply.tensors)

    @torch.no_grad()
    def apply(self, update: Mapping[str, Tensor]) -> None:
        """Make ``-update`` the gradient of the global parameters; the federation then takes the one optimiser step of the round.

        With SGD(lr=1) the new weights are ``w + update``. Statistics (buffers) have no gradient: the update is added to them.
        Calling it again in a round replaces the gradient, so call it once.
        """
        live, raw = travelling(self.module)
        for name, tensor in live.items():
            step = update[name].to(device=tensor.device, dtype=tensor.dtype)
            if name in raw:
                tensor.add_(step)
            else:
                tensor.grad = -step

    def rng(self, stream: int = 0) -> torch.Generator:
        """A generator that depends on (seed, round, stream) alone."""
        return torch.Generator().manual_seed(derive_seed(self.seed, "server", self.round, stream))


class Algorithm:
    """A federated method: four hooks around the round. `FedAvg` supplies every default.

    Args:
        uplink: codec of what clients send, or a stage, a list of stages, or bits for ``Codec(Quantize(bits))``; default
            float32.
        downlink: of what the server sends, likewise. A lossy one sends differences to what each client holds.

    Attributes:
        uplink: see above.
        downlink: see above.
        reply_scalars: the scalars a reply must bring, finite numbers; one without is left out of the round.
        requires_public: the method cannot run without a public set.
        personalised: clients are judged by their own models (`personal_model`), not by the global one.
        reports_global: of a personalised method, whether the global model is judged too (``global_accuracy``).
        adapts: of a personalised method, whether `adapt` is called for every model that is judged.
        pooled: train on all clients' rows in one place (the centralised end of the scale).
        communicates: False for the ends of the scale, where nothing travels and no bytes are counted.
    """

    uplink: Codec
    downlink: Codec
    reply_scalars: tuple[str, ...] = ()
    requires_public: bool = False
    personalised: bool = False
    reports_global: bool = False
    adapts: bool = False
    pooled: bool = False
    communicates: bool = True

    def __init__(self, *, uplink: CodecLike = None, downlink: CodecLike = None) -> None:
        self.uplink = _codec("uplink", uplink)
        self.downlink = _codec("downlink", downlink)

    @property
    def name(self) -> str:
        """What tables call it."""
        return type(self).__name__

    def check_public(self, present: bool) -> None:
        """Refuse to run without a public set where the method needs one; `present`: whether there is one.

        Raises:
            ValueError: it is missing.
        """
        if self.requires_public and not present:
            raise ValueError(
                f"Expected a public set, since {self.name} distils on the server, but the data module has none: "
                "give `FederatedDataModule(public=200)` (rows set aside) or a dataset of its own."
            )

    def setup(self, server: Server, executor: LocalExecutor) -> None:
        """Check that the server has what the method needs, before any training.

        Raises:
            ValueError: something is missing; the message names it.
        """
        self.check_public(server.public is not None)

    def identity(self) -> dict[str, Any]:
        """What a run that resumes a checkpoint must have in common with the one that made it, beyond what the federation checks.

        By name, as the message of a mismatch calls it; values that compare equal and that ``weights_only=True`` reads. Called
        after `setup`.
        """
        return {}

    def uplink_schema(self, weights: Schema) -> Schema:
        """The schema of `Update.tensors`, given that of the weights. Agreed when a client joins, so it never travels."""
        return weights

    def downlink_schema(self, weights: Schema) -> Schema:
        """The schema of what `broadcast` returns, given that of the weights."""
        return weights

    def broadcast(self, server: Server) -> Tensors:
        """What every client of the round receives; encoded once."""
        return server.weights()

    def instruct(self, server: Server, client_id: int) -> dict[str, Any]:
        """Small per-client numbers (bits, deadline); counted as bytes too."""
        return {}

    def client_callbacks(self, client: Client, received: Received) -> list[L.Callback]:
        """Lightning callbacks that make a client's training this method's."""
        return []

    def client_step(self, client: Client, module: L.LightningModule, received: Received) -> Update:
        """One client's round: train locally, say what to upload."""
        raise TypeError(f"{self.name} does not say what a client does: override `client_step`.")

    def server_step(self, server: Server, replies: Sequence[Reply]) -> None:
        """Make one step of the global model of the replies (sorted by client id): call ``server.apply`` once."""
        raise TypeError(f"{self.name} does not say what the server does: override `server_step`.")

    def check_reply(self, server: Server, reply: Reply) -> None:
        """Refuse what a faulty or lying client says before `server_step` believes it; nothing of the reply is kept yet.

        Raises:
            ClientFailure: ``malformed``; the client is left out of the round and counted.
        """
        known = server.num_examples(reply.client_id)
        if reply.num_examples != known:
            raise ClientFailure(
                "malformed",
                f"Expected client {reply.client_id} to have {known} examples as when it joined, but got {reply.num_examples}.",
            )
        for name in self.reply_scalars:
            if finite_number(reply.scalars.get(name)) is None:
                raise ClientFailure(
                    "malformed",
                    f"Expected the scalar `{name}` to be a finite number, but got {reply.scalars.get(name)!r}.",
                )

    def personal_model(
        self,
        client_state: Mapping[str, Any],
        module: L.LightningModule,
        global_weights: Tensors,
        client_id: int | None = None,
    ) -> L.LightningModule:
        """The model that this client is judged by; default: the global one.

        Args:
            client_state: what the client remembers; empty before its first round.
            module: a fresh copy of the user's module, to load into.
            global_weights: what travels of the global model.
            client_id: whose model; None where the caller does not say.
        """
        load_weights(module, global_weights)
        return module

    def adapt(self, client: Client, module: L.LightningModule) -> None:
        """Fit a client's model to its own rows before it is judged, in place; default: leave it as it is.

        Called where `adapts` says so, after each `personal_model`, in every evaluation.

        Args:
            client: whose model; its ``state`` is a copy that nobody keeps.
            module: what `personal_model` returned, on any device; it may be left on another.
        """


def finite_number(value: object) -> float | None:
    """`value` as a float, None if it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _codec(name: str, value: CodecLike) -> Codec:
    """A codec, a stage, a chain of stages, bits to quantise to, or None for float32."""
    if isinstance(value, int) and not isinstance(value, bool):
        return Codec(Quantize(value))
    if isinstance(value, (list, tuple)) and all(isinstance(v, Stage) for v in value):
        return Codec(*value)
    if value is None or isinstance(value, (Codec, Stage)):
        return as_codec(value)
    raise TypeError(
        f"Expected `{name}` to be a Codec, a stage, a list of stages, bits or None, but got {type(value).__name__}."
    )


def total_examples(replies: Iterable[Reply]) -> list[float]:
    """The weights of a sample-weighted mean over `replies`."""
    return [float(r.num_examples) for r in replies]
