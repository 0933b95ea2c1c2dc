"""The low-bit operations: every backend and instruction set against the reference, bit for bit, and by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import soft_support
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_support import (
    BACKENDS,
    KERNELS,
    backend_fixture,
    gaussian,
    reference_accumulate,
    reference_dequantize,
    reference_pack,
    reference_quantize,
    same,
    select,
    values,
)
from torch import Tensor

from dynfed_lightning import _reference, ops

BITS = range(1, 9)
SIZES = (0, 1, 7, 8, 63, 64, 65, 511, 512, 513, 100_003)

any_backend = backend_fixture(BACKENDS)
kernels = backend_fixture(KERNELS)


# ---- every backend against the reference ----


@pytest.mark.parametrize("dtype", ops.INPUT_DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_quantize_pack_is_the_reference_bit_for_bit(kernels: str, bits: int, dtype: torch.dtype) -> None:
    for n in SIZES:
        x = values(n, dtype, seed=n)
        cases = [(512, 0, "stochastic"), (512, 0, "nearest"), (512, 0, "eden")]
        if n <= 513:
            cases += [(8, 3, "stochastic"), (72, 2**35 - 40, "stochastic"), (1024, 2**61 + 5, "stochastic")]
            cases += [(64, 8, "nearest"), (8, 0, "eden"), (72, 0, "eden"), (4096, 0, "eden")]
        for bucket, offset, rounding in cases:
            packed, scales = ops.quantize_pack(x, bits, bucket, 2**63 + 11, offset, rounding)
            want_packed, want_scales = reference_quantize(x, bits, bucket, 11 - 2**63, offset, rounding)
            assert same(scales, want_scales), (n, bucket, offset, rounding)
            assert same(packed, want_packed), (n, bucket, offset, rounding)


@pytest.mark.parametrize("rounding", ops.ROUNDINGS)
@pytest.mark.parametrize("bucket", [1032, 4096, 65536])
def test_buckets_larger_than_a_tile(kernels: str, bucket: int, rounding: str) -> None:
    x = values(150_001, seed=bucket)
    for bits in (1, 2, 4, 7):
        got = ops.quantize_pack(x, bits, bucket, 5, 0, rounding)
        want = reference_quantize(x, bits, bucket, 5, 0, rounding)
        assert all(same(a, b) for a, b in zip(got, want, strict=True)), bits


@given(
    n=st.integers(0, 3000),
    bits=st.integers(1, 8),
    bucket=st.integers(1, 160).map(lambda k: 8 * k),
    offset=st.integers(0, 2**62),
    seed=st.integers(0, 2**64 - 1),
    rounding=st.sampled_from(ops.ROUNDINGS),
    start=st.integers(0, 9),
)
@settings(max_examples=150)
def test_any_size_bucket_offset_and_alignment(
    n: int, bits: int, bucket: int, offset: int, seed: int, rounding: str, start: int
) -> None:
    """On this machine's best kernels; `start` shifts every buffer against its alignment."""
    x = values(n + start, seed=n)[start:]
    buffers = torch.full((ops.packed_size(n, bits) + start + 8,), 0xA5, dtype=torch.uint8)
    packed = buffers[start : start + ops.packed_size(n, bits)]
    scales = torch.empty(ops.num_buckets(n, bucket) + start)[start:]
    ops.quantize_pack(x, bits, bucket, seed, offset, rounding, out=(packed, scales))
    want = reference_quantize(x, bits, bucket, seed, offset, rounding)
    assert same(packed, want[0]) and same(scales, want[1])
    assert bool((buffers[:start] == 0xA5).all()) and bool((buffers[start + packed.numel() :] == 0xA5).all())
    out = torch.full((n + start + 8,), 7.0)
    ops.unpack_dequantize(packed, scales, bits, bucket, n, out=out[start : start + n])
    assert same(out[start : start + n], reference_dequantize(packed, scales, bits, bucket, n))
    assert bool((out[:start] == 7).all()) and bool((out[start + n :] == 7).all())
    codes = torch.full((n + start + 8,), 0xA5, dtype=torch.uint8)
    ops.unpack(packed, bits, n, out=codes[start : start + n])
    assert same(ops.pack(codes[start : start + n], bits), packed)
    assert bool((codes[:start] == 0xA5).all()) and bool((codes[start + n :] == 0xA5).all())


