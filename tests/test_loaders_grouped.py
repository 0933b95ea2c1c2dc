"""Batches of texts of about the same length: every row once an epoch, less padding, and the same for the same seed."""

import pytest
import torch

from dynfed_lightning.arrays import Texts
from dynfed_lightning.loaders import RowLoader


def table(n: int) -> Texts:
    lengths = torch.randint(1, 60, (n,), generator=torch.Generator().manual_seed(0))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    tokens = torch.repeat_interleave(torch.arange(n), lengths).int() + 1  # a row's tokens are its number, from 1
    return Texts(tokens, offsets, torch.zeros(n, dtype=torch.int64), 2, vocab_size=n + 1)


def rows_of(batches: list[dict[str, torch.Tensor]]) -> list[int]:
    return [int(i) - 1 for b in batches for i in b["input_ids"][:, 0]]


@pytest.mark.parametrize("n", [1, 7, 8, 9, 64, 65, 500])
def test_every_row_once_an_epoch(n: int) -> None:
    batches = list(RowLoader(table(n), torch.arange(n), 8, seed=1, group_by_length=True))
    assert sorted(rows_of(batches)) == list(range(n))
    assert len(batches) == len(RowLoader(table(n), torch.arange(n), 8, seed=1))


def test_less_padding_and_batches_still_shuffled() -> None:
    t = table(512)
    plain = list(RowLoader(t, torch.arange(512), 8, seed=1))
    grouped = list(RowLoader(t, torch.arange(512), 8, seed=1, group_by_length=True))
    assert sum(b["input_ids"].numel() for b in grouped) < 0.7 * sum(b["input_ids"].numel() for b in plain)
    widths = [b["input_ids"].shape[1] for b in grouped]
    assert widths != sorted(widths)


def test_a_function_of_seed_and_epoch() -> None:
    t = table(100)
    one, two = (RowLoader(t, torch.arange(100), 8, seed=3, group_by_length=True) for _ in range(2))
    first = rows_of(list(one))
    assert first == rows_of(list(two))
    assert first != rows_of(list(one))  # the next epoch
    other = RowLoader(t, torch.arange(100), 8, seed=4, group_by_length=True)
    assert first != rows_of(list(other))


def test_drop_last_does_not_always_drop_the_longest() -> None:
    t = table(101)
    longest = int(t.offsets.diff().argmax())
    loader = RowLoader(t, torch.arange(101), 8, seed=5, drop_last=True, group_by_length=True)
    seen = [rows_of(list(loader)) for _ in range(20)]
    assert all(len(rows) == 96 for rows in seen)
    assert sum(longest in rows for rows in seen) > 10


def test_without_a_seed_the_order_stays() -> None:
    t = table(20)
    assert rows_of(list(RowLoader(t, torch.arange(20), 8, group_by_length=True))) == list(range(20))
