from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from toys import DictModule, NormNet, client_module, data_module, network, run

from dynfed_lightning import ClientFailure, ClientModule, Exponential, FedAvg, Federation, LoopLocal, TrainerLocal
from dynfed_lightning.local import as_executor


def _client(**kwargs: Any) -> Any:
    data = data_module(**kwargs)
    data.setup()
    return data.client(0)


@pytest.mark.parametrize("options", [{}, {"max_epochs": 3}, {"max_steps": 7}, {"max_steps": 2}], ids=str)
@pytest.mark.parametrize("kind", ["sgd", "adam", "norm"])
def test_both_executors_give_the_same_bits(options: dict[str, int], kind: str) -> None:
    """60 rows in batches of 16: with dropout, so the random streams must agree as well."""
    made = []
    for executor in (TrainerLocal, LoopLocal):
        model = NormNet() if kind == "norm" else network()
        module = ClientModule(model, lr=0.05, optimizer="adam" if kind == "adam" else "sgd")
        result = executor(**options).fit(module, _client(), seed=3)
        made.append((module.state_dict(), result))
    (a, ra), (b, rb) = made
    assert (
        ra.steps
        == rb.steps
        == {"{}": 4, "{'max_epochs': 3}": 12, "{'max_steps': 7}": 7, "{'max_steps': 2}": 2}[str(options)]
    )
    assert ra.loss == rb.loss
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("executor", [TrainerLocal, LoopLocal])
def test_seed_decides_and_global_state_stays(executor: type) -> None:
    def fit(seed: int) -> torch.Tensor:
        module = ClientModule(NormNet(), lr=0.1)
        executor().fit(module, _client(), seed=seed)
        return module.model.body[0].weight.detach()

    torch.manual_seed(11)
    before = torch.get_rng_state()
    threads = torch.get_num_threads()
    a, b, c = fit(1), fit(1), fit(2)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(before, torch.get_rng_state()) and torch.get_num_threads() == threads


@pytest.mark.parametrize("executor", [TrainerLocal, LoopLocal])
def test_learning_rate_decays_over_rounds(executor: type) -> None:
    """One full-batch SGD step moves the weights by lr * 0.5^round times the gradient."""
    moved = []
    for round in (0, 1, 3):
        module = client_module(lr=0.2)
        start = module.model[0].weight.detach().clone()
        data = _client(clients=1, batch_size=500)
        result = executor(lr_decay=Exponential(1.0, 0.5)).fit(module, data, round=round, seed=0)
        assert result.learning_rate == pytest.approx(0.2 * 0.5**round)
        moved.append(module.model[0].weight.detach() - start)
    torch.testing.assert_close(moved[0] * 0.5, moved[1], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(moved[0] * 0.125, moved[2], rtol=1e-4, atol=1e-7)


class _Scheduled(DictModule):
    """SGD whose own scheduler halves the rate every epoch; remembers the rates it trained with."""

    def __init__(self, interval: str = "epoch") -> None:
        super().__init__()
        self.interval = interval
        self.rates: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.4)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return [optimizer], [{"scheduler": scheduler, "interval": self.interval}]


@pytest.mark.parametrize("executor", [TrainerLocal, LoopLocal])
@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_the_users_scheduler_composes_with_the_decay(executor: type, interval: str) -> None:
    module = _Scheduled(interval)
    executor(max_epochs=2, lr_decay=Exponential(1.0, 0.1)).fit(module, _client(batch_size=30), round=1)
    per_step = [0.04, 0.02, 0.01, 0.005] if interval == "step" else [0.04, 0.04, 0.02, 0.02]
    assert module.rates == pytest.approx(per_step)


@pytest.mark.parametrize("executor", [TrainerLocal, LoopLocal])
def test_no_rows_and_nan(executor: type) -> None:
    class Nan(ClientModule):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch, batch_idx) * float("inf")

    with pytest.raises(ClientFailure, match="training loss of client 0 became") as caught:
        executor().fit(Nan(network()), _client())
    assert caught.value.reason == "nan_loss"


class _Manual(DictModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class _Stepper(DictModule):
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)


class _Two(DictModule):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.parameters(), lr=0.1)]


