"""Stochastic rounding in numbers: unbiased, of the variance theory gives, and random in every bit.

All seeds are fixed, so a test either always passes or never does; bounds are 4 standard errors of the statistic.
"""

from __future__ import annotations

import math

import pytest
import torch
from ops_support import BACKENDS, backend_fixture, gaussian, select
from torch import Tensor

from dynfed_lightning import _reference, ops

any_backend = backend_fixture(BACKENDS)


def errors_in_steps(x: Tensor, bits: int, seed: int, bucket: int = 512) -> tuple[Tensor, Tensor]:
    """The rounding errors of `x` in units of its bucket's scale, and the probabilities of rounding up; float64."""
    packed, scales = ops.quantize_pack(x, bits, bucket, seed=seed)
    step = scales.double().repeat_interleave(bucket)[: x.numel()]
    error = (ops.unpack_dequantize(packed, scales, bits, bucket, x.numel()).double() - x.double()) / step
    position = x.double() / step
    return error, position - position.floor()


def check_moments(n: int, bits: int, seed: int) -> None:
    x = gaussian(n, seed)
    error, up = errors_in_steps(x, bits, seed)
    variance = up * (1 - up)  # of a value that rounds up with probability `up`
    standard_error = math.sqrt(float(variance.sum())) / n
    assert abs(float(error.mean())) < 4 * standard_error + 2.0**-16, "biased"
    # (error^2 - variance) has mean 0, and its own variance is known from the fourth moment of a two-point distribution.
    spread = variance * (1 - 4 * variance)
    assert abs(float((error.square() - variance).mean())) < 4 * math.sqrt(float(spread.sum())) / n + 2.0**-14
    # No bias towards either sign, nor towards zero.
    signed = error * x.sign()
    assert abs(float(signed.mean())) < 4 * standard_error + 2.0**-16, "biased towards or away from zero"


@pytest.mark.parametrize("bits", range(2, 9))
def test_unbiased_with_the_variance_of_theory(bits: int, any_backend: str) -> None:
    check_moments(1_000_000 if bits in (2, 4, 8) and any_backend != "reference" else 200_000, bits, seed=bits)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_unbiased_over_ten_million_values(bits: int) -> None:
    check_moments(10_000_000, bits, seed=100 + bits)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_one_value_under_many_indices_rounds_up_as_often_as_it_should(fraction: float, any_backend: str) -> None:
    x = torch.full((400_000,), (2 + fraction) / 7)
    x[::512] = 1.0  # one full-scale value a bucket fixes the scale to 1/7
    packed, scales = ops.quantize_pack(x, 4, seed=77)
    codes = ops.unpack(packed, 4, x.numel())[x != 1.0]
    assert sorted(codes.unique().tolist()) == [10, 11]
    share = float((codes == 11).double().mean())
    assert abs(share - fraction) < 4 * math.sqrt(fraction * (1 - fraction) / codes.numel()) + 2.0**-16
    assert scales.unique().numel() == 1


def test_relative_variance_of_gaussian_vectors() -> None:
    """Relative variance of 512-buckets with the maximum as scale: E f(1-f) step^2 over the mean square."""
    x = gaussian(1_000_000, 5)
    relative = {}
    for bits in (2, 3, 4, 6, 8):
        packed, scales = ops.quantize_pack(x, bits, seed=bits)
        decoded = ops.unpack_dequantize(packed, scales, bits, 512, x.numel())
        relative[bits] = float((decoded - x).square().mean() / x.square().mean())
    # The largest of 512 Gaussians is about 3.2, so a step is 3.2 / L: step^2 / 6, except for the coarsest, E|x| 3.2 - E x^2.
    assert relative[2] == pytest.approx(0.798 * 3.2 - 1, rel=0.06)
    for bits in (3, 4, 6, 8):
        assert relative[bits] == pytest.approx((3.2 / (2 ** (bits - 1) - 1)) ** 2 / 6, rel=0.08)


def test_every_random_bit_is_fair_and_neighbours_are_independent() -> None:
    r = _reference.random16(2024, 0, 1 << 20, torch.device("cpu"))
    n = r.numel()
    for bit in range(16):
        assert abs(float((r >> bit & 1).double().mean()) - 0.5) < 4 * 0.5 / math.sqrt(n)
    centred = (r.double() - 32767.5) / math.sqrt((65536**2 - 1) / 12)
    for lag in (1, 2, 7, 8, 16, 512):
        assert abs(float((centred[lag:] * centred[:-lag]).mean())) < 4 / math.sqrt(n - lag), lag
    other = (_reference.random16(2025, 0, n, torch.device("cpu")).double() - 32767.5) / math.sqrt((65536**2 - 1) / 12)
    assert abs(float((centred * other).mean())) < 4 / math.sqrt(n), "two seeds correlate"
    counts = torch.bincount((r >> 8).long(), minlength=256).double()
    chi2 = float(((counts - n / 256).square() / (n / 256)).sum())
    assert abs(chi2 - 255) < 4 * math.sqrt(2 * 255)


def test_averaging_clients_averages_the_noise_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes quantised federated averaging work: independent seeds, errors falling as 1 / clients."""
    select(monkeypatch, "reference")
    x = gaussian(20_000, 8)
    single = []
    out = torch.zeros_like(x)
    for k in range(16):
        packed, scales = ops.quantize_pack(x, 3, seed=k)
        ops.dequantize_accumulate(out, packed, scales, 3, 512, 1 / 16)
        single.append(float((ops.unpack_dequantize(packed, scales, 3, 512, x.numel()) - x).square().mean()))
    ratio = float((out - x).square().mean()) / (sum(single) / 16)
    assert ratio == pytest.approx(1 / 16, rel=0.1)
