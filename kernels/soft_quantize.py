"""soft_quantize and its gradients, and sums by centre: whole models, a launch for every `LAYERS` layers.

With boundary j between the centres j - 1 and j, ``s_j = sigmoid(P (x - (c_{j-1} + c_j) / 2))`` and ``h_j = s_j (1 - s_j)``:
``Q = c_1 + sum_j step_j s_j``, ``dQ/dx = P sum_j step_j h_j`` and
``dQ/dc_j = s_j - s_{j+1} - P/2 (step_j h_j + step_{j+1} h_{j+1})``. Gradients of centres are sums of a tile first, in float32,
then of all tiles, in float64, both in a fixed order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .layers import TILE, WARPS, add_tiles, aligned, groups_of, layer_of, load, narrow, pick, pick_number, store

LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)
CUT = tl.constexpr(126.0)  # an exponent beyond which a sigmoid is nothing beside 1, and its inverse no denormal yet
STEEPEST = 1e37
TOGETHER = tl.constexpr(16)  # boundaries added up before they join the total, which keeps digits


@triton.jit
def slope_of(slope, centers, count):
    """-P log2(e), but no steeper than what makes a step of it: neighbouring floats as large as the centres are 32 units apart."""
    largest = tl.maximum(tl.abs(tl.load(centers)), tl.abs(tl.load(centers + count - 1)))
    return tl.maximum(slope, -536870912.0 / tl.maximum(largest, 1e-28))


@triton.jit
def exponential(x, low, high, slope):
    """e, of which the sigmoid is 1 / (1 + e). The difference to the middle comes first, as it is exact where it is small; the
    middle has more digits than a float32.
    """
    both = low + high
    part = both - low
    rest = (low - (both - part)) + (high - part)
    exponent = (x - both * 0.5 - rest * 0.5) * slope
    return tl.exp2(tl.where(exponent > CUT, CUT, exponent))


@triton.jit
def rise_of(distance, slope):
    """By how much the exponential of the next boundary is larger, relative to this one's, if that is at most 1; else 0."""
    t = tl.minimum((-LN2 * slope) * distance, 1.0)
    total = 1.0 + t * 0.1
    for k in tl.static_range(9, 1, -1):
        total = 1.0 + t * total * (1.0 / k)
    return tl.where(t < LN2, t * total, 0.0)


@triton.jit
def soft_quantize_kernel(
    x, out, rows, centers, slopes, LAYERS: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr
):
    layer, start, left, first, count, _, _, _ = layer_of(rows, LAYERS, TILE)
    from_ = pick(x, layer, LAYERS, ALIGNED) + start
    to = pick(out, layer, LAYERS, ALIGNED) + start
    centers += first
    slope = slope_of(pick_number(slopes, layer, LAYERS), centers, count)
    v = load(from_, left, TILE)
    low = tl.load(centers)
    total = tl.zeros([TILE], tl.float32) + low
    for begin in range(1, count, TOGETHER):
        part = tl.zeros([TILE], tl.float32)
        for j in range(begin, tl.minimum(begin + TOGETHER, count)):
            high = tl.load(centers + j)
            part += (high - low) / (1.0 + exponential(v, low, high, slope))
            low = high
        total += part
    store(to, narrow(total, to.dtype.element_ty), left, TILE)


