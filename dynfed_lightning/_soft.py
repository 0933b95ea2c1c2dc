"""Soft quantisation to learned centres, and the proximal steps of QuPeD, for one tensor or a whole model in a call.

Reference:
    Ozkara, Singh, Data, Diggavi. QuPeD: Quantized Personalization via Distillation with Applications to Federated Learning.
    NeurIPS 2021, arXiv 2107.13892, sections 2 and 3.

Every function takes either one tensor and its centres, or a list of tensors, one a layer, and a list of as many centres, each
layer with its own number of them. A model's layers go through one call of one operator. Nothing of size [n, m] is ever made.

The centres c_1 < .. < c_m of a layer, 1 to 256 of them, are float32 (float64 if the values are), finite and strictly ascending;
on the CPU this is checked, on a GPU it is not, as that would wait for the device. Values are float32, bfloat16 or float16, all
layers the same, and computed in float32; or float64, for checks such as `gradcheck`: then the PyTorch reference runs, and all
that is said of float32 below is done in float64.
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
    check_apart_from_others,
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
        the number of threads. For P from 1 to 1000, values are within 1e-6 of the largest centre; gradients to x within 1e-6
        of the largest that is possible, the largest incoming gradient times the steepest slope of Q, which is P/4 times the
        largest step between centres, or more where steps overlap; and those to the centres within 1e-6 of the largest sum
        over x of the magnitudes of its terms. With two centres or more, a NaN in x stays in its place, and makes every
        gradient to the centres NaN.

    Note:
        In float32, a P above ``3.7e8 / max_j |c_j|`` counts as that number, which is 22 to 44 over the distance between
        neighbouring floats of that size. So the bounds hold for ``P * max_j |c_j| <= 3e8``: a centre of more than ``3e8 / P``
        makes all steps of its layer softer than P says. Steps between centres of more than 1e20 may overflow.

        `torch.func.grad` works; `vmap`, `jacrev`, `jvp` and gradients that are batched (`is_grads_batched`) are refused.

    Raises:
        ValueError: centres that are not ascending or not finite (CPU), too many or on another device, lists of different
            lengths, or a sharpness out of range.
        TypeError: a tensor of another dtype, layers of different dtypes, or a sharpness that is not a number.
        RuntimeError: at a second derivative, under `vmap`, or in forward mode.
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
        threshold: e1 lam / 2 in the paper's terms, at least 0, a finite float32 once it is rounded; or one per layer.
        out: where to write the result, of the shapes and dtype of `y`; may be `y` itself.

    Returns:
        `out`, or tensors of the shape and dtype of `y`. NaN stays NaN.

    Raises:
        ValueError: as `soft_quantize`; a negative threshold, or one beyond float32; or `out` of other shapes, or with memory
            of its own or of `y` in common that is not the whole of its own layer's `y`. Gaps between strides count as memory,
            so layers that lie interleaved in one buffer are refused.
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
        name, of = _layer("out", i, single), _layer("y", i, single)
        check_tensor(name, o, (v.dtype,))
        check_device(name, o, of, v)
        if o.shape != v.shape:
            raise ValueError(f"Expected `{name}` to have shape {tuple(v.shape)}, but got {tuple(o.shape)}.")
        if overlap(v, o) and (v.data_ptr() != o.data_ptr() or v.stride() != o.stride()):
            raise ValueError(f"Expected `{name}` to be `{of}` or apart from it in memory, but they overlap in part.")
    if len(targets) > 1:
        check_apart("out", targets)
        check_apart_from_others("out", targets, "y", values)
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
        name = _layer("proposal", i, single)
        check_tensor(name, p, (arena.dtype,))
        check_device(name, p, _layer("x", i, single), values[i])
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

    The order of summation is fixed; on the CPU it does not depend on the number of threads. There sums are in float64, rounded
    once; on a GPU those of 2048 values are in float32, and these are added up in float64: within 1e-6 of the sum of the
    magnitudes of the centre's values.

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
    each = isinstance(num_centers, Sequence) and not isinstance(num_centers, (str, bytes))
    sizes: list[Any] = list(num_centers) if each else [num_centers] * len(listed)  # type: ignore[arg-type]
    check_lengths(values=listed, index=numbers, num_centers=sizes)
    for i, (v, k, size) in enumerate(zip(listed, numbers, sizes, strict=True)):
        check_int(_layer("num_centers", i, not each), size, 1, MOST_CENTERS)
        _check_values("values", i, single, v, listed[0])
        name, of = _layer("index", i, single), _layer("values", i, single)
        check_tensor(name, k, (torch.uint8,))
        check_device(name, k, of, v)
        if k.shape != v.shape:
            raise ValueError(
                f"Expected `{name}` to have the shape of `{of}`, {tuple(v.shape)}, but got {tuple(k.shape)}."
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


def _layer(name: str, i: int, single: bool) -> str:
    """What to call an argument, or a layer's in a list of them."""
    return name if single else f"{name}[{i}]"


def _model(name: str, x: Tensors, centers: Tensors) -> tuple[bool, list[Tensor], Tensor, list[int]]:
    """Whether there is one tensor and not a list; the values, checked; the centres of all layers end to end; how many each."""
    single = isinstance(x, Tensor)
    values, each = _listed(name, x, single), _listed("centers", centers, single)
    check_lengths(**{name: values, "centers": each})
    for i, (v, c) in enumerate(zip(values, each, strict=True)):
        _check_values(name, i, single, v, values[0])
        label = _layer("centers", i, single)
        check_tensor(label, c, CENTERS if v.dtype == torch.float64 else (torch.float32,))
        if c.dtype != each[0].dtype:
            raise TypeError(f"Expected `{label}` to be {each[0].dtype} as the first layer's, but got {c.dtype}.")
        if c.ndim != 1 or not 1 <= c.shape[0] <= MOST_CENTERS:
            raise ValueError(
                f"Expected `{label}` to have shape (m,) with m from 1 to {MOST_CENTERS}, but got {tuple(c.shape)}."
            )
        check_device(label, c, _layer(name, i, single), v)
    sizes = [c.shape[0] for c in each]
    if not each:
        return single, values, torch.empty(0), sizes
    return single, values, each[0] if len(each) == 1 else torch.cat(each), sizes


def _check_values(name: str, i: int, single: bool, value: Tensor, like: Tensor) -> None:
    label = _layer(name, i, single)
    check_tensor(label, value, VALUES)
    if value.dtype != like.dtype:
        raise TypeError(f"Expected `{label}` to be {like.dtype} as the first layer, but got {value.dtype}.")
    check_device(label, value, f"{name}[0]", like)


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
    for i, f in enumerate(each):
        label = _layer(name, i, each is not value)
        if not isinstance(f, (int, float)) or isinstance(f, bool):
            raise TypeError(f"Expected `{label}` to be a number, but got {type(f).__name__}.")
        try:
            float(f)
        except OverflowError:
            raise ValueError(f"Expected `{label}` to be a finite number, but got an integer beyond 1e308.") from None
    return torch.tensor(each, dtype=torch.float64, device="cpu")
