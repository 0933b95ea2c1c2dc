"""One call for a whole table of tensors: the bytes of a call per tensor, on every backend; and results in buffers that exist."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_support import (
    BACKENDS,
    KERNELS,
    backend_fixture,
    reference_accumulate,
    reference_dequantize,
    reference_quantize,
    same,
    values,
)
from torch import Tensor

from dynfed_lightning import ops

any_backend = backend_fixture(BACKENDS)
kernels = backend_fixture(KERNELS)

SIZES = [1000, 0, 10, 513, 1, 64, 7, 2048, 3]
BITS = [4, 2, 8, 3, 1, 5, 6, 7, 4]
BUCKETS = [512, 8, 8, 64, 512, 24, 8, 1032, 512]
FLAT = ops.Layout(SIZES, BITS, BUCKETS)
# Tensors in another order in memory, with gaps, at odd places, and random numbers that begin elsewhere.
SCATTERED = ops.Layout(
    SIZES,
    BITS,
    BUCKETS,
    starts=[2700, 0, 3703, 1, 515, 517, 582, 590, 2640],
    offsets=[8 * k * 2**33 for k in range(len(SIZES))],
)


def pieces(x: Tensor, layout: ops.Layout) -> list[Tensor]:
    return [x[s : s + n] for s, n in zip(layout.starts, layout.sizes, strict=True)]


def one_by_one(tensors: list[Tensor], layout: ops.Layout, seed: int, rounding: str) -> tuple[Tensor, Tensor]:
    parts = [
        reference_quantize(t, b, k, seed, o, rounding)
        for t, b, k, o in zip(tensors, layout.bits, layout.bucket, layout.offsets, strict=True)
    ]
    return torch.cat([p for p, _ in parts]), torch.cat([s for _, s in parts])


def test_layout_by_hand() -> None:
    layout = ops.Layout([1000, 10, 0, 5], [4, 8, 1, 3], [512, 8, 8, 8])
    assert layout.table.tolist() == [
        [0, 1000, 4, 512, 0, 0, 0],
        [1000, 10, 8, 8, 1000, 500, 2],
        [1010, 0, 1, 8, 1016, 510, 4],
        [1010, 5, 3, 8, 1016, 510, 4],
    ]
    assert (layout.numel, layout.num_bytes, layout.num_scales, layout.largest_bucket, len(layout)) == (
        1015,
        512,
        5,
        512,
        4,
    )
    assert ops.Layout([], 4).table.shape == (0, 7)
    assert layout.agrees(ops.Layout([1000, 10, 0, 5], 2, [512, 8, 8, 8])) and not layout.agrees(ops.Layout([1015], 4))
    assert "4 tensors, 1015 values, 512 bytes, 5 scales" in repr(layout)


@pytest.mark.parametrize("rounding", ops.ROUNDINGS)
@pytest.mark.parametrize("layout", [FLAT, SCATTERED], ids=["flat", "scattered"])
def test_a_table_is_a_call_per_tensor(kernels: str, layout: ops.Layout, rounding: str) -> None:
    x = values(layout.numel + 5)
    packed, scales = ops.quantize_pack_table(x, layout, 77, rounding)
    want_packed, want_scales = one_by_one(pieces(x, layout), layout, 77, rounding)
    assert same(packed, want_packed) and same(scales, want_scales)

    out = torch.full_like(x, 3.0)
    assert ops.unpack_dequantize_table(packed, scales, layout, out=out) is out
    want = torch.full((x.numel(),), 3.0, device="cpu")
    for row, piece in zip(layout.table.tolist(), pieces(want, layout), strict=True):
        _, n, bits, bucket, _, byte, scale = row
        p, s = want_packed[byte:][: ops.packed_size(n, bits)], want_scales[scale:][: ops.num_buckets(n, bucket)]
        piece.copy_(reference_dequantize(p, s, bits, bucket, n))
    assert same(out, want)
    fresh = ops.unpack_dequantize_table(packed, scales, layout)
    inside = torch.zeros(x.numel(), dtype=torch.bool, device="cpu")
    for piece in pieces(inside, layout):
        piece.fill_(True)
    assert same(fresh, torch.where(inside, want, 0.0)[: layout.numel])


@pytest.mark.parametrize(
    "dtypes", [[torch.float32], [torch.bfloat16], [torch.float16, torch.float32, torch.bfloat16]], ids=str
)
def test_tensors_on_their_own_give_the_same_bytes(kernels: str, dtypes: list[torch.dtype]) -> None:
    tensors = [values(n, dtypes[i % len(dtypes)], seed=n) for i, n in enumerate(SIZES)]
    tensors[0] = tensors[0].view(10, 100).t().contiguous().t()  # not contiguous: taken in row-major order
    packed, scales = ops.quantize_pack_table(tensors, SCATTERED, 5)
    want_packed, want_scales = one_by_one([t.contiguous() for t in tensors], SCATTERED, 5, "stochastic")
    assert same(packed, want_packed) and same(scales, want_scales)
    out = [torch.empty(t.shape) for t in tensors]
    assert ops.unpack_dequantize_table(packed, scales, FLAT, out=out) is out
    flat = ops.unpack_dequantize_table(packed, scales, FLAT)
    assert same(torch.cat([t.reshape(-1) for t in out]), flat)


def test_a_table_of_one_tensor_that_begins_elsewhere(any_backend: str) -> None:
    layout, x = ops.Layout([70], 4, 8, starts=[5]), values(75)
    packed, scales = ops.quantize_pack_table(x, layout)
    assert same(packed, ops.quantize_pack_table([x[5:]], layout)[0])
    assert same(packed, ops.quantize_pack(x[5:], 4, 8)[0])
    (alone,) = ops.unpack_dequantize_table(packed, scales, layout, out=[torch.empty(70)])
    flat = ops.unpack_dequantize_table(packed, scales, layout)
    assert same(flat[5:], alone) and flat[:5].abs().max() == 0


def test_empty_tables(any_backend: str) -> None:
    for layout in (ops.Layout([], 4), ops.Layout([0, 0], 4)):
        packed, scales = ops.quantize_pack_table(torch.zeros(0), layout)
        assert packed.numel() == scales.numel() == 0
        assert ops.unpack_dequantize_table(packed, scales, layout).numel() == 0
        total = torch.ones(3)
        ops.dequantize_accumulate_table(total, [packed], [scales], [layout], [1.0])
        assert total.tolist() == [1.0] * 3
        assert ops.rotate(torch.zeros(0), layout=layout).numel() == 0


@pytest.mark.parametrize("starts", [None, SCATTERED.starts], ids=["flat", "scattered"])
def test_clients_with_their_own_bits_for_each_tensor(kernels: str, starts: tuple[int, ...] | None) -> None:
    layouts = [ops.Layout(SIZES, [1 + (i + k) % 8 for i in range(len(SIZES))], BUCKETS, starts) for k in range(5)]
    payloads = [ops.quantize_pack_table(values(layouts[0].numel, seed=k), la, k) for k, la in enumerate(layouts)]
    weights = [0.5, -0.25, 1e-3, 3.0, 1 / 3]
    out = values(layouts[0].numel, seed=9)
    want = out.cpu().clone()
    for (packed, scales), layout, weight in zip(payloads, layouts, weights, strict=True):
        for (_, n, bits, bucket, _, byte, scale), piece in zip(
            layout.table.tolist(), pieces(want, layout), strict=True
        ):
            p, s = packed[byte:][: ops.packed_size(n, bits)], scales[scale:][: ops.num_buckets(n, bucket)]
            piece.copy_(reference_accumulate(piece, [p], [s], [bits], bucket, [weight]))
    packed, scales = [p for p, _ in payloads], [s for _, s in payloads]
    assert ops.dequantize_accumulate_table(out, packed, scales, layouts, weights) is out
    assert same(out, want)


@given(
    rows=st.lists(
        st.tuples(st.integers(0, 700), st.integers(1, 8), st.integers(1, 70).map(lambda k: 8 * k)), max_size=40
    ),
    seed=st.integers(0, 2**64 - 1),
    rounding=st.sampled_from(ops.ROUNDINGS),
)
@settings(max_examples=60)
def test_any_table(rows: list[tuple[int, int, int]], seed: int, rounding: str) -> None:
    """On this machine's best kernels."""
    sizes, bits, buckets = ([r[i] for r in rows] for i in range(3))
    layout = ops.Layout(sizes, bits, buckets)
    x = values(layout.numel, seed=len(rows))
    packed, scales = ops.quantize_pack_table(x, layout, seed, rounding)
    if rows:
        want_packed, want_scales = one_by_one(
            pieces(x, layout), layout, seed if seed < 2**63 else seed - 2**64, rounding
        )
        assert same(packed, want_packed) and same(scales, want_scales)
    decoded = ops.unpack_dequantize_table(packed, scales, layout)
    total = ops.dequantize_accumulate_table(torch.zeros_like(decoded), [packed], [scales], [layout], [1.0])
    assert same(total, decoded + 0.0)


