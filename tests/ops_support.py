"""What the tests of the operations share: forcing a backend, awkward values, comparing bit patterns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dynfed_lightning import _ops_backends

BACKENDS = ("reference", "cpu-scalar", "cpu-avx2", "cpu-avx512")
CPP_BACKENDS = BACKENDS[1:]


def select(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Force one backend and instruction set, or skip with the reason why this machine cannot run it."""
    backend, _, isa = name.partition("-")
    if backend == "cpu":
        if _ops_backends.load_error():
            pytest.skip(str(_ops_backends.load_error()))
        if _ops_backends.INSTRUCTION_SETS[isa] > torch.ops.dynfed_lightning_cpu.best_isa():
            pytest.skip(f"this CPU or build has no {isa}")
        monkeypatch.setenv("DYNFED_CPU_ISA", isa)
    monkeypatch.setenv("DYNFED_BACKEND", backend)


def backend_fixture(names: tuple[str, ...]):
    """A fixture that runs its test once per backend of `names`."""

    @pytest.fixture(params=names)
    def forced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
        select(monkeypatch, request.param)
        return request.param

    return forced


def values(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Values of many magnitudes, with zeros, negative zeros and denormals among them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=g) * torch.exp2(torch.randint(-12, 12, (n,), generator=g).float())
    x[3::11] = 0.0
    x[4::13] = -0.0
    x[5::17] *= 1e-39
    return x.to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit patterns (so that NaN equals NaN, and 0 does not equal -0)."""
    if a.dtype == torch.float32:
        a, b = a.view(torch.int32), b.view(torch.int32)
    return torch.equal(a, b)
