"""The Triton kernels against the reference, bit for bit, in Triton's interpreter: no GPU needed.

Triton decides when a kernel is defined whether to interpret it, so these tests run in a process of their own: pytest on this
very file with ``TRITON_INTERPRET=1``, where the functions named ``interpreted_*`` are the tests, once the fast and once the slow.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from dense_support import DTYPES as NORM_DTYPES
from dense_support import F64, SHAPES, matrices, normal
from ops_support import same, values
from torch import Tensor

from dynfed_lightning import _ops_triton as triton_ops
from dynfed_lightning import _reference as reference

BITS = range(1, 9)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NEAREST, STOCHASTIC, EDEN = reference.NEAREST, reference.STOCHASTIC, reference.EDEN
SIZES = (0, 1, 7, 8, 511, 512, 513)
WIDE = pytest.mark.parametrize("bits", [*(pytest.param(b, marks=pytest.mark.slow) for b in (2, 5, 6, 7)), 1, 3, 4, 8])


def version(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])


def run_interpreted(file: str, marker: str) -> None:
    """Run the tests ``interpreted_*`` of a file, in a process of their own."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if version("triton") < (3, 7) and version("numpy") >= (2, 4):
        pytest.skip("the interpreter of triton 3.6 needs numpy below 2.4")
    # Triton 3.6 makes a scalar of an array of one element, of which numpy warns.
    quiet = ["-W", "ignore:Conversion of an array with ndim:DeprecationWarning"]
    names = ["-o", "python_functions=interpreted_*"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *names, *quiet, "-m", marker, file]
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr
    assert " passed" in done.stdout and " failed" not in done.stdout


