"""A table of tensors, cut into tiles on the host: one record a program, so that a kernel searches nothing."""

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

KEPT = 8  # results kept for a table: an operation needs one, and a table rarely sees more than three operations


class Column(IntEnum):
    """The columns of a table."""

    START = 0
    LENGTH = 1
    BITS = 2
    BUCKET = 3
    OFFSET = 4
    PACKED = 5
    SCALES = 6


class Group(NamedTuple):
    """Tiles that one launch handles."""

    bits: int  # of all rows, 0 where they may differ
    bucket: int  # likewise
    aligned: bool  # every tile begins at a multiple of 4 values (and its codes at one of `bits` bytes, where `bits` is given)
    programs: int
    records: Tensor  # int64 [programs, 8] on the device: what `record` reads


@triton.jit
def record(tiles, n, BITS: tl.constexpr, BUCKET: tl.constexpr, TABLE: tl.constexpr, TILE: tl.constexpr):
    """This program's tile: first value, values left in its row, bits, bucket, global index, first byte, first scale, place in
    the bucket. `bucket` and the place in it count groups of four values (a bucket of 2**31 then fits 32 bits).

    All comes from the program's record, or, without TABLE, is computed for a single row of `n` values that begins at zero.
    """
    program = tl.program_id(0).to(tl.int64)
    if TABLE:
        at = tiles + program * 8
        start = tl.load(at)
        left = tl.load(at + 1)
        bits = tl.load(at + 2).to(tl.int32)
        quarter = tl.load(at + 3).to(tl.int32)
        index = tl.load(at + 4)
        byte = tl.load(at + 5)
        scale = tl.load(at + 6)
        within = tl.load(at + 7).to(tl.int32)
    else:
        start = program * TILE
        left = n.to(tl.int64) - start
        bits = tl.full([], BITS, tl.int32)
        quarter = tl.full([], BUCKET // 4, tl.int32)
        index = start
        byte = start * BITS // 8
        scale = start // BUCKET
        within = (start % BUCKET // 4).to(tl.int32)
    return start, left, bits, quarter, index, byte, scale, within


def cut(rows: Tensor, tile: int) -> Tensor:
    """Records int64 [tiles, 8] of `rows` int64 [T, 7]: each row in pieces of `tile` values, the last one shorter."""
    pieces = (rows[:, Column.LENGTH] + (tile - 1)) // tile
    first = pieces.cumsum(0) - pieces
    row = torch.repeat_interleave(torch.arange(rows.shape[0]), pieces)
    at = (torch.arange(row.numel()) - first[row]) * tile
    start, length, bits, bucket, offset, packed, scales = rows[row].unbind(1)
    return torch.stack(
        (
            start + at,
            length - at,
            bits,
            bucket // 4,
            offset + at,
            packed + at * bits // 8,
            scales + at // bucket,
            at % bucket // 4,
        ),
        dim=1,
    )


def check(table: Tensor, flat: int, packed: int, scales: int) -> None:
    """Refuse a table that reaches outside of a flat vector, or of the arenas, of so many elements.

    Raises:
        ValueError: a row is not what `dynfed_lightning.ops.Layout` makes, or reaches outside.
    """
    start, length, bits, bucket, offset, at_packed, at_scales = table.unbind(1)
    sane = (
        (start >= 0) & (length >= 0) & (length <= flat) & (bits >= 1) & (bits <= 8) & (bucket >= 8) & (bucket % 8 == 0)
    )
    sane &= (bucket <= 1 << 31) & (offset >= 0) & (offset % 8 == 0) & (at_packed >= 0) & (at_scales >= 0)
    # As differences: sums of hostile numbers could wrap around.
    sane &= (start <= flat - length) & (at_packed <= packed - (length * bits + 7) // 8)
    sane &= at_scales <= scales - (length + bucket - 1) // bucket
    if not bool(sane.all()):
        row = int((~sane).nonzero()[0])
        raise ValueError(
            f"Expected the rows of the table to lie within {flat} values, {packed} bytes and {scales} scales, "
            f"but row {row} is {table[row].tolist()}."
        )


_kept: Any = WeakIdKeyDictionary()  # table -> {(version, key): what was made of it}


def kept(table: Tensor, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """``make()``, or what it returned for this very table, unchanged since, and this key: uploading waits for the device, and
    a CUDA graph can capture a launch only after a first, ordinary one. (A graph that is replayed needs its tables alive.)
    """
    entries = _kept.setdefault(table, {})
    key = (table._version, *key)
    if key not in entries:
        if len(entries) >= KEPT:
            entries.pop(next(iter(entries)))
        entries[key] = make()
    return entries[key]


def joined_length(table: Tensor, tensors: Sequence[Tensor]) -> int:
    """The size of a list of tensors, one for each row, put one after the other.

    Raises:
        ValueError: they do not have the lengths of the rows.
    """
    sizes = [t.numel() for t in tensors]
    if sizes != table[:, Column.LENGTH].tolist():
        raise ValueError(f"Expected one tensor for each row of the table, of its length, but got sizes {sizes}.")
    return sum(sizes)


def rows_of(table: Tensor, flat: Tensor, packed: Tensor, scales: Tensor, join: bool) -> Tensor:
    """The checked rows that are not empty; with `join`, as if each began where the one before ends."""
    rows = table
    if join:
        rows = table.clone()
        rows[:, Column.START] = rows[:, Column.LENGTH].cumsum(0) - rows[:, Column.LENGTH]
    check(rows, flat.numel(), packed.numel(), scales.numel())
    return rows[rows[:, Column.LENGTH] > 0]


def tiles_of(table: Tensor, tile: int, flat: Tensor, packed: Tensor, scales: Tensor, join: bool) -> list[Group]:
    """The tiles of all rows, of any width and bucket, in at most two groups: aligned or not."""

    def make() -> list[Group]:
        rows = rows_of(table, flat, packed, scales, join)
        straight = rows[:, Column.START] % 4 == 0
        groups = []
        for aligned in (True, False):
            records = cut(rows[straight == aligned], tile)
            if len(records):
                groups.append(Group(0, 0, aligned, len(records), records.to(flat.device)))
        return groups

    return kept(table, (tile, flat.numel(), packed.numel(), scales.numel(), flat.device, join), make)
