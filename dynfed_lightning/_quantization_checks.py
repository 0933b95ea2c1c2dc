"""What a callback that runs a module's ``training_step`` several times a batch cannot honour, refused by name."""

from __future__ import annotations

import inspect
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn

from dynfed_lightning.co_training import check_trainer


def check_setup(trainer: Any, module: L.LightningModule, name: str) -> None:
    """Refuse what the callback called `name` cannot honour, before any step.

    Raises:
        ValueError: manual optimisation, a wrapped ``training_step``, a strategy or precision that wraps the module, averaged
            weights, LBFGS, or activation checkpointing.
    """
    check_trainer(trainer, name, "the centres are")
    if not module.automatic_optimization:
        raise ValueError(
            f"Expected a module with automatic optimisation under {name}, but {type(module).__name__} optimises manually."
        )
    if "training_step" in vars(module):
        raise ValueError(
            f"Expected {type(module).__name__}'s own `training_step` under {name}, which runs it several times a batch, but "
            "another callback (or torch.compile) has wrapped it."
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise ValueError(f"Expected `training_step` to take a batch under {name}, but it takes `dataloader_iter`.")
    for callback in getattr(trainer, "callbacks", ()):
        if isinstance(callback, (StochasticWeightAveraging, WeightAveraging)):
            raise ValueError(
                f"Expected no {type(callback).__name__} beside {name}: an average of weights is not among the centres."
            )
        if isinstance(callback, ModelCheckpoint) and callback.save_weights_only:
            rank_zero_warn(
                f"ModelCheckpoint(save_weights_only=True) beside {name}: its files lack the centres, so they hold float weights "
                "that cannot be quantised as validation saw them."
            )
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(f"Expected an optimiser that takes one gradient a step under {name}, but got LBFGS.")
    for path, m in module.named_modules():
        if getattr(m, "is_gradient_checkpointing", False) is True or getattr(m, "gradient_checkpointing", 0) is True:
            raise ValueError(
                f"Expected no activation checkpointing under {name}, but {path!r} has it: it would compute again with the "
                "float weights."
            )


def training_length(trainer: Any) -> tuple[bool, int]:
    """Whether training is counted in steps, and how many steps or epochs there are.

    Raises:
        ValueError: it has no end.
    """
    steps, epochs = trainer.max_steps, trainer.max_epochs
    bounded = epochs is not None and epochs > 0
    if steps > 0 and (not bounded or getattr(trainer, "estimated_stepping_batches", steps) == steps):
        return True, steps
    if not bounded:
        raise ValueError(
            "Expected `max_epochs` or `max_steps` of the Trainer under QuantizationAware, whose schedules and last phase need "
            "to know the end, but there is neither."
        )
    return False, epochs
