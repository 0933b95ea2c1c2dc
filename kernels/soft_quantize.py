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

LOG2E = tl.constexpr(1.4426950408889634)
CUT = tl.constexpr(126.0)  # an exponent beyond which a sigmoid is nothing beside 1, and its inverse no denormal yet


@triton.jit
def exponential(x, low, high, sharpness):
    """e, of which the sigmoid is 1 / (1 + e). The difference comes first: a product with x would lose the digits that a large
    sharpness needs.
    """
    exponent = (x - (low + high) * 0.5) * (-LOG2E * sharpness)
    return tl.exp2(tl.where(exponent > CUT, CUT, exponent))


@triton.jit
def soft_quantize_kernel(
    x, out, rows, centers, sharpness, LAYERS: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr
):
    layer, start, left, first, count, _, _, _ = layer_of(rows, LAYERS, TILE)
    from_ = pick(x, layer, LAYERS, ALIGNED) + start
    to = pick(out, layer, LAYERS, ALIGNED) + start
    p = pick_number(sharpness, layer, LAYERS)
    v = load(from_, left, TILE)
    low = tl.load(centers + first)
    total = tl.zeros([TILE], tl.float32) + low
    for j in range(1, count):
        high = tl.load(centers + first + j)
        total += (high - low) / (1.0 + exponential(v, low, high, p))
        low = high
    store(to, narrow(total, to.dtype.element_ty), left, TILE)


@triton.jit
def soft_quantize_backward_kernel(
    grad, x, dx, rows, centers, sharpness, partial,
    INPUT: tl.constexpr, CENTERS: tl.constexpr, LAYERS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # No address is said to be aligned: the order of the sums would depend on it.
    layer, start, left, first, count, sums, tiles, tile = layer_of(rows, LAYERS, TILE)
    p = pick_number(sharpness, layer, LAYERS)
    v = load(pick(x, layer, LAYERS, False) + start, left, TILE)
    g = load(pick(grad, layer, LAYERS, False) + start, left, TILE)
    partial += sums + tile
    low = tl.load(centers + first)
    slope = tl.zeros([TILE], tl.float32)
    before = tl.zeros([TILE], tl.float32) + 1.0  # s_j - P/2 step_j h_j of the boundary before this one
    for j in range(1, count):
        high = tl.load(centers + first + j)
        e = exponential(v, low, high, p)
        s = 1.0 / (1.0 + e)
        h = (high - low) * (e * s * s)  # 1 - s would have no digits left where s is nearly 1
        if INPUT:
            slope += h
        if CENTERS:
            half = 0.5 * p * h
            tl.store(partial + (j - 1) * tiles, tl.sum(g * (before - (s + half))))
            before = s - half
        low = high
    if CENTERS:
        tl.store(partial + (count - 1) * tiles, tl.sum(g * before))
    if INPUT:
        to = pick(dx, layer, LAYERS, False) + start
        store(to, narrow(slope * (p * g), to.dtype.element_ty), left, TILE)


@triton.jit
def center_sums_kernel(x, index, rows, partial, LAYERS: tl.constexpr, TILE: tl.constexpr):
    layer, start, left, _, count, sums, tiles, tile = layer_of(rows, LAYERS, TILE)
    i = tl.arange(0, TILE)
    v = load(pick(x, layer, LAYERS, False) + start, left, TILE)
    k = tl.load(pick(index, layer, LAYERS, False) + start + i, mask=i < left, other=0).to(tl.int32)
    for j in range(0, count):
        tl.store(partial + sums + tile + j * tiles, tl.sum(tl.where(k == j, v, 0.0)))


def soft_quantize(
    x: Sequence[Tensor], centers: Tensor, first: Tensor, sharpness: Tensor, out: Sequence[Tensor]
) -> None:
    """Soft-quantise each tensor, of float32, bfloat16 or float16, to its layer's centres."""
    each = sharpness.tolist()
    for group in groups_of(x, first, centers.device):
        a, b, p = tuple(x[group.part]), tuple(out[group.part]), tuple(each[group.part])
        constants = len(a), aligned(a, b), TILE
        launch(soft_quantize_kernel, group.programs, centers, a, b, group.rows, centers, p, *constants, num_warps=WARPS)


def soft_quantize_backward(
    grad: Sequence[Tensor], x: Sequence[Tensor], centers: Tensor, first: Tensor, sharpness: Tensor,
    dx: Sequence[Tensor], dcenters: Tensor,
) -> None:  # fmt: skip
    """Gradients to the values and to the centres, in one pass; what is empty is not wanted."""
    each, want_centers = sharpness.tolist(), dcenters.numel() > 0
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
