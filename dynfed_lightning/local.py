"""How one client trains: under a nested Lightning Trainer, or in the bare loop.

Both give the same weights for a module that both can run. `TrainerLocal` honours everything a ``Trainer`` honours;
`LoopLocal` is the training step and nothing around it, several times cheaper for small models, and refuses what it cannot honour.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import Metric

from dynfed_lightning.callbacks import ScaleLearningRate, TrainingLoss
from dynfed_lightning.errors import ClientFailure
from dynfed_lightning.optimizers import one_optimizer
from dynfed_lightning.quiet import fixed_threads, isolated_rng, quiet_fit, quiet_trainer
from dynfed_lightning.schedules import Exponential, Schedule, as_schedule

if TYPE_CHECKING:
    from dynfed_lightning.data import ClientData


@dataclass
class FitResult:
    """What a local fit tells the algorithm.

    Args:
        loss: mean training loss over the batches; None if the module returns none (manual optimisation).
        steps: optimiser steps taken.
        learning_rate: rate of the first parameter group when training started.
        metrics: what the user's module logged with ``self.log`` (last value each); stays on the client.
    """

    loss: float | None
    steps: int
    learning_rate: float
    metrics: dict[str, float]

    def scalars(self) -> dict[str, float]:
        """What every method uploads of it: the loss, if there is one."""
        return {} if self.loss is None else {"loss": self.loss}


class LocalExecutor:
    """What both executors share.

    Args:
        max_epochs: passes over the client's data a round; ignored if `max_steps` is given.
        max_steps: optimiser steps a round, over as many passes as they take (-1: by epochs).
        lr_decay: a schedule over rounds that multiplies the module's own learning rates, e.g. ``Linear(1.0, 0.1)``; a number f
            means ``lr * f^t`` in round t.
        callbacks: the user's Lightning callbacks; every client gets fresh copies.
        threads: CPU threads a client trains on. Fixed, since float sums differ with the number of threads.
    """

    def __init__(
        self,
        *,
        max_epochs: int = 1,
        max_steps: int = -1,
        lr_decay: float | Schedule = 1.0,
        callbacks: L.Callback | Sequence[L.Callback] = (),
        threads: int = 1,
    ) -> None:
        if not isinstance(max_epochs, int) or max_epochs < 1:
            raise ValueError(f"Expected `max_epochs` to be a positive integer, but got {max_epochs!r}.")
        if not isinstance(max_steps, int) or (max_steps < 1 and max_steps != -1):
            raise ValueError(f"Expected `max_steps` to be a positive integer or -1, but got {max_steps!r}.")
        if not isinstance(threads, int) or threads < 1:
            raise ValueError(f"Expected `threads` to be a positive integer, but got {threads!r}.")
        self.max_epochs = max_epochs
        self.max_steps = max_steps
        if isinstance(lr_decay, (int, float)) and not isinstance(lr_decay, bool):
            if not lr_decay > 0:
                raise ValueError(f"Expected `lr_decay` to be a positive number or a schedule, but got {lr_decay!r}.")
            lr_decay = Exponential(1.0, float(lr_decay))
        self.lr_decay = as_schedule(lr_decay)
        self.callbacks = [callbacks] if isinstance(callbacks, L.Callback) else list(callbacks)
        for callback in self.callbacks:
            if not isinstance(callback, L.Callback):
                raise TypeError(f"Expected `callbacks` to be Lightning callbacks, but got {type(callback).__name__}.")
        self.threads = threads
        self.device: torch.device | None = None  # set by the federation to the outer Trainer's device

    def check(self, module: L.LightningModule) -> None:
        """Refuse, before any training, what this executor cannot honour."""

    def fit(
        self,
        module: L.LightningModule,
        data: ClientData,
        *,
        callbacks: Sequence[L.Callback] = (),
        round: int = 0,
        num_rounds: int | None = None,
        seed: int = 0,
    ) -> FitResult:
        """Train `module` in place; everything random follows from `seed`, and the global RNGs are left as they were.

        Raises:
            ClientFailure: ``nan_loss`` if the mean loss is not finite, ``no_data`` if no step was taken.
        """
        factor = self.lr_decay(round, num_rounds)
        tracker = TrainingLoss()
        mine = [copy.deepcopy(c) for c in self.callbacks]
        scale = [ScaleLearningRate(factor)] if factor != 1.0 else []
        for callback in (*callbacks, *mine):
            if hasattr(callback, "lr_factor"):  # it steps optimisers that the Trainer does not know of
                callback.lr_factor = factor
        with fixed_threads(self.threads), isolated_rng(seed):
            metrics = self._run(module, data, [*scale, tracker, *callbacks, *mine], seed)
        module.to("cpu")  # from here on it is arithmetic on what travels
        if tracker.batches == 0:
            raise ClientFailure("no_data", f"Client {data.id} trained on none of its {data.num_examples} rows.")
        if tracker.value is not None and not math.isfinite(tracker.value):
            raise ClientFailure("nan_loss", f"The training loss of client {data.id} became {tracker.value}.")
        return FitResult(tracker.value, tracker.steps, tracker.learning_rate * factor, metrics)

    def _run(
        self, module: L.LightningModule, data: ClientData, callbacks: list[L.Callback], seed: int
    ) -> dict[str, float]:
        raise TypeError(f"{type(self).__name__} must override `_run`.")


class TrainerLocal(LocalExecutor):
    """A nested ``L.Trainer`` a client: every callback, precision, plugin, scheduler and logger of the user works.

    Args:
        max_epochs: see `LocalExecutor`, as the next four.
        max_steps: see `LocalExecutor`.
        lr_decay: see `LocalExecutor`.
        callbacks: see `LocalExecutor`.
        threads: see `LocalExecutor`.
        validate: run the module's ``validation_step`` on the client's validation rows, where it has any.
        trainer_kwargs: any other argument of ``L.Trainer`` (``precision``, ``gradient_clip_val``, ``plugins``, ``logger``...);
            ``default_root_dir`` gets a folder ``client<id>`` for every client.
    """

    _ours = frozenset(
        {"max_epochs", "max_steps", "callbacks", "devices", "num_nodes", "strategy", "num_sanity_val_steps"}
    )

    def __init__(
        self,
        *,
        max_epochs: int = 1,
        max_steps: int = -1,
        lr_decay: float | Schedule = 1.0,
        callbacks: L.Callback | Sequence[L.Callback] = (),
        threads: int = 1,
        validate: bool = True,
        trainer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            max_epochs=max_epochs, max_steps=max_steps, lr_decay=lr_decay, callbacks=callbacks, threads=threads
        )
        self.validate = validate
        self.trainer_kwargs = dict(trainer_kwargs or {})
        clash = self._ours & self.trainer_kwargs.keys()
        if clash:
            raise ValueError(f"Expected `trainer_kwargs` without {sorted(clash)}: the federation sets those itself.")

    def _run(
        self, module: L.LightningModule, data: ClientData, callbacks: list[L.Callback], seed: int
    ) -> dict[str, float]:
        loader = data.train_loader(seed)
        val_loader = data.val_loader() if self.validate and is_overridden("validation_step", module) else None
        module.to(self.device or torch.device("cpu"))
        kwargs: dict[str, Any] = {
            # A user's ModelCheckpoint among the callbacks is the wish to have checkpoints.
            "enable_checkpointing": any(isinstance(c, L.pytorch.callbacks.Checkpoint) for c in callbacks),
            **self.trainer_kwargs,
        }
        if "plugins" in kwargs:
            kwargs["plugins"] = copy.deepcopy(
                kwargs["plugins"]
            )  # a gradient scaler's state must not go from client to client
        if "default_root_dir" in kwargs:
            kwargs["default_root_dir"] = str(Path(kwargs["default_root_dir"]) / f"client{data.id}")
        trainer = quiet_trainer(
            module,
            max_epochs=-1 if self.max_steps > 0 else self.max_epochs,
            max_steps=self.max_steps,
            callbacks=callbacks,
            **kwargs,
        )
        quiet_fit(trainer, module, loader, val_loader)
        return {k: float(v) for k, v in trainer.callback_metrics.items() if v.numel() == 1}


_LOOP_HOOKS = frozenset(
    {
        "on_train_start",
        "on_train_end",
        "on_train_epoch_start",
        "on_train_epoch_end",
        "on_train_batch_start",
        "on_train_batch_end",
        "on_before_optimizer_step",
        "on_after_backward",
        "on_before_backward",
        "on_exception",
    }
)
# What may be overridden without the bare loop having to call it: it has no checkpoints and no evaluation.
_LOOP_IGNORES = frozenset(
    {
        "state_dict",
        "load_state_dict",
        "on_save_checkpoint",
        "on_load_checkpoint",
        "validation_step",
        "test_step",
        "predict_step",
        "on_validation_start",
        "on_validation_end",
        "on_validation_epoch_start",
        "on_validation_epoch_end",
        "on_validation_batch_start",
        "on_validation_batch_end",
        "on_test_start",
        "on_test_end",
        "on_test_epoch_start",
        "on_test_epoch_end",
        "on_test_batch_start",
        "on_test_batch_end",
        "on_predict_start",
        "on_predict_end",
        "on_predict_epoch_start",
        "on_predict_epoch_end",
        "on_predict_batch_start",
        "on_predict_batch_end",
        "training_step",
        "configure_optimizers",
        "forward",
        "state_key",
    }
)


def _unsupported(obj: object, parent: type) -> list[str]:
    """Public hooks of `parent` that `obj` overrides and the bare loop neither calls nor may skip."""
    hooks = [
        n
        for n in dir(parent)
        if not n.startswith("_") and n not in _LOOP_HOOKS | _LOOP_IGNORES and n not in dir(torch.nn.Module)
    ]
    return [n for n in hooks if callable(getattr(parent, n, None)) and is_overridden(n, obj, parent)]  # type: ignore[arg-type]


class LoopLocal(LocalExecutor):
    """The bare training step: no Trainer per client.

    It runs ``training_step``, the module's own single optimiser and epoch- or step-wise scheduler, gradient accumulation-free,
    in float32, and the hooks ``on_train_{start,end}``, ``on_train_epoch_{start,end}``, ``on_train_batch_{start,end}``,
    ``on_before_backward``, ``on_after_backward`` and ``on_before_optimizer_step`` of the module and of callbacks, and the
    callbacks' ``on_exception``. Whatever else a module or callback overrides is refused when the federation is set up, by
    name.

    Args:
        max_epochs: see `LocalExecutor`, as the next four.
        max_steps: see `LocalExecutor`.
        lr_decay: see `LocalExecutor`.
        callbacks: see `LocalExecutor`.
        threads: see `LocalExecutor`.
    """

    def check(self, module: L.LightningModule) -> None:
        """See `LocalExecutor.check`.

        Raises:
            ValueError: manual optimisation, or a hook the bare loop does not call.
        """
        advice = "use local='trainer'."
        if not module.automatic_optimization:
            raise ValueError(
                f"Expected automatic optimisation under local='loop', but {type(module).__name__} is manual: {advice}"
            )
        for obj, parent in [(module, L.LightningModule), *[(c, L.Callback) for c in self.callbacks]]:
            names = _unsupported(obj, parent)
            if names:
                raise ValueError(
                    f"local='loop' does not call {names[0]!r}, which {type(obj).__name__} overrides: {advice}"
                )
        self._optimizers(module)

    def _optimizers(self, module: L.LightningModule) -> tuple[Optimizer, list[Any]]:
        return one_optimizer(module, "local='loop'", "use local='trainer'.")

    def _run(
        self, module: L.LightningModule, data: ClientData, callbacks: list[L.Callback], seed: int
    ) -> dict[str, float]:
        logged: dict[str, Any] = {}
        device = self.device or torch.device("cpu")
        module.to(device)
        # `self.log` needs a Trainer; here it only remembers the last value.
        object.__setattr__(module, "log", lambda name, value, *_, **__: logged.__setitem__(name, value))
        try:
            self._loop(module, data.train_loader(seed), callbacks, device)
            values = {k: v.compute() if isinstance(v, Metric) else v for k, v in logged.items()}
        finally:
            object.__delattr__(module, "log")
            object.__setattr__(module, "_trainer", None)
        values = {k: v.detach() if isinstance(v, Tensor) else v for k, v in values.items()}
        return {k: float(v) for k, v in values.items() if not isinstance(v, Tensor) or v.numel() == 1}

    def _loop(self, module: L.LightningModule, loader: Any, callbacks: list[L.Callback], device: torch.device) -> None:
        optimizer, schedulers = self._optimizers(module)
        trainer: Any = _LoopTrainer(
            optimizers=[optimizer],
            lr_scheduler_configs=schedulers,
            current_epoch=0,
            global_step=0,
            max_epochs=self.max_epochs,
            max_steps=self.max_steps,
            should_stop=False,
            accumulate_grad_batches=1,
            training=True,
            sanity_checking=False,
        )
        object.__setattr__(
            module, "_trainer", trainer
        )  # so that the module's own current_epoch and global_step are right

        def call(hook: str, *args: Any) -> None:
            for callback in callbacks:
                getattr(callback, hook)(trainer, module, *args)
            getattr(module, hook)(*args)

        def step(batch: Any, index: int) -> Any:
            """Lightning's order: the closure trains, the optimiser steps around it."""
            outputs: list[Any] = []

            def closure() -> Any:
                output = module.training_step(batch, index)
                outputs[:] = [output]
                loss = output.get("loss") if isinstance(output, Mapping) else output
                optimizer.zero_grad()
                if loss is not None:
                    call("on_before_backward", loss)
                    loss.backward()
                    call("on_after_backward")
                call("on_before_optimizer_step", optimizer)
                return loss

            optimizer.step(closure)
            trainer.global_step += 1
            return outputs[0]

        with torch.enable_grad(), _told_of_exceptions(trainer, module, callbacks):
            call("on_train_start")
            while not trainer.should_stop:
                call("on_train_epoch_start")
                for index, batch in enumerate(loader):
                    if device.type != "cpu":
                        batch = move_data_to_device(batch, device)
                    call("on_train_batch_start", batch, index)
                    output = step(batch, index)
                    for s in schedulers:
                        if s.interval == "step" and trainer.global_step % s.frequency == 0:
                            s.scheduler.step()
                    call("on_train_batch_end", output, batch, index)
                    if trainer.global_step == self.max_steps or trainer.should_stop:
                        trainer.should_stop = True
                        break
                for s in schedulers:
                    if s.interval == "epoch" and (trainer.current_epoch + 1) % s.frequency == 0:
                        s.scheduler.step()
                call("on_train_epoch_end")
                trainer.current_epoch += 1
                if (self.max_steps < 0 and trainer.current_epoch >= self.max_epochs) or trainer.global_step == 0:
                    break
            call("on_train_end")


@contextmanager
def _told_of_exceptions(trainer: Any, module: L.LightningModule, callbacks: Sequence[L.Callback]) -> Iterator[None]:
    """Callbacks may have changed the module for the time of the training: let them put it right whatever happens."""
    try:
        yield
    except BaseException as error:
        for callback in callbacks:
            callback.on_exception(trainer, module, error)
        raise


class _LoopTrainer(SimpleNamespace):
    """What modules and callbacks may read of a Trainer in the bare loop; anything else fails by name."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"local='loop' has no `trainer.{name}`: use local='trainer'.")


def as_executor(local: str | LocalExecutor) -> LocalExecutor:
    """``"trainer"`` or ``"loop"``, one epoch a round, or an executor as it is.

    Raises:
        ValueError: another name.
    """
    if isinstance(local, LocalExecutor):
        return local
    if local == "trainer":
        return TrainerLocal()
    if local == "loop":
        return LoopLocal()
    raise ValueError(f"Expected `local` to be 'trainer', 'loop' or an executor, but got {local!r}.")
