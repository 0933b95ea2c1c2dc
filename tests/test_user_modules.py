"""LightningModules as people write them: under both executors, inside a federation, with nothing changed."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import Tensor, nn
from torchmetrics import Accuracy
from toys import CLASSES, WIDTH, assert_same, client_module, data_module, network, outer, run, skewed, weights

from dynfed_lightning import (
    ClientModule,
    Cosine,
    DynFed,
    FedAvg,
    Federation,
    GradientNorm,
    Linear,
    LoopLocal,
    Scaffold,
    TrainerLocal,
)
from dynfed_lightning.callbacks import ScaleLearningRate

EXECUTORS = pytest.mark.parametrize("executor", [TrainerLocal, LoopLocal])


class User(L.LightningModule):
    """What the cases below change one thing of."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _client(**kwargs: Any) -> Any:
    data = data_module(**kwargs)
    data.setup()
    return data.client(0)


def _both(make: Any, **options: Any) -> list[tuple[L.LightningModule, Any]]:
    """The module trained by each executor; their weights must be the same bits."""
    made = []
    for executor in (TrainerLocal, LoopLocal):
        module = make()
        made.append((module, executor(**options).fit(module, _client(), seed=1)))
    assert_same(dict(made[0][0].state_dict()), dict(made[1][0].state_dict()))
    return made


@pytest.mark.filterwarnings("ignore:.*training_step.*returned.*None.*")
def test_a_step_may_return_none() -> None:
    class Skips(User):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    (_, a), (_, b) = _both(Skips)
    assert a.loss == b.loss and 0.3 < a.loss < 2.0  # the mean of the losses there were


def test_manual_optimisation_without_a_loss() -> None:
    class Manual(User):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()  # type: ignore[union-attr]
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()  # type: ignore[union-attr]

    trainer = run(Federation(Manual(), FedAvg(), local="trainer"), rounds=6)
    assert trainer.callback_metrics["failed"] == 0 and trainer.callback_metrics["accuracy"] > 0.7
    plain = run(Federation(User(), FedAvg(), local="trainer"), rounds=6)
    assert trainer.callback_metrics["accuracy"] == plain.callback_metrics["accuracy"]


def test_metrics_logged_as_objects() -> None:
    class Measured(User):
        def __init__(self) -> None:
            super().__init__()
            self.acc = Accuracy("multiclass", num_classes=CLASSES)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            logits = self(batch[0])
            self.acc(logits, batch[1])
            self.log("acc", self.acc, on_step=False, on_epoch=True)
            return F.cross_entropy(logits, batch[1])

    (_, a), (_, b) = _both(Measured)
    assert a.metrics["acc"] == pytest.approx(b.metrics["acc"], abs=1e-6) and 0 < b.metrics["acc"] <= 1


def test_eval_mode_submodules_stay_in_eval_mode() -> None:
    class PartlyFrozen(User):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.BatchNorm1d(WIDTH), *network())
            self.net[0].eval().requires_grad_(False)

    for module, _ in _both(PartlyFrozen):
        assert int(module.net[0].num_batches_tracked) == 0


def test_counters_of_the_loop() -> None:
    class Counting(User):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[int, int]] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen.append((self.current_epoch, self.global_step))
            return super().training_step(batch, batch_idx)

    (a, _), (b, _) = _both(Counting, max_epochs=2)
    assert a.seen == b.seen == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 4), (1, 5), (1, 6), (1, 7)]


def test_the_loop_says_what_its_trainer_lacks() -> None:
    class Nosy(User):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * self.trainer.num_devices

    with pytest.raises(AttributeError, match=r"local='loop' has no `trainer.num_devices`: use local='trainer'"):
        LoopLocal().fit(Nosy(), _client())


