"""`symmetric_eigh` and `squared_norm`, the operators under `ops.truncated_svd`: every CPU backend, odd input, registration."""

from __future__ import annotations

import math

import pytest
import torch
from ops_support import CPP_BACKENDS, backend_fixture
from torch import Tensor

from dynfed_lightning import _ops_cpu

OPS = torch.ops.dynfed_lightning
backend = backend_fixture(("reference", *CPP_BACKENDS))
kernels = backend_fixture(CPP_BACKENDS)


def symmetric(batch: int, n: int, seed: int = 0) -> Tensor:
    x = torch.randn(batch, n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x + x.mT


def graded(batch: int, n: int, decades: float) -> Tensor:
    """Grams of columns whose norms fall by this many powers of ten."""
    g = torch.Generator().manual_seed(n)
    x = torch.randn(batch, 2 * n, n, dtype=torch.float64, generator=g)
    x = x * torch.logspace(0, -decades, n, dtype=torch.float64)
    return x.mT @ x


def check(a: Tensor) -> None:
    """The contract of `_reference.symmetric_eigh`."""
    w, v = OPS.symmetric_eigh(a)
    want = torch.linalg.eigvalsh(a).flip(1)
    scale = want.abs().amax(1).clamp_min(torch.finfo(torch.float64).tiny)
    assert bool((w[:, :-1] >= w[:, 1:]).all())
    assert float(((w - want).abs().amax(1) / scale).max()) < 1e-12
    assert float(((a @ v - v * w[:, None]).abs().amax((1, 2)) / scale).max()) < 1e-11
    assert float((v.mT @ v - torch.eye(a.shape[1], dtype=a.dtype)).abs().max()) < 1e-11


LARGE = [pytest.param(n, marks=pytest.mark.slow) for n in (4, 5, 8, 15, 31, 32, 48, 100, 128, 200, 256, 257)]


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 33, 64, 65, *LARGE])
def test_eigenvalues_and_vectors(backend: str, n: int) -> None:
    torch.set_num_threads(1)  # LAPACK's threads wait for each other; `conftest` undoes it
    batch = 11 if n <= 65 else 1
    check(symmetric(batch, n, seed=n))
    check(graded(batch, n, 4))


def test_awkward_matrices(backend: str) -> None:
    torch.set_num_threads(1)
    n = 32
    eye = torch.eye(n, dtype=torch.float64)
    check(eye[None])
    check(torch.zeros(3, n, n, dtype=torch.float64))
    check(torch.ones(9, n, n, dtype=torch.float64))
    check(torch.stack([eye, torch.ones(n, n, dtype=torch.float64), 0 * eye, eye.flip(0), -eye]))
    check(torch.diag_embed(torch.arange(n, 0, -1, dtype=torch.float64))[None] - n / 2)
    second = torch.diag(torch.ones(n - 1, dtype=torch.float64), 1)
    check((2 * eye - second - second.mT)[None])
    check(graded(9, n, 12))
    check(graded(9, n, 100))
    check((eye.cumsum(0) @ eye.cumsum(0).mT)[None])
    wilkinson = torch.diag((torch.arange(21, dtype=torch.float64) - 10).abs())
    off = torch.diag(torch.ones(20, dtype=torch.float64), 1)
    check((wilkinson + off + off.mT)[None])


@pytest.mark.parametrize("exponent", [-1000, 600, 1000])
def test_powers_of_two_scale_exactly(kernels: str, exponent: int) -> None:
    a = symmetric(5, 24)
    w, v = OPS.symmetric_eigh(a)
    scaled_w, scaled_v = OPS.symmetric_eigh(torch.ldexp(a, torch.tensor(exponent)))
    assert torch.equal(scaled_w, torch.ldexp(w, torch.tensor(exponent))) and torch.equal(scaled_v, v)


@pytest.mark.parametrize("n", [2, 24, 64, 70])
def test_the_same_bits_alone_in_any_batch_and_with_any_threads(kernels: str, n: int) -> None:
    a = symmetric(19, n)
    a[7] = 1.0  # converges at once: others in its group must not notice
    a[8] = 0.0
    w, v = OPS.symmetric_eigh(a)
    for count in (1, 2, 3, 5, 8):
        for begin in (0, 6, 11):
            part = OPS.symmetric_eigh(a[begin : begin + count])
            assert torch.equal(part[0], w[begin : begin + count]) and torch.equal(part[1], v[begin : begin + count])
    torch.set_num_threads(1)  # `conftest` undoes it
    assert all(torch.equal(x, y) for x, y in zip(OPS.symmetric_eigh(a), (w, v), strict=True))


