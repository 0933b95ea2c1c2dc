"""Teachers by what they have seen: constants worked out by hand, a per-sample oracle, and balancing."""

from __future__ import annotations

import math

import pytest
import torch
from teaching_support import COUNTS, TINY, close, context, random_case
from torch import Tensor

from dynfed_lightning.competence import Balanced, Competence, balanced
from dynfed_lightning.teaching import TeacherContext


def test_competence_by_hand() -> None:
    # Priors [7/8, 1/8], [1/2, 1/2], [1/6, 5/6]; so q(x_0) = [9/16, 7/16], [3/5, 2/5], [15/22, 7/22].
    # Votes on class 0: 3/4 and 1/4 of clients 0 and 1; on class 1: 1/3 and 2/3 of clients 1 and 2.
    first, second = 0.75 * 9 / 16 + 0.25 * 0.6, (0.4 + 2 * 7 / 22) / 3
    total = first + second
    choice = Competence()(TINY, context(label_counts=COUNTS))
    close(choice.soft_labels[0], [first / total, second / total])
    close(choice.weights[:, 0] * total, [0.75 * 9 / 16, 0.15 + 0.4 / 3, 14 / 66])
    close(choice.share, choice.weights.mean(1))


def test_competence_leaves_unseen_classes_to_the_student() -> None:
    probs = torch.tensor([[[0.5, 0.25, 0.25]], [[0.25, 0.5, 0.25]]], dtype=torch.float64)
    counts = torch.tensor([[1, 0, 0], [0, 1, 0]])
    student = torch.tensor([[0.1, 0.5, 0.4]], dtype=torch.float64)
    ctx = context(2, label_counts=counts, student_probs=student)
    # Priors [.6, .2, .2] and [.2, .6, .2]: q = [.25, .375, .375] and [.375, .25, .375]; .25 a side, so .6 is halved.
    close(Competence()(probs, ctx).soft_labels, [[0.3, 0.3, 0.4]])
    ctx.student_probs = None
    with pytest.raises(ValueError, match="`student_probs`"):
        Competence()(probs, ctx)


def test_competence_options_by_hand() -> None:
    ctx = context(label_counts=COUNTS, bits=torch.tensor([4, 8, 8]))
    # h: class 0: 1.5, 1, 0; class 1: 0, 1, 2.
    first, second = 0.6 * 9 / 16 + 0.4 * 0.6, (0.4 + 2 * 7 / 22) / 3
    close(Competence(bits_weight=1.0)(TINY, ctx).soft_labels[0, 0], first / (first + second))
    # Client 0 casts the largest vote (.42 of .92) and alone teaches: the class it lacks is the student's.
    student = torch.tensor([[0.2, 0.8], [0.5, 0.5]], dtype=torch.float64)
    alone = Competence(top=0.1)(TINY, context(label_counts=COUNTS, student_probs=student))
    close(alone.soft_labels[0], [0.2, 0.8])
    close(alone.weights[:, 0], [1, 0, 0])


def test_geometric_pool_by_hand() -> None:
    # q(x_0) as above; class 0: clients 0 and 1 with parts 3/4, 1/4; class 1: clients 1 and 2 with parts 1/3, 2/3.
    first = (9 / 16) ** 0.75 * 0.6**0.25
    second = 0.4 ** (1 / 3) * (7 / 22) ** (2 / 3)
    tau = first / (first + second)
    choice = Competence(pool="geometric")(TINY, context(label_counts=COUNTS))
    close(choice.soft_labels[0], [tau, 1 - tau])
    close(choice.weights[:, 0], [tau * 0.75, tau * 0.25 + (1 - tau) / 3, (1 - tau) * 2 / 3])
    # With power 1/2 the parts are as the roots of the counts: sqrt(3) : 1 and 1 : sqrt(2).
    a, b = math.sqrt(3) / (1 + math.sqrt(3)), 1 / (1 + math.sqrt(2))
    first, second = (9 / 16) ** a * 0.6 ** (1 - a), 0.4**b * (7 / 22) ** (1 - b)
    rooted = Competence(pool="geometric", power=0.5)(TINY, context(label_counts=COUNTS))
    close(rooted.soft_labels[0, 0], first / (first + second))


def test_balancing_reaches_the_prior_at_full_strength() -> None:
    tau = random_case(2)[0][0]
    prior = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    every = torch.ones(4, dtype=torch.bool)
    full = balanced(tau, prior, every, 1.0, iterations=2000)
    close(full.mean(0), prior / 10, atol=1e-6)
    factor = (full / tau) / (full / tau)[:, :1]
    close(factor, factor[:1].expand_as(factor), atol=1e-9)  # one factor a class, the same for all samples
    half = balanced(tau, prior, every, 0.5, iterations=2000)
    close((half / tau) / (half / tau)[:, :1], factor.sqrt(), atol=1e-9)
    close(balanced(tau, prior, every, 0.0), tau)
    close(balanced(tau, prior, ~every, 1.0), tau)
    # A sample alone becomes the prior.
    close(balanced(tau[:1], prior, every, 1.0), prior[None] / 10, atol=1e-6)


