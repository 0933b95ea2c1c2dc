"""What is particular to Triton on a real GPU: CUDA graphs, streams, and that compiling and uploading happen once."""

from __future__ import annotations

import pytest
import torch
from ops_support import same, values
from torch import Tensor

from dynfed_lightning import _ops_triton as triton_ops
from dynfed_lightning import _reference as reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(triton_ops.interpreted(), reason="the interpreter is not the GPU"),
]

N, BUCKET, BITS, SEED = 100_003, 512, 4, 2**63 + 5
TABLE = [
    [0, 60_000, 4, 512, 0, 0, 0],
    [60_001, 10, 3, 512, 60_000, 30_000, 118],
    [60_011, 39_992, 6, 64, 60_016, 30_004, 119],
]


@pytest.fixture(autouse=True)
def usable() -> None:
    if triton_ops.available():
        pytest.skip(str(triton_ops.available()))


class Round:
    """Every operation but `pack` once, in buffers that exist beforehand, as the capture of a graph needs them."""

    def __init__(self, device: str) -> None:
        self.x = values(N, seed=1).to(device)
        self.table = torch.tensor(TABLE, dtype=torch.int64)
        self.packed = torch.zeros((N * BITS + 7) // 8, dtype=torch.uint8, device=device)
        self.scales = torch.zeros((N + BUCKET - 1) // BUCKET, device=device)
        self.codes = torch.zeros(N, dtype=torch.uint8, device=device)
        self.values = torch.zeros(N, device=device)
        self.total = torch.zeros(N, device=device)
        self.packed_rows = torch.zeros(59_998, dtype=torch.uint8, device=device)
        self.scales_rows = torch.zeros(744, device=device)
        self.values_rows = torch.zeros(N, device=device)
        self.rotated = torch.zeros(N, device=device)

    def run(self, ops) -> None:
        ops.quantize_pack(self.x, BITS, BUCKET, SEED, 16, reference.STOCHASTIC, self.packed, self.scales)
        ops.unpack(self.packed, BITS, self.codes)
        ops.unpack_dequantize(self.packed, self.scales, BITS, BUCKET, self.values)
        ops.accumulate(self.total, [self.packed] * 3, [self.scales] * 3, [BITS] * 3, BUCKET, [0.5, 0.25, -0.1])
        ops.quantize_pack_table([self.x], self.table, SEED, reference.EDEN, self.packed_rows, self.scales_rows)
        ops.unpack_dequantize_table(self.packed_rows, self.scales_rows, self.table, [self.values_rows])
        ops.accumulate_table(self.total, [self.packed_rows] * 2, [self.scales_rows] * 2, [self.table] * 2, [0.5, 0.25])
        self.rotated.copy_(self.x)
        ops.rotate(self.rotated, self.table, 1024, SEED, False)

    def results(self) -> list[Tensor]:
        outputs = self.packed, self.scales, self.codes, self.values, self.total
        return [t.cpu() for t in (*outputs, self.packed_rows, self.scales_rows, self.values_rows, self.rotated)]


@pytest.fixture(scope="module")
def expected() -> list[Tensor]:
    on_cpu = Round("cpu")
    on_cpu.run(reference)
    return on_cpu.results()


def equal(round_: Round, expected: list[Tensor]) -> bool:
    return all(same(a, b) for a, b in zip(round_.results(), expected, strict=True))


def test_a_round_is_the_reference(expected: list[Tensor]) -> None:
    on_gpu = Round("cuda")
    on_gpu.run(triton_ops)
    assert equal(on_gpu, expected)


def test_on_another_stream(expected: list[Tensor]) -> None:
    """The kernels run on torch's current stream: they wait for what it does before."""
    on_gpu = Round("cuda")
    x = on_gpu.x.clone()
    on_gpu.x.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # some 50 ms, in which the wrong stream would find zeros
        on_gpu.x.copy_(x)
        on_gpu.run(triton_ops)
    stream.synchronize()
    assert equal(on_gpu, expected)


def test_in_a_cuda_graph(expected: list[Tensor]) -> None:
    """After one ordinary run, in which Triton compiles and the tables' tiles are uploaded, everything can be captured."""
    on_gpu = Round("cuda")
    x = on_gpu.x.clone()
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        on_gpu.run(triton_ops)
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        on_gpu.run(triton_ops)
    for factor in (0.5, 1.0):
        on_gpu.x.copy_(x * factor)
        on_gpu.total.zero_()
        for buffer in (on_gpu.packed, on_gpu.scales, on_gpu.values, on_gpu.packed_rows, on_gpu.rotated):
            buffer.fill_(7)
        graph.replay()
    torch.cuda.synchronize()
    assert equal(on_gpu, expected)


def test_pack_in_a_cuda_graph() -> None:
    """While capturing nobody can look at the codes."""
    codes = torch.randint(0, 16, (N,), dtype=torch.uint8, device="cuda")
    packed = torch.zeros((N + 1) // 2, dtype=torch.uint8, device="cuda")
    assert triton_ops.pack(codes, 4, packed) == 0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert triton_ops.pack(codes, 4, packed) is None
    codes.fill_(5)
    graph.replay()
    torch.cuda.synchronize()
    assert bool((packed[:-1] == 0x55).all()) and int(packed[-1]) == 5
    codes[-1] = 16
    assert triton_ops.pack(codes, 4, packed) == 16


def test_values_compile_nothing_new() -> None:
    """Another size, seed, offset or weight meets compiled kernels."""
    from dynfed_lightning.kernels.accumulate import accumulate_kernel
    from dynfed_lightning.kernels.quantize_pack import quantize_pack_kernel

    def use(n: int, seed: int, offset: int, weight: float) -> None:
        packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device="cuda")
        scales = torch.empty((n + 511) // 512, device="cuda")
        x = torch.rand(n, device="cuda")
        triton_ops.quantize_pack(x, 4, 512, seed, offset, reference.STOCHASTIC, packed, scales)
        triton_ops.accumulate(x, [packed], [scales], [4], 512, [weight])

    def compiled() -> int:
        device = torch.cuda.current_device()
        return sum(len(kernel.device_caches[device][0]) for kernel in (accumulate_kernel, quantize_pack_kernel))

    use(1000, 0, 0, 1.0)
    before = compiled()
    for n, seed, offset, weight in (
        (1, 1, 8, 0.0),
        (2**20, -1, 2**61, 0.3),
        (4096, 2**40, 16, -1.0),
        (777, 16, 2**32, 2.0),
    ):
        use(n, seed, offset, weight)
    assert compiled() == before


def test_more_values_than_32_bits_count() -> None:
    """Values beyond index 2**31, codes beyond byte 2**31: the end of a long vector is what a short one at its offset gives."""
    n, tail, bits = 2**31 + 2**21 + 5, 2**20 + 5, 8
    free, _ = torch.cuda.mem_get_info()
    if free < 24 * n // 2:
        pytest.skip(f"needs {24 * n // 2 >> 30} GiB of free GPU memory")
    x = torch.zeros(n, device="cuda")
    x[-tail:] = torch.randn(tail, device="cuda")
    packed = torch.empty(n, dtype=torch.uint8, device="cuda")
    scales = torch.empty((n + 511) // 512, device="cuda")
    triton_ops.quantize_pack(x, bits, 512, SEED, 0, reference.STOCHASTIC, packed, scales)
    end = x[-tail:].cpu()
    want_packed, want_scales = torch.zeros(tail, dtype=torch.uint8), torch.zeros((tail + 511) // 512)
    reference.quantize_pack(end, bits, 512, SEED, n - tail, reference.STOCHASTIC, want_packed, want_scales)
    assert (n - tail) % 512 == 0
    assert same(packed[-tail:].cpu(), want_packed) and same(scales[-want_scales.numel() :].cpu(), want_scales)
    triton_ops.unpack_dequantize(packed, scales, bits, 512, x)
    want = torch.zeros(tail)
    reference.unpack_dequantize(want_packed, want_scales, bits, 512, want)
    assert same(x[-tail:].cpu(), want)
    triton_ops.accumulate(x, [packed], [scales], [bits], 512, [1.0])
    reference.accumulate(want, [want_packed], [want_scales], [bits], 512, [1.0])
    assert same(x[-tail:].cpu(), want)
