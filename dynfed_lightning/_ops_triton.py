"""The Triton kernels as a backend: hands flat buffers on an NVIDIA GPU to `dynfed_lightning.kernels`.

Every operation runs on the current stream of torch. None waits for the device but `pack`, which looks at the codes, and the
first use of a table of tensors, whose tiles are then uploaded and kept: use it once before a CUDA graph is captured, and keep
it while that is replayed. A list of tensors is copied to or from one flat vector on the way; but layers with learned centres are
read and written where they are, and what is uploaded for them, once for their sizes, is kept for good.

`prox_centers` is left to the reference: the CUDA kernel counts members in shared memory, at addresses that depend on the data,
which Triton does not offer. The reference waits for the device and cannot be captured.

With ``TRITON_INTERPRET=1`` set before the kernels are imported, they run in Triton's interpreter, on tensors of the CPU too:
slowly, as a test.

Triton is an optional dependency and is imported when an operation first runs.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from . import _reference

CAPABILITY = (8, 0)  # the oldest GPU the kernels are compiled and tested for


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def available() -> str | None:
    """None if the kernels can run here, else a sentence that says why not."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.hip is not None:
        return "the Triton kernels are for NVIDIA GPUs"
    found = torch.cuda.get_device_capability()
    if found < CAPABILITY:
        return f"the kernels need compute capability {CAPABILITY[0]}.{CAPABILITY[1]}, but this GPU has {found[0]}.{found[1]}"
    return None


def pack(codes: Tensor, bits: int, out: Tensor) -> int | None:
    """As the reference; 0 if every code is below ``2**bits``. None during the capture of a CUDA graph."""
    from .kernels.pack import pack

    return pack(codes, bits, out)


def unpack(packed: Tensor, bits: int, out: Tensor) -> None:
    from .kernels.unpack import unpack

    unpack(packed, bits, out)


def quantize_pack(
    x: Tensor, bits: int, bucket: int, seed: int, offset: int, rounding: int, packed: Tensor, scales: Tensor
) -> None:
    from .kernels.quantize_pack import quantize_pack

    quantize_pack(x, bits, bucket, seed, offset, rounding, packed, scales)


def unpack_dequantize(packed: Tensor, scales: Tensor, bits: int, bucket: int, out: Tensor) -> None:
    from .kernels.unpack_dequantize import unpack_dequantize

    unpack_dequantize(packed, scales, bits, bucket, out)


def accumulate(
    out: Tensor,
    packed: Sequence[Tensor],
    scales: Sequence[Tensor],
    bits: Sequence[int],
    bucket: int,
    weights: Sequence[float],
) -> None:
    from .kernels.accumulate import accumulate

    accumulate(out, packed, scales, bits, bucket, weights)


def quantize_pack_table(
    x: Sequence[Tensor], table: Tensor, seed: int, rounding: int, packed: Tensor, scales: Tensor
) -> None:
    from .kernels.quantize_pack import quantize_pack_table

    quantize_pack_table(x, table, seed, rounding, packed, scales)


def unpack_dequantize_table(packed: Tensor, scales: Tensor, table: Tensor, out: Sequence[Tensor]) -> None:
    from .kernels.unpack_dequantize import unpack_dequantize_table

    unpack_dequantize_table(packed, scales, table, out)


def accumulate_table(
    out: Tensor, packed: Sequence[Tensor], scales: Sequence[Tensor], tables: Sequence[Tensor], weights: Sequence[float]
) -> None:
    from .kernels.accumulate import accumulate_table

    accumulate_table(out, packed, scales, tables, weights)


def rotate(x: Tensor, table: Tensor, block: int, seed: int, inverse: bool) -> None:
    from .kernels.rotate import rotate

    rotate(x, table, block, seed, inverse)


def symmetric_eigh(a: Tensor, w: Tensor, v: Tensor) -> None:
    """`torch.linalg.eigh`: Triton has no kernel for this.

    A round of Jacobi rotations pairs the indices anew. Triton keeps matrices in registers, in layouts that say who holds what,
    so each round would send all of them through shared memory, between ten or so barriers that Triton places: thousands for a
    matrix of 32 rows, and slower than cuSOLVER. The CUDA kernel rotates in place, between two.
    """
    _reference.symmetric_eigh(a, w, v)


def squared_norm(a: Tensor, out: Tensor) -> None:
    from .kernels.squared_norm import squared_norm

    squared_norm(a, out)


def soft_quantize(
    x: Sequence[Tensor], centers: Tensor, first: Tensor, sharpness: Tensor, out: Sequence[Tensor]
) -> None:
    from .kernels.soft_quantize import soft_quantize

    soft_quantize(x, centers, first, sharpness, out)


def soft_quantize_backward(
    grad: Sequence[Tensor],
    x: Sequence[Tensor],
    centers: Tensor,
    first: Tensor,
    sharpness: Tensor,
    dx: Sequence[Tensor],
    dcenters: Tensor,
) -> None:
    from .kernels.soft_quantize import soft_quantize_backward

    soft_quantize_backward(grad, x, centers, first, sharpness, dx, dcenters)


def nearest_center(
    x: Sequence[Tensor], centers: Tensor, first: Tensor, index: Sequence[Tensor], value: Sequence[Tensor]
) -> None:
    from .kernels.nearest import nearest_center

    nearest_center(x, centers, first, index, value)


def prox_weights(y: Sequence[Tensor], centers: Tensor, first: Tensor, threshold: Tensor, out: Sequence[Tensor]) -> None:
    from .kernels.nearest import prox_weights

    prox_weights(y, centers, first, threshold, out)


def center_sums(values: Sequence[Tensor], index: Sequence[Tensor], first: Tensor, out: Tensor) -> None:
    """As the reference, but an index beyond the layer's centres counts nowhere and nobody is told."""
    from .kernels.soft_quantize import center_sums

    center_sums(values, index, first, out)
