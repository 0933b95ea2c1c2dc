"""quantize_pack: one scale a bucket, one code a value, in one pass over the input.

With ``amax`` a bucket's largest magnitude, ``L = 2**(b-1) - 1`` and ``r`` 16 random bits (32768 for nearest rounding):
``scale = amax / L``, ``code = ((trunc(x * 65536 * L / amax) + r) >> 16) + 2**(b-1)``. EDEN rounding takes steps of the root mean
square and the scale ``sum(x * x) / sum(x * level)``. One bit is the sign. `dynfed_lightning._reference` has every detail.

A program takes as many buckets as fill a tile and holds them in registers. A bucket larger than a tile has a program of its own,
which reads it two or three times, mostly from the cache (65536 float32 are 256 KiB). Buckets of millions of values are correct
but slow: they make too few programs to fill a GPU.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynfed_lightning import _reference

from .arithmetic import (
    INFINITY_BITS,
    NAN_BITS,
    TINY_BITS,
    fixed_point,
    join64,
    magnitude,
    pack_half,
    philox,
    store_groups,
)
from .launch import halves, launch
from .tiles import Column, Group, cut, joined_length, kept, record, rows_of

TILE = 4096  # values a program: 32 a thread, which share one schedule of Philox keys and the addresses' arithmetic
# Of 16-bit inputs the assembler spills two registers to stay at 64 or 72. Given this bound it takes 80 to 96 (128 for 8 bits).
HALF_REGISTERS = 128
STOCHASTIC = tl.constexpr(_reference.STOCHASTIC)
EDEN = tl.constexpr(_reference.EDEN)
EDEN_UNITS = tl.constexpr(2.0**20)  # of EDEN's integer sums, in the largest magnitude: 65536 squares fit 64 bits


@triton.jit
def load_half(x, group, keep, count, whole, HALF: tl.constexpr, PADDED: tl.constexpr):
    """Values 4 * HALF .. 4 * HALF + 3 of each group as float32 [.., 4]; zeros where there are none."""
    i = 8 * group + (4 * HALF + tl.arange(0, 4)[None, None, :])
    if whole:
        if PADDED:
            values = tl.load(x + i, mask=keep, other=0.0)
        else:
            values = tl.load(x + i)
    else:
        values = tl.load(x + i, mask=keep & (i < count), other=0.0)
    if values.dtype == tl.bfloat16:
        # The high half of a float32. Spelled out because Triton's interpreter turns denormals into other values.
        return (values.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return values.to(tl.float32)


@triton.jit
def random_halves(first, group, seed_low, seed_high, PHASE: tl.constexpr):
    """16 random bits a value as int32, both halves of each group; the tile begins at word PHASE of Philox block `first`."""
    block = first + group
    a0, a1, a2, a3 = philox(seed_low, seed_high, block, 0)
    j = tl.arange(0, 4)[None, None, :]
    if PHASE == 0:
        low = tl.where(j < 2, a0, a1)
        high = tl.where(j < 2, a2, a3)
    else:
        # Words come from this block and the next one: the k-th of both sits in half k & 1 of number k >> 1.
        b0, b1, b2, b3 = philox(seed_low, seed_high, block + 1, 0)
        low = _pick((PHASE + j) >> 1, a0, a1, a2, a3, b0, b1, b2, b3)
        high = _pick((PHASE + 4 + j) >> 1, a0, a1, a2, a3, b0, b1, b2, b3)
    shift = (16 * ((j + PHASE) & 1)).to(tl.uint32)
    return ((low >> shift) & 0xFFFF).to(tl.int32), ((high >> shift) & 0xFFFF).to(tl.int32)


@triton.jit
def _pick(k, a0, a1, a2, a3, b0, b1, b2, b3):
    a = tl.where(k < 2, tl.where(k == 0, a0, a1), tl.where(k == 2, a2, a3))
    b = tl.where(k < 6, tl.where(k == 4, b0, b1), tl.where(k == 6, b2, b3))
    return tl.where(k < 4, a, b)


@triton.jit
def over_bucket(sums):
    """The int64 sum over each bucket."""
    return tl.sum(tl.sum(sums, axis=2, keep_dims=True), axis=1, keep_dims=True)


@triton.jit
def product(a, b):
    return a.to(tl.int64) * b.to(tl.int64)


@triton.jit
def largest_of(low, high):
    """The largest magnitude of each bucket, as the bits of a float."""
    both = tl.maximum(magnitude(low), magnitude(high))
    return tl.max(tl.max(both, axis=2, keep_dims=True), axis=1, keep_dims=True)


@triton.jit
def usable(largest):
    """Whether a bucket is neither zero nor NaN or infinite."""
    return (largest > TINY_BITS) & (largest < INFINITY_BITS)


@triton.jit
def inverse_of(largest, units: tl.constexpr):
    """What turns a value into units of the largest magnitude: ``units / amax``, 0 where the bucket is not usable."""
    amax = tl.where(usable(largest), largest.to(tl.float32, bitcast=True), 1.0)
    return tl.where(usable(largest), tl.div_rn(tl.full(amax.shape, units, tl.float32), amax), 0.0)


@triton.jit
def finite_or_zero(x, largest):
    """Zeros for a bucket that is not finite: what NaN becomes as an integer is not defined."""
    return tl.where(largest < INFINITY_BITS, x, 0.0)


@triton.jit
def first_sum(low, high, largest, BITS: tl.constexpr, ROUNDING: tl.constexpr):
    """What the levels or the scale need of the whole bucket, int64: EDEN's sum of squares; one bit's sum of magnitudes."""
    if ROUNDING == EDEN:
        inverse = inverse_of(largest, EDEN_UNITS)
        a = fixed_point(low, inverse)
        b = fixed_point(high, inverse)
        return over_bucket(product(a, a) + product(b, b))
    else:
        inverse = inverse_of(largest, 65536.0)
        return over_bucket((tl.abs(fixed_point(low, inverse)) + tl.abs(fixed_point(high, inverse))).to(tl.int64))


@triton.jit
def levels_eden(low, high, largest, energy, values, BITS: tl.constexpr, STEP: tl.constexpr):
    """Both halves' levels, STEP root mean squares apart, and the sum of value times level, in units of the largest magnitude."""
    inverse = inverse_of(largest, EDEN_UNITS)
    a = fixed_point(low, inverse)
    b = fixed_point(high, inverse)
    if BITS == 1:
        return a, b, over_bucket((tl.abs(a) + tl.abs(b)).to(tl.int64))
    else:
        step = STEP * tl.sqrt_rn(tl.div_rn(energy.to(tl.float32), values))
        step = tl.where(usable(largest), step, 1.0)
        inverse_step = tl.where(usable(largest), tl.div_rn(tl.full(step.shape, 65536.0, tl.float32), step), 0.0)
        top: tl.constexpr = 1 << (BITS - 1)
        c = tl.minimum(tl.maximum((fixed_point(a.to(tl.float32), inverse_step) + 32768) >> 16, -top), top - 1)
        d = tl.minimum(tl.maximum((fixed_point(b.to(tl.float32), inverse_step) + 32768) >> 16, -top), top - 1)
        return c, d, over_bucket(product(a, c) + product(b, d))


