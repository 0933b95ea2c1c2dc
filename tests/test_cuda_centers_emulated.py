"""The CUDA kernels for learned centres, emulated on the CPU: see test_cuda_emulated.py."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import centers_support as support
import pytest
import test_soft_prox as shared_prox
import test_soft_quantize as shared
import torch
from centers_support import DTYPES, LAYERS, Model, awkward, centers_of, draw, model
from cuda_support import GXX, Fenced, Guarded, load_emulated, misaligned
from ops_support import same

from dynfed_lightning import _ops_cuda as cuda
from dynfed_lightning import _reference as reference
from dynfed_lightning import _soft_register

pytestmark = pytest.mark.skipif(GXX is None, reason="the emulated kernels need g++")

MANY = tuple((1 + 37 * i % 61, 1 + i % 9) for i in range(260))  # more layers than any launch takes


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backend's module, with the emulated operators in the place of the real ones."""
    load_emulated()
    monkeypatch.setattr(cuda, "_C", torch.ops.dynfed_lightning_cuda_emulated)
    yield


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> str:
    """The emulated backend, for the operators themselves."""
    monkeypatch.setattr(_soft_register, "choose", lambda operation, device: cuda)
    return "cuda"


@pytest.mark.parametrize("sharpness", [1.0, 100.0, 1000.0])
@pytest.mark.parametrize("m", [1, 2, 3, 16, 33, 256])
def test_the_accuracy_of_every_backend(chosen: str, m: int, sharpness: float) -> None:
    shared.test_values_and_gradients(chosen, m, sharpness)


def test_what_holds_on_every_backend(chosen: str) -> None:
    for m in (2, 16, 40):
        for scale in (1e-3, 100.0):
            shared.test_small_and_large_centres(chosen, m, scale)
        shared.test_without_end_sharp_it_is_the_nearest_centre(chosen, m)
    shared.test_far_outside_of_the_centres_nothing_is_left(chosen)
    shared.test_the_largest_centre_up_to_which_the_sharpness_is_what_it_says(chosen)
    shared.test_gradients_are_finite_differences(chosen, 16)
    shared.test_one_centre(chosen)
    shared.test_a_model_in_one_call_is_its_layers_one_by_one(chosen)
    shared.test_only_what_is_asked_for(chosen)
    for dtype in (torch.bfloat16, torch.float16):
        shared.test_half_precision_is_float32_rounded_once(chosen, dtype)


def test_what_holds_of_nearest_centres_and_sums_on_every_backend(chosen: str) -> None:
    for m in (1, 2, 16, 256):
        shared_prox.test_nearest_center_is_the_reference_bit_for_bit(chosen, m)
        shared_prox.test_prox_weights_is_the_reference_bit_for_bit(chosen, m)
        for dtype in DTYPES:
            shared_prox.test_center_sums(chosen, m, dtype)
    shared_prox.test_a_tie_goes_up_and_nan_to_the_first(chosen)
    shared_prox.test_prox_weights_minimises_in_ten_thousand_cases(chosen)
    shared_prox.test_prox_weights_by_hand(chosen)
    shared_prox.test_prox_weights_into_memory_that_is_there(chosen)
    shared_prox.test_a_result_never_lands_on_what_another_layer_has_yet_to_read(chosen)
    for m, strength in ((1, 1e-4), (16, 1e-6), (40, 1.0)):
        shared_prox.test_prox_centers_of_many_values(chosen, m, strength)
    shared_prox.test_prox_centers_leaves_nan_and_half_precision_in_their_places(chosen)
    shared_prox.test_fine_tuning_moves_a_centre_by_the_sum_of_its_weights_gradients(chosen)
    shared_prox.test_empty_and_strided(chosen)


@pytest.mark.slow
def test_prox_centers_minimises_in_ten_thousand_cases(chosen: str) -> None:
    shared_prox.test_prox_centers_minimises_in_ten_thousand_cases(chosen)


