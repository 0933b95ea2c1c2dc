"""Registration of the operators on learned centres: see `_ops_register`.

All of them take a model: a list of tensors, one a layer, the layers' centres end to end in one tensor, and how many each has.
What belongs to a layer by number (sharpness, threshold, strength) is a float64 tensor on the CPU, which torch.compile does not
look into.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import accumulate
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from . import _reference
from ._ops_backends import choose
from ._ops_checks import FLOAT32_MAX
from ._ops_register import OPERATORS as OPERATORS
from ._ops_register import _contiguous, _nothing, _operator

_U8 = torch.uint8


def _backend(operation: str, centers: Tensor, x: list[Tensor]) -> ModuleType:
    """float64 is the reference's alone."""
    if x and x[0].dtype == torch.float64:
        return _reference
    return choose(operation, centers.device)


@lru_cache(maxsize=256)
def _first(sizes: tuple[int, ...]) -> Tensor:
    """Where each layer's centres begin, and the end: int64 [L + 1] on the CPU, to be read only."""
    return torch.tensor([0, *accumulate(sizes)], dtype=torch.int64, device="cpu")


def _place(sizes: list[int], at: int) -> tuple[str, int]:
    """The layer that the centre `at` of the arena belongs to, in words, and its number in it."""
    layer = 0
    while at >= sizes[layer]:
        at -= sizes[layer]
        layer += 1
    return ("`centers`" if len(sizes) == 1 else f"`centers[{layer}]`"), at


def _check_centers(centers: Tensor, sizes: list[int]) -> None:
    """Finite and strictly ascending within each layer; on a GPU nobody looks, as that would wait for it."""
    if centers.device.type != "cpu" or not sizes:
        return
    values = centers.detach().contiguous().numpy()
    gaps = values[1:] > values[:-1]
    if len(sizes) > 1:
        gaps[_first(tuple(sizes)).numpy()[1:-1] - 1] = True
    if gaps.all() and np.isfinite(values).all():
        return
    for i, value in enumerate(values.tolist()):
        if not math.isfinite(value):
            name, at = _place(sizes, i)
            raise ValueError(f"Expected {name} to be finite, but got {value} at {at}.")
    i = int(gaps.argmin())
    name, at = _place(sizes, i)
    raise ValueError(
        f"Expected {name} to be strictly ascending, but got {float(values[i])!r} and then {float(values[i + 1])!r} "
        f"(at {at} and {at + 1})."
    )


def _check_factors(name: str, factors: Tensor, positive: bool, most: float = math.inf) -> None:
    """Finite, and positive or at least 0; where layers have different ones, an error names the layer."""
    numbers = factors.tolist()
    for i, f in enumerate(numbers):
        if (f > 0 if positive else f >= 0) and f <= most and f != math.inf:
            continue
        layer = f"[{i}]" if len({repr(n) for n in numbers}) > 1 else ""
        number = "number" if most == math.inf else "float32"
        kind = f"a positive finite {number}" if positive else f"a finite {number} of at least 0"
        raise ValueError(f"Expected `{name}{layer}` to be {kind}, but got {f}.")


def _like(x: list[Tensor]) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in x]


# ---- the soft quantiser ----


def _soft_size(x: list[Tensor], centers: Tensor, sizes: list[int], sharpness: Tensor) -> list[Tensor]:
    return _like(x)


@_operator("soft_quantize(Tensor[] x, Tensor centers, int[] sizes, Tensor sharpness) -> Tensor[]", _soft_size)
def _soft_quantize(x: list[Tensor], centers: Tensor, sizes: list[int], sharpness: Tensor) -> list[Tensor]:
    _check_centers(centers, sizes)
    _check_factors("sharpness", sharpness, positive=True)
    out = _like(x)
    backend = _backend("soft_quantize", centers, x)
    backend.soft_quantize(_contiguous(x), centers.contiguous(), _first(tuple(sizes)), sharpness, out)
    return out


def _backward_size(
    grad: list[Tensor],
    x: list[Tensor],
    centers: Tensor,
    sizes: list[int],
    sharpness: Tensor,
    want_x: bool,
    want_centers: bool,
) -> tuple[list[Tensor], Tensor]:
    return _like(x) if want_x else [], centers.new_empty(sum(sizes) if want_centers else 0)


