"""`ops.truncated_svd` against LAPACK: certified energies, ranks near the least, orthonormal factors, and every odd matrix."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dynfed_lightning import _svd_range, ops
from dynfed_lightning.ops import TruncatedSVD

SPECTRA = {
    "harmonic": lambda i: 1 / i,
    "root": lambda i: i**-0.5,
    "exponential": lambda i: torch.exp(-i / 20),
    "square": lambda i: i**-2.0,
    "noise floor": lambda i: 1 / i + 0.01,
}
SHAPES = ((3, 200, 130), (2, 130, 260), (4, 64, 64), (1, 40, 300))


def orthonormal(batch: int, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(batch, rows, columns, dtype=torch.float64, generator=generator))[0]


def with_spectrum(s: Tensor, m: int, n: int, batch: int = 1, seed: int = 0) -> Tensor:
    """float64 [batch, m, n] with the singular values s."""
    g = torch.Generator().manual_seed(seed)
    u, v = orthonormal(batch, m, len(s), g), orthonormal(batch, n, len(s), g)
    return (u * s) @ v.mT


def matrix(kind: str, m: int, n: int, batch: int = 1, seed: int = 0) -> Tensor:
    s = SPECTRA[kind](torch.arange(1, min(m, n) + 1, dtype=torch.float64))
    return with_spectrum(s, m, n, batch, seed).float()


def least_ranks(a: Tensor, energy: float) -> list[int]:
    squares = torch.linalg.svdvals(a.double()).square()
    return ((squares.cumsum(1) < energy * squares.sum(1, keepdim=True)).sum(1) + 1).clamp_max(min(a.shape[1:])).tolist()


def parts(a: Tensor, result: TruncatedSVD, b: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A matrix and its factors without padding, in float64."""
    k = max(int(result.rank[b]), 0)
    return a[b].double(), result.U[b, :, :k].double(), result.S[b, :k].double(), result.Vh[b, :k].double()


