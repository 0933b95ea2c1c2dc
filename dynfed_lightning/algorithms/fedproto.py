"""FedProto: clients keep their models and share what a class looks like to them, its mean embedding.

Reference:
    Tan, Long, Liu, Zhou, Lu, Jiang, Zhang. FedProto: Federated Prototype Learning across Heterogeneous Clients. AAAI 2022,
    arXiv 2105.00243, algorithm 1.

==================  =====================================================================================
paper               here
==================  =====================================================================================
f_i(phi_i; x)       what the layer `head` is given: the embedding, ``[B, D]``
C_i^(j) (eq. 3)     ``tensors["prototype/j"]``: the mean embedding of client i's rows of class j
D_{i,j}             ``counters["labels"][j]``
bar C^(j) (eq. 6)   ``server.state["prototypes"]["prototype/j"]``
lambda, L_R         `weight`, the mean squared distance of a row's embedding to its class's prototype
==================  =====================================================================================

As in the authors' code, L_R compares every row of a batch, not the mean of its class, with the global prototype. Eq. 6 is
printed with a second division, by the number of clients, which would shrink prototypes the more clients have a class; here it
is the sample-weighted mean. A class that no client of the round has keeps its last prototype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from dynfed_lightning.algorithm import Algorithm, Client, CodecLike, Received, Reply, Server, Update
from dynfed_lightning.algorithms._local_models import LocalModels, kept, recall, remembered
from dynfed_lightning.batches import call_model, split_batch, to_device
from dynfed_lightning.callbacks import ExtraLoss
from dynfed_lightning.capture import find_layer
from dynfed_lightning.codec import Codec
from dynfed_lightning.errors import ClientFailure
from dynfed_lightning.loaders import RowLoader
from dynfed_lightning.local import LocalExecutor
from dynfed_lightning.quiet import fixed_threads
from dynfed_lightning.schema import Schema, TensorSpec
from dynfed_lightning.stages import SkipZeros
from dynfed_lightning.tensors import Tensors, weighted_mean

_PREFIX = "prototype/"


class PrototypeTerm(ExtraLoss):
    """Adds ``lambda MSE(embedding, prototype of the row's class)`` to the loss; rows of unknown classes add 0.

    Args:
        prototypes: ``[C, D]``; a row of zeros is a class nobody has described yet.
        weight: lambda, >= 0.
        head: the name of the layer whose input is the embedding.
    """

    def __init__(self, prototypes: Tensor, weight: float = 1.0, head: str = "head") -> None:
        if not weight >= 0:
            raise ValueError(f"Expected `weight` to be a number >= 0, but got {weight}.")
        self.prototypes, self.weight, self.head = prototypes, weight, head
        self._embedding: Tensor | None = None
        self._handle: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen to what the head is given."""
        self.prototypes = self.prototypes.to(pl_module.device)
        self._handle = find_layer(pl_module, self.head, "module").register_forward_pre_hook(self._listen)
        super().on_train_start(trainer, pl_module)

    def _listen(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._embedding = args[0]

    def before_step(self, pl_module: L.LightningModule, batch: Any) -> None:
        """Forget the last batch."""
        self._embedding = None

    def extra(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor, batch: Any, batch_idx: int
    ) -> Tensor:
        """``L_S + lambda L_R``."""
        if self._embedding is None:
            raise ValueError(f"Expected the layer {self.head!r} to run in the training step, but it did not.")
        embedding, self._embedding = self._embedding, None
        targets = self.prototypes[split_batch(batch)[1]]
        known = (targets != 0).any(1, keepdim=True)
        return loss + self.weight * torch.where(known, embedding.float() - targets, 0).square().mean()

    def _unwrap(self) -> None:
        super()._unwrap()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


class FedProto(Algorithm):
    """Federated prototype learning: one vector a class travels, models never do.

    Clients are judged by their own models. They may have different architectures, as long as embeddings have one size. A client
    whose model does not stay finite is left out of the round (``failed/nan_model``) and goes on from what it had before. A run
    resumes only from a checkpoint of the same initial `models`.

    Args:
        weight: lambda of eq. 7, >= 0.
        models: the clients' models, if they are not all the federation's module: a mapping from client id to model, or a
            function of the client id (before training, those of up to 64 clients are made and checked).
        head: the name of the models' last linear layer; what it is given is the embedding.
        uplink: codec of prototypes up, or bits. A class that a client does not have costs nothing in any case.
        downlink: of prototypes down; must be lossless.

    Raises:
        ValueError: a negative weight, a lossy downlink.
        TypeError: `models` is none of these.
    """

    personalised = True

    def __init__(
        self,
        weight: float = 1.0,
        *,
        models: Mapping[int, nn.Module] | Callable[[int], nn.Module] | nn.Module | None = None,
        head: str = "head",
        uplink: CodecLike = None,
        downlink: CodecLike = None,
    ) -> None:
        super().__init__(uplink=uplink, downlink=downlink)
        if not self.downlink.lossless:
            raise ValueError("Expected a lossless `downlink` under FedProto, whose prototypes change as a whole.")
        self.uplink = Codec(SkipZeros(), *self.uplink.stages)
        self.downlink = Codec(SkipZeros(), *self.downlink.stages)
        PrototypeTerm(torch.zeros(1, 1), weight, head)  # says now what is wrong with `weight`
        self.weight = weight
        self.models = None if models is None else LocalModels(models, "models")
        self.head = head
        self._seed = 0
        self._shape = (0, 0)

    # ------------------------------------------------------------------ set-up

    def setup(self, server: Server, executor: LocalExecutor) -> None:
        """Find the size of the embedding.

        Raises:
            ValueError: no classes, no such layer, embeddings of different sizes, a client without a model.
        """
        super().setup(server, executor)
        if not server.num_classes:
            raise ValueError("Expected a classification task under FedProto, but `num_classes` is not known.")
        self._seed = server.seed
        module = server.new_module().to("cpu")
        models = [module]
        if self.models is not None:
            self.models.check_clients(server.num_clients)
            models = [self.models.fresh(k, module, server.seed) for k in self.models.kinds(server.num_clients)]
            for model in models:
                executor.check(model)
        sizes = {_size(m, self.head) for m in models}
        if len(sizes) != 1:
            raise ValueError(f"Expected clients' embeddings of one size, but got {sorted(sizes)}.")
        self._shape = (server.num_classes, sizes.pop())
        classes, size = self._shape
        server.state.setdefault("prototypes", {f"{_PREFIX}{j}": torch.zeros(size) for j in range(classes)})

    def identity(self) -> dict[str, Any]:
        """The clients' models as they start; the federation's module is in the checkpoint itself."""
        return {"initial models": None} if self.models is None else self.models.identity(self._seed)

    def uplink_schema(self, weights: Schema) -> Schema:
        """A vector a class; no weights."""
        classes, size = self._shape
        return Schema(TensorSpec(f"{_PREFIX}{j}", (size,), torch.float32) for j in range(classes))

    downlink_schema = uplink_schema

    # ------------------------------------------------------------------- round

    def broadcast(self, server: Server) -> Tensors:
        """The global prototypes."""
        return dict(server.state["prototypes"])

    def client_step(self, client: Client, module: L.LightningModule, received: Received) -> Update:
        """Train one's own model towards the global prototypes; upload the mean embedding of every class one has."""
        own = self._model(client.state, module, client.id)
        names = kept(own)
        classes, _ = self._shape
        prototypes = torch.stack([received.tensors[f"{_PREFIX}{j}"] for j in range(classes)])
        result = client.fit(own, callbacks=[PrototypeTerm(prototypes, self.weight, self.head)])
        client.state.update(client=client.id, models=remembered(own, names, client.id, "model"))
        sums, counts = self._embeddings(client, own)
        local = (sums / counts.clamp_min(1).unsqueeze(1)).float()
        tensors = {f"{_PREFIX}{j}": local[j] for j in range(classes)}
        return Update(tensors, scalars=result.scalars(), counters={"labels": counts.tolist()})

    @torch.no_grad()
    def _embeddings(self, client: Client, own: L.LightningModule) -> tuple[Tensor, Tensor]:
        """The sum of the embeddings of each class's rows, float64 ``[C, D]``, and their number, int64 ``[C]``."""
        sums, counts = torch.zeros(self._shape, dtype=torch.float64), torch.zeros(self._shape[0], dtype=torch.int64)
        seen: list[Tensor] = []
        handle = find_layer(own, self.head, "module").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        device = client.executor.device or torch.device("cpu")
        own.eval().to(device)
        try:
            with fixed_threads(client.executor.threads):
                for batch in RowLoader(client.data.table, client.data.train_rows, 256):
                    inputs, targets = split_batch(batch)
                    seen.clear()
                    call_model(own, to_device(inputs, device))
                    sums.index_add_(0, targets, seen[-1].to("cpu", torch.float64))
                    counts += torch.bincount(targets, minlength=len(counts))
        finally:
            handle.remove()
            own.to("cpu")
        return sums, counts

    def check_reply(self, server: Server, reply: Reply) -> None:
        """Label counts must be there and add up to the client's rows."""
        super().check_reply(server, reply)
        labels = reply.counters.get("labels", [])
        if len(labels) != server.num_classes or sum(labels) != reply.num_examples or min(labels, default=0) < 0:
            raise ClientFailure(
                "malformed",
                f"Expected {server.num_classes} label counts that sum to {reply.num_examples}, but client {reply.client_id} "
                f"sent {len(labels)} that sum to {sum(labels)}.",
            )

    def server_step(self, server: Server, replies: Sequence[Reply]) -> None:
        """Eq. 6 for every class that somebody has; the global module stays as it is."""
        prototypes = dict(server.state["prototypes"])
        for j, name in enumerate(prototypes):
            counts = [float(r.counters["labels"][j]) for r in replies]
            if sum(counts) > 0:
                prototypes[name] = weighted_mean([{name: r.tensors[name]} for r in replies], counts)[name]
        server.state["prototypes"] = prototypes
        server.apply({n: torch.zeros_like(t) for n, t in server.weights().items()})

    def _model(self, state: Mapping[str, Any], module: L.LightningModule, client_id: int | None) -> L.LightningModule:
        if self.models is not None:
            return self.models.restore(client_id, state, module, self._seed)
        if "models" in state:
            recall(module, state["models"], "module")
        return module

    def personal_model(
        self,
        client_state: Mapping[str, Any],
        module: L.LightningModule,
        global_weights: Tensors,
        client_id: int | None = None,
    ) -> L.LightningModule:
        """The client's own model; as it starts, for a client that has not trained yet."""
        return self._model(client_state, module, client_id)


def _size(model: nn.Module, head: str) -> int:
    layer = find_layer(model, head, "module")
    size = getattr(layer, "in_features", None)
    if not isinstance(size, int):
        raise ValueError(f"Expected `head` to name a linear layer, but {head!r} is a {type(layer).__name__}.")
    return size
