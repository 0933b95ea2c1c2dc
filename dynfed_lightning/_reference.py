"""The low-bit operations in plain vectorised PyTorch: the specification, and the oracle of every other backend.

Every backend must return the same bits as this file, on any machine and for any number of threads or shards. To make that
possible nothing here depends on an order of summation: scales are integer maxima, randomness is a pure function of
(seed, global index), and no floating-point addition follows a product except one fused multiply-add.

Randomness: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Rounding: the unbiased
quantiser of QSGD (Alistarh et al., NeurIPS 2017, eq. 3) with the bucket's absolute maximum for its norm.

All tensors here are flat and contiguous; `dynfed_lightning.ops` has checked every argument.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LOW32 = 0xFFFFFFFF
INFINITY_BITS = 0x7F800000  # the bit pattern of +inf; anything at or above it is inf or NaN
TINY_BITS = 0x0DA24260  # the bit pattern of float32(1e-30): a bucket that nowhere exceeds it counts as zero
CHUNK = 1 << 24  # elements handled at once, so that int64 temporaries stay below about 1 GiB


def philox4x32(seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: ten rounds over the counter words ``c0..c3``.

    Args:
        seed: 64 bits; its low half is the first key word.
        c0, c1, c2, c3: counter words, int64 holding 0..2**32-1, all of one shape.

    Returns:
        Four output words in the same form.
    """
    k0, k1 = seed & LOW32, (seed >> 32) & LOW32
    for _ in range(10):
        # int64 products wrap modulo 2**64, which keeps exactly the 64 bits of the unsigned product.
        pa, pb = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (((pb >> 32) & LOW32) ^ c1 ^ k0), pb & LOW32, (((pa >> 32) & LOW32) ^ c3 ^ k1), pa & LOW32
        k0, k1 = (k0 + 0x9E3779B9) & LOW32, (k1 + 0xBB67AE85) & LOW32
    return c0, c1, c2, c3


