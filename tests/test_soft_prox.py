"""`nearest_center`, `prox_weights`, `prox_centers` and `center_sums` of every backend against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ops_support import BACKENDS, CPP_BACKENDS, GPU_BACKENDS, backend_fixture, same
from soft_support import COUNTS, centers, generator, here, weights
from torch import Tensor

from dynfed_lightning import _reference, ops

backend = backend_fixture(BACKENDS)
kernels = backend_fixture(BACKENDS[1:])
cpp = backend_fixture(CPP_BACKENDS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def first(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int64, device="cpu")


def reference_nearest(x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    index, value = torch.empty_like(x, dtype=torch.uint8), torch.empty_like(x)
    _reference.nearest_center([x], c, first([len(c)]), [index], [value])
    return index, value


def reference_prox(y: Tensor, c: Tensor, threshold: float) -> Tensor:
    out = torch.empty_like(y)
    _reference.prox_weights(
        [y], c, first([len(c)]), torch.tensor([threshold], dtype=torch.float64, device="cpu"), [out]
    )
    return out


# ---- nearest centres ----


def test_the_reference_is_the_least_distance() -> None:
    """By the definition in float32, in numpy, one value after the other."""
    for m in COUNTS:
        c = centers(m)
        x = weights(500, c)
        index, value = reference_nearest(x, c)
        mids = [(a + b) * np.float32(0.5) for a, b in zip(c.numpy()[:-1], c.numpy()[1:], strict=True)]
        want = [sum(v >= mid for mid in mids) for v in x.numpy()]
        assert index.tolist() == want and torch.equal(value, c[want])
        distance = (x.double()[:, None] - c.double()).abs()
        assert bool(((x.double() - value.double()).abs() <= distance.amin(1) * (1 + 1e-6) + 1e-7).all())


@pytest.mark.parametrize("m", COUNTS)
def test_nearest_center_is_the_reference_bit_for_bit(kernels: str, m: int) -> None:
    c = centers(m)
    for dtype in DTYPES:
        for n in (1, 7, 8, 15, 16, 17, 1000, 20001):
            x = weights(n, c, seed=n).to(dtype)
            if n > 16:
                x[[1, 5, n - 1]] = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype, device="cpu")
            index, value = ops.nearest_center(here(x), here(c))
            want = reference_nearest(x, c)
            assert index.dtype == torch.uint8 and value.dtype == dtype
            assert torch.equal(index.cpu(), want[0]) and same(value.float(), want[1].float())


def test_a_tie_goes_up_and_nan_to_the_first(backend: str) -> None:
    c = here(torch.tensor([-1.0, 0.0, 0.5], device="cpu"))
    x = here(torch.tensor([-0.5, 0.25, -0.50000006, 0.24999999, math.nan, math.inf, -math.inf, -0.0], device="cpu"))
    index, value = ops.nearest_center(x, c)
    assert index.tolist() == [1, 2, 0, 1, 0, 2, 0, 1]
    assert (
        value.tolist()[:4] == [0.0, 0.5, -1.0, 0.0] and math.isnan(value[4]) and value.tolist()[5:] == [0.5, -1.0, 0.0]
    )


# ---- the proximal step of the weights ----


def threshold_cases(layers: int, each: int) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Layers of a few values: at centres, at midpoints, around the thresholds; thresholds of 0 and huge ones among them."""
    g = generator(21)
    y, c, t = [], [], []
    for i in range(layers):
        place = centers(1 + i % 9, seed=i, scale=float(10.0 ** (i % 3 - 1)))
        threshold = (0.0, 1e-3, 0.05, 0.3, 2.0, 1e6)[i % 6]
        value = torch.randn(each, generator=g, device="cpu") * place.abs().max() * 1.5
        pick = torch.randint(len(place), (each,), generator=g, device="cpu")
        kind = torch.arange(each, device="cpu") % 5
        value = torch.where(kind == 0, place[pick], value)
        value = torch.where(kind == 1, place[pick] + threshold, value)
        value = torch.where((kind == 2) & (pick > 0), (place[pick] + place[pick - 1]) * 0.5, value)
        y.append(value)
        c.append(place)
        t.append(threshold)
    return y, c, t