@pytest.mark.parametrize("bits", BITS)
def test_the_way_back_is_the_reference_bit_for_bit(kernels: str, bits: int) -> None:
    for n in SIZES:
        codes = (values(n, seed=bits).view(torch.int32) & (2**bits - 1)).to(torch.uint8)
        packed = ops.pack(codes, bits)
        assert same(packed, reference_pack(codes, bits))
        assert same(ops.unpack(packed, bits, n), codes)
        for bucket in (8, 72, 512, 4096) if n <= 513 else (512,):
            scales = values(ops.num_buckets(n, bucket), seed=n)
            decoded = ops.unpack_dequantize(packed, scales, bits, bucket, n)
            assert same(decoded, reference_dequantize(packed, scales, bits, bucket, n)), (n, bucket)
            out = values(n, seed=n + 1)
            want = reference_accumulate(out, [packed], [scales], [bits], bucket, [0.3])
            ops.dequantize_accumulate(out, packed, scales, bits, bucket, 0.3)
            assert same(out, want), (n, bucket)


@pytest.mark.parametrize("n", [1, 513, 5000])
def test_many_clients_in_one_pass_are_one_after_the_other(any_backend: str, n: int) -> None:
    clients = [(b, *ops.quantize_pack(values(n, seed=b), b, 64, seed=b), (-1) ** b / b) for b in BITS]
    many, one_by_one = values(n, seed=99), values(n, seed=99)
    bits, packed, scales, weights = (list(column) for column in zip(*clients, strict=True))
    assert ops.dequantize_accumulate_many(many, packed, scales, bits, 64, weights) is many
    for b, p, s, w in clients:
        assert ops.dequantize_accumulate(one_by_one, p, s, b, 64, w) is one_by_one
    assert same(many, one_by_one)
    exact = values(n, seed=99).double() + sum(
        w * ops.unpack_dequantize(p, s, b, 64, n).double() for b, p, s, w in clients
    )
    assert torch.allclose(many.double(), exact, rtol=1e-5, atol=1e-4)
    assert same(ops.dequantize_accumulate_many(many.clone(), [], [], [], 64, []), many)


def test_more_clients_than_one_launch_takes(kernels: str) -> None:
    count, n = 150, 700
    clients = [ops.quantize_pack(values(n, seed=k), 1 + k % 8, 64, seed=k) for k in range(count)]
    packed, scales = [p for p, _ in clients], [s for _, s in clients]
    bits, weights = [1 + k % 8 for k in range(count)], [1 / (k + 1) for k in range(count)]
    out = values(n, seed=count)
    want = reference_accumulate(out, packed, scales, bits, 64, weights)
    assert same(ops.dequantize_accumulate_many(out, packed, scales, bits, 64, weights), want)


@pytest.mark.parametrize("bits", BITS)
def test_a_vector_may_be_split_at_bucket_boundaries(any_backend: str, bits: int) -> None:
    n, bucket, offset = 5003, 72, 2**32 * 8 - 8 * 72
    x = values(n)
    packed, scales = ops.quantize_pack(x, bits, bucket, 5, offset)
    cuts = [0, bucket, 9 * bucket, 50 * bucket, n]
    parts = [ops.quantize_pack(x[a:b], bits, bucket, 5, offset + a) for a, b in pairwise(cuts)]
    assert same(torch.cat([p for p, _ in parts]), packed)
    assert same(torch.cat([s for _, s in parts]), scales)


def test_results_do_not_depend_on_the_number_of_threads(any_backend: str) -> None:
    x = values(300_000)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        packed, scales = ops.quantize_pack(x, 3, seed=4)
        out = ops.dequantize_accumulate(x.clone(), packed, scales, 3, 512, 0.7)
        results.append((packed, scales, ops.unpack(packed, 3, x.numel()), out))
    for other in results[1:]:
        assert all(same(a, b) for a, b in zip(results[0], other, strict=True))


def test_reference_in_chunks_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    select(monkeypatch, "reference")
    x = values(3000)
    whole = ops.quantize_pack(x, 5, 64, seed=1)
    monkeypatch.setattr(_reference, "CHUNK", 500)
    assert all(same(a, b) for a, b in zip(ops.quantize_pack(x, 5, 64, seed=1), whole, strict=True))


# ---- by hand ----