@_operator(
    "soft_quantize_backward(Tensor[] grad, Tensor[] x, Tensor centers, int[] sizes, Tensor sharpness, bool want_x, "
    "bool want_centers) -> (Tensor[], Tensor)",
    _backward_size,
)
def _soft_quantize_backward(
    grad: list[Tensor],
    x: list[Tensor],
    centers: Tensor,
    sizes: list[int],
    sharpness: Tensor,
    want_x: bool,
    want_centers: bool,
) -> tuple[list[Tensor], Tensor]:
    dx, dcenters = _backward_size(grad, x, centers, sizes, sharpness, want_x, want_centers)
    backend = _backend("soft_quantize_backward", centers, x)
    backend.soft_quantize_backward(
        _contiguous(grad), _contiguous(x), centers.contiguous(), _first(tuple(sizes)), sharpness, dx, dcenters
    )
    return dx, dcenters


# ---- nearest centres and proximal steps ----


def _nearest_size(x: list[Tensor], centers: Tensor, sizes: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    return [t.new_empty(t.shape, dtype=_U8) for t in x], _like(x)


@_operator("nearest_center(Tensor[] x, Tensor centers, int[] sizes) -> (Tensor[], Tensor[])", _nearest_size)
def _nearest_center(x: list[Tensor], centers: Tensor, sizes: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    _check_centers(centers, sizes)
    index, value = _nearest_size(x, centers, sizes)
    backend = _backend("nearest_center", centers, x)
    backend.nearest_center(_contiguous(x), centers.contiguous(), _first(tuple(sizes)), index, value)
    return index, value


def _prox_size(y: list[Tensor], centers: Tensor, sizes: list[int], threshold: Tensor) -> list[Tensor]:
    return _like(y)


@_operator(
    "prox_weights_out(Tensor[] y, Tensor centers, int[] sizes, Tensor threshold, Tensor(a!)[] out) -> ()", _nothing
)
def _prox_weights_out(y: list[Tensor], centers: Tensor, sizes: list[int], threshold: Tensor, out: list[Tensor]) -> None:
    _check_centers(centers, sizes)
    _check_factors("threshold", threshold, positive=False, most=FLOAT32_MAX)
    targets = [o if o.is_contiguous() else o.new_empty(o.shape) for o in out]
    backend = _backend("prox_weights", centers, y)
    backend.prox_weights(_contiguous(y), centers.contiguous(), _first(tuple(sizes)), threshold, targets)
    for o, t in zip(out, targets, strict=True):
        if t is not o:
            o.copy_(t)


@_operator("prox_weights(Tensor[] y, Tensor centers, int[] sizes, Tensor threshold) -> Tensor[]", _prox_size)
def _prox_weights(y: list[Tensor], centers: Tensor, sizes: list[int], threshold: Tensor) -> list[Tensor]:
    out = _like(y)
    _prox_weights_out(y, centers, sizes, threshold, out)
    return out


def _prox_centers_size(
    proposal: Tensor, x: list[Tensor], centers: Tensor, sizes: list[int], strength: Tensor
) -> Tensor:
    return torch.empty_like(centers, memory_format=torch.contiguous_format)


@_operator(
    "prox_centers(Tensor proposal, Tensor[] x, Tensor centers, int[] sizes, Tensor strength) -> Tensor",
    _prox_centers_size,
)
def _prox_centers(proposal: Tensor, x: list[Tensor], centers: Tensor, sizes: list[int], strength: Tensor) -> Tensor:
    _check_centers(centers, sizes)
    _check_factors("strength", strength, positive=False)
    out = _prox_centers_size(proposal, x, centers, sizes, strength)
    backend = _backend("prox_centers", centers, x)
    backend.prox_centers(
        proposal.contiguous(), _contiguous(x), centers.contiguous(), _first(tuple(sizes)), strength, out
    )
    return out


def _sums_size(values: list[Tensor], index: list[Tensor], sizes: list[int]) -> Tensor:
    dtype = torch.float64 if values[0].dtype == torch.float64 else torch.float32
    return values[0].new_empty(sum(sizes), dtype=dtype)


@_operator("center_sums(Tensor[] values, Tensor[] index, int[] sizes) -> Tensor", _sums_size)
def _center_sums(values: list[Tensor], index: list[Tensor], sizes: list[int]) -> Tensor:
    out = _sums_size(values, index, sizes)
    backend = _backend("center_sums", out, values)
    # A backend that cannot know now whether an index is too large returns None.
    worst = backend.center_sums(_contiguous(values), _contiguous(index), _first(tuple(sizes)), out)
    if worst is not None and worst >= 0:
        raise ValueError(f"Expected `index` to hold numbers below `num_centers`, but got {worst}.")
    return out
