"""What the tests of the operations share: forcing a backend, awkward values, the reference's answers, comparing bit patterns.

A test that runs on a GPU backend finds the GPU as torch's default device, so that its tensors are made there; the reference's
answers are always computed on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from dynfed_lightning import _ops_backends, _reference, ops

CPP_BACKENDS = ("cpu-scalar", "cpu-avx2", "cpu-avx512", "cpu-avx512vbmi")
GPU_BACKENDS = ("cuda", "triton")
BACKENDS = ("reference", *CPP_BACKENDS, *GPU_BACKENDS)
KERNELS = BACKENDS[1:]


def select(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Force one backend and instruction set, or skip with the reason why this machine cannot run it."""
    backend, _, isa = name.partition("-")
    reason = None if backend == "reference" else _ops_backends.missing(backend)
    if reason:
        pytest.skip(reason)
    if backend == "cpu":
        if _ops_backends.INSTRUCTION_SETS[isa] > torch.ops.dynfed_lightning_cpu.best_isa():
            pytest.skip(f"this CPU or build has no {isa}")
        monkeypatch.setenv("DYNFED_CPU_ISA", isa)
    monkeypatch.setenv("DYNFED_BACKEND", backend)


def backend_fixture(names: tuple[str, ...]):
    """A fixture that runs its test once per backend of `names`."""
    params = [pytest.param(n, marks=pytest.mark.gpu) if n in GPU_BACKENDS else n for n in names]

    @pytest.fixture(params=params)
    def forced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
        select(monkeypatch, request.param)
        torch.set_num_threads(2)  # so that large vectors are shared out; `conftest` undoes it
        with torch.device("cuda" if request.param in GPU_BACKENDS else "cpu"):
            yield request.param

    return forced


# ---- the reference's answers ----


def reference_pack(codes: Tensor, bits: int) -> Tensor:
    out = torch.empty(ops.packed_size(codes.numel(), bits), dtype=torch.uint8, device="cpu")
    _reference.pack(codes.cpu().reshape(-1), bits, out)
    return out


def reference_quantize(
    x: Tensor, bits: int, bucket: int = 512, seed: int = 0, offset: int = 0, rounding: str = "stochastic"
) -> tuple[Tensor, Tensor]:
    packed = torch.empty(ops.packed_size(x.numel(), bits), dtype=torch.uint8, device="cpu")
    scales = torch.empty(ops.num_buckets(x.numel(), bucket), device="cpu")
    number = ops.ROUNDINGS.index(rounding)
    _reference.quantize_pack(x.cpu().reshape(-1), bits, bucket, seed, offset, number, packed, scales)
    return packed, scales


def reference_dequantize(packed: Tensor, scales: Tensor, bits: int, bucket: int, n: int) -> Tensor:
    out = torch.empty(n, device="cpu")
    _reference.unpack_dequantize(packed.cpu(), scales.cpu(), bits, bucket, out)
    return out


def reference_accumulate(
    out: Tensor,
    packed: Sequence[Tensor],
    scales: Sequence[Tensor],
    bits: Sequence[int],
    bucket: int,
    weights: Sequence[float],
) -> Tensor:
    total = out.cpu().clone()
    _reference.accumulate(total, [p.cpu() for p in packed], [s.cpu() for s in scales], bits, bucket, weights)
    return total


def values(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Values of many magnitudes, with zeros, negative zeros and denormals among them."""
    g = torch.Generator().manual_seed(seed)
    magnitude = torch.exp2(torch.randint(-12, 12, (n,), generator=g, device="cpu").float())
    x = torch.randn(n, generator=g, device="cpu") * magnitude
    x[3::11] = 0.0
    x[4::13] = -0.0
    x[5::17] *= 1e-39
    return x.to(device=torch.get_default_device(), dtype=dtype)


def gaussian(n: int, seed: int = 0) -> Tensor:
    """The same normally distributed values on every device, on the default one."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed), device="cpu")
    return x.to(torch.get_default_device())


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit patterns (so that 0 does not equal -0), wherever they lie; any NaN equals any other."""
    a, b = a.cpu(), b.cpu()
    if a.dtype == torch.float32 and b.dtype == torch.float32:
        a, b = (torch.where(t.isnan(), torch.nan, t).view(torch.int32) for t in (a, b))
    return torch.equal(a, b)