def test_four_bits_by_hand(any_backend: str) -> None:
    packed, scales = ops.quantize_pack(torch.tensor([1.0, -0.5, 0.25, 0.0, -1.0]), 4, 8, rounding="nearest")
    # levels 7, floor(-3.5 + 0.5) = -3, floor(1.75 + 0.5) = 2, 0, -7; codes 15, 5, 10, 8, 1
    assert packed.tolist() == [15 | 5 << 4, 10 | 8 << 4, 1]
    assert scales.tolist() == [float(np.float32(1) / np.float32(7))]


def test_one_bit_by_hand(any_backend: str) -> None:
    x = torch.tensor([1.0, -0.5, 0.25, -0.25, -0.0, 0.0, -1e-42, -2.0, 3.0])
    packed, scales = ops.quantize_pack(x, 1, 8, seed=1)
    assert packed.tolist() == [0b00110101, 1]
    assert scales.tolist() == [0.5, 3.0]  # the mean magnitudes
    assert ops.unpack_dequantize(packed, scales, 1, 8, 9).tolist() == [0.5, -0.5, 0.5, -0.5, 0.5, 0.5, -0.5, -0.5, 3.0]


def test_layout_is_numpys_little_bit_order(any_backend: str) -> None:
    codes = torch.tensor([5, 0, 7, 1, 2, 6, 3, 4, 5], dtype=torch.uint8)
    stream = np.array([[c >> i & 1 for i in range(3)] for c in codes.tolist()], dtype=np.uint8).reshape(-1)
    assert ops.pack(codes, 3).tolist() == np.packbits(stream, bitorder="little").tolist()
    assert ops.unpack(ops.pack(codes, 3), 3, 9).tolist() == codes.tolist()


@pytest.mark.parametrize("bits", BITS)
def test_edges_of_the_number_range(any_backend: str, bits: int) -> None:
    big, half = torch.finfo(torch.float32).max, 2 ** (bits - 1)
    bucket0 = [big, -big, big / 2, 0.0, -0.0, 1.0, -1e-45, big]
    bucket1 = [1e-45, -1e-40, 9e-31, 0.0, -0.0, 0.0, 0.0, 0.0]  # nowhere above 1e-30
    bucket2 = [1.1e-30, 0.0, 0.0, -1.1e-30, 0.0, 0.0, 0.0, 0.0]
    bucket3 = [1.0, math.inf, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    bucket4 = [1.0, 2.0, math.nan, 0.0, 0.0, 0.0, 0.0, -math.inf]
    bucket5 = [1.0, -1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    x = torch.tensor([bucket0, bucket1, bucket2, bucket3, bucket4, bucket5])
    packed, scales = ops.quantize_pack(x, bits, 8, seed=3)
    codes = ops.unpack(packed, bits, 48).reshape(6, 8).tolist()
    assert [math.isnan(s) for s in scales.tolist()] == [False, False, False, True, True, False]
    assert scales[1] == 0 and scales[2] > 0 and math.isfinite(scales[0])
    assert same(packed, reference_quantize(x, bits, 8, 3)[0])
    if bits > 1:
        assert codes[0][:2] == [2**bits - 1, 1] and codes[0][3:5] == [half, half]
        assert codes[1] == [half] * 8
        assert codes[2] == [2**bits - 1, half, half, 1, half, half, half, half]
    decoded = ops.unpack_dequantize(packed, scales, bits, 8, 48).reshape(6, 8)
    assert decoded[1].abs().max() == 0 and decoded[3:5].isnan().all() and decoded[5].tolist() == bucket5


@pytest.mark.parametrize("bits", [1, 4])
def test_the_zero_threshold_is_exact(any_backend: str, bits: int) -> None:
    """The largest magnitude that counts as zero is float32(1e-30); the next float does not."""
    at, above = np.float32(1e-30), np.nextafter(np.float32(1e-30), np.float32(1))
    x = torch.zeros(2, 8)
    x[0, 3], x[1, 3] = float(at), float(above)
    _, scales = ops.quantize_pack(x, bits, 8)
    expected = (
        above * (np.float32(1) / np.float32(7)) if bits == 4 else above * np.float32(2.0**-16) * np.float32(65536 / 8)
    )
    assert scales.tolist() == [0.0, float(expected)]


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float16, 65504.0), (torch.bfloat16, 3.3895313892515355e38)])
def test_half_precision_inputs_are_their_float32_values(any_backend: str, dtype: torch.dtype, largest: float) -> None:
    pattern = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = pattern[pattern.isfinite()]
    assert finite.float().abs().max() == largest
    for rounding in ops.ROUNDINGS:
        ours = ops.quantize_pack(finite, 4, 64, seed=2, rounding=rounding)
        assert all(
            same(a, b)
            for a, b in zip(ours, ops.quantize_pack(finite.float(), 4, 64, seed=2, rounding=rounding), strict=True)
        )