@triton.jit
def levels_linear(
    low, high, largest, first, group, seed_low, seed_high, BITS: tl.constexpr, ROUNDING: tl.constexpr, PHASE: tl.constexpr
):  # fmt: skip
    """Both halves' levels, the largest of which is the largest magnitude."""
    inverse = inverse_of(largest, 65536.0 * ((1 << (BITS - 1)) - 1))
    if ROUNDING == STOCHASTIC:
        noise_low, noise_high = random_halves(first, group, seed_low, seed_high, PHASE)
    else:
        noise_low = 32768
        noise_high = 32768
    return (fixed_point(low, inverse) + noise_low) >> 16, (fixed_point(high, inverse) + noise_high) >> 16


@triton.jit
def code_words(low, high, level_low, level_high, BITS: tl.constexpr):
    """The codes of both halves, `4 * BITS` bits each: of one bit, the sign."""
    if BITS == 1:
        return pack_half((low >= 0).to(tl.int32), BITS), pack_half((high >= 0).to(tl.int32), BITS)
    else:
        middle: tl.constexpr = 1 << (BITS - 1)
        return pack_half(level_low + middle, BITS), pack_half(level_high + middle, BITS)


@triton.jit
def scale_of(largest, sum1, sum2, values, BITS: tl.constexpr, ROUNDING: tl.constexpr):
    """Each bucket's scale: 0 if it counts as zero, NaN if it is not finite."""
    amax = tl.where(usable(largest), largest.to(tl.float32, bitcast=True), 0.0)
    if ROUNDING == EDEN:
        dot = tl.where(usable(largest), sum2.to(tl.float32), 1.0)
        scale = (amax * (1.0 / EDEN_UNITS)) * tl.div_rn(sum1.to(tl.float32), dot)
    elif BITS == 1:
        scale = (amax * (1.0 / 65536.0)) * tl.div_rn(sum1.to(tl.float32), values)
    else:
        scale = amax * (1.0 / ((1 << (BITS - 1)) - 1))
    return tl.where(largest < INFINITY_BITS, scale.to(tl.int32, bitcast=True), NAN_BITS).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["n", "offset_low", "offset_high", "seed_low", "seed_high"])
