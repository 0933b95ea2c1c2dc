"""What Triton makes of the kernels, without a GPU: they compile, spill nothing, and move 16 bytes at a time.

`launched` replaces Triton's driver by one that knows only a GPU's architecture, so that every kernel is compiled exactly as its
launcher calls it, and nothing runs. Passing says that a kernel may work on a GPU, not that it does.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dynfed_lightning import _ops_triton as triton_ops
from dynfed_lightning import _reference as reference

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(triton_ops.interpreted(), reason="the interpreter compiles nothing")

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Driver:
    """As much of a driver as compiling needs."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


Launched = Callable[[], list[Any]]


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def launched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Launched:
    """A function that returns the compiled kernels of all launches since it was last called."""
    from triton.runtime.jit import JITFunction

    kernels = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        assert kwargs["enable_fp_fusion"] is False
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver(request.param))
    monkeypatch.setattr(JITFunction, "run", compile_only)

    def taken() -> list[Any]:
        result = kernels[:]
        kernels.clear()
        return result

    return taken


def tool(name: str, *arguments: str | Path) -> str:
    path = BIN / name
    if not path.exists():
        pytest.skip(f"this triton comes without {name}")
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


class Code:
    """A kernel's resources and instructions."""

    def __init__(self, kernel: Any, folder: Path) -> None:
        cubin = folder / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", tool("cuobjdump", "-res-usage", cubin))
        assert usage is not None
        self.registers, self.stack, self.shared, self.local = map(int, usage.groups())
        lines = tool("nvdisasm", "-c", cubin).splitlines()
        found = [re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]*)", line) for line in lines]
        self.instructions = Counter(m[1] for m in found if m)

    def count(self, pattern: str) -> int:
        return sum(n for name, n in self.instructions.items() if re.fullmatch(pattern, name))

    def check(self, registers: int, instructions: int) -> None:
        """No spills, no stack, few enough registers, and so many instructions in all."""
        assert (self.stack, self.local, self.count("LDL.*|STL.*")) == (0, 0, 0)
        assert self.registers <= registers
        assert sum(self.instructions.values()) <= instructions


N = 1 << 20


def floats(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(n, dtype=dtype)


def codes(n: int) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.uint8)


