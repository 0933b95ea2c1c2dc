"""squared_norm: ``out[b] = sum(a[b]**2)`` in float64, in two launches; no atomics, so the order of summation is fixed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

TILE = 4096  # values a program
PARTS = 1024  # sums of tiles that a program takes at once


# Nothing is specialised, as the layout, and with it the order within a tile, would depend on the address. So a lane reads one
# value at a time, neighbouring lanes neighbouring values.
@triton.jit(do_not_specialize=["a", "size", "tiles", "partial"])
def square_tiles_kernel(a, size, tiles, partial, TILE: tl.constexpr):
    program = tl.program_id(0)
    matrix = (program // tiles).to(tl.int64)
    start = (program % tiles).to(tl.int64) * TILE
    left = size.to(tl.int64) - start
    a += matrix * size + start
    i = tl.arange(0, TILE)
    if left >= TILE:
        x = tl.load(a + i)
    else:
        x = tl.load(a + i, mask=i < left, other=0.0)
    x = x.to(tl.float64)
    tl.store(partial + program, tl.sum(x * x))


@triton.jit(do_not_specialize=["partial", "tiles", "out"])
def add_tiles_kernel(partial, tiles, out, PARTS: tl.constexpr):
    program = tl.program_id(0)
    partial += program.to(tl.int64) * tiles
    i = tl.arange(0, PARTS)
    total = tl.zeros([PARTS], tl.float64)
    for start in range(0, tiles, PARTS):
        total += tl.load(partial + start + i, mask=start + i < tiles, other=0.0)
    tl.store(out + program, tl.sum(total))


def squared_norm(a: Tensor, out: Tensor) -> None:
    """Squared Frobenius norms, float64 [B], of float32, float64, bfloat16 or float16 [B, m, n], contiguous."""
    batch, size = a.shape[0], a.shape[1] * a.shape[2]
    if not size:
        out.zero_()
        return
    tiles = triton.cdiv(size, TILE)
    partial = out if tiles == 1 else torch.empty(batch * tiles, dtype=torch.float64, device=a.device)
    launch(square_tiles_kernel, batch * tiles, a, a, size, tiles, partial, TILE)
    if tiles > 1:
        launch(add_tiles_kernel, batch, a, partial, tiles, out, PARTS)
