"""unpack_dequantize: ``value[i] = level[i] * scale[i // bucket]``."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import AHEAD, bucket_of, four_codes, levels_of
from .launch import launch
from .tiles import joined_length, record, tiles_of

TILE = 4096  # values a program: 32 a thread, which share the addresses' arithmetic


@triton.jit
def _tile(
    packed, scales, out, bucket, byte, left, bits,
    BITS: tl.constexpr, TABLE: tl.constexpr, WORDS: tl.constexpr, INSIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One tile; INSIDE, at least `AHEAD` more values follow it, and nothing needs a mask."""
    codes = four_codes(packed, byte, left, bits, BITS, TABLE, WORDS and INSIDE, TILE)
    h = tl.arange(0, TILE // 4)
    i = 4 * h[:, None] + tl.arange(0, 4)[None, :]
    if INSIDE:
        tl.store(out + i, levels_of(codes, bits) * tl.load(scales + bucket)[:, None])
    else:
        s = tl.load(scales + bucket, mask=4 * h < left, other=0.0)
        tl.store(out + i, levels_of(codes, bits) * s[:, None], mask=i < left)


@triton.jit(do_not_specialize=["n"])
def unpack_dequantize_kernel(
    packed, scales, out, tiles, n,
    BITS: tl.constexpr, BUCKET: tl.constexpr, TABLE: tl.constexpr, WORDS: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    start, left, bits, quarter, _, byte, scale, within = record(tiles, n, BITS, BUCKET, TABLE, TILE)
    if TABLE and ALIGNED:
        start = tl.multiple_of(start, 4)
    if BITS != 0:
        bits = BITS
    if BUCKET != 0:
        quarter = BUCKET // 4
    bucket = bucket_of(tl.arange(0, TILE // 4), within, quarter)
    if left >= TILE + AHEAD:
        _tile(packed, scales + scale, out + start, bucket, byte, left, bits, BITS, TABLE, WORDS, True, TILE)
    else:
        _tile(packed, scales + scale, out + start, bucket, byte, left, bits, BITS, TABLE, WORDS, False, TILE)


def unpack_dequantize(packed: Tensor, scales: Tensor, bits: int, bucket: int, out: Tensor) -> None:
    """Packed uint8 [ceil(n * bits / 8)] and scales float32 [ceil(n / bucket)] -> float32 [n], written to `out`."""
    n = out.numel()
    words = packed.data_ptr() % 4 == 0
    grid = triton.cdiv(n, TILE)
    launch(unpack_dequantize_kernel, grid, out, packed, scales, out, None, n, bits, bucket, False, words, True, TILE)


def unpack_dequantize_table(packed: Tensor, scales: Tensor, table: Tensor, out: Sequence[Tensor]) -> None:
    """`unpack_dequantize` of every row: one launch for the rows that begin at 16-byte boundaries, one for the others.

    A list of tensors is filled through one flat vector and copies: twice the memory traffic of a flat `out`.
    """
    if len(out) == 1:
        _fill(packed, scales, table, out[0], False)
        return
    flat = packed.new_empty(joined_length(table, out), dtype=torch.float32)
    _fill(packed, scales, table, flat, True)
    torch._foreach_copy_([t.view(-1) for t in out], list(flat.split([t.numel() for t in out])))


def _fill(packed: Tensor, scales: Tensor, table: Tensor, flat: Tensor, join: bool) -> None:
    words = packed.data_ptr() % 4 == 0
    for group in tiles_of(table, TILE, flat, packed, scales, join):
        args = packed, scales, flat, group.records, 0, 0, 0
        launch(unpack_dequantize_kernel, group.programs, flat, *args, True, words, group.aligned, TILE)
