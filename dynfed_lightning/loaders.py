"""Rows to batches: what a client iterates over, seeded by itself and never by a global generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dynfed_lightning.arrays import Arrays, Samples, Table, Texts
from dynfed_lightning.partition import torch_generator

# ``augment(inputs, generator) -> inputs``; not typed further, for a configuration may name a class of such objects.
Augment = Callable[..., Any]


class RowLoader:
    """Batches of chosen rows of a table; can be iterated any number of times.

    The k-th iteration of one loader is epoch k (it counts from its first batch on): its order and its augmentation are a
    function of (seed, k) only. It is no ``DataLoader`` on purpose, so that Lightning puts no distributed sampler into it.

    Args:
        table: where the rows are.
        rows: int64 ``[n]``, which rows.
        batch_size: rows a batch; fewer rows than that make one small batch, and a single row left over (when shuffling) joins
            the batch before it.
        seed: shuffle with this seed; ``None``: in the order of `rows`, every epoch.
        drop_last: leave out a last batch that is not full (never the only one).
        augment: ``augment(inputs, generator) -> inputs`` on every normalised batch of an in-memory table (of text: on its dict).
        group_by_length: of text, make batches of rows of about the same length, when shuffling: less padding. The shuffled rows
            are sorted within windows of `WINDOW` batches, and the batches shuffled again.
    """

    WINDOW = 8

    def __init__(
        self,
        table: Table,
        rows: Tensor,
        batch_size: int,
        seed: int | None = None,
        drop_last: bool = False,
        augment: Augment | None = None,
        group_by_length: bool = False,
    ) -> None:
        self.table, self.rows, self.batch_size, self.seed = table, rows, batch_size, seed
        self.group_by_length = group_by_length
        self.augment, self.epoch = augment, 0
        self.drop_last = drop_last and len(rows) >= batch_size

    def __len__(self) -> int:
        full, rest = divmod(len(self.rows), self.batch_size)
        # A single row left over joins the batch before it: batch normalisation cannot train on one.
        return full + (rest > (1 if full and self.seed is not None else 0) and not self.drop_last)

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is epoch `epoch`."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        # A generator: the epoch begins with its first batch. Lightning makes an iterator that it throws away.
        epoch, self.epoch = self.epoch, self.epoch + 1
        generator = torch_generator("shuffle", int(self.seed or 0), epoch)
        rows = self.rows
        count = len(self)
        grouped = self.group_by_length and self.seed is not None and isinstance(self.table, Texts)
        if self.seed is not None:
            rows = rows[torch.randperm(len(rows), generator=generator)]
        if grouped:
            # What `drop_last` leaves out is left out before, or it would always be the longest.
            rows = self._sorted_in_windows(rows[: count * self.batch_size] if self.drop_last else rows)
        batches = [rows[i * self.batch_size : (i + 1) * self.batch_size] for i in range(count)]
        if batches and not self.drop_last:
            batches[-1] = rows[(count - 1) * self.batch_size :]
        if grouped:
            batches = [batches[i] for i in torch.randperm(count, generator=generator).tolist()]
        if isinstance(self.table, Samples):
            # A generator of its own, or torch's DataLoader would take a number from the global one.
            sampler = [b.tolist() for b in batches]
            yield from DataLoader(self.table.dataset, batch_sampler=sampler, generator=generator)
        else:
            yield from self._batches(self.table, batches, generator)

    def _sorted_in_windows(self, rows: Tensor) -> Tensor:
        assert isinstance(self.table, Texts)
        lengths = self.table.offsets.diff()
        windows = rows.split(self.WINDOW * self.batch_size)
        return torch.cat([w[lengths[w].argsort(stable=True)] for w in windows]) if windows else rows

    def _batches(self, table: Arrays | Texts, batches: list[Tensor], generator: torch.Generator) -> Iterator[Any]:
        for batch in batches:
            inputs: Any = table.batch(batch)
            if self.augment is not None:
                inputs = self.augment(inputs, generator)
            labels = table.labels[batch]
            yield {**inputs, "labels": labels} if isinstance(table, Texts) else (inputs, labels)


class Cohorts:
    """One item an epoch: the ids of the clients of that round. `cohort` is asked when the epoch begins, not before.

    A plain iterable, not a ``DataLoader``: Lightning puts no sampler before it (which would duplicate clients across ranks)
    and has nothing to warn about.
    """

    def __init__(self, cohort: Callable[[], list[int]]) -> None:
        self._cohort = cohort

    def __iter__(self) -> Iterator[list[int]]:
        # A generator: nothing runs before the first next(), by when the trainer knows which epoch it is.
        yield self._cohort()

    def __len__(self) -> int:
        return 1


class CropFlip:
    """The usual augmentation of 32x32 images: a random crop after padding, and a random left-right flip, per sample.

    Args:
        padding: pixels of zeros added on every side before the crop, at least 0.
        flip: whether to flip half of the images.
    """

    def __init__(self, padding: int = 4, flip: bool = True) -> None:
        if isinstance(padding, bool) or not isinstance(padding, int) or padding < 0:
            raise ValueError(f"Expected `padding` to be an integer of at least 0, but got {padding!r}.")
        self.padding, self.flip = padding, flip

    def __call__(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Augment a batch.

        Args:
            inputs: float ``[B, C, H, W]``.
            generator: where the random numbers come from.

        Returns:
            A new tensor of the same shape.
        """
        b, _, h, w = inputs.shape
        p = self.padding
        padded = torch.nn.functional.pad(inputs, (p, p, p, p))
        top, left = torch.randint(0, 2 * p + 1, (2, b, 1), generator=generator)
        ys, xs = top + torch.arange(h), left + torch.arange(w)
        if self.flip:
            xs = torch.where(torch.rand(b, 1, generator=generator) < 0.5, xs.flip(1), xs)
        sample = torch.arange(b)[:, None, None]
        return padded.permute(0, 2, 3, 1)[sample, ys[:, :, None], xs[:, None, :]].permute(0, 3, 1, 2).contiguous()
