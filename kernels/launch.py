"""Launching a kernel: on the tensors' device, on torch's current stream, and never for nothing."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, programs: int, on: Tensor, *args: Any, num_warps: int = 4, maxnreg: int | None = None) -> None:
    """Run `programs` programs of `kernel` on the device of `on`.

    Four warps unless the caller says otherwise: at 32 values a thread, a tile of 4096.
    """
    if not programs:
        return
    device = torch.cuda.device(on.device) if on.is_cuda else nullcontext()
    with device:
        kernel[(programs,)](*args, num_warps=num_warps, maxnreg=maxnreg, enable_fp_fusion=False)


def capturing(on: Tensor) -> bool:
    """Whether a CUDA graph is being captured, so that nothing may wait for the device."""
    return on.is_cuda and torch.cuda.is_current_stream_capturing()


def halves(number: int) -> tuple[int, int]:
    """A 64-bit integer as two signed 32-bit halves, low and high.

    A kernel's argument must not change its type with its value: each type is compiled for itself. (And the interpreter of
    Triton 3.6 to 3.9 computes modulo 2**32 with integers from 2**31 to 2**32 - 1.)
    """
    number &= (1 << 64) - 1
    low, high = number & 0xFFFFFFFF, number >> 32
    return low - (low >> 31 << 32), high - (high >> 31 << 32)
