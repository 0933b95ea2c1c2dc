"""The client's side of a round: bytes in, bytes out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import lightning as L

from dynfed_lightning.algorithm import Algorithm, Client, Received
from dynfed_lightning.codec import CodecContext
from dynfed_lightning.downlink import DownlinkReceiver
from dynfed_lightning.errors import ClientFailure, NonFiniteError
from dynfed_lightning.message import Message
from dynfed_lightning.schema import Schema
from dynfed_lightning.seeds import derive_seed
from dynfed_lightning.store import State, Store
from dynfed_lightning.tensors import Tensors, travelling

if TYPE_CHECKING:
    from dynfed_lightning.data import ClientData
    from dynfed_lightning.local import LocalExecutor
    from dynfed_lightning.resources import Resources


class ClientRuntime:
    """Runs clients' rounds: decodes a request, lets the algorithm train, encodes the reply, keeps the client's state.

    Args:
        template: the user's module, never attached to a Trainer; every round trains a fresh copy.
        algorithm: the method.
        executor: how a client trains.
        data: gives a client's rows by id.
        resources: gives what a client can afford by id.
        store: what clients remember between rounds.
        seed: the run's seed; a client's round is seeded from (seed, round, client id).
    """

    def __init__(
        self,
        template: L.LightningModule,
        algorithm: Algorithm,
        executor: LocalExecutor,
        *,
        data: Callable[[int], ClientData],
        resources: Callable[[int], Resources],
        store: Store,
        seed: int,
    ) -> None:
        self.template = template
        self.algorithm = algorithm
        self.executor = executor
        self.data = data
        self.resources = resources
        self.store = store
        self.seed = seed
        live, raw = travelling(template)
        weights = Schema.of(live, raw=raw)
        self.uplink_schema = algorithm.uplink_schema(weights)
        self.downlink_schema = algorithm.downlink_schema(weights)
        self._receiver = DownlinkReceiver(algorithm.downlink)
        self._staged: dict[int, State] = {}  # what clients will remember if the server accepts their reply

    def agree(self, initial: Tensors | None) -> None:
        """The weights that clients hold before their first round without having been sent any; None: they hold nothing."""
        self._receiver.initial = initial

    def run(self, request: bytes) -> bytes:
        """One client's round.

        Raises:
            ClientFailure: the client could not finish; its state is as it was before the round.
            PayloadError: the request does not decode, or the update holds NaN or infinity.
        """
        message = Message.from_bytes(request)
        state = self.store.read(message.client_id)
        tensors = self._receiver.receive(
            message.kind, message.base, message.parts, self.downlink_schema, message.round, state
        )
        seed = derive_seed(self.seed, "client", message.round, message.client_id)
        client = Client(
            id=message.client_id,
            data=self.data(message.client_id),
            resources=self.resources(message.client_id),
            state=state,
            round=message.round,
            num_rounds=message.num_rounds,
            seed=seed,
            executor=self.executor,
        )
        received = Received(tensors, message.scalars, message.round, message.num_rounds)
        update = self.algorithm.client_step(client, copy.deepcopy(self.template), received)
        ctx = CodecContext(
            seed=derive_seed(seed, "uplink"),
            round=message.round,
            num_rounds=message.num_rounds,
            scalars=message.scalars,
            state=state.setdefault("uplink", {}),
        )
        try:
            payload = self.algorithm.uplink.encode(update.tensors, ctx, self.uplink_schema)
        except NonFiniteError as error:
            raise ClientFailure("nan_update", str(error)) from error
        reply = Message(
            round=message.round,
            client_id=message.client_id,
            scalars=update.scalars,
            counters=update.counters,
            num_examples=client.num_examples,
            parts=[payload],
        ).to_bytes()
        if not state["uplink"]:
            del state["uplink"]
        self._staged[message.client_id] = state
        return reply

    def settle(self, accepted: Mapping[int, bool]) -> None:
        """Keep what clients made of their round, or forget it: both sides must remember the same rounds.

        Residuals, control variates and references of a reply that never arrived would otherwise drift from the server's.

        Args:
            accepted: client -> whether its reply became part of the round. All their states are kept, or, where the store has
                ``write_all`` and raises, none.
        """
        states, self._staged = self._staged, {}
        kept = {k: states[k] for k, yes in accepted.items() if yes and k in states}
        if hasattr(self.store, "write_all"):
            self.store.write_all(kept)
            return
        for k, state in kept.items():
            self.store.write(k, state)