def random16(seed: int, start: int, n: int, device: torch.device) -> Tensor:
    """The 16 random bits of the elements with global indices ``start .. start + n - 1``, as int32 [n].

    Eight consecutive elements share one Philox block: element ``i`` takes 16-bit word ``i % 8`` of block ``i // 8``.
    """
    first, last = start >> 3, (start + n + 7) >> 3
    block = torch.arange(first, last, dtype=torch.int64, device=device)
    zero = torch.zeros_like(block)
    words = torch.stack(philox4x32(seed, block & LOW32, (block >> 32) & LOW32, zero, zero), dim=1)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=2).reshape(-1)
    return halves[start - 8 * first :][:n].to(torch.int32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [n] below ``2**bits`` -> uint8 [ceil(n * bits / 8)]: a bitstream, least significant bit first."""
    if bits == 8:
        return codes.clone()
    largest = int(codes.max()) if codes.numel() else 0
    if largest >= 1 << bits:
        raise ValueError(f"Expected `codes` to hold values below 2**bits = {1 << bits}, but got {largest}.")
    stream = (codes[:, None] >> torch.arange(bits, dtype=torch.uint8, device=codes.device)) & 1
    stream = torch.nn.functional.pad(stream.reshape(-1), (0, -codes.numel() * bits % 8)).reshape(-1, 8)
    return (stream << torch.arange(8, dtype=torch.uint8, device=codes.device)).sum(dim=1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack`: uint8 [ceil(n * bits / 8)] -> uint8 codes [n]."""
    stream = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    stream = stream.reshape(-1)[: n * bits].reshape(n, bits)
    return (stream << torch.arange(bits, dtype=torch.uint8, device=packed.device)).sum(dim=1, dtype=torch.uint8)


def quantize_pack(x: Tensor, bits: int, bucket: int, seed: int, offset: int, stochastic: bool) -> tuple[Tensor, Tensor]:
    """Scale, round and pack ``x`` [n]; returns (packed uint8 [ceil(n * bits / 8)], scales float32 [ceil(n / bucket)])."""
    step = max(CHUNK // bucket, 1) * bucket
    parts = [
        _quantize_chunk(x[i : i + step], bits, bucket, seed, offset + i, stochastic) for i in range(0, x.numel(), step)
    ]
    if not parts:
        return x.new_empty(0, dtype=torch.uint8), x.new_empty(0, dtype=torch.float32)
    return torch.cat([p for p, _ in parts]), torch.cat([s for _, s in parts])


def _quantize_chunk(
    x: Tensor, bits: int, bucket: int, seed: int, offset: int, stochastic: bool
) -> tuple[Tensor, Tensor]:
    n = x.numel()
    rows = torch.nn.functional.pad(x.to(torch.float32), (0, -n % bucket)).reshape(-1, bucket)
    magnitude = rows.view(torch.int32) & 0x7FFFFFFF
    largest = magnitude.amax(dim=1)  # for non-negative floats the order of the bit patterns is the order of the values
    amax = largest.view(torch.float32)
    finite, nonzero = largest < INFINITY_BITS, largest > TINY_BITS
    usable = finite & nonzero
    levels = 1 if bits == 1 else (1 << (bits - 1)) - 1
    # Tensor by tensor: torch turns `number / tensor` into a product with the reciprocal, which rounds twice.
    inverse = torch.where(usable, torch.full_like(amax, 65536.0 * levels) / torch.where(usable, amax, 1.0), 0.0)
    # A zero-filled bucket avoids the undefined conversion of NaN to an integer; its scale says that it is not finite.
    scaled = torch.where(finite[:, None], rows, 0.0) * inverse[:, None]
    steps = scaled.to(torch.int32)  # in units of 2**-16 of a level, towards zero
    if bits == 1:
        # One bit: the sign, and the mean magnitude for the scale (an integer sum, so its order does not matter).
        total = steps.abs().sum(dim=1, dtype=torch.int64)
        counts = torch.full_like(amax, float(bucket))
        counts[-1] = n - (rows.shape[0] - 1) * bucket
        scales = (amax * 2.0**-16) * (total.to(torch.float32) / counts)
        codes = ((rows >= 0) | ~finite[:, None]).to(torch.uint8)
    else:
        reciprocal = torch.ones_like(amax) / torch.full_like(amax, float(levels))
        scales = amax * reciprocal
        noise: Tensor | int = 32768
        if stochastic:
            noise = torch.nn.functional.pad(random16(seed, offset, n, x.device), (0, -n % bucket)).reshape(-1, bucket)
        codes = (((steps + noise) >> 16) + (1 << (bits - 1))).to(torch.uint8)
    scales = torch.where(nonzero, scales, 0.0)
    scales = torch.where(finite, scales, float("nan"))
    return pack(codes.reshape(-1)[:n], bits), scales


def _levels(packed: Tensor, bits: int, n: int) -> Tensor:
    """Signed levels, float32 [n]: ``code - 2**(bits-1)``, or -1 and +1 for one bit."""
    codes = unpack(packed, bits, n).to(torch.int32)
    return (2 * codes - 1 if bits == 1 else codes - (1 << (bits - 1))).to(torch.float32)


def unpack_dequantize(packed: Tensor, scales: Tensor, bits: int, bucket: int, n: int) -> Tensor:
    """The values a payload stands for, float32 [n]: level times scale of the bucket."""
    return _levels(packed, bits, n) * scales.repeat_interleave(bucket)[:n]


def accumulate(
    out: Tensor,
    packed: Sequence[Tensor],
    scales: Sequence[Tensor],
    bits: Sequence[int],
    bucket: int,
    weights: Sequence[float],
) -> None:
    """``out[i] = fma(scale * weight, level, out[i])`` in place, client after client in the order given."""
    n = out.numel()
    for p, s, b, w in zip(packed, scales, bits, weights, strict=True):
        factor = s * torch.full_like(s, w)
        out.copy_(fma(factor.repeat_interleave(bucket)[:n], _levels(p, b, n), out))


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c`` of float32 tensors, rounded once.

    The product is exact in float64. The sum is rounded to odd (Boldo and Melquiond, "Emulation of FMA and correctly
    rounded sums", IEEE TC 2008), after which rounding to float32 gives what one rounding of the exact value would.
    """
    product, c64 = a.to(torch.float64) * b.to(torch.float64), c.to(torch.float64)
    total = product + c64
    # Knuth's two-sum: `total + error` is the exact sum.
    back = total - product
    error = (product - (total - back)) + (c64 - back)
    pattern = total.view(torch.int64)
    towards_error = torch.where((error > 0) == (total > 0), 1, -1)
    odd = torch.where((error != 0) & torch.isfinite(total) & (pattern & 1 == 0), pattern + towards_error, pattern)
    return odd.view(torch.float64).to(torch.float32)
