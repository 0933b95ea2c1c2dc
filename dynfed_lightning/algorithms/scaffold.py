"""SCAFFOLD: control variates correct the drift of local training.

Reference:
    Karimireddy, Kale, Mohri, Reddi, Stich, Suresh. SCAFFOLD: Stochastic Controlled Averaging for Federated Learning.
    ICML 2020, arXiv 1910.06378, algorithm 1 with option II.

==========  =========================================================
paper       here
==========  =========================================================
x, y_i      weights received, weights after local training
c, c_i      ``server.state["control"]``, ``client.state["control"]``
K, eta_l    ``result.steps``, ``result.learning_rate``
S, N        the replies, ``server.num_clients``
==========  =========================================================

Control variates travel both ways and are counted. The model update is averaged by samples, like every method's here; the
control update uniformly, as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
import torch

from dynfed_lightning.algorithm import Client, Received, Reply, Server, Update, total_examples
from dynfed_lightning.algorithms.fedavg import FedAvg
from dynfed_lightning.callbacks import GradientShift
from dynfed_lightning.local import LocalExecutor
from dynfed_lightning.schema import Schema, TensorSpec
from dynfed_lightning.tensors import Tensors, difference, load_weights, weighted_mean, weights_of

_PREFIX = "control/"


class Scaffold(FedAvg):
    """FedAvg with control variates; the clients' optimiser must be plain SGD."""

    @property
    def name(self) -> str:
        return "SCAFFOLD"

    def setup(self, server: Server, executor: LocalExecutor) -> None:
        """Check the clients' optimiser and start all control variates at 0.

        Raises:
            ValueError: the module's optimiser is not SGD without momentum: option II divides by its learning rate.
        """
        super().setup(server, executor)
        found = server.new_module().configure_optimizers()
        plain = isinstance(found, torch.optim.SGD) and all(
            g["momentum"] == 0 and g["weight_decay"] == 0 and g["lr"] == found.param_groups[0]["lr"]
            for g in found.param_groups
        )
        if not plain:
            raise ValueError(
                "Expected clients that train with plain SGD (one learning rate, no momentum, weight decay or scheduler) "
                f"under SCAFFOLD, but `configure_optimizers` gives {type(found).__name__}."
            )
        clipped = getattr(executor, "trainer_kwargs", {}).get("gradient_clip_val")
        if clipped is not None:
            raise ValueError(
                "Expected no gradient clipping under SCAFFOLD, whose option II reads the gradient off the weights, but "
                f"got `gradient_clip_val` = {clipped}."
            )
        server.state.setdefault("control", _zeros(server.schema()))

    def uplink_schema(self, weights: Schema) -> Schema:
        """The weights and the control variates of the parameters."""
        return _with_control(weights)

    downlink_schema = uplink_schema

    def broadcast(self, server: Server) -> Tensors:
        """x and c."""
        return {**server.weights(), **_prefixed(server.state["control"])}

    def client_step(self, client: Client, module: L.LightningModule, received: Received) -> Update:
        """Local steps along ``g - c_i + c``; then ``c_i+ = c_i - c + (x - y_i) / (K eta_l)`` (option II)."""
        control = {n.removeprefix(_PREFIX): t for n, t in received.tensors.items() if n.startswith(_PREFIX)}
        own: Tensors = client.state.get("control") or {n: torch.zeros_like(t) for n, t in control.items()}
        names = load_weights(module, received.tensors)
        result = client.fit(module, callbacks=[GradientShift(difference(control, own))])
        update = difference(weights_of(module, names), received.tensors)
        scale = 1.0 / (result.steps * result.learning_rate)
        own_next = {n: own[n] - control[n] - scale * update[n] for n in control}
        client.state["control"] = own_next
        return Update({**update, **_prefixed(difference(own_next, own))}, scalars=result.scalars())

    def server_step(self, server: Server, replies: Sequence[Reply]) -> None:
        """``x += mean dy``; ``c += |S|/N mean dc``."""
        mean = weighted_mean([r.tensors for r in replies], total_examples(replies), names=server.weights())
        server.apply(mean)
        control: Tensors = server.state["control"]
        change = weighted_mean([r.tensors for r in replies], [1.0] * len(replies), names=_prefixed(control))
        share = len(replies) / server.num_clients
        server.state["control"] = {n: t + share * change[_PREFIX + n] for n, t in control.items()}


def _prefixed(tensors: Tensors) -> Tensors:
    return {_PREFIX + n: t for n, t in tensors.items()}


def _zeros(schema: Schema) -> Tensors:
    return {s.name: torch.zeros(s.shape, dtype=s.dtype) for s in schema if not s.raw}


def _with_control(weights: Schema) -> Schema:
    return Schema([*weights, *(TensorSpec(_PREFIX + s.name, s.shape, s.dtype) for s in weights if not s.raw)])