def test_a_matrix_that_is_not_finite_is_nan_alone(backend: str) -> None:
    a = symmetric(11, 20)
    want = OPS.symmetric_eigh(a)
    for b, value in ((3, math.nan), (5, math.inf), (10, -math.inf)):
        a[b, 2, 7] = a[b, 7, 2] = value
    for got, before in zip(OPS.symmetric_eigh(a), want, strict=True):
        bad = got.isnan().flatten(1)
        assert bad.all(1).tolist() == bad.any(1).tolist() == [b in (3, 5, 10) for b in range(11)]
        assert torch.equal(got[~bad.any(1)], before[~bad.any(1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_squared_norm(backend: str, dtype: torch.dtype) -> None:
    for shape in ((3, 1, 1), (2, 3, 5), (4, 7, 33), (2, 300, 401), (1, 1000, 200), (50, 16, 16)):
        a = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        want = torch.tensor([math.fsum((x.double() ** 2).flatten().tolist()) for x in a], dtype=torch.float64)
        for x in (a, a.mT, a[:, :, ::2].repeat_interleave(2, 2)[:, :, : shape[2]] if shape[2] % 2 == 0 else a):
            exact = want if x.shape != a.shape or x is a else (x.double() ** 2).sum((1, 2))
            assert torch.allclose(OPS.squared_norm(x), exact, rtol=1e-13, atol=0)


def test_squared_norm_of_the_largest_and_smallest_numbers(backend: str) -> None:
    a = torch.stack([torch.full((5, 7), x) for x in (3e38, 1e-45, 0.0, -1e-30)])
    assert torch.allclose(OPS.squared_norm(a), a[:, 0, 0].double().square() * 35, rtol=1e-13, atol=0)
    a[1, 4, 6], a[2, 0, 0] = math.nan, -math.inf
    norms = OPS.squared_norm(a)
    assert torch.isnan(norms).tolist() == [False, True, False, False] and norms[2] == math.inf


def test_squared_norm_has_one_result(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the threads, the batch and the instruction set."""
    a = torch.randn(3, 411, 333, generator=torch.Generator().manual_seed(2))
    want = OPS.squared_norm(a)
    torch.set_num_threads(1)
    assert torch.equal(OPS.squared_norm(a), want) and torch.equal(OPS.squared_norm(a[1:2]), want[1:2])
    monkeypatch.setenv("DYNFED_CPU_ISA", "scalar")
    assert torch.equal(OPS.squared_norm(a), want) and torch.equal(OPS.squared_norm(a.double()), want)


def test_empty(backend: str) -> None:
    w, v = OPS.symmetric_eigh(torch.empty(0, 4, 4, dtype=torch.float64))
    assert w.shape == (0, 4) and v.shape == (0, 4, 4)
    assert OPS.symmetric_eigh(torch.empty(2, 0, 0, dtype=torch.float64))[1].shape == (2, 0, 0)
    assert OPS.squared_norm(torch.empty(0, 3, 4)).shape == (0,)
    assert OPS.squared_norm(torch.empty(2, 0, 4)).tolist() == [0.0, 0.0]


def test_opcheck(backend: str) -> None:
    for name, a in (("symmetric_eigh", symmetric(3, 6)), ("squared_norm", torch.randn(3, 5, 4).bfloat16())):
        result = torch.library.opcheck(getattr(OPS, name).default, (a,))
        assert set(result.values()) == {"SUCCESS"}, name


def test_compile_fullgraph(backend: str) -> None:
    def f(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (*OPS.symmetric_eigh(a.mT @ a), OPS.squared_norm(a))

    a = torch.randn(3, 9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(x, y) for x, y in zip(compiled(a), f(a), strict=True))


def test_the_kernel_refuses_what_it_could_not_hold(kernels: str) -> None:
    a = torch.zeros(2, 257, 257, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="1 to 256 rows, but got 257"):
        _ops_cpu._C.symmetric_eigh(a, a.new_empty(2, 257), torch.empty_like(a), 0)
    a = a[:, :5, :5].contiguous()
    with pytest.raises(RuntimeError, match="`w` to have 10 elements, but got 9"):
        _ops_cpu._C.symmetric_eigh(a, a.new_empty(9), torch.empty_like(a), 0)
    with pytest.raises(RuntimeError, match="`a` to be a contiguous CPU tensor of the right type"):
        _ops_cpu._C.symmetric_eigh(a.float(), a.new_empty(2, 5), torch.empty_like(a), 0)
    with pytest.raises(RuntimeError, match="batch of square matrices"):
        _ops_cpu._C.symmetric_eigh(a[:, :3].contiguous(), a.new_empty(2, 5), torch.empty_like(a), 0)
    with pytest.raises(RuntimeError, match="contiguous"):
        _ops_cpu._C.squared_norm(torch.zeros(2, 4, 6)[:, :, ::2], torch.empty(2, dtype=torch.float64), 0)
    with pytest.raises(RuntimeError, match="`out` to have 2 elements"):
        _ops_cpu._C.squared_norm(torch.zeros(2, 4, 6), torch.empty(3, dtype=torch.float64), 0)
