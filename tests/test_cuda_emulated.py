"""The CUDA kernels, emulated: the .cu files that nvcc compiles run on the CPU and must return the reference's bits.

`cuda_shim` runs every CUDA thread as a fiber. The operators of `csrc/cuda/ops.cpp` are built for CPU tensors over it, so that
these tests go through the backend's own module. Emulation says nothing about races or speed: a kernel counts as done when the
tests marked ``gpu`` have passed.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator

import pytest
import torch
from cuda_support import GXX, Fenced, Guarded, load_emulated, misaligned
from ops_support import same, values
from torch import Tensor

from dynfed_lightning import _ops_cuda as cuda
from dynfed_lightning import _reference as reference

SIZES = (0, 1, 7, 8, 511, 512, 513, 3001)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BITS = tuple(range(1, 9))
NEAREST, STOCHASTIC, EDEN = 0, 1, 2
SEED = -0x123456789ABCDEF  # a seed beyond 2**63, as operators receive it

pytestmark = pytest.mark.skipif(GXX is None, reason="the emulated kernels need g++")


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backend's module, with the emulated operators in the place of the real ones."""
    load_emulated()
    monkeypatch.setattr(cuda, "_C", torch.ops.dynfed_lightning_cuda_emulated)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    yield


def check_quantize(x: Tensor, bits: int, bucket: int, offset: int, rounding: int, by: int = 0) -> None:
    n = x.numel()
    sizes = (n * bits + 7) // 8, (n + bucket - 1) // bucket
    packed, scales = torch.zeros(sizes[0], dtype=torch.uint8), torch.zeros(sizes[1])
    if n:
        reference.quantize_pack(x, bits, bucket, SEED, offset, rounding, packed, scales)
    p, s = Guarded(sizes[0], torch.uint8, by), Guarded(sizes[1], torch.float32, by)
    cuda.quantize_pack(misaligned(x, by) if by else x, bits, bucket, SEED, offset, rounding, p.room, s.room)
    assert torch.equal(p.room, packed) and same(s.room, scales) and p.intact() and s.intact()


@pytest.mark.parametrize("rounding", [NEAREST, STOCHASTIC, EDEN])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_pack(dtype: torch.dtype, rounding: int) -> None:
    """Every width and size, buckets of every kernel: several a warp, one a warp, one a thread block; none a power of two too."""
    for n, bits in itertools.product(SIZES, BITS):
        x = values(n, dtype, seed=n)
        for bucket in (8, 24, 64, 256, 264, 512, 1000, 1024, 1032, 65536):
            check_quantize(x, bits, bucket, 16, rounding)


@pytest.mark.parametrize("rounding", [NEAREST, STOCHASTIC])
def test_quantize_pack_from_any_global_index(rounding: int) -> None:
    for offset, bits, n in itertools.product((1, 4, 7, 2**32 - 3, 2**40 + 8, 2**62), (1, 3, 4, 8), (1, 9, 1027)):
        for bucket in (8, 512, 2048):
            check_quantize(values(n, seed=n), bits, bucket, offset, rounding)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_pack_of_misaligned_pieces(dtype: torch.dtype) -> None:
    for by, bits, bucket in itertools.product((1, 2, 3, 5), BITS, (64, 512, 2048)):
        check_quantize(values(3001, dtype), bits, bucket, 8, STOCHASTIC, by)


@pytest.mark.parametrize("rounding", [NEAREST, STOCHASTIC, EDEN])
def test_values_that_are_no_numbers_and_buckets_of_zeros(rounding: int) -> None:
    x = values(4096)
    x[5], x[600], x[1500], x[2048:2560] = float("nan"), float("inf"), -float("inf"), 0.0
    x[2560:3072], x[3072:3584] = 1e-31, 1e-39
    x[3584:] *= 3e38 / x[3584:].abs().max()
    for bits, bucket in itertools.product(BITS, (64, 512, 2048)):
        check_quantize(x, bits, bucket, 0, rounding)


@pytest.mark.parametrize("bits", BITS)
def test_one_large_vector(bits: int) -> None:
    check_quantize(values(100_003), bits, 512, 8, STOCHASTIC)