@pytest.mark.parametrize("marker", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_in_the_interpreter(marker: str) -> None:
    run_interpreted(__file__, marker)


def stream(n: int, bits: int) -> Tensor:
    """Any bytes: n codes of `bits` bits."""
    return torch.randint(0, 256, ((n * bits + 7) // 8,), dtype=torch.uint8)


def guarded(n: int, dtype: torch.dtype, shift: int = 0) -> tuple[Tensor, Tensor]:
    """A tensor of n elements inside a larger one of sentinels, `shift` elements off its alignment; both."""
    whole = torch.full((n + 48,), 77, dtype=dtype)
    return whole[16 + shift : 16 + shift + n], whole


def intact(inner: Tensor, whole: Tensor, shift: int = 0) -> bool:
    outside = torch.cat((whole[: 16 + shift], whole[16 + shift + inner.numel() :]))
    return bool((outside == 77).all())


@cache
def fuses() -> bool:
    """Whether this interpreter's ``tl.fma`` rounds once. That of triton 3.6 rounds the product as well."""
    # Level 3 of 8 bits times 1 + 2**-23 needs 25 bits; the reference has 3 * 2**-23 left of it.
    out = torch.tensor([-3.0])
    triton_ops.accumulate(out, [torch.tensor([131], dtype=torch.uint8)], [torch.tensor([1 + 2.0**-23])], [8], 8, [1.0])
    return bool(out == 3 * 2.0**-23)


def expected_accumulate(
    out: Tensor, packed: list[Tensor], scales: list[Tensor], bits: list[int], bucket: int, weights: list[float]
) -> None:
    """The reference; where the interpreter's fma rounds twice, the same with two roundings."""
    if fuses():
        reference.accumulate(out, packed, scales, bits, bucket, weights)
        return
    for p, s, b, w in zip(packed, scales, bits, weights, strict=True):
        term = torch.empty_like(out)
        reference.unpack_dequantize(p, s * torch.full_like(s, w), b, bucket, term)
        out += term


def table(
    lengths: list[int], bits: list[int], buckets: list[int], start: int = 0, gap: int = 0
) -> tuple[Tensor, int, int, int]:
    """A table whose rows lie `gap` values apart in a flat vector from `start` on; sizes of vector, codes and scales."""
    rows, offset, at_packed, at_scales = [], 0, 0, 0
    for length, b, bucket in zip(lengths, bits, buckets, strict=True):
        rows.append([start, length, b, bucket, offset, at_packed, at_scales])
        start += length + gap
        offset += (length + 7) // 8 * 8
        at_packed += (length * b + 7) // 8
        at_scales += (length + bucket - 1) // bucket
    return torch.tensor(rows, dtype=torch.int64), start, at_packed, at_scales


@WIDE
@pytest.mark.parametrize("shift", [0, 1])
def interpreted_pack_and_unpack(bits: int, shift: int) -> None:
    for n in (*SIZES, 4096, 9001):
        codes = torch.randint(0, 1 << bits, (n,), dtype=torch.uint8)
        want = torch.zeros((n * bits + 7) // 8, dtype=torch.uint8)
        if n:
            reference.pack(codes, bits, want)
        packed, around = guarded(want.numel(), torch.uint8, shift)
        assert triton_ops.pack(codes, bits, packed) == 0
        assert same(packed, want) and intact(packed, around, shift), n
        back, around = guarded(n, torch.uint8, shift)
        triton_ops.unpack(packed, bits, back)
        assert same(back, codes) and intact(back, around, shift), n


@pytest.mark.parametrize("bits", [1, 4, 7])
def interpreted_pack_reports_too_large_codes_and_keeps_their_low_bits(bits: int) -> None:
    codes = torch.zeros(9000, dtype=torch.uint8)
    codes[[17, 8999]] = torch.tensor([1 << bits, 255], dtype=torch.uint8)
    packed = torch.empty((9000 * bits + 7) // 8, dtype=torch.uint8)
    assert triton_ops.pack(codes, bits, packed) == 255
    want = torch.empty_like(packed)
    reference.pack(codes & ((1 << bits) - 1), bits, want)
    assert same(packed, want)


def check_quantize(x: Tensor, bits: int, bucket: int, seed: int, offset: int, rounding: int, shift: int = 0) -> None:
    n = x.numel()
    want_packed = torch.zeros((n * bits + 7) // 8, dtype=torch.uint8)
    want_scales = torch.zeros((n + bucket - 1) // bucket)
    if n:
        reference.quantize_pack(x, bits, bucket, seed, offset, rounding, want_packed, want_scales)
    packed, around_packed = guarded(want_packed.numel(), torch.uint8, shift)
    scales, around_scales = guarded(want_scales.numel(), torch.float32)
    triton_ops.quantize_pack(x, bits, bucket, seed, offset, rounding, packed, scales)
    what = (n, bits, bucket, offset, rounding, x.dtype)
    assert same(scales, want_scales) and intact(scales, around_scales), what
    assert same(packed, want_packed) and intact(packed, around_packed, shift), what


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@WIDE
def interpreted_quantize_pack(bits: int, dtype: torch.dtype) -> None:
    for n in (*SIZES, 4096, 4700):
        for rounding in (NEAREST, STOCHASTIC, EDEN):
            check_quantize(values(n, dtype, seed=n), bits, 512, -5, 0, rounding)


@pytest.mark.parametrize("rounding", [NEAREST, STOCHASTIC, EDEN])
@pytest.mark.parametrize("bucket", [8, 24, 1000, 8192, 4104])
def interpreted_any_bucket(bucket: int, rounding: int) -> None:
    """Smaller than a tile, padded to a power of two, larger than a tile."""
    for bits in (1, 2, 4, 7):
        check_quantize(values(bucket * 2 + 13, seed=bucket), bits, bucket, 3, 0, rounding)


@pytest.mark.parametrize("offset", [1, 5, 2**31 + 8, 2**32 - 16, 2**61 + 7])
def interpreted_any_offset_and_seed(offset: int) -> None:
    for bits, bucket, seed in ((4, 512, 2**31), (3, 8, -1), (8, 4104, 2**63 - 1), (2, 72, -(2**63))):
        check_quantize(values(5000, seed=offset % 97), bits, bucket, seed, offset, STOCHASTIC)


@pytest.mark.parametrize("bits", [1, 4, 5])
def interpreted_buffers_at_any_address(bits: int) -> None:
    for shift in (1, 4, 6):
        x, _ = guarded(4700, torch.float32, shift)
        x.copy_(values(4700, seed=shift))
        check_quantize(x, bits, 512, 1, 0, STOCHASTIC, shift)


@pytest.mark.parametrize("rounding", [NEAREST, STOCHASTIC, EDEN])
@pytest.mark.parametrize("bucket", [512, 8192])
def interpreted_unusual_buckets(bucket: int, rounding: int) -> None:
    """Zero, denormal, below the least scale, NaN, infinite, of one magnitude, at both ends of the range."""
    x = values(8 * bucket, seed=7)
    x[:bucket] = 0
    x[bucket : 2 * bucket] *= 1e-42
    x[2 * bucket : 3 * bucket] = 1e-30
    x[3 * bucket + 5] = float("nan")
    x[4 * bucket + 6] = -float("inf")
    x[5 * bucket : 6 * bucket] = -2.0
    x[6 * bucket :: 2] = 3.4028234663852886e38
    x[6 * bucket + 1 :: 2] = -3.4028234663852886e38
    for bits in (1, 2, 4, 8):
        check_quantize(x, bits, bucket, 11, 0, rounding)


@WIDE
@pytest.mark.parametrize("shift", [0, 1])
def interpreted_unpack_dequantize(bits: int, shift: int) -> None:
    for n, bucket in ((0, 8), (1, 8), (7, 512), (513, 512), (4160, 24), (9001, 1000), (9001, 2**31)):
        packed, _ = guarded((n * bits + 7) // 8, torch.uint8, shift)
        packed.copy_(stream(n, bits))
        scales = torch.randn((n + bucket - 1) // bucket)
        want = torch.zeros(n)
        if n:
            reference.unpack_dequantize(packed, scales, bits, min(bucket, 2 * n // 8 * 8 + 8), want)
        got, around = guarded(n, torch.float32, shift)
        triton_ops.unpack_dequantize(packed, scales, bits, bucket, got)
        assert same(got, want) and intact(got, around, shift), (n, bucket)


@pytest.mark.parametrize(
    "bits", [[4], [4] * 8, [2, 6, 1], [1, 2, 3, 4, 5, 6, 7, 8, 8, 1, 3]], ids=lambda b: "".join(map(str, b))
)
def interpreted_accumulate(bits: list[int]) -> None:
    for n, bucket in ((0, 8), (1, 8), (513, 512), (4160, 24), (9001, 1000)):
        packed = [stream(n, b) for b in bits]
        scales = [torch.randn((n + bucket - 1) // bucket) for _ in bits]
        weights = [*torch.randn(len(bits), dtype=torch.float64).tolist()]
        start = torch.randn(n)
        want, (got, around) = start.clone(), guarded(n, torch.float32, 1)
        got.copy_(start)
        if n:
            expected_accumulate(want, packed, scales, bits, bucket, weights)
        triton_ops.accumulate(got, packed, scales, bits, bucket, weights)
        assert same(got, want) and intact(got, around, 1), (n, bucket)


@pytest.mark.parametrize("weight", [0.0, 1e-40, -3e37, 0.1])
def interpreted_weights_are_rounded_to_float32(weight: float) -> None:
    packed, scales, want = stream(600, 4), torch.rand(2), torch.randn(600)
    got = want.clone()
    expected_accumulate(want, [packed], [scales], [4], 512, [weight])
    triton_ops.accumulate(got, [packed], [scales], [4], 512, [weight])
    assert same(got, want)


LENGTHS = [8200, 0, 10, 513, 4100, 1, 5000]


@pytest.mark.parametrize("buckets", [[512] * 7, [8, 64, 72, 512, 1000, 8, 4104]], ids=["one-bucket", "buckets"])
@pytest.mark.parametrize("bits", [[4] * 7, [3, 4, 8, 1, 2, 7, 5]], ids=["one-width", "widths"])
def interpreted_tables(bits: list[int], buckets: list[int]) -> None:
    rows, n, n_packed, n_scales = table(LENGTHS, bits, buckets, start=3, gap=1)
    rows[-1, 4] += 2**40
    x = values(n, seed=1)
    dtypes = (torch.float32, torch.bfloat16)
    pieces = [x[a : a + length].to(dtypes[r % 2]) for r, (a, length) in enumerate(rows[:, :2].tolist())]
    payload = torch.empty(0), torch.empty(0)
    for inputs in ([x], pieces):
        for rounding in (NEAREST, STOCHASTIC, EDEN):
            want_packed, want_scales = torch.zeros(n_packed, dtype=torch.uint8), torch.zeros(n_scales)
            reference.quantize_pack_table(inputs, rows, 9, rounding, want_packed, want_scales)
            packed, around_packed = guarded(n_packed, torch.uint8)
            scales, around_scales = guarded(n_scales, torch.float32)
            triton_ops.quantize_pack_table(inputs, rows, 9, rounding, packed, scales)
            assert same(packed, want_packed) and intact(packed, around_packed), rounding
            assert same(scales, want_scales) and intact(scales, around_scales), rounding
            payload = packed, scales

    want, got = torch.full((n,), 5.0), torch.full((n,), 5.0)
    reference.unpack_dequantize_table(*payload, rows, [want])
    triton_ops.unpack_dequantize_table(*payload, rows, [got])
    assert same(got, want)  # with what lies between the rows
    several = [torch.zeros(length) for length in LENGTHS]
    triton_ops.unpack_dequantize_table(*payload, rows, several)
    assert all(same(a, want[s:][: len(a)]) for a, s in zip(several, rows[:, 0].tolist(), strict=True))

    others, _, more_packed, more_scales = table(LENGTHS, [2, 2, 6, 4, 7, 1, 8], buckets, start=3, gap=1)
    more = torch.randint(0, 256, (more_packed,), dtype=torch.uint8), torch.randn(more_scales)
    clients = 9  # more than one launch takes
    packeds, scaleses = [payload[0], *[more[0]] * (clients - 1)], [payload[1], *[more[1]] * (clients - 1)]
    tables, weights = [rows, *[others] * (clients - 1)], torch.randn(clients, dtype=torch.float64).tolist()
    want, got = x.clone(), x.clone()
    for p, s, t, w in zip(packeds, scaleses, tables, weights, strict=True):
        for row in reference.rows(t):
            if row.length:
                piece = want[row.start :][: row.length]
                expected_accumulate(piece, [row.packed(p)], [row.scales(s)], [row.bits], row.bucket, [w])
    triton_ops.accumulate_table(got, packeds, scaleses, tables, weights)
    assert same(got, want)


@pytest.mark.parametrize("block", [1, 2, 128, 1024, pytest.param(4096, marks=pytest.mark.slow), 8192])
def interpreted_rotate(block: int) -> None:
    lengths = [1, 0, 2, 5, 8200, 10, 513, 9000, 127]
    rows, n, _, _ = table(lengths, [4] * 9, [512] * 9, start=3, gap=1)
    rows[-1, 4] += 2**40
    want = values(n, seed=2)
    got = want.clone()
    for inverse in (False, True):
        reference.rotate(want, rows, block, -77, inverse)
        triton_ops.rotate(got, rows, block, -77, inverse)
        assert same(got, want), inverse


def interpreted_a_changed_table_is_read_again() -> None:
    rows, n, n_packed, n_scales = table([600, 600], [4, 4], [512, 512])
    x, packed, scales = values(n), torch.zeros(n_packed, dtype=torch.uint8), torch.zeros(n_scales)
    for _ in range(2):
        triton_ops.quantize_pack_table([x], rows, 1, NEAREST, packed, scales)
        want_packed, want_scales = torch.zeros_like(packed), torch.zeros_like(scales)
        reference.quantize_pack_table([x], rows, 1, NEAREST, want_packed, want_scales)
        assert same(packed, want_packed) and same(scales, want_scales)
        rows[:, 0] = rows[:, 0].flip(0)  # the rows trade places


@pytest.mark.parametrize(
    "column, value", [(0, -1), (0, 601), (1, 2**62), (2, 9), (3, 12), (4, 4), (5, 301), (6, 3), (6, 2**63 - 1)]
)
def interpreted_a_table_that_reaches_outside_is_refused(column: int, value: int) -> None:
    rows, n, n_packed, n_scales = table([600, 600], [4, 4], [512, 512])
    rows[1, column] = value
    x, packed, scales = torch.zeros(n), torch.zeros(n_packed, dtype=torch.uint8), torch.zeros(n_scales)
    with pytest.raises(ValueError, match="row 1"):
        triton_ops.quantize_pack_table([x], rows, 1, NEAREST, packed, scales)
    with pytest.raises(ValueError, match="row 1"):
        triton_ops.unpack_dequantize_table(packed, scales, rows, [x])
    with pytest.raises(ValueError, match="row 1"):
        triton_ops.accumulate_table(x, [packed], [scales], [rows], [1.0])
    if column < 2:
        with pytest.raises(ValueError, match="row 1"):
            triton_ops.rotate(x, rows, 8, 1, False)


def interpreted_lists_must_fit_the_table() -> None:
    rows, n, n_packed, n_scales = table([600, 600], [4, 4], [512, 512])
    packed, scales = torch.zeros(n_packed, dtype=torch.uint8), torch.zeros(n_scales)
    with pytest.raises(ValueError, match="length"):
        triton_ops.quantize_pack_table([torch.zeros(600), torch.zeros(599)], rows, 1, NEAREST, packed, scales)
    other, _, _, _ = table([599, 600], [4, 4], [512, 512])
    with pytest.raises(ValueError, match="agree"):
        triton_ops.accumulate_table(torch.zeros(n), [packed] * 2, [scales] * 2, [rows, other], [1.0, 1.0])


def interpreted_it_is_available() -> None:
    assert triton_ops.available() is None


@pytest.mark.parametrize("dtype", NORM_DTYPES, ids=str)
def interpreted_squared_norm(dtype: torch.dtype) -> None:
    for m, n in (*SHAPES, (64, 64), (1, 4097)):
        inner, _ = guarded(3 * m * n, dtype, 1)
        a = inner.copy_(normal(3 * m * n, seed=m + n)).view(3, m, n)
        got, around = guarded(3, F64)
        triton_ops.squared_norm(a, got)
        want = a.to(F64).square().sum(dim=(1, 2))
        assert float(((got - want) / want).abs().max()) < 1e-14 and intact(got, around), (m, n)


def interpreted_norms_of_what_is_no_number() -> None:
    a = normal(3, 100, 50).float()
    got, again = torch.zeros(3, dtype=F64), torch.zeros(3, dtype=F64)
    triton_ops.squared_norm(a, got)
    a[0, 0, 0], a[2, -1, -1] = float("nan"), -float("inf")
    triton_ops.squared_norm(a, again)
    assert bool(again[0].isnan()) and float(again[1]) == float(got[1]) and float(again[2]) == float("inf")
    triton_ops.squared_norm(torch.zeros(3, 0, 5), again)
    assert again.tolist() == [0, 0, 0]


@pytest.mark.parametrize("tiles", [1, 1023, 1024, 2500])
def interpreted_sums_of_many_tiles(tiles: int) -> None:
    from dynfed_lightning.kernels.launch import launch
    from dynfed_lightning.kernels.squared_norm import PARTS, add_tiles_kernel

    partial, (got, around) = normal(2, tiles).square(), guarded(2, F64)
    launch(add_tiles_kernel, 2, partial, partial, tiles, got, PARTS)
    assert torch.allclose(got, partial.sum(dim=1), rtol=1e-14, atol=0.0) and intact(got, around)


def interpreted_symmetric_eigh_is_the_reference() -> None:
    a = matrices(9)
    got, want = ((torch.zeros(6, 9, dtype=F64), torch.zeros(6, 9, 9, dtype=F64)) for _ in range(2))
    triton_ops.symmetric_eigh(a, *got)
    reference.symmetric_eigh(a, *want)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
