"""Partitioners: every row once, the seed decides, and each does what its paper says."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynfed_lightning import FederatedDataModule
from dynfed_lightning.partition import (
    IID,
    Dirichlet,
    Natural,
    Partitioner,
    Pathological,
    Shards,
    stratified_order,
)


def every_row_once(parts: list[torch.Tensor], rows: int) -> bool:
    return torch.equal(torch.cat(parts).sort().values, torch.arange(rows))


def ten_classes(each: int = 60) -> torch.Tensor:
    return torch.arange(10).repeat(each)


@st.composite
def deals(draw: st.DrawFn) -> tuple[Partitioner, list[int], int]:
    labels = draw(st.lists(st.integers(0, 6), min_size=1, max_size=80))
    clients = draw(st.integers(1, len(labels)))
    classes = len(set(labels))
    kind = draw(st.sampled_from(["iid", "dirichlet", "shards", "pathological", "natural"]))
    if kind == "iid":
        made: Partitioner = IID(clients)
    elif kind == "dirichlet":
        least = draw(st.integers(1, len(labels) // clients))
        made = Dirichlet(clients, draw(st.sampled_from([1e-300, 1e-3, 0.1, 1, 1e6])), least, draw(st.booleans()))
    elif kind == "shards":
        made = Shards(clients, draw(st.integers(1, len(labels) // clients)))
    elif kind == "pathological":
        made = Pathological(clients, draw(st.integers(-(-classes // clients), classes)))
    else:
        made = Natural(draw(st.none() | st.integers(1, classes)))
    return made, labels, draw(st.integers(-(2**70), 2**70))


@settings(max_examples=300, deadline=None)
@given(deals())
def test_every_row_is_used_once_and_the_seed_decides(deal: tuple[Partitioner, list[int], int]) -> None:
    partitioner, labels, seed = deal
    y = torch.tensor(labels)
    try:
        parts = partitioner(y, seed)
    except ValueError as error:
        # Only a few rows of few classes can leave a client with nothing, and only by classes.
        assert isinstance(partitioner, Pathological)
        assert "at least one row" in str(error)
        return
    assert every_row_once(parts, len(labels))
    assert all(len(p) and p.dtype == torch.int64 and bool((p.diff() > 0).all()) for p in parts)
    assert partitioner.num_clients in (None, len(parts))
    assert len(parts) == (partitioner.num_clients or len(set(labels)))
    if isinstance(partitioner, Dirichlet):
        assert min(map(len, parts)) >= partitioner.min_rows
    again = partitioner(np.array(labels), seed)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


@pytest.mark.parametrize("made", [IID(7), Dirichlet(7, 0.3), Shards(7, 3), Pathological(7, 3)], ids=repr)
def test_other_seeds_deal_otherwise_and_global_generators_stay(made: Partitioner) -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # type: ignore[index]
    first, second = made(ten_classes(), 0), made(ten_classes(), 1)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before  # type: ignore[index]
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_iid_sizes_differ_by_one_at_most() -> None:
    assert sorted(len(p) for p in IID(7)(ten_classes(), 3)) == [85, 85, 86, 86, 86, 86, 86]


def test_dirichlet_proportions_have_the_moments_of_the_distribution() -> None:
    # A component of Dir(alpha 1_N) has mean 1/N and variance (1/N)(1 - 1/N)/(N alpha + 1).
    n, alpha = 5, 0.5
    y = torch.arange(100).repeat_interleave(200)
    counts = torch.stack([torch.bincount(y[p], minlength=100) for p in Dirichlet(n, alpha)(y, 0)]) / 200.0
    assert counts.sum(0) == pytest.approx(np.ones(100))
    variance = float(((counts - 1 / n) ** 2).mean())
    assert variance == pytest.approx(0.2 * 0.8 / (n * alpha + 1), rel=0.12)
    assert float(counts.mean(1).max()) < 0.3


def test_dirichlet_alpha_goes_from_one_owner_a_class_to_even() -> None:
    y = ten_classes(100)
    skewed = torch.stack([torch.bincount(y[p], minlength=10) for p in Dirichlet(5, 1e-4)(y, 0)])
    even = torch.stack([torch.bincount(y[p], minlength=10) for p in Dirichlet(5, 1e6)(y, 0)])
    assert int((skewed.max(0).values >= 95).sum()) >= 9
    assert int((even - 20).abs().max()) <= 1


def test_dirichlet_fills_up_to_min_rows_even_if_no_draw_does() -> None:
    # One class and a tiny alpha: every draw gives all to one client, so rows have to be moved.
    parts = Dirichlet(6, 1e-6, min_rows=4)(torch.zeros(30, dtype=torch.long), 0)
    assert sorted(map(len, parts)) == [4, 4, 4, 4, 4, 10]
    assert every_row_once(parts, 30)


def test_a_draw_that_satisfies_min_rows_is_kept() -> None:
    few, more = (Dirichlet(5, 10, min_rows=m)(ten_classes(), 3) for m in (1, 60))
    assert min(map(len, few)) >= 60 and all(torch.equal(a, b) for a, b in zip(few, more, strict=True))


def test_balanced_dirichlet_evens_out_sizes() -> None:
    def spread(balanced: bool) -> float:
        sizes = [[len(p) for p in Dirichlet(10, 0.1, balanced=balanced)(ten_classes(), s)] for s in range(5)]
        return float(np.std(sizes, axis=1).mean())

    assert spread(True) < 0.75 * spread(False)


def test_shards_give_few_classes_and_equal_sizes() -> None:
    y = ten_classes(60)
    parts = Shards(30, 2)(y, 0)  # 60 shards of 10 rows: a class has 6 shards
    assert [len(p) for p in parts] == [20] * 30
    assert max(len(y[p].unique()) for p in parts) == 2


def test_pathological_gives_exactly_that_many_classes_and_shares_them_evenly() -> None:
    y = ten_classes(100)
    parts = Pathological(50, 4)(y, 5)
    counts = torch.stack([torch.bincount(y[p], minlength=10) for p in parts])
    assert (counts > 0).sum(1).tolist() == [4] * 50
    assert (counts > 0).sum(0).tolist() == [20] * 10  # 200 places for 10 classes
    assert counts.unique().tolist() == [0, 5]
    assert len({tuple(c.nonzero().flatten().tolist()) for c in counts}) > 20  # not the same few sets over and over


def test_pathological_on_a_share_of_the_data() -> None:
    """QuPeD's setting on 10,000 of CIFAR-10's 50,000 images: ``train_fraction=0.2``, 20 clients, 4 classes each."""
    y = torch.arange(50_000) % 10
    test = (torch.zeros(20, 1), torch.arange(20) % 10)
    data = FederatedDataModule((torch.zeros(50_000, 1), y), Pathological(20, 4), test=test, train_fraction=0.2, seed=1)
    counts = data.label_counts()
    assert int(counts.sum()) == 10_000
    assert (counts > 0).sum(1).tolist() == [4] * 20
    assert (counts > 0).sum(0).tolist() == [8] * 10
    assert (
        counts.sum(1).min() >= 498 and counts.sum(1).max() <= 502
    )  # a class has 1000 of the 10,000 rows, give or take one
    again = FederatedDataModule((torch.zeros(50_000, 1), y), Pathological(20, 4), test=test, train_fraction=0.2, seed=2)
    assert not torch.equal((again.label_counts() > 0), counts > 0)
    groups, shares = data.own_test().shares(3)
    assert groups.tolist() == counts[3].nonzero().flatten().tolist()
    assert torch.allclose(shares, torch.full((4,), 0.25, dtype=torch.float64), atol=2e-3)


def test_natural_is_one_client_a_value_in_sorted_order() -> None:
    parts = Natural()(torch.tensor([30, 10, 20, 10, 30, 30]))
    assert [p.tolist() for p in parts] == [[1, 3], [2], [0, 4, 5]]


def test_natural_merges_whole_groups() -> None:
    groups = torch.tensor([0] * 5 + [1] * 4 + [2] * 3 + [3] * 3)
    parts = Natural(2)(groups)
    # Largest first to the emptiest client: 5 | 4, then 3 to the second, then 3 to the first.
    assert [groups[p].unique().tolist() for p in parts] == [[0, 3], [1, 2]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IID(0), "`num_clients` to be an integer of at least 1, but got 0"),
        (lambda: IID(True), "`num_clients`"),
        (lambda: IID(2.0), "`num_clients`"),  # type: ignore[arg-type]
        (lambda: Dirichlet(3, 0), "`alpha` to be a finite number above 0, but got 0"),
        (lambda: Dirichlet(3, float("nan")), "`alpha`"),
        (lambda: Dirichlet(3, 1, min_rows=0), "`min_rows`"),
        (lambda: Shards(3, 0), "`shards_per_client`"),
        (lambda: Pathological(3, -1), "`classes_per_client`"),
        (lambda: Natural(0), "`num_clients`"),
    ],
)
def test_bad_arguments_are_named_when_built(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("made", "labels", "message"),
    [
        (IID(4), torch.arange(3), "`num_clients` to be at most the 3 rows there are, but got 4"),
        (IID(1), torch.empty(0, dtype=torch.long), "at least one row, but it is empty"),
        (IID(1), torch.rand(3), "`labels` to be integers"),
        (IID(1), torch.zeros(3, 1, dtype=torch.long), r"shape \[3, 1\]"),
        (Dirichlet(4, 1, min_rows=3), torch.arange(10), "`min_rows`"),
        (Shards(3, 4), torch.arange(10), "`shards_per_client`"),
        (Pathological(2, 4), torch.arange(3), "`classes_per_client` to be from 2 to 3"),
        (Pathological(2, 1), torch.arange(3), "but got 1"),
        (Pathological(4, 1), torch.tensor([0, 0, 0, 1]), "left 1 of 4 without"),
        (Natural(3), torch.tensor([1, 1, 2]), "at most the 2 values"),
    ],
)
def test_what_cannot_be_dealt_is_an_error(made: Partitioner, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(labels, 0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 60))
def test_a_stratified_order_has_fair_prefixes_and_suffixes(labels: list[int], cut: int) -> None:
    y, cut = np.array(labels), min(cut, len(labels))
    order = stratified_order(y, "test", 0)
    assert sorted(order) == list(range(len(y)))
    for c in set(labels):
        share = cut * (y == c).mean()
        assert abs((y[order[:cut]] == c).sum() - share) <= 3
        assert abs((y[order[len(y) - cut :]] == c).sum() - share) <= 3
    other = stratified_order(np.arange(100) % 3, "test", 1)
    assert (other != stratified_order(np.arange(100) % 3, "test", 0)).any()
