"""The operations of `dynfed_lightning.ops` that work on a table of tensors, and the rotation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from . import _ops_autograd
from ._ops_backends import choose
from ._ops_checks import (
    INPUT_DTYPES,
    MAX_ROTATE_BLOCK,
    check_apart,
    check_device,
    check_int,
    check_lengths,
    check_out,
    check_pair,
    check_tensor,
    rounding_number,
    signed_seed,
    weights_tensor,
    written,
)
from ._ops_layout import Layout
from ._ops_register import OPERATORS as _OPS


def quantize_pack_table(
    x: Tensor | Sequence[Tensor],
    layout: Layout,
    seed: int = 0,
    rounding: str = "stochastic",
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`quantize_pack` for every tensor of a model update in one call, each with its own bits and bucket.

    Args:
        x: one flat vector of at least ``layout.numel`` values, or a tensor of any shape for each row of `layout`; float32,
            bfloat16 or float16, all on one device.
        layout: the table.
        seed: 0 to ``2**64 - 1``.
        rounding: as `quantize_pack`.
        out: ``(packed, scales)`` to write to.

    Returns:
        ``(packed, scales)``: uint8 ``[layout.num_bytes]`` and float32 ``[layout.num_scales]``: the tensors' payloads, one after
        the other, the same bytes as from a call per tensor with ``offset=layout.offsets[i]``.

    Raises:
        ValueError: tensors that are not those of the table, or not on one device, or a number out of range.
        TypeError: a tensor of another dtype.
    """
    _check_layout(layout)
    tensors, table = _table_tensors("x", x, layout, INPUT_DTYPES)
    signed, number = signed_seed(seed), rounding_number(rounding, layout.largest_bucket)
    if out is None:
        return _OPS.quantize_pack_table(tensors, table, layout.num_bytes, layout.num_scales, signed, number)
    packed, scales = check_pair("out", out)
    like = tensors[0] if tensors else layout.table
    check_out("out[0]", packed, torch.uint8, layout.num_bytes, "x", like)
    check_out("out[1]", scales, torch.float32, layout.num_scales, "x", like)
    _OPS.quantize_pack_table_out(tensors, table, signed, number, packed, scales)
    written(packed, scales)
    return out


def unpack_dequantize_table(
    packed: Tensor, scales: Tensor, layout: Layout, *, out: Tensor | Sequence[Tensor] | None = None
) -> Tensor | Sequence[Tensor]:
    """The values that `quantize_pack_table`'s result stands for.

    Args:
        packed: uint8 ``[layout.num_bytes]``.
        scales: float32 ``[layout.num_scales]``, on the same device.
        layout: the table.
        out: float32, contiguous: a flat vector of at least ``layout.numel`` values, or a tensor for each row.

    Returns:
        `out`; by default a new float32 ``[layout.numel]``, 0 where no tensor of the table lies.

    Raises:
        ValueError: tensors that are not those of the table, not on one device, or that share memory.
        TypeError: a tensor of another dtype.
    """
    _check_layout(layout)
    _check_arenas(packed, scales, layout)
    result = out
    if result is None:
        gaps = sum(layout.sizes) != layout.numel
        result = (torch.zeros if gaps else torch.empty)(layout.numel, dtype=torch.float32, device=packed.device)
    tensors, table = _table_tensors("out", result, layout, (torch.float32,))
    if out is not None:
        for tensor in tensors:
            check_out("out", tensor, torch.float32, tensor.numel(), "packed", packed)
        check_apart("out", tensors)
    _OPS.unpack_dequantize_table_out(packed, scales.detach(), table, tensors)
    if out is not None:
        written(*tensors)
    return result


def dequantize_accumulate_table(
    out: Tensor,
    packed: Sequence[Tensor],
    scales: Sequence[Tensor],
    layouts: Sequence[Layout],
    weights: Sequence[float],
) -> Tensor:
    """`dequantize_accumulate_many` for whole model updates: each client has its own bits for each tensor.

    Args:
        out: float32, any shape with at least ``layout.numel`` values; what lies outside of the table stays as it is.
        packed: a uint8 tensor ``[layout.num_bytes]`` per client.
        scales: a float32 tensor ``[layout.num_scales]`` per client.
        layouts: a table per client; they may differ in bits only.
        weights: a finite number per client; rounded to float32.

    Returns:
        `out`. The clients are added in the order given.

    Raises:
        ValueError: lists of different lengths, tables that do not agree, tensors that are not those of the table, or not on
            one device.
        TypeError: a tensor of another dtype, or a weight that is not a number.
    """
    check_tensor("out", out, (torch.float32,))
    check_lengths(packed=packed, scales=scales, layouts=layouts, weights=weights)
    for layout in layouts:
        _check_layout(layout)
    for p, s, layout in zip(packed, scales, layouts, strict=True):
        if layout is not layouts[0] and not layout.agrees(layouts[0]):
            raise ValueError(f"Expected `layouts` to differ in bits only, but got {layouts[0]} and {layout}.")
        if out.numel() < layout.numel:
            raise ValueError(f"Expected `out` to hold at least {layout.numel} values, but got {out.numel()}.")
        _check_arenas(p, s, layout)
        check_device("packed", p, "out", out)
    _OPS.dequantize_accumulate_table(
        out.detach(),
        list(packed),
        [s.detach() for s in scales],
        [layout.table for layout in layouts],
        weights_tensor(weights),
    )
    written(out)
    return out