@pytest.mark.parametrize("factor", [0.5, 10.0, 1e5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_soft_quantize_and_its_gradients(dtype: torch.dtype, factor: float) -> None:
    support.check_soft(cuda, model(dtype=dtype, factor=factor))


def test_soft_quantize_of_many_layers() -> None:
    support.check_soft(cuda, model(MANY))
    support.check_exact(cuda, model(MANY, factor=0.001))
    support.check_sums(cuda, model(MANY))


def test_only_the_gradients_that_are_wanted() -> None:
    m = model()
    dx, dcenters = support.soft_backward(cuda, m)
    alone = support.soft_backward(cuda, m, want_centers=False)
    assert all(same(a, b) for a, b in zip(alone[0], dx, strict=True)) and not alone[1].numel()
    alone = support.soft_backward(cuda, m, want_x=False)
    assert alone[0] == [] and same(alone[1], dcenters)


def test_soft_quantize_far_from_the_centres() -> None:
    """The nearest end, no gradient to the values, and all of the gradient to that end; NaN is NaN everywhere."""
    c = torch.tensor([-2.0, -1.0, 0.5])
    x = torch.tensor([-torch.inf, -1e38, -300.0, 300.0, 3e38, torch.inf, torch.nan])
    g = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 0.0])
    m = Model([x], c, torch.tensor([0, 3]), torch.tensor([20.0], dtype=torch.float64), [g])
    (out,), ((dx,), dc) = support.soft(cuda, m), support.soft_backward(cuda, m)
    assert torch.allclose(out[:6], torch.tensor([-2.0, -2, -2, 0.5, 0.5, 0.5]), rtol=1e-7) and bool(out[6].isnan())
    assert float(dx[:6].abs().max()) < 1e-15 and bool(dx[6].isnan()) and bool(dc.isnan().any())
    m.x[0][6] = 0.0
    assert torch.allclose(support.soft_backward(cuda, m)[1], torch.tensor([7.0, 0.0, 56.0]), atol=1e-6)