@pytest.mark.parametrize("bits", range(2, 9))
def test_nearest_is_within_half_a_step(any_backend: str, bits: int) -> None:
    x = gaussian(4096)
    packed, scales = ops.quantize_pack(x, bits, 512, rounding="nearest")
    error = (ops.unpack_dequantize(packed, scales, bits, 512, 4096) - x).abs() / scales.repeat_interleave(512)
    assert 0.45 < error.max() < 0.5001


def test_any_shape_and_stride(any_backend: str) -> None:
    base = values(1200).reshape(30, 40)
    strided = base.t()[::2]
    flat = strided.contiguous().reshape(-1)
    packed, scales = ops.quantize_pack(strided, 3, 64, seed=1)
    assert same(packed, ops.quantize_pack(flat, 3, 64, seed=1)[0])
    every_other = torch.stack((packed, packed), dim=1)[:, 0]
    assert not every_other.is_contiguous()
    assert same(
        ops.unpack_dequantize(every_other, scales, 3, 64, 600), ops.unpack_dequantize(packed, scales, 3, 64, 600)
    )
    out = torch.zeros(30, 40).t()
    ops.dequantize_accumulate(out[::2], packed, scales, 3, 64, 1.0)
    assert same(out[::2].reshape(-1), ops.unpack_dequantize(packed, scales, 3, 64, 600) + 0.0)
    assert out[1::2].abs().max() == 0
    leaf = torch.zeros(600, requires_grad=True)
    ops.dequantize_accumulate(leaf, packed, scales, 3, 64, 1.0)
    assert same(leaf.detach(), out[::2].reshape(-1)) and leaf.grad_fn is None


# ---- torch's own demands ----


def calls() -> Iterator[tuple[str, tuple]]:
    x = values(1000)
    packed, scales = ops.quantize_pack(x, 3, 64)
    codes = ops.unpack(packed, 3, 1000)
    weights = torch.tensor([0.5, -0.25], dtype=torch.float64, device="cpu")
    layout = ops.Layout([600, 0, 400], [3, 1, 5], [64, 8, 72])
    rows = [x[:600].view(20, 30), x[600:600], x[600:].to(torch.bfloat16)]
    table_packed, table_scales = ops.quantize_pack_table(x, layout)
    yield "pack", (codes, 3)
    yield "pack_out", (codes, 3, packed.clone())
    yield "unpack", (packed, 3, 1000)
    yield "unpack_out", (packed, 3, codes.clone())
    yield "quantize_pack", (x.to(torch.bfloat16), 3, 64, -5, 2**40, 1)
    yield "quantize_pack_out", (x, 3, 64, -5, 2**40, 2, packed.clone(), scales.clone())
    yield "unpack_dequantize", (packed, scales, 3, 64, 1000)
    yield "unpack_dequantize_out", (packed, scales, 3, 64, x.clone())
    yield "dequantize_accumulate_many", (x, [packed, packed], [scales, scales], [3, 3], 64, weights)
    yield "quantize_pack_table", ([x], layout.table, layout.num_bytes, layout.num_scales, -5, 1)
    yield "quantize_pack_table_out", (rows, layout.table, 5, 0, table_packed.clone(), table_scales.clone())
    yield "unpack_dequantize_table_out", (table_packed, table_scales, layout.table, [x.clone()])
    yield "dequantize_accumulate_table", (x, [table_packed], [table_scales], [layout.table], weights[:1])
    yield "rotate_", (x.clone(), layout.table, 64, 3, False)
    yield "symmetric_eigh", (torch.ones(2, 5, 5, dtype=torch.float64) + torch.eye(5, dtype=torch.float64),)
    yield "squared_norm", (x[:60].view(2, 5, 6),)
    yield from soft_support.calls()


