"""unpack_dequantize: ``value[i] = level[i] * scale[i // bucket]``."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import bucket_of, four_codes, levels_of
from .launch import launch
from .tiles import joined_length, record, tiles_of

TILE = 4096  # values a program: 32 a thread at 4 warps, so that index arithmetic is spread over many


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
    codes = four_codes(packed, byte, left, bits, BITS, TABLE, WORDS, TILE)
    h = tl.arange(0, TILE // 4)
    s = tl.load(scales + scale + bucket_of(h, within, quarter), mask=4 * h < left)
    values = levels_of(codes, bits) * s[:, None]
    i = 4 * h[:, None] + tl.arange(0, 4)[None, :]
    if left >= TILE:
        tl.store(out + start + i, values)
    else:
        tl.store(out + start + i, values, mask=i < left)


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
    torch._foreach_copy_(list(out), list(flat.split([t.numel() for t in out])))


def _fill(packed: Tensor, scales: Tensor, table: Tensor, flat: Tensor, join: bool) -> None:
    words = packed.data_ptr() % 4 == 0
    for group in tiles_of(table, TILE, flat, packed, scales, join):
        args = packed, scales, flat, group.records, 0, 0, 0
        launch(unpack_dequantize_kernel, group.count, flat, *args, True, words, group.aligned, TILE)
