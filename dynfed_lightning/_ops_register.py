"""Registration under ``torch.ops.dynfed_lightning``: one schema, one kernel and one fake each.

A kernel makes its tensors flat, allocates what it returns, and asks `choose` for the backend at run time. Operators whose name
ends in ``_out`` write to tensors that exist. Weights come as a float64 tensor on the CPU: a list of numbers would be part of what
torch.compile compiles for, and a server's weights change every round.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._ops_backends import choose
from ._ops_checks import num_buckets, packed_size, weights_list

_LIBRARY = torch.library.Library("dynfed_lightning", "DEF")  # lives as long as the process
_F32, _U8 = torch.float32, torch.uint8


def _flat(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1)


def _contiguous(tensors: list[Tensor]) -> list[Tensor]:
    """For lists, of any shape: a view of each of hundreds of tensors would take longer than their quantisation."""
    return [t if t.is_contiguous() else t.contiguous() for t in tensors]


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated kernel under `schema`; `fake` gives the shapes of what it returns."""
    name = schema.split("(")[0]

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"dynfed_lightning::{name}", fake, lib=_LIBRARY)
        return kernel

    return register


def _nothing(*_: object) -> None:
    """The fake of an operator that only writes to its arguments."""


# ---- one vector ----


def _pack_size(codes: Tensor, bits: int) -> Tensor:
    return codes.new_empty(packed_size(codes.numel(), bits))


@_operator("pack_out(Tensor codes, int bits, Tensor(a!) out) -> ()", _nothing)
def _pack_out(codes: Tensor, bits: int, out: Tensor) -> None:
    # The or of all codes has a high bit if any code has; a backend that cannot know it now returns None.
    seen = choose("pack", codes.device).pack(_flat(codes), bits, out.view(-1))
    if seen is not None and seen >= 1 << bits:
        raise ValueError(f"Expected `codes` to hold values below 2**bits = {1 << bits}, but got {int(codes.max())}.")


@_operator("pack(Tensor codes, int bits) -> Tensor", _pack_size)
def _pack(codes: Tensor, bits: int) -> Tensor:
    out = _pack_size(codes, bits)
    _pack_out(codes, bits, out)
    return out


def _unpack_size(packed: Tensor, bits: int, n: int) -> Tensor:
    return packed.new_empty(n)


@_operator("unpack_out(Tensor packed, int bits, Tensor(a!) out) -> ()", _nothing)
def _unpack_out(packed: Tensor, bits: int, out: Tensor) -> None:
    choose("unpack", packed.device).unpack(_flat(packed), bits, out.view(-1))


@_operator("unpack(Tensor packed, int bits, SymInt n) -> Tensor", _unpack_size)
def _unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    out = _unpack_size(packed, bits, n)
    _unpack_out(packed, bits, out)
    return out


def _quantized_size(x: Tensor, bits: int, bucket: int, seed: int, offset: int, rounding: int) -> tuple[Tensor, Tensor]:
    packed = x.new_empty(packed_size(x.numel(), bits), dtype=_U8)
    return packed, x.new_empty(num_buckets(x.numel(), bucket), dtype=_F32)


@_operator(
    "quantize_pack_out(Tensor x, int bits, int bucket, SymInt seed, SymInt offset, int rounding, Tensor(a!) packed, "
    "Tensor(b!) scales) -> ()",
    _nothing,
)
def _quantize_pack_out(
    x: Tensor, bits: int, bucket: int, seed: int, offset: int, rounding: int, packed: Tensor, scales: Tensor
) -> None:
    backend = choose("quantize_pack", x.device)
    backend.quantize_pack(_flat(x), bits, bucket, seed, offset, rounding, packed.view(-1), scales.view(-1))


@_operator(
    "quantize_pack(Tensor x, int bits, int bucket, SymInt seed, SymInt offset, int rounding) -> (Tensor, Tensor)",
    _quantized_size,
)
def _quantize_pack(x: Tensor, bits: int, bucket: int, seed: int, offset: int, rounding: int) -> tuple[Tensor, Tensor]:
    packed, scales = _quantized_size(x, bits, bucket, seed, offset, rounding)
    _quantize_pack_out(x, bits, bucket, seed, offset, rounding, packed, scales)
    return packed, scales


def _dequantized_size(packed: Tensor, scales: Tensor, bits: int, bucket: int, n: int) -> Tensor:
    return scales.new_empty(n)


@_operator("unpack_dequantize_out(Tensor packed, Tensor scales, int bits, int bucket, Tensor(a!) out) -> ()", _nothing)
def _unpack_dequantize_out(packed: Tensor, scales: Tensor, bits: int, bucket: int, out: Tensor) -> None:
    backend = choose("unpack_dequantize", packed.device)
    backend.unpack_dequantize(_flat(packed), _flat(scales), bits, bucket, out.view(-1))


