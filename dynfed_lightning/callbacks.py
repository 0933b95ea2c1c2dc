"""Lightning callbacks that run inside a client's training; each works in any ``L.Trainer`` too.

`ExtraLoss` is the base of those that add to the loss. The others edit gradients in ``on_before_optimizer_step``, which
Lightning calls after mixed precision has unscaled them and before they are clipped, so they are exact under every precision.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
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
        self._count: Tensor | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._sum = self._count = None

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        grads = [p.grad for _, p in _own_parameters(pl_module, optimizer) if p.grad is not None]
        if not grads:
            return
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))).detach()
        # A step that fp16's scaler is going to skip has an infinite norm and does not count.
        finite = torch.isfinite(norm)
        norm, one = torch.where(finite, norm, 0), finite.to(norm.dtype)
        # Kept on the device: reading it every step would stall a GPU.
        self._sum = norm if self._sum is None else self._sum + norm
        self._count = one if self._count is None else self._count + one

    @property
    def value(self) -> float:
        if self._sum is None or self._count is None:
            return 0.0
        return float(self._sum) / max(float(self._count), 1.0)


class ExtraLoss(L.Callback):
    """Base of callbacks that add a term to the loss of any module that optimises automatically.

    While training runs, the module's ``training_step`` is wrapped; the module's own class and its other hooks stay as they
    are. What the step returned is passed to `extra`, and what that returns takes the place of the loss. A batch for which
    the step returns no loss is skipped, as ever.
    """

    _wrapped: L.LightningModule | None = None

    def extra(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor, batch: Any, batch_idx: int
    ) -> Tensor:
        """The loss that is differentiated instead of `loss`, a scalar with a graph."""
        raise TypeError(f"{type(self).__name__} does not define `extra`.")

    def before_step(self, pl_module: L.LightningModule, batch: Any) -> None:
        """Called right before the module's own ``training_step``."""

    def own_step(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module's own ``training_step``; what it returned."""
        return step(*args, **kwargs)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wrap the module's ``training_step``.

        Raises:
            ValueError: the module optimises manually, so there is no loss to add to.
        """
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"Expected a module with automatic optimisation under {type(self).__name__}, which adds to its loss, "
                f"but {type(pl_module).__name__} optimises manually."
            )
        original = pl_module.training_step

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            batch = args[0] if args else kwargs["batch"]
            index = args[1] if len(args) > 1 else kwargs.get("batch_idx", 0)
            self.before_step(pl_module, batch)
            output = self.own_step(original, args, kwargs)
            loss = output.get("loss") if isinstance(output, Mapping) else output
            if loss is None:
                return output
            total = self.extra(trainer, pl_module, loss, batch, index)
            return {**output, "loss": total} if isinstance(output, Mapping) else total

        object.__setattr__(pl_module, "training_step", training_step)
        self._wrapped = pl_module

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the module its own ``training_step`` back."""
        self._unwrap()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """As `on_train_end`."""
        self._unwrap()

    def _unwrap(self) -> None:
        if self._wrapped is not None:
            self._wrapped.__dict__.pop("training_step", None)
            self._wrapped = None


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
    """Every step of the module's own optimisers is taken at `factor` times their learning rate.

    The rate is scaled while ``step`` runs and put back after it, so a schedule over rounds composes with whatever scheduler
    the user's ``configure_optimizers`` brings: none of them ever sees it.
    """

    def __init__(self, factor: float) -> None:
        if not factor >= 0:
            raise ValueError(f"Expected `factor` to be a number >= 0, but got {factor}.")
        self.factor = factor
        self._handles: list[Any] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            rates: list[Any] = []

            def before(optimizer: Optimizer, args: Any, kwargs: Any, rates: list[Any] = rates) -> None:
                rates[:] = [group["lr"] for group in optimizer.param_groups]
                for group in optimizer.param_groups:
                    group["lr"] = group["lr"] * self.factor

            def after(optimizer: Optimizer, args: Any, kwargs: Any, rates: list[Any] = rates) -> None:
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate

            self._handles += [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


class TrainingLoss(L.Callback):
    """Mean training loss over the batches of a fit, and how many optimiser steps it took; no device sync per step."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._losses = 0
        self.batches = 0
        self.steps = 0
        self.learning_rate = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._sum, self._losses, self.batches, self.steps = None, 0, 0, 0
        self.learning_rate = float(trainer.optimizers[0].param_groups[0]["lr"]) if trainer.optimizers else 0.0

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        self.steps += 1

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches += 1
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is not None:
            # Lightning has divided it by the number of batches it accumulates gradients over.
            loss = loss.detach().float() * getattr(trainer, "accumulate_grad_batches", 1)
            self._sum = loss if self._sum is None else self._sum + loss
            self._losses += 1

    @property
    def value(self) -> float | None:
        """The mean; None if no step returned a loss (manual optimisation may not)."""
        return None if self._sum is None else float(self._sum) / self._losses
