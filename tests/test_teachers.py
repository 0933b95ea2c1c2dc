"""Teacher policies: constants worked out by hand, a per-sample oracle in plain Python, and what must always hold."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from teaching_support import COUNTS, TINY, close, context, random_case
from torch import Tensor

from dynfed_lightning.competence import Competence
from dynfed_lightning.teachers import POLICIES, Active, Entropy, Mean, Random, TopLoss, Variance, as_policy
from dynfed_lightning.teaching import TeacherContext, at_least_one, entropy, highest

# --- constants ---


def test_active_by_hand() -> None:
    # Sample 0: entropies .325, .673, .611: clients 0 and 2 stay; with bits 2, 8, 8 they score .125 + .45 and .5 + .35.
    # Sample 1: entropies .693, .500, .056: clients 1 and 2 stay and score .5 + .4 and .5 + .495.
    ctx = context(bits=torch.tensor([2, 8, 8]))
    choice = Active()(TINY, ctx)
    close(choice.weights, [[0, 0], [0, 0], [1, 1]])
    close(choice.soft_labels, [[0.3, 0.7], [0.99, 0.01]])
    close(choice.share, [0, 0, 1])


def test_active_diversity_is_updated_once_a_mini_batch() -> None:
    # One sample a batch: after sample 0 client 2 has all selections, and .995 - .1 < .9.
    choice = Active()(TINY, context(bits=torch.tensor([2, 8, 8]), batch_size=1))
    close(choice.weights, [[0, 0], [0, 1], [1, 0]])
    close(choice.share, [0, 0.5, 0.5])
    same_batch = Active(lam=100.0)(TINY, context(bits=torch.tensor([2, 8, 8]), batch_size=2))
    close(same_batch.share, [0, 0, 1])


def test_active_ablations_and_the_printed_confidence() -> None:
    ctx = context(bits=torch.tensor([2, 8, 8]))
    close(Active(alpha=0)(TINY, ctx).weights[:, 0], [1, 0, 0])
    close(Active(alpha=0, confidence="min")(TINY, ctx).weights[:, 0], [0, 0, 1])  # .1 / 2 against .3 / 2
    close(Active(keep=1.0, top=0.6)(TINY, ctx).soft_labels[0], [0.45, 0.55])  # clients 2 (.85) and 1 (.8): mean of pbar
    close(Active(alpha=10.0)(TINY, context()).weights[:, 0], [1, 0, 0])  # unquantised: all have B_max


def test_ties_go_to_the_first_clients() -> None:
    probs = torch.full((5, 2, 3), 1 / 3, dtype=torch.float64)
    close(Active(keep=0.6, top=0.4)(probs, context(5)).share, [0.5, 0.5, 0, 0, 0])
    assert highest(torch.zeros(4, 2), 2).tolist() == [[True, True], [True, True], [False, False], [False, False]]


def test_mean_by_hand() -> None:
    a, b = 0.162 ** (1 / 3), 0.028 ** (1 / 3)  # geometric means of .9 .6 .3 and of .1 .4 .7
    close(Mean()(TINY, context()).soft_labels[0], [a / (a + b), b / (a + b)])
    close(Mean(average="probs")(TINY, context()).soft_labels[0], [0.6, 0.4])
    weighted = Mean(average="probs", weighted=True)(TINY, context(num_examples=torch.tensor([1, 1, 2])))
    close(weighted.soft_labels[0], [0.525, 0.475])
    close(weighted.share, [0.25, 0.25, 0.5])


def test_mean_of_one_pass_is_the_softmax_of_the_mean_logits() -> None:
    logits = torch.randn(4, 6, 5, dtype=torch.float64)
    close(Mean()(logits.softmax(-1), context(4)).soft_labels, logits.mean(0).softmax(-1))


def test_variance_by_hand() -> None:
    # Two classes: the variance of the logits is (half their difference) squared.
    d = [math.log(9), math.log(1.5), math.log(3 / 7)]
    v = [(x / 2) ** 2 for x in d]
    w = [x / sum(v) for x in v]
    choice = Variance()(TINY, context())
    close(choice.weights[:, 0], w)
    close(choice.soft_labels[0, 0], 1 / (1 + math.exp(-sum(a * b for a, b in zip(w, d, strict=True)))))
    assert Variance(hard=True)(TINY, context()).soft_labels.tolist() == [[1, 0], [1, 0]]
    close(Variance()(torch.full((2, 1, 4), 0.25), context(2)).weights, [[0.5], [0.5]])


def test_variance_of_one_pass_is_that_of_the_logits() -> None:
    logits = torch.randn(4, 6, 5, dtype=torch.float64) + 7
    v = logits.var(-1)
    close(Variance()(logits.softmax(-1), context(4)).weights, v / v.sum(0))


def test_entropy_by_hand() -> None:
    choice = Entropy()(TINY, context())
    close(choice.soft_labels, [[0.9, 0.1], [0.99, 0.01]])
    close(choice.share, [0.5, 0, 0.5])
    u = -torch.tensor([0.9 * math.log(0.9) + 0.1 * math.log(0.1), 0.6 * math.log(0.6) + 0.4 * math.log(0.4)])
    u = torch.cat([u, -torch.tensor([0.3 * math.log(0.3) + 0.7 * math.log(0.7)])]).double()
    close(Entropy(top=None)(TINY, context()).weights[:, 0], (-u).exp() / (-u).exp().sum(), atol=1e-6)
    assert entropy(torch.tensor([1.0, 0.0])).item() == 0


def test_top_loss_by_hand() -> None:
    choice = TopLoss()(TINY, context(losses=torch.tensor([0.3, 0.1, math.nan])))
    close(choice.soft_labels, TINY[1])
    close(TopLoss(top=0.5)(TINY, context(losses=torch.tensor([0.3, 0.1, math.nan]))).share, [0.5, 0.5, 0])


def test_random_draws_without_replacement_and_evenly() -> None:
    probs, ctx = random_case(0, k=5, n=4000)
    choice = Random(top=0.4)(probs, ctx)
    assert (choice.weights > 0).sum(0).eq(2).all()
    close(choice.weights[choice.weights > 0].unique(), [0.5])
    close(choice.share, [0.2] * 5, atol=0.015)  # 4.1 standard deviations
    again = Random(top=0.4)(probs, context(5, generator=torch.Generator().manual_seed(1)))
    same = Random(top=0.4)(probs, context(5, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(again.weights, same.weights)
    assert not torch.equal(again.weights, choice.weights)


# --- against a per-sample oracle ---


def active_oracle(probs: Tensor, ctx: TeacherContext, p: Active) -> list[list[int]]:
    k, n, _ = probs.shape
    assert ctx.bits is not None
    taught, out, pending = [0] * k, [], [0] * k
    for i in range(n):
        if i % ctx.batch_size == 0:
            taught = [a + b for a, b in zip(taught, pending, strict=True)]
            pending = [0] * k
        total = max(1, sum(taught))
        u = [-sum(x * math.log(x) for x in probs[j, i].tolist()) for j in range(k)]
        kept = sorted(range(k), key=lambda j: (u[j], j))[: math.ceil(p.keep * k)]

        def score(j: int, i: int = i, total: int = total, d: list[int] = taught) -> float:
            pick = max if p.confidence == "max" else min
            assert ctx.bits is not None
            return p.alpha * int(ctx.bits[j]) / 8 + p.beta * pick(probs[j, i].tolist()) - p.lam * d[j] / total

        chosen = sorted(kept, key=lambda j: (-score(j), j))[: math.ceil(p.top * k)]
        for j in chosen:
            pending[j] += 1
        out.append(sorted(chosen))
    return out


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "policy", [Active(), Active(lam=5.0, top=0.4), Active(alpha=0, confidence="min"), Active(lam=0)]
)
def test_active_equals_the_oracle(policy: Active, seed: int) -> None:
    probs, ctx = random_case(seed)
    choice = policy(probs, ctx)
    expected = active_oracle(probs, ctx, policy)
    assert [choice.weights[:, i].nonzero().flatten().tolist() for i in range(probs.shape[1])] == expected
    close(choice.soft_labels, torch.stack([probs[e, i].mean(0) for i, e in enumerate(expected)]))


# --- what always holds ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", POLICIES)
def test_everything_is_a_distribution(name: str, dtype: torch.dtype) -> None:
    probs, ctx = random_case(3)
    choice = as_policy(name)(probs.to(dtype), ctx)
    assert choice.soft_labels.shape == (23, 4) and choice.weights.shape == (7, 23) and choice.share.shape == (7,)
    assert choice.soft_labels.dtype == dtype and choice.weights.dtype == dtype
    for t, dim in ((choice.soft_labels, 1), (choice.weights, 0), (choice.share, 0)):
        assert bool((t >= 0).all())
        close(t.sum(dim), torch.ones_like(t.sum(dim)), atol=1e-5)
    close(choice.share, choice.weights.mean(1), atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"random"}))
def test_the_clients_order_does_not_matter(name: str) -> None:
    probs, ctx = random_case(5)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    permuted = TeacherContext(
        num_examples=ctx.num_examples[order],
        bits=ctx.bits[order],  # type: ignore[index]
        label_counts=ctx.label_counts[order],  # type: ignore[index]
        student_probs=ctx.student_probs,
        losses=ctx.losses[order],  # type: ignore[index]
        batch_size=5,
    )
    here, there = as_policy(name)(probs, ctx), as_policy(name)(probs[order], permuted)
    close(there.weights, here.weights[order], atol=1e-12)
    close(there.soft_labels, here.soft_labels, atol=1e-12)


@pytest.mark.parametrize("name", POLICIES)
def test_one_client_is_the_only_teacher(name: str) -> None:
    probs, ctx = random_case(1, k=1)
    ctx.label_counts = torch.ones(1, 4, dtype=torch.long)  # a flat prior: nothing to correct
    ctx.class_prior = probs.mean((0, 1))  # and nothing to balance
    choice = as_policy(name)(probs, ctx)
    close(choice.soft_labels, probs[0])
    close(choice.weights, torch.ones(1, 23))


def test_saturated_predictions_stay_finite() -> None:
    probs = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    ctx = context(2, label_counts=torch.tensor([[5, 0], [0, 5]]), losses=torch.rand(2), generator=torch.Generator())
    for name in POLICIES:
        choice = as_policy(name)(probs, ctx)
        assert bool(torch.isfinite(choice.soft_labels).all()) and bool(torch.isfinite(choice.weights).all()), name
    close(Competence()(probs, ctx).soft_labels, [[0.5, 0.5]], atol=1e-6)


def test_at_least_one_is_exact_at_decimal_fractions() -> None:
    assert 0.07 * 100 > 7  # why the guard is there
    assert [at_least_one(0.07, 100), at_least_one(0.2, 20), at_least_one(0.2, 21), at_least_one(0.01, 3)] == [
        7,
        4,
        5,
        1,
    ]


def test_more_bits_than_the_maximum_count_as_the_maximum() -> None:
    ctx = context(bits=torch.tensor([32, 8, 4]), max_bits=8)
    close(ctx.bit_ratio(TINY, 3), [1, 1, 0.5])
    close(context().bit_ratio(TINY, 3), [1, 1, 1])


def test_context_of_some_clients() -> None:
    _, ctx = random_case(0)
    part = ctx.of_clients(torch.tensor([True, False, True, False, False, False, False]))
    assert part.num_examples.tolist() == ctx.num_examples[[0, 2]].tolist()
    assert part.bits is not None and part.bits.tolist() == ctx.bits[[0, 2]].tolist()  # type: ignore[index]
    assert part.student_probs is ctx.student_probs and part.batch_size == 5


# --- bad input ---


@pytest.mark.parametrize(
    ("name", "field"),
    [("competence", "label_counts"), ("balanced", "label_counts"), ("top_loss", "losses"), ("random", "generator")],
)
def test_what_a_policy_needs_is_named(name: str, field: str) -> None:
    assert POLICIES[name].needs == (field,)
    with pytest.raises(ValueError, match=f"Expected `{field}` in the context"):
        as_policy(name)(TINY, context())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"bits": torch.ones(4)}, r"`bits` to have shape \(3,\), but got \(4,\)"),
        ({"label_counts": torch.ones(3, 5)}, r"`label_counts` to have shape \(3, 2\)"),
        ({"student_probs": torch.ones(1, 2)}, r"`student_probs` to have shape \(2, 2\)"),
        ({"label_counts": torch.zeros(3, 2)}, "`label_counts` to be counts"),
        ({"label_counts": -COUNTS}, "`label_counts` to be counts"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"class_prior": torch.ones(3)}, r"`class_prior` to have shape \(2,\)"),
        ({"class_prior": torch.zeros(2)}, "`class_prior` to be frequencies"),
    ],
)
def test_a_context_that_does_not_fit(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Mean()(TINY, context(**changes))


@pytest.mark.parametrize("bad", [TINY[0], TINY.long(), TINY[:, :0], TINY * 2, TINY * math.nan, TINY - 0.5, TINY.log()])
def test_probabilities_that_are_none(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="Expected `probs`"):
        Mean()(bad, context())


def test_names_and_options() -> None:
    assert as_policy("active", top=0.1) == Active(top=0.1)
    assert as_policy(Mean()) == Mean()
    for call, match in (
        (lambda: as_policy("competance"), "Did you mean 'competence'"),
        (lambda: as_policy("active", topp=1), "option of policy 'active'.*'topp'"),
        (lambda: as_policy(Mean(), top=1), "no options"),
        (lambda: Active(top=0.6), "`top` to be at most `keep`"),
        (lambda: Active(confidence="mean"), "'max', 'min', but got 'mean'"),
        (lambda: Mean(average="median"), "`average`"),
        (lambda: Entropy(top=0), "`top` to be above 0"),
        (lambda: Random(top=1.5), "`top`"),
        (lambda: Competence(smoothing=0), "`smoothing`"),
        (lambda: Competence(power=-1.0), "`power`"),
        (lambda: Competence(pool="harmonic"), "`pool`"),
        (lambda: Competence(balance=1.1), "`balance` to be from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
