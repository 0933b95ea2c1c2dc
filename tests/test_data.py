"""The federated data module: who has what, which clients a round has, and what Lightning makes of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from data_support import Records, module, rows
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from dynfed_lightning.data import FederatedDataModule
from dynfed_lightning.loaders import RowLoader
from dynfed_lightning.partition import Dirichlet, Natural


def test_cohorts_are_sorted_distinct_and_depend_on_seed_and_round() -> None:
    data = module(clients=20, clients_per_round=6, seed=1)
    cohorts = [data.sample_cohort(r) for r in range(300)]
    assert all(len(set(c)) == 6 and c == sorted(c) and c[0] >= 0 and c[-1] < 20 for c in cohorts)
    assert cohorts == [data.sample_cohort(r) for r in reversed(range(300))][::-1]
    assert cohorts[:5] != [module(clients=20, clients_per_round=6, seed=2).sample_cohort(r) for r in range(5)]
    # Each client in 90 of 300 rounds on average; standard deviation sqrt(300 * 0.3 * 0.7) = 7.9.
    counts = np.bincount(np.concatenate(cohorts), minlength=20)
    assert np.abs(counts - 90).max() < 4 * 7.9
    assert module(clients=5).sample_cohort(7) == [0, 1, 2, 3, 4]
    assert len(module(clients=20, clients_per_round=0.25).sample_cohort(0)) == 5
    assert len(module(clients=20, clients_per_round=0.01).sample_cohort(0)) == 1


def test_a_cohort_of_a_large_population_costs_its_own_size() -> None:
    data = module(n=20, clients=20, clients_per_round=10)
    data.partitioner.num_clients = 10**9
    start = time.perf_counter()
    assert len(data.sample_cohort(0)) == 10
    assert time.perf_counter() - start < 0.1


class Rounds(L.LightningModule):
    """Remembers the epoch and the batch of every training step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, list[int]]] = []
        self.tested = 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def training_step(self, batch: list[int], batch_idx: int) -> None:
        assert type(batch) is list and all(type(k) is int for k in batch)
        self.seen.append((self.current_epoch, batch))
        self.weight.grad = torch.ones(1)
        self.optimizers().step()  # type: ignore[union-attr]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.tested += len(batch[1])


def trainer(folder: Path, **options: Any) -> L.Trainer:
    return L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        **{"enable_checkpointing": False, **options},
    )


def test_a_trainer_sees_every_rounds_own_cohort(tmp_path: Path) -> None:
    data, federation = module(clients=30, clients_per_round=4), Rounds()
    run = trainer(tmp_path, max_epochs=6)
    run.fit(federation, datamodule=data)
    assert federation.seen == [(r, data.sample_cohort(r)) for r in range(6)]
    assert len({tuple(c) for _, c in federation.seen}) > 3
    assert (run.global_step, federation.tested) == (6, 6 * 40)


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:Using ModelCheckpoint with manual")
@pytest.mark.parametrize(
    "every", [{"every_n_epochs": 1}, {"every_n_train_steps": 1}, {"save_on_train_epoch_end": True}]
)
def test_a_resumed_run_goes_on_with_the_same_cohorts(tmp_path: Path, every: dict[str, Any]) -> None:
    def data() -> FederatedDataModule:
        return module(clients=30, clients_per_round=4)

    saving = ModelCheckpoint(tmp_path, filename="last", **every)
    first = Rounds()
    trainer(tmp_path, max_epochs=3, callbacks=[saving], enable_checkpointing=True).fit(first, datamodule=data())
    second = Rounds()
    again = trainer(tmp_path, max_epochs=7, callbacks=[ModelCheckpoint(tmp_path, **every)], enable_checkpointing=True)
    again.fit(second, datamodule=data(), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True)
    assert first.seen + second.seen == [(r, data().sample_cohort(r)) for r in range(7)]
    assert again.global_step == 7


def test_the_training_loader_takes_no_sampler_and_reads_the_epoch_late() -> None:
    data = module(clients=30, clients_per_round=4)
    loader = data.train_dataloader()
    assert not isinstance(loader, DataLoader) and len(loader) == 1

    class At:
        current_epoch = 0

    data.trainer = at = At()  # type: ignore[assignment]
    iterator = iter(loader)
    at.current_epoch = 5
    assert list(iterator) == [data.sample_cohort(5)] != [data.sample_cohort(0)]
    assert not isinstance(data.val_dataloader(), DataLoader) and isinstance(data.val_dataloader(), RowLoader)