def rotate(
    x: Tensor,
    block: int = 4096,
    seed: int = 0,
    *,
    inverse: bool = False,
    layout: Layout | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Rotate `x` by a blockwise randomised Hadamard transform: ``y = H D x / sqrt(B)``, D random signs.

    After it the values of a block are nearly normally distributed, unless a handful of them carried it: what rounding ``"eden"``
    expects (DRIVE, Vargaftik et al., NeurIPS 2021, section 4.1). The transform is orthogonal: lengths and angles stay.

    A vector of n values is cut into blocks of ``B = min(block, the largest power of two <= n)``. If they do not fill it, the last
    B values are rotated once more, so that none is left out and none is added. Values near float32's largest may have infinite
    sums.

    Args:
        x: float32, bfloat16 or float16, any shape; taken in row-major order as n values.
        block: a power of two from 1 to 8192.
        seed: 0 to ``2**64 - 1``; the signs depend on it and on the values' places alone.
        inverse: undo the rotation with the same `block`, `seed` and `layout`.
        layout: rotate each tensor of this table in the flat vector `x` on its own (its starts, sizes and offsets count);
            by default `x` is one vector.
        out: float32, contiguous, as many values as `x`; may be `x` itself.

    Returns:
        float32, of the shape of `x`; differentiable in `x` unless written to `out`.

    Raises:
        ValueError: `block` or `seed` out of range, or a tensor not of the size, or the device, that it should have.
        TypeError: a tensor of another dtype.
    """
    check_int("block", block, 1, MAX_ROTATE_BLOCK)
    if block & (block - 1):
        raise ValueError(f"Expected `block` to be a power of two, but got {block}.")
    signed = signed_seed(seed)
    if not isinstance(inverse, bool):
        raise TypeError(f"Expected `inverse` to be True or False, but got {inverse!r}.")
    check_tensor("x", x, INPUT_DTYPES)
    layout = _single(x) if layout is None else layout
    _check_layout(layout)
    if x.numel() < layout.numel:
        raise ValueError(f"Expected `x` to hold at least {layout.numel} values, but got {x.numel()}.")
    if out is None:
        if _ops_autograd.wanted(x):
            return _ops_autograd.rotate(x, layout.table, block, signed, inverse)
        result = _fresh_copy(x)
        _OPS.rotate_(result, layout.table, block, signed, inverse)
        return result
    check_out("out", out, torch.float32, x.numel(), "x", x, apart=out is not x)
    if out is not x:
        out.detach().copy_(x.detach().reshape(out.shape))
    _OPS.rotate_(out.detach(), layout.table, block, signed, inverse)
    written(out)
    return out


def _fresh_copy(x: Tensor) -> Tensor:
    """`x` as contiguous float32, in memory of its own."""
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if y.device.type == "cpu" and not torch.compiler.is_compiling() and type(y) is Tensor:
        backend = choose("rotate", y.device)
        if hasattr(backend, "expect_writes"):
            backend.expect_writes(y)
    return y.copy_(x.detach())


_single_of = lru_cache(maxsize=64)(lambda n: Layout([n], 8))


def _single(x: Tensor) -> Layout:
    """The table of one vector. Making it takes longer than rotating a short one."""
    return Layout([x.numel()], 8) if torch.compiler.is_compiling() else _single_of(x.numel())


def _check_layout(value: Layout) -> None:
    if not isinstance(value, Layout):
        raise TypeError(f"Expected `layout` to be a Layout, but got {type(value).__name__}.")


def _table_tensors(
    name: str, value: Tensor | Sequence[Tensor], layout: Layout, dtypes: tuple[torch.dtype, ...]
) -> tuple[list[Tensor], Tensor]:
    """A flat vector as a list of one, or the tensors of the rows, once they have proved to be those of the table; the table."""
    if isinstance(value, Tensor):
        check_tensor(name, value, dtypes)
        if value.numel() < layout.numel:
            raise ValueError(f"Expected `{name}` to hold at least {layout.numel} values, but got {value.numel()}.")
        return [value.detach()], layout.table
    tensors = list(value)
    for tensor in tensors:
        check_tensor(name, tensor, dtypes)
    if (sizes := tuple(t.numel() for t in tensors)) != layout.sizes:
        raise ValueError(f"Expected `{name}` to be tensors of the table's sizes {layout.sizes}, but got {sizes}.")
    if len({t.device for t in tensors}) > 1:
        for tensor in tensors:
            check_device(name, tensor, f"{name}[0]", tensors[0])
    table = layout.table
    if len(tensors) == 1 and layout.starts[0]:  # to the operators a list of one is a flat vector
        table = table.clone()
        table[0, 0] = 0
    return [t.detach() if t.requires_grad else t for t in tensors], table


def _check_arenas(packed: Tensor, scales: Tensor, layout: Layout) -> None:
    for name, arena, dtype, size in (
        ("packed", packed, torch.uint8, layout.num_bytes),
        ("scales", scales, torch.float32, layout.num_scales),
    ):
        check_tensor(name, arena, (dtype,))
        if arena.numel() != size:
            raise ValueError(f"Expected `{name}` to hold {size} values for {layout}, but got {arena.numel()}.")
    check_device("scales", scales, "packed", packed)
