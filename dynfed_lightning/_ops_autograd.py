"""Derivatives of the operations that have one: `rotate`, which is linear, and `unpack_dequantize`, linear in its scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._ops_register import OPERATORS as _OPS


def wanted(x: Tensor) -> bool:
    """Whether a derivative with respect to `x` may be asked for later."""
    if x.requires_grad and torch.is_grad_enabled():
        return True
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def rotate(x: Tensor, table: Tensor, block: int, seed: int, inverse: bool) -> Tensor:
    """The rotation of `x`, with derivatives."""
    function = _Rotate if torch.compiler.is_compiling() else _RotateForward
    return function.apply(x, table, block, seed, inverse)


def unpack_dequantize(packed: Tensor, scales: Tensor, bits: int, bucket: int, n: int) -> Tensor:
    """The values, with derivatives to the scales."""
    function = _Dequantize if torch.compiler.is_compiling() else _DequantizeForward
    return function.apply(packed, scales, bits, bucket, n)


class _Rotate(torch.autograd.Function):
    """``y = R x`` with R orthogonal, so the gradient to x is the inverse rotation of the gradient to y."""

    @staticmethod
    def forward(x: Tensor, table: Tensor, block: int, seed: int, inverse: bool) -> Tensor:
        y = x.detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        _OPS.rotate_(y, table, block, seed, inverse)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.table, ctx.block, ctx.seed, ctx.inverse = inputs
        ctx.dtype = x.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        back = rotate(grad, ctx.table, ctx.block, ctx.seed, not ctx.inverse)
        return back.to(ctx.dtype), None, None, None, None


class _Dequantize(torch.autograd.Function):
    """``y = level * scale``: the gradient to a bucket's scale is the sum of level times gradient over the bucket."""

    @staticmethod
    def forward(packed: Tensor, scales: Tensor, bits: int, bucket: int, n: int) -> Tensor:
        return _OPS.unpack_dequantize(packed, scales.detach(), bits, bucket, n)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        packed, scales, ctx.bits, ctx.bucket, ctx.n = inputs
        ctx.save_for_backward(packed)
        ctx.save_for_forward(packed)
        ctx.shape = scales.shape

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (packed,) = grads, ctx.saved_tensors
        ones = torch.ones(ctx.shape, dtype=torch.float32, device=packed.device)
        products = grad * _OPS.unpack_dequantize(packed, ones, ctx.bits, ctx.bucket, ctx.n)
        width = min(ctx.bucket, max(ctx.n, 1))  # a bucket may be far larger than the vector
        sums = torch.nn.functional.pad(products, (0, -ctx.n % width)).view(-1, width).sum(dim=1)
        return None, sums.view(ctx.shape), None, None, None


# Forward derivatives in classes of their own: torch.compile refuses a function that has them.


class _RotateForward(_Rotate):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return rotate(tangents[0], ctx.table, ctx.block, ctx.seed, ctx.inverse)


class _DequantizeForward(_Dequantize):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (packed,) = ctx.saved_tensors
        return unpack_dequantize(packed, tangents[1], ctx.bits, ctx.bucket, ctx.n)