def scales(n: int) -> torch.Tensor:
    return torch.zeros((n + 511) // 512)


# ---- the kernels that matter most. A thread has 32 values of a tile. The bounds are what was measured with triton 3.6 and 3.9
# plus a tenth; instructions include the slow way at a vector's end and the division of denormals, which few threads take. ----


def test_quantize_pack(launched: Launched, tmp_path: Path) -> None:
    """Stochastic 4 bits of float32, bucket 512: 64 registers with triton 3.9, 80 with 3.6, leave 24 warps to a multiprocessor."""
    triton_ops.quantize_pack(floats(N), 4, 512, 1, 0, reference.STOCHASTIC, codes(N // 2), scales(N))
    (kernel,) = launched()
    code = Code(kernel, tmp_path)
    code.check(registers=88, instructions=1300)
    assert code.count(r"LDG\.E\.128.*") == 8  # all 32 values of a thread
    assert code.count(r"STG\.E\.128.*") == 1  # all 16 bytes of them
    assert code.count(r"F2I.*") == 32


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_quantize_pack_of_half_precision(launched: Launched, tmp_path: Path, dtype: torch.dtype) -> None:
    triton_ops.quantize_pack(floats(N, dtype), 4, 512, 1, 0, reference.STOCHASTIC, codes(N // 2), scales(N))
    (kernel,) = launched()
    code = Code(kernel, tmp_path)
    code.check(registers=96, instructions=1400)
    assert code.count(r"LDG\.E\.64.*") == 8
    assert code.count(r"STG\.E\.128.*") == 1


def test_unpack_dequantize(launched: Launched, tmp_path: Path) -> None:
    triton_ops.unpack_dequantize(codes(N // 2), scales(N), 4, 512, floats(N))
    (kernel,) = launched()
    code = Code(kernel, tmp_path)
    code.check(registers=88, instructions=900)
    assert code.count(r"STG\.E\.128.*") == 8


@pytest.mark.parametrize("bits", [[4] * 8, [2, 3, 4, 5, 6, 2, 4, 6]], ids=["4", "2-to-6"])
def test_accumulate(launched: Launched, tmp_path: Path, bits: list[int]) -> None:
    """Eight clients in one launch: `out` is read and written once."""
    triton_ops.accumulate(floats(N), [codes(N * b // 8) for b in bits], [scales(N)] * 8, bits, 512, [0.5] * 8)
    (kernel,) = launched()
    code = Code(kernel, tmp_path)
    code.check(registers=184, instructions=4200)
    assert (code.count(r"LDG\.E\.128.*"), code.count(r"STG\.E\.128.*")) == (4, 4)  # 16 values a thread


def test_pack_and_unpack(launched: Launched, tmp_path: Path) -> None:
    triton_ops.pack(codes(N), 4, codes(N // 2))
    triton_ops.unpack(codes(N // 2), 4, codes(N))
    pack, unpack = launched()
    code = Code(pack, tmp_path)
    code.check(registers=64, instructions=700)
    assert code.count(r"LDG\.E") == 8  # four codes each
    assert code.count(r"STG\.E\.128.*") == 1
    code = Code(unpack, tmp_path)
    code.check(registers=64, instructions=700)
    assert code.count(r"STG\.E") == 8  # four codes each


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("block", [1024, 8192])
def test_rotate(launched: Launched, tmp_path: Path, block: int, inverse: bool) -> None:
    """16 values a thread. Triton 3.6 reads and writes them one by one: it gives the load the layout of the first butterfly."""
    old = triton.__version__.startswith("3.6.")
    if old and inverse and block == 8192:
        pytest.skip("spills 72 bytes with triton 3.6")
    table = torch.tensor([[0, N, 4, 512, 0, 0, 0]])
    triton_ops.rotate(floats(N), table, block, 1, inverse)
    (kernel,) = launched()
    code = Code(kernel, tmp_path)
    code.check(registers=200, instructions=1900)
    assert code.shared <= 48 * 1024  # what a program may have without asking for more
    if not old:
        assert code.count(r"LDG\.E\.128.*") >= 4 and code.count(r"STG\.E\.128.*") >= 4


# ---- everything else compiles as it is called ----


@pytest.mark.slow
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_compiles_without_spills(launched: Launched, tmp_path: Path, bits: int) -> None:
    n = 9001
    size = (n * bits + 7) // 8
    triton_ops.pack(codes(n), bits, codes(size))
    triton_ops.unpack(codes(size), bits, codes(n))
    triton_ops.unpack_dequantize(codes(size), scales(n), bits, 512, floats(n))
    triton_ops.accumulate(floats(n), [codes(size)] * 3, [scales(n)] * 3, [bits] * 3, 512, [1.0] * 3)
    for rounding in (reference.NEAREST, reference.STOCHASTIC, reference.EDEN):
        triton_ops.quantize_pack(floats(n), bits, 512, 1, 0, rounding, codes(size), scales(n))
    for kernel in launched():
        Code(kernel, tmp_path).check(registers=168, instructions=8000)


@pytest.mark.slow
@pytest.mark.parametrize("rounding", [reference.NEAREST, reference.STOCHASTIC, reference.EDEN])
@pytest.mark.parametrize("bucket", [8, 24, 8192, 65536, 2**31])
def test_every_kind_of_bucket_compiles(launched: Launched, tmp_path: Path, bucket: int, rounding: int) -> None:
    if rounding == reference.EDEN and bucket > 65536:
        pytest.skip("EDEN's buckets have at most 65536 values")
    offset = 3 if rounding == reference.STOCHASTIC else 0
    triton_ops.quantize_pack(floats(9000), 3, bucket, -1, offset, rounding, codes(3375), floats(1125))
    triton_ops.unpack_dequantize(codes(3375), floats(1125), 3, bucket, floats(9000))
    triton_ops.accumulate(floats(9000), [codes(3375)], [floats(1125)], [3], bucket, [1.0])
    for kernel in launched():
        Code(kernel, tmp_path).check(registers=168, instructions=8000)


@pytest.mark.slow
def test_unaligned_buffers_compile(launched: Launched) -> None:
    n = 9000
    triton_ops.quantize_pack(
        floats(n + 1)[1:], 4, 512, 2**40, 0, reference.STOCHASTIC, codes(n // 2 + 1)[1:], scales(n)
    )
    triton_ops.pack(codes(n + 1)[1:], 4, codes(n // 2 + 1)[1:])
    triton_ops.unpack(codes(n // 2 + 1)[1:], 4, codes(n + 1)[1:])
    triton_ops.unpack_dequantize(codes(n // 2 + 1)[1:], scales(n), 4, 512, floats(n + 1)[1:])
    triton_ops.accumulate(floats(n + 1)[1:], [codes(n // 2 + 1)[1:]], [scales(n)], [4], 512, [1.0])
    assert len(launched()) == 5


def test_tables_compile(launched: Launched, tmp_path: Path) -> None:
    lengths, widths = [8200, 10, 513], [4, 3, 8]
    rows = torch.tensor(
        [[0, 8200, 4, 512, 0, 0, 0], [8200, 10, 3, 512, 8200, 4100, 17], [8211, 513, 8, 64, 8216, 4104, 18]]
    )
    n, packed, all_scales = 8724, codes(4104 + 513), floats(27)
    assert lengths == rows[:, 1].tolist() and widths == rows[:, 2].tolist()
    triton_ops.quantize_pack_table([floats(n)], rows, 1, reference.STOCHASTIC, packed, all_scales)
    assert len(launched()) == 3  # one launch for each width here
    triton_ops.quantize_pack_table([floats(length) for length in lengths], rows, 1, reference.EDEN, packed, all_scales)
    assert len(launched()) == 3
    triton_ops.unpack_dequantize_table(packed, all_scales, rows, [floats(n)])
    triton_ops.accumulate_table(floats(n), [packed] * 8, [all_scales] * 8, [rows] * 8, [1.0] * 8)
    kernels = launched()
    assert len(kernels) == 4  # of each, one for aligned rows and one for others
    for kernel in kernels:
        Code(kernel, tmp_path).check(registers=184, instructions=4400)
    triton_ops.rotate(floats(n), rows, 8192, 1, True)
    # Blocks of 8192 and a tail; of 8 and a tail; of 512 and a tail.
    assert len(launched()) == 6


SLOW_TYPES = [pytest.param(t, marks=pytest.mark.slow) for t in (torch.float64, torch.bfloat16, torch.float16)]


@pytest.mark.parametrize("dtype", [torch.float32, *SLOW_TYPES], ids=str)
def test_squared_norm(launched: Launched, tmp_path: Path, dtype: torch.dtype) -> None:
    """32 values a thread, read whole lines a warp; the sum of a tile and that of the tiles."""
    triton_ops.squared_norm(torch.zeros(48, 768, 768, dtype=dtype), torch.zeros(48, dtype=torch.float64))
    tiles, total = launched()
    code = Code(tiles, tmp_path)
    code.check(registers=128, instructions=800)
    assert code.count(r"LDG\.E.*") == 2 * 32  # and as many for the end of a matrix
    Code(total, tmp_path).check(registers=64, instructions=500)


def test_a_norm_has_one_kernel_whatever_the_address_and_the_size(launched: Launched) -> None:
    """Its layout, and so the order of summation, would depend on them."""
    seen = set()
    for batch, size, by in ((3, 8191, 1), (1, 768 * 768, 0), (16, 4096 * 16, 4)):
        a = torch.zeros(batch * size + by)[by:].view(batch, 1, size)
        triton_ops.squared_norm(a, torch.zeros(batch, dtype=torch.float64))
        seen.update(kernel.hash for kernel in launched())
    assert len(seen) == 2


def test_values_do_not_change_the_kernel(launched: Launched) -> None:
    """Seeds, offsets, sizes and weights are no reason to compile again."""
    seen = set()
    for n, seed, offset, weight in ((1, 1, 0, 0.0), (2**20, 2**40, 8, 1.0), (16, -1, 2**61, 0.3)):
        triton_ops.quantize_pack(floats(n), 4, 512, seed, offset, reference.STOCHASTIC, codes(n // 2 + 1), scales(n))
        triton_ops.accumulate(floats(n), [codes(n // 2 + 1)], [scales(n)], [4], 512, [weight])
        seen.update(kernel.hash for kernel in launched())
    assert len(seen) == 2


# ---- learned centres: 8 values a thread ----


def layers(count: int, dtype: torch.dtype = torch.float32, by: int = 0) -> list[torch.Tensor]:
    return [torch.zeros(5000 + k + by, dtype=dtype)[by:] for k in range(count)]


def with_centers(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four centres a layer, where they begin, and a number each."""
    return torch.zeros(4 * count), 4 * torch.arange(count + 1), torch.ones(count, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, *SLOW_TYPES[1:]], ids=str)
def test_soft_quantize(launched: Launched, tmp_path: Path, dtype: torch.dtype) -> None:
    """One launch for 16 layers, which reads and writes 16 bytes at a time. A sigmoid is an exponential and a
    reciprocal; one more bounds the sharpness.
    """
    triton_ops.soft_quantize(layers(16, dtype), *with_centers(16), layers(16, dtype))
    (kernel,) = launched()
    code = Code(kernel, tmp_path)
    code.check(registers=62, instructions=800)
    vectors = 8 * dtype.itemsize // 16
    assert (code.count(r"LDG\.E\.128.*"), code.count(r"STG\.E\.128.*")) == (vectors, vectors)
    assert code.count(r"MUFU\.EX2") == 8 and code.count(r"MUFU\.RCP") == 8 + 1


@pytest.mark.parametrize("want", [(True, True), (True, False), (False, True)])
def test_soft_quantize_backward(launched: Launched, tmp_path: Path, want: tuple[bool, bool]) -> None:
    want_x, want_centers = want
    centers, first, sharpness = with_centers(16)
    dx, dcenters = layers(16) if want_x else [], centers.clone() if want_centers else centers[:0]
    triton_ops.soft_quantize_backward(layers(16), layers(16), centers, first, sharpness, dx, dcenters)
    kernel, *others = launched()
    assert len(others) == int(want_centers)
    code = Code(kernel, tmp_path)
    code.check(registers=134, instructions=1250)
    assert code.count(r"MUFU\.EX2") == 8 and code.count(r"MUFU\.RCP") == 8 + 1
    for other in others:
        Code(other, tmp_path).check(registers=48, instructions=170)


def test_nearest_centers_proximal_steps_and_sums(launched: Launched, tmp_path: Path) -> None:
    centers, first, threshold = with_centers(16)
    index = layers(16, torch.uint8)
    triton_ops.nearest_center(layers(16), centers, first, index, layers(16))
    triton_ops.prox_weights(layers(16), centers, first, threshold, layers(16))
    triton_ops.center_sums(layers(16), index, first, centers)
    near, prox, sums, total = (Code(kernel, tmp_path) for kernel in launched())
    for code in (near, prox):
        code.check(registers=72, instructions=980)
        assert (code.count(r"LDG\.E\.128.*"), code.count(r"STG\.E\.128.*")) == (2, 2)
    sums.check(registers=62, instructions=550)
    total.check(registers=48, instructions=170)


def test_the_order_of_sums_of_centres_does_not_depend_on_addresses(launched: Launched, tmp_path: Path) -> None:
    """The same instructions for aligned layers and others."""
    seen = set()
    for by in (0, 1, 4):
        centers, first, sharpness = with_centers(2)
        args = centers, first, sharpness, layers(2, by=by), centers.clone()
        triton_ops.soft_quantize_backward(layers(2, by=by), layers(2, by=by), *args)
        triton_ops.center_sums(layers(2, by=by), layers(2, torch.uint8, by), first, centers)
        codes = [Code(kernel, tmp_path).instructions for kernel in launched()]
        seen.add(tuple(tuple(sorted(code.items())) for code in codes))
    assert len(seen) == 1


def test_another_model_of_as_many_layers_compiles_nothing(launched: Launched) -> None:
    """Sizes, numbers of centres and sharpness are no reason to compile again."""
    seen = set()
    for sizes, counts, p in (
        ((16, 1, 4096), (1, 2, 3), 1.0),
        ((17, 5000, 2), (256, 16, 1), 0.5),
        ((1, 1, 1), (4, 4, 4), 100.0),
    ):
        x, first = [floats(n) for n in sizes], torch.tensor([0, *counts]).cumsum(0)
        centers, sharpness = floats(sum(counts)), torch.full((3,), p, dtype=torch.float64)
        triton_ops.soft_quantize(x, centers, first, sharpness, [floats(n) for n in sizes])
        triton_ops.soft_quantize_backward(x, x, centers, first, sharpness, [floats(n) for n in sizes], centers.clone())
        seen.update(kernel.hash for kernel in launched())
    assert len(seen) == 3
