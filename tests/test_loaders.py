"""Clients' batches: seeded by themselves, complete, the same from a bare loop and from a Trainer."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from data_support import Pairs, Records, module, numbered, rows

from dynfed_lightning.data import ClientData, FederatedDataModule
from dynfed_lightning.loaders import CropFlip
from dynfed_lightning.partition import IID, Dirichlet, Pathological
from dynfed_lightning.resources import DrawnResources


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