def test_a_nested_trainer_and_a_bare_loop_see_the_same_batches(tmp_path: Path) -> None:
    class Local(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.seen = torch.nn.Linear(1, 1), []

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.seen += rows([batch])
            return self.layer(batch[0]).sum() * 0

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    client, local = module().client(0), Local()
    trainer(tmp_path, max_epochs=3, barebones=False).fit(local, client.train_loader(11))
    bare = client.train_loader(11)
    assert local.seen == rows(bare) + rows(bare) + rows(bare)


def test_setup_is_lazy_and_happens_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    from dynfed_lightning import split

    real = split.load_table
    monkeypatch.setattr(split, "load_table", lambda *a: (reads.append(a[1]), real(*a))[1])
    data = module(public=5)
    assert data.num_clients == 5 and reads == []
    for stage in ("fit", "validate", None):
        data.setup(stage)
    data.prepare_data()
    _ = data.num_classes, data.client(0), data.public_set
    assert reads == ["train", "test"]


def test_summary_says_it_in_a_few_lines() -> None:
    data = module(public=40, val_fraction=0.25, clients_per_round=2)
    text = data.summary()
    for part in ("200 training rows, 4 classes", "5 by IID(num_clients=5), 2 a round", "40 rows (labels hidden)"):
        assert part in text
    assert data.split_hash[:16] in text and "24 to 24, median 24, 120 in all" in text
    assert "40 rows kept by the clients" in text


@pytest.mark.parametrize(("clients", "name"), [(5, "deep/bars.png"), (60, "dots.svg")])
def test_plot_draws_a_picture(clients: int, name: str, tmp_path: Path) -> None:
    file = module(clients=clients).plot(tmp_path / name)
    assert file == tmp_path / name and file.stat().st_size > 5000
    start = file.read_bytes()[:200]
    assert start.startswith(b"\x89PNG") or b"<svg" in start or b"<?xml" in start


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"partitioner": "iid"}, TypeError, "`partitioner` to be a Partitioner, but got str"),
        ({"resources": 4}, TypeError, "`resources`"),
        ({"augment": 4}, TypeError, "`augment`"),
        ({"clients_per_round": 6}, ValueError, "`clients_per_round` to be at most the 5 clients, but got 6"),
        ({"clients_per_round": 0}, ValueError, "`clients_per_round`"),
        ({"clients_per_round": 1.5}, ValueError, "`clients_per_round`"),
        ({"clients_per_round": True}, ValueError, "`clients_per_round`"),
        ({"clients_per_round": "all"}, ValueError, "`clients_per_round`"),
        ({"public": 0}, ValueError, "`public`"),
        ({"public": True}, ValueError, "`public`"),
        ({"public": 2.5}, ValueError, "`public`"),
        ({"train_fraction": 0}, ValueError, r"`train_fraction` to be in \(0, 1\], but got 0"),
        ({"train_fraction": 1.1}, ValueError, "`train_fraction`"),
        ({"val_fraction": 1}, ValueError, r"`val_fraction` to be in \[0, 1\), but got 1"),
        ({"val_fraction": "0.1"}, ValueError, "`val_fraction`"),
        ({"batch_size": 0}, ValueError, "`batch_size` to be an integer of at least 1, but got 0"),
        ({"test_batch_size": 1.0}, ValueError, "`test_batch_size`"),
        ({"limit_test": 0}, ValueError, "`limit_test`"),
        ({"test": 1.0}, ValueError, "`test` to be a dataset or a share"),
        ({"test": 10}, ValueError, "`test` to be a dataset or a share"),
        ({"seed": "0"}, ValueError, "`seed`"),
        ({"data_dir": "no/such/folder"}, ValueError, "`data_dir` to be a folder"),
        ({"partitioner": Natural()}, ValueError, "`partition_column` to be given"),
    ],
)
def test_bad_arguments_are_named_when_built(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        module(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"public": 200}, "`public` and `test` to leave rows of the 200"),
        ({"public": 198}, "`num_clients` to be at most the 2 rows"),
        ({"test": None}, "`test` to be given, since a tuple has no test split"),
        ({"clients": 201}, "`num_clients` to be at most the 200 rows"),
    ],
)
def test_what_only_the_data_can_tell_is_found_in_setup(options: dict[str, Any], message: str) -> None:
    data = module(**options)
    with pytest.raises(ValueError, match=message):
        data.setup()


def test_more_clients_a_round_than_writers() -> None:
    writers = [{"x": torch.zeros(1), "label": 0, "writer": i % 2} for i in range(4)]
    data = FederatedDataModule(Records(writers), Natural(), test=0.25, partition_column="writer", clients_per_round=3)
    with pytest.raises(ValueError, match="at most the 2 clients, but got 3"):
        data.setup()


def test_digits_by_name() -> None:
    data = FederatedDataModule("digits", Dirichlet(20, 0.3), public=100)
    assert (data.num_clients, data.num_classes, len(data.test_dataloader())) == (20, 10, 1)
    assert int(data.label_counts().sum()) == 1337
    x, y = next(iter(data.client(0).train_loader(0)))
    assert x.shape[1:] == (1, 8, 8) and x.dtype == torch.float32 and y.dtype == torch.int64
