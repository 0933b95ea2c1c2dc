"""unpack: ``code[i] = (stream >> (i * bits)) & (2**bits - 1)``, the stream read least significant bit first."""

import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import AHEAD, four_codes
from .launch import launch

TILE = 4096  # values a program: 32 a thread, which share the addresses' arithmetic


@triton.jit(do_not_specialize=["n"])
def unpack_kernel(packed, out, n, BITS: tl.constexpr, WORDS: tl.constexpr, TILE: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * TILE
    left = n.to(tl.int64) - start
    i = 4 * tl.arange(0, TILE // 4)[:, None] + tl.arange(0, 4)[None, :]
    if left >= TILE + AHEAD:
        codes = four_codes(packed, start * BITS // 8, left, BITS, BITS, False, WORDS, TILE)
        tl.store(out + start + i, codes.to(tl.uint8))
    else:
        codes = four_codes(packed, start * BITS // 8, left, BITS, BITS, False, False, TILE)
        tl.store(out + start + i, codes.to(tl.uint8), mask=i < left)


def unpack(packed: Tensor, bits: int, out: Tensor) -> None:
    """uint8 [ceil(n * bits / 8)] -> uint8 codes [n], written to `out`."""
    n = out.numel()
    launch(unpack_kernel, triton.cdiv(n, TILE), out, packed, out, n, bits, packed.data_ptr() % 4 == 0, TILE)