@triton.jit
def soft_quantize_backward_kernel(
    grad, x, dx, rows, centers, slopes, partial,
    INPUT: tl.constexpr, CENTERS: tl.constexpr, LAYERS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # No address is said to be aligned: the order of the sums would depend on it.
    layer, start, left, first, count, sums, tiles, tile = layer_of(rows, LAYERS, TILE)
    centers += first
    slope = slope_of(pick_number(slopes, layer, LAYERS), centers, count)
    p = -LN2 * slope
    v = load(pick(x, layer, LAYERS, False) + start, left, TILE)
    g = load(pick(grad, layer, LAYERS, False) + start, left, TILE)
    partial += sums + tile
    before = tl.load(centers)  # the centre before `low`
    low = before
    steep = tl.zeros([TILE], tl.float32)  # sum_j step_j h_j
    part = tl.zeros([TILE], tl.float32)  # of it, since it was last added to
    # Of the boundary before this one: s, 1 - s with all of its digits, and step h.
    s_before = tl.zeros([TILE], tl.float32) + 1.0
    rest_before = tl.zeros([TILE], tl.float32)
    h_before = tl.zeros([TILE], tl.float32)
    for j in range(1, count):
        high = tl.load(centers + j)
        e = exponential(v, low, high, slope)
        s = 1.0 / (1.0 + e)
        h = (high - low) * (e * s * s)
        if INPUT:
            part += h
            if j % 16 == 0:  # TOGETHER, which the interpreter cannot divide by
                steep += part
                part = tl.zeros([TILE], tl.float32)
        if CENTERS:
            # s_{j-1} - s_j = s_{j-1} s_j (e_j - e_{j-1}): without cancellation where they are close.
            rise = tl.where(j > 1, rise_of(0.5 * (high - before), slope), 0.0)
            difference = tl.where(rise > 0.0, rest_before * s * rise, s_before - s)
            tl.store(partial + (j - 1) * tiles, tl.sum(g * (difference - 0.5 * p * (h_before + h))))
            s_before = s
            rest_before = e * s
            h_before = h
        before = low
        low = high
    if CENTERS:
        tl.store(partial + (count - 1) * tiles, tl.sum(g * (s_before - 0.5 * p * h_before)))
    if INPUT:
        to = pick(dx, layer, LAYERS, False) + start
        store(to, narrow((steep + part) * (p * g), to.dtype.element_ty), left, TILE)


@triton.jit
def center_sums_kernel(x, index, rows, partial, LAYERS: tl.constexpr, TILE: tl.constexpr):
    layer, start, left, _, count, sums, tiles, tile = layer_of(rows, LAYERS, TILE)
    i = tl.arange(0, TILE)
    v = load(pick(x, layer, LAYERS, False) + start, left, TILE)
    k = tl.load(pick(index, layer, LAYERS, False) + start + i, mask=i < left, other=0).to(tl.int32)
    for j in range(0, count):
        tl.store(partial + sums + tile + j * tiles, tl.sum(tl.where(k == j, v, 0.0)))


def _slopes(sharpness: Tensor) -> list[float]:
    return [-min(p * LOG2E, STEEPEST) for p in sharpness.tolist()]


def soft_quantize(
    x: Sequence[Tensor], centers: Tensor, first: Tensor, sharpness: Tensor, out: Sequence[Tensor]
) -> None:
    """Soft-quantise each tensor, of float32, bfloat16 or float16, to its layer's centres."""
    each = _slopes(sharpness)
    for group in groups_of(x, first, centers.device):
        a, b, p = tuple(x[group.part]), tuple(out[group.part]), tuple(each[group.part])
        constants = len(a), aligned(a, b), TILE
        launch(soft_quantize_kernel, group.programs, centers, a, b, group.rows, centers, p, *constants, num_warps=WARPS)


def soft_quantize_backward(
    grad: Sequence[Tensor], x: Sequence[Tensor], centers: Tensor, first: Tensor, sharpness: Tensor,
    dx: Sequence[Tensor], dcenters: Tensor,
) -> None:  # fmt: skip
    """Gradients to the values and to the centres, in one pass; what is empty is not wanted."""
    each, want_centers = _slopes(sharpness), dcenters.numel() > 0
    for group in groups_of(x, first, centers.device):
        g, a, p = tuple(grad[group.part]), tuple(x[group.part]), tuple(each[group.part])
        into = tuple(dx[group.part]) if dx else (None,)
        partial = torch.empty(group.sums if want_centers else 0, dtype=torch.float32, device=centers.device)
        launch(
            soft_quantize_backward_kernel, group.programs, centers, g, a, into, group.rows, centers, p, partial,
            len(dx) > 0, want_centers, len(a), TILE, num_warps=WARPS,
        )  # fmt: skip
        if want_centers:
            add_tiles(group, partial, dcenters)


def center_sums(values: Sequence[Tensor], index: Sequence[Tensor], first: Tensor, out: Tensor) -> None:
    """The sum of the values of each index, a layer after the other; an index beyond the layer's centres counts nowhere."""
    for group in groups_of(values, first, out.device):
        a, k = tuple(values[group.part]), tuple(index[group.part])
        partial = torch.empty(group.sums, dtype=torch.float32, device=out.device)
        launch(center_sums_kernel, group.programs, out, a, k, group.rows, partial, len(a), TILE, num_warps=WARPS)
        add_tiles(group, partial, out)
