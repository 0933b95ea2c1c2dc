"""The CUDA kernels under the truncated SVD, emulated: see `test_cuda_emulated.py`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cuda_support import GXX, Fenced, Guarded, load_emulated, misaligned
from dense_support import DTYPES, F64, SHAPES, check_eigh, matrices, norm_in_order, normal
from torch import Tensor

from dynfed_lightning import _ops_cuda as cuda
from dynfed_lightning import _reference as reference

pytestmark = pytest.mark.skipif(GXX is None, reason="the emulated kernels need g++")

# Around every change of the number of warps, and of where eigenvectors are kept; odd ones are padded.
SIZES = [1, 2, 3, 5, 16, 17, 31, 32, 33, 48, 63, 64, 65, 95, 96, 97, 118, 119, 127, 128]
SMALL_MEMORY = "101376"  # bytes a block, with compute capability 8.6, 8.9 and 12.0


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    load_emulated()
    monkeypatch.setattr(cuda, "_C", torch.ops.dynfed_lightning_cuda_emulated)
    yield


def eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    w, v = torch.full(a.shape[:2], 7.0, dtype=F64), torch.full(a.shape, 7.0, dtype=F64)
    cuda.symmetric_eigh(a, w, v)
    return w, v


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("l", SIZES)
def test_symmetric_eigh(l: int) -> None:
    a = matrices(l) if l < 95 else matrices(l)[1:3]
    check_eigh(a, *eigh(a))


@pytest.mark.slow
def test_every_size() -> None:
    for l in range(1, 129):
        a = matrices(l)[2:3]
        check_eigh(a, *eigh(a))


@pytest.mark.parametrize("l, memory", [(33, "20000"), (48, "30000"), (96, SMALL_MEMORY), (109, SMALL_MEMORY)])
def test_eigenvectors_in_global_memory_are_the_same(l: int, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a = matrices(l)[:2]
    expected = eigh(a)
    monkeypatch.setenv("DYNFED_SHIM_SHARED", memory)
    assert same(eigh(a), expected)


def test_too_large_a_matrix_goes_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    a = matrices(129)[:1]
    w, v = torch.zeros(1, 129, dtype=F64), torch.zeros(1, 129, 129, dtype=F64)
    assert not cuda._C.symmetric_eigh(a, w, v)
    reference.symmetric_eigh(a, w, v)
    assert same(eigh(a), (w, v))
    monkeypatch.setenv("DYNFED_SHIM_SHARED", SMALL_MEMORY)
    assert not cuda._C.symmetric_eigh(a[:, :112, :112].contiguous(), w[:, :112].clone(), v[:, :112, :112].contiguous())


@pytest.mark.parametrize("l", [1, 2, 5, 32, 33])
def test_matrices_with_nothing_to_rotate_are_exact(l: int) -> None:
    a = torch.zeros(3, l, l, dtype=F64)
    a[1] = 3 * torch.eye(l, dtype=F64)
    diagonal = torch.tensor([(7 * i) % 5 - 2.0 for i in range(l)], dtype=F64)  # neither sorted nor distinct
    a[2] = torch.diag(diagonal)
    w, v = eigh(a)
    order = sorted(range(l), key=lambda i: (-float(diagonal[i]), i))
    identity = torch.eye(l, dtype=F64)
    assert torch.equal(w[0], torch.zeros(l, dtype=F64)) and torch.equal(w[1], torch.full((l,), 3.0, dtype=F64))
    assert torch.equal(v[0], identity) and torch.equal(v[1], identity)
    assert torch.equal(w[2], diagonal[order]) and torch.equal(v[2], identity[:, order])


@pytest.mark.parametrize("l", [2, 7, 32])
def test_ones_and_a_single_pair(l: int) -> None:
    a = torch.zeros(2, l, l, dtype=F64)
    a[0] = 1.0
    a[1, 0, l - 1] = a[1, l - 1, 0] = -2.0
    w, v = eigh(a)
    check_eigh(a, w, v)
    assert abs(float(w[0, 0]) - l) < 1e-13 * l and float(w[0, 1:].abs().max()) < 1e-14 * l
    assert abs(float(w[1, 0]) - 2) < 1e-15 and abs(float(w[1, -1]) + 2) < 1e-15


@pytest.mark.parametrize("l", [5, 32])
def test_a_power_of_two_changes_nothing_but_the_exponents(l: int) -> None:
    a = matrices(l)[:2]
    w, v = eigh(a)
    for exponent in (-940, -300, 1, 900):
        scaled = torch.ldexp(torch.ldexp(a, torch.tensor(exponent // 2)), torch.tensor(exponent - exponent // 2))
        back, same_vectors = eigh(scaled)
        undone = torch.ldexp(torch.ldexp(back, torch.tensor(-(exponent // 2))), torch.tensor(exponent // 2 - exponent))
        assert torch.equal(undone, w) and torch.equal(same_vectors, v), exponent


def test_denormal_and_the_largest_numbers() -> None:
    quantum = 5e-324
    a = torch.tensor([[[0.0, quantum], [quantum, 0.0]], [[3 * quantum, 0.0], [0.0, -quantum]]], dtype=F64)
    w, v = eigh(a)
    assert w.tolist() == [[quantum, -quantum], [3 * quantum, -quantum]]
    assert torch.allclose(v[0].abs(), torch.full((2, 2), 0.5**0.5, dtype=F64), atol=1e-15)
    top = 0.99 * torch.finfo(F64).max
    w, v = eigh(torch.tensor([[[0.0, top], [top, 0.0]]], dtype=F64))
    assert torch.allclose(w / top, torch.tensor([[1.0, -1.0]], dtype=F64), rtol=1e-15)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_matrix_that_is_not_finite_gives_nan_and_leaves_the_others_alone(value: float) -> None:
    for at in ((0, 0), (3, 30), (30, 3), (32, 32)):
        a = matrices(33)[:3]
        alone = eigh(a[[0, 2]])
        a[1][at] = value
        w, v = eigh(a)
        assert bool(w[1].isnan().all()) and bool(v[1].isnan().all())
        assert same((w[[0, 2]], v[[0, 2]]), alone)


def test_a_matrix_is_the_same_in_any_batch_and_at_any_address() -> None:
    a = matrices(31)
    w, v = eigh(a)
    for i in range(len(a)):
        assert same(eigh(misaligned(a[i].flatten(), 1).view(1, 31, 31)), (w[i : i + 1], v[i : i + 1]))


def test_only_the_lower_triangle_counts() -> None:
    a = matrices(20)[:2]
    assert same(eigh(a.tril() + 5 * normal(20, 20).triu(1)), eigh(a))


@pytest.mark.parametrize("l", [5, 32, 47, 65])
@pytest.mark.parametrize("memory", ["232448", "45000"])
def test_the_order_of_the_threads_does_not_matter(l: int, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing barrier would show here."""
    a = matrices(l)[:2]
    monkeypatch.setenv("DYNFED_SHIM_SHARED", memory)
    expected = eigh(a)
    monkeypatch.setenv("DYNFED_SHIM_BACKWARDS", "1")
    assert same(eigh(a), expected)


