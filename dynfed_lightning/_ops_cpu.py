"""The C++ CPU kernels as a backend: allocates the outputs and hands flat buffers to ``_C`` (see ``csrc/``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._ops_backends import instruction_set

_C = torch.ops.dynfed_lightning_cpu


def pack(codes: Tensor, bits: int) -> Tensor:
    packed = torch.empty((codes.numel() * bits + 7) // 8, dtype=torch.uint8)
    # The kernel returns the bitwise or of all codes, which saves a pass over them: it has a high bit if any code has.
    if _C.pack(codes, packed, bits, instruction_set()) >= 1 << bits:
        raise ValueError(f"Expected `codes` to hold values below 2**bits = {1 << bits}, but got {int(codes.max())}.")
    return packed


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    codes = torch.empty(n, dtype=torch.uint8)
    _C.unpack(packed, codes, bits, instruction_set())
    return codes


def quantize_pack(x: Tensor, bits: int, bucket: int, seed: int, offset: int, stochastic: bool) -> tuple[Tensor, Tensor]:
    n = x.numel()
    packed = torch.empty((n * bits + 7) // 8, dtype=torch.uint8)
    scales = torch.empty((n + bucket - 1) // bucket, dtype=torch.float32)
    _C.quantize_pack(x, packed, scales, bits, bucket, seed, offset, stochastic, instruction_set())
    return packed, scales


def unpack_dequantize(packed: Tensor, scales: Tensor, bits: int, bucket: int, n: int) -> Tensor:
    out = torch.empty(n, dtype=torch.float32)
    _C.unpack_dequantize(out, packed, scales, bits, bucket, instruction_set())
    return out


def accumulate(
    out: Tensor,
    packed: Sequence[Tensor],
    scales: Sequence[Tensor],
    bits: Sequence[int],
    bucket: int,
    weights: Sequence[float],
) -> None:
    _C.accumulate(out, list(packed), list(scales), list(bits), bucket, list(weights), instruction_set())
