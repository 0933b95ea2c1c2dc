"""Lightning callbacks that run inside a client's training; each works in any ``L.Trainer`` too.

They edit gradients in ``on_before_optimizer_step``, which Lightning calls after mixed precision has unscaled them and
before they are clipped, so they are exact under every precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer


def _own_parameters(module: L.LightningModule, optimizer: Optimizer) -> list[tuple[str, torch.nn.Parameter]]:
    """The named parameters of `module` that `optimizer` steps and that have a gradient."""
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [(n, p) for n, p in module.named_parameters() if id(p) in stepped and p.grad is not None]


class GradientNorm(L.Callback):
    """Mean L2 norm of the gradient over the steps of a fit: DynFed's ``G_k`` (He et al. 2025, eq. 4).

    Attributes:
        value: the mean norm (float), 0.0 before any step.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._steps = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._sum, self._steps = None, 0

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        grads = [p.grad for _, p in _own_parameters(pl_module, optimizer) if p.grad is not None]
        if not grads:
            return
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))).detach()
        # Kept on the device: reading it every step would stall a GPU.
        self._sum = norm if self._sum is None else self._sum + norm
        self._steps += 1

    @property
    def value(self) -> float:
        return 0.0 if self._sum is None else float(self._sum) / self._steps


class ProximalTerm(L.Callback):
    """FedProx's ``mu/2 ||w - w_anchor||^2`` as an edit of the gradient (Li et al., MLSys 2020, eq. 2).

    Args:
        mu: strength, >= 0.
        anchor: the weights to stay near, by parameter name; default: the module's weights when training starts.
    """

    def __init__(self, mu: float, anchor: Mapping[str, Tensor] | None = None) -> None:
        if not mu >= 0:
            raise ValueError(f"Expected `mu` to be a number >= 0, but got {mu}.")
        self.mu = mu
        self._given = anchor
        self._anchor: dict[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        given = self._given
        self._anchor = {
            n: (p.detach().clone() if given is None else given[n].to(p.device))
            for n, p in pl_module.named_parameters()
            if p.requires_grad
        }

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        for name, p in _own_parameters(pl_module, optimizer):
            assert p.grad is not None
            p.grad.add_(p - self._anchor[name], alpha=self.mu)


class GradientShift(L.Callback):
    """Adds a constant to every gradient: SCAFFOLD's correction ``c - c_k`` (Karimireddy et al., ICML 2020, alg. 1 line 10).

    Args:
        shift: what to add, by parameter name.
    """

    def __init__(self, shift: Mapping[str, Tensor]) -> None:
        self.shift = dict(shift)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.shift = {n: t.to(pl_module.device) for n, t in self.shift.items()}

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        for name, p in _own_parameters(pl_module, optimizer):
            assert p.grad is not None
            p.grad.add_(self.shift[name])


class ScaleLearningRate(L.Callback):
    """Multiplies every learning rate of the module's own optimisers, and the base rates of its schedulers, once at the start.

    So a schedule over rounds composes with whatever the user's ``configure_optimizers`` does inside a round.
    """

    def __init__(self, factor: float) -> None:
        if not factor > 0:
            raise ValueError(f"Expected `factor` to be a positive number, but got {factor}.")
        self.factor = factor

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] *= self.factor
                if "initial_lr" in group:
                    group["initial_lr"] *= self.factor
        for config in trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            if hasattr(scheduler, "base_lrs"):
                scheduler.base_lrs = [lr * self.factor for lr in scheduler.base_lrs]


class TrainingLoss(L.Callback):
    """Mean training loss over the steps of a fit, without a device sync per step."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self.steps = 0
        self.learning_rate = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._sum, self.steps = None, 0
        self.learning_rate = trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps += 1
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        if loss is not None:
            loss = loss.detach().float()
            self._sum = loss if self._sum is None else self._sum + loss

    @property
    def value(self) -> float:
        return float("nan") if self._sum is None else float(self._sum) / max(self.steps, 1)