class _Plateau(DictModule):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "x"}}


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (_Manual, "_Manual is manual"),
        (_Stepper, "does not call 'optimizer_step', which _Stepper overrides"),
        (_Two, "expects one optimizer, but `configure_optimizers` returned 2"),
        (_Plateau, "no metric for ReduceLROnPlateau"),
    ],
)
def test_the_loop_refuses_what_it_cannot_honour(module: type, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoopLocal().check(module())
    TrainerLocal().check(module())


def test_the_loop_refuses_a_callback_it_would_ignore() -> None:
    class Validating(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None: ...

    with pytest.raises(ValueError, match="does not call 'on_fit_start', which Validating overrides"):
        LoopLocal(callbacks=Validating()).check(client_module())


def test_user_log_reaches_the_result() -> None:
    rows = [{"x": x, "label": y} for x, y in zip(*_blobs(), strict=True)]
    from dynfed_lightning import IID, FederatedDataModule

    data = FederatedDataModule(rows, IID(2), test=rows[:10], batch_size=8)
    data.setup()
    for executor in (TrainerLocal, LoopLocal):
        module = DictModule()
        result = executor().fit(module, data.client(0))
        assert result.metrics["my_loss"] > 0
        assert "log" not in module.__dict__


def _blobs() -> tuple[torch.Tensor, torch.Tensor]:
    from toys import blobs

    return blobs(40)


def test_gradient_clipping_and_validation_under_the_trainer() -> None:
    class Watch(L.Callback):
        validated = 0

        def on_validation_end(self, *_: Any) -> None:
            type(self).validated += 1

    class Validated(ClientModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    data = _client(val_fraction=0.25, batch_size=500, clients=1)
    module = Validated(network(), lr=1.0)
    before = module.model[0].weight.detach().clone()
    result = TrainerLocal(callbacks=[Watch()], trainer_kwargs={"gradient_clip_val": 1e-3}).fit(module, data)
    assert Watch.validated == 1 and result.metrics["val_loss"] > 0
    moved = torch.cat([(p - q).flatten() for p, q in zip([module.model[0].weight], [before], strict=True)])
    assert 0 < float(moved.detach().norm()) <= 1e-3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_epochs": 0}, "Expected `max_epochs` to be a positive integer, but got 0"),
        ({"max_steps": 0}, "Expected `max_steps` to be a positive integer or -1, but got 0"),
        ({"threads": 0}, "Expected `threads` to be a positive integer, but got 0"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    for executor in (TrainerLocal, LoopLocal):
        with pytest.raises(ValueError, match=message):
            executor(**kwargs)


def test_bad_callbacks_names_and_trainer_arguments() -> None:
    with pytest.raises(TypeError, match="Lightning callbacks, but got str"):
        LoopLocal(callbacks=["x"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"without \['max_epochs'\]"):
        TrainerLocal(trainer_kwargs={"max_epochs": 3})
    with pytest.raises(ValueError, match="but got 'warp'"):
        as_executor("warp")
    assert isinstance(as_executor("loop"), LoopLocal) and isinstance(as_executor("trainer"), TrainerLocal)


def test_checkpoints_early_stopping_and_loggers_on_clients(tmp_path: Path) -> None:
    class Validated(ClientModule):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    local = TrainerLocal(
        max_epochs=50,
        callbacks=[
            EarlyStopping("val_loss", min_delta=100.0, patience=2),
            ModelCheckpoint(monitor="val_loss"),
        ],
        trainer_kwargs={
            "default_root_dir": tmp_path / "clients",
            "logger": CSVLogger(tmp_path / "logs"),
            "log_every_n_steps": 1,
        },
    )
    federation = Federation(Validated(network(), lr=0.1), FedAvg(), local=local)
    trainer = run(federation, data_module(3, val_fraction=0.2), rounds=2)
    assert trainer.callback_metrics["failed"] == 0
    assert list(tmp_path.glob("logs/**/metrics.csv"))
    result = local.fit(Validated(network(), lr=0.1), _client(val_fraction=0.2))
    assert result.steps == 3 * 3  # stopped after the first epoch and `patience` more, three batches each


def test_client_checkpoints_are_kept_apart(tmp_path: Path) -> None:
    local = TrainerLocal(callbacks=ModelCheckpoint(), trainer_kwargs={"default_root_dir": tmp_path})
    run(Federation(client_module(), FedAvg(), local=local), data_module(3), rounds=1)
    found = {p.relative_to(tmp_path).parts[0] for p in tmp_path.glob("**/*.ckpt")}
    assert found == {"client0", "client1", "client2"}
