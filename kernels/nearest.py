"""nearest_center and prox_weights: ``index`` = number of j with ``x >= mid_j``, ``mid_j = fl(fl(c_{j-1} + c_j) / 2)``; and with q
that centre and t the threshold ``y >= fl(q + t) -> fl(y - t)``, ``y <= fl(q - t) -> fl(y + t)``, else q.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .layers import TILE, WARPS, aligned, groups_of, layer_of, load, narrow, pick, pick_number, store


@triton.jit
def nearest(v, centers, count):
    """The index of the nearest centre and the centre; of NaN the first one."""
    low = tl.load(centers)
    index = tl.zeros_like(v).to(tl.int32)
    value = tl.zeros_like(v) + low
    for j in range(1, count):
        high = tl.load(centers + j)
        reached = v >= (low + high) * 0.5
        index += reached.to(tl.int32)
        value = tl.where(reached, high, value)
        low = high
    return index, value


@triton.jit
def nearest_center_kernel(
    x, index, value, rows, centers, LAYERS: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr
):
    layer, start, left, first, count, _, _, _ = layer_of(rows, LAYERS, TILE)
    v = load(pick(x, layer, LAYERS, ALIGNED) + start, left, TILE)
    number, q = nearest(v, centers + first, count)
    store(pick(index, layer, LAYERS, ALIGNED) + start, number.to(tl.uint8), left, TILE)
    to = pick(value, layer, LAYERS, ALIGNED) + start
    store(to, narrow(tl.where(v == v, q, v), to.dtype.element_ty), left, TILE)


@triton.jit
def prox_weights_kernel(
    y, out, rows, centers, threshold, LAYERS: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr
):
    layer, start, left, first, count, _, _, _ = layer_of(rows, LAYERS, TILE)
    t = pick_number(threshold, layer, LAYERS)
    v = load(pick(y, layer, LAYERS, ALIGNED) + start, left, TILE)
    _, q = nearest(v, centers + first, count)
    moved = tl.where(v >= q + t, v - t, tl.where(v <= q - t, v + t, tl.where(v == v, q, v)))
    to = pick(out, layer, LAYERS, ALIGNED) + start
    store(to, narrow(moved, to.dtype.element_ty), left, TILE)


def nearest_center(
    x: Sequence[Tensor], centers: Tensor, first: Tensor, index: Sequence[Tensor], value: Sequence[Tensor]
) -> None:
    """The number of each value's nearest centre, uint8, and the centre, in the type of the value."""
    for group in groups_of(x, first, centers.device):
        lists = tuple(x[group.part]), tuple(index[group.part]), tuple(value[group.part])
        constants = len(lists[0]), aligned(*lists), TILE
        launch(nearest_center_kernel, group.programs, centers, *lists, group.rows, centers, *constants, num_warps=WARPS)


def prox_weights(y: Sequence[Tensor], centers: Tensor, first: Tensor, threshold: Tensor, out: Sequence[Tensor]) -> None:
    """The proximal step of each value towards its nearest centre; `out` may be `y`."""
    each = threshold.tolist()
    for group in groups_of(y, first, centers.device):
        a, b, t = tuple(y[group.part]), tuple(out[group.part]), tuple(each[group.part])
        constants = len(a), aligned(a, b), TILE
        launch(prox_weights_kernel, group.programs, centers, a, b, group.rows, centers, t, *constants, num_warps=WARPS)