def test_prox_weights_minimises_in_ten_thousand_cases(backend: str) -> None:
    """No candidate has a lower objective: every centre, every end of a slope, and a fine grid over the whole range."""
    y, c, t = threshold_cases(500, 20)
    found = ops.prox_weights([here(v) for v in y], [here(v) for v in c], t)
    cases = 0
    for value, place, threshold, got in zip(y, c, t, found, strict=True):
        v, p, z = (x.cpu().double()[:, None] for x in (value, place, got))
        p = p.T
        th = float(np.float32(threshold))

        def objective(z: Tensor, v: Tensor = v, p: Tensor = p, th: float = th) -> Tensor:
            return (z - v).square() / 2 + th * (z[..., None] - p).abs().amin(-1)

        ends = torch.cat([p.expand(len(v), -1), v - th, v + th], dim=1)
        low, high = min(float(v.min()), float(p.min())), max(float(v.max()), float(p.max()))
        grid = torch.linspace(low, high, 200, dtype=torch.float64, device="cpu").expand(len(v), -1)
        best = torch.minimum(objective(ends).amin(1), objective(grid).amin(1))
        # A result is rounded to float32, and so are the sums it is decided by.
        scale = torch.maximum(v.abs(), p.abs().max()).squeeze(1)
        allowed = 1.2e-7 * scale * (th + (z - v).abs().squeeze(1)) + 1e-14 * scale.square()
        assert bool((objective(z).squeeze(1) <= best + allowed).all())
        cases += len(v)
    assert cases == 10_000


@pytest.mark.parametrize("m", COUNTS)
def test_prox_weights_is_the_reference_bit_for_bit(kernels: str, m: int) -> None:
    c = centers(m)
    for dtype in DTYPES:
        for n, threshold in ((1, 0.1), (16, 0.0), (1001, 0.01), (1001, 0.3), (20000, 0.05), (333, 1e9)):
            y = weights(n, c, seed=n).to(dtype)
            want = reference_prox(y, c, threshold)
            got = ops.prox_weights(here(y), here(c), threshold)
            assert got.dtype == dtype and same(got.float(), want.float())
            place = here(y).clone()
            assert ops.prox_weights(place, here(c), threshold, out=place) is place and same(place.float(), want.float())


def test_prox_weights_by_hand(backend: str) -> None:
    c = here(torch.tensor([-1.0, 1.0], device="cpu"))
    y = here(torch.tensor([3.0, 1.25, 1.5, 0.6, 0.0, -0.25, -1.0, -1.5, math.nan], device="cpu"))
    got = ops.prox_weights(y, c, 0.5)
    assert got.tolist()[:-1] == [2.5, 1.0, 1.0, 1.0, 0.5, -0.75, -1.0, -1.0] and math.isnan(got[-1])
    assert torch.equal(ops.prox_weights(y[:-1], c, 0.0), y[:-1])


def test_prox_weights_into_memory_that_is_there(backend: str) -> None:
    c = [here(centers(5)), here(centers(30))]
    y = [here(torch.randn(s, generator=generator(22), device="cpu")) for s in ((4, 6, 3, 3), (50,))]
    want = ops.prox_weights(y, c, [0.05, 0.01])
    out = [torch.full_like(v, math.nan) for v in y]
    assert ops.prox_weights(y, c, [0.05, 0.01], out=out) is out
    assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))
    strided = [y[0].clone().to(memory_format=torch.channels_last), y[1].clone()]  # in place, not contiguous
    ops.prox_weights(strided, c, [0.05, 0.01], out=strided)
    assert all(torch.equal(a, b) for a, b in zip(strided, want, strict=True))
    assert strided[0].is_contiguous(memory_format=torch.channels_last)
    parameter = torch.nn.Parameter(y[1].clone())
    before = parameter._version
    ops.prox_weights(parameter, c[1], 0.01, out=parameter)
    assert torch.equal(parameter, want[1]) and parameter._version > before  # a backward pass that needs it will know


