"""Judging models on the test set: accuracy and cross-entropy of what they return, and what the user's own step logs."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

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


@dataclass
class Score:
    """What one model got right on a test set.

    Args:
        accuracy: the share of right answers, over all rows.
        loss: the mean cross-entropy, over all rows.
        right: int64 ``[groups]``, right answers among the rows of each group.
        rows: int64 ``[groups]``, how many rows there were.
    """

    accuracy: float
    loss: float
    right: Tensor
    rows: Tensor

    def group_accuracy(self) -> Tensor:
        """float64 ``[groups]``; NaN for a group without rows."""
        return self.right.double() / self.rows.double()


class Evaluator:
    """Accumulates accuracy and mean cross-entropy of one model, or of several side by side, over a test set.

    Args:
        num_classes: C; None or 0: there is nothing to accumulate.
        groups: int64, the group of every test row in the order of the batches; None: all rows are of one group.
        num_groups: how many groups there are.
    """

    def __init__(self, num_classes: int | None, groups: Tensor | None = None, num_groups: int = 1) -> None:
        self.num_classes = num_classes
        self.groups, self.num_groups = groups, num_groups
        self._models: list[L.LightningModule] = []
        self._only: Tensor | None = None
        self._single = True
        self._tallies: list[_Tally] = []
        self._seen = 0

    def start(self, models: L.LightningModule | Sequence[L.LightningModule], only: Tensor | None = None) -> None:
        """Begin a pass over the test set.

        Args:
            models: one or several, all on one device.
            only: bool ``[models, groups]``, the groups that each model is judged on; None: on all rows.
        """
        self._single = isinstance(models, L.LightningModule)
        self._models = [models] if isinstance(models, L.LightningModule) else list(models)
        self._seen = 0
        device = next(self._models[0].parameters()).device
        self._only = None if only is None else only.to(device)
        self._tallies = [_Tally(self.num_groups, device) for _ in self._models if self.num_classes]

    @torch.no_grad()
    def update(self, batch: Any) -> None:
        """Judge one batch."""
        if not self._tallies:
            return
        inputs, targets = split_batch(batch)
        if self.groups is None:
            groups = torch.zeros_like(targets)
        else:
            groups = self.groups[self._seen : self._seen + len(targets)].to(targets.device)
        self._seen += len(targets)
        for i, (module, tally) in enumerate(zip(self._models, self._tallies, strict=True)):
            x, y, g = inputs, targets, groups
            if self._only is not None:
                rows = self._only[i][groups].nonzero().flatten()
                if not len(rows):
                    continue
                x, y, g = take(inputs, rows), targets[rows], groups[rows]
            training = module.training
            module.eval()
            logits = logits_of(call_model(module, x)).float()
            module.train(training)
            tally.add(logits, y, g)

    def scores(self) -> list[Score]:
        """One for each model."""
        return [t.score() for t in self._tallies]

    def compute(self) -> dict[str, float]:
        """``accuracy`` and ``test_loss``; of several models their mean, worst and standard deviation."""
        return whole_set(self.scores(), self._single)


class _Tally:
    """Right answers by group and the sum of the losses of one model, on the model's device."""

    def __init__(self, groups: int, device: torch.device) -> None:
        self.counts = torch.zeros(2 * groups, dtype=torch.int64, device=device)  # wrong and right answers, by group
        self.loss = torch.zeros((), device=device)

    def add(self, logits: Tensor, targets: Tensor, groups: Tensor) -> None:
        right = logits.argmax(1) == targets
        self.counts += torch.bincount(2 * groups + right, minlength=len(self.counts))
        self.loss += F.cross_entropy(logits, targets) * len(targets)

    def score(self) -> Score:
        counts = self.counts.cpu().view(-1, 2)
        right, rows = counts[:, 1], counts.sum(1)
        number = rows.sum()
        # In float32, as torchmetrics has it.
        return Score(float(right.sum().float() / number), float(self.loss.cpu() / number), right, rows)


def whole_set(scores: Sequence[Score], single: bool) -> dict[str, float]:
    """``accuracy`` and ``test_loss`` over all test rows; of several models their mean, worst and standard deviation."""
    if not scores:
        return {}
    accuracy = torch.tensor([s.accuracy for s in scores], dtype=torch.float64)
    loss = torch.tensor([s.loss for s in scores], dtype=torch.float64)
    values = {"accuracy": float(accuracy.mean()), "test_loss": float(loss.mean())}
    if not single:
        values["accuracy_worst"] = float(accuracy.min())
        values["accuracy_std"] = float(accuracy.std(unbiased=False))
    return values


def own_sets(accuracies: Sequence[float]) -> dict[str, float]:
    """Of clients' accuracies on their own test distributions: mean, mean of the worst tenth, standard deviation.

    The worst tenth of n clients are the ``ceil(n / 10)`` worst. Empty if there are none.
    """
    if not accuracies:
        return {}
    values = torch.tensor(accuracies, dtype=torch.float64).sort().values
    return {
        "own_accuracy": float(values.mean()),
        "own_accuracy_worst10": float(values[: math.ceil(len(values) / 10)].mean()),
        "own_accuracy_std": float(values.std(unbiased=False)),
    }


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
