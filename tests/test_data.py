"""The federated data module: who has what, which clients a round has, and what Lightning makes of it."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset

from dynfed_lightning.data import ClientData, FederatedDataModule, PublicSet
from dynfed_lightning.loaders import CropFlip, RowLoader
from dynfed_lightning.partition import IID, Dirichlet, Natural, Pathological
from dynfed_lightning.resources import DrawnResources, Resources


def numbered(n: int = 200, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs ``[n, 1]`` that say which row they are, and labels."""
    return torch.arange(float(n))[:, None], torch.arange(n) % classes


def module(n: int = 200, clients: int = 5, **options: Any) -> FederatedDataModule:
    partitioner = options.pop("partitioner", IID(clients))
    return FederatedDataModule(numbered(n), partitioner, **{"test": numbered(40), "batch_size": 8, **options})


def rows(loader: Any) -> list[int]:
    return [int(v) for x, _ in loader for v in x.flatten()]


# ------------------------------------------------------------------- clients


def test_every_training_row_is_with_one_client_and_labels_fit() -> None:
    data = module()
    seen = []
    for k in range(data.num_clients):
        for x, y in data.client(k).train_loader(seed=0):
            assert torch.equal(y, x.flatten().long() % 4)
            seen += rows([(x, y)])
    assert sorted(seen) == list(range(200))


def test_a_client_tells_what_it_has() -> None:
    data = module(partitioner=Pathological(4, 1))
    client = data.client(2)
    assert isinstance(client, ClientData) and (client.id, client.num_examples) == (2, 50)
    assert sorted(client.label_counts().tolist()) == [0, 0, 0, 50]
    assert client.val_loader() is None
    assert torch.equal(data.label_counts()[2], client.label_counts()) and data.label_counts().sum() == 200
    with pytest.raises(IndexError, match="a client id from 0 to 3, but got 4"):
        data.client(4)


