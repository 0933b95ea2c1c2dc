"""unpack: ``code[i] = (stream >> (i * bits)) & (2**bits - 1)``, the stream read least significant bit first."""

import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import four_codes
from .launch import launch

TILE = 4096  # codes a program: 32 a thread at 4 warps, so that index arithmetic is spread over many


@triton.jit(do_not_specialize=["n"])
def unpack_kernel(packed, out, n, BITS: tl.constexpr, WORDS: tl.constexpr, TILE: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * TILE
    left = n.to(tl.int64) - start
    codes = four_codes(packed, start * BITS // 8, left, BITS, BITS, False, WORDS, TILE).to(tl.uint8)
    i = 4 * tl.arange(0, TILE // 4)[:, None] + tl.arange(0, 4)[None, :]
    if left >= TILE:
        tl.store(out + start + i, codes)
    else:
        tl.store(out + start + i, codes, mask=i < left)


def unpack(packed: Tensor, bits: int, out: Tensor) -> None:
    """uint8 [ceil(n * bits / 8)] -> uint8 codes [n], written to `out`."""
    n = out.numel()
    launch(unpack_kernel, triton.cdiv(n, TILE), out, packed, out, n, bits, packed.data_ptr() % 4 == 0, TILE)
