"""What every teacher policy gets and gives, and the small steps that several of them share (see `teachers`)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class TeacherChoice:
    """What a policy decided.

    Attributes:
        soft_labels: [N, C], each row a distribution.
        weights: [K, N], the part of each client in each sample's label; columns sum to 1.
        share: [K], the mean of `weights` over the samples: how much each client was used; sums to 1.
    """

    soft_labels: Tensor
    weights: Tensor
    share: Tensor


@dataclass
class TeacherContext:
    """What the server knows of the clients besides their predictions; K clients in the order of ``probs``.

    Attributes:
        num_examples: [K], training samples of each client.
        bits: [K], the bit-width each update came with; ``None``: nothing was quantised, which counts as `max_bits`.
        label_counts: [K, C], training samples of each class.
        student_probs: [N, C], the averaged model's own probabilities.
        losses: [K], mean training loss of each client in this round.
        class_prior: [C], how frequent each class is believed to be among the public samples (any positive scale), for
            `Balanced`; ``None``: as among the clients of this round.
        max_bits: B_max of eq. 7.
        generator: the source of every random choice (a CPU generator).
        batch_size: public samples in a mini-batch: the diversity term of eq. 8 is updated once for each.
    """

    num_examples: Tensor
    bits: Tensor | None = None
    label_counts: Tensor | None = None
    student_probs: Tensor | None = None
    losses: Tensor | None = None
    class_prior: Tensor | None = None
    max_bits: int = 8
    generator: torch.Generator | None = None
    batch_size: int = 64

    def check(self, num_clients: int, num_samples: int, num_classes: int) -> None:
        """Raise a ``ValueError`` naming the first field whose shape or value does not fit."""
        k, n, c = num_clients, num_samples, num_classes
        shapes: dict[str, tuple[int, ...]] = {
            "num_examples": (k,),
            "bits": (k,),
            "label_counts": (k, c),
            "student_probs": (n, c),
            "losses": (k,),
            "class_prior": (c,),
        }
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"Expected `{name}` to have shape {shape}, but got {tuple(value.shape)}.")
        if self.max_bits < 1 or self.batch_size < 1:
            raise ValueError(
                f"Expected `max_bits` and `batch_size` to be at least 1, but got {self.max_bits} and {self.batch_size}."
            )
        if self.label_counts is not None and (bool((self.label_counts < 0).any()) or not bool(self.label_counts.any())):
            raise ValueError(
                "Expected `label_counts` to be counts with at least one above 0, but got none or negative ones."
            )
        if self.class_prior is not None and (bool((self.class_prior < 0).any()) or not bool(self.class_prior.any())):
            raise ValueError(f"Expected `class_prior` to be frequencies, but got {self.class_prior.tolist()}.")

    def of_clients(self, keep: Tensor) -> TeacherContext:
        """The same context for the clients where the boolean `keep` [K] holds."""
        names = ("num_examples", "bits", "label_counts", "losses")
        return replace(self, **{n: v[keep.to(v.device)] for n in names if (v := getattr(self, n)) is not None})

    def bit_ratio(self, like: Tensor, num_clients: int) -> Tensor:
        """``b_k / B_max`` [K], at most 1, in the dtype and on the device of `like`."""
        if self.bits is None:
            return like.new_ones(num_clients)
        return self.bits.to(like).clamp(max=self.max_bits) / self.max_bits


class TeacherPolicy(ABC):
    """A rule that turns the clients' predictions into soft labels. Call it with ``(probs, ctx)``.

    Attributes:
        needs: the optional fields of `TeacherContext` without which it cannot work.
    """

    needs: ClassVar[tuple[str, ...]] = ()

    def __call__(self, probs: Tensor, ctx: TeacherContext) -> TeacherChoice:
        """Choose.

        Args:
            probs: float32 or float64 [K, N, C], distributions over the last dimension.
            ctx: what else is known of the same K clients.

        Raises:
            ValueError: `probs` are no distributions, or `ctx` does not fit them or lacks what this policy needs.
        """
        if probs.ndim != 3 or 0 in probs.shape or not probs.is_floating_point():
            got = f"{probs.dtype} {list(probs.shape)}"
            raise ValueError(f"Expected `probs` to be a non-empty floating-point tensor [K, N, C], but got {got}.")
        sums = probs.sum(-1)
        if not bool(torch.isfinite(sums).all()) or bool((probs < 0).any()) or bool(((sums - 1).abs() > 1e-3).any()):
            raise ValueError("Expected `probs` to be distributions over the last dimension, but some are not.")
        ctx.check(*probs.shape)
        for name in self.needs:
            if getattr(ctx, name) is None:
                raise ValueError(f"Expected `{name}` in the context of {type(self).__name__}, but got None.")
        return self.choose(probs, ctx)

    @abstractmethod
    def choose(self, probs: Tensor, ctx: TeacherContext) -> TeacherChoice:
        """`__call__` after the checks."""


def entropy(probs: Tensor) -> Tensor:
    """``-sum_c p[c] log p[c]`` in nats over the last dimension, with ``0 log 0 = 0`` (DynFed eq. 6)."""
    return -torch.special.xlogy(probs, probs).sum(-1)


def log_probs(probs: Tensor) -> Tensor:
    """z = log p, finite: what underflowed to 0 counts as the smallest normal number."""
    return probs.clamp_min(torch.finfo(probs.dtype).tiny).log()


def at_least_one(fraction: float, count: int) -> int:
    """``ceil(fraction * count)``, where 0.1 * 30 is 3 whatever binary fractions say."""
    return max(1, math.ceil(fraction * count - 1e-9))


def highest(scores: Tensor, m: int) -> Tensor:
    """Boolean [K, N]: the `m` largest of each column of `scores`; of equals, the clients that come first."""
    order = scores.argsort(dim=0, descending=True, stable=True)[:m]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(0, order, True)


def mixture(probs: Tensor, weights: Tensor) -> TeacherChoice:
    """``sum_k weights[k, i] probs[k, i]``."""
    return TeacherChoice(torch.einsum("kn,knc->nc", weights, probs), weights, weights.mean(1))


def log_mixture(probs: Tensor, weights: Tensor) -> TeacherChoice:
    """``softmax(sum_k weights[k, i] z_k(x_i))``."""
    mean_logits = torch.einsum("kn,knc->nc", weights, log_probs(probs))
    return TeacherChoice(mean_logits.softmax(-1), weights, weights.mean(1))


def of_selected(probs: Tensor, selected: Tensor) -> TeacherChoice:
    """The mean over the clients where the boolean `selected` [K, N] holds (DynFed eq. 9)."""
    weights = selected.to(probs.dtype)
    return mixture(probs, weights / weights.sum(0))


def batches(n: int, size: int | None) -> Iterator[slice]:
    """Slices of `size` that cover ``range(n)``; one slice for ``None``."""
    size = n if size is None else size
    return (slice(i, min(i + size, n)) for i in range(0, n, size))


def check_fraction(name: str, value: float | None) -> None:
    """Raise a ``ValueError`` unless `value` is ``None`` or in (0, 1]."""
    if value is not None and not 0 < value <= 1:
        raise ValueError(f"Expected `{name}` to be above 0 and at most 1, but got {value}.")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise a ``ValueError`` unless `value` is among `allowed`."""
    if value not in allowed:
        raise ValueError(f"Expected `{name}` to be one of {', '.join(map(repr, allowed))}, but got {value!r}.")
