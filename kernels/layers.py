"""Layers with learned centres: one launch for up to LAYERS of them, whose addresses are its arguments."""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

TILE = 2048  # values a program
WARPS = 8  # so that a thread has 8 of them: with 16, 160 registers were seen
LAYERS = 16  # a launch: as many addresses, and numbers, are arguments of each kind
PARTS = 1024  # sums of tiles that a program takes at once


class Group(NamedTuple):
    """Layers that one launch handles, one after the other in the model."""

    part: slice  # of the lists of layers
    centers: slice  # of the arenas
    programs: int
    sums: int  # how many sums of tiles there are: one for each centre and each tile of its layer
    rows: Tensor  # int64 [layers, 5] on the device: what `layer_of` reads
    parts: Tensor  # int64 [centres, 2] on the device: where the sums of a centre begin, and how many there are


@cache  # a model's few numbers stay on the device: a CUDA graph that is replayed needs them
def _groups(device: torch.device, sizes: tuple[int, ...], first: tuple[int, ...]) -> list[Group]:
    groups = []
    for begin in range(0, len(sizes), LAYERS):
        end = min(begin + LAYERS, len(sizes))
        rows, parts, programs, sums = [], [], 0, 0
        for n, at, beyond in zip(sizes[begin:end], first[begin:end], first[begin + 1 : end + 1], strict=True):
            tiles = triton.cdiv(n, TILE)
            rows.append([programs + tiles, n, at, beyond - at, sums])
            parts += [[sums + j * tiles, tiles] for j in range(beyond - at)]
            programs, sums = programs + tiles, sums + tiles * (beyond - at)
        on_device = (torch.tensor(each, dtype=torch.int64).to(device) for each in (rows, parts))
        groups.append(Group(slice(begin, end), slice(first[begin], first[end]), programs, sums, *on_device))
    return groups


def groups_of(x: Sequence[Tensor], first: Tensor, device: torch.device) -> list[Group]:
    """The launches that a model takes. The first time that it sees sizes it uploads them, which waits for the device."""
    return _groups(device, tuple(t.numel() for t in x), tuple(first.tolist()))


@triton.jit
def layer_of(rows, LAYERS: tl.constexpr, TILE: tl.constexpr):
    """This program's layer: its number, where the tile begins, values left in the layer, first centre, number of centres, where
    its sums begin, how many tiles the layer has and which of them this is.
    """
    program = tl.program_id(0).to(tl.int64)
    layer = 0
    before = program - program
    for k in tl.static_range(LAYERS - 1):
        end = tl.load(rows + 5 * k)
        layer += (program >= end).to(tl.int32)
        before = tl.where(program >= end, end, before)
    at = rows + 5 * layer
    tiles = tl.load(at) - before
    tile = program - before
    start = tile * TILE
    return (
        layer,
        start,
        tl.load(at + 1) - start,
        tl.load(at + 2),
        tl.load(at + 3).to(tl.int32),
        tl.load(at + 4),
        tiles,
        tile,
    )


@triton.jit
def pick(pointers, layer, LAYERS: tl.constexpr, ALIGNED: tl.constexpr):
    """The layer's pointer. Chosen among addresses: a choice among pointers Triton makes by branches."""
    address = pointers[0].to(tl.int64)
    for k in tl.static_range(1, LAYERS):
        address = tl.where(layer == k, pointers[k].to(tl.int64), address)
    pointer = address.to(pointers[0].dtype)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def pick_number(numbers, layer, LAYERS: tl.constexpr):
    number = tl.cast(numbers[0], tl.float32)
    for k in tl.static_range(1, LAYERS):
        number = tl.where(layer == k, tl.cast(numbers[k], tl.float32), number)
    return number


@triton.jit
def widen(x):
    """float32 of any of the three types."""
    if x.dtype == tl.bfloat16:
        # The high half of a float32. Spelled out because Triton's interpreter turns denormals into other values.
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def narrow(x, like: tl.constexpr):
    """The nearest number of the type `like`, ties to even."""
    if like == tl.bfloat16:
        # Spelled out for the same reason.
        bits = x.to(tl.uint32, bitcast=True)
        rounded = tl.where(x == x, bits + (0x7FFF + ((bits >> 16) & 1)), 0x7FFF0000)
        return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(like)


@triton.jit
def load(x, left, TILE: tl.constexpr):
    """A tile as float32, zeros beyond its end. What needs no mask can be read 16 bytes at a time."""
    i = tl.arange(0, TILE)
    if left >= TILE:
        v = tl.load(x + i)
    else:
        v = tl.load(x + i, mask=i < left, other=0.0)
    return widen(v)


@triton.jit
def store(out, v, left, TILE: tl.constexpr):
    """Write a tile of `out`'s own type."""
    i = tl.arange(0, TILE)
    if left >= TILE:
        tl.store(out + i, v)
    else:
        tl.store(out + i, v, mask=i < left)


def aligned(*lists: Sequence[Tensor]) -> bool:
    """Whether all tensors begin at multiples of 16 bytes."""
    return all(t.data_ptr() % 16 == 0 for tensors in lists for t in tensors)


@triton.jit(do_not_specialize=["parts", "partial", "out"])
def add_tiles_kernel(parts, partial, out, PARTS: tl.constexpr):
    """One centre's sums of tiles, in float64 and in a fixed order."""
    program = tl.program_id(0)
    start = tl.load(parts + 2 * program)
    tiles = tl.load(parts + 2 * program + 1).to(tl.int32)
    i = tl.arange(0, PARTS)
    total = tl.zeros([PARTS], tl.float64)
    for at in range(0, tiles, PARTS):
        total += tl.load(partial + start + at + i, mask=at + i < tiles, other=0.0).to(tl.float64)
    tl.store(out + program, tl.sum(total).to(tl.float32))


def add_tiles(group: Group, partial: Tensor, out: Tensor) -> None:
    """The sums of the group's centres, from those of their tiles, to their place in the arena `out`."""
    into = out[group.centers]
    launch(add_tiles_kernel, into.numel(), out, group.parts, partial, into, PARTS)
