"""The losses of mutual distillation against constants computed by hand, and which parameters get which gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dynfed_lightning.losses import (
    Sides,
    adaptive_divisor,
    attention_mse,
    hidden_mse,
    masked_mse,
    mean_of_sides,
    mutual_kl,
    mutual_losses,
)


def numeric(f: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences of a scalar function at a float64 tensor."""
    grad = torch.zeros_like(x)
    for i in range(x.numel()):
        at = x.detach().clone()
        at.view(-1)[i] += step
        above = float(f(at))
        at.view(-1)[i] -= 2 * step
        grad.view(-1)[i] = (above - float(f(at))) / (2 * step)
    return grad


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------ constants


def test_kl_by_hand() -> None:
    """p_s = (1/4, 3/4), p_t = (1/2, 1/2) in one row, equal in the other: the mean over the two rows."""
    student = torch.tensor([[0.0, math.log(3.0)], [1.0, 1.0]])
    teacher = torch.tensor([[2.0, 2.0], [5.0, 5.0]])
    got = mutual_kl(student, teacher)
    assert float(got.student) == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2, rel=1e-6)
    assert float(got.teacher) == pytest.approx((0.25 * math.log(0.5) + 0.75 * math.log(1.5)) / 2, rel=1e-6)


def test_kl_is_not_averaged_over_classes() -> None:
    """Classes that neither model believes in change nothing: the public code's mean would shrink with them."""
    student, teacher = random(4, 3), random(4, 3, seed=1)
    padded = [torch.cat([x, torch.full((4, 7), -1e4, dtype=x.dtype)], dim=1) for x in (student, teacher)]
    for a, b in zip(mutual_kl(student, teacher), mutual_kl(*padded), strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-12)


def test_divisor_by_hand_and_guarded() -> None:
    assert float(adaptive_divisor(torch.tensor(0.5), torch.tensor(1.25))) == 1.75
    assert float(adaptive_divisor(torch.tensor(0.0), torch.tensor(0.0), floor=0.25)) == 0.25
    assert float(adaptive_divisor(torch.tensor(0.0), torch.tensor(0.0))) > 0
    assert float(adaptive_divisor(torch.tensor(-3.0), torch.tensor(1.0))) > 0  # a user's own loss may be anything
    half = torch.tensor(40000.0, dtype=torch.float16)
    assert float(adaptive_divisor(half, half)) == 80000.0  # float16 ends at 65504


def test_hidden_mse_by_hand() -> None:
    projected = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])
    teacher = torch.tensor([[[1.0, 4.0], [3.0, 3.0]], [[5.0, 6.0], [100.0, -100.0]]])
    # Squares 0 + 4, 0 + 1, 0, and the last token is padding: 5 over 3 tokens of 2 values.
    mask = torch.tensor([[True, True], [True, False]])
    for side in hidden_mse(projected, teacher, mask):
        assert float(side) == pytest.approx(5 / 6)
    for side in hidden_mse(projected, teacher):
        assert float(side) == pytest.approx((5 + 93.0**2 + 108.0**2) / 8)


