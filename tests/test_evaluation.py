from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dynfed_lightning import ClientModule
from dynfed_lightning.batches import logits_of, split_batch
from dynfed_lightning.evaluation import Evaluator, has_own_validation, run_user_hook


def test_split_batch() -> None:
    x, y = torch.zeros(2, 3), torch.ones(2)
    for batch in ((x, y), [x, y], {"image": x, "label": y}, {"pixel_values": x, "labels": y, "id": 0}):
        a, b = split_batch(batch)
        assert a is x and b is y
    with pytest.raises(ValueError, match=r"but got the keys \['q', 'z'\]"):
        split_batch({"z": 1, "q": 2})
    with pytest.raises(ValueError, match=r"Expected batches as \(inputs, targets\) or dicts, but got Tensor"):
        split_batch(x)


def test_logits_of() -> None:
    t = torch.zeros(1, 2)
    assert logits_of(t) is logits_of({"logits": t}) is logits_of(SimpleNamespace(logits=t)) is t
    with pytest.raises(ValueError, match="returns logits, but it returned tuple"):
        logits_of((t,))


class _Fixed(L.LightningModule):
    """Logits are the inputs; dropout would show if it were left in training mode."""

    def __init__(self, sign: float = 1.0) -> None:
        super().__init__()
        self.sign = nn.Parameter(torch.tensor(sign))
        self.drop = nn.Dropout(0.99)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(x) * self.sign


def test_accuracy_and_loss_over_uneven_batches() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(10, 4, generator=g), torch.randint(0, 4, (10,), generator=g)
    module = _Fixed().train()
    evaluator = Evaluator(4)
    evaluator.start(module)
    for part in (slice(0, 7), slice(7, 10)):
        evaluator.update((x[part], y[part]))
    got = evaluator.compute()
    assert got["accuracy"] == pytest.approx(float((x.argmax(1) == y).float().mean()))
    assert got["test_loss"] == pytest.approx(float(F.cross_entropy(x, y)), rel=1e-6)
    assert module.training and set(got) == {"accuracy", "test_loss"}


def test_personal_models_mean_worst_and_spread() -> None:
    x = torch.eye(4)
    y = torch.tensor([0, 1, 2, 0])
    evaluator = Evaluator(4)
    evaluator.start([_Fixed(1.0), _Fixed(-1.0)])
    evaluator.update((x, y))
    # sign +1: 3 of 4 right. sign -1: the largest of (-1, 0, 0, 0) is the first 0: right where y is 0 in row 3 and in row 1..
    right = [float((s * x).argmax(1).eq(y).float().mean()) for s in (1, -1)]
    got = evaluator.compute()
    assert got["accuracy"] == pytest.approx(sum(right) / 2) and got["accuracy_worst"] == min(right)
    assert got["accuracy_std"] == pytest.approx(abs(right[0] - right[1]) / 2)


def test_without_classes_there_is_nothing_to_say() -> None:
    evaluator = Evaluator(None)
    evaluator.start(_Fixed())
    evaluator.update(("anything", "at all"))
    assert evaluator.compute() == {}


def test_user_step_may_not_keep_our_log() -> None:
    logged: dict[str, Any] = {}

    class Outer(L.LightningModule):
        def log(self, name: str, value: Any, **kwargs: Any) -> None:  # type: ignore[override]
            logged[name] = value

    class User(_Fixed):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("mine", 3.0)
            self.log_dict({"a": 1.0, "b": 2.0})

    module = User()
    assert has_own_validation(module) and not has_own_validation(ClientModule(nn.Linear(1, 1)))
    run_user_hook(Outer(), module, "validation_step", None, 0)
    assert logged == {"mine": 3.0, "a": 1.0, "b": 2.0} and "log" not in module.__dict__
