"""The CUDA C++ kernels as a backend: hands flat buffers on an NVIDIA GPU to ``_C`` (see ``csrc/cuda``).

Every operation runs on the current stream of torch, and none but `pack` waits for the device: all may be captured into a CUDA
graph. Tables of tensors are read on the host and travel as kernel parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from . import _reference
from ._ops_backends import load_error

_C = torch.ops.dynfed_lightning_cuda
CAPABILITY = (8, 0)  # the oldest GPU the kernels are compiled for
NORM_CHUNK = 2048  # values whose squares a warp adds up: kNormChunk of csrc/cuda/launchers.h
CENTER_CHUNK = 2048  # values of a layer that a thread block adds up by centre: kCenterChunk
CENTER_BINS = 260  # counts of members that `prox_centers` keeps for a centre: kCenterBins


@cache
def available() -> str | None:
    """None if the kernels can run here, else a sentence that says why not."""
    reason = load_error()
    if reason:
        return reason
    if not hasattr(_C, "quantize_pack"):
        return "the C++ kernels were built without CUDA; DYNFED_CUDA=1 shows why"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    found = torch.cuda.get_device_capability()
    if found < CAPABILITY:
        return f"the kernels need compute capability {CAPABILITY[0]}.{CAPABILITY[1]}, but this GPU has {found[0]}.{found[1]}"
    return None


def pack(codes: Tensor, bits: int, out: Tensor) -> int | None:
    """As the reference; None during the capture of a CUDA graph, where the codes cannot be looked at."""
    seen = torch.zeros(1, dtype=torch.int32, device=codes.device)
    _C.pack(codes, out, seen, bits)
    return None if torch.cuda.is_current_stream_capturing() else int(seen)


def unpack(packed: Tensor, bits: int, out: Tensor) -> None:
    _C.unpack(packed, out, bits)


def quantize_pack(
    x: Tensor, bits: int, bucket: int, seed: int, offset: int, rounding: int, packed: Tensor, scales: Tensor
) -> None:
    _C.quantize_pack(x, packed, scales, bits, bucket, seed, offset, rounding)


def unpack_dequantize(packed: Tensor, scales: Tensor, bits: int, bucket: int, out: Tensor) -> None:
    _C.unpack_dequantize(out, packed, scales, bits, bucket)


def accumulate(
    out: Tensor,
    packed: Sequence[Tensor],
    scales: Sequence[Tensor],
    bits: Sequence[int],
    bucket: int,
    weights: Sequence[float],
) -> None:
    _C.accumulate(out, list(packed), list(scales), list(bits), bucket, list(weights))


def quantize_pack_table(
    x: Sequence[Tensor], table: Tensor, seed: int, rounding: int, packed: Tensor, scales: Tensor
) -> None:
    _C.quantize_pack_table(list(x), table, packed, scales, seed, rounding)


def unpack_dequantize_table(packed: Tensor, scales: Tensor, table: Tensor, out: Sequence[Tensor]) -> None:
    _C.unpack_dequantize_table(list(out), packed, scales, table)


def accumulate_table(
    out: Tensor, packed: Sequence[Tensor], scales: Sequence[Tensor], tables: Sequence[Tensor], weights: Sequence[float]
) -> None:
    _C.accumulate_table(out, list(packed), list(scales), list(tables), list(weights))


def rotate(x: Tensor, table: Tensor, block: int, seed: int, inverse: bool) -> None:
    _C.rotate(x, table, block, seed, inverse)


def symmetric_eigh(a: Tensor, w: Tensor, v: Tensor) -> None:
    """As the reference; matrices of more than 128 rows, or too large for the device's shared memory, go to cuSOLVER, which waits
    for the device and cannot be captured.

    A thread block rotates a whole matrix in shared memory. On a GPU with 100 KB of it (compute capability 8.6, 8.9 and 12) that
    is up to 110 rows.
    """
    if not _C.symmetric_eigh(a, w, v):
        _reference.symmetric_eigh(a, w, v)


def squared_norm(a: Tensor, out: Tensor) -> None:
    chunks = -(-a.shape[1] * a.shape[2] // NORM_CHUNK)
    partial = torch.empty(a.shape[0] * chunks, dtype=torch.float64, device=a.device)
    _C.squared_norm(a, out, partial)


def soft_quantize(
    x: Sequence[Tensor], centers: Tensor, first: Tensor, sharpness: Tensor, out: Sequence[Tensor]
) -> None:
    _C.soft_quantize(list(x), centers, first, sharpness, list(out))


def soft_quantize_backward(
    grad: Sequence[Tensor],
    x: Sequence[Tensor],
    centers: Tensor,
    first: Tensor,
    sharpness: Tensor,
    dx: Sequence[Tensor],
    dcenters: Tensor,
) -> None:
    """As the reference. Each thread block adds up, for each centre, what 2048 weights contribute, in float32; a second launch
    adds up the blocks in float64. Both in a fixed order: the same bits every time.
    """
    partial = _partial_sums(x, first, dcenters)
    _C.soft_quantize_backward(list(grad), list(x), centers, first, sharpness, list(dx), partial, dcenters)


def nearest_center(
    x: Sequence[Tensor], centers: Tensor, first: Tensor, index: Sequence[Tensor], value: Sequence[Tensor]
) -> None:
    _C.nearest_center(list(x), centers, first, list(index), list(value))


def prox_weights(y: Sequence[Tensor], centers: Tensor, first: Tensor, threshold: Tensor, out: Sequence[Tensor]) -> None:
    _C.prox_weights(list(y), centers, first, threshold, list(out))


def prox_centers(
    proposal: Tensor, x: Sequence[Tensor], centers: Tensor, first: Tensor, strength: Tensor, out: Tensor
) -> None:
    """As the reference, in four rounds over x that count members instead of sorting them: 8 bits of each result a round."""
    bins = torch.empty(centers.numel() * CENTER_BINS, dtype=torch.int64, device=centers.device)
    _C.prox_centers(proposal, list(x), centers, first, strength, bins, out)


def center_sums(values: Sequence[Tensor], index: Sequence[Tensor], first: Tensor, out: Tensor) -> None:
    """As the reference; added up as in `soft_quantize_backward`. An index beyond the layer's centres counts nowhere."""
    _C.center_sums(list(values), list(index), first, _partial_sums(values, first, out), out)


def _partial_sums(x: Sequence[Tensor], first: Tensor, total: Tensor) -> Tensor:
    """Room for the sums of thread blocks, none if `total` is empty; zeros in `total` for layers without values."""
    if not total.numel():
        return total
    counts, chunks = first.diff().tolist(), [-(-t.numel() // CENTER_CHUNK) for t in x]
    if 0 in chunks:
        total.zero_()
    return total.new_empty(sum(m * n for m, n in zip(counts, chunks, strict=True)))
