"""Gradients of the operations that have one: `rotate`, which is linear, and `unpack_dequantize`, linear in its scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._ops_register import OPERATORS as _OPS


def wanted(x: Tensor) -> bool:
    """Whether a gradient to `x` may be asked for later."""
    return x.requires_grad and torch.is_grad_enabled()


class Rotate(torch.autograd.Function):
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
        back = Rotate.apply(grad, ctx.table, ctx.block, ctx.seed, not ctx.inverse)
        return back.to(ctx.dtype), None, None, None, None


class Dequantize(torch.autograd.Function):
    """``y = level * scale``: the gradient to a bucket's scale is the sum of level times gradient over the bucket."""

    @staticmethod
    def forward(packed: Tensor, scales: Tensor, bits: int, bucket: int, n: int) -> Tensor:
        return _OPS.unpack_dequantize(packed, scales.detach(), bits, bucket, n)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        packed, scales, ctx.bits, ctx.bucket, ctx.n = inputs
        ctx.save_for_backward(packed)
        ctx.shape = scales.shape

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (packed,) = grads, ctx.saved_tensors
        ones = torch.ones(ctx.shape, dtype=torch.float32, device=packed.device)
        products = grad * _OPS.unpack_dequantize(packed, ones, ctx.bits, ctx.bucket, ctx.n)
        padded = torch.nn.functional.pad(products, (0, -ctx.n % ctx.bucket))
        return None, padded.view(-1, ctx.bucket).sum(dim=1).view(ctx.shape), None, None, None
