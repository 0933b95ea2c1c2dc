"""rotate: ``H D x / sqrt(B)`` for each block of B values, in place; the inverse is ``D H x / sqrt(B)``.

D flips signs at random, H is the Hadamard matrix: log2(B) rounds, in each of which all pairs (a, b) at a distance of 1, 2, 4, ..
values become (a + b, a - b). A program rotates as many blocks as fill a tile, in registers and shared memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import philox
from .launch import halves, launch
from .tiles import Column, Group, check, cut, kept, record

TILE = 4096  # values a program, or one block if that is larger
VALUES = 16  # a thread: with 32, triton 3.6 needs up to 255 registers and spills
BLOCKS, TAIL = 1, 2  # the two passes over a row, told apart in the Philox counter; rounding uses 0


@triton.jit
def _flip(y, first, seed_low, seed_high, PASS: tl.constexpr, TILE: tl.constexpr):
    """Flip signs by one random bit a value: a Philox block, of which `first` is the tile's first one, serves 128."""
    a, b, c, d = philox(seed_low, seed_high, first + tl.arange(0, TILE // 128), PASS)
    word = (tl.arange(0, 128) >> 5)[None, :]
    bits = tl.where(word < 2, tl.where(word == 0, a[:, None], b[:, None]), tl.where(word == 2, c[:, None], d[:, None]))
    bits = bits >> (tl.arange(0, 128) & 31)[None, :].to(tl.uint32)
    signs = tl.reshape(bits << 31, [TILE])  # only the sign bit is left: `-x` would turn 0 into 0, not into -0
    return (y.to(tl.uint32, bitcast=True) ^ signs).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def rotate_kernel(
    x, tiles, seed_low, seed_high, factor,
    PASS: tl.constexpr, LOG: tl.constexpr, INVERSE: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    start, left, _, _, at, first, _, _ = record(tiles, 0, 0, 0, True, TILE)
    if ALIGNED:
        start = tl.multiple_of(start, 4)
    i = tl.arange(0, TILE)
    if left >= TILE:
        y = tl.load(x + start + i)
    else:
        y = tl.load(x + start + i, mask=i < left, other=0.0)
    if not INVERSE:
        y = _flip(y, first + (at >> 7), seed_low, seed_high, PASS, TILE)
    for k in tl.static_range(LOG):
        pairs = tl.permute(tl.reshape(y, [TILE >> (k + 1), 2, 1 << k]), [0, 2, 1])
        p, q = tl.split(pairs)
        y = tl.reshape(tl.permute(tl.join(p + q, p - q), [0, 2, 1]), [TILE])
    y = y * factor
    if INVERSE:
        y = _flip(y, first + (at >> 7), seed_low, seed_high, PASS, TILE)
    if left >= TILE:
        tl.store(x + start + i, y)
    else:
        tl.store(x + start + i, y, mask=i < left)


def _pieces(table: Tensor, size_of_x: int, block: int) -> list[tuple[int, int, Tensor]]:
    """(pass, block size, rows) of all launches of the forward direction: whole blocks of all rows first, then the tails.

    The rows hold what `rotate_kernel` reads: the offset counts the values of a pass, the bytes' place is the first Philox block.
    """
    rows = table.clone()
    rows[:, Column.PACKED] = rows[:, Column.OFFSET] >> 3
    rows[:, [Column.BITS, Column.OFFSET, Column.SCALES]] = torch.tensor([1, 0, 0])
    rows[:, Column.BUCKET] = 8
    check(rows, size_of_x, 2**63 - 1, 2**63 - 1)
    rows = rows[rows[:, Column.LENGTH] > 0]
    rows[:, Column.BITS] = 0  # the first Philox block does not move with the tiles
    lengths = rows[:, Column.LENGTH].tolist()
    sizes = torch.tensor([min(block, 1 << (n.bit_length() - 1)) for n in lengths], dtype=torch.int64)
    pieces = []
    for which in (BLOCKS, TAIL):
        for size in sizes.unique().tolist():
            chosen = rows[sizes == size].clone()
            tail = chosen[:, Column.LENGTH] % size
            if which == TAIL:
                chosen[:, Column.START] += chosen[:, Column.LENGTH] - size
                chosen[:, Column.LENGTH] = size
                chosen = chosen[tail > 0]
            else:
                chosen[:, Column.LENGTH] -= tail
            pieces.append((which, size, chosen))
    return pieces


def rotate(x: Tensor, table: Tensor, block: int, seed: int, inverse: bool) -> None:
    """Rotate each row's piece of the flat float32 vector `x` in place, in blocks of at most `block` values, a power of two.

    One launch for each block size and alignment that occurs, and as many again for what whole blocks leave over.
    """

    def make() -> list[tuple[int, int, Group]]:
        launches = []
        for which, size, rows in _pieces(table, x.numel(), block):
            straight = rows[:, Column.START] % 4 == 0
            for aligned in (True, False):
                records = cut(rows[straight == aligned], max(size, TILE))
                if len(records):
                    launches.append((which, size, Group(0, 0, aligned, len(records), records.to(x.device))))
        return launches

    launches = kept(table, ("rotate", x.numel(), x.device, block), make)
    for which, size, group in reversed(launches) if inverse else launches:
        tile = max(size, TILE)
        launch(
            rotate_kernel, group.programs, x, x, group.records, *halves(seed), size**-0.5,
            which, size.bit_length() - 1, bool(inverse), group.aligned, tile, num_warps=tile // VALUES // 32,
        )  # fmt: skip
