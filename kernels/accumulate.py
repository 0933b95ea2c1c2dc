"""accumulate: ``out[i] = fma(scale[i // bucket] * weight, level[i], out[i])``, client after client, in one pass over `out`."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import AHEAD, bucket_of, four_codes, levels_of
from .launch import launch
from .tiles import Column, record, tiles_of

TILE = 2048  # values a program, 16 a thread: with 32 and eight clients of different widths, 250 registers and spills were seen
CLIENTS = 8  # a launch: a thread reads the codes of all of them before it uses the first
SAME = [Column.START, Column.LENGTH, Column.BUCKET]  # in the tables of all clients


@triton.jit
def _tile(
    out, packed, scales, weights, tiles, n, widths, bucket, left,
    BITS: tl.constexpr, BUCKET: tl.constexpr, TABLE: tl.constexpr, WORDS: tl.constexpr, INSIDE: tl.constexpr,
    CLIENTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One tile of `out`; INSIDE, at least `AHEAD` more values follow it, and nothing needs a mask."""
    h = tl.arange(0, TILE // 4)
    i = 4 * h[:, None] + tl.arange(0, 4)[None, :]
    if INSIDE:
        total = tl.load(out + i)
    else:
        total = tl.load(out + i, mask=i < left, other=0.0)
    for k in tl.static_range(CLIENTS):
        start, _, bits, _, _, byte, scale, _ = record(tiles[k], n, BITS, BUCKET, TABLE, TILE)
        if BITS != 0:
            bits = BITS
        elif not TABLE:
            bits = ((widths >> (3 * k)) & 7) + 1
            byte = start * bits // 8
        codes = four_codes(packed[k], byte, left, bits, BITS, TABLE, WORDS and INSIDE, TILE)
        if INSIDE:
            s = tl.load(scales[k] + scale + bucket)
        else:
            s = tl.load(scales[k] + scale + bucket, mask=4 * h < left, other=0.0)
        factor = s * tl.cast(weights[k], tl.float32)
        total = tl.fma(tl.broadcast_to(factor[:, None], total.shape), levels_of(codes, bits), total)
    if INSIDE:
        tl.store(out + i, total)
    else:
        tl.store(out + i, total, mask=i < left)


@triton.jit(do_not_specialize=["n", "widths"])
def accumulate_kernel(
    out, packed, scales, weights, tiles, n, widths,
    BITS: tl.constexpr, BUCKET: tl.constexpr, TABLE: tl.constexpr, WORDS: tl.constexpr, ALIGNED: tl.constexpr,
    CLIENTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`packed`, `scales`, `weights`, `tiles` are tuples, an entry a client.

    The widths are BITS for all clients, or in the records of a table, or `bits - 1` in 3 bits of `widths` for each client.
    """
    start, left, _, quarter, _, _, _, within = record(tiles[0], n, BITS, BUCKET, TABLE, TILE)
    if TABLE and ALIGNED:
        start = tl.multiple_of(start, 4)
    if BUCKET != 0:
        quarter = BUCKET // 4
    bucket = bucket_of(tl.arange(0, TILE // 4), within, quarter)
    out += start
    if left >= TILE + AHEAD:
        _tile(
            out,
            packed,
            scales,
            weights,
            tiles,
            n,
            widths,
            bucket,
            left,
            BITS,
            BUCKET,
            TABLE,
            WORDS,
            True,
            CLIENTS,
            TILE,
        )
    else:
        _tile(
            out,
            packed,
            scales,
            weights,
            tiles,
            n,
            widths,
            bucket,
            left,
            BITS,
            BUCKET,
            TABLE,
            WORDS,
            False,
            CLIENTS,
            TILE,
        )


def accumulate(
    out: Tensor, packed: Sequence[Tensor], scales: Sequence[Tensor], bits: Sequence[int], bucket: int, weights: Sequence[float]
) -> None:  # fmt: skip
    """Add each client's payload, packed uint8 [ceil(n * bits / 8)] and scales float32 [ceil(n / bucket)], to `out` float32 [n].

    One launch, and one pass over `out`, for every CLIENTS clients.
    """
    n = out.numel()
    for k in range(0, len(packed), CLIENTS):
        part = slice(k, k + CLIENTS)
        p, b = tuple(packed[part]), list(bits[part])
        width = b[0] if len(set(b)) == 1 else 0
        widths = sum((b[m] - 1) << 3 * m for m in range(len(b))) if width == 0 else 0
        words = all(t.data_ptr() % 4 == 0 for t in p)
        args = out, p, tuple(scales[part]), tuple(weights[part]), (None,) * len(p), n, widths
        launch(accumulate_kernel, triton.cdiv(n, TILE), out, *args, width, bucket, False, words, True, len(p), TILE)


def accumulate_table(
    out: Tensor, packed: Sequence[Tensor], scales: Sequence[Tensor], tables: Sequence[Tensor], weights: Sequence[float]
) -> None:
    """`accumulate` of every row of equally cut vectors: tables agree in where rows begin and end, and in their buckets.

    One launch for the rows that begin at 16-byte boundaries and one for the others, for every CLIENTS clients.
    """
    for other in tables[1:]:
        if not torch.equal(tables[0][:, SAME], other[:, SAME]):
            raise ValueError("Expected tables that agree in the start, length and bucket of every row.")
    for k in range(0, len(packed), CLIENTS):
        part = slice(k, k + CLIENTS)
        p, s, w = tuple(packed[part]), tuple(scales[part]), tuple(weights[part])
        words = all(t.data_ptr() % 4 == 0 for t in p)
        clients = [tiles_of(t, TILE, out, a, b, False) for t, a, b in zip(tables[part], p, s, strict=True)]
        for groups in zip(*clients, strict=True):
            args = out, p, s, w, tuple(group.records for group in groups), 0, 0
            aligned = groups[0].aligned
            launch(accumulate_kernel, groups[0].programs, out, *args, 0, 0, True, words, aligned, len(p), TILE)