@pytest.mark.parametrize("l", [1, 2, 17, 48])
@pytest.mark.parametrize("memory", ["232448", "30000"])
def test_nothing_else_is_read_or_written(l: int, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNFED_SHIM_SHARED", memory)
    fenced = Fenced()
    a = matrices(l)[:2]
    for at_end in (True, False):
        w, v = Guarded(2 * l, F64, 1), Guarded(2 * l * l, F64, 1)
        cuda.symmetric_eigh(fenced(a.flatten(), at_end).view(a.shape), w.room.view(2, l), v.room.view(a.shape))
        assert w.intact() and v.intact()
        check_eigh(a, w.room.view(2, l), v.room.view(a.shape))


def test_wrong_arguments_are_refused() -> None:
    a, w, v = matrices(4)[:2], torch.zeros(2, 4, dtype=F64), torch.zeros(2, 4, 4, dtype=F64)
    for args in ((a.float(), w, v), (a, w.float(), v), (a, w[:1], v), (a, w, v[:1]), (a[:, :3].contiguous(), w, v)):
        with pytest.raises(RuntimeError, match="Expected"):
            cuda._C.symmetric_eigh(*args)
    with pytest.raises(RuntimeError, match="contiguous"):
        cuda._C.symmetric_eigh(torch.zeros(2, 4, 8, dtype=F64)[:, :, ::2], w, v)
    x, out, partial = torch.zeros(2, 64, 64), torch.zeros(2, dtype=F64), torch.zeros(4, dtype=F64)
    for args in (
        (x.int(), out, partial),
        (x[0], out, partial),
        (x, out[:1], partial),
        (x, out, partial[:3]),
        (x, out.float(), partial),
    ):
        with pytest.raises(RuntimeError, match="Expected"):
            cuda._C.squared_norm(*args)


# ---- squared_norm ----


def squared_norm(a: Tensor) -> Tensor:
    out = Guarded(a.shape[0], F64)
    cuda.squared_norm(a, out.room)
    assert out.intact()
    return out.room


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squared_norm(dtype: torch.dtype) -> None:
    for m, n in SHAPES:
        a = normal(3, m, n, seed=m + n).to(dtype)
        got, expected = squared_norm(a), a.to(F64).square().sum(dim=(1, 2))
        assert float(((got - expected) / expected).abs().max()) < 1e-14, (m, n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_order_of_summation(dtype: torch.dtype) -> None:
    """To the bit, as the squares are exact; with more chunks than a block has threads too."""
    for shape in (*((3, m, n) for m, n in SHAPES), (1, 300, 2049), (1, 1, 256 * 2048)):
        a = normal(*shape, seed=shape[1]).to(dtype)
        assert torch.equal(squared_norm(a), norm_in_order(a)), shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_is_the_same_in_any_batch_and_at_any_address(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for m, n in ((3, 5), (64, 32), (64, 96), (257, 131)):
        a = normal(3, m, n, seed=m + n).to(dtype)
        expected = squared_norm(a)
        for by in (1, 3, 7):
            assert torch.equal(squared_norm(misaligned(a.flatten(), by).view(a.shape)), expected)
        assert torch.equal(torch.cat([squared_norm(one[None].clone()) for one in a]), expected)
        with monkeypatch.context() as patch:
            patch.setenv("DYNFED_SHIM_BACKWARDS", "1")
            assert torch.equal(squared_norm(a), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_that_are_no_numbers(dtype: torch.dtype) -> None:
    a = normal(5, 70, 70).to(dtype)
    expected = squared_norm(a)
    a[1, 69, 69], a[2, 0, 0], a[3, 30, 1], a[3, 40, 1] = float("nan"), float("inf"), -float("inf"), float("nan")
    got = squared_norm(a)
    assert torch.equal(got[[0, 4]], expected[[0, 4]])
    assert bool(got[1].isnan()) and float(got[2]) == float("inf") and bool(got[3].isnan())


def test_norms_of_extreme_values() -> None:
    big, small = 3.4e38, 1e-40
    a = torch.full((2, 50, 50), big)
    a[1] = small
    expected = torch.tensor([2500 * float(torch.tensor(x)) ** 2 for x in (big, small)], dtype=F64)
    assert torch.allclose(squared_norm(a), expected, rtol=1e-14, atol=0.0)
    assert float(squared_norm(torch.full((1, 2, 2), 1e200, dtype=F64))) == float("inf")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_value_outside_of_the_matrices_is_read(dtype: torch.dtype) -> None:
    fenced = Fenced()
    for m, n in SHAPES:
        a = normal(2, m, n).to(dtype)
        for at_end in (True, False):
            assert torch.equal(squared_norm(fenced(a.flatten(), at_end).view(a.shape)), squared_norm(a))