def check_factors(a: Tensor, result: TruncatedSVD, tolerance: float = 2e-6) -> None:
    """Shapes, dtypes, padding, order, signs, orthonormality, and that the energy claimed is the energy there."""
    batch, m, n = a.shape
    k = max([0, *result.rank.tolist()])
    assert result.U.shape == (batch, m, k) and result.S.shape == (batch, k) and result.Vh.shape == (batch, k, n)
    assert {t.dtype for t in result[:3]} == {torch.float32} and result.rank.dtype == torch.int64
    assert all(t.is_contiguous() for t in result)
    for b in range(batch):
        used = max(int(result.rank[b]), 0)
        padding = (result.U[b, :, used:], result.S[b, used:], result.Vh[b, used:])
        assert not any(t.count_nonzero() for t in padding), b
        x, u, s, vh = parts(a, result, b)
        assert bool((s > 0).all()) and bool((s[:-1] >= s[1:] * (1 - 1e-6)).all())
        eye = torch.eye(used, dtype=torch.float64)
        assert float((u.mT @ u - eye).abs().max() if used else 0) < tolerance, b
        assert float((vh @ vh.mT - eye).abs().max() if used else 0) < tolerance, b
        if used:
            assert bool((u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all())
            total = float(x.square().sum())
            left = float((x - (u * s) @ vh).square().sum()) / total
            assert float(s.square().sum()) / total == pytest.approx(1 - left, abs=2e-6), b


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", SPECTRA)
def test_energy_is_reached_with_nearly_the_least_rank(kind: str, shape: tuple[int, int, int]) -> None:
    batch, m, n = shape
    a = matrix(kind, m, n, batch, seed=m)
    for energy in (0.5, 0.9, 0.95, 0.98, 0.999, 1 - 1e-6):
        result = ops.truncated_svd(a, energy=energy)
        check_factors(a, result)
        for b, least in enumerate(least_ranks(a, energy)):
            assert least <= int(result.rank[b]) <= math.floor(least * 1.03 + 0.5), (energy, b)
            x, u, s, vh = parts(a, result, b)
            assert float((x - (u * s) @ vh).square().sum() / x.square().sum()) <= 1 - energy + 1e-6


@pytest.mark.parametrize("kind", SPECTRA)
def test_a_large_matrix(kind: str) -> None:
    a = matrix(kind, 500, 400, seed=1)
    for energy in (0.9, 0.95, 0.98):
        result = ops.truncated_svd(a, energy=energy)
        check_factors(a, result)
        (least,) = least_ranks(a, energy)
        assert least <= int(result.rank[0]) <= max(least * 1.03, least + 0.5)


def test_the_rank_given() -> None:
    for kind in SPECTRA:
        for m, n in ((200, 130), (64, 64), (130, 300)):
            a = matrix(kind, m, n, 2)
            want = torch.linalg.svdvals(a.double())
            for rank in (1, 7, 20, min(m, n)):
                result = ops.truncated_svd(a, rank=rank)
                check_factors(a, result)
                assert result.rank.tolist() == [rank, rank]
                kept = result.S.double().square().sum(1) / want[:, :rank].square().sum(1)
                assert bool((kept > 0.995).all()) and bool((kept < 1 + 1e-6).all()), (kind, rank)


def test_singular_values_and_vectors_are_those_of_lapack() -> None:
    """Where the full Gram is taken: the same triples, but for the sign."""
    a = matrix("harmonic", 60, 40, 2)
    result = ops.truncated_svd(a, rank=40)
    u, s, vh = torch.linalg.svd(a.double(), full_matrices=False)
    assert torch.allclose(result.S.double(), s, rtol=1e-6, atol=1e-8)
    sign = (u * result.U).sum(1).sign()
    assert torch.allclose(result.U.double(), u * sign[:, None], atol=2e-6)
    assert torch.allclose(result.Vh.double(), vh * sign[:, :, None], atol=2e-6)


# ---- odd matrices ----


def test_zero_matrices_have_rank_zero() -> None:
    a = matrix("harmonic", 80, 60, 3)
    a[1] = 0
    for options in ({"energy": 0.95}, {"rank": 5}, {"energy": 1.0}):
        result = ops.truncated_svd(a, **options)
        assert int(result.rank[1]) == 0 and int(result.rank.min()) == 0 and int(result.rank[0]) > 0
        check_factors(a, result)
    result = ops.truncated_svd(torch.zeros(2, 5, 4), energy=0.9)
    assert result.U.shape == (2, 5, 0) and result.Vh.shape == (2, 0, 4) and result.rank.tolist() == [0, 0]


@pytest.mark.parametrize("shape", [(90, 70), (300, 200), (200, 300), (1, 9), (9, 1), (1, 1), (2, 3)], ids=str)
def test_rank_one(shape: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(3)
    a = torch.randn(2, shape[0], 1, generator=g) @ torch.randn(2, 1, shape[1], generator=g)
    for options in ({"energy": 0.95}, {"energy": 1.0}, {"energy": 1 - 1e-9}, {"rank": 1}):
        result = ops.truncated_svd(a, **options)
        assert result.rank.tolist() == [1, 1], options
        check_factors(a, result)
        assert torch.allclose(result.U * result.S[:, None] @ result.Vh, a, atol=1e-5)


def test_fewer_values_than_the_rank_asked_for() -> None:
    a = with_spectrum(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), 300, 200, 2)
    result = ops.truncated_svd(a, rank=10)
    assert result.rank.tolist() == [3, 3]
    check_factors(a, result)


def test_energy_one_keeps_every_value_that_is_not_rounding() -> None:
    for m, n, rank in ((300, 200, 17), (60, 40, 5), (100, 100, 100)):
        s = torch.linspace(1, 0.1, rank, dtype=torch.float64)
        a = with_spectrum(s, m, n).float()
        result = ops.truncated_svd(a, energy=1.0)
        assert result.rank.tolist() == [rank]
        check_factors(a, result)
        assert torch.allclose(result.U * result.S[:, None] @ result.Vh, a, atol=1e-6)


def test_a_flat_spectrum_is_not_reached_within_max_rank() -> None:
    flat = with_spectrum(torch.ones(150, dtype=torch.float64), 200, 150).float()
    a = torch.cat((flat, matrix("harmonic", 200, 150), torch.zeros(1, 200, 150)))
    result = ops.truncated_svd(a, energy=0.95, max_rank=80)
    (least,) = least_ranks(a[1:2], 0.95)
    assert result.rank.tolist() == [-1, least, 0]
    check_factors(a, result)
    assert ops.truncated_svd(flat, energy=0.95, max_rank=80).U.shape == (1, 200, 0)
    assert ops.truncated_svd(flat, energy=0.95).rank.tolist() == [143]  # 0.95 * 150 = 142.5
    assert ops.truncated_svd(flat, energy=0.95, max_rank=143).rank.tolist() == [143]
    assert ops.truncated_svd(flat, energy=0.95, max_rank=142).rank.tolist() == [-1]


def test_a_cap_in_the_range_of_the_first_sketch() -> None:
    a = matrix("harmonic", 300, 200)
    (least,) = least_ranks(a, 0.95)
    assert ops.truncated_svd(a, energy=0.95, max_rank=least).rank.tolist() == [least]
    assert ops.truncated_svd(a, energy=0.95, max_rank=least - 1).rank.tolist() == [-1]


def test_an_empty_batch_or_side() -> None:
    for shape in ((0, 5, 4), (2, 0, 4), (2, 5, 0), (0, 0, 0)):
        for options in ({"energy": 0.9}, {"rank": 2}):
            result = ops.truncated_svd(torch.zeros(shape), **options)
            assert result.rank.tolist() == [0] * shape[0] and result.S.shape == (shape[0], 0)
            assert result.U.shape == (shape[0], shape[1], 0) and result.Vh.shape == (shape[0], 0, shape[2])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_nan_and_infinity_name_the_matrix(dtype: torch.dtype, bad: float) -> None:
    a = torch.ones(4, 90, 70, dtype=dtype)
    a[2, 3, 4] = bad
    a[3, 0, 0] = bad
    with pytest.raises(ValueError, match=r"Expected `a` to be finite, but matrix 2 holds NaN or infinity"):
        ops.truncated_svd(a, energy=0.9)


def test_a_norm_beyond_float32_is_refused() -> None:
    a = torch.full((2, 90, 70), 1e38)
    a[0] = 1.0
    with pytest.raises(ValueError, match=r"norms within float32, but that of matrix 1 is 7.94e\+39"):
        ops.truncated_svd(a, energy=0.9)
    with pytest.raises(ValueError, match=r"norms within float32, but that of matrix 0 is inf"):
        ops.truncated_svd(torch.full((1, 3, 3), 1e200, dtype=torch.float64), rank=1)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-12, 1e-6, 1e6, 1e12, 1e30, 1e37])