def test_the_number_of_threads_does_not_matter_for_tables(any_backend: str) -> None:
    layout = ops.Layout([50_000, 3, 120_001, 40, 70_000], [3, 8, 4, 1, 5])
    x, results = values(layout.numel), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        packed, scales = ops.quantize_pack_table(x, layout, 4)
        total = ops.dequantize_accumulate_table(x.clone(), [packed] * 3, [scales] * 3, [layout] * 3, [0.1, 0.2, 0.3])
        results.append((packed, scales, ops.unpack_dequantize_table(packed, scales, layout), total, ops.rotate(x)))
    for other in results[1:]:
        assert all(same(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_wrong_table_does_not_touch_foreign_memory(kernels: str) -> None:
    """Called around ops.py."""
    table, operators = FLAT.table, torch.ops.dynfed_lightning
    x = values(FLAT.numel)
    packed, scales = ops.quantize_pack_table(x, FLAT)
    for column, value in (
        (0, FLAT.numel),
        (1, 10**9),
        (2, 9),
        (3, 12),
        (5, FLAT.num_bytes),
        (6, FLAT.num_scales),
        (0, -1),
        (5, -1),
    ):
        wrong = table.clone()
        wrong[3, column] = value
        for call in (
            lambda t: operators.quantize_pack_table([x], t, FLAT.num_bytes, FLAT.num_scales, 0, 1),
            lambda t: operators.unpack_dequantize_table_out(packed, scales, t, [x.clone()]),
            lambda t: operators.dequantize_accumulate_table(x.clone(), [packed], [scales], [t], [1.0]),
        ):
            with pytest.raises((RuntimeError, ValueError), match="Expected"):
                call(wrong)
    with pytest.raises((RuntimeError, ValueError), match="Expected"):
        wrong = table.clone()
        wrong[0, 1] = FLAT.numel + 1
        operators.rotate_(x.clone(), wrong, 64, 0, False)


# ---- buffers that exist ----


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_results_in_buffers_that_exist(any_backend: str, bits: int) -> None:
    x, n = values(1001), 1001
    fresh = ops.quantize_pack(x, bits, 64, seed=3)
    out = torch.full((fresh[0].numel(),), 0xFF, dtype=torch.uint8), torch.full((fresh[1].numel(),), 9.0)
    assert ops.quantize_pack(x, bits, 64, seed=3, out=out) is out
    assert all(same(a, b) for a, b in zip(out, fresh, strict=True))
    codes = torch.full((7, 143), 0xFF, dtype=torch.uint8)
    assert ops.unpack(out[0], bits, n, out=codes) is codes
    assert same(codes.view(-1), ops.unpack(out[0], bits, n))
    again = torch.full((fresh[0].numel(),), 0xFF, dtype=torch.uint8)
    assert ops.pack(codes, bits, out=again) is again and same(again, out[0])
    decoded = torch.full((n,), 9.0)
    assert ops.unpack_dequantize(*out, bits, 64, n, out=decoded) is decoded
    assert same(decoded, ops.unpack_dequantize(*out, bits, 64, n))


def table_round_trip(x: Tensor, layout: ops.Layout) -> tuple[Tensor, Tensor]:
    packed, scales = ops.quantize_pack_table(ops.rotate(x, 64, 3, layout=layout), layout, 5, "eden")
    out = ops.unpack_dequantize_table(packed, scales, layout)
    total = ops.dequantize_accumulate_table(torch.ones_like(x), [packed], [scales], [layout], [0.5])
    return ops.rotate(out, 64, 3, layout=layout, inverse=True), ops.rotate(total + 1)


def test_compile_fullgraph(any_backend: str) -> None:
    torch._dynamo.reset()
    x = values(FLAT.numel)
    compiled = torch.compile(table_round_trip, fullgraph=True, backend="aot_eager")
    assert all(same(a, b) for a, b in zip(compiled(x, FLAT), table_round_trip(x, FLAT), strict=True))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # what torch.compile itself does
def test_compile_with_gradients() -> None:
    torch._dynamo.reset()
    packed, scales = ops.quantize_pack(values(40), 4, 8)

    def loss(x: Tensor, scales: Tensor) -> Tensor:
        return (ops.rotate(x, 16, 3) * ops.unpack_dequantize(packed, scales, 4, 8, 40)).sum()

    grads = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x, s = values(40, seed=1).requires_grad_(), scales.clone().requires_grad_()
        grads.append(torch.autograd.grad(f(x, s), (x, s)))
    assert all(same(a, b) and float(a.abs().max()) > 0 for a, b in zip(*grads, strict=True))


def test_tables_on_the_meta_device() -> None:
    layout = ops.Layout([2**33, 5], [3, 4])
    packed, scales = ops.quantize_pack_table(torch.empty(layout.numel, device="meta"), layout)
    assert packed.shape == (3 * 2**30 + 3,) and scales.shape == (2**24 + 1,)
    assert packed.device.type == "meta" and ops.unpack_dequantize_table(packed, scales, layout).shape == (2**33 + 5,)