@pytest.mark.parametrize(
    "backend", ["reference", "cpu-scalar", *(pytest.param(b, marks=pytest.mark.gpu) for b in ("cuda", "triton"))]
)
def test_opcheck(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    select(monkeypatch, backend)
    with torch.device("cuda" if backend in ("cuda", "triton") else "cpu"):
        cases = list(calls())
    assert {name for name, _ in cases} == {n.partition("::")[2].partition(".")[0] for n in registered()}
    for name, args in cases:
        result = torch.library.opcheck(getattr(torch.ops.dynfed_lightning, name).default, args)
        assert set(result.values()) == {"SUCCESS"}, (name, result)


def registered() -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return [n for n in names if n.startswith("dynfed_lightning::")]


def round_trip(x: Tensor, seed: int, offset: int) -> tuple[Tensor, Tensor, Tensor]:
    packed, scales = ops.quantize_pack(x * 2, 4, 64, seed=seed, offset=offset)
    out = torch.zeros_like(x)
    ops.dequantize_accumulate(out, packed, scales, 4, 64, 0.5)
    repacked = ops.pack(ops.unpack(packed, 4, x.numel()), 4)
    return out + 1, repacked, ops.unpack_dequantize(packed, scales, 4, 64, x.numel())


def test_compile_fullgraph_gives_the_same_and_does_not_recompile_for_seeds(any_backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(round_trip, fullgraph=True, backend="aot_eager")
    counts = []
    for i, n in enumerate((1000, 1000, 1000, 777, 513)):
        x = values(n, seed=i)
        for a, b in zip(compiled(x, 2**63 + i, 8 * i), round_trip(x, 2**63 + i, 8 * i), strict=True):
            assert same(a, b)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[-1] - counts[0] <= 3, f"a graph for every seed, offset or size: {counts}"
    assert counts[2] == counts[1]


def test_gradients_where_they_are_defined(any_backend: str) -> None:
    bits, bucket, n = 4, 8, 21
    packed, scales = ops.quantize_pack(values(n, seed=4), bits, bucket)
    level = ops.unpack(packed, bits, n).float() - 8
    scales.requires_grad_()
    weights = gaussian(n)
    (ops.unpack_dequantize(packed, scales, bits, bucket, n) * weights).sum().backward()
    want = torch.nn.functional.pad(level * weights, (0, 3)).view(3, 8).sum(dim=1)
    torch.testing.assert_close(scales.grad, want)

    for dtype in ops.INPUT_DTYPES:
        x = gaussian(n).to(dtype).requires_grad_()
        (ops.rotate(x, 16, 3) * weights).sum().backward()
        assert x.grad is not None and same(x.grad, ops.rotate(weights, 16, 3, inverse=True).to(dtype))
    with torch.no_grad():
        assert not ops.rotate(x, 16, 3).requires_grad
    assert not ops.quantize_pack(x, 4)[1].requires_grad


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own import
def test_forward_derivatives(any_backend: str) -> None:
    x, tangent = gaussian(40), gaussian(40, seed=1)
    y, dy = torch.func.jvp(lambda z: ops.rotate(z, 16, 3), (x,), (tangent,))
    assert same(y, ops.rotate(x, 16, 3)) and same(dy, ops.rotate(tangent, 16, 3))
    packed, scales = ops.quantize_pack(x, 4, 8)
    _, dy = torch.func.jvp(lambda s: ops.unpack_dequantize(packed, s, 4, 8, 40), (scales,), (tangent[:5],))
    assert same(dy, ops.unpack_dequantize(packed, tangent[:5].clone(), 4, 8, 40))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        assert same(torch.autograd.forward_ad.unpack_dual(ops.rotate(dual, 16, 3)).tangent, ops.rotate(tangent, 16, 3))


def test_autograd_notices_what_is_written(any_backend: str) -> None:
    """A backward pass that needs what an operation has overwritten fails, instead of using the new values."""
    packed, scales = ops.quantize_pack(gaussian(64), 4, 64)
    layout = ops.Layout([64], 4, 64)
    writers = [
        lambda o: ops.dequantize_accumulate(o, packed, scales, 4, 64, 0.5),
        lambda o: ops.dequantize_accumulate_table(o, [packed], [scales], [layout], [0.5]),
        lambda o: ops.unpack_dequantize(packed, scales, 4, 64, 64, out=o),
        lambda o: ops.unpack_dequantize_table(packed, scales, layout, out=o),
        lambda o: ops.unpack_dequantize_table(packed, scales, layout, out=[o]),
        lambda o: ops.rotate(gaussian(64), out=o),
        lambda o: ops.rotate(o, out=o),
        lambda o: ops.quantize_pack(gaussian(64 * 64), 4, 64, out=(torch.empty(2048, dtype=torch.uint8), o)),
    ]
    for write in writers:
        w, o = gaussian(64).requires_grad_(), gaussian(64)
        loss = (w * o).sum()
        write(o)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    codes, bytes_ = ops.unpack(packed, 4, 64), torch.zeros(32, dtype=torch.uint8)
    for write in (lambda: ops.pack(codes, 4, out=bytes_), lambda: ops.unpack(packed[:16], 4, 32, out=bytes_)):
        before = bytes_._version
        write()
        assert bytes_._version > before
    with torch.inference_mode():
        ops.dequantize_accumulate(gaussian(64), packed, scales, 4, 64, 0.5)


def test_compile_does_not_recompile_for_weights(any_backend: str) -> None:
    torch._dynamo.reset()
    packed, scales = ops.quantize_pack(values(200), 4, 64)

    def add(out: Tensor, weight: float) -> Tensor:
        return ops.dequantize_accumulate(out, packed, scales, 4, 64, weight)

    compiled = torch.compile(add, fullgraph=True, backend="aot_eager")
    for k in range(12):
        assert same(compiled(torch.zeros(200), 0.1 * (k + 1)), add(torch.zeros(200), 0.1 * (k + 1)))


def test_asking_for_huge_pages_changes_nothing_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs are touched before they are written: a buffer that exists keeps its contents until then."""
    select(monkeypatch, "cpu-scalar")
    x = torch.arange(1 << 22, dtype=torch.int32)
    for part in (x, x[1:], x[:3]):
        before = part.clone()
        torch.ops.dynfed_lightning_cpu.expect_writes(part)
        assert torch.equal(part, before)


def test_a_bucket_far_larger_than_the_vector(kernels: str) -> None:
    x = values(1000)
    packed, scales = ops.quantize_pack(x, 4, 2**31)
    assert all(same(a, b) for a, b in zip((packed, scales), reference_quantize(x, 4, 2**31), strict=True))
    assert same(
        ops.unpack_dequantize(packed, scales, 4, 2**31, 1000), reference_dequantize(packed, scales, 4, 2**31, 1000)
    )
    scales.requires_grad_()
    ops.unpack_dequantize(packed, scales, 4, 2**31, 1000).sum().backward()
    assert scales.grad is not None and scales.grad.shape == (1,)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inductor's own import
def test_compile_with_the_default_compiler() -> None:
    torch._dynamo.reset()
    x = values(1000)
    assert all(
        same(a, b) for a, b in zip(torch.compile(round_trip, fullgraph=True)(x, 1, 0), round_trip(x, 1, 0), strict=True)
    )


def test_shapes_beyond_32_bits_on_the_meta_device() -> None:
    n = 2**33 + 3
    packed, scales = ops.quantize_pack(torch.empty(n, device="meta"), 3)
    assert packed.shape == ((3 * n + 7) // 8,) and packed.dtype == torch.uint8
    assert scales.shape == (2**24 + 1,) and scales.dtype == torch.float32
    assert ops.unpack_dequantize(packed, scales, 3, 512, n).shape == (n,)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu-avx2", *(pytest.param(b, marks=pytest.mark.gpu) for b in ("cuda", "triton"))])
def test_indices_beyond_31_bits(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    select(monkeypatch, backend)
    with torch.device("cuda" if backend in ("cuda", "triton") else "cpu"):
        n = 2**31 + 512 + 5
        x = torch.zeros(n, dtype=torch.bfloat16)
        x[-517:] = values(517, torch.bfloat16)
        packed, scales = ops.quantize_pack(x, 4, 512, seed=1)
        tail, tail_scales = ops.quantize_pack(x[2**31 :].clone(), 4, 512, seed=1, offset=2**31)
        assert same(packed[2**30 :], tail) and same(scales[2**22 :], tail_scales)
        assert bool((packed[: 2**30] == 0x88).all())
        layout = ops.Layout([2**31, 517], 4)
        assert same(ops.quantize_pack_table(x, layout, seed=1)[0], packed)
        del x
        codes = ops.unpack(packed, 4, n)
        assert same(codes[2**31 :], ops.unpack(tail, 4, 517)) and same(ops.pack(codes, 4)[2**30 :], tail)
        del codes
        out = ops.dequantize_accumulate(torch.zeros(n), packed, scales, 4, 512, 0.5)
        assert same(out[2**31 :] * 2, ops.unpack_dequantize(tail, tail_scales, 4, 512, 517))
        assert float(out[: 2**31].abs().max()) == 0