@pytest.mark.parametrize("shape", [(60, 40), (300, 200), (200, 300)], ids=str)
def test_huge_and_tiny_norms(shape: tuple[int, int], scale: float) -> None:
    """A power of two near the scale changes nothing but S, exactly."""
    power = 2.0 ** round(math.log2(scale))
    a = matrix("harmonic", *shape)
    plain = ops.truncated_svd(a, energy=0.95)
    scaled = ops.truncated_svd((a.double() * power).float(), energy=0.95)
    assert scaled.rank.tolist() == plain.rank.tolist()
    tolerance = 1e-6 if scale > 1e-36 else 1e-3  # below, float32 itself loses bits
    assert torch.allclose(scaled.S.double() / power, plain.S.double(), rtol=tolerance)
    if scale > 1e-36:
        check_factors(a, scaled._replace(S=(scaled.S.double() / power).float()))


def test_matrices_of_different_scales_in_one_batch() -> None:
    a = matrix("harmonic", 300, 200).repeat(3, 1, 1)
    a[1] *= 2.0**-100
    a[2] *= 2.0**100
    result = ops.truncated_svd(a, energy=0.95)
    assert len(set(result.rank.tolist())) == 1
    assert torch.allclose(result.S[1] * 2.0**100, result.S[0]) and torch.allclose(result.S[2] * 2.0**-100, result.S[0])
    assert torch.allclose(result.U[1], result.U[0], atol=1e-5) and torch.allclose(result.U[2], result.U[0], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    a = matrix("harmonic", 300, 200, 2).to(dtype)
    result = ops.truncated_svd(a, energy=0.95)
    same = ops.truncated_svd(a.double().float(), energy=0.95)
    assert result.rank.tolist() == same.rank.tolist()
    assert torch.allclose(result.S, same.S, rtol=1e-5)
    check_factors(a.double(), result)


def test_strides_do_not_matter() -> None:
    a = matrix("harmonic", 300, 200, 2)
    want = ops.truncated_svd(a, energy=0.95)
    padded = torch.zeros(2, 300, 230)[:, :, 10:210]
    padded.copy_(a)
    for other in (a.mT.contiguous().mT, padded, a.repeat_interleave(2, dim=0)[::2]):
        got = ops.truncated_svd(other, energy=0.95)
        assert all(torch.allclose(x, y, atol=2e-6) for x, y in zip(got, want, strict=True))
    turned = ops.truncated_svd(a.mT, energy=0.95)
    assert torch.allclose(turned.S, want.S, rtol=1e-5) and turned.rank.tolist() == want.rank.tolist()


@pytest.mark.parametrize("shape", [(80, 48), (200, 150)], ids=str)
def test_ill_conditioned(shape: tuple[int, int]) -> None:
    """Singular values from 1 to 1e-8: factors stay orthonormal down to what float32 tells from zero."""
    s = torch.logspace(0, -8, min(shape), dtype=torch.float64)
    a = with_spectrum(s, *shape)
    for x in (a, a.float()):
        for options in ({"energy": 1.0}, {"energy": 1 - 1e-12}, {"rank": min(shape)}):
            result = ops.truncated_svd(x, **options)
            check_factors(x, result)
            k = int(result.rank[0])
            least = int((s > 2.0**-23).sum())
            assert abs(k - least) <= 1 if "1 - " not in str(options) and options.get("energy") != 1 - 1e-12 else k > 20
            error = (result.S[0, :k].double() - s[:k]).abs()
            assert bool((error < (4e-8 if x is a else 2e-7)).all())


def test_repeated_singular_values() -> None:
    s = torch.tensor([2.0] * 10 + [1.0] * 10 + [0.5] * 30, dtype=torch.float64)
    for m, n in ((60, 50), (300, 200)):
        a = with_spectrum(s, m, n, 2).float()
        for energy, least in ((40 / 57.5 - 1e-3, 10), (50 / 57.5 - 1e-3, 20), (1 - 1e-4, 50)):
            result = ops.truncated_svd(a, energy=energy)
            assert result.rank.tolist() == [least, least]
            check_factors(a, result)


def test_updates_of_sgd_look_like_this() -> None:
    """Sums of few outer products over noise: rank within 3 per cent, or one."""
    g = torch.Generator().manual_seed(5)
    x, y = torch.randn(3, 256, 32, generator=g), torch.randn(3, 32, 192, generator=g)
    a = x * torch.logspace(0, -2, 32) @ y + 0.01 * torch.randn(3, 256, 192, generator=g)
    for energy in (0.9, 0.95, 0.99):
        result = ops.truncated_svd(a, energy=energy)
        check_factors(a, result)
        for got, least in zip(result.rank.tolist(), least_ranks(a, energy), strict=True):
            assert least <= got <= max(1.03 * least, least + 0.5)


# ---- the same answer every time ----


def test_a_matrix_does_not_depend_on_its_batch() -> None:
    kinds = [matrix(kind, 200, 130, seed=i) for i, kind in enumerate(SPECTRA)]
    a = torch.cat(kinds)
    together = ops.truncated_svd(a, energy=0.95, seed=9)
    for b, one in enumerate(kinds):
        alone = ops.truncated_svd(one, energy=0.95, seed=9)
        k = int(alone.rank[0])
        assert int(together.rank[b]) == k
        assert torch.allclose(together.S[b, :k], alone.S[0], rtol=1e-5)
        assert torch.allclose(together.U[b, :, :k] * together.S[b, :k] @ together.Vh[b, :k],
                              alone.U[0] * alone.S[0] @ alone.Vh[0], atol=1e-5)  # fmt: skip


def test_the_seed_decides() -> None:
    a = matrix("noise floor", 300, 200)
    first, again, other = (ops.truncated_svd(a, energy=0.9, seed=s) for s in (4, 4, 2**64 - 1))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not torch.equal(first.S, other.S)
    check_factors(a, other)


def test_random_signs_are_those_of_philox_whatever_is_drawn_before() -> None:
    arguments = (torch.float32, torch.device("cpu"))
    whole = _svd_range._signs(7, 100, 0, 40, *arguments)
    assert torch.equal(whole[24:], _svd_range._signs(7, 100, 24, 40, *arguments))
    assert set(whole.unique().tolist()) == {-1.0, 1.0} and abs(float(whole.mean())) < 0.05
    # The first word of Philox4x64-10 with key 7 and counter 1, where numpy begins, least significant bit first.
    assert whole[0, :8].tolist() == [1.0 if 0xA4 >> i & 1 else -1.0 for i in range(8)]


def test_the_precision_a_user_has_chosen_is_ignored_and_kept() -> None:
    a = matrix("harmonic", 300, 200)
    want = ops.truncated_svd(a, energy=0.95)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        got = ops.truncated_svd(a, energy=0.95)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_gradients_and_inference_mode() -> None:
    a = matrix("harmonic", 100, 80).requires_grad_()
    assert not ops.truncated_svd(a, energy=0.9).U.requires_grad
    with torch.inference_mode():
        inside = ops.truncated_svd(a.detach().clone(), energy=0.9)
    assert torch.equal(inside.U, ops.truncated_svd(a, energy=0.9).U)


# ---- wrong arguments ----


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({}, ValueError, "one of `energy` and `rank`, but got energy=None and rank=None"),
        ({"energy": 0.9, "rank": 3}, ValueError, "one of `energy` and `rank`"),
        ({"energy": 0}, ValueError, "`energy` to be above 0 and at most 1, but got 0"),
        ({"energy": 1.1}, ValueError, "`energy` to be above 0 and at most 1, but got 1.1"),
        ({"energy": -0.5}, ValueError, "`energy` to be above 0"),
        ({"energy": math.nan}, ValueError, "`energy` to be above 0 and at most 1, but got nan"),
        ({"energy": True}, TypeError, "`energy` to be a number, but got bool"),
        ({"energy": "0.9"}, TypeError, "`energy` to be a number, but got str"),
        ({"rank": 0}, ValueError, r"`rank` to be an integer from 1 to min\(m, n\) = 4, but got 0"),
        ({"rank": 5}, ValueError, r"`rank` to be an integer from 1 to min\(m, n\) = 4, but got 5"),
        ({"rank": True}, TypeError, "`rank` to be an integer, but got bool"),
        ({"rank": 2.0}, TypeError, "`rank` to be an integer, but got float"),
        ({"energy": 0.9, "max_rank": 0}, ValueError, "`max_rank` to be an integer from 1 to"),
        ({"energy": 0.9, "max_rank": 5}, ValueError, "`max_rank` to be an integer from 1 to"),
        ({"rank": 3, "max_rank": 2}, ValueError, "`rank` to be at most `max_rank`, but got 3 and 2"),
        ({"energy": 0.9, "seed": -1}, ValueError, r"`seed` to be an integer from 0 to 2\*\*64 - 1, but got -1"),
        ({"energy": 0.9, "seed": 2**64}, ValueError, "`seed` to be an integer from 0 to"),
        ({"energy": 0.9, "seed": 1.0}, TypeError, "`seed` to be an integer, but got float"),
        ({"energy": 0.9, "seed": False}, TypeError, "`seed` to be an integer, but got bool"),
    ],
)
def test_wrong_options(options: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ops.truncated_svd(torch.ones(2, 5, 4), **options)


def test_wrong_tensors() -> None:
    with pytest.raises(ValueError, match=r"batch of matrices \[B, m, n\], but got shape \[5, 4\]"):
        ops.truncated_svd(torch.ones(5, 4), energy=0.9)
    with pytest.raises(TypeError, match="`a` to be a tensor of float32 .* but got torch.int64"):
        ops.truncated_svd(torch.ones(2, 5, 4, dtype=torch.int64), energy=0.9)
    with pytest.raises(TypeError, match=r"but got torch\.complex64"):
        ops.truncated_svd(torch.ones(2, 5, 4, dtype=torch.complex64), energy=0.9)
    with pytest.raises(TypeError, match="but got list"):
        ops.truncated_svd([[1.0]], energy=0.9)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="dense tensor"):
        ops.truncated_svd(torch.ones(2, 5, 4).to_sparse(), energy=0.9)


