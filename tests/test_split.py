"""The split: public, test and training rows, fractions of them, pooling, and the hash that tells splits apart."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from data_support import Records, module, numbered, rows
from torch.utils.data import TensorDataset

from dynfed_lightning.arrays import Arrays
from dynfed_lightning.data import FederatedDataModule, PublicSet
from dynfed_lightning.partition import IID, Dirichlet, Natural
from dynfed_lightning.resources import DrawnResources, Resources


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
    assert public is not None and not set(itertools.chain(*mine)) & {int(v) for v in public.inputs.flatten()}
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


def test_images_of_every_set_are_normalised_as_the_training_images_are() -> None:
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
