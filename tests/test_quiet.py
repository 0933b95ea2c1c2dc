"""A fit inside a fit: silent, really training, and invisible from outside."""

from __future__ import annotations

import logging
import random
import warnings

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dynfed_lightning.quiet import device_of, fixed_threads, isolated_rng, quiet_fit, quiet_lightning, quiet_trainer


class Tiny(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.layer(batch).square().mean()
        self.log("inner", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("inner_val", self.layer(batch).mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Outer(L.LightningModule):
    """Trains the same inner module twice in each of its steps, between two of its own log calls."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.inner = Tiny()  # registered, so that its trainer is the outer one
        self.steps: list[int] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("before", 1.0, prog_bar=True)
        for _ in range(2):
            weight = self.inner.layer.weight.detach().clone()
            self.steps.append(quiet_fit(quiet_trainer(self.inner, max_epochs=2), self.inner, DATA, DATA))
            assert not torch.equal(weight, self.inner.layer.weight)
        assert self.inner.trainer is self.trainer or self.inner.trainer == self.trainer
        self.log("after", 2.0, prog_bar=True)
        optimizer = self.optimizers()
        assert isinstance(optimizer, L.pytorch.core.optimizer.LightningOptimizer)
        optimizer.zero_grad()
        self.manual_backward(self.layer(torch.ones(1, 1)).sum())
        optimizer.step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.layer.parameters(), 0.1)


DATA = DataLoader(torch.randn(20, 3), batch_size=5)  # type: ignore[arg-type, var-annotated]


def test_two_fits_inside_a_step(capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []

    class Listen(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listener = Listen()
    logging.getLogger("lightning.pytorch").addHandler(listener)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outer = Outer()
            trainer = L.Trainer(max_epochs=3, logger=False, enable_checkpointing=False, enable_model_summary=False)
            trainer.fit(outer, DataLoader([torch.zeros(1)]))  # type: ignore[arg-type]
    finally:
        logging.getLogger("lightning.pytorch").removeHandler(listener)
    assert outer.steps == [8] * 6
    assert trainer.global_step == 3
    assert {k: float(v) for k, v in trainer.callback_metrics.items()} == {"before": 1.0, "after": 2.0}
    assert [m for m in said if "stopped" in m] == ["`Trainer.fit` stopped: `max_epochs=3` reached."]
    assert sum("GPU available" in m for m in said) == 1
    bar = "".join(capfd.readouterr())
    assert "before" in bar and "after" in bar and "inner" not in bar


def test_not_a_word(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(record=True) as seen, caplog.at_level(logging.INFO):
        warnings.simplefilter("always")
        loader = DataLoader(torch.randn(8, 3), batch_size=4)  # type: ignore[arg-type, var-annotated]
        assert quiet_fit(quiet_trainer(max_epochs=1), Tiny(), loader, loader) == 2
    assert "".join(capfd.readouterr()) == "" and not caplog.records and not seen


def test_others_are_still_heard(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with quiet_lightning(), quiet_lightning():
            warnings.warn("mine", UserWarning, stacklevel=1)
            logging.getLogger("users").warning("mine too")
            assert not logger.isEnabledFor(logging.WARNING)
        assert logger.level == level and logging.getLogger("lightning.pytorch.x").isEnabledFor(logging.INFO)
    assert [str(w.message) for w in seen] == ["mine"] and [r.message for r in caplog.records] == ["mine too"]


def test_a_trainer_that_has_fitted_is_refused() -> None:
    module, trainer = Tiny(), quiet_trainer(max_epochs=1)
    quiet_fit(trainer, module, DATA)
    for again in (trainer, quiet_trainer(max_epochs=1)):
        with pytest.raises(RuntimeError, match="trained 0"):
            quiet_fit(again, module, DATA if again is trainer else DataLoader([]))  # type: ignore[arg-type]
    assert module._trainer is None and all(p.grad is None for p in module.parameters())


def test_the_module_is_restored_after_a_failure() -> None:
    class Failing(Tiny):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            raise ZeroDivisionError

    module = Failing()
    with pytest.raises(ZeroDivisionError):
        quiet_fit(quiet_trainer(module, max_epochs=1), module, DATA)
    assert module._trainer is None


def test_the_users_trainer_arguments_win() -> None:
    trainer = quiet_trainer(Tiny(), max_steps=3, gradient_clip_val=0.5, num_sanity_val_steps=1)
    assert trainer.max_steps == 3 and trainer.gradient_clip_val == 0.5 and trainer.num_sanity_val_steps == 1
    assert trainer.strategy.root_device == torch.device("cpu") == device_of(Tiny()) == device_of(nn.ReLU())
    with pytest.raises(TypeError, match="max_epoch"):
        quiet_trainer(max_epoch=3)


def draws() -> tuple[float, float, float]:
    return torch.rand(()).item(), float(np.random.rand()), random.random()


def test_isolated_rng() -> None:
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = draws()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    with isolated_rng(2**64 - 1):
        first = draws()
    with pytest.raises(KeyError), isolated_rng(2**64 - 1):
        second = draws()
        raise KeyError
    with isolated_rng():
        assert draws() == expected  # no seed: the generators go on
    assert first == second != expected
    assert draws() == expected
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match="`seed`"), isolated_rng(seed):
            pass


def test_fixed_threads() -> None:
    before = torch.get_num_threads()
    with fixed_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        with fixed_threads(None):
            assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="`n`"), fixed_threads(0):
        pass