def test_a_result_never_lands_on_what_another_layer_has_yet_to_read(backend: str) -> None:
    """An `out` that is another layer's y, or a part of it, is refused; in place, apart, and side by side is not."""
    c = here(torch.tensor([-1.0, 0.0, 1.0], device="cpu"))
    a, b = (here(torch.tensor(v, device="cpu")) for v in ([0.3, 0.9, -0.2], [5.0, 6.0, 7.0]))
    with pytest.raises(ValueError, match=r"Expected `out\[1\]` to be apart from `y\[0\]` in memory, but they overlap"):
        ops.prox_weights([a, b], [c, c], 0.1, out=[b, a])
    with pytest.raises(ValueError, match=r"Expected `out\[0\]` to be apart from `y\[1\]` in memory, but they overlap"):
        ops.prox_weights([a, b], [c, c], 0.1, out=[b, torch.empty_like(b)])
    big = torch.cat([b, b])
    for other, (i, j) in ((big[2:], (2, 1)), (big, (2, 1))):
        with pytest.raises(ValueError, match=rf"`out\[{i}\]` to be apart from `y\[{j}\]`"):
            ops.prox_weights([a, other, b], [c] * 3, 0.1, out=[a, torch.empty_like(other), big[3:]])
    assert b.tolist() == [5.0, 6.0, 7.0]
    want = ops.prox_weights([a, b, b], [c] * 3, 0.1)
    arena = torch.cat([b, b, a])  # neighbours in memory, the same y twice, one in place
    got = ops.prox_weights([arena[6:], b, b], [c] * 3, 0.1, out=[arena[6:], arena[:3], arena[3:6]])
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    empty = a[:0]
    assert ops.prox_weights([a, empty], [c, c], 0.1, out=[a, a[1:1]])[1].numel() == 0


# ---- the proximal step of the centres ----


def minimiser(mu: float, members: np.ndarray, k: float) -> float:
    """The best of all kinks and of the zero of every piece: the objective is convex, and has no other minimum."""
    n = len(members)
    candidates = np.concatenate([members, mu - k / 2 * (2 * np.arange(n + 1) - n)])

    def objective(c: np.ndarray) -> np.ndarray:
        return (c - mu) ** 2 / 2 + k / 2 * np.abs(members[:, None] - c).sum(0)

    values = objective(candidates)
    best = candidates[values.argmin()]
    reach = abs(mu) + np.abs(members).max(initial=0.0) + 1
    grid = objective(np.linspace(best - reach, best + reach, 401))
    assert values.min() <= grid.min() * (1 + 1e-12) + 1e-300
    return float(best)


def centre_cases(layers: int) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[float]]:
    """Few members each: none, one, equal ones, members at the proposal; strengths of 0 and huge ones."""
    g = generator(23)
    proposals, x, c, k = [], [], [], []
    for i in range(layers):
        m = 1 + i % 7
        place = centers(m, seed=i)
        values = torch.randn((0, 1, 3, 12, 40)[i % 5], generator=g, device="cpu")
        proposal = place + 0.1 * torch.randn(m, generator=g, device="cpu")
        if i % 3 == 0:
            values = (values * 8).round() / 8  # many are equal
        if i % 4 == 0 and len(values):
            values[0] = proposal[0]
        proposals.append(proposal)
        x.append(values)
        c.append(place)
        k.append((0.0, 1e-3, 0.02, 0.25, 1.0, 1e3)[i % 6])
    return proposals, x, c, k


def test_prox_centers_minimises_in_ten_thousand_cases(backend: str) -> None:
    proposals, x, c, k = centre_cases(2500)
    found = ops.prox_centers([here(p) for p in proposals], [here(v) for v in x], [here(v) for v in c], k)
    cases = 0
    for mu, value, place, strength, got in zip(proposals, x, c, k, found, strict=True):
        mids = ((place[:-1] + place[1:]) * 0.5).numpy()
        index = np.array([(v >= mids).sum() for v in value.numpy()], dtype=np.int64)
        members = value.double().numpy()
        best = [minimiser(float(mu[j]), members[index == j], strength) for j in range(len(place))]
        assert np.allclose(got.cpu().double().numpy(), np.sort(best), rtol=6.1e-8, atol=1e-15)
        assert got.dtype == torch.float32
        cases += len(place)
    assert cases > 9_900


@pytest.mark.parametrize("strength", [0.0, 1e-6, 1e-4, 1.0, 1e6])
@pytest.mark.parametrize("m", [1, 2, 16, 40, 256])
def test_prox_centers_of_many_values(backend: str, m: int, strength: float) -> None:
    """Where no member matters, few do, and all do; against the median that is the closed form, in numpy."""
    c = centers(m)
    x = torch.randn(30_000, generator=generator(24), device="cpu") * 0.5
    x[:500] = 0.125
    mu = c + 0.01 * torch.randn(m, generator=generator(25), device="cpu")
    got = ops.prox_centers(here(mu), here(x), here(c), strength).cpu()
    index = reference_nearest(x, c)[0].numpy()
    want = []
    for j in range(m):
        members = x.double().numpy()[index == j]
        n = len(members)
        want.append(np.median(np.concatenate([members, float(mu[j]) - strength / 2 * (2.0 * np.arange(n + 1) - n)])))
    assert np.allclose(got.double().numpy(), np.sort(want), rtol=6.1e-8, atol=1e-15)


