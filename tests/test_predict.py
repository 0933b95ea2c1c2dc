"""Stochastic passes: what is averaged, what is dithered, and that the module comes back bit for bit."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dynfed_lightning.predict import client_probs, has_dropout, predict_probs, preserved
from dynfed_lightning.tensors import weights_of


def linear(weight: list[list[float]]) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight), bias=False)
    layer.weight.data = torch.tensor(weight)
    return layer


def net(p: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(p), nn.Linear(8, 3))


X = torch.randn(11, 4, generator=torch.Generator().manual_seed(1))


def snapshot(module: nn.Module) -> tuple[list[Tensor], list[bool]]:
    return [t.detach().clone() for t in (*module.parameters(), *module.buffers())], [
        m.training for m in module.modules()
    ]


def same(a: tuple[list[Tensor], list[bool]], b: tuple[list[Tensor], list[bool]]) -> bool:
    return a[1] == b[1] and all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))


def test_one_pass_is_the_softmax_in_eval_mode() -> None:
    module = net(0.5)
    probs = predict_probs(module, X, passes=1, steps={"0.weight": torch.full((8, 4), 9.0)}, batch_size=3)
    with torch.no_grad():
        expected = module.eval()(X).softmax(-1)
    torch.testing.assert_close(probs, expected, atol=1e-6, rtol=0)


def test_dither_is_uniform_within_half_a_step_and_only_where_there_is_one() -> None:
    # Sample i is a unit vector, so its two logits are weights; log p0/p1 gives their difference back.
    module = linear([[0.0] * 4000, [0.0] * 4000])
    steps = torch.zeros(2, 4000)
    steps[0, :2000] = 2.0
    seen: list[Tensor] = []

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        seen.append(m.weight.detach().clone())  # type: ignore[operator, union-attr]
        return m(x)

    predict_probs(module, torch.zeros(1, 4000), passes=3, steps={"weight": steps}, forward=forward)
    assert len(seen) == 3 and not torch.equal(seen[0], seen[1])
    for w in seen:
        noise = w[0, :2000]
        assert bool((w[1] == 0).all()) and bool((w[0, 2000:] == 0).all())
        assert float(noise.abs().max()) <= 1 and float(noise.abs().max()) > 0.99
        assert abs(float(noise.mean())) < 0.05  # 3.9 standard errors of 1/sqrt(3 * 2000)
        assert abs(float(noise.var()) - 1 / 3) < 0.03


def test_the_passes_softmaxes_are_averaged() -> None:
    module = linear([[0.0], [0.0]])
    collected: list[Tensor] = []

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        collected.append(m(x))
        return collected[-1]

    probs = predict_probs(module, torch.ones(1, 1), passes=5, steps={"weight": torch.tensor(8.0)}, forward=forward)
    torch.testing.assert_close(probs, torch.stack(collected).softmax(-1).mean(0))
    assert len({round(float(c[0, 0]), 6) for c in collected}) == 5


def test_dropout_is_what_varies_where_there_is_dropout() -> None:
    module = net(0.5)
    assert has_dropout(module) and not has_dropout(net(0.0))
    assert has_dropout(nn.MultiheadAttention(4, 2, dropout=0.1)) and not has_dropout(nn.MultiheadAttention(4, 2))
    modes: list[list[bool]] = []
    weights: list[Tensor] = []

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        modes.append([layer.training for layer in m])  # type: ignore[attr-defined]
        weights.append(m[0].weight.detach().clone())  # type: ignore[index]
        return m(x)

    probs = predict_probs(module, X, passes=2, steps={"0.weight": torch.full((8, 4), 9.0)}, forward=forward)
    assert modes == [[False, False, False, True, False]] * 2
    assert torch.equal(weights[0], weights_of(module)["0.weight"]) and torch.equal(weights[0], weights[1])
    assert not torch.allclose(probs, predict_probs(module, X, passes=1))
    torch.testing.assert_close(probs.sum(-1), torch.ones(11))


def test_mc_dropout_averages_to_the_expectation() -> None:
    # One input of p = 1/2: logits are (0, 0) or (2a, 0), so the mean softmax is (1/2 + sigmoid(2a)) / 2.
    module = nn.Sequential(nn.Dropout(0.5), linear([[1.0], [0.0]]))
    probs = predict_probs(module, torch.ones(3000, 1), passes=4)
    expected = (0.5 + torch.sigmoid(torch.tensor(2.0)).item()) / 2
    assert abs(float(probs[:, 0].mean()) - expected) < 0.008  # 4.6 standard errors


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_everything_comes_back(p: float) -> None:
    module = net(p)
    module[1].eval()  # a mixture of flags
    module[0].weight.requires_grad_(False)
    before = snapshot(module)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    steps = {"0.bias": torch.full((8,), 0.3), "4.weight": torch.full((3, 8), 0.3)}
    predict_probs(module, X, passes=3, steps=steps)
    client_probs(module, [weights_of(net())] * 2, X, passes=3, steps=[steps, None])
    assert same(before, snapshot(module))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == np.random.get_state()[1].tolist() and states[2] == random.getstate()  # type: ignore[index]

    def broken(m: nn.Module, x: Tensor) -> Tensor:
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        predict_probs(module, X, passes=3, steps=steps, forward=broken)
    assert same(before, snapshot(module))
    with preserved(module):
        module[0].bias.detach().add_(1)  # type: ignore[operator, union-attr]
        module.train()
    assert same(before, snapshot(module))


def test_draws_come_from_the_generator_alone() -> None:
    for module, steps in ((net(0.5), None), (net(), {"0.weight": torch.full((8, 4), 0.5)})):
        runs: list[Tensor] = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed + len(runs))
            runs.append(predict_probs(module, X, 3, steps, torch.Generator().manual_seed(seed)))
        assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_clients_are_predicted_one_by_one() -> None:
    module = linear([[0.0, 0.0], [0.0, 0.0]])
    weights = [{"weight": torch.tensor([[1.0, 0.0], [0.0, 0.0]])}, {"weight": torch.tensor([[0.0, 0.0], [0.0, 2.0]])}]
    probs = client_probs(module, weights, torch.eye(2))
    s1, s2 = torch.sigmoid(torch.tensor([1.0, 2.0])).tolist()
    expected = [[[s1, 1 - s1], [0.5, 0.5]], [[0.5, 0.5], [1 - s2, s2]]]
    torch.testing.assert_close(probs, torch.tensor(expected))
    assert probs.shape == (2, 2, 2) and not probs.requires_grad


def test_half_precision_gives_float32() -> None:
    assert predict_probs(linear([[1.0], [0.0]]).bfloat16(), torch.ones(2, 1).bfloat16()).dtype == torch.float32
    assert predict_probs(linear([[1.0], [0.0]]).double(), torch.ones(2, 1).double()).dtype == torch.float64


def test_bad_input() -> None:
    module = net()
    cases = [
        (lambda: predict_probs(module, X, num_classes=10), r"shape \[11, 10\], but it returned .* \[11, 3\]"),
        (lambda: predict_probs(module, X, forward=lambda m, x: m(x)[None]), r"returned .* \[1, 11, 3\]"),
        (lambda: predict_probs(module, X, forward=lambda m, x: m(x).argmax(-1)), "returned torch.int64"),
        (lambda: predict_probs(module, X, forward=lambda m, x: {"logits": m(x)}), "returned a dict"),  # type: ignore[arg-type, return-value]
        (lambda: predict_probs(module, X, passes=0), "`passes` and `batch_size`"),
        (lambda: predict_probs(module, X[:0]), "`inputs` to hold at least one sample"),
        (lambda: predict_probs(module, X, steps={"0.bias": torch.ones(3, 8)}), "`steps` to broadcast"),
        (lambda: client_probs(module, [], X), "at least one client"),
        (lambda: client_probs(module, [weights_of(module)], X, steps=[None, None]), "one entry for each of 1 clients"),
    ]
    for call, match in cases:
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(KeyError, match="missing"):
        client_probs(module, [{}], X)