def test_the_gradient_of_centres_is_the_same_wherever_the_weights_lie() -> None:
    """The order of summation must not depend on addresses or on the other layers."""
    n, m = 5003, 6
    x, g, c = draw(n, seed=1), draw(n, seed=2), centers_of(m, 3)
    factors = torch.full((1,), 9.0, dtype=torch.float64)
    _, want = support.soft_backward(cuda, Model([x], c, torch.tensor([0, m]), factors, [g]))
    for by in (1, 2, 3):
        _, got = support.soft_backward(
            cuda, Model([misaligned(x, by)], c, torch.tensor([0, m]), factors, [misaligned(g, 4 - by)])
        )
        assert same(got, want)
    several = Model([x[:77], x], torch.cat((c, c)), torch.tensor([0, m, 2 * m]), factors.repeat(2), [g[:77], g])
    assert same(support.soft_backward(cuda, several)[1][m:], want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nearest_center_and_prox_weights(dtype: torch.dtype) -> None:
    for factor in (0.0, 0.003, 0.4):
        support.check_exact(cuda, model(dtype=dtype, factor=factor))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_awkward_values(dtype: torch.dtype) -> None:
    for count in (1, 2, 3, 16, 100, 256):
        c = centers_of(count, seed=count)
        for threshold in (0.0, 0.01, 1.0):
            factors = torch.tensor([threshold], dtype=torch.float64)
            support.check_exact(cuda, Model([awkward(c, dtype)], c, torch.tensor([0, count]), factors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_to_half_precision(dtype: torch.dtype) -> None:
    """One centre, threshold 0: the result is the value itself, however it is rounded; with a threshold, its difference."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    x = every.to(dtype)
    for threshold in (0.0, 1e-6, 0.3, 1000.0):
        factors = torch.tensor([threshold], dtype=torch.float64)
        support.check_exact(cuda, Model([x], torch.tensor([0.37]), torch.tensor([0, 1]), factors))


@pytest.mark.parametrize("by", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_layers_and_nothing_written_beside_them(dtype: torch.dtype, by: int) -> None:
    m = model(((4099, 5), (300, 2)), dtype=dtype)
    plain = support.soft(cuda, m), *support.soft_backward(cuda, m), support.nearest(cuda, m), support.prox(cuda, m)
    m.x, m.grad = [misaligned(t, by) for t in m.x], [misaligned(t, by) for t in m.grad]
    room = [[Guarded(t.numel(), dtype, by) for t in m.x] for _ in range(4)]
    bytes_room = [Guarded(t.numel(), torch.uint8, by) for t in m.x]
    arena = Guarded(m.centers.numel(), torch.float32, by)
    out, dx, value, moved = ([g.room for g in guards] for guards in room)
    index = [g.room for g in bytes_room]
    cuda.soft_quantize(m.x, m.centers, m.first, m.factors, out)
    cuda.soft_quantize_backward(m.grad, m.x, m.centers, m.first, m.factors, dx, arena.room)
    cuda.nearest_center(m.x, m.centers, m.first, index, value)
    cuda.prox_weights(m.x, m.centers, m.first, m.factors, moved)
    for got, want in zip((out, dx, value, moved), (plain[0], plain[1], plain[3][1], plain[4]), strict=True):
        assert all(same(a, b) for a, b in zip(got, want, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(index, plain[3][0], strict=True)) and same(arena.room, plain[2])
    assert all(g.intact() for g in (*bytes_room, arena, *(g for guards in room for g in guards)))
    want = support.sums(cuda, m, plain[3][0])
    assert cuda.center_sums(m.x, index, m.first, arena.room) is None
    assert same(arena.room, want) and arena.intact()
    support.check_moved(cuda, m, m.centers + 0.01)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mprotect"), reason="needs mprotect")
@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_read_outside_of_the_inputs(dtype: torch.dtype, at_end: bool) -> None:
    fenced = Fenced()
    for n in (1, 7, 8, 9, 2047, 2048, 2055):
        m = model(((n, 3),), dtype=dtype)
        m.x, m.grad = [fenced(t, at_end) for t in m.x], [fenced(t, at_end) for t in m.grad]
        m.centers = fenced(m.centers, at_end)
        index, _ = support.nearest(cuda, m)
        support.soft(cuda, m), support.soft_backward(cuda, m), support.prox(cuda, m)
        support.sums(cuda, m, [fenced(i, at_end) for i in index])
        support.moved(cuda, m, fenced(m.centers.clone(), at_end))


# ---- the proximal step of centres ----


@pytest.mark.parametrize("strength", [0.0, 1e-6, 1e-3, 0.1, 100.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prox_centers(dtype: torch.dtype, strength: float) -> None:
    m = model(dtype=dtype, factor=strength)
    for shift in (0.0, 0.2):
        proposal = m.centers + shift * draw(m.centers.numel(), seed=5)
        support.check_moved(cuda, m, proposal)


def test_prox_centers_of_many_layers_and_of_many_values() -> None:
    m = model(MANY, factor=0.01)
    support.check_moved(cuda, m, m.centers - 0.05)
    m = model(((60_000, 3), (40_000, 40)), factor=1e-5)
    support.check_moved(cuda, m, m.centers + 0.01)


def test_prox_centers_at_members_ties_and_ends() -> None:
    """Many equal members, zeros of both signs, infinities, NaN, a proposal that is no number: what the definition says."""
    zeros = torch.cat((torch.zeros(50), -torch.zeros(50), torch.full((50,), 1e-45), torch.tensor([torch.nan] * 9)))
    cases = [
        (zeros, [0.0], [0.3], 0.01),  # pulled into the heap at zero
        (zeros, [0.0], [0.3], 0.002),  # not as far as that
        (zeros, [-1.0, 1.0], [-0.25, 0.75], 0.01),
        (torch.full((1000,), 0.1), [0.1], [0.1], 5.0),
        (torch.tensor([-torch.inf, torch.inf, 1.0]), [0.0, 2.0], [0.5, 2.5], 1.0),
        (torch.tensor([-3e38, 3e38]), [0.0, 1.0], [-1.0, 2.0], 3e38),
        (torch.tensor([1.0]), [-5.0, 5.0], [4.0, -4.0], 0.1),  # sorted at the end
        (torch.empty(0), [1.0, 2.0, 3.0], [2.0, 1.0, 3.0], 0.1),
    ]
    for x, c, proposal, strength in cases:
        factors = torch.tensor([strength], dtype=torch.float64)
        m = Model([x], torch.tensor(c), torch.tensor([0, len(c)]), factors)
        support.check_moved(cuda, m, torch.tensor(proposal))
    m = Model(
        [torch.zeros(5)], torch.tensor([0.0, 1.0]), torch.tensor([0, 2]), torch.tensor([0.1], dtype=torch.float64)
    )
    got = support.moved(cuda, m, torch.tensor([torch.nan, 0.25]))
    assert float(got[0]) == 0.25 and bool(got[1].isnan())


def test_prox_centers_minimises() -> None:
    """No float nearby does better, in float64."""
    m = model(((3001, 4),), factor=2e-3)
    proposal = m.centers + 0.3
    got, (index,) = support.moved(cuda, m, proposal), support.nearest(reference, m)[0]
    assert bool((got.diff() > 0).all())  # so that they are still in the order of the proposals
    for j, (c, mu) in enumerate(zip(got, proposal, strict=True)):
        near = torch.stack([c, torch.nextafter(c, c - 1), torch.nextafter(c, c + 1), c + 1e-4, c - 1e-4, mu]).double()
        members = m.x[0][index == j].double()
        cost = (near - mu.double()).square() / 2 + float(m.factors[0]) / 2 * (members[:, None] - near).abs().sum(0)
        assert int(cost.argmin()) == 0 or float(cost[0] - cost.min()) < 1e-12


# ---- sums by centre ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_center_sums(dtype: torch.dtype) -> None:
    support.check_sums(cuda, model(dtype=dtype))


def test_an_index_beyond_the_centres_counts_nowhere() -> None:
    x, index = torch.ones(3000), torch.arange(3000).remainder(256).to(torch.uint8)
    out = torch.full((5,), 77.0)
    cuda.center_sums([x], [index], torch.tensor([0, 5]), out)
    assert out.tolist() == [12.0] * 5


# ---- arguments ----


def test_wrong_arguments_are_refused() -> None:
    m = model(((10, 2), (20, 3)))
    out, index = support.like(m.x), support.like(m.x, torch.uint8)
    bad_first = [torch.tensor(f) for f in ([0, 2], [0, 2, 4], [0, 2, 6], [0, 5, 5], [1, 2, 5], [0, -1, 5])]
    for first in bad_first:
        with pytest.raises(RuntimeError, match="Expected"):
            cuda.soft_quantize(m.x, m.centers, first, m.factors, out)
        with pytest.raises(RuntimeError, match="Expected"):
            cuda.nearest_center(m.x, m.centers, first, index, out)
    for targets in (out[:1], [out[0], out[0]], [t.double() for t in out], index):
        with pytest.raises(RuntimeError, match="Expected"):
            cuda.prox_weights(m.x, m.centers, m.first, m.factors, targets)
        with pytest.raises(RuntimeError, match="Expected"):
            cuda.soft_quantize_backward(targets, m.x, m.centers, m.first, m.factors, out, m.centers.clone())
    for factors in (m.factors[:1], m.factors.float()):
        with pytest.raises(RuntimeError, match="Expected"):
            cuda.prox_centers(m.centers, m.x, m.centers, m.first, factors, m.centers.clone())
    with pytest.raises(RuntimeError, match="Expected"):
        cuda.prox_centers(m.centers[:-1], m.x, m.centers, m.first, m.factors, m.centers.clone())
    with pytest.raises(RuntimeError, match="Expected"):
        cuda.soft_quantize([t.double() for t in m.x], m.centers, m.first, m.factors, [t.double() for t in out])
    with pytest.raises(RuntimeError, match="Expected"):
        cuda.center_sums(m.x, out, m.first, m.centers.clone())


def test_a_model_without_layers() -> None:
    empty, first, none = torch.empty(0), torch.zeros(1, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
    cuda.soft_quantize([], empty, first, none, [])
    cuda.soft_quantize_backward([], [], empty, first, none, [], empty)
    cuda.nearest_center([], empty, first, [], [])
    cuda.prox_centers(empty, [], empty, first, none, empty)
    assert LAYERS[0][0] == 0  # and layers without values are among those of the other tests
