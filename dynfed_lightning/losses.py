"""The losses of mutual distillation, as pure functions of what two models return.

Reference:
    Wu, Wu, Lyu, Huang, Xie. Communication-efficient federated learning via knowledge distillation. Nature Communications
    13:2032, 2022, arXiv 2108.13323, eq. 1-7.

Two models, a student s and a teacher t, learn from one batch and from each other. In the student's loss whatever comes of
the teacher is a constant, and the other way round, so the gradients of the two sides never mix. Everything is computed in
float32 (float64 where the models are), whatever precision the models run in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Sides(NamedTuple):
    """One scalar for each side.

    Args:
        student: its gradient reaches the student alone (and what maps the student's hidden states to the teacher's).
        teacher: its gradient reaches the teacher alone.
    """

    student: Tensor
    teacher: Tensor


def precise(x: Tensor) -> Tensor:
    """`x` in float32, or as it is if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def adaptive_divisor(student_loss: Tensor, teacher_loss: Tensor, floor: float = 1e-6) -> Tensor:
    """D, what eq. 3-5 divide by: ``stopgrad(CE(y, p_t) + CE(y, p_s))``, at least `floor`.

    Models that are often wrong have little to teach, so their distillation counts for less. D is a constant: were it not, the
    optimiser could lower the quotient by raising the task losses.

    Args:
        student_loss: the student's task loss, a scalar.
        teacher_loss: the teacher's.
        floor: > 0; ``1 / D`` is at most ``1 / floor``.

    Returns:
        a scalar without gradient, > 0.
    """
    return (precise(student_loss.detach()) + precise(teacher_loss.detach())).clamp_min(floor)


def mutual_kl(student_logits: Tensor, teacher_logits: Tensor) -> Sides:
    """Eq. 3-4 before the division: ``KL(stopgrad(p_t) || p_s)`` for the student, ``KL(stopgrad(p_s) || p_t)`` for the teacher.

    The mean over the batch of the sum over classes ("batchmean"), no temperature.

    Args:
        student_logits: ``[B, C]``.
        teacher_logits: ``[B, C]``.
    """
    log_s = F.log_softmax(precise(student_logits), dim=-1)
    log_t = F.log_softmax(precise(teacher_logits), dim=-1)
    return Sides(
        student=F.kl_div(log_s, log_t.detach(), reduction="batchmean", log_target=True),
        teacher=F.kl_div(log_t, log_s.detach(), reduction="batchmean", log_target=True),
    )


def taught_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """``KL(softmax(teacher) || softmax(student))``, with a gradient to both: f_KD of QuPeD (Ozkara et al., NeurIPS 2021).

    The mean over the batch of the sum over classes ("batchmean"), no temperature, in float32 (float64 where both are), outside
    of autocast.

    Args:
        student_logits: ``[B, C]``; detach them for the teacher's gradient alone, and the other way round.
        teacher_logits: ``[B, C]``.

    Returns:
        a scalar.
    """
    with torch.autocast(student_logits.device.type, enabled=False):
        log_s = F.log_softmax(precise(student_logits), dim=-1)
        log_t = F.log_softmax(precise(teacher_logits), dim=-1)
        return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


def masked_mse(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference over the places that `mask` keeps and over the dimensions it does not have.

    Args:
        a: any shape.
        b: the same shape.
        mask: bool, the leading dimensions of `a`; None keeps everything. With nothing kept the result is 0.

    Returns:
        a scalar.
    """
    a, b = precise(a), precise(b)
    if mask is None:
        return (a - b).square().mean() if a.numel() else (a - b).sum()
    shape = mask.shape + (1,) * (a.ndim - mask.ndim)
    # Cut out before the square: a padding position may hold anything, and infinity times 0 is no number.
    square = torch.where(mask.view(shape), a - b, 0).square()
    values = a.numel() // max(mask.numel(), 1)  # at each place
    return square.sum() / (mask.sum() * values).clamp_min(1)


def hidden_mse(projected: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Sides:
    """``MSE(H_t, W_h H_s)`` of eq. 5 for one pair of layers, over the tokens that are not padding.

    W_h belongs to the student's side: it is a constant in the teacher's loss and learns from the student's.

    Args:
        projected: ``W_h H_s``, ``[B, T, H]`` or ``[B, H]``.
        teacher: ``H_t``, the same shape.
        mask: bool ``[B, T]``, True for tokens, False for padding; None: everything counts.
    """
    return Sides(
        student=masked_mse(projected, teacher.detach(), mask), teacher=masked_mse(projected.detach(), teacher, mask)
    )


def attention_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Sides:
    """``MSE(A_t, A_s)`` of eq. 5 for one pair of layers, over pairs of tokens that are both not padding.

    Where the two sides have as many heads, head by head; else the means over each side's heads are compared.

    Args:
        student: A_s, attention maps ``[B, heads, T, T]``.
        teacher: A_t, ``[B, heads', T, T]``.
        mask: bool ``[B, T]``, True for tokens, False for padding; None: everything counts.
    """
    a, b = precise(student), precise(teacher)
    if a.shape[1] != b.shape[1]:
        a, b = a.mean(1, keepdim=True), b.mean(1, keepdim=True)
    a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)  # [B, T, T, heads]: the mask's dimensions lead
    both = None if mask is None else mask.unsqueeze(1) & mask.unsqueeze(2)
    return Sides(student=masked_mse(a, b.detach(), both), teacher=masked_mse(a.detach(), b, both))


def mean_of_sides(terms: Sequence[Sides]) -> Sides:
    """The mean over matched layers, side by side; of no terms a `ValueError`.

    The mean, and not the sum, so that how much L_h weighs does not depend on how many layers are matched.
    """
    if not terms:
        raise ValueError("Expected `terms` to hold at least one pair of layers, but it is empty.")
    return Sides(torch.stack([t.student for t in terms]).mean(), torch.stack([t.teacher for t in terms]).mean())


def mutual_losses(
    task: Sides,
    kl: Sides | None = None,
    hidden: Sides | None = None,
    *,
    adaptive: bool = True,
    task_weight: tuple[float, float] = (1.0, 1.0),
    weight: tuple[float, float] = (1.0, 1.0),
    floor: float = 1e-6,
) -> Sides:
    """Eq. 6-7: ``L = CE + (KL + L_h) / D`` for either side.

    Args:
        task: the two task losses (eq. 1-2).
        kl: `mutual_kl`, or None for none.
        hidden: L_h, the sum of the means of `hidden_mse` and `attention_mse`, or None.
        adaptive: divide by D (eq. 3-5); False divides by 1, as deep mutual learning does.
        task_weight: what multiplies the task losses, (student, teacher).
        weight: what multiplies the distillation, (student, teacher).
        floor: see `adaptive_divisor`.
    """
    divisor = adaptive_divisor(task.student, task.teacher, floor) if adaptive else None
    totals = []
    for side in range(2):
        total = task[side] if task_weight[side] == 1.0 else task_weight[side] * task[side]
        parts = [term[side] for term in (kl, hidden) if term is not None]
        if parts and weight[side] != 0:
            distilled = weight[side] * sum(parts[1:], parts[0])
            total = total + (distilled if divisor is None else distilled / divisor)
        totals.append(total)
    return Sides(*totals)
