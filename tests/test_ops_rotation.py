"""The randomised Hadamard rotation on every backend, and what EDEN rounding after it promises."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_support import BACKENDS, KERNELS, backend_fixture, same, select, values
from torch import Tensor

from dynfed_lightning import _reference, ops

any_backend = backend_fixture(BACKENDS)
kernels = backend_fixture(KERNELS)

SIZES = (0, 1, 2, 3, 7, 8, 9, 64, 127, 128, 129, 511, 512, 513, 4096, 5000, 100_003)


def reference_rotate(x: Tensor, layout: ops.Layout, block: int, seed: int, inverse: bool = False) -> Tensor:
    out = x.cpu().reshape(-1).to(torch.float32, copy=True)
    _reference.rotate(out, layout.table, block, seed, inverse)
    return out


@pytest.mark.parametrize("block", [1, 2, 8, 16, 64, 256, 1024, 4096, 8192])
def test_rotation_is_the_reference_bit_for_bit(kernels: str, block: int) -> None:
    for n in SIZES if block in (64, 4096) else (1, 7, 513, 20_000):
        x = values(n, seed=n)
        layout = ops.Layout([n], 8, offsets=[2**36 + 8 * n])
        for inverse in (False, True):
            got = ops.rotate(x, block, 2**64 - 5, inverse=inverse, layout=layout)
            assert same(got, reference_rotate(x, layout, block, -5, inverse)), (n, inverse)


@given(
    sizes=st.lists(st.integers(0, 600), max_size=12),
    block=st.integers(0, 13).map(lambda k: 2**k),
    seed=st.integers(0, 2**62),
    gap=st.integers(0, 3),
)
@settings(max_examples=60)
def test_any_table(sizes: list[int], block: int, seed: int, gap: int) -> None:
    """On this machine's best kernels; what lies between the tensors stays."""
    starts = [gap + sum(sizes[:i]) + i * gap for i in range(len(sizes))]
    layout = ops.Layout(sizes, 8, starts=starts)
    x = values(layout.numel + gap, seed=len(sizes))
    got = ops.rotate(x, block, seed, layout=layout)
    assert same(got, reference_rotate(x, layout, block, seed))
    back = ops.rotate(got, block, seed, layout=layout, inverse=True)
    assert same(back, reference_rotate(got, layout, block, seed, inverse=True))


@pytest.mark.parametrize("dtype", ops.INPUT_DTYPES, ids=str)
def test_there_and_back(any_backend: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 1001, generator=torch.Generator().manual_seed(0), device="cpu")
    x = x.to(device=torch.get_default_device(), dtype=dtype)
    rotated = ops.rotate(x.t(), 256, 9)
    assert rotated.shape == (1001, 3) and rotated.dtype == torch.float32 and rotated.is_contiguous()
    assert same(rotated.reshape(-1), ops.rotate(x.t().reshape(-1), 256, 9))
    assert float(rotated.norm()) == pytest.approx(float(x.float().norm()), rel=1e-6)
    assert float((rotated - x.t().float()).norm()) > float(rotated.norm())  # it did something
    back = ops.rotate(rotated, 256, 9, inverse=True)
    assert float((back - x.t().float()).abs().max()) < 4e-6
    assert not same(ops.rotate(x, 256, 10), ops.rotate(x, 256, 9))


def test_in_place_and_into_a_buffer(any_backend: str) -> None:
    x = values(700)
    want = ops.rotate(x, 128, 1)
    out = torch.full((7, 100), 5.0)
    assert ops.rotate(x, 128, 1, out=out) is out and same(out.view(-1), want)
    assert ops.rotate(x, 128, 1, out=x) is x and same(x, want)


def test_nan_and_infinity_reach_their_whole_block_and_no_other(any_backend: str) -> None:
    x = torch.ones(256)
    x[70] = math.nan
    assert ops.rotate(x, 64).isfinite().view(4, 64).sum(dim=1).tolist() == [64, 0, 64, 64]


@pytest.mark.parametrize("block", [128, 4096])
def test_a_single_spike_is_spread_evenly(any_backend: str, block: int) -> None:
    """The first column of a Hadamard matrix: every value of the block has the same magnitude."""
    x = torch.zeros(block)
    x[17] = 3.0
    magnitudes = ops.rotate(x, block, 4).abs()
    assert float(magnitudes.min()) == pytest.approx(3.0 / math.sqrt(block), rel=1e-6)
    assert float(magnitudes.max()) == pytest.approx(3.0 / math.sqrt(block), rel=1e-6)


def test_signs_are_fair_and_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    select(monkeypatch, "reference")
    n = 1 << 20
    flips = _reference.random_signs(5, 0, 1, n, torch.device("cpu")).double() * 2 - 1
    assert abs(float(flips.mean())) < 4 / math.sqrt(n)
    for lag in (1, 2, 32, 128, 4096):
        assert abs(float((flips[lag:] * flips[:-lag]).mean())) < 4 / math.sqrt(n - lag), lag
    for other in ((5, 0, 2), (6, 0, 1)):
        more = _reference.random_signs(*other, n, torch.device("cpu")).double() * 2 - 1
        assert abs(float((flips * more).mean())) < 4 / math.sqrt(n), other


# ---- EDEN ----

# The variance of EDEN's estimate, relative to ||x||^2, for normally distributed values and the steps of `_reference.EDEN_STEPS`:
# E[Q^2] / E[y Q]^2 - 1 by numerical integration.
THEORY = {1: 0.5708, 2: 0.1758, 3: 0.04242, 4: 0.01200, 5: 0.003534, 6: 0.001042, 7: 0.000304, 8: 0.0000877}


