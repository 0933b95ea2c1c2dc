"""The low-bit operations in plain vectorised PyTorch: the specification, and the oracle of every other backend.

Every backend must return the same bits as this file, on any machine and for any number of threads or shards. To make that
possible nothing here depends on an order of summation: scales are integer maxima, randomness is a pure function of
(seed, global index), and no floating-point addition follows a product except one fused multiply-add. The exceptions are
`symmetric_eigh`, `squared_norm` and, of `_reference_soft`, `soft_quantize` with its gradients, which backends must match to a
tolerance that is stated there.

Randomness: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Rounding: the unbiased
quantiser of QSGD (Alistarh et al., NeurIPS 2017, eq. 3) with the bucket's absolute maximum for its norm.

The functions without an underscore that fill tensors they are given are what every backend has (`_ops_backends`). All tensors
are contiguous, and flat but for those in lists; `dynfed_lightning.ops` has checked every argument.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._reference_soft import center_sums as center_sums
from ._reference_soft import nearest_center as nearest_center
from ._reference_soft import prox_centers as prox_centers
from ._reference_soft import prox_weights as prox_weights
from ._reference_soft import soft_quantize as soft_quantize
from ._reference_soft import soft_quantize_backward as soft_quantize_backward

LOW32 = 0xFFFFFFFF
INFINITY_BITS = 0x7F800000  # the bit pattern of +inf; anything at or above it is inf or NaN
TINY_BITS = 0x0DA24260  # the bit pattern of float32(1e-30): a bucket that nowhere exceeds it counts as zero
NEAREST, STOCHASTIC, EDEN = 0, 1, 2  # roundings, as numbers
# The steps, in root mean squares, that make EDEN's error on normally distributed values least, with levels -2**(b-1) to
# 2**(b-1) - 1 (found by search over 4e6 quantiles). The variance of the estimate, relative to ||x||^2, is then 0.176, 0.0424,
# 0.0120, 0.0035, 0.0010, 0.0003, 0.0001 at 2 to 8 bits; at one bit 0.571.
EDEN_STEPS = (0.0, 0.0, 1.0487, 0.6024, 0.3389, 0.1885, 0.1042, 0.0567, 0.0307)
CHUNK = 1 << 24  # elements handled at once (but a whole bucket), so that int64 temporaries stay below about 1 GiB


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


def pack(codes: Tensor, bits: int, out: Tensor) -> int:
    """uint8 codes [n] -> uint8 [ceil(n * bits / 8)]: a bitstream, least significant bit first.

    Returns:
        The bitwise or of all codes: ``2**bits`` or more if one of them is too large, and then `out` is not defined.
    """
    seen = 0
    for i in range(0, codes.numel(), CHUNK):  # CHUNK codes make whole bytes
        part = codes[i : i + CHUNK]
        stream = (part[:, None] >> torch.arange(bits, dtype=torch.uint8, device=part.device)) & 1
        stream = torch.nn.functional.pad(stream.reshape(-1), (0, -part.numel() * bits % 8)).reshape(-1, 8)
        packed = (stream << torch.arange(8, dtype=torch.uint8, device=part.device)).sum(dim=1, dtype=torch.uint8)
        out[i * bits // 8 :][: packed.numel()] = packed
        seen |= int(part.max())  # as a bound: too large a code has a bit that no allowed one has
    return seen


def unpack(packed: Tensor, bits: int, out: Tensor) -> None:
    """The inverse of `pack`: uint8 [ceil(n * bits / 8)] -> uint8 codes [n]."""
    for i in range(0, out.numel(), CHUNK):
        part = out[i : i + CHUNK]
        stream = packed[i * bits // 8 :][: (part.numel() * bits + 7) // 8]
        stream = (stream[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
        stream = stream.reshape(-1)[: part.numel() * bits].reshape(-1, bits)
        weights = torch.arange(bits, dtype=torch.uint8, device=packed.device)
        part.copy_((stream << weights).sum(dim=1, dtype=torch.uint8))


def quantize_pack(
    x: Tensor, bits: int, bucket: int, seed: int, offset: int, rounding: int, packed: Tensor, scales: Tensor
) -> None:
    """Scale, round and pack ``x`` [n] into packed uint8 [ceil(n * bits / 8)] and scales float32 [ceil(n / bucket)]."""
    bucket = min(bucket, -8 * (-max(x.numel(), 1) // 8))  # a bucket may be far larger than the vector
    step = max(CHUNK // bucket, 1) * bucket
    for i in range(0, x.numel(), step):
        part = x[i : i + step]
        codes, part_scales = _quantize_chunk(part, bits, bucket, seed, offset + i, rounding)
        pack(codes, bits, packed[i * bits // 8 :][: (part.numel() * bits + 7) // 8])
        scales[i // bucket :][: part_scales.numel()] = part_scales


def _quantize_chunk(x: Tensor, bits: int, bucket: int, seed: int, offset: int, rounding: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [n] and scales float32 [ceil(n / bucket)]."""
    n = x.numel()
    rows = torch.nn.functional.pad(x.to(torch.float32), (0, -n % bucket)).reshape(-1, bucket)
    counts = torch.full_like(rows[:, 0], float(bucket))
    counts[-1] = n - (rows.shape[0] - 1) * bucket
    magnitude = rows.view(torch.int32) & 0x7FFFFFFF
    largest = magnitude.amax(dim=1)  # for non-negative floats the order of the bit patterns is the order of the values
    amax = largest.view(torch.float32)
    finite, nonzero = largest < INFINITY_BITS, largest > TINY_BITS
    usable = finite & nonzero
    # A zero-filled bucket avoids the undefined conversion of NaN to an integer; its scale says that it is not finite.
    rows = torch.where(finite[:, None], rows, 0.0)
    if rounding == EDEN:
        levels, scales = _eden(rows, counts, amax, usable, bits)
    else:
        noise: Tensor | int = 32768
        if rounding == STOCHASTIC and bits > 1:
            noise = torch.nn.functional.pad(random16(seed, offset, n, x.device), (0, -n % bucket)).reshape(-1, bucket)
        levels, scales = _linear(rows, counts, amax, usable, bits, noise)
    codes = (rows >= 0).to(torch.uint8) if bits == 1 else (levels + (1 << (bits - 1))).to(torch.uint8)
    scales = torch.where(nonzero, scales, 0.0)
    scales = torch.where(finite, scales, float("nan"))
    return codes.reshape(-1)[:n], scales


