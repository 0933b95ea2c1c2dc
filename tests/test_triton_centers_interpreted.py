"""The Triton kernels for learned centres in Triton's interpreter: see test_triton_interpreted.py."""

from __future__ import annotations

import centers_support as support
import pytest
import test_soft_prox as shared_prox
import test_soft_quantize as shared
import torch
from centers_support import DTYPES, Model, awkward, centers_of, model
from ops_support import same
from test_triton_interpreted import guarded, intact, run_interpreted

from dynfed_lightning import _ops_triton as triton_ops
from dynfed_lightning import _reference as reference
from dynfed_lightning._ops_backends import choose

# Arguments of sigmoids overflow where a value is far away, of which numpy warns.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

# Fewer than in the tests of the CUDA kernels: the interpreter takes milliseconds for an operation on a tile.
SMALL = ((0, 4), (1, 1), (7, 2), (2048, 3), (2049, 5), (300, 17))
MANY = tuple((1 + 37 * i % 61, 1 + i % 4) for i in range(35))  # more layers than two launches take


@pytest.mark.parametrize("marker", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_in_the_interpreter(marker: str) -> None:
    run_interpreted(__file__, marker)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> str:
    """The interpreted backend, for the operators themselves."""
    monkeypatch.setenv("DYNFED_BACKEND", "triton")
    return "triton"


@pytest.mark.parametrize("sharpness", [1.0, 100.0, 1000.0])
@pytest.mark.parametrize("m", [1, 2, 3, 16, pytest.param(256, marks=pytest.mark.slow)])
def interpreted_accuracy_of_every_backend(chosen: str, m: int, sharpness: float) -> None:
    shared.test_values_and_gradients(chosen, m, sharpness)


def interpreted_what_holds_on_every_backend(chosen: str) -> None:
    for m in (2, 16):
        for scale in (1e-3, 100.0):
            shared.test_small_and_large_centres(chosen, m, scale)
    shared.test_the_largest_centre_up_to_which_the_sharpness_is_what_it_says(chosen)
    shared.test_gradients_are_finite_differences(chosen, 16)
    shared.test_one_centre(chosen)
    shared.test_a_model_in_one_call_is_its_layers_one_by_one(chosen)
    shared.test_only_what_is_asked_for(chosen)


def interpreted_what_holds_of_nearest_centres_and_sums_on_every_backend(chosen: str) -> None:
    """`prox_centers` is the reference's here."""
    for m in (1, 2, 16):
        shared_prox.test_nearest_center_is_the_reference_bit_for_bit(chosen, m)
        shared_prox.test_prox_weights_is_the_reference_bit_for_bit(chosen, m)
        for dtype in DTYPES:
            shared_prox.test_center_sums(chosen, m, dtype)
    shared_prox.test_a_tie_goes_up_and_nan_to_the_first(chosen)
    shared_prox.test_prox_weights_by_hand(chosen)
    shared_prox.test_prox_weights_into_memory_that_is_there(chosen)
    shared_prox.test_a_result_never_lands_on_what_another_layer_has_yet_to_read(chosen)
    shared_prox.test_fine_tuning_moves_a_centre_by_the_sum_of_its_weights_gradients(chosen)
    shared_prox.test_empty_and_strided(chosen)


@pytest.mark.slow
def interpreted_proximal_weights_minimise_in_ten_thousand_cases(chosen: str) -> None:
    shared_prox.test_prox_weights_minimises_in_ten_thousand_cases(chosen)


@pytest.mark.parametrize("factor", [0.5, 10.0, 1e5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def interpreted_soft_quantize_and_its_gradients(dtype: torch.dtype, factor: float) -> None:
    support.check_soft(triton_ops, model(SMALL, dtype, factor=factor))


def interpreted_many_layers() -> None:
    support.check_soft(triton_ops, model(MANY))
    support.check_exact(triton_ops, model(MANY, factor=0.001))
    support.check_sums(triton_ops, model(MANY))


@pytest.mark.slow
def interpreted_all_256_centres() -> None:
    m = model(((513, 256), (100, 255)), factor=0.002)
    support.check_exact(triton_ops, m)
    support.check_sums(triton_ops, m)
    m.factors *= 5000
    support.check_soft(triton_ops, m)


def interpreted_only_the_gradients_that_are_wanted() -> None:
    m = model(SMALL)
    dx, dcenters = support.soft_backward(triton_ops, m)
    alone = support.soft_backward(triton_ops, m, want_centers=False)
    assert all(same(a, b) for a, b in zip(alone[0], dx, strict=True)) and not alone[1].numel()
    alone = support.soft_backward(triton_ops, m, want_x=False)
    assert alone[0] == [] and same(alone[1], dcenters)


def interpreted_far_from_the_centres() -> None:
    c = torch.tensor([-2.0, -1.0, 0.5])
    x = torch.tensor([-torch.inf, -1e38, -300.0, 300.0, 3e38, torch.inf, torch.nan])
    g = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 0.0])
    m = Model([x], c, torch.tensor([0, 3]), torch.tensor([20.0], dtype=torch.float64), [g])
    (out,), ((dx,), dc) = support.soft(triton_ops, m), support.soft_backward(triton_ops, m)
    assert torch.allclose(out[:6], torch.tensor([-2.0, -2, -2, 0.5, 0.5, 0.5]), rtol=1e-7) and bool(out[6].isnan())
    assert float(dx[:6].abs().max()) < 1e-15 and bool(dx[6].isnan()) and bool(dc.isnan().any())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def interpreted_nearest_center_and_prox_weights(dtype: torch.dtype) -> None:
    for factor in (0.0, 0.003, 0.4):
        support.check_exact(triton_ops, model(SMALL, dtype, factor=factor))
    for count in (1, 2, 3, 16):
        c = centers_of(count, seed=count)
        m = Model([awkward(c, dtype)], c, torch.tensor([0, count]), torch.tensor([0.01], dtype=torch.float64))
        support.check_exact(triton_ops, m)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def interpreted_rounding_to_half_precision(dtype: torch.dtype) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    for threshold in (0.0, 0.3):
        factors = torch.tensor([threshold], dtype=torch.float64)
        support.check_exact(triton_ops, Model([every.to(dtype)], torch.tensor([0.37]), torch.tensor([0, 1]), factors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def interpreted_center_sums(dtype: torch.dtype) -> None:
    support.check_sums(triton_ops, model(SMALL, dtype))
    x, index = torch.ones(3000), torch.arange(3000).remainder(256).to(torch.uint8)
    out = torch.full((5,), 77.0)
    triton_ops.center_sums([x], [index], torch.tensor([0, 5]), out)
    assert out.tolist() == [12.0] * 5


@pytest.mark.parametrize("by", [1, 4])
def interpreted_nothing_is_written_beside_the_layers(by: int) -> None:
    m = model(((2051, 3), (300, 2)))
    plain = support.soft(triton_ops, m), *support.soft_backward(triton_ops, m), support.nearest(triton_ops, m)
    for tensors in (m.x, m.grad):
        for i, t in enumerate(tensors):
            tensors[i] = guarded(t.numel(), t.dtype, by)[0].copy_(t)
    rooms = [[guarded(t.numel(), t.dtype, by) for t in m.x] for _ in range(3)]
    bytes_rooms = [guarded(t.numel(), torch.uint8, by) for t in m.x]
    (out, dx, value), index = ([inner for inner, _ in each] for each in rooms), [inner for inner, _ in bytes_rooms]
    arena, whole = guarded(m.centers.numel(), torch.float32, by)
    triton_ops.soft_quantize(m.x, m.centers, m.first, m.factors, out)
    triton_ops.soft_quantize_backward(m.grad, m.x, m.centers, m.first, m.factors, dx, arena)
    triton_ops.nearest_center(m.x, m.centers, m.first, index, value)
    for got, want in zip((out, dx, value), (plain[0], plain[1], plain[3][1]), strict=True):
        assert all(same(a, b) for a, b in zip(got, want, strict=True))
    assert same(arena, plain[2]) and all(torch.equal(a, b) for a, b in zip(index, plain[3][0], strict=True))
    assert all(intact(*pair, by) for each in (*rooms, bytes_rooms, [(arena, whole)]) for pair in each)


def interpreted_prox_centers_is_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a backend lacks, the reference does."""
    monkeypatch.setenv("DYNFED_BACKEND", "triton")
    assert choose("prox_centers", torch.device("cpu")) is reference
    assert choose("prox_weights", torch.device("cpu")) is triton_ops