def test_epoch_k_is_a_function_of_seed_and_k_only() -> None:
    loader = module().client(0).train_loader(seed=7)
    epochs = [rows(loader) for _ in range(3)]
    assert len(loader) == 5 and all(sorted(e) == sorted(epochs[0]) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    torch.manual_seed(99)
    fresh = module().client(0).train_loader(seed=7)
    iter(fresh)  # an iterator that nobody asks for a batch, as Lightning makes one, is no epoch
    assert rows(fresh) == epochs[0] and rows(fresh) == epochs[1]
    fresh.set_epoch(2)
    assert rows(fresh) == epochs[2]
    assert rows(module().client(0).train_loader(seed=8)) != epochs[0]


def test_global_generators_are_neither_read_nor_moved() -> None:
    def state() -> tuple[Any, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]

    before = state()
    for source in (numbered(), Pairs(60)):
        data = FederatedDataModule(
            source,
            Dirichlet(5, 0.5),
            test=0.2,
            public=10,
            clients_per_round=2,
            val_fraction=0.1,
            resources=DrawnResources(),
        )
        data.sample_cohort(3)
        data.resources(1)
        rows(data.client(0).train_loader(1))
        rows(data.val_dataloader())
        next(iter(data.train_dataloader()))
    assert state() == before


def test_batches_drop_last_and_small_clients() -> None:
    sizes = [len(y) for _, y in module(n=50).client(0).train_loader(0)]
    assert sizes == [8, 2]
    # A single row left over joins the batch before it: batch normalisation cannot train on one.
    joined = module(n=85).client(0).train_loader(0)
    assert [len(y) for _, y in joined] == [8, 9] and len(joined) == 2
    single = module(n=5).client(0).train_loader(0)
    assert [len(y) for _, y in single] == [1] and len(single) == 1
    assert len(rows(module(n=85, drop_last=True).client(0).train_loader(0))) == 16
    assert [len(y) for _, y in module(test=numbered(17), test_batch_size=8).val_dataloader()] == [8, 8, 1]
    dropping = module(n=50, drop_last=True).client(0).train_loader(0)
    assert [len(y) for _, y in dropping] == [8] and len(dropping) == 1
    small = module(n=15, drop_last=True).client(0).train_loader(0)  # 3 rows, less than a batch
    assert [len(y) for _, y in small] == [3] and len(small) == 1


def test_validation_rows_are_each_clients_own_and_stratified() -> None:
    data, whole = module(val_fraction=0.25), module()
    for k in range(5):
        client = data.client(k)
        val = client.val_loader()
        assert val is not None and client.num_examples == 30
        mine, kept = rows(client.train_loader(0)), rows(val)
        assert len(kept) == 10 and sorted(mine + kept) == sorted(rows(whole.client(k).train_loader(0)))
        assert rows(val) == kept == sorted(kept)
    lone = module(n=5, clients=5, val_fraction=0.9).client(0)
    assert lone.num_examples == 1 and lone.val_loader() is None


def test_augmentation_is_seeded_by_epoch_and_only_in_training() -> None:
    def noise(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return x + torch.rand(x.shape, generator=generator)

    data = module(augment=noise, val_fraction=0.2)
    loader = data.client(0).train_loader(3)
    first = [torch.cat([x for x, _ in loader]) for _ in range(2)]
    again = data.client(0).train_loader(3)
    assert torch.equal(first[0], torch.cat([x for x, _ in again]))
    assert not torch.equal(first[0].frac().sort(0).values, first[1].frac().sort(0).values)
    val = data.client(0).val_loader()
    assert val is not None and all(float(x.frac().sum()) == 0 for x, _ in [*val, *data.val_dataloader()])


def test_crop_and_flip_move_pixels_and_make_none_up() -> None:
    x = torch.arange(1.0, 17).view(1, 1, 4, 4).repeat(64, 1, 1, 1)
    out = CropFlip(padding=1)(x, torch.Generator().manual_seed(0))
    assert out.shape == x.shape
    padded = torch.nn.functional.pad(x[0, 0], (1, 1, 1, 1))
    windows = [padded[i : i + 4, j : j + 4] for i in range(3) for j in range(3)]
    windows += [w.flip(1) for w in windows]
    found = {next(i for i, w in enumerate(windows) if torch.equal(w, o)) for o in out[:, 0]}
    assert len(found) > 12 and min(found) < 9 <= max(found)
    assert torch.equal(CropFlip(0, flip=False)(x, torch.Generator()), x)
    with pytest.raises(ValueError, match="`padding`"):
        CropFlip(-1)


# ----------------------------------------------- public, test, fractions, hash


def test_public_rows_are_stratified_disjoint_and_their_labels_hidden() -> None:
    data = module(public=40)
    public = data.public_set
    assert isinstance(public, PublicSet) and len(public) == 40 and public.labels is None
    theirs = [int(v) for v in public.inputs.flatten()]
    assert np.bincount(np.array(theirs) % 4).tolist() == pytest.approx([10] * 4, abs=1)
    clients = [r for k in range(5) for r in rows(data.client(k).train_loader(0))]
    assert sorted(theirs + clients) == list(range(200))
    shown = module(public=40, public_labels=True).public_set
    assert shown is not None and shown.labels is not None
    assert torch.equal(shown.labels, shown.inputs.flatten().long() % 4)
    assert module().public_set is None


def test_a_fraction_is_stratified_and_public_rows_come_from_what_it_leaves() -> None:
    plain = module(train_fraction=0.25)
    with_public = module(train_fraction=0.25, public=60)
    mine = [rows(plain.client(k).train_loader(0)) for k in range(5)]
    assert mine == [rows(with_public.client(k).train_loader(0)) for k in range(5)]
    assert sum(map(len, mine)) == 50 and plain.label_counts().sum(0).tolist() == pytest.approx([12.5] * 4, abs=1)
    public = with_public.public_set
    assert public is not None and not set(sum(mine, [])) & {int(v) for v in public.inputs.flatten()}
    # Where the rows do not last, clients get the rest.
    assert int(module(train_fraction=0.9, public=60).label_counts().sum()) == 140


def test_a_public_set_of_its_own() -> None:
    inputs = torch.rand(7, 1)
    for given in (inputs, (inputs, torch.zeros(7, dtype=torch.long)), TensorDataset(inputs, torch.zeros(7).long())):
        data = module(public=given)
        assert data.public_set is not None and torch.equal(data.public_set.inputs, inputs)
        assert int(data.label_counts().sum()) == 200
    with pytest.raises(ValueError, match="`public` to have labels"):
        module(public=inputs, public_labels=True).setup()


def test_the_test_set_whole_limited_or_held_out() -> None:
    assert rows(module().val_dataloader()) == rows(module().test_dataloader()) == list(range(40))
    assert len(module(test_batch_size=16).val_dataloader()) == 3
    some = rows(module(limit_test=12).test_dataloader())
    assert len(some) == 12 and np.bincount(np.array(some) % 4).tolist() == pytest.approx([3] * 4, abs=1)
    held = module(test=0.2, public=20)
    test, public = rows(held.test_dataloader()), held.public_set
    assert public is not None and len(test) == 40
    clients = [r for k in range(5) for r in rows(held.client(k).train_loader(0))]
    assert sorted(test + clients + public.inputs.flatten().int().tolist()) == list(range(200))


def test_images_of_every_set_are_normalised_as_the_training_images_are(tmp_path: Path) -> None:
    from dynfed_lightning.arrays import Arrays

    images, labels = torch.randint(0, 256, (20, 1, 4, 4), dtype=torch.uint8), torch.arange(20) % 2
    train = Arrays(images, labels, 2, mean=(0.25,), std=(0.5,))
    data = FederatedDataModule(train, IID(2), test=(images, labels), public=(images, labels))
    expected = (images.double() / 255 - 0.25) / 0.5
    assert data.public_set is not None
    torch.testing.assert_close(data.public_set.inputs.double(), expected, atol=1e-6, rtol=0)
    (batch,) = data.test_dataloader()
    torch.testing.assert_close(batch[0].double(), expected, atol=1e-6, rtol=0)


def test_the_split_hash_tells_splits_apart() -> None:
    base = module(public=10).split_hash
    assert len(base) == 64 and base == module(public=10).split_hash
    x, y = numbered()
    flipped = FederatedDataModule((x, 3 - y), IID(5), test=numbered(40), public=10)
    others = [
        module(public=10, seed=1),
        module(public=11),
        module(public=10, partitioner=Dirichlet(5, 1)),
        module(public=10, val_fraction=0.1),
        module(public=10, limit_test=10),
        flipped,
    ]
    assert len({base, *(o.split_hash for o in others)}) == 7
    assert base == module(public=10, batch_size=3, clients_per_round=2).split_hash


def test_pooled_is_one_client_with_all_rows_and_leaves_the_original() -> None:
    data = module(val_fraction=0.25, clients_per_round=2, public=20)
    one = data.pooled()
    assert (one.num_clients, data.num_clients) == (1, 5)
    assert one.client(0).num_examples == sum(data.client(k).num_examples for k in range(5))
    kept = one.client(0).val_loader()
    assert kept is not None
    assert sorted(rows(kept)) == sorted(r for k in range(5) for r in rows(data.client(k).val_loader()))
    assert one.sample_cohort(4) == [0] and one.public_set is data.public_set
    data.pool()
    data.pool()
    assert data.num_clients == 1 and list(data.train_dataloader()) == [[0]]


def test_natural_clients() -> None:
    writers = [{"x": torch.tensor([float(i)]), "label": i % 2, "writer": "cab"[i % 3]} for i in range(12)]
    data = FederatedDataModule(Records(writers), Natural(), test=0.25, partition_column="writer")
    assert data.num_clients == 3
    for k, writer in enumerate("abc"):
        (batch,) = data.client(k).train_loader(0)
        assert set(batch["writer"]) == {writer}


def test_resources_follow_seed_and_client() -> None:
    data = module(resources=DrawnResources(), seed=4)
    assert data.resources(2) == DrawnResources()(2, 4) != data.resources(3)
    assert module().resources(0) == Resources()


# ------------------------------------------------------------ other datasets


class Pairs(Dataset):
    """Samples ``(x, y)`` read one by one."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Any:
        return torch.tensor([float(i)]), i % 3


class Records(Dataset):
    def __init__(self, records: list[dict[str, Any]]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.records[i]


def test_user_datasets_give_the_batches_a_dataloader_would() -> None:
    data = FederatedDataModule(Pairs(60), IID(4), test=Pairs(9), batch_size=4, public=12)
    assert data.num_classes == 3 and data.public_set is not None and data.public_set.inputs.shape == (12, 1)
    loader = data.client(1).train_loader(5)
    first, second = rows(loader), rows(loader)
    assert len(loader) == 3 and len(first) == 12 and first != second and sorted(first) == sorted(second)
    assert first == rows(data.client(1).train_loader(5))
    assert rows(data.test_dataloader()) == list(range(9))


def test_dict_samples_give_dict_batches() -> None:
    samples = [{"ids": torch.tensor([i, i + 1]), "label": i % 2} for i in range(20)]
    data = FederatedDataModule(Records(samples), IID(2), test=Records(samples[:5]), public=6, batch_size=16)
    (batch,) = data.client(0).train_loader(0)
    assert set(batch) == {"ids", "label"} and batch["ids"].shape == (7, 2)
    assert torch.equal(batch["label"], batch["ids"][:, 0] % 2)
    public = data.public_set
    assert public is not None and len(public) == 6 and set(public.inputs) == {"ids"}


# --------------------------------------------------------- cohorts and Lightning


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

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, list[int]]] = []
        self.tested, self.fail_at = 0, fail_at

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def training_step(self, batch: list[int], batch_idx: int) -> None:
        assert type(batch) is list and all(type(k) is int for k in batch)
        if self.current_epoch == self.fail_at:
            raise KeyboardInterrupt
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


# -------------------------------------------------------- for a person, errors


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
