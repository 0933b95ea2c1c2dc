"""A client's own model, stepped inside the training step of the model that travels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynfed_lightning.algorithms._local_models import MakeOptimizer
from dynfed_lightning.capture import Capture
from dynfed_lightning.co_training import RandomStream, StepAgain, check_trainer, step
from dynfed_lightning.optimizers import one_optimizer, take_up
from dynfed_lightning.seeds import derive_seed


class Seen(NamedTuple):
    """What one pass gave.

    Args:
        loss: the module's own training loss, a scalar.
        logits: ``[B, C]``; None where nobody listens.
    """

    loss: Tensor
    logits: Tensor | None


def check_accumulation(batches: int, what: str) -> None:
    """A model that takes a step at every batch cannot train beside one that does not.

    Raises:
        ValueError: gradients are accumulated over batches.
    """
    if batches != 1:
        raise ValueError(
            f"Expected `accumulate_grad_batches` to be 1 beside `{what}`, which takes a step at every batch, but got {batches}: "
            "take larger batches."
        )


class Peer:
    """Trains `model` beside the module that a Trainer, or the bare loop, fits: its device, precision, optimiser and schedulers.

    Like the peer of `dynfed_lightning.mutual.MutualDistillation` it honours mixed precision with and without a gradient
    scaler and ``gradient_clip_val``, and draws its random numbers (dropout) from a stream of its own: whoever trains beside
    it trains as if it were alone. It takes a step of its own at every batch, before the module's, so gradients cannot be
    accumulated over batches. Its other hooks (``on_train_start``, ...) are not called, and what it logs in passes that are
    not its `main` one goes nowhere.

    Args:
        model: with a ``training_step``; trained in place.
        what: what messages call it.
        make_optimizer: makes the optimiser from the trainable parameters; default: the model's ``configure_optimizers``.
        listen: look for the logits of its passes.
    """

    def __init__(
        self, model: L.LightningModule, what: str, make_optimizer: MakeOptimizer | None = None, listen: bool = True
    ) -> None:
        if not model.automatic_optimization:
            raise ValueError(
                f"Expected `{what}` to optimise automatically, but {type(model).__name__} optimises manually."
            )
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError(f"Expected `{what}` to have trainable parameters, but it has none.")
        self.model, self.what, self.listen = model, what, listen
        self.make_optimizer = make_optimizer
        self.optimizer: Optimizer | None = None
        self._schedulers: list[Any] = []
        self._capture: Capture | None = None
        self._modes: list[tuple[nn.Module, bool]] = []
        self._random: RandomStream | None = None
        self._again: StepAgain | None = None
        self._trainer: Any = None
        self._steps = 0
        self._stepped = False

    def optimizers(self) -> tuple[Optimizer, list[Any]]:
        """A new optimiser and its schedulers.

        Raises:
            ValueError: not one optimiser.
            TypeError: `make_optimizer` made something else.
        """
        if self.make_optimizer is None:
            return one_optimizer(self.model, f"`{self.what}`")
        made = self.make_optimizer([p for p in self.model.parameters() if p.requires_grad])
        if not isinstance(made, Optimizer):
            raise TypeError(
                f"Expected `{self.what}_optimizer` to make an Optimizer, but it made {type(made).__name__}."
            )
        return made, []

    # ---------------------------------------------------------- start and end

    def start(self, trainer: Any, pl_module: L.LightningModule, memory: Mapping[str, Any] | None = None) -> None:
        """Bring the model to the module's device and precision, make its optimiser, and start to listen.

        Args:
            trainer: the Trainer, or the bare loop's.
            pl_module: what it fits.
            memory: the optimiser's ``state_dict``, or its ``state`` alone.

        Raises:
            ValueError: a strategy or precision under which the model cannot be trained rightly, or accumulated gradients.
        """
        plugin = check_trainer(trainer, "QuPeD", f"the {self.what} model is")
        check_accumulation(getattr(trainer, "accumulate_grad_batches", 1), self.what)
        self.model.to(pl_module.device)
        if plugin is not None:
            plugin.convert_module(self.model)
        self._modes = [(m, m.training) for m in self.model.modules()]
        if not self.model.training:  # as `from_pretrained` leaves it; single layers in eval mode stay so
            self.model.train()
        self.optimizer, self._schedulers = self.optimizers()
        if memory:
            take_up(self.optimizer, memory)
        self._random = RandomStream(derive_seed(torch.initial_seed(), "peer"), pl_module.device)
        self._again = StepAgain(self.model, self.model.training_step, self._random)
        self._trainer, self._steps = trainer, 0
        object.__setattr__(self.model, "_trainer", trainer)  # its step may ask for the epoch
        if self.listen:
            self._capture = Capture(self.model, self.what)
        self.optimizer.register_step_post_hook(self._note_step)
        self.model.zero_grad()

    def _note_step(self, *_: Any) -> None:
        skipped = getattr(self.optimizer, "found_inf", None)  # a fused optimiser sees for itself whether to skip
        self._stepped = skipped is None or not bool(skipped)

    def stop(self) -> None:
        """Back to the CPU, as the strategy does with the module."""
        if self._capture is not None:
            self._capture.remove()
            self._capture = None
        for m, training in self._modes:
            m.training = training
        self._modes, self._trainer, self._again = [], None, None
        object.__setattr__(self.model, "_trainer", None)
        self.model.zero_grad()
        self.model.to("cpu")

    # -------------------------------------------------------------- every step

    def run(
        self,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        weights: Mapping[str, Tensor] | None = None,
        main: bool = False,
    ) -> Seen | None:
        """One pass of the model over a batch, None if it skips it.

        Args:
            pl_module: logs for the model.
            batch: of the model's form.
            batch_idx: which.
            weights: what stands in for parameters, by name.
            main: log, and let the layers count (batch norm's running means); else buffers stay as they are.
        """
        assert self._again is not None and self._random is not None
        weights = dict(weights or {})
        if self._capture is not None:
            self._capture.start()
        if main:
            with self._logged_by(pl_module), self._random.used():
                output, _ = self._again.run((batch, batch_idx), {}, weights)
            loss = output.get("loss") if isinstance(output, Mapping) else output
        else:
            buffers = {n: b.clone() for n, b in self.model.named_buffers()}  # edited in place, and kept by nobody
            loss = self._again.silently((batch, batch_idx), {}, {**buffers, **weights})
        if loss is None:
            return None
        return Seen(loss, None if self._capture is None else self._capture.take().logits)

    @contextmanager
    def _logged_by(self, pl_module: L.LightningModule) -> Iterator[None]:
        """What the model logs goes to the module that the Trainer fits."""

        def log(name: str, value: Any, *_: Any, **__: Any) -> None:
            if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1):
                pl_module.log(f"{self.what}/{name}", value)

        object.__setattr__(self.model, "log", log)
        try:
            yield
        finally:
            object.__delattr__(self.model, "log")

    @property
    def _scaler(self) -> Any:
        return getattr(getattr(self._trainer, "precision_plugin", None), "scaler", None)

    def backward(self, loss: Tensor) -> None:
        """The model's gradients, scaled if there is a gradient scaler."""
        with torch.autocast(loss.device.type, enabled=False):  # backward passes run as their forward passes did
            (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    def gradients(self, loss: Tensor, of: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of `loss` with respect to `of` alone; zeros where it does not depend on one."""
        scaled = loss if self._scaler is None else self._scaler.scale(loss)
        with torch.autocast(loss.device.type, enabled=False):
            found = torch.autograd.grad(scaled, list(of), allow_unused=True)
        return self.unscaled([torch.zeros_like(t) if g is None else g for t, g in zip(of, found, strict=True)])

    def unscaled(self, gradients: Iterable[Tensor]) -> list[Tensor]:
        """Gradients of a scaled loss as they would be without the scaler; all 0 if one is not finite: it would skip the step."""
        gradients = list(gradients)
        if self._scaler is None:
            return gradients
        gradients = [g / self._scaler.get_scale() for g in gradients]
        fine = all(bool(torch.isfinite(g).all()) for g in gradients)
        return gradients if fine else [torch.zeros_like(g) for g in gradients]

    def step(self, factor: float) -> bool:
        """Step the optimiser at `factor` times its learning rates, clipped by the Trainer's rule; then the schedulers.

        Returns:
            whether a step was taken; the gradient scaler skips one whose gradients are not finite.
        """
        assert self.optimizer is not None
        self._stepped = False
        if any(p.grad is not None for g in self.optimizer.param_groups for p in g["params"]):
            step(self._trainer, [self.optimizer], factor)
            # torch's autocast (not Lightning's) keeps its half-precision copies of weights until the module's step is over.
            torch.clear_autocast_cache()
        else:
            self._stepped = True  # there was nothing to do, and nothing was wrong
        self._steps += 1
        for s in self._schedulers:
            if s.interval == "step" and self._steps % s.frequency == 0:
                s.scheduler.step()
        return self._stepped

    def rates(self, parameters: Iterable[nn.Parameter], factor: float) -> list[float]:
        """The learning rate of each of `parameters`; 0 for one that is not trained."""
        assert self.optimizer is not None
        found = {id(p): float(g["lr"]) * factor for g in self.optimizer.param_groups for p in g["params"]}
        return [found.get(id(p), 0.0) for p in parameters]

    def end_epoch(self) -> None:
        """Step the schedulers that count epochs."""
        for s in self._schedulers:
            if s.interval == "epoch" and (self._trainer.current_epoch + 1) % s.frequency == 0:
                s.scheduler.step()
