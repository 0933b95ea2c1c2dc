"""pack: ``stream |= (code[i] & (2**bits - 1)) << (i * bits)``, the stream written least significant bit first."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import pack_half, store_groups
from .launch import capturing, launch

TILE = 4096  # values a program: 32 a thread, which share the addresses' arithmetic


@triton.jit(do_not_specialize=["n"])
def pack_kernel(codes, packed, too_large, n, BITS: tl.constexpr, WORDS: tl.constexpr, TILE: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * TILE
    left = n.to(tl.int64) - start
    count = tl.minimum(left, TILE).to(tl.int32)
    whole = left >= TILE
    codes += start
    group = tl.arange(0, TILE // 8)[None, :, None]
    i = 8 * group + tl.arange(0, 4)[None, None, :]
    if whole:
        a = tl.load(codes + i)
        b = tl.load(codes + i + 4)
    else:
        a = tl.load(codes + i, mask=i < count, other=0)
        b = tl.load(codes + i + 4, mask=i + 4 < count, other=0)
    a = a.to(tl.int32)
    b = b.to(tl.int32)
    if BITS < 8:
        largest = tl.max(tl.maximum(a, b))
        if largest >= 1 << BITS:  # an atomic for every tile would queue all of them at one address
            tl.atomic_max(too_large, largest)
    low = pack_half(a & ((1 << BITS) - 1), BITS)
    high = pack_half(b & ((1 << BITS) - 1), BITS)
    store_groups(packed + start * BITS // 8, group, group >= 0, low, high, count, whole, BITS, WORDS)


def pack(codes: Tensor, bits: int, out: Tensor) -> int | None:
    """uint8 codes [n] -> uint8 [ceil(n * bits / 8)], written to `out`; only the low `bits` bits of a code get through.

    Returns:
        The largest code if it is ``2**bits`` or more, else 0. Reading it waits for the device; None while a CUDA graph is
        captured, where nothing may wait.
    """
    n = codes.numel()
    too_large = torch.zeros(1, dtype=torch.int32, device=codes.device)
    launch(pack_kernel, triton.cdiv(n, TILE), out, codes, out, too_large, n, bits, out.data_ptr() % bits == 0, TILE)
    return None if capturing(codes) else int(too_large)