@_operator(
    "unpack_dequantize(Tensor packed, Tensor scales, int bits, int bucket, SymInt n) -> Tensor", _dequantized_size
)
def _unpack_dequantize(packed: Tensor, scales: Tensor, bits: int, bucket: int, n: int) -> Tensor:
    out = _dequantized_size(packed, scales, bits, bucket, n)
    _unpack_dequantize_out(packed, scales, bits, bucket, out)
    return out


@_operator(
    "dequantize_accumulate_many(Tensor(a!) out, Tensor[] packed, Tensor[] scales, int[] bits, int bucket, "
    "Tensor weights) -> ()",
    _nothing,
)
def _accumulate_many(
    out: Tensor, packed: list[Tensor], scales: list[Tensor], bits: list[int], bucket: int, weights: Tensor
) -> None:
    target = _flat(out)  # shares memory with `out` unless that is not contiguous
    backend = choose("accumulate", out.device)
    backend.accumulate(
        target, [_flat(p) for p in packed], [_flat(s) for s in scales], bits, bucket, weights_list(weights)
    )
    if not out.is_contiguous():
        out.copy_(target.view(out.shape))


# ---- a table of tensors ----


def _quantized_table_size(
    x: list[Tensor], table: Tensor, num_bytes: int, num_scales: int, seed: int, rounding: int
) -> tuple[Tensor, Tensor]:
    like = x[0] if x else table
    return like.new_empty(num_bytes, dtype=_U8), like.new_empty(num_scales, dtype=_F32)


@_operator(
    "quantize_pack_table_out(Tensor[] x, Tensor table, SymInt seed, int rounding, Tensor(a!) packed, "
    "Tensor(b!) scales) -> ()",
    _nothing,
)
def _quantize_pack_table_out(
    x: list[Tensor], table: Tensor, seed: int, rounding: int, packed: Tensor, scales: Tensor
) -> None:
    backend = choose("quantize_pack_table", packed.device)
    backend.quantize_pack_table(_contiguous(x), table, seed, rounding, packed.view(-1), scales.view(-1))


@_operator(
    "quantize_pack_table(Tensor[] x, Tensor table, SymInt num_bytes, SymInt num_scales, SymInt seed, int rounding) "
    "-> (Tensor, Tensor)",
    _quantized_table_size,
)
def _quantize_pack_table(
    x: list[Tensor], table: Tensor, num_bytes: int, num_scales: int, seed: int, rounding: int
) -> tuple[Tensor, Tensor]:
    packed, scales = _quantized_table_size(x, table, num_bytes, num_scales, seed, rounding)
    _quantize_pack_table_out(x, table, seed, rounding, packed, scales)
    return packed, scales


@_operator("unpack_dequantize_table_out(Tensor packed, Tensor scales, Tensor table, Tensor(a!)[] out) -> ()", _nothing)
def _unpack_dequantize_table_out(packed: Tensor, scales: Tensor, table: Tensor, out: list[Tensor]) -> None:
    backend = choose("unpack_dequantize_table", packed.device)
    backend.unpack_dequantize_table(_flat(packed), _flat(scales), table, out)


@_operator(
    "dequantize_accumulate_table(Tensor(a!) out, Tensor[] packed, Tensor[] scales, Tensor[] tables, Tensor weights) "
    "-> ()",
    _nothing,
)
def _accumulate_table(
    out: Tensor, packed: list[Tensor], scales: list[Tensor], tables: list[Tensor], weights: Tensor
) -> None:
    target = _flat(out)
    backend = choose("accumulate_table", out.device)
    backend.accumulate_table(
        target, [_flat(p) for p in packed], [_flat(s) for s in scales], tables, weights_list(weights)
    )
    if not out.is_contiguous():
        out.copy_(target.view(out.shape))


# ---- rotation ----


@_operator("rotate_(Tensor(a!) x, Tensor table, int block, SymInt seed, bool inverse) -> ()", _nothing)
def _rotate(x: Tensor, table: Tensor, block: int, seed: int, inverse: bool) -> None:
    choose("rotate", x.device).rotate(x.view(-1), table, block, seed, inverse)


# ---- dense matrices, for the truncated SVD ----


def _eigh_size(a: Tensor) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape[:2]), a.new_empty(a.shape)


@_operator("symmetric_eigh(Tensor a) -> (Tensor, Tensor)", _eigh_size)
def _symmetric_eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    w, v = _eigh_size(a)
    if a.numel():
        choose("symmetric_eigh", a.device).symmetric_eigh(a.contiguous(), w, v)
    return w, v


def _norm_size(a: Tensor) -> Tensor:
    return a.new_empty(a.shape[:1], dtype=torch.float64)


@_operator("squared_norm(Tensor a) -> Tensor", _norm_size)
def _squared_norm(a: Tensor) -> Tensor:
    out = _norm_size(a)
    if not a.numel():
        return out.zero_()
    a = a.mT if a.mT.is_contiguous() else a.contiguous()  # the order of a sum of squares is the backend's own
    choose("squared_norm", a.device).squared_norm(a, out)
    return out


OPERATORS = torch.ops.dynfed_lightning
