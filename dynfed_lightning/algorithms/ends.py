"""The two ends of the scale: every client alone, and all data in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch

from dynfed_lightning.algorithm import Algorithm, Client, Received, Reply, Server, Update
from dynfed_lightning.algorithms.fedavg import FedAvg
from dynfed_lightning.schema import Schema
from dynfed_lightning.tensors import Tensors, load_weights, weights_of


class Local(Algorithm):
    """Every client trains its own model on its own rows; nothing travels.

    Judged by the mean over clients of each own model's accuracy on the whole test set. All start at the same weights.
    """

    personalised = True
    communicates = False

    def uplink_schema(self, weights: Schema) -> Schema:
        """Nothing."""
        return Schema([])

    def client_step(self, client: Client, module: L.LightningModule, received: Received) -> Update:
        """Go on training one's own model."""
        names = load_weights(module, client.state.get("weights", received.tensors))
        result = client.fit(module)
        client.state["weights"] = weights_of(module, names)
        return Update({}, scalars=result.scalars())

    def server_step(self, server: Server, replies: Sequence[Reply]) -> None:
        """The global model stays where it started: every client's first round starts from it."""
        server.apply({n: torch.zeros_like(t) for n, t in server.weights().items()})

    def personal_model(
        self,
        client_state: Mapping[str, Any],
        module: L.LightningModule,
        global_weights: Tensors,
        client_id: int | None = None,
    ) -> L.LightningModule:
        """The client's own model; the common start for a client that has not trained yet."""
        load_weights(module, client_state.get("weights", global_weights))
        return module


class Centralised(FedAvg):
    """All clients' rows in one place: one client that has everything. The data has already travelled; no bytes are counted."""

    pooled = True
    communicates = False