def _linear(
    rows: Tensor, counts: Tensor, amax: Tensor, usable: Tensor, bits: int, noise: Tensor | int
) -> tuple[Tensor, Tensor]:
    """Levels int32 [buckets, bucket] up to the largest magnitude, and scales: stochastic and nearest rounding."""
    top = 1 if bits == 1 else (1 << (bits - 1)) - 1
    # Tensor by tensor: torch turns `number / tensor` into a product with the reciprocal, which rounds twice.
    inverse = torch.where(usable, torch.full_like(amax, 65536.0 * top) / torch.where(usable, amax, 1.0), 0.0)
    steps = (rows * inverse[:, None]).to(torch.int32)  # in units of 2**-16 of a level, towards zero
    if bits == 1:
        # One bit: the sign, and the mean magnitude for the scale (an integer sum, so its order does not matter).
        total = steps.abs().sum(dim=1, dtype=torch.int64)
        return steps, (amax * 2.0**-16) * (total.to(torch.float32) / counts)
    reciprocal = torch.ones_like(amax) / torch.full_like(amax, float(top))
    return (steps + noise) >> 16, amax * reciprocal


def _eden(rows: Tensor, counts: Tensor, amax: Tensor, usable: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Levels int32 [buckets, bucket] in steps of `EDEN_STEPS` times the root mean square, clamped; and EDEN's scales.

    The scale is ``sum(x * x) / sum(x * level)`` (Vargaftik et al., "EDEN", ICML 2022, section 3.1), from integer sums over
    x in units of ``amax / 2**20``, so that their order does not matter.
    """
    inverse = torch.where(usable, torch.full_like(amax, 2.0**20) / torch.where(usable, amax, 1.0), 0.0)
    units = (rows * inverse[:, None]).to(torch.int32).to(torch.int64)
    energy = (units * units).sum(dim=1).to(torch.float32)
    if bits == 1:
        levels, dot = units, units.abs().sum(dim=1)
    else:
        # In float64 and rounded once: torch's float32 square root on a CPU is not always the nearest.
        rms = torch.sqrt((energy / counts).to(torch.float64)).to(torch.float32)
        step = torch.full_like(amax, EDEN_STEPS[bits]) * rms
        inverse_step = torch.where(usable, torch.full_like(amax, 65536.0) / torch.where(usable, step, 1.0), 0.0)
        steps = (units.to(torch.float32) * inverse_step[:, None]).to(torch.int32)
        top = 1 << (bits - 1)
        levels = ((steps + 32768) >> 16).clamp(-top, top - 1)
        dot = (units * levels).sum(dim=1)
    ratio = energy / torch.where(usable, dot, 1).to(torch.float32)
    return levels.to(torch.int32), (amax * 2.0**-20) * ratio


def _levels(packed: Tensor, bits: int, n: int) -> Tensor:
    """Signed levels, float32 [n]: ``code - 2**(bits-1)``, or -1 and +1 for one bit."""
    codes = packed.new_empty(n)
    unpack(packed, bits, codes)
    signed = codes.to(torch.int32)
    return (2 * signed - 1 if bits == 1 else signed - (1 << (bits - 1))).to(torch.float32)


def unpack_dequantize(packed: Tensor, scales: Tensor, bits: int, bucket: int, out: Tensor) -> None:
    """The values a payload stands for, float32 [n]: level times scale of the bucket."""
    n = out.numel()
    out.copy_(_levels(packed, bits, n) * _by_element(scales, bucket, n))


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
        out.copy_(fma(_by_element(factor, bucket, n), _levels(p, b, n), out))


def _by_element(scales: Tensor, bucket: int, n: int) -> Tensor:
    """Each element's scale."""
    return scales.repeat_interleave(min(bucket, max(n, 1)))[:n]


# ---- the same for a table of tensors: one row (start, length, bits, bucket, offset, bytes, scales) each ----


class Row(NamedTuple):
    """A row of a table (`dynfed_lightning.ops.Layout`): where a tensor is in a flat vector, and where its payload is."""

    start: int
    length: int
    bits: int
    bucket: int
    offset: int  # global index of its first value
    bytes_at: int
    scales_at: int

    def packed(self, arena: Tensor) -> Tensor:
        return arena[self.bytes_at :][: (self.length * self.bits + 7) // 8]

    def scales(self, arena: Tensor) -> Tensor:
        return arena[self.scales_at :][: (self.length + self.bucket - 1) // self.bucket]


def rows(table: Tensor) -> list[Row]:
    """The rows of a table, int64 [tensors, 7]."""
    return [Row(*r) for r in table.tolist()]


def members(tensors: Sequence[Tensor], table: Tensor) -> list[Tensor]:
    """Each row's tensor: `tensors` themselves, or the pieces of the one flat vector in it."""
    if len(tensors) != 1:
        return [t.view(-1) for t in tensors]
    return [tensors[0].view(-1)[r.start :][: r.length] for r in rows(table)]


def quantize_pack_table(
    x: Sequence[Tensor], table: Tensor, seed: int, rounding: int, packed: Tensor, scales: Tensor
) -> None:
    """`quantize_pack` of every row."""
    for row, tensor in zip(rows(table), members(x, table), strict=True):
        into = row.packed(packed), row.scales(scales)
        quantize_pack(tensor, row.bits, row.bucket, seed, row.offset, rounding, *into)


def unpack_dequantize_table(packed: Tensor, scales: Tensor, table: Tensor, out: Sequence[Tensor]) -> None:
    """`unpack_dequantize` of every row."""
    for row, tensor in zip(rows(table), members(out, table), strict=True):
        unpack_dequantize(row.packed(packed), row.scales(scales), row.bits, row.bucket, tensor)


def accumulate_table(
    out: Tensor, packed: Sequence[Tensor], scales: Sequence[Tensor], tables: Sequence[Tensor], weights: Sequence[float]
) -> None:
    """`accumulate` of every row, client after client; the tables differ in bits, and in where the payloads are."""
    for p, s, table, w in zip(packed, scales, tables, weights, strict=True):
        for row, tensor in zip(rows(table), members([out], table), strict=True):
            accumulate(tensor, [row.packed(p)], [row.scales(s)], [row.bits], row.bucket, [w])


# ---- rotation ----


def rotate(x: Tensor, table: Tensor, block: int, seed: int, inverse: bool) -> None:
    """Rotate each row's piece of the flat float32 vector `x` in place by a randomised Hadamard transform.

    A row is cut into blocks of ``B = min(block, largest power of two <= length)`` values; if they do not fill it, its last B
    values are rotated once more, so that none is left out. The inverse undoes this in the opposite order.
    """
    for row in rows(table):
        if not row.length:
            continue
        piece = x[row.start :][: row.length]
        size = min(block, 1 << (row.length.bit_length() - 1))
        whole = row.length // size * size
        passes = [(piece[:whole], 1)]
        if whole < row.length:
            passes.append((piece[row.length - size :], 2))
        for values, domain in reversed(passes) if inverse else passes:
            flips = random_signs(seed, row.offset >> 3, domain, values.numel(), x.device)
            values.copy_(_hadamard(values, flips, size, inverse))


def random_signs(seed: int, first: int, domain: int, n: int, device: torch.device) -> Tensor:
    """n random bits as bool: bit ``i % 128`` of the Philox block with counter (first + i // 128, as two words; domain; 0)."""
    block = torch.arange(first, first + (n + 127) // 128, dtype=torch.int64, device=device)
    zero = torch.zeros_like(block)
    words = torch.stack(philox4x32(seed, block & LOW32, (block >> 32) & LOW32, zero + domain, zero), dim=1)
    bits = (words[:, :, None] >> torch.arange(32, device=device)) & 1
    return bits.reshape(-1)[:n].bool()


def _hadamard(x: Tensor, flips: Tensor, size: int, inverse: bool) -> Tensor:
    """``H D x / sqrt(size)`` per block of `size`, or its inverse ``D H x / sqrt(size)``; D flips signs."""
    y = x if inverse else torch.where(flips, -x, x)
    half = 1
    while half < size:
        pairs = y.reshape(-1, 2, half)
        y = torch.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), dim=1).reshape(-1)
        half *= 2
    y = y * torch.full_like(y, size**-0.5)
    return torch.where(flips, -y, y) if inverse else y


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


# ---- dense matrices ----


def symmetric_eigh(a: Tensor, w: Tensor, v: Tensor) -> None:
    """Eigenvalues and eigenvectors of symmetric matrices: ``a[b] = v[b] @ diag(w[b]) @ v[b].T``.

    Backends agree on eigenvalues to 1e-12 of the largest magnitude; residual and orthogonality are within 1e-11 of it and of
    1. Signs of eigenvectors, and bases of equal eigenvalues, are the backend's own. A matrix's result does not depend on the
    others, nor on threads.

    Args:
        a: float64 [B, l, l], symmetric; a matrix with NaN or infinity gives NaN throughout.
        w: float64 [B, l], descending.
        v: float64 [B, l, l], eigenvectors as columns.
    """
    finite = torch.isfinite(a).all(dim=2).all(dim=1)
    values, vectors = torch.linalg.eigh(torch.where(finite[:, None, None], a, 0.0))
    w.copy_(torch.where(finite[:, None], values.flip(1), math.nan))
    v.copy_(torch.where(finite[:, None, None], vectors.flip(2), math.nan))


def squared_norm(a: Tensor, out: Tensor) -> None:
    """Squared Frobenius norm of each matrix, in float64 sums: backends agree to 1e-13 relative.

    Args:
        a: float32, float64, bfloat16 or float16 [B, m, n].
        out: float64 [B]; NaN and infinity propagate.
    """
    step = max(CHUNK // max(a[0].numel(), 1), 1)
    for i in range(0, a.shape[0], step):
        out[i : i + step] = a[i : i + step].to(torch.float64).square().sum(dim=(1, 2))