def decode(x: Tensor, bits: int, seed: int, rounding: str, bucket: int = 512, block: int = 4096) -> Tensor:
    """What a receiver makes of `x`, rotated if the rounding is EDEN's."""
    y = ops.rotate(x, block, seed) if rounding == "eden" else x
    packed, scales = ops.quantize_pack(y, bits, bucket, seed, rounding=rounding)
    z = ops.unpack_dequantize(packed, scales, bits, bucket, x.numel())
    return ops.rotate(z, block, seed, inverse=True) if rounding == "eden" else z


def relative_error(x: Tensor, bits: int, rounding: str) -> float:
    return float((decode(x, bits, 7, rounding) - x).double().square().sum() / x.double().square().sum())


def test_the_theory_by_integration() -> None:
    y = torch.linspace(-9, 9, 2_000_001, dtype=torch.float64)
    density = torch.exp(-y * y / 2) / math.sqrt(2 * math.pi) * (y[1] - y[0])
    for bits, expected in THEORY.items():
        half = 2 ** (bits - 1)
        level = y.sign() if bits == 1 else torch.floor(y / _reference.EDEN_STEPS[bits] + 0.5).clamp(-half, half - 1)
        variance = float((density * level * level).sum() / (density * y * level).sum() ** 2 - 1)
        assert variance == pytest.approx(expected, rel=5e-3)
        if bits > 1:  # a smaller and a larger step are both worse
            for factor in (0.9, 1.1):
                other = torch.floor(y / (factor * _reference.EDEN_STEPS[bits]) + 0.5).clamp(-half, half - 1)
                assert float((density * other * other).sum() / (density * y * other).sum() ** 2 - 1) > variance


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_error_is_at_most_what_theory_says_whatever_the_vector(bits: int) -> None:
    """Vectors with a few large values even have less: their rotated values are more alike than normal ones."""
    g = torch.Generator().manual_seed(bits)
    n = 1 << 18
    gaussian = torch.randn(n, generator=g)
    heavy = gaussian * torch.randn(n, generator=g).exp() ** 2
    sparse = torch.where(torch.rand(n, generator=g) < 0.02, gaussian, torch.zeros(()))
    assert relative_error(gaussian, bits, "eden") == pytest.approx(THEORY[bits], rel=0.02 if bits < 5 else 0.1)
    for x in (heavy, sparse):
        assert THEORY[bits] / 10 < relative_error(x, bits, "eden") < THEORY[bits] * 1.1


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_error_is_below_that_of_the_other_roundings(bits: int) -> None:
    """Against stochastic rounding, which is unbiased as well, at every width. (One bit of it is biased, and smaller.)"""
    x = torch.randn(1 << 18, generator=torch.Generator().manual_seed(bits))
    if bits > 1:
        assert relative_error(x, bits, "eden") < relative_error(x, bits, "stochastic")
    if 1 < bits < 6:
        assert relative_error(x, bits, "eden") < relative_error(x, bits, "nearest")


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_unbiased_over_seeds(bits: int) -> None:
    """The mean over K rotations comes as near to x as K independent unbiased estimates do: the squared error falls as 1 / K."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(4096, generator=g) * torch.rand(4096, generator=g) ** 4
    repeats = 400
    mean = torch.zeros(4096, dtype=torch.float64)
    for seed in range(repeats):
        mean += decode(x, bits, seed, "eden").double() / repeats
    relative = float((mean - x.double()).square().sum() / x.double().square().sum()) * repeats
    # A sum of 4096 squares of nearly normal errors spreads by sqrt(2 / 4096) of its mean.
    assert relative == pytest.approx(THEORY[bits], rel=4 * math.sqrt(2 / 4096) + 0.02)


def test_unbiased_over_ten_million_values() -> None:
    """The error's projection on x, over x's length: 0 within 4 standard errors, in every rotated bucket by construction."""
    x = torch.randn(10_000_000, generator=torch.Generator().manual_seed(1))
    for bits in (2, 4):
        y = decode(x, bits, 5, "eden")
        projection = float((y.double() * x.double()).sum() / x.double().square().sum())
        assert abs(projection - 1) < 1e-5  # <y, x> = ||x||^2 up to float32 rounding and the units of the scale
        error = (y - x).double()
        assert abs(float(error.mean())) < 4 * float(error.std()) / math.sqrt(x.numel())


def test_half_a_bit_of_every_kind_of_bucket(any_backend: str) -> None:
    """All-equal values, a spike, zeros, and the largest numbers there are."""
    big = torch.finfo(torch.float32).max
    x = torch.zeros(5, 64)
    x[0] = -2.0
    x[1, 5] = 1.0
    x[3] = big
    x[3, ::2] = -big
    x[4, 3] = math.inf
    for bits in range(1, 9):
        packed, scales = ops.quantize_pack(x, bits, 64, rounding="eden")
        y = ops.unpack_dequantize(packed, scales, bits, 64, 320).view(5, 64)
        assert torch.allclose(y[0], x[0], rtol=1e-5)
        assert float((y[1] * x[1]).sum()) == pytest.approx(1.0, rel=1e-5)
        assert float(y[2].abs().max()) == 0
        assert y[4].isnan().all()
        assert torch.allclose(y[3] / big, x[3] / big, rtol=1e-5)
