"""FML: every client's own model and a copy of a shared "meme" model teach each other; the meme travels.

Reference:
    Shen, Zhang, Jia, Zhang, Huang, Zhou, Kuang, Wu, Wu. Federated Mutual Learning. arXiv 2006.16765, 2020, section 4, on deep
    mutual learning (Zhang, Xiang, Hospedales, Lu, CVPR 2018).

=================  ==========================================================================================
paper              here
=================  ==========================================================================================
meme model         `module`: the federation's module, forked to the clients and merged by averaging
local model        ``client.state["local_model"]``, the client's own architecture, never sent; it is judged
L_local            ``alpha CE + (1 - alpha) KL(p_meme || p_local)``
L_meme             ``beta CE + (1 - beta) KL(p_local || p_meme)``
=================  ==========================================================================================

In each loss the other model's output is a constant. With ``alpha = beta = 1/2`` this is FedKD without its weight 1/D, its
hidden loss and its SVD, at half the learning rates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import lightning as L
from torch import nn
from torch.optim import Optimizer

from dynfed_lightning.algorithm import Client, CodecLike, Received, Reply, Server, Update
from dynfed_lightning.algorithms._local_models import LocalModels, kept, mean_scalar, remembered
from dynfed_lightning.algorithms.fedavg import FedAvg
from dynfed_lightning.local import LocalExecutor
from dynfed_lightning.mutual import MutualDistillation
from dynfed_lightning.tensors import Tensors, difference, load_weights, weights_of


class FML(FedAvg):
    """Federated mutual learning; the federation's module is the meme.

    Clients are judged by their local models (``accuracy``), and the meme beside them (``global_accuracy``). Per round
    ``local_loss`` is the local models' mean task loss; ``train_loss`` is the meme's. A client whose local model does not stay
    finite is left out of the round (``failed/nan_model``) and goes on from what it had before. A run resumes only from a
    checkpoint of the same initial local models.

    Args:
        local_model: a network or LightningModule that every client starts from, a mapping from client id to such a model, or a
            function of the client id (before training, those of up to 64 clients are made and checked). A network trains
            with the module's recipe, a LightningModule with its own.
        alpha: share of the task loss in a local model's loss, in [0, 1].
        beta: in the meme's, likewise.
        local_optimizer: makes the local models' optimiser from their parameters, instead of the above.
        uplink: see `FedAvg`.
        downlink: see `FedAvg`.

    Raises:
        TypeError: `local_model` is none of these.
        ValueError: a share outside [0, 1].
    """

    personalised = True
    reports_global = True
    reply_scalars = ("loss", "local_loss")

    def __init__(
        self,
        local_model: nn.Module | Mapping[int, nn.Module] | Callable[[int], nn.Module],
        *,
        alpha: float = 0.5,
        beta: float = 0.5,
        local_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        uplink: CodecLike = None,
        downlink: CodecLike = None,
    ) -> None:
        super().__init__(uplink=uplink, downlink=downlink)
        for name, share in (("alpha", alpha), ("beta", beta)):
            if not 0 <= share <= 1:
                raise ValueError(f"Expected `{name}` to be in [0, 1], but got {share}.")
        self.models = LocalModels(local_model, "local_model")
        self.alpha = alpha
        self.beta = beta
        self.local_optimizer = local_optimizer
        self._seed = 0

    def setup(self, server: Server, executor: LocalExecutor) -> None:
        """Check that the models fit together, on a batch if there is one.

        Raises:
            ValueError: no logits, other classes, a client without a model, an optimiser that cannot be made again for it.
        """
        super().setup(server, executor)
        self._seed = server.seed
        self.models.check_clients(server.num_clients)
        meme = server.new_module().to("cpu")
        batch = None if server.probe is None else server.probe()
        for client_id in self.models.kinds(server.num_clients):
            self._mutual(self.models.fresh(client_id, meme, server.seed)).check(meme, batch)

    def identity(self) -> dict[str, Any]:
        """The local models as they start."""
        return self.models.identity(self._seed)

    def _mutual(self, local: L.LightningModule) -> MutualDistillation:
        return MutualDistillation(
            local,
            role="student",
            peer_optimizer=self.local_optimizer,
            hidden=False,
            adaptive=False,
            task_weight=(self.beta, self.alpha),
            weight=(1 - self.beta, 1 - self.alpha),
        )

    def client_step(self, client: Client, module: L.LightningModule, received: Received) -> Update:
        """Train the local model and a copy of the meme on the same batches; upload the meme's update."""
        names = load_weights(module, received.tensors)
        local = self.models.restore(client.id, client.state, module, self._seed)
        own = kept(local)
        mutual = self._mutual(local)
        client.fit(module, callbacks=[mutual])
        client.state.update(client=client.id, local_model=remembered(local, own, client.id, "local model"))
        scalars = {"loss": mutual.means["student_loss"], "local_loss": mutual.means["teacher_loss"]}
        return Update(difference(weights_of(module, names), received.tensors), scalars=scalars)

    def server_step(self, server: Server, replies: Sequence[Reply]) -> None:
        """Merge: the sample-weighted mean of the memes."""
        super().server_step(server, replies)
        server.metrics["local_loss"] = mean_scalar(replies, "local_loss")

    def personal_model(
        self,
        client_state: Mapping[str, Any],
        module: L.LightningModule,
        global_weights: Tensors,
        client_id: int | None = None,
    ) -> L.LightningModule:
        """The client's own model; as it starts, for a client that has not trained yet."""
        return self.models.restore(client_id, client_state, module, self._seed)
