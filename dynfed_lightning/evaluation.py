"""Judging models on the test set: accuracy and cross-entropy from ``module(inputs)``, and what the user's own step logs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.model_helpers import is_overridden
from torchmetrics.aggregation import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from dynfed_lightning.batches import logits_of, split_batch
from dynfed_lightning.module import ClientModule


@torch.no_grad()
def check_outputs(module: L.LightningModule, data: L.LightningDataModule, num_classes: int | None) -> None:
    """Two rows through a copy of the model, before any training.

    Raises:
        ValueError: the output has not `num_classes` columns.
    """
    if num_classes is None:
        return
    loader = data.val_dataloader()
    inputs, _ = split_batch(next(iter(loader)))
    probe = copy.deepcopy(module).eval().to("cpu")
    output = logits_of(probe(inputs[:2]))
    if output.ndim != 2 or output.shape[1] != num_classes:
        raise ValueError(
            f"Expected a model with outputs of shape [batch, {num_classes}], as the data has {num_classes} classes, "
            f"but {type(module).__name__} gives {list(output.shape)} for a batch of {len(inputs[:2])}."
        )


class Evaluator:
    """Accumulates accuracy and mean cross-entropy of one model, or of every client's own, over a test set."""

    def __init__(self, num_classes: int | None) -> None:
        self.num_classes = num_classes
        self._models: list[L.LightningModule] = []
        self._single = True
        self._accuracy: list[MulticlassAccuracy] = []
        self._loss: list[MeanMetric] = []

    def start(self, models: L.LightningModule | Sequence[L.LightningModule]) -> None:
        """Begin a pass over the test set."""
        self._single = isinstance(models, L.LightningModule)
        self._models = [models] if isinstance(models, L.LightningModule) else list(models)
        device = next(self._models[0].parameters()).device
        classes = self.num_classes or 0
        self._accuracy = [MulticlassAccuracy(classes, average="micro").to(device) for _ in self._models if classes]
        self._loss = [MeanMetric().to(device) for _ in self._models if classes]

    @torch.no_grad()
    def update(self, batch: Any) -> None:
        """Judge one batch."""
        if not self._accuracy:
            return
        inputs, targets = split_batch(batch)
        for module, accuracy, loss in zip(self._models, self._accuracy, self._loss, strict=True):
            training = module.training
            module.eval()
            logits = logits_of(module(inputs)).float()
            module.train(training)
            accuracy.update(logits, targets)
            loss.update(F.cross_entropy(logits, targets), weight=len(targets))

    def compute(self) -> dict[str, float]:
        """``accuracy`` and ``test_loss``; for clients' own models their mean, worst and standard deviation."""
        if not self._accuracy:
            return {}
        accuracy = torch.stack([a.compute() for a in self._accuracy]).double()
        values = {
            "accuracy": float(accuracy.mean()),
            "test_loss": float(torch.stack([m.compute() for m in self._loss]).double().mean()),
        }
        if not self._single:
            values["accuracy_worst"] = float(accuracy.min())
            values["accuracy_std"] = float(accuracy.std(unbiased=False))
        return values

    @staticmethod
    def run_user_step(outer: L.LightningModule, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Run the user's ``validation_step``; what it logs goes to the outer module, since a child may not log itself."""
        if isinstance(module, ClientModule) or not is_overridden("validation_step", module, L.LightningModule):
            return

        def log(name: str, value: Any, *_: Any, **kwargs: Any) -> None:
            outer.log(name, value, on_step=False, on_epoch=True, prog_bar=bool(kwargs.get("prog_bar", False)))

        saved: Callable[..., Any] | None = module.__dict__.get("log")
        object.__setattr__(module, "log", log)
        try:
            module.validation_step(batch, batch_idx)
        finally:
            object.__delattr__(module, "log")
            if saved is not None:
                object.__setattr__(module, "log", saved)
