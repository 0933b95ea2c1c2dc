"""pFedMe: every client's own model stays near a local copy of the global one, which follows it slowly.

Reference:
    Dinh, Tran, Nguyen. Personalized Federated Learning with Moreau Envelopes. NeurIPS 2020, arXiv 2006.08848, algorithm 1.

================  ==========================================================================================
paper             here
================  ==========================================================================================
theta_i           the module while a client trains; ``client.state["theta"]`` after it: the personal model
w_i,r             `MoreauSteps.w`: starts each round as the w_t the client was sent; its update travels
K                 `K`: optimiser steps on one batch, each on ``grad f(theta) + lam (theta - w_i,r)`` (eq. 5)
lam, eta, beta    `lam`, `eta`, `beta`
R                 local rounds: the batches of the executor's epochs, or ``max_steps / K``
================  ==========================================================================================

The inner problem is solved by the module's own optimiser, at its own learning rate, from where the last batch left theta, as
by the authors. A batch costs K passes forth and back, of which FedAvg takes one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from dynfed_lightning.algorithm import Client, CodecLike, Received, Reply, Server, Update
from dynfed_lightning.algorithms._local_models import check_finite
from dynfed_lightning.algorithms.fedavg import FedAvg
from dynfed_lightning.local import LocalExecutor
from dynfed_lightning.tensors import Tensors, difference, load_weights, weighted_mean, weights_of


class PFedMe(FedAvg):
    """Personalised federated learning with Moreau envelopes.

    Clients are judged by their own theta (``accuracy``), and the global model beside them (``global_accuracy``). The server
    takes the plain mean over the clients of the round, as the paper does, not one weighted by rows.

    Args:
        lam: how strongly theta is drawn to w, >= 0. The optimiser's learning rate times `lam` should be below 1.
        eta: the step of w towards theta, >= 0: ``w <- w - eta * lam * (w - theta)``. ``eta * lam`` should be at most 1.
        K: optimiser steps on one batch.
        beta: the server's ``w <- (1 - beta) w + beta * mean``; above 1 it goes beyond the mean. Running statistics take the
            mean.
        uplink: see `FedAvg`.
        downlink: see `FedAvg`.

    Raises:
        ValueError: an argument out of range.
    """

    personalised = True
    reports_global = True

    def __init__(
        self,
        lam: float = 15.0,
        eta: float = 0.005,
        K: int = 5,
        beta: float = 1.0,
        *,
        uplink: CodecLike = None,
        downlink: CodecLike = None,
    ) -> None:
        super().__init__(uplink=uplink, downlink=downlink)
        if not beta > 0:
            raise ValueError(f"Expected `beta` to be a positive number, but got {beta}.")
        MoreauSteps(lam, eta, K)  # says now what is wrong with these
        self.lam, self.eta, self.K, self.beta = lam, eta, K, beta

    @property
    def name(self) -> str:
        return "pFedMe"

    def setup(self, server: Server, executor: LocalExecutor) -> None:
        """See `Algorithm.setup`.

        Raises:
            ValueError: gradients are accumulated over batches: fewer than K steps would be on one batch.
        """
        super().setup(server, executor)
        batches = getattr(executor, "trainer_kwargs", {}).get("accumulate_grad_batches", 1)
        if batches != 1:
            raise ValueError(
                "Expected `accumulate_grad_batches` to be 1 under PFedMe, which takes K steps on every batch, but got "
                f"{batches}: take larger batches."
            )

    def client_step(self, client: Client, module: L.LightningModule, received: Received) -> Update:
        """Train theta and w_i; keep the one, upload the update of the other."""
        names = load_weights(module, received.tensors)
        steps = MoreauSteps(self.lam, self.eta, self.K)
        data: Any = _Repeated(client.data, self.K)
        result = replace(client, data=data).fit(module, callbacks=[steps])
        theta = weights_of(module, names)
        check_finite(theta, client.id, "personal model")
        client.state["theta"] = theta
        return Update(
            difference({n: steps.w.get(n, t) for n, t in theta.items()}, received.tensors), scalars=result.scalars()
        )

    def server_step(self, server: Server, replies: Sequence[Reply]) -> None:
        """``w_t+1 = (1 - beta) w_t + (beta / S) sum_i w_i,R`` (line 12)."""
        mean = weighted_mean([r.tensors for r in replies], [1.0] * len(replies))
        raw = {s.name for s in server.schema() if s.raw}
        server.apply({n: t if n in raw else self.beta * t for n, t in mean.items()})

    def personal_model(
        self,
        client_state: Mapping[str, Any],
        module: L.LightningModule,
        global_weights: Tensors,
        client_id: int | None = None,
    ) -> L.LightningModule:
        """The client's theta; the global model, for a client that has not trained yet."""
        load_weights(module, client_state.get("theta", global_weights))
        return module


class MoreauSteps(L.Callback):
    """Trains a module to ``argmin_theta f(theta) + lam/2 ||theta - w||^2``, and w to follow it.

    Args:
        lam: see `PFedMe`.
        eta: see `PFedMe`.
        K: optimiser steps between w's. Where training ends before the K-th, w takes its step then.

    Attributes:
        w: by parameter name; at first the module's weights when training starts.
    """

    def __init__(self, lam: float, eta: float, K: int) -> None:
        for name, value in (("lam", lam), ("eta", eta)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise ValueError(f"Expected `{name}` to be a number >= 0, but got {value!r}.")
        if isinstance(K, bool) or not isinstance(K, int) or K < 1:
            raise ValueError(f"Expected `K` to be a positive integer, but got {K!r}.")
        self.lam, self.eta, self.K = lam, eta, K
        self.w: Tensors = {}
        self._last = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.w = {n: p.detach().clone() for n, p in pl_module.named_parameters() if p.requires_grad}
        self._last = trainer.global_step

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Eq. 5's ``lam (theta - w)``, to the gradients that this optimiser is about to use."""
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, p in pl_module.named_parameters():
            if id(p) in stepped and p.grad is not None:
                w = self.w.setdefault(
                    name, p.detach().clone()
                )  # a callback has thawed it: until now it is as it was sent
                p.grad.add_(p - w, alpha=self.lam)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step - self._last >= self.K:
            self._follow(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step > self._last:
            self._follow(trainer, pl_module)
        self.w = {n: t.to("cpu") for n, t in self.w.items()}

    @torch.no_grad()
    def _follow(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """``w <- w - eta lam (w - theta)`` (line 8)."""
        self._last = trainer.global_step
        for name, p in pl_module.named_parameters():
            if name in self.w:
                self.w[name].sub_(self.w[name] - p, alpha=self.eta * self.lam)


class _Repeated:
    """A client's data whose loader gives every batch several times in a row."""

    def __init__(self, data: Any, times: int) -> None:
        self._data, self._times = data, times

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def train_loader(self, seed: int) -> Any:
        loader = self._data.train_loader(seed)
        return loader if self._times == 1 else _RepeatingLoader(loader, self._times)


class _RepeatingLoader:
    def __init__(self, loader: Any, times: int) -> None:
        self.loader, self.times = loader, times

    def __len__(self) -> int:
        return self.times * len(self.loader)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.loader:
            for _ in range(self.times):
                yield batch