def test_attention_mse_by_hand() -> None:
    student = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]]])  # [1, 2 heads, 2, 2]
    teacher = torch.tensor([[[[0.0, 1.0], [1.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]]])
    # Head 1 differs by 1/4 twice, head 2 by 1 twice: 2.5 over 8 entries.
    assert float(attention_mse(student, teacher).student) == pytest.approx(2.5 / 8)
    # Where the second token is padding only entry (0, 0) of both heads counts: 1/4 over 2.
    mask = torch.tensor([[True, False]])
    assert float(attention_mse(student, teacher, mask).teacher) == pytest.approx(0.25 / 2)


def test_heads_that_differ_compare_their_means() -> None:
    student, teacher = random(2, 4, 3, 3).softmax(-1), random(2, 2, 3, 3, seed=1).softmax(-1)
    expected = (student.mean(1) - teacher.mean(1)).square().mean()
    assert float(attention_mse(student, teacher).student) == pytest.approx(float(expected), rel=1e-12)


def test_mean_over_layers() -> None:
    got = mean_of_sides([Sides(torch.tensor(1.0), torch.tensor(2.0)), Sides(torch.tensor(3.0), torch.tensor(6.0))])
    assert [float(x) for x in got] == [2.0, 4.0]
    with pytest.raises(ValueError, match="Expected `terms` to hold at least one pair"):
        mean_of_sides([])


def test_totals_by_hand() -> None:
    task, kl, hidden = (Sides(torch.tensor(a), torch.tensor(b)) for a, b in ((1.0, 3.0), (0.5, 0.25), (2.0, 2.0)))
    assert [float(x) for x in mutual_losses(task, kl, hidden)] == pytest.approx([1 + 2.5 / 4, 3 + 2.25 / 4])
    plain = mutual_losses(task, kl, hidden, adaptive=False)
    assert [float(x) for x in plain] == pytest.approx([3.5, 5.25])
    assert [float(x) for x in mutual_losses(task, kl)] == pytest.approx([1 + 0.5 / 4, 3 + 0.25 / 4])
    assert [float(x) for x in mutual_losses(task, None, hidden)] == pytest.approx([1.5, 3.5])
    weighted = mutual_losses(task, kl, adaptive=False, task_weight=(0.25, 0.5), weight=(0.75, 2.0))
    assert [float(x) for x in weighted] == pytest.approx([0.25 + 0.375, 1.5 + 0.5])
    assert [float(x) for x in mutual_losses(task, kl, hidden, weight=(0.0, 0.0))] == [1.0, 3.0]


# ---------------------------------------------------------------------------------------------------------- padding


def test_padding_may_hold_anything_and_be_any_length() -> None:
    a, b = random(2, 4, 3), random(2, 4, 3, seed=1)
    mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
    short = hidden_mse(a[:, :3], b[:, :3], mask[:, :3]).student
    a, b = a.clone(), b.clone()
    a[~mask], b[~mask] = math.inf, math.nan
    a.requires_grad_()
    loss = hidden_mse(a, b, mask).student
    assert float(loss.detach()) == pytest.approx(float(short), rel=1e-12)
    (grad,) = torch.autograd.grad(loss, a)
    assert bool(torch.isfinite(grad).all()) and not grad[~mask].any() and bool((grad[mask] != 0).all())


def test_attention_padding() -> None:
    a, b = random(2, 2, 4, 4).softmax(-1), random(2, 2, 4, 4, seed=1).softmax(-1)
    mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
    full = attention_mse(a, b, mask).student
    expected = ((a[0, :, :2, :2] - b[0, :, :2, :2]) ** 2).sum() + ((a[1, :, :3, :3] - b[1, :, :3, :3]) ** 2).sum()
    assert float(full) == pytest.approx(float(expected) / (2 * (4 + 9)), rel=1e-12)


def test_nothing_but_padding_is_zero() -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert float(masked_mse(random(2, 3, 4), random(2, 3, 4, seed=1), nothing)) == 0.0


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_at_all_is_zero(shape: tuple[int, ...]) -> None:
    empty = torch.zeros(shape, requires_grad=True)
    for mask in (None, torch.ones(shape[:2], dtype=torch.bool)):
        loss = masked_mse(empty, torch.zeros(shape), mask)
        assert float(loss.detach()) == 0.0
        loss.backward()  # type: ignore[no-untyped-call]


# -------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("adaptive", [True, False])
def test_every_gradient_is_its_own_sides(adaptive: bool) -> None:
    """Against finite differences of the printed formulas with D and the other side held fixed, in float64.

    The student's logits are W_s x, its hidden states H_s = V_s x; likewise the teacher's; W_h maps one to the other.
    """
    x, y = random(5, 4, seed=9), torch.tensor([0, 2, 1, 1, 0])
    names = {"ws": (3, 4), "vs": (2, 4), "wt": (3, 4), "vt": (6, 4), "wh": (6, 2)}
    p = {n: random(*shape, seed=i) for i, (n, shape) in enumerate(names.items())}

    def task(w: Tensor) -> Tensor:
        return -(x @ w.T).log_softmax(-1)[torch.arange(5), y].mean()

    def kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
        """KL(p || q), batch mean, as in a textbook."""
        a, b = p_logits.softmax(-1), q_logits.softmax(-1)
        return (a * (a / b).log()).sum() / 5

    def mse(vs: Tensor, vt: Tensor, wh: Tensor) -> Tensor:
        return ((x @ vt.T - x @ vs.T @ wh.T) ** 2).mean()

    d = float(task(p["ws"]) + task(p["wt"])) if adaptive else 1.0
    printed = {
        "ws": lambda t: task(t) + kl(x @ p["wt"].T, x @ t.T) / d,
        "vs": lambda t: mse(t, p["vt"], p["wh"]) / d,
        "wt": lambda t: task(t) + kl(x @ p["ws"].T, x @ t.T) / d,
        "vt": lambda t: mse(p["vs"], t, p["wh"]) / d,
        "wh": lambda t: mse(p["vs"], p["vt"], t) / d,  # once: from the student's loss alone
    }
    live = {n: t.clone().requires_grad_() for n, t in p.items()}
    student, teacher = x @ live["ws"].T, x @ live["wt"].T
    got = mutual_losses(
        Sides(task(live["ws"]), task(live["wt"])),
        mutual_kl(student, teacher),
        hidden_mse(x @ live["vs"].T @ live["wh"].T, x @ live["vt"].T),
        adaptive=adaptive,
    )
    for side, mine in ((got.student, {"ws", "vs", "wh"}), (got.teacher, {"wt", "vt"})):
        grads = torch.autograd.grad(side, list(live.values()), allow_unused=True, retain_graph=True)
        for name, grad in zip(live, grads, strict=True):
            assert (grad is not None) == (name in mine), name
    (got.student + got.teacher).backward()
    for name, t in live.items():
        assert t.grad is not None
        torch.testing.assert_close(t.grad, numeric(printed[name], p[name]), rtol=1e-6, atol=1e-8)


def test_a_divisor_that_is_not_detached_would_be_seen() -> None:
    """The fault of the public code: with D in the graph, the gradient of a large KL points towards higher task losses."""
    task = torch.tensor(2.0, requires_grad=True)
    total = mutual_losses(Sides(task, task), Sides(torch.tensor(50.0), torch.tensor(50.0))).student
    assert float(torch.autograd.grad(total, task)[0]) == 1.0  # with D in the graph: 1 - 50 * 2 / 16 < 0


def test_attention_gradients_stay_on_their_side() -> None:
    a, b = random(1, 2, 3, 3).requires_grad_(), random(1, 2, 3, 3, seed=1).requires_grad_()
    got = attention_mse(a, b)
    assert torch.autograd.grad(got.student, [a, b], allow_unused=True)[1] is None
    assert torch.autograd.grad(got.teacher, [a, b], allow_unused=True)[0] is None
    (ga,) = torch.autograd.grad(attention_mse(a, b).student, a)
    torch.testing.assert_close(ga, 2 * (a - b).detach() / a.numel())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_models_have_float32_losses(dtype: torch.dtype) -> None:
    logits = [random(4, 3, seed=i).to(dtype) for i in (0, 1)]
    for got, exact in zip(mutual_kl(*logits), mutual_kl(*(x.float() for x in logits)), strict=True):
        assert got.dtype == torch.float32 and float(got) == float(exact)
    a = torch.full((2, 3, 4), 300.0, dtype=dtype)
    assert float(masked_mse(a, -a)) == 360000.0  # beyond float16
