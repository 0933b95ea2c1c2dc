"""Soft quantisation to learned centres, and the proximal steps of QuPeD, for one tensor or a whole model in a call.

Reference:
    Ozkara, Singh, Data, Diggavi. QuPeD: Quantized Personalization via Distillation with Applications to Federated Learning.
    NeurIPS 2021, arXiv 2107.13892, sections 2 and 3.

Every function takes either one tensor and its centres, or a list of tensors, one a layer, and a list of as many centres, each
layer with its own number of them. A model's layers go through one call of one operator. Nothing of size [n, m] is ever made.

The centres c_1 < .. < c_m of a layer, 1 to 256 of them, are float32 (float64 if the values are), finite and strictly ascending;
on the CPU this is checked, on a GPU it is not, as that would wait for the device. Values are float32, bfloat16 or float16, all
layers the same, and computed in float32; or float64, which runs on the PyTorch reference, for checks such as `gradcheck`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from . import _soft_autograd
from ._ops_autograd import wanted
from ._ops_checks import (
    INPUT_DTYPES,
    check_apart,
    check_device,
    check_int,
    check_lengths,
    check_tensor,
    overlap,
    written,
)
from ._soft_register import OPERATORS as _OPS

MOST_CENTERS = 256  # an index is a byte
VALUES = (*INPUT_DTYPES, torch.float64)
CENTERS = (torch.float32, torch.float64)

Tensors = Tensor | Sequence[Tensor]
Numbers = float | Sequence[float]


@overload
def soft_quantize(x: Tensor, centers: Tensor, sharpness: Numbers) -> Tensor: ...
@overload
def soft_quantize(x: Sequence[Tensor], centers: Sequence[Tensor], sharpness: Numbers) -> list[Tensor]: ...
def soft_quantize(x: Tensors, centers: Tensors, sharpness: Numbers) -> Tensor | list[Tensor]:
    """A staircase with rounded steps: every value moves towards its nearest centre, the more the larger `sharpness`.

    ``Q(x) = c_1 + sum_{j=2..m} (c_j - c_{j-1}) sigmoid(P (x - (c_j + c_{j-1}) / 2))`` (QuPeD, section 2), which for P towards
    infinity is the nearest centre. With s_j the j-th sigmoid, s_1 = 1, s_{m+1} = 0 and
    ``h_j = P/2 (c_j - c_{j-1}) s_j (1 - s_j)``, which is 0 but for j = 2..m, the derivatives are ``dQ/dx = 2 sum_j h_j`` and
    ``dQ/dc_j = s_j - s_{j+1} - h_j - h_{j+1}``. One centre: Q is that centre, and the derivative to x is 0.

    Args:
        x: values, any shape, or a list of them.
        centers: ``[m]``, 1 to 256, strictly ascending, on the device of `x`; or a list of them.
        sharpness: P, a positive finite number, in units of one over those of x; or one per layer.

    Returns:
        Of the shape and dtype of `x`, contiguous. Differentiable once in `x` and in `centers`; a backward pass computes what
        needs a gradient and no more, in one pass over x and the incoming gradient. On the CPU the result does not depend on
        the number of threads; for P from 1 to 1000, values are within 1e-6 of the largest centre, gradients to x within 1e-6
        of the largest, and those to the centres within 1e-6 of the largest sum over x of the magnitudes of its terms. A
        NaN in x stays in its place, and makes every gradient to the centres NaN.

    Raises:
        ValueError: centres that are not ascending or not finite (CPU), too many or on another device, lists of different
            lengths, or a sharpness out of range.
        TypeError: a tensor of another dtype, layers of different dtypes, or a sharpness that is not a number.
        RuntimeError: at a second derivative.
    """
    single, values, arena, sizes = _model("x", x, centers)
    factors = _numbers("sharpness", sharpness, len(values))
    if any(wanted(t) for t in values) or wanted(arena):
        out = _soft_autograd.soft_quantize(values, arena, sizes, factors)
    else:
        out = _OPS.soft_quantize([v.detach() for v in values], arena.detach(), sizes, factors)
    return out[0] if single else out


@overload
def nearest_center(x: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]: ...
@overload
def nearest_center(x: Sequence[Tensor], centers: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]: ...
@torch.no_grad()
def nearest_center(x: Tensors, centers: Tensors) -> tuple[Any, Any]:
    """The number of the nearest centre, and that centre: Q_c of QuPeD.

    The index is the number of j >= 2 with ``x >= mid_j``, ``mid_j = fl(fl(c_{j-1} + c_j) / 2)`` in float32, so a value halfway
    goes up. The same bits on every backend.

    Args:
        x: values, any shape, or a list of them.
        centers: as `soft_quantize`.

    Returns:
        ``(index, value)``, each of the shape of `x` or a list: uint8 from 0 to m - 1, and the centre in the dtype of `x`. NaN
        has index 0 and value NaN.

    Raises:
        ValueError, TypeError: as `soft_quantize`.
    """
    single, values, arena, sizes = _model("x", x, centers)
    index, nearest = _OPS.nearest_center([v.detach() for v in values], arena.detach(), sizes)
    return (index[0], nearest[0]) if single else (index, nearest)


@overload
def prox_weights(y: Tensor, centers: Tensor, threshold: Numbers, *, out: Tensor | None = None) -> Tensor: ...
@overload
def prox_weights(
    y: Sequence[Tensor], centers: Sequence[Tensor], threshold: Numbers, *, out: Sequence[Tensor] | None = None
) -> list[Tensor]: ...
@torch.no_grad()
def prox_weights(y: Tensors, centers: Tensors, threshold: Numbers, *, out: Tensors | None = None) -> Any:
    """The proximal step towards the centres: ``argmin_z 1/2 (z - y)**2 + threshold * min_j |z - c_j|`` (QuPeD, section 3).

    With q the nearest centre and t = threshold: ``y - t`` if ``y >= q + t``, ``y + t`` if ``y <= q - t``, else q; every sum in
    float32. The same bits on every backend.

    Args:
        y: values, any shape, or a list of them.
        centers: as `soft_quantize`.
        threshold: e1 lam / 2 in the paper's terms, at least 0, rounded to float32; or one per layer.
        out: where to write the result, of the shapes and dtype of `y`; may be `y` itself.

    Returns:
        `out`, or tensors of the shape and dtype of `y`. NaN stays NaN.

    Raises:
        ValueError: as `soft_quantize`; a negative threshold; or `out` of other shapes, or with memory of its own or of `y` in
            common that is not the whole of its `y`.
        TypeError: as `soft_quantize`.
    """
    single, values, arena, sizes = _model("y", y, centers)
    factors = _numbers("threshold", threshold, len(values))
    plain = [v.detach() for v in values]
    if out is None:
        made = _OPS.prox_weights(plain, arena.detach(), sizes, factors)
        return made[0] if single else made
    targets = _listed("out", out, single)
    check_lengths(y=values, out=targets)
    for i, (v, o) in enumerate(zip(values, targets, strict=True)):
        name = "out" if single else f"out[{i}]"
        check_tensor(name, o, (v.dtype,))
        check_device(name, o, "y", v)
        if o.shape != v.shape:
            raise ValueError(f"Expected `{name}` to have shape {tuple(v.shape)}, but got {tuple(o.shape)}.")
        if overlap(v, o) and (v.data_ptr() != o.data_ptr() or v.stride() != o.stride()):
            raise ValueError(f"Expected `{name}` to be `y` or apart from it in memory, but they overlap in part.")
    if len(targets) > 1:
        check_apart("out", targets)
    _OPS.prox_weights_out(plain, arena.detach(), sizes, factors, [o.detach() for o in targets])
    written(*targets)
    return out


@overload
def prox_centers(proposal: Tensor, x: Tensor, centers: Tensor, strength: Numbers) -> Tensor: ...
@overload
def prox_centers(
    proposal: Sequence[Tensor], x: Sequence[Tensor], centers: Sequence[Tensor], strength: Numbers
) -> list[Tensor]: ...
@torch.no_grad()
def prox_centers(proposal: Tensors, x: Tensors, centers: Tensors, strength: Numbers) -> Tensor | list[Tensor]:
    """The proximal step of the centres towards their weights (QuPeD, section 3), exact, then sorted.

    The members S_j of a centre are the values whose `nearest_center` it is, before the step; its new place is
    ``argmin_c 1/2 (c - proposal_j)**2 + strength/2 * sum_{i in S_j} |x_i - c|``. The slope of that is monotone and piecewise
    linear, so only members within ``strength * N_j / 2`` of the proposal matter: the others are counted.

    Args:
        proposal: ``[m]``, the centres after their gradient step, in any order; or a list.
        x: values, any shape, or a list of them; a NaN is nobody's member.
        centers: as `soft_quantize`; the centres before that step.
        strength: e2 lam in the paper's terms, at least 0; or one per layer.

    Returns:
        ``[m]`` in the dtype of `centers`, ascending; or a list. Two may be equal.

    Raises:
        ValueError: as `soft_quantize`; a negative strength; or a proposal of another size than its centres.
        TypeError: as `soft_quantize`.
    """
    single, values, arena, sizes = _model("x", x, centers)
    factors = _numbers("strength", strength, len(values))
    proposals = _listed("proposal", proposal, single)
    check_lengths(proposal=proposals, x=values)
    for i, (p, size) in enumerate(zip(proposals, sizes, strict=True)):
        name = "proposal" if single else f"proposal[{i}]"
        check_tensor(name, p, (arena.dtype,))
        check_device(name, p, "x", values[i])
        if p.shape != (size,):
            raise ValueError(f"Expected `{name}` to have shape ({size},), as its centres, but got {tuple(p.shape)}.")
    if not values:
        return []
    joined = proposals[0] if single else torch.cat(proposals)
    moved = _OPS.prox_centers(joined.detach(), [v.detach() for v in values], arena.detach(), sizes, factors)
    return moved if single else list(moved.split(sizes))


@overload
def center_sums(values: Tensor, index: Tensor, num_centers: int) -> Tensor: ...
@overload
def center_sums(
    values: Sequence[Tensor], index: Sequence[Tensor], num_centers: int | Sequence[int]
) -> list[Tensor]: ...
@torch.no_grad()
def center_sums(values: Tensors, index: Tensors, num_centers: int | Sequence[int]) -> Tensor | list[Tensor]:
    """The sum of the values that belong to each centre: the gradient to the centres of frozen assignments.

    Sums are in float64 and in a fixed order, so that on the CPU they do not depend on the number of threads.

    Args:
        values: any shape, or a list of them; dtypes as `soft_quantize`.
        index: uint8 of the shape of `values`, from `nearest_center`; or a list.
        num_centers: m, 1 to 256; or one per layer.

    Returns:
        float32 ``[m]`` (float64 of float64 values), or a list.

    Raises:
        ValueError: lists or shapes that differ, tensors on different devices, a number out of range, or (CPU) an index of
            `num_centers` or more.
        TypeError: a tensor of another dtype, or layers of different dtypes.
    """
    single = isinstance(values, Tensor)
    listed, numbers = _listed("values", values, single), _listed("index", index, single)
    sizes = [num_centers] * len(listed) if isinstance(num_centers, int) else list(num_centers)
    check_lengths(values=listed, index=numbers, num_centers=sizes)
    for i, (v, k, size) in enumerate(zip(listed, numbers, sizes, strict=True)):
        check_int("num_centers", size, 1, MOST_CENTERS)
        _check_values("values" if single else f"values[{i}]", v, listed[0])
        check_tensor("index" if single else f"index[{i}]", k, (torch.uint8,))
        check_device("index", k, "values", v)
        if k.shape != v.shape:
            raise ValueError(
                f"Expected `index` to have the shape of `values`, {tuple(v.shape)}, but got {tuple(k.shape)}."
            )
    if not listed:
        return []
    sums = _OPS.center_sums([v.detach() for v in listed], numbers, sizes)
    return sums if single else list(sums.split(sizes))


# ---- what the functions share ----


def _listed(name: str, value: Any, single: bool) -> list[Tensor]:
    """A list of tensors; of one, where the first argument is one."""
    if single:
        return [value]
    if isinstance(value, (Tensor, str)) or not isinstance(value, Sequence):
        raise TypeError(f"Expected `{name}` to be a list of tensors, one a layer, but got {type(value).__name__}.")
    return list(value)


def _model(name: str, x: Tensors, centers: Tensors) -> tuple[bool, list[Tensor], Tensor, list[int]]:
    """Whether there is one tensor and not a list; the values, checked; the centres of all layers end to end; how many each."""
    single = isinstance(x, Tensor)
    values, each = _listed(name, x, single), _listed("centers", centers, single)
    check_lengths(**{name: values, "centers": each})
    for i, (v, c) in enumerate(zip(values, each, strict=True)):
        _check_values(name if single else f"{name}[{i}]", v, values[0])
        label = "centers" if single else f"centers[{i}]"
        check_tensor(label, c, CENTERS if v.dtype == torch.float64 else (torch.float32,))
        if c.dtype != each[0].dtype:
            raise TypeError(f"Expected `{label}` to be {each[0].dtype} as the first layer's, but got {c.dtype}.")
        if c.ndim != 1 or not 1 <= c.shape[0] <= MOST_CENTERS:
            raise ValueError(
                f"Expected `{label}` to have shape (m,) with m from 1 to {MOST_CENTERS}, but got {tuple(c.shape)}."
            )
        check_device(label, c, name, v)
    sizes = [c.shape[0] for c in each]
    if not each:
        return single, values, torch.empty(0), sizes
    return single, values, each[0] if len(each) == 1 else torch.cat(each), sizes


def _check_values(name: str, value: Tensor, like: Tensor) -> None:
    check_tensor(name, value, VALUES)
    if value.dtype != like.dtype:
        raise TypeError(f"Expected `{name}` to be {like.dtype} as the first layer, but got {value.dtype}.")
    check_device(name, value, "the first layer", like)


def _numbers(name: str, value: Numbers, count: int) -> Tensor:
    """A number per layer as the operators take them, which check their range: float64 on the CPU."""
    each = [value] * count if isinstance(value, (int, float)) else value
    if isinstance(each, (str, bytes)) or not isinstance(each, Sequence):
        raise TypeError(f"Expected `{name}` to be a number or a list of numbers, but got {type(each).__name__}.")
    if len(each) != count:
        raise ValueError(f"Expected `{name}` to be one number, or {count}, one a layer, but got {len(each)}.")
    if torch.compiler.is_compiling():  # as `weights_tensor`: a new value must not compile anew
        one = torch.ones(1, dtype=torch.float64, device="cpu")
        return torch.cat([one * f for f in each]) if count else one[:0]
    for f in each:
        if not isinstance(f, (int, float)) or isinstance(f, bool):
            raise TypeError(f"Expected `{name}` to be a number, but got {type(f).__name__}.")
    return torch.tensor(each, dtype=torch.float64, device="cpu")