def quantize_pack_kernel(
    x, packed, scales, tiles, n, offset_low, offset_high, seed_low, seed_high,
    BITS: tl.constexpr, BUCKET: tl.constexpr, ROUNDING: tl.constexpr, STEP: tl.constexpr, PHASE: tl.constexpr,
    TABLE: tl.constexpr, ALIGNED: tl.constexpr, WORDS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """ROWS buckets, padded to GROUPS groups of eight values each, held at once."""
    start, left, _, _, index, byte, scale, _ = record(tiles, n, BITS, BUCKET, TABLE, ROWS * BUCKET)
    if TABLE and ALIGNED:
        start = tl.multiple_of(start, 4)
    first = (join64(offset_low, offset_high) + index) >> 3
    count = tl.minimum(left, ROWS * BUCKET).to(tl.int32)
    whole = left >= ROWS * BUCKET
    row = tl.arange(0, ROWS)[:, None, None]
    in_bucket = tl.arange(0, GROUPS)[None, :, None]
    group = row * (BUCKET // 8) + in_bucket
    padded: tl.constexpr = 8 * GROUPS != BUCKET
    keep = (in_bucket < BUCKET // 8) & (row >= 0)
    low = load_half(x + start, group, keep, count, whole, 0, padded)
    high = load_half(x + start, group, keep, count, whole, 1, padded)
    values = tl.maximum(tl.minimum(count - row * BUCKET, BUCKET), 1).to(tl.float32)

    largest = largest_of(low, high)
    low = finite_or_zero(low, largest)
    high = finite_or_zero(high, largest)
    sum1 = largest
    sum2 = largest
    if ROUNDING == EDEN or BITS == 1:
        sum1 = first_sum(low, high, largest, BITS, ROUNDING)
    if ROUNDING == EDEN:
        a, b, sum2 = levels_eden(low, high, largest, sum1, values, BITS, STEP)
    elif BITS > 1:
        a, b = levels_linear(low, high, largest, first, group, seed_low, seed_high, BITS, ROUNDING, PHASE)
    else:
        a = group
        b = group
    a, b = code_words(low, high, a, b, BITS)
    store_groups(packed + byte, group, keep, a, b, count, whole, BITS, WORDS)
    result = scale_of(largest, sum1, sum2, values, BITS, ROUNDING)
    tl.store(scales + scale + row, result, mask=row * BUCKET < count)


@triton.jit(do_not_specialize=["n", "offset_low", "offset_high", "seed_low", "seed_high"])
def quantize_pack_large_kernel(
    x, packed, scales, tiles, n, offset_low, offset_high, seed_low, seed_high,
    BITS: tl.constexpr, BUCKET: tl.constexpr, ROUNDING: tl.constexpr, STEP: tl.constexpr, PHASE: tl.constexpr,
    TABLE: tl.constexpr, ALIGNED: tl.constexpr, WORDS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """One bucket, GROUPS groups of eight values at a time: a pass for the maximum, one for a sum if needed, one for the codes."""
    start, left, _, _, index, byte, scale, _ = record(tiles, n, BITS, BUCKET, TABLE, BUCKET)
    if TABLE and ALIGNED:
        start = tl.multiple_of(start, 4)
    first = (join64(offset_low, offset_high) + index) >> 3
    size = tl.minimum(left, BUCKET)
    chunks = ((size + (8 * GROUPS - 1)) // (8 * GROUPS)).to(tl.int32)
    group = tl.arange(0, GROUPS)[None, :, None]
    keep = group >= 0
    values = tl.full([1, 1, 1], 1.0, tl.float32) * size.to(tl.float32)

    largest = tl.zeros([1, 1, 1], tl.int32)
    for c in range(chunks):
        at = tl.cast(c, tl.int64) * (8 * GROUPS)
        count = tl.minimum(size - at, 8 * GROUPS).to(tl.int32)
        low = load_half(x + (start + at), group, keep, count, count == 8 * GROUPS, 0, False)
        high = load_half(x + (start + at), group, keep, count, count == 8 * GROUPS, 1, False)
        largest = tl.maximum(largest, largest_of(low, high))

    sum1 = tl.zeros([1, 1, 1], tl.int64)
    if ROUNDING == EDEN or BITS == 1:
        for c in range(chunks):
            at = tl.cast(c, tl.int64) * (8 * GROUPS)
            count = tl.minimum(size - at, 8 * GROUPS).to(tl.int32)
            low = load_half(x + (start + at), group, keep, count, count == 8 * GROUPS, 0, False)
            high = load_half(x + (start + at), group, keep, count, count == 8 * GROUPS, 1, False)
            sum1 += first_sum(finite_or_zero(low, largest), finite_or_zero(high, largest), largest, BITS, ROUNDING)

    sum2 = tl.zeros([1, 1, 1], tl.int64)
    for c in range(chunks):
        at = tl.cast(c, tl.int64) * (8 * GROUPS)
        count = tl.minimum(size - at, 8 * GROUPS).to(tl.int32)
        whole = count == 8 * GROUPS
        low = finite_or_zero(load_half(x + (start + at), group, keep, count, whole, 0, False), largest)
        high = finite_or_zero(load_half(x + (start + at), group, keep, count, whole, 1, False), largest)
        if ROUNDING == EDEN:
            a, b, dot = levels_eden(low, high, largest, sum1, values, BITS, STEP)
            sum2 += dot
        elif BITS > 1:
            a, b = levels_linear(low, high, largest, first + at // 8, group, seed_low, seed_high, BITS, ROUNDING, PHASE)
        else:
            a = group
            b = group
        a, b = code_words(low, high, a, b, BITS)
        store_groups(packed + (byte + at * BITS // 8), group, keep, a, b, count, whole, BITS, WORDS)
    result = scale_of(largest, sum1, sum2, values, BITS, ROUNDING)
    tl.store(scales + scale + tl.zeros([1, 1, 1], tl.int32), result)


def _shape(bucket: int) -> tuple[Any, int, int]:
    """The kernel for buckets of this size, and ROWS and GROUPS."""
    if bucket > TILE:
        return quantize_pack_large_kernel, 1, TILE // 8
    groups = triton.next_power_of_2(bucket // 8)
    return quantize_pack_kernel, TILE // (8 * groups), groups


def _launch(
    x: Tensor, packed: Tensor, scales: Tensor, group: Group | None, bits: int, bucket: int, offset: int, seed: int, rounding: int
) -> None:  # fmt: skip
    kernel, rows, groups = _shape(bucket)
    if bits == 1 and rounding != _reference.EDEN:
        rounding = _reference.NEAREST  # one kernel for both
    # For a table `aligned` speaks of the rows; the pointers themselves Triton examines, but for the words of codes.
    words = packed.data_ptr() % 8 == 0 and (group is None or group.aligned)
    count = triton.cdiv(x.numel(), rows * bucket) if group is None else group.programs
    # What this rounding does not use must not make for another compiled kernel.
    step = _reference.EDEN_STEPS[bits] if rounding == _reference.EDEN else 0.0
    phase = offset % 8 if rounding == _reference.STOCHASTIC else 0
    launch(
        kernel, count, x, x, packed, scales, None if group is None else group.records, x.numel(),
        *halves(offset), *halves(seed), bits, bucket, rounding, step, phase,
        group is not None, group is not None and group.aligned, words, rows, groups,
        maxnreg=None if x.dtype == torch.float32 else HALF_REGISTERS,
    )  # fmt: skip


def quantize_pack(
    x: Tensor, bits: int, bucket: int, seed: int, offset: int, rounding: int, packed: Tensor, scales: Tensor
) -> None:
    """x float32, bfloat16 or float16 [n] -> packed uint8 [ceil(n * bits / 8)] and scales float32 [ceil(n / bucket)].

    Args:
        seed: 64 bits, signed or not.
        offset: global index of the first value.
        rounding: 0 nearest, 1 stochastic, 2 EDEN.
    """
    _launch(x, packed, scales, None, bits, bucket, offset, seed, rounding)


def quantize_pack_table(
    x: Sequence[Tensor], table: Tensor, seed: int, rounding: int, packed: Tensor, scales: Tensor
) -> None:
    """`quantize_pack` of every row: one launch for each width, bucket and alignment that occurs.

    A list of tensors is first put into one flat vector, of their common dtype or float32: that is thrice the memory traffic.
    """
    join = len(x) != 1
    if join:
        joined_length(table, x)
    flat = torch.cat([t.reshape(-1) for t in x]) if join else x[0]

    def make() -> list[Group]:
        rows = rows_of(table, flat, packed, scales, join)
        widths = rows[:, Column.BITS]
        straight = (rows[:, Column.START] % 4 == 0) & (rows[:, Column.PACKED] % widths == 0)
        kinds = torch.stack((widths, rows[:, Column.BUCKET], straight.long()), dim=1)
        groups = []
        for bits, bucket, aligned in torch.unique(kinds, dim=0).tolist():
            chosen = rows[(kinds == torch.tensor((bits, bucket, aligned))).all(dim=1)]
            _, buckets, _ = _shape(bucket)
            records = cut(chosen, buckets * bucket)
            groups.append(Group(bits, bucket, bool(aligned), len(records), records.to(flat.device)))
        return groups

    sizes = flat.numel(), packed.numel(), scales.numel()
    for group in kept(table, ("quantize_pack", *sizes, flat.device, join), make):
        _launch(flat, packed, scales, group, group.bits, group.bucket, 0, seed, rounding)