@pytest.mark.parametrize("name", ["SequentialLR", "OneCycleLR", "CosineAnnealingLR", "LambdaLR", "ExponentialLR"])
@EXECUTORS
def test_decay_over_rounds_survives_every_scheduler(executor: type, name: str) -> None:
    """The rates that steps are taken at are `factor` times those without."""
    rates: list[list[float]] = []

    class Scheduled(User):
        def configure_optimizers(self) -> Any:
            rates.append([])
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            s = torch.optim.lr_scheduler
            made = {
                "SequentialLR": lambda: s.SequentialLR(
                    optimizer, [s.LinearLR(optimizer, 0.5, total_iters=2), s.CosineAnnealingLR(optimizer, 4)], [2]
                ),
                "OneCycleLR": lambda: s.OneCycleLR(optimizer, 0.1, total_steps=8, cycle_momentum=False),
                "CosineAnnealingLR": lambda: s.CosineAnnealingLR(optimizer, 8),
                "LambdaLR": lambda: s.LambdaLR(optimizer, lambda t: 1 / (t + 1)),
                "ExponentialLR": lambda: s.ExponentialLR(optimizer, 0.7),
            }[name]()
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": made, "interval": "step"}}

    class Watch(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.optimizers[0].register_step_pre_hook(
                lambda o, args, kwargs: rates[-1].append(float(o.param_groups[0]["lr"]))
            )

    for factor in (1.0, 0.1):
        executor(max_epochs=2, lr_decay=factor, callbacks=Watch()).fit(Scheduled(), _client(), round=1)
    assert len(rates[-1]) == 8
    torch.testing.assert_close(torch.tensor(rates[-1]), 0.1 * torch.tensor(rates[-2]), rtol=1e-5, atol=1e-9)


@EXECUTORS
@pytest.mark.parametrize("schedule", [Cosine(1.0), Linear(1.0, 0.0)], ids=["cosine", "linear"])
def test_a_decay_to_nothing_ends_in_a_round_that_changes_nothing(executor: type, schedule: Any) -> None:
    federation = Federation(client_module(), FedAvg(), local=executor(lr_decay=schedule))
    seen: list[dict[str, Tensor]] = []

    class Keep(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(weights(federation))

    trainer = run(federation, rounds=3, callbacks=[Keep()])
    assert trainer.callback_metrics["failed"] == 0
    moved = [float((b["model.0.weight"] - a["model.0.weight"]).norm()) for a, b in itertools.pairwise(seen)]
    assert moved[0] > 0 and moved[1] == 0


def test_rounds_planned_by_steps() -> None:
    federation = Federation(client_module(), FedAvg(), local=LoopLocal(lr_decay=Linear(1.0, 0.5)))
    trainer = outer(-1, max_steps=3)
    trainer.fit(federation, datamodule=data_module())
    assert trainer.global_step == 3 and federation.server is not None and federation.server.num_rounds == 3


def test_a_number_decays_by_the_round() -> None:
    rates = []
    for t in (0, 1, 3):
        rates.append(LoopLocal(lr_decay=0.9).fit(client_module(lr=0.2), _client(), round=t).learning_rate)
    assert rates == pytest.approx([0.2, 0.2 * 0.9, 0.2 * 0.9**3])
    with pytest.raises(ValueError, match="Expected `lr_decay` to be a positive number or a schedule, but got 0"):
        LoopLocal(lr_decay=0)
    with pytest.raises(ValueError, match="Expected `factor` to be a number >= 0, but got -1"):
        ScaleLearningRate(-1)


def test_gradient_accumulation_counts_steps_and_losses_right() -> None:
    four = TrainerLocal(trainer_kwargs={"accumulate_grad_batches": 2}).fit(User(), _client())
    one = TrainerLocal(lr_decay=1e-9).fit(User(), _client(), round=1)
    assert (four.steps, one.steps) == (2, 4)
    assert four.loss == pytest.approx(one.loss, rel=0.1)
    with pytest.raises(ValueError, match="no gradient clipping under SCAFFOLD"):
        local = TrainerLocal(trainer_kwargs={"gradient_clip_val": 1.0})
        run(Federation(client_module(), Scaffold(), local=local))


def test_a_callback_that_freezes_layers() -> None:
    class Backboned(User):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(self.backbone(x))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    federation = Federation(Backboned(), FedAvg(), local=TrainerLocal(callbacks=BackboneFinetuning(99)))
    before = federation.module.backbone.weight.detach().clone()
    trainer = run(federation, rounds=2)
    assert trainer.callback_metrics["failed"] == 0
    assert torch.equal(federation.module.backbone.weight, before)


def test_infinite_gradient_norms_do_not_count() -> None:
    class Spiky(User):
        def on_after_backward(self) -> None:
            if self.global_step == 1:
                self.net[0].weight.grad[0, 0] = float("inf")

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.net[0].weight.grad.nan_to_num_(posinf=0.0)

    norm = GradientNorm()
    LoopLocal().fit(Spiky(), _client(), callbacks=[norm])
    assert 0 < norm.value < 10


# -------------------------------------------------------------------------------------------- the user's validation


def test_validation_of_a_client_module_subclass_and_its_reductions() -> None:
    class Mine(ClientModule):
        def __init__(self) -> None:
            super().__init__(network(), lr=0.1)
            self.outputs: list[float] = []

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("largest", float(batch_idx), reduce_fx="max")
            self.outputs.append(float(len(batch[1])))

        def on_validation_epoch_end(self) -> None:
            self.log("rows", sum(self.outputs))
            self.outputs.clear()

    federation = Federation(Mine(), FedAvg(), local="loop")
    trainer = run(federation, data_module(test_batch_size=30), rounds=3)
    assert trainer.callback_metrics["largest"] == 2.0 and trainer.callback_metrics["rows"] == 90
    assert federation.module.outputs == []


def test_a_task_that_is_no_classification() -> None:
    class Regress(User):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.mse_loss(self(batch[0])[:, 0], batch[1].float())

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("mse", F.mse_loss(self(batch[0])[:, 0], batch[1].float()))

    federation = Federation(Regress(), FedAvg(), local="loop", num_classes=0)
    trainer = run(federation, rounds=5)
    assert "accuracy" not in trainer.callback_metrics and trainer.callback_metrics["mse"] < 0.6


# ---------------------------------------------------------------------------------------------- several fits, resume


def test_a_test_between_fits_keeps_what_the_server_knows(tmp_path: Path) -> None:
    def fresh() -> tuple[Federation, Any]:
        return Federation(client_module(), DynFed(), local="loop"), data_module(4, skewed(4), public=30)

    straight, data = fresh()
    run(straight, data, rounds=5)
    stopped, data = fresh()
    trainer = run(stopped, data, rounds=3)
    labels = dict(stopped.server.state["labels"])  # type: ignore[union-attr]
    trainer.test(stopped, datamodule=data, verbose=False)
    assert stopped.server.state["labels"] == labels and len(labels) == 4  # type: ignore[union-attr]
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed, data = fresh()
    run(resumed, data, rounds=5, ckpt_path=tmp_path / "a.ckpt")
    assert_same(weights(resumed), weights(straight))
    trainer.fit_loop.max_epochs = 5  # the same Trainer goes on
    trainer.fit(stopped, datamodule=data)
    assert_same(weights(stopped), weights(straight))
    assert stopped.total_bytes_up == straight.total_bytes_up


def test_a_new_trainer_starts_anew() -> None:
    federation = Federation(client_module(), Scaffold(), local="loop")
    run(federation, rounds=2)
    up = federation.total_bytes_up
    run(federation, rounds=1)
    assert federation.last_round is not None and federation.total_bytes_up == federation.last_round.bytes_up < up
    control = federation.server.state["control"]["model.0.weight"]  # type: ignore[union-attr]
    own = [federation.store.read(k)["control"]["model.0.weight"] for k in range(4)]
    torch.testing.assert_close(control, torch.stack(own).mean(0), rtol=0, atol=1e-6)


def test_frozen_weights_resume(tmp_path: Path) -> None:
    class Frozen(ClientModule):
        """Its frozen layer is drawn anew in every process."""

        def __init__(self, seed: int) -> None:
            torch.manual_seed(seed)
            super().__init__(nn.Sequential(nn.Linear(WIDTH, WIDTH), *network()), lr=0.1)
            self.model[0].requires_grad_(False)

    straight = Federation(Frozen(0), FedAvg(), local="loop")
    run(straight, rounds=4)
    run(Federation(Frozen(0), FedAvg(), local="loop"), rounds=2).save_checkpoint(tmp_path / "a.ckpt")
    resumed = Federation(Frozen(1), FedAvg(), local="loop")
    run(resumed, rounds=4, ckpt_path=tmp_path / "a.ckpt")
    assert_same(weights(resumed), weights(straight))


def test_another_split_or_model_is_refused_on_resume(tmp_path: Path) -> None:
    run(Federation(client_module(), FedAvg(), local="loop"), rounds=1).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="Expected a checkpoint with split"):
        run(Federation(client_module(), local="loop"), data_module(5), rounds=2, ckpt_path=tmp_path / "a.ckpt")


def test_load_from_checkpoint(tmp_path: Path) -> None:
    trainer = run(Federation(client_module(), FedAvg(), local="loop"), rounds=3)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Federation.load_from_checkpoint(
        tmp_path / "a.ckpt", weights_only=True, module=client_module(seed=4), algorithm=FedAvg(), local="loop"
    )
    (metrics,) = outer().validate(loaded, datamodule=data_module(), verbose=False)
    assert metrics["accuracy"] == pytest.approx(float(trainer.callback_metrics["accuracy"]))


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_outer_precision_is_refused(precision: Any) -> None:
    with pytest.raises(ValueError, match="Expected `precision` of the outer Trainer to be 32, but got"):
        run(Federation(client_module(), local="loop"), precision=precision)


def test_more_clients_needed_than_there_are() -> None:
    with pytest.raises(ValueError, match="Expected `min_clients` to be at most the 4 clients there are, but got 9"):
        run(Federation(client_module(), local="loop", min_clients=9))
    with pytest.raises(TypeError, match="Expected `seed` to be an integer, but got '7'"):
        Federation(client_module(), seed="7")  # type: ignore[arg-type]


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(L.Trainer, "world_size", property(lambda self: 2))
    with pytest.raises(ValueError, match="Expected one process in the outer Trainer, but got 2: pass `devices=1`"):
        run(Federation(client_module(), local="loop"))
