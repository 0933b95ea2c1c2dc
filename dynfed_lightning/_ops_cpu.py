"""The C++ CPU kernels as a backend: hands flat buffers to ``_C`` (see ``csrc/``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _reference
from ._ops_backends import instruction_set

_C = torch.ops.dynfed_lightning_cpu
EIGH_MOST = 256  # beyond this LAPACK is faster


def expect_writes(out: Tensor) -> None:
    """Before `out`, fresh memory, is first filled by something else: large outputs then cost fewer page faults."""
    _C.expect_writes(out)


def pack(codes: Tensor, bits: int, out: Tensor) -> int:
    return _C.pack(codes, out, bits, instruction_set())


def unpack(packed: Tensor, bits: int, out: Tensor) -> None:
    _C.unpack(packed, out, bits, instruction_set())


def quantize_pack(
    x: Tensor, bits: int, bucket: int, seed: int, offset: int, rounding: int, packed: Tensor, scales: Tensor
) -> None:
    _C.quantize_pack(x, packed, scales, bits, bucket, seed, offset, rounding, instruction_set())


def unpack_dequantize(packed: Tensor, scales: Tensor, bits: int, bucket: int, out: Tensor) -> None:
    _C.unpack_dequantize(packed, scales, out, bits, bucket, instruction_set())


def accumulate(
    out: Tensor,
    packed: Sequence[Tensor],
    scales: Sequence[Tensor],
    bits: Sequence[int],
    bucket: int,
    weights: Sequence[float],
) -> None:
    _C.accumulate(out, list(packed), list(scales), list(bits), bucket, list(weights), instruction_set())


def quantize_pack_table(
    x: Sequence[Tensor], table: Tensor, seed: int, rounding: int, packed: Tensor, scales: Tensor
) -> None:
    _C.quantize_pack_table(list(x), table, seed, rounding, packed, scales, instruction_set())


def unpack_dequantize_table(packed: Tensor, scales: Tensor, table: Tensor, out: Sequence[Tensor]) -> None:
    _C.unpack_dequantize_table(packed, scales, table, list(out), instruction_set())


def accumulate_table(
    out: Tensor, packed: Sequence[Tensor], scales: Sequence[Tensor], tables: Sequence[Tensor], weights: Sequence[float]
) -> None:
    _C.accumulate_table(out, list(packed), list(scales), list(tables), list(weights), instruction_set())


def rotate(x: Tensor, table: Tensor, block: int, seed: int, inverse: bool) -> None:
    _C.rotate(x, table, block, seed, inverse, instruction_set())


def symmetric_eigh(a: Tensor, w: Tensor, v: Tensor) -> None:
    if a.shape[1] <= EIGH_MOST:
        _C.symmetric_eigh(a, w, v, instruction_set())
    else:
        _reference.symmetric_eigh(a, w, v)


def squared_norm(a: Tensor, out: Tensor) -> None:
    _C.squared_norm(a, out, instruction_set())


# ---- learned centres ----


def soft_quantize(
    x: Sequence[Tensor], centers: Tensor, first: Tensor, sharpness: Tensor, out: Sequence[Tensor]
) -> None:
    _C.soft_quantize(list(x), centers, first, sharpness, list(out), instruction_set())


def soft_quantize_backward(
    grad: Sequence[Tensor],
    x: Sequence[Tensor],
    centers: Tensor,
    first: Tensor,
    sharpness: Tensor,
    dx: Sequence[Tensor],
    dcenters: Tensor,
) -> None:
    _C.soft_quantize_backward(list(grad), list(x), centers, first, sharpness, list(dx), dcenters, instruction_set())


def nearest_center(
    x: Sequence[Tensor], centers: Tensor, first: Tensor, index: Sequence[Tensor], value: Sequence[Tensor]
) -> None:
    _C.nearest_center(list(x), centers, first, list(index), list(value), instruction_set())


def prox_weights(y: Sequence[Tensor], centers: Tensor, first: Tensor, threshold: Tensor, out: Sequence[Tensor]) -> None:
    _C.prox_weights(list(y), centers, first, threshold, list(out), instruction_set())


def prox_centers(
    proposal: Tensor, x: Sequence[Tensor], centers: Tensor, first: Tensor, strength: Tensor, out: Tensor
) -> None:
    _C.prox_centers(proposal, list(x), centers, first, strength, out, instruction_set())


def center_sums(values: Sequence[Tensor], index: Sequence[Tensor], first: Tensor, out: Tensor) -> int:
    return _C.center_sums(list(values), list(index), first, out)


# ---- of this backend alone, for `_svd_rows`: few long rows ----


def row_spectrum(x: Tensor, w: Tensor, v: Tensor) -> None:
    _C.row_spectrum(x, w, v, instruction_set())


def orthonormal_rows(x: Tensor, q: Tensor, drop: float, loose: float) -> None:
    _C.orthonormal_rows(x, q, drop, loose, instruction_set())


def combine_rows(t: Tensor, x: Tensor, out: Tensor) -> None:
    _C.combine_rows(t, x, out, instruction_set())
