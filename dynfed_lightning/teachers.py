"""Who teaches what: from the clients' predictions on public samples to one soft label a sample.

Every policy here is one pass over ``probs`` [K clients, N samples, C classes] and answers with a `TeacherChoice`: the
soft labels, and how much each client had to say on each sample.

========================  =============================================================================================
paper's symbol            here
========================  =============================================================================================
pbar_k(x_i)               ``probs[k, i]``, the mean softmax over M stochastic passes (DynFed eq. 5)
z_k(x_i)                  ``log probs[k, i]``: the logits up to a constant, which no softmax sees
U_k(x_i)                  `entropy` of ``probs[k, i]`` (eq. 6)
b_k, B_max                ``ctx.bits[k]``, ``ctx.max_bits``
D_k                       share of the selections made so far in this round that went to client k
n_k[c]                    ``ctx.label_counts[k, c]``
tau_i                     ``choice.soft_labels[i]`` (eq. 9)
========================  =============================================================================================

References:
    DynFed: He et al., ACM MM 2025, doi 10.1145/3746027.3755451, eq. 5-9 (`Active`).
    FedDF: Lin et al., NeurIPS 2020, arXiv 2006.07242 (`Mean`).
    Fed-ET: Cho et al., IJCAI 2022, arXiv 2204.12703 (`Variance`).
    `Competence` and `Balanced` (in ``competence.py``) are this package's own.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from dynfed_lightning.competence import Balanced, Competence
from dynfed_lightning.teaching import (
    TeacherChoice,
    TeacherContext,
    TeacherPolicy,
    at_least_one,
    batches,
    check_choice,
    check_fraction,
    entropy,
    highest,
    log_mixture,
    log_probs,
    mixture,
    of_selected,
)


@dataclass(frozen=True)
class Active(TeacherPolicy):
    """DynFed's active teacher selection (eq. 5-9).

    Per sample: keep the ``ceil(keep K)`` clients of lowest entropy U_k (eq. 6), score them by
    ``S_k = alpha b_k / B_max + beta max_c pbar_k[c] - lam D_k`` (eq. 7-8), and let the ``ceil(top K)`` highest teach:
    the soft label is the mean of their pbar_k (eq. 9). ``D_k`` is updated once a mini-batch of ``ctx.batch_size``
    samples. Ties go to the client that comes first. Ablations: ``alpha=0`` ignores the bits, ``lam=0`` the diversity.

    Args:
        alpha, beta, lam: the three weights of the score.
        keep: fraction of the clients that the entropy lets through.
        top: fraction of the clients that teach a sample, at most `keep`; Algorithm 1's single teacher is a tiny `top`.
        confidence: ``"max"``; ``"min"`` is the paper's printed eq. 7, which prefers flat predictions.
    """

    alpha: float = 0.5
    beta: float = 0.5
    lam: float = 0.1
    keep: float = 0.5
    top: float = 0.2
    confidence: str = "max"

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)
        check_fraction("top", self.top)
        check_choice("confidence", self.confidence, ("max", "min"))
        if self.top > self.keep:
            raise ValueError(f"Expected `top` to be at most `keep` = {self.keep}, but got {self.top}.")

    def choose(self, probs: Tensor, ctx: TeacherContext) -> TeacherChoice:
        k, n, _ = probs.shape
        certain = highest(-entropy(probs), at_least_one(self.keep, k))
        confidence = probs.amax(-1) if self.confidence == "max" else probs.amin(-1)
        scores = self.alpha * ctx.bit_ratio(probs, k)[:, None] + self.beta * confidence
        scores = scores.masked_fill(~certain, -math.inf)
        m = at_least_one(self.top, k)
        if self.lam == 0:
            return of_selected(probs, highest(scores, m))
        selected = torch.zeros_like(certain)
        taught = probs.new_zeros(k)  # selections so far; before the first, D = 0 for everyone
        for batch in batches(n, ctx.batch_size):
            share = taught / taught.sum().clamp_min(1)
            selected[:, batch] = highest(scores[:, batch] - self.lam * share[:, None], m)
            taught += selected[:, batch].sum(1)
        return of_selected(probs, selected)


@dataclass(frozen=True)
class Mean(TeacherPolicy):
    """FedDF: every client teaches every sample, ``tau = softmax(mean_k z_k)``.

    Args:
        average: ``"logits"`` as FedDF does; ``"probs"`` averages the probabilities instead.
        weighted: by the clients' numbers of samples instead of equally (FedDF: equally).
    """

    average: str = "logits"
    weighted: bool = False

    def __post_init__(self) -> None:
        check_choice("average", self.average, ("logits", "probs"))

    def choose(self, probs: Tensor, ctx: TeacherContext) -> TeacherChoice:
        k, n, _ = probs.shape
        per_client = ctx.num_examples.to(probs) if self.weighted else probs.new_ones(k)
        weights = (per_client / per_client.sum())[:, None].expand(k, n).contiguous()
        return mixture(probs, weights) if self.average == "probs" else log_mixture(probs, weights)


@dataclass(frozen=True)
class Variance(TeacherPolicy):
    """Fed-ET's weighted consensus: a client counts on a sample by how much its logits vary over the classes.

    ``a_k(x) = Var_c z_k(x)[c] / sum_j Var_c z_j(x)[c]`` and ``tau = softmax(sum_k a_k z_k)``, with
    ``z_k = log pbar_k``: for one pass exactly Fed-ET's variance of the logits, which no constant added to the logits
    changes. Where all are flat, all count alike. Fed-ET distils the label ``argmax_c tau`` (`hard`) and adds a
    diversity term; the default keeps the soft consensus, as every other policy here does.

    Args:
        hard: a one-hot label at the consensus' largest class, as in the paper.
    """

    hard: bool = False

    def choose(self, probs: Tensor, ctx: TeacherContext) -> TeacherChoice:
        variance = log_probs(probs).var(-1, correction=0)
        total = variance.sum(0)
        weights = torch.where(total > 0, variance / total, 1 / probs.shape[0])
        choice = log_mixture(probs, weights)
        if not self.hard:
            return choice
        labels = torch.nn.functional.one_hot(choice.soft_labels.argmax(-1), probs.shape[-1])
        return replace(choice, soft_labels=labels.to(probs.dtype))


@dataclass(frozen=True)
class Entropy(TeacherPolicy):
    """The surest clients teach: the mean of the ``ceil(top K)`` predictions of lowest entropy, sample by sample.

    Args:
        top: fraction of the clients; ``None``: all of them, weighted by ``softmax_k(-U_k)``.
    """

    top: float | None = 0.2

    def __post_init__(self) -> None:
        check_fraction("top", self.top)

    def choose(self, probs: Tensor, ctx: TeacherContext) -> TeacherChoice:
        certainty = -entropy(probs)
        if self.top is None:
            return mixture(probs, certainty.softmax(0))
        return of_selected(probs, highest(certainty, at_least_one(self.top, probs.shape[0])))


@dataclass(frozen=True)
class Random(TeacherPolicy):
    """``ceil(top K)`` clients drawn anew for every sample, without replacement: what choosing has to beat."""

    top: float = 0.2
    needs: ClassVar[tuple[str, ...]] = ("generator",)

    def __post_init__(self) -> None:
        check_fraction("top", self.top)

    def choose(self, probs: Tensor, ctx: TeacherContext) -> TeacherChoice:
        k, n, _ = probs.shape
        draw = torch.rand(k, n, generator=ctx.generator, dtype=torch.float64).to(probs.device)
        return of_selected(probs, highest(draw, at_least_one(self.top, k)))


@dataclass(frozen=True)
class TopLoss(TeacherPolicy):
    """The ``ceil(top K)`` clients of lowest training loss teach every sample."""

    top: float = 0.2
    needs: ClassVar[tuple[str, ...]] = ("losses",)

    def __post_init__(self) -> None:
        check_fraction("top", self.top)

    def choose(self, probs: Tensor, ctx: TeacherContext) -> TeacherChoice:
        k, n, _ = probs.shape
        assert ctx.losses is not None
        # A loss that is not a number is the worst there is.
        losses = ctx.losses.to(probs).nan_to_num(nan=math.inf)
        return of_selected(probs, highest(-losses, at_least_one(self.top, k))[:, None].expand(k, n))


POLICIES: dict[str, type[TeacherPolicy]] = {
    "active": Active,
    "mean": Mean,
    "variance": Variance,
    "entropy": Entropy,
    "random": Random,
    "top_loss": TopLoss,
    "competence": Competence,
    "balanced": Balanced,
}


def as_policy(policy: str | TeacherPolicy, **options: Any) -> TeacherPolicy:
    """A policy by name with `options`, or the policy itself.

    >>> as_policy("active", top=0.1)
    Active(alpha=0.5, beta=0.5, lam=0.1, keep=0.5, top=0.1, confidence='max')

    Raises:
        ValueError: unknown name (the nearest is suggested), or an option the policy does not have.
    """
    if isinstance(policy, TeacherPolicy):
        if options:
            raise ValueError(f"Expected no options beside a ready-made `policy`, but got {sorted(options)}.")
        return policy
    if policy not in POLICIES:
        near = difflib.get_close_matches(str(policy), POLICIES, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Expected `policy` to be one of {', '.join(POLICIES)}, but got {policy!r}.{hint}")
    cls = POLICIES[policy]
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for name in options:
        if name not in known:
            raise ValueError(f"Expected an option of policy {policy!r} ({', '.join(known)}), but got {name!r}.")
    return cls(**options)
