"""`ClientModule`: client training for people who have only a network. Any LightningModule of the user's takes its place."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from dynfed_lightning.batches import call_model, logits_of, split_batch

_OPTIMIZERS = ("sgd", "adam", "adamw")


class ClientModule(L.LightningModule):
    """A network, cross-entropy and an optimiser.

    Args:
        model: maps inputs ``[B, ...]``, or for text the entries of a dict such as ``input_ids`` and ``attention_mask``, to
            logits ``[B, C]`` or to an output that has ``logits``, such as a Hugging Face model's.
        lr: learning rate, > 0.
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``.
        momentum: of SGD, in [0, 1).
        weight_decay: >= 0.
        label_smoothing: in [0, 1).

    Raises:
        ValueError: an argument out of range.
        TypeError: `model` is not a module.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 0.01,
        optimizer: str = "sgd",
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"Expected `model` to be a torch module, but got {type(model).__name__}.")
        if not lr > 0:
            raise ValueError(f"Expected `lr` to be a positive number, but got {lr}.")
        if optimizer not in _OPTIMIZERS:
            raise ValueError(f"Expected `optimizer` to be one of {_OPTIMIZERS}, but got {optimizer!r}.")
        if not 0 <= momentum < 1:
            raise ValueError(f"Expected `momentum` to be in [0, 1), but got {momentum}.")
        if momentum and optimizer != "sgd":
            raise ValueError(f"Expected `momentum` only with optimizer 'sgd', but got {momentum} with {optimizer!r}.")
        if not weight_decay >= 0:
            raise ValueError(f"Expected `weight_decay` to be a number >= 0, but got {weight_decay}.")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"Expected `label_smoothing` to be in [0, 1), but got {label_smoothing}.")
        self.model = model
        self.lr = lr
        self.optimizer = optimizer
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.label_smoothing = label_smoothing

    def forward(self, x: Any = None, **entries: Any) -> Any:
        """The model's output: logits ``[B, C]``, or an output that has them.

        Args:
            x: inputs ``[B, ...]``, or a dict of them.
            entries: or such a dict's entries by name, as in ``module(input_ids=..., attention_mask=...)``.
        """
        return call_model(self.model, entries if x is None else x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy of one batch: ``(inputs, targets)`` or a dict with the usual names."""
        inputs, targets = split_batch(batch)
        return F.cross_entropy(logits_of(self(inputs)), targets, label_smoothing=self.label_smoothing)

    def configure_optimizers(self) -> Optimizer:
        """The optimiser the constructor names, over what is trainable."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        make = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return make(parameters, lr=self.lr, weight_decay=self.weight_decay)