def test_prox_centers_leaves_nan_and_half_precision_in_their_places(backend: str) -> None:
    c, x = here(centers(4)), here(torch.randn(200, generator=generator(26), device="cpu"))
    want = ops.prox_centers(c, x, c, 0.01)
    nan = torch.full((3,), math.nan, device=x.device)
    assert torch.equal(ops.prox_centers(c, torch.cat([x[:77], nan, x[77:]]), c, 0.01), want)
    for dtype in (torch.bfloat16, torch.float16):
        half = x.to(dtype)
        assert torch.equal(ops.prox_centers(c, half, c, 0.01), ops.prox_centers(c, half.float(), c, 0.01))
    away = c.flip(0).contiguous()  # proposals in any order; the result is sorted, NaN last
    assert torch.equal(ops.prox_centers(away, x[:0], c, 0.01), c)
    away[1] = math.nan
    assert ops.prox_centers(away, x[:0], c, 0.01).isnan().tolist() == [False, False, False, True]


# ---- sums ----


@pytest.mark.parametrize("m", [1, 2, 16, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_center_sums(backend: str, m: int, dtype: torch.dtype) -> None:
    values = [
        torch.randn(s, generator=generator(27), device="cpu").to(dtype) for s in ((300, 111), (5,), (0,), (8200,))
    ]
    index = [torch.randint(m, v.shape, generator=generator(28), device="cpu").to(torch.uint8) for v in values]
    found = ops.center_sums([here(v) for v in values], [here(i) for i in index], m)
    for v, i, got in zip(values, index, found, strict=True):
        number, value = i.flatten().numpy(), v.double().flatten().numpy()
        want, size = (np.bincount(number, each, minlength=m) for each in (value, np.abs(value)))
        assert got.dtype == torch.float32 and got.shape == (m,)
        # On a GPU sums of 2048 values are in float32.
        allowed = 1e-6 * size if backend in GPU_BACKENDS else 6.1e-8 * np.abs(want) + 1e-12
        assert (np.abs(got.cpu().double().numpy() - want) <= allowed).all()
    one = ops.center_sums(here(values[1].double()), here(index[1]), m)
    assert one.dtype == torch.float64
    assert ops.center_sums([], [], 3) == []


def test_fine_tuning_moves_a_centre_by_the_sum_of_its_weights_gradients(backend: str) -> None:
    c, x = here(centers(8)), here(torch.randn(500, generator=generator(29), device="cpu"))
    index, _ = ops.nearest_center(x, c)
    leaf = c.clone().requires_grad_()
    leaf[index.long()].sin().sum().backward()
    assert torch.allclose(ops.center_sums(c[index.long()].cos(), index, 8), leaf.grad, rtol=1e-5, atol=1e-5)


# ---- threads ----


def test_the_same_bits_for_any_number_of_threads(cpp: str) -> None:
    shapes, sizes = ((300, 411), (5,), (100_000,), (64, 64)), (16, 2, 256, 1)
    x = [torch.randn(s, generator=generator(30)) for s in shapes]
    c = [centers(m) for m in sizes]
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)  # `conftest` undoes it
        index, value = ops.nearest_center(x, c)
        moved = ops.prox_centers([v + 0.01 for v in c], x, c, 1e-3)
        found.append([*index, *value, *ops.prox_weights(x, c, 0.01), *moved, *ops.center_sums(x, index, list(sizes))])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_empty_and_strided(backend: str) -> None:
    c, base = here(centers(7)), here(torch.randn(6, 5, 4, generator=generator(31), device="cpu"))
    for x in (base.mT, base[::2], base[..., 1], base[0, 0, 0], base[:0], base[:, :0]):
        flat = x.contiguous()
        for a, b in zip(ops.nearest_center(x, c), ops.nearest_center(flat, c), strict=True):
            assert a.shape == x.shape and torch.equal(a, b)
        assert torch.equal(ops.prox_weights(x, c, 0.1), ops.prox_weights(flat, c, 0.1))
        assert torch.equal(ops.prox_centers(c, x, c, 0.1), ops.prox_centers(c, flat, c, 0.1))
        index = ops.nearest_center(x, c)[0]
        assert torch.equal(ops.center_sums(x, index, 7), ops.center_sums(flat, index, 7))
    assert ops.nearest_center([], []) == ([], []) and ops.prox_weights([], [], 0.1) == [] == ops.prox_centers(
        [], [], [], 0.1
    )