@pytest.mark.parametrize("bits", BITS)
def test_pack_and_unpack(bits: int) -> None:
    for n, by in itertools.product((*SIZES, 100_003), (0, 1, 3)):
        g = torch.Generator().manual_seed(n)
        codes = torch.randint(0, 1 << bits, (n,), generator=g, dtype=torch.uint8)
        expected = torch.zeros((n * bits + 7) // 8, dtype=torch.uint8)
        if n:
            reference.pack(codes, bits, expected)
        packed, unpacked = Guarded(expected.numel(), torch.uint8, by), Guarded(n, torch.uint8, by)
        seen = cuda.pack(misaligned(codes, by), bits, packed.room)
        cuda.unpack(packed.room, bits, unpacked.room)
        assert torch.equal(packed.room, expected) and torch.equal(unpacked.room, codes)
        assert packed.intact() and unpacked.intact() and seen is not None and seen < 1 << bits


@pytest.mark.parametrize("bits", range(1, 8))
def test_a_code_that_is_too_large_is_seen_and_cut_off(bits: int) -> None:
    codes = torch.zeros(3001, dtype=torch.uint8)
    for at in (0, 1500, 3000):
        codes.zero_()[at] = 0xFF
        packed, expected = torch.zeros((3001 * bits + 7) // 8, dtype=torch.uint8), torch.zeros(0, dtype=torch.uint8)
        seen = cuda.pack(codes, bits, packed)
        assert seen is not None and seen >= 1 << bits
        expected = torch.zeros_like(packed)
        reference.pack(codes & ((1 << bits) - 1), bits, expected)
        assert torch.equal(packed, expected)


def payload(n: int, bits: int, bucket: int, seed: int, by: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, ((n * bits + 7) // 8,), generator=g, dtype=torch.uint8)
    scales = torch.randn((n + bucket - 1) // bucket, generator=g)
    if scales.numel() > 2:
        scales[1], scales[2] = float("nan"), 0.0
    return misaligned(packed, by), misaligned(scales, by)


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Equal bit patterns, where any NaN equals any other."""
    return same(a.nan_to_num(0.25), b.nan_to_num(0.25)) and torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize("bits", BITS)
def test_unpack_dequantize(bits: int) -> None:
    for n, bucket, by in itertools.product(SIZES, (8, 24, 64, 400, 512, 800, 1024, 2**31), (0, 1, 3)):
        packed, scales = payload(n, bits, bucket, n, by)
        expected, out = torch.zeros(n), Guarded(n, torch.float32, by)
        if n:
            reference.unpack_dequantize(packed, scales, bits, min(bucket, 4096), expected)
        cuda.unpack_dequantize(packed, scales, bits, bucket, out.room)
        assert same_numbers(out.room, expected) and out.intact()


@pytest.mark.parametrize("clients", [0, 1, 3, 8, pytest.param(250, marks=pytest.mark.slow)])
def test_accumulate(clients: int) -> None:
    for n, bucket, by in itertools.product((*SIZES, 1536), (24, 400, 512, 800, 1032), (0, 1, 2)):
        bits = [1 + (c + n) % 8 for c in range(clients)]
        payloads = [payload(n, b, bucket, n + c, (by * c) % 4) for c, b in enumerate(bits)]
        packed, scales = [p for p, _ in payloads], [s for _, s in payloads]
        weights = [0.1 * (c + 1) for c in range(clients)]
        start = values(n, seed=clients)
        expected, out = start.clone(), Guarded(n, torch.float32, by)
        out.room.copy_(start)
        if n:
            reference.accumulate(expected, packed, scales, bits, bucket, weights)
        cuda.accumulate(out.room, packed, scales, bits, bucket, weights)
        assert same_numbers(out.room, expected) and out.intact()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mprotect"), reason="needs mprotect")
@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_nothing_is_read_outside_of_the_inputs(bits: int, at_end: bool) -> None:
    fenced = Fenced()
    for n in (1, 3, 8, 9, 511, 513, 1027):
        for dtype, bucket in itertools.product(DTYPES, (512, 2048)):
            check_quantize(fenced(values(n, dtype), at_end), bits, bucket, 0, STOCHASTIC)
        packed, scales = (fenced(t, at_end) for t in payload(n, bits, 8, n))
        codes, out, total = (
            fenced(torch.zeros(n, dtype=torch.uint8), at_end),
            torch.zeros(n),
            fenced(torch.zeros(n), at_end),
        )
        cuda.unpack(packed, bits, codes)
        again = fenced(packed, at_end)
        cuda.pack(codes, bits, again)
        cuda.unpack_dequantize(packed, scales, bits, 8, out)
        cuda.accumulate(total, [packed], [scales], [bits], 8, [1.0])
        cuda.rotate(total, tight_table([n], [bits], 8), 64, SEED, False)
        assert torch.equal(again[:-1], packed[:-1])


# ---- tables ----


def tight_table(lengths: list[int], bits: list[int], bucket: int, shift: int = 0) -> Tensor:
    """Payloads without padding, so that most begin at odd addresses; `shift` moves all of them."""
    rows, start, offset, at, scale_at = [], 0, 0, shift, shift
    for n, b in zip(lengths, bits, strict=True):
        rows.append((start, n, b, bucket, offset, at, scale_at))
        start, offset = start + n, offset + (n + 7) // 8 * 8
        at, scale_at = at + (n * b + 7) // 8, scale_at + (n + bucket - 1) // bucket
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 7)


def arena_sizes(table: Tensor) -> tuple[int, int]:
    last = reference.rows(table)[-1]
    return last.bytes_at + (last.length * last.bits + 7) // 8, last.scales_at - (-last.length // last.bucket)


LENGTHS = [0, 10, 432, 16, 0, 2304, 1, 513, 640, 7, 1030, 9] + [3, 5] * 40  # more rows than a launch takes
WIDTHS = [1 + (3 * i) % 8 for i in range(len(LENGTHS))]


@pytest.mark.parametrize("rounding", [NEAREST, STOCHASTIC, EDEN])
@pytest.mark.parametrize("bucket", [64, 512, 2048])
def test_quantize_pack_table(bucket: int, rounding: int) -> None:
    table = tight_table(LENGTHS, WIDTHS, bucket, shift=3)
    nonempty = [r for r in reference.rows(table) if r.length]
    flat = values(sum(LENGTHS))
    lists = [
        [flat],
        [flat[r.start :][: r.length].to(DTYPES[i % 3]) for i, r in enumerate(reference.rows(table))],
    ]
    for x in lists:
        p, s = (
            Guarded(size, dtype) for size, dtype in zip(arena_sizes(table), (torch.uint8, torch.float32), strict=True)
        )
        p.room.zero_(), s.room.zero_()
        expected = p.room.clone(), s.room.clone()
        pieces = reference.members(x, table)
        for row, piece in ((r, t) for r, t in zip(reference.rows(table), pieces, strict=True) if r in nonempty):
            into = row.packed(expected[0]), row.scales(expected[1])
            reference.quantize_pack(piece, row.bits, row.bucket, SEED, row.offset, rounding, *into)
        cuda.quantize_pack_table(x, table, SEED, rounding, p.room, s.room)
        assert torch.equal(p.room, expected[0]) and same(s.room, expected[1]) and p.intact() and s.intact()


@pytest.mark.parametrize("bucket", [24, 512])
@pytest.mark.parametrize("flat", [True, False])
def test_unpack_dequantize_table(flat: bool, bucket: int) -> None:
    table = tight_table(LENGTHS, WIDTHS, bucket, shift=1)
    sizes = arena_sizes(table)
    packed, _ = payload(sizes[0] * 8, 1, 8, 1)
    scales = torch.randn(sizes[1], generator=torch.Generator().manual_seed(2))
    out = [torch.zeros(sum(LENGTHS))] if flat else [torch.zeros(n) for n in LENGTHS]
    cuda.unpack_dequantize_table(packed, scales, table, out)
    for row, tensor in zip(reference.rows(table), reference.members(out, table), strict=True):
        expected = torch.zeros(row.length)
        if row.length:
            reference.unpack_dequantize(row.packed(packed), row.scales(scales), row.bits, bucket, expected)
        assert same(tensor, expected)


@pytest.mark.parametrize("clients", [1, 5, pytest.param(130, marks=pytest.mark.slow)])
def test_accumulate_table(clients: int) -> None:
    tables = [tight_table(LENGTHS, WIDTHS[c % 8 :] + WIDTHS[: c % 8], 64, shift=c % 5) for c in range(clients)]
    packed, scales = [], []
    for c, table in enumerate(tables):
        sizes = arena_sizes(table)
        packed.append(payload(sizes[0] * 8, 1, 8, c)[0])
        scales.append(torch.randn(sizes[1], generator=torch.Generator().manual_seed(c)))
    weights = [0.3 / (c + 1) for c in range(clients)]
    out = values(sum(LENGTHS))
    expected = out.clone()
    for p, s, table, w in zip(packed, scales, tables, weights, strict=True):
        for row in (r for r in reference.rows(table) if r.length):
            piece = expected[row.start :][: row.length]
            reference.accumulate(piece, [row.packed(p)], [row.scales(s)], [row.bits], row.bucket, [w])
    cuda.accumulate_table(out, packed, scales, tables, weights)
    assert same(out, expected)


@pytest.mark.parametrize("column", ["length", "start", "bytes_at", "scales_at", "bits", "bucket", "offset"])
def test_a_table_cannot_reach_outside_of_the_tensors(column: str) -> None:
    table = tight_table([512, 512], [4, 4], 512)
    sizes = arena_sizes(table)
    x, packed, scales = torch.zeros(1024), torch.zeros(sizes[0], dtype=torch.uint8), torch.zeros(sizes[1])
    at = ("start", "length", "bits", "bucket", "offset", "bytes_at", "scales_at").index(column)
    for value in (-1, -(2**63), 2**62, 2**63 - 1):
        bad = table.clone()
        bad[1, at] = value
        if column != "offset" or value != 2**62:  # that offset is a good one
            with pytest.raises(RuntimeError, match="Expected"):
                cuda.quantize_pack_table([x], bad, 0, STOCHASTIC, packed, scales)
        if column in ("start", "length"):
            with pytest.raises(RuntimeError, match="Expected"):
                cuda.rotate(x, bad, 8, 0, False)
        if column not in ("offset", "bucket"):
            with pytest.raises(RuntimeError, match="Expected"):
                cuda.unpack_dequantize_table(packed, scales, bad, [x])
            with pytest.raises(RuntimeError, match="Expected"):
                cuda.accumulate_table(x, [packed], [scales], [bad], [1.0])


def test_wrong_sizes_and_types_are_refused() -> None:
    x, packed, scales = torch.zeros(100), torch.zeros(50, dtype=torch.uint8), torch.zeros(1)
    for args in (
        (x.double(), packed, scales),
        (x, packed[:-1], scales),
        (x, packed, torch.zeros(2)),
        (x, scales, scales),
    ):
        with pytest.raises(RuntimeError, match="Expected"):
            cuda.quantize_pack(args[0], 4, 512, 0, 0, STOCHASTIC, args[1], args[2])
    with pytest.raises(RuntimeError, match="contiguous"):
        cuda.quantize_pack(torch.zeros(200)[::2], 4, 512, 0, 0, STOCHASTIC, packed, scales)
    with pytest.raises(RuntimeError, match="EDEN"):
        cuda.quantize_pack(x, 4, 65544, 0, 0, EDEN, packed, scales)


# ---- rotation ----


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("block", [1, 2, 4, 8, 64, 128, 256, 1024, 2048, 8192])
def test_rotate(block: int, inverse: bool) -> None:
    table = tight_table([0, 1, 2, 3, 7, 100, 513, 5000, 20_000, 8192], [4] * 10, 8)
    x = Guarded(int(table[-1, 0] + table[-1, 1]), torch.float32)
    x.room.copy_(values(x.room.numel()))
    expected = x.room.clone()
    reference.rotate(expected, table, block, SEED, inverse)
    cuda.rotate(x.room, table, block, SEED, inverse)
    assert same(x.room, expected) and x.intact()


def test_rotate_of_more_rows_than_a_launch_takes() -> None:
    table = tight_table([3, 16] * 120, [4] * 240, 8)
    x = values(int(table[-1, 0] + table[-1, 1]))
    expected = x.clone()
    reference.rotate(expected, table, 8, SEED, False)
    cuda.rotate(x, table, 8, SEED, False)
    assert same(x, expected)