def test_balancing_leaves_unseen_classes_their_mass() -> None:
    tau = random_case(2)[0][0]
    free = torch.tensor([True, True, False, True])
    prior = torch.tensor([1.0, 1.0, 1.0, 2.0], dtype=torch.float64)
    out = balanced(tau, prior, free, 1.0, iterations=2000)
    kept = tau.mean(0)[2]
    close(out.mean(0)[2], kept, atol=1e-6)
    close(out.mean(0)[free], (1 - kept) * torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64), atol=1e-6)


def test_balanced_is_competence_and_its_prior() -> None:
    probs, ctx = random_case(6)
    assert ctx.label_counts is not None
    ctx.label_counts[:, 1] += 1
    plain = Competence(pool="geometric", power=0.5)(probs, ctx)
    close(Balanced(balance=0)(probs, ctx).soft_labels, plain.soft_labels)
    default = Balanced()(probs, ctx)
    assert float((default.soft_labels - plain.soft_labels).abs().max()) > 0.01
    ctx.class_prior = ctx.label_counts.sum(0) * 0.1  # the scale does not matter
    close(Balanced()(probs, ctx).soft_labels, default.soft_labels, atol=1e-7)
    ctx.class_prior = torch.tensor([1.0, 1.0, 1.0, 97.0])
    tilted = Balanced(balance=1.0)(probs, ctx)
    assert float(tilted.soft_labels.mean(0)[3]) > 0.9
    close(tilted.weights, plain.weights)


def test_balancing_mends_a_biased_teacher() -> None:
    # True odds times 20 for class 0, for all samples alike: balancing takes most of the factor back.
    g = torch.Generator().manual_seed(0)
    y = torch.arange(3000) % 3
    logits = torch.randn(3000, 3, generator=g, dtype=torch.float64)
    logits[torch.arange(3000), y] += 3
    biased = (logits + torch.tensor([20.0, 1.0, 1.0]).log()).softmax(-1)
    right = [
        float((t.argmax(-1) == y).double().mean()) for t in (biased, balanced(biased, torch.ones(3), y[:3] < 3, 1.0))
    ]
    assert right[0] < 0.85 and right[1] > 0.95


def competence_oracle(probs: Tensor, ctx: TeacherContext, p: Competence) -> tuple[Tensor, Tensor]:
    k, n, c = probs.shape
    assert ctx.bits is not None and ctx.label_counts is not None and ctx.student_probs is not None
    counts = ctx.label_counts.tolist()
    taught, pending = [0.0] * k, [0.0] * k
    labels, weights = [], []
    for i in range(n):
        if i % ctx.batch_size == 0:
            taught = [a + b for a, b in zip(taught, pending, strict=True)]
            pending = [0.0] * k
        total = max(1.0, sum(taught))
        v = [(int(ctx.bits[j]) / 8) ** p.bits_weight * math.exp(-p.diversity * taught[j] / total) for j in range(k)]
        q: list[list[float]] = []
        for j in range(k):
            raw = [probs[j, i, a].item() / (counts[j][a] + p.smoothing) for a in range(c)]
            q.append([r / sum(raw) for r in raw])

        def votes(
            voters: list[int], ranking: bool = False, v: list[float] = v, q: list[list[float]] = q
        ) -> list[list[float]]:
            h = [[counts[j][a] ** p.power * v[j] if j in voters else 0.0 for a in range(c)] for j in range(k)]
            have = [sum(h[j][a] for j in range(k)) for a in range(c)]
            r = [[h[j][a] / have[a] if have[a] else 0.0 for a in range(c)] for j in range(k)]
            if p.pool == "arithmetic" or ranking:
                return [[q[j][a] * r[j][a] for a in range(c)] for j in range(k)]
            pooled = [math.prod(q[j][a] ** r[j][a] for j in range(k)) if have[a] else 0.0 for a in range(c)]
            return [[pooled[a] * r[j][a] for a in range(c)] for j in range(k)]

        cast = votes(list(range(k)), ranking=p.top is not None)
        voters = list(range(k))
        if p.top is not None:
            voters = sorted(voters, key=lambda j: (-sum(cast[j]), j))[: math.ceil(p.top * k)]
            cast = votes(voters)
        tau = [sum(cast[j][a] for j in range(k)) for a in range(c)]
        own = [0.0 if any(counts[j][a] for j in voters) else ctx.student_probs[i, a].item() for a in range(c)]
        labels.append([o + t / sum(tau) * (1 - sum(own)) for o, t in zip(own, tau, strict=True)])
        weights.append([sum(row) / sum(tau) for row in cast])
        pending = [a + b for a, b in zip(pending, weights[-1], strict=True)]
    return torch.tensor(labels, dtype=probs.dtype), torch.tensor(weights, dtype=probs.dtype).T


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "policy",
    [
        Competence(),
        Competence(smoothing=2.0, bits_weight=1.5),
        Competence(diversity=3.0),
        Competence(0.5, 1.0, 2.0, 0.3),
        Competence(pool="geometric", power=0.5),
        Competence(0.5, 1.0, 2.0, 0.3, "geometric", 2.0),
    ],
)
def test_competence_equals_the_oracle(policy: Competence, seed: int) -> None:
    probs, ctx = random_case(seed)
    choice = policy(probs, ctx)
    labels, weights = competence_oracle(probs, ctx, policy)
    close(choice.soft_labels, labels, atol=1e-12)
    close(choice.weights, weights, atol=1e-12)
