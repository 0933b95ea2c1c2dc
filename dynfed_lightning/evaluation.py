"""Judging models on the test set: accuracy and cross-entropy of what they return, and what the user's own step logs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torchmetrics.aggregation import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from dynfed_lightning.batches import call_model, logits_of, num_rows, split_batch, take
from dynfed_lightning.module import ClientModule


@torch.no_grad()
def check_outputs(module: L.LightningModule, data: Any, num_classes: int | None) -> None:
    """Two rows through a copy of the model, before any training; of text also the last token and the longest row.

    Raises:
        ValueError: the output has not `num_classes` columns; the tokeniser has more tokens than the model has embeddings, or a
            text is longer than the model takes.
    """
    if not num_classes:
        return
    loader = data.val_dataloader()
    inputs, _ = split_batch(next(iter(loader)))
    probe = copy.deepcopy(module).eval().to("cpu")
    rows = take(inputs, 2)
    if isinstance(rows, Mapping) and "input_ids" in rows and getattr(data, "vocab_size", None):
        _check_tokens(probe, data.vocab_size, data.longest_text)
    try:
        output = logits_of(call_model(probe, rows))
    except IndexError:
        if not (isinstance(rows, Mapping) and bool(rows.get("token_type_ids", torch.zeros(1)).any())):
            raise
        raise ValueError(
            f"Expected a model that tells the texts of a pair apart by token type, but {type(module).__name__} has no "
            "embedding for type 1."
        ) from None
    if output.ndim != 2 or output.shape[1] != num_classes:
        raise ValueError(
            f"Expected a model with outputs of shape [batch, {num_classes}], as the data has {num_classes} classes, "
            f"but {type(module).__name__} gives {list(output.shape)} for a batch of {num_rows(rows)}."
        )


def _check_tokens(probe: L.LightningModule, vocab_size: int, longest: int) -> None:
    def text(length: int, token: int) -> dict[str, Tensor]:
        mask = torch.ones(1, length, dtype=torch.int64)
        return {"input_ids": mask * token, "attention_mask": mask}

    try:
        call_model(probe, text(1, vocab_size - 1))
    except IndexError:
        raise ValueError(
            f"Expected a model with embeddings for the tokenizer's {vocab_size} tokens (its `vocab_size`), "
            f"but {type(probe).__name__} has fewer."
        ) from None
    try:
        call_model(probe, text(longest, vocab_size - 1))
    except (IndexError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"Expected a model for texts of up to {longest} tokens, but {type(probe).__name__} refuses them ({reason}): "
            "set the data's `max_length`."
        ) from None


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
            logits = logits_of(call_model(module, inputs)).float()
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


_LOG_ARGUMENTS = ("prog_bar", "logger", "reduce_fx", "batch_size", "add_dataloader_idx", "metric_attribute")


def has_own_validation(module: L.LightningModule) -> bool:
    """Whether `module` brings a ``validation_step`` of its own."""
    return is_overridden(
        "validation_step", module, ClientModule if isinstance(module, ClientModule) else L.LightningModule
    )


def run_user_hook(outer: L.LightningModule, module: L.LightningModule, hook: str, *args: Any) -> None:
    """Run a hook of the user's module; what it logs goes to the outer module, since a child may not log itself."""

    def log(name: str, value: Any, *_: Any, **kwargs: Any) -> None:
        kept = {k: v for k, v in kwargs.items() if k in _LOG_ARGUMENTS}
        outer.log(name, value, on_step=False, on_epoch=True, **kept)

    object.__setattr__(module, "log", log)
    try:
        getattr(module, hook)(*args)
    finally:
        object.__delattr__(module, "log")
