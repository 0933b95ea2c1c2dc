"""What is particular to the CUDA kernels on a GPU: the current stream, CUDA graphs, more than 2**31 elements.

That every operation returns the reference's bits is tested with all backends together; these tests compare with the CUDA kernels
themselves or with values known beforehand.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ops_support import same, values
from torch import Tensor

from dynfed_lightning import _ops_cuda as cuda
from dynfed_lightning import _reference as reference

pytestmark = pytest.mark.gpu

NEAREST, STOCHASTIC, EDEN = 0, 1, 2
N, BUCKET = 1 << 20, 512
LENGTHS, WIDTHS = [432, 10, 2304, 64, 9216, 1, 100_000], [4, 8, 2, 3, 1, 5, 6]


@pytest.fixture(autouse=True)
def kernels() -> None:
    reason = cuda.available()
    if reason:
        pytest.skip(reason)


def table() -> Tensor:
    rows, start, offset, at, scale_at = [], 0, 0, 0, 0
    for n, b in zip(LENGTHS, WIDTHS, strict=True):
        rows.append((start, n, b, BUCKET, offset, at, scale_at))
        start, offset = start + n, offset + (n + 7) // 8 * 8
        at, scale_at = at + (n * b + 7) // 8, scale_at + (n + BUCKET - 1) // BUCKET
    return torch.tensor(rows, dtype=torch.int64)


def payload_for(n: int, bits: int, bucket: int = BUCKET) -> tuple[Tensor, Tensor]:
    device = torch.device("cuda")
    packed = torch.zeros((n * bits + 7) // 8, dtype=torch.uint8, device=device)
    return packed, torch.zeros((n + bucket - 1) // bucket, device=device)


def table_payload() -> tuple[Tensor, Tensor]:
    last = reference.rows(table())[-1]
    size = last.bytes_at + (last.length * last.bits + 7) // 8
    scales = last.scales_at + (last.length + BUCKET - 1) // BUCKET
    return torch.zeros(size, dtype=torch.uint8, device="cuda"), torch.zeros(scales, device="cuda")


Step = Callable[[], None]


def quantize(x: Tensor) -> tuple[Step, list[Tensor]]:
    packed, scales = payload_for(x.numel(), 4)
    return lambda: cuda.quantize_pack(x, 4, BUCKET, 7, 0, STOCHASTIC, packed, scales), [packed, scales]


def round_trip(x: Tensor) -> tuple[Step, list[Tensor]]:
    packed, scales = payload_for(x.numel(), 5)
    out = torch.zeros_like(x)

    def step() -> None:
        cuda.quantize_pack(x, 5, BUCKET, 7, 0, EDEN, packed, scales)
        cuda.unpack_dequantize(packed, scales, 5, BUCKET, out)

    return step, [packed, scales, out]


def accumulate(x: Tensor) -> tuple[Step, list[Tensor]]:
    clients = [payload_for(x.numel(), bits) for bits in (2, 4, 7)]
    out = torch.zeros_like(x)

    def step() -> None:
        out.zero_()
        for (packed, scales), bits in zip(clients, (2, 4, 7), strict=True):
            cuda.quantize_pack(x, bits, BUCKET, bits, 0, STOCHASTIC, packed, scales)
        packed_of, scales_of = [p for p, _ in clients], [s for _, s in clients]
        cuda.accumulate(out, packed_of, scales_of, [2, 4, 7], BUCKET, [0.5, 0.25, 0.25])

    return step, [out]


def tables(x: Tensor) -> tuple[Step, list[Tensor]]:
    rows, flat = table(), x[: sum(LENGTHS)]
    packed, scales = table_payload()
    out, total = torch.zeros_like(flat), torch.zeros_like(flat)

    def step() -> None:
        total.zero_()
        cuda.quantize_pack_table([flat], rows, 3, STOCHASTIC, packed, scales)
        cuda.unpack_dequantize_table(packed, scales, rows, [out])
        cuda.accumulate_table(total, [packed, packed], [scales, scales], [rows, rows], [0.75, 0.25])

    return step, [packed, scales, out, total]


def rotation(x: Tensor) -> tuple[Step, list[Tensor]]:
    rows, out = table(), torch.zeros(sum(LENGTHS), device=x.device)

    def step() -> None:
        out.copy_(x[: out.numel()])
        cuda.rotate(out, rows, 1024, 5, False)

    return step, [out]


STEPS = [quantize, round_trip, accumulate, tables, rotation]


@pytest.mark.parametrize("make", STEPS)
def test_a_graph_replays_what_eager_computes(make: Callable[[Tensor], tuple[Step, list[Tensor]]]) -> None:
    x = values(N).cuda()
    step, outputs = make(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a warm-up, as torch asks for before a capture
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed in (1, 2):
        x.copy_(values(N, seed=seed).cuda())
        for t in outputs:
            t.fill_(77)
        graph.replay()
        replayed = [t.clone() for t in outputs]
        for t in outputs:
            t.fill_(77)
        step()
        torch.cuda.synchronize()
        assert all(same(a, b) for a, b in zip(replayed, outputs, strict=True))


@pytest.mark.parametrize("make", STEPS)
def test_work_on_another_stream_waits_for_what_was_put_there_before(
    make: Callable[[Tensor], tuple[Step, list[Tensor]]],
) -> None:
    """The stream is busy while the operation is launched: on any other stream it would read the old values."""
    x, new = torch.zeros(N, device="cuda"), values(N, seed=4).cuda()
    step, outputs = make(x)
    x.copy_(new)
    step()
    expected = [t.clone() for t in outputs]
    x.zero_()
    after = [torch.empty_like(t) for t in outputs]  # to allocate while the stream sleeps might wait for it
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(500_000_000)  # about a quarter of a second
        x.copy_(new)
        step()
        for copy, output in zip(after, outputs, strict=True):
            copy.copy_(output)
    assert not side.query()  # it was still asleep when everything had been launched
    side.synchronize()
    assert all(same(a, b) for a, b in zip(after, expected, strict=True))


def test_pack_within_a_capture_looks_at_nothing() -> None:
    codes = torch.randint(0, 16, (10_001,), dtype=torch.uint8, device="cuda")
    packed, _ = payload_for(10_001, 4)
    seen = cuda.pack(codes, 4, packed)
    assert seen is not None and seen < 16
    assert (cuda.pack(codes + 16, 4, packed) or 0) >= 16
    expected = torch.zeros_like(packed)
    reference.pack(codes, 4, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inside = cuda.pack(codes, 4, packed)
    assert inside is None
    packed.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(packed, expected)


def test_the_current_device_is_left_as_it_was() -> None:
    with torch.cuda.device(torch.cuda.device_count() - 1):
        step, _ = quantize(values(N).cuda())
    before = torch.cuda.current_device()
    step()
    assert torch.cuda.current_device() == before


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    """Beyond 2**31 the values, and thus the codes, are those of the same global indices taken alone."""
    n, bits, tail = (1 << 31) + 1001, 3, 100_003
    if torch.cuda.mem_get_info()[0] < 2.5 * 4 * n:
        pytest.skip("needs 22 GB of GPU memory")
    x = torch.zeros(n, device="cuda")
    start = (n - tail) // BUCKET * BUCKET
    x[start:] = values(n - start).cuda()
    packed, scales = payload_for(n, bits)
    cuda.quantize_pack(x, bits, BUCKET, 11, 0, STOCHASTIC, packed, scales)
    alone = payload_for(n - start, bits)
    cuda.quantize_pack(x[start:], bits, BUCKET, 11, start, STOCHASTIC, *alone)
    assert torch.equal(packed[start * bits // 8 :], alone[0]) and same(scales[start // BUCKET :], alone[1])
    expected = torch.zeros(n - start, device="cuda")
    cuda.unpack_dequantize(*alone, bits, BUCKET, expected)
    cuda.unpack_dequantize(packed, scales, bits, BUCKET, x)
    assert same(x[start:], expected)
    cuda.accumulate(x, [packed], [scales], [bits], BUCKET, [0.3])
    cuda.accumulate(expected, [alone[0]], [alone[1]], [bits], BUCKET, [0.3])
    assert same(x[start:], expected)
    codes = torch.zeros(n, dtype=torch.uint8, device="cuda")
    again = torch.zeros_like(packed)
    cuda.unpack(packed, bits, codes)
    assert (cuda.pack(codes, bits, again) or 0) < 1 << bits
    assert torch.equal(again, packed)
