"""The engine of learned centres by itself: which layers, where centres start, each of its steps, and its state."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from quantization_support import nearest, net, prox_c, prox_x, soft
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from dynfed_lightning import Constant, Linear
from dynfed_lightning import centers as centers_module
from dynfed_lightning.centers import LearnedCenters, ascending, candidates, choose_layers, first_centers

NAME = "2.weight"


def engine(model: nn.Module, bits: Any = 2, **kwargs: Any) -> LearnedCenters:
    made = LearnedCenters(bits, **{"finetune": 0.0, **kwargs})
    made.attach(model)
    made.at(0, 10)
    return made


# ------------------------------------------------------------------------------------------------- which layers


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.LayerNorm((4, 4)), nn.GroupNorm(2, 4)])
        self.normed = weight_norm(nn.Linear(4, 4))
        self.still = nn.Linear(4, 4).requires_grad_(False)
        self.body = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.again = self.body[1]
        self.scale = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 2)


def test_what_can_be_quantised() -> None:
    """No norms (of two dimensions either), no parametrisations, nothing frozen, a shared weight once."""
    zoo = Zoo()
    assert zoo.norms[1].weight.ndim == 2
    assert list(candidates(zoo)) == ["stem.weight", *(f"body.{i}.weight" for i in range(3)), "head.weight"]
    body = [f"body.{i}.weight" for i in range(3)]
    assert choose_layers(zoo, 3) == dict.fromkeys(body, 3)
    assert list(choose_layers(zoo, 3, ends=True)) == list(candidates(zoo))
    assert choose_layers(zoo, {"body.1.*": None, "body.0.*": 1, "*": 4}) == {"body.0.weight": 1, "body.2.weight": 4}
    assert choose_layers(zoo, {"body.2.*": 8}) == {"body.2.weight": 8}
    assert choose_layers(zoo, lambda n, p: p.ndim if "1" not in n else None) == {body[0]: 2, body[2]: 2}
    assert choose_layers(zoo, None) == choose_layers(zoo, {}) == {}


def test_embeddings_that_would_not_stay_among_their_centres() -> None:
    """A row of zeros, sparse gradients or rows that are scaled as they are read; as first layers they are so still."""
    for kwargs in ({"padding_idx": 0}, {"sparse": True}, {"max_norm": 1.0}):
        for kind in (nn.Embedding, nn.EmbeddingBag):
            model = nn.ModuleList([nn.Linear(4, 4), kind(5, 4, **kwargs), nn.Linear(4, 4), nn.Linear(4, 2)])
            assert list(candidates(model)) == ["0.weight", "2.weight", "3.weight"]
            assert list(choose_layers(model, 2)) == ["2.weight"]
            assert list(choose_layers(nn.ModuleList([kind(5, 4, **kwargs), *model[2:], model[0]]), 2)) == [
                "1.weight",
                "2.weight",
            ]
    assert list(choose_layers(nn.ModuleList([nn.Linear(4, 4), nn.Embedding(5, 4), nn.Linear(4, 2)]), 2)) == ["1.weight"]
    with pytest.raises(ValueError, match=r"'1.\*' of `bits` to match a layer, .* \(embeddings with `padding_idx`"):
        choose_layers(model, {"1.*": 2})
    tied = nn.ModuleList([nn.Linear(4, 4), nn.Embedding(5, 4, padding_idx=0), nn.Linear(4, 5), nn.Linear(5, 2)])
    tied[2].weight = tied[1].weight
    assert list(candidates(tied)) == ["0.weight", "3.weight"]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_parts_that_a_hook_makes_a_weight_of() -> None:
    """The older ways of torch, too."""
    for wrap in (
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda m: nn.utils.prune.l1_unstructured(m, "weight", amount=2),
    ):
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
        wrap(model[1])  # type: ignore[operator]
        assert list(candidates(model)) == ["0.weight", "2.weight", "3.weight"]
    named = nn.ParameterDict({"weight_g": torch.ones(2, 2), "weight": torch.ones(2, 2), "other_g": torch.ones(2, 2)})
    assert set(candidates(named)) == {"weight_g", "weight", "other_g"}  # a name alone says nothing


def test_layers_that_there_are_not() -> None:
    with pytest.raises(
        ValueError, match=r"pattern 'stem.\*' of `bits` to match a layer, .*'stem.weight' is first or last"
    ):
        choose_layers(Zoo(), {"stem.*": 2})
    with pytest.raises(ValueError, match=r"'Body.\*' of `bits` to match a layer, but there are \['body.0.weight'"):
        choose_layers(Zoo(), {"Body.*": 2})  # on every system
    with pytest.raises(ValueError, match="Expected ReLU to have layers between the first and the last"):
        choose_layers(nn.ReLU(), 2)


# ------------------------------------------------------------------------------------------ where centres start


def test_first_centres() -> None:
    x = torch.tensor([[-0.5, -0.1, 0.2], [0.4, 0.0, 1.0]])
    assert torch.equal(first_centers(x, 2), torch.linspace(-0.5, 1.0, 4))
    torch.testing.assert_close(first_centers(x, 1), torch.tensor([-0.3, 1.6 / 3]))
    assert first_centers(x.abs() + 1, 1).tolist() == pytest.approx([1.0, 2.0])  # of one sign: the ends
    for bits in (1, 3, 8):
        c = first_centers(torch.full((2, 2), 0.25), bits)
        assert len(c) == 2**bits and bool((c[1:] > c[:-1]).all()) and float((c - 0.25).abs().max()) < 0.0011
    assert first_centers(x.bfloat16(), 2).dtype == first_centers(x.double(), 2).dtype == torch.float32


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=20), st.integers(1, 4))
def test_equal_centres_are_moved_apart_by_the_least_step(values: list[float], times: int) -> None:
    c = ascending(torch.tensor(values * times))
    assert len(c) == len(values) * times
    assert bool((c[1:] > c[:-1]).all())
    assert float((c - torch.tensor(values * times).sort().values).abs().max()) < 1e-4


# ---------------------------------------------------------------------------------------------------- its steps


def test_soft_is_equation_3_with_the_graphs_that_were_asked_for() -> None:
    model = net()
    e = engine(model, 3, sharpness=25.0, ends=True)
    assert e.names == ["0.weight", "2.weight", "4.weight"]
    for weights in (True, False):
        for centers in (True, False):
            out = e.soft(weights, centers)
            for n, c in zip(e.names, e.centers, strict=True):
                p = model.get_parameter(n)
                torch.testing.assert_close(out[n], soft(p, c, 25.0), rtol=0, atol=1e-6)
                assert c.requires_grad == centers
            assert out[NAME].requires_grad == (weights or centers)
            if weights or centers:
                loss = sum((v * v).sum() for v in out.values())
                wrt = [*(e.parameters if weights else ()), *(e.centers if centers else ())]
                found = torch.autograd.grad(loss, wrt)
                expected = torch.autograd.grad(
                    sum((soft(p, c, 25.0) ** 2).sum() for p, c in zip(e.parameters, e.centers, strict=True)), wrt
                )
                for a, b in zip(found, expected, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_proximal_step_of_the_weights_clamps_and_pulls() -> None:
    model = net()
    e = engine(model, 2, lam=Constant(0.4), clamp=0.5)
    with torch.no_grad():
        model[2].weight.copy_(torch.linspace(-0.8, 0.8, 144).view(12, 12))
    y, c = model[2].weight.detach().clamp(-0.5, 0.5), e.centers[0]
    bias = model[2].bias.detach().clone()
    e.after_weights([0.1])
    torch.testing.assert_close(model[2].weight.detach(), prox_x(y, c, 0.02), rtol=0, atol=1e-7)
    at_home = (model[2].weight.detach().unsqueeze(-1) == c).any(-1)
    assert 5 < int(at_home.sum()) < 140
    assert torch.equal(model[2].bias, bias)


def test_the_proximal_step_of_the_centres() -> None:
    e = engine(net(), 2, lam=Constant(0.01), center_lr=0.2)
    c, x = e.centers[0].clone(), e.parameters[0].detach().clone()
    h = torch.tensor([0.3, -0.4, 0.1, 0.2])
    e.after_centers([h])
    torch.testing.assert_close(e.centers[0], prox_c(c - 0.2 * h, x, c, 0.2 * 0.01), rtol=0, atol=1e-6)
    assert float((e.centers[0] - (c - 0.2 * h)).abs().max()) > 1e-3  # the pull was felt
    assert torch.equal(e.parameters[0], x)


def test_centres_that_cross_or_meet_stay_ascending() -> None:
    e = engine(net(), 2, lam=0.0, center_lr=1.0)
    c = e.centers[0]
    e.after_centers([c - torch.tensor([0.3, 0.3, -0.1, -0.1])])
    assert e.centers[0].tolist() == pytest.approx([-0.1, -0.1, 0.3, 0.3])
    assert bool((e.centers[0][1:] > e.centers[0][:-1]).all())
    e.soft()  # the operator wants them so
    with pytest.raises(ValueError, match=r"Expected finite centres of '2.weight', but got NaN or infinity"):
        e.after_centers([torch.tensor([0.0, torch.nan, 0.0, 0.0])])
    with pytest.raises(ValueError, match=r"Expected finite centres of '2.weight'"):
        e.after_centers([torch.tensor([0.0, torch.inf, 0.0, 0.0])])


def test_hardening_freezes_assignments() -> None:
    model = net()
    e = engine(model, 2)
    w, c = model[2].weight.detach().clone(), e.centers[0]
    assert float(e.distance()) == pytest.approx(float((w - c[nearest(w, c)]).abs().mean()), rel=1e-5)
    hard = e.hard()[NAME]
    assert torch.equal(model[2].weight, w)
    e.harden()
    assert e.frozen and torch.equal(model[2].weight, hard) and torch.equal(hard, c[nearest(w, c)])
    assert float(e.distance()) == 0.0
    assert e.soft()[NAME] is model[2].weight
    index = e.index[0].clone()
    e.harden()
    e.after_weights([0.1])
    e.after_centers([torch.ones(4)])
    assert torch.equal(e.index[0], index) and torch.equal(model[2].weight, hard)
    model[2].weight.grad = torch.arange(144.0).view(12, 12)
    sums = e.frozen_gradients()
    assert model[2].weight.grad is None
    for j in range(4):
        assert float(sums[0][j]) == pytest.approx(float(torch.arange(144.0)[(index == j).flatten()].sum()))
    with torch.no_grad():
        model[2].weight.add_(1.0)  # whatever an optimiser does to it
    e.center_lr = 1e-3
    e.after_frozen(sums)
    assert torch.equal(model[2].weight.detach(), e.centers[0][index.long()])
    torch.testing.assert_close(e.centers[0], c - 1e-3 * sums[0])
    assert torch.equal(e.frozen_gradients()[0], torch.zeros(4))  # no gradient: none


@pytest.mark.parametrize("last", [True, False])
def test_weights_are_set_to_their_centres_in_blocks(last: bool, monkeypatch: Any) -> None:
    """Of any size, in any memory format: what looking all up at once gives."""
    monkeypatch.setattr(centers_module, "_BLOCK", 7)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Linear(3, 3))
    if last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    e = engine(model, 3, ends=True, center_lr=0.1)
    e.harden()
    e.after_frozen([torch.arange(8.0), torch.zeros(8)])
    for p, c, i in zip(e.parameters, e.centers, e.index, strict=True):
        assert torch.equal(p.detach(), c[i.long()]) and p.numel() % 7


def test_hardening_takes_old_gradients_away() -> None:
    model = net()
    e = engine(model)
    model[2].weight.grad = torch.ones(12, 12)
    e.harden()
    assert model[2].weight.grad is None


def test_given_centres_that_the_weights_could_not_be() -> None:
    with pytest.raises(
        ValueError, match=r"centres of '2.weight' within `clamp` = 1.0, as its weights are, but got \[-1.5"
    ):
        engine(net(), start={"*": [-1.5, -0.1, 0.1, 1.5]})
    engine(net(), start={"*": [-1.5, -0.1, 0.1, 1.5]}, clamp=None)
    half = net().to(torch.float16)
    with pytest.raises(ValueError, match="centres of '2.weight' that are finite in torch.float16"):
        engine(half, start=lambda *_: [0.0, 7e4], clamp=None)


def test_weights_that_are_not_numbers() -> None:
    model = net()
    e = engine(model, 2, ends=True)
    with torch.no_grad():
        model[4].weight[0, 0] = torch.inf
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"Expected finite weights of '4.weight'"):
        e.harden()
    assert not e.frozen and all(
        torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )
    with pytest.raises(ValueError, match=r"Expected finite weights of '4.weight'"):
        LearnedCenters(2, ends=True).attach(model)


# ---------------------------------------------------------------------------------------------------- schedules


def test_schedules() -> None:
    e = LearnedCenters(2, lam=1e-3)
    e.attach(net())
    e.at(0, 10)
    assert (e.sharpness, e.lam, e.center_lr) == (10.0, 1e-3, 1e-4)
    e.at(7, 10)
    assert e.sharpness == pytest.approx(80.0) and e.lam == pytest.approx(8e-3) and not e.frozen
    assert e.center_lr == pytest.approx(1e-4 * 0.01 ** (7 / 9))
    e.at(8, 10)
    assert e.frozen
    e = engine(net(), lam=Linear(0.0, 1.0))
    e.at(9, 10)
    assert e.lam == 1.0  # a schedule is taken as it is
    e.at(5, 10, passes=2)
    assert e.lam == pytest.approx(5 / 9)
    e = engine(net(), lam=1e-3)
    e.at(500, 1000, passes=2)
    assert e.lam == pytest.approx(3e-3)


@pytest.mark.parametrize(
    ("share", "epochs", "first"),
    [
        (0.2, 10, 8),
        (0.2, 5, 4),
        (0.2, 4, 3),
        (0.01, 2, 1),
        (0.29, 100, 71),
        (0.3, 10, 7),
        (1.0, 3, 0),
        (0.0, 3, None),
        (0.5, 1, None),
    ],
)
def test_when_the_last_phase_begins(share: float, epochs: int, first: int | None) -> None:
    """The share rounded down to whole epochs, and not by what floats make of it; one epoch at least, of several."""
    e = LearnedCenters(2, finetune=share)
    e.attach(net())
    frozen = []
    for epoch in range(epochs):
        e.at(epoch, epochs)
        frozen.append(e.frozen)
    assert frozen == [first is not None and epoch >= first for epoch in range(epochs)]


def test_relative_sharpness_is_as_sharp_for_small_weights() -> None:
    """Q~ scales with the weights."""
    small, large = net(), net()
    with torch.no_grad():
        for p, q in zip(large.parameters(), small.parameters(), strict=True):
            q.copy_(p / 64)
    found = []
    for relative in (True, False):
        a, b = (engine(m, 2, relative_sharpness=relative, sharpness=5.0).soft()[NAME].detach() for m in (small, large))
        found.append(float((64 * a - b).abs().max()))
    assert found[0] < 1e-6 and found[1] > 1e-2
    e = engine(large, 2, relative_sharpness=True, sharpness=5.0, ends=True)
    assert isinstance(e.sharpness, list) and len(e.sharpness) == 3
    c = e.centers[1]
    assert e.sharpness[1] == pytest.approx(5.0 / float((c[1:] - c[:-1]).mean()), rel=1e-5)


def test_schedules_that_go_where_they_must_not() -> None:
    for kwargs in (
        {"sharpness": Linear(10, -10)},
        {"lam": Linear(0, -1)},
        {"center_lr": Linear(1, -1)},
        {"lam": lambda t, T: math.nan},
    ):
        e = LearnedCenters(2, **kwargs)  # type: ignore[arg-type]
        e.attach(net())
        with pytest.raises(ValueError, match="in epoch 3 of 4 the schedules give"):
            e.at(3, 4)


# -------------------------------------------------------------------------------------------------------- state


def test_state_goes_on_elsewhere() -> None:
    model = net()
    e = engine(model, 2, center_lr=0.1)
    e.after_centers([torch.tensor([0.1, 0.2, -0.1, 0.0])])
    for freeze in (False, True):
        if freeze:
            e.harden()
        state = copy.deepcopy(e.state_dict())
        assert set(state) == ({"centers", "index"} if freeze else {"centers"})
        assert not state["centers"][NAME].requires_grad
        other = LearnedCenters(2)
        other.attach(copy.deepcopy(model), state)
        assert torch.equal(other.centers[0], e.centers[0]) and other.frozen == freeze
        assert other.centers[0].data_ptr() != state["centers"][NAME].data_ptr()
        assert torch.equal(other.hard()[NAME], e.hard()[NAME])
        if freeze:
            assert torch.equal(other.index[0], e.index[0])
    assert other.to("cpu") is other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s["centers"].update({NAME: torch.zeros(8)}),
            "Expected 4 centres of '2.weight' at 2 bits, but the state has 8",
        ),
        (lambda s: s["centers"].clear(), r"Expected centres of the quantised layers \['2.weight'\]"),
        (lambda s: s["centers"].update(other=torch.zeros(4)), r"some of \['other'\]"),
        (lambda s: s["centers"][NAME].fill_(torch.nan), "Expected finite centres of '2.weight'"),
        (
            lambda s: s["index"].clear(),
            r"Expected assignments of shape \(12, 12\) of '2.weight', but the state has none",
        ),
        (lambda s: s["index"][NAME].fill_(4), "Expected assignments of '2.weight' below its 4 centres"),
        (
            lambda s: s.pop("index") and s["centers"].update({NAME: torch.zeros(4)}),
            "centres of '2.weight' to be ascending",
        ),
    ],
)
def test_states_of_something_else(change: Any, message: str) -> None:
    e = engine(net(), 2)
    e.harden()
    state: dict[str, Any] = copy.deepcopy(e.state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        LearnedCenters(2).attach(net(), state)


def test_without_layers_every_step_is_none() -> None:
    model = net()
    e = engine(model, None)
    before = copy.deepcopy(model.state_dict())
    e.after_weights([])
    e.after_centers([])
    e.harden()
    e.at(9, 10)
    assert e.soft() == e.hard() == {} and not e.frozen and e.state_dict() == {"centers": {}}
    assert e.frozen_gradients() == [] and float(e.distance()) == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_a_step_of_the_algorithm_descends() -> None:
    """F itself, sharpness and lam held: every alternating step is down, for a small enough rate."""
    model = net()
    e = engine(model, 2, ends=True, sharpness=30.0, lam=Constant(0.05), center_lr=0.002, clamp=None)
    x, y = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3

    def f(w: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, w, (x,)), y)

    def objective() -> float:
        pull = sum((p - h).abs().sum() for p, h in zip(e.parameters, e.hard().values(), strict=True)) / 2
        return float((f({}) + f(e.soft()) + 0.05 * pull).detach())

    values = [objective()]
    for _ in range(25):
        g = torch.autograd.grad(f({}) + f(e.soft()), list(model.parameters()))
        with torch.no_grad():
            for p, d in zip(model.parameters(), g, strict=True):
                p -= 0.002 * d
        e.after_weights([0.002] * 3)
        values.append(objective())
        e.after_centers(torch.autograd.grad(f(e.soft(False, True)), e.centers))
        values.append(objective())
    falls = [b - a for a, b in pairwise(values)]
    assert max(falls) < 1e-5, max(falls)
    assert values[-1] < values[0] - 0.01
    assert sum(falls[1::2]) < -1e-4  # the centres' own steps help