@pytest.mark.parametrize("tail", [1e-2, 4e-4, 1e-5])
def test_a_rank_is_kept_however_steep_the_spectrum(tail: float) -> None:
    g = torch.Generator().manual_seed(0)
    s = torch.tensor([1.0] * 3 + [tail] * 20 + [tail / 10] * 20, dtype=torch.float64)
    u, v = (torch.linalg.qr(torch.randn(n, len(s), dtype=torch.float64, generator=g)).Q for n in (300, 200))
    a = (u * s @ v.mT).float()[None]
    found = ops.truncated_svd(a, rank=10)
    assert found.rank.tolist() == [10]
    torch.testing.assert_close(found.S[0].double(), s[:10], rtol=1e-3, atol=0)
    error = (a.double() - found.U.double() * found.S.double()[:, None] @ found.Vh.double()).square().sum()
    assert float(error) <= 1.001 * float(s[10:].square().sum()) + 1e-12


def test_a_matrix_of_lower_rank_gives_what_it_has() -> None:
    g = torch.Generator().manual_seed(1)
    a = torch.randn(1, 300, 4, generator=g) @ torch.randn(1, 4, 200, generator=g)
    assert ops.truncated_svd(a, rank=10).rank.tolist() == [4]


def test_max_rank_at_the_optimum_is_reached() -> None:
    g = torch.Generator().manual_seed(2)
    missed = 0
    for _ in range(20):
        power = 0.4 + 0.5 * float(torch.rand((), generator=g))
        s = torch.arange(1, 201, dtype=torch.float64) ** -power
        u, v = (torch.linalg.qr(torch.randn(n, 200, dtype=torch.float64, generator=g)).Q for n in (260, 200))
        a = (u * s @ v.mT).float()[None]
        best = int((s.square().cumsum(0) < 0.7 * s.square().sum()).sum()) + 1
        missed += int(ops.truncated_svd(a, energy=0.7, max_rank=best).rank) == -1
    assert missed == 0
