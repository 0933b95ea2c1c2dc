"""Derivatives of the soft quantiser, once, to the values and to the centres."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from ._soft_register import OPERATORS as _OPS


def soft_quantize(x: list[Tensor], centers: Tensor, sizes: list[int], sharpness: Tensor) -> list[Tensor]:
    """The soft-quantised values, with derivatives; arguments as the operator's."""
    return list(_SoftQuantize.apply(sharpness, sizes, centers, *x))


class _SoftQuantize(torch.autograd.Function):
    """The backward pass keeps nothing but the arguments: to compute a sigmoid anew is faster than to read it."""

    @staticmethod
    def forward(sharpness: Tensor, sizes: list[int], centers: Tensor, *x: Tensor) -> tuple[Tensor, ...]:
        return tuple(_OPS.soft_quantize([t.detach() for t in x], centers.detach(), sizes, sharpness))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        sharpness, ctx.sizes, centers, *x = inputs
        ctx.save_for_backward(sharpness, centers, *x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sharpness, centers, *x = ctx.saved_tensors
        want_centers, *want_x = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            found = _Once.apply(sharpness, ctx.sizes, any(want_x), want_centers, len(x), centers, *grads, *x)
            dx, dcenters = list(found[1:]), found[0]
        else:
            dx, dcenters = _OPS.soft_quantize_backward(
                list(grads), x, centers, ctx.sizes, sharpness, any(want_x), want_centers
            )
        each = [d if want else None for d, want in zip(dx, want_x, strict=True)] if dx else [None] * len(x)
        return (None, None, dcenters if want_centers else None, *each)


class _Once(torch.autograd.Function):
    """The first derivatives, which have none themselves."""

    @staticmethod
    def forward(
        sharpness: Tensor, sizes: list[int], want_x: bool, want_centers: bool, count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        centers, *others = (t.detach() for t in tensors)
        grads, x = others[:count], others[count:]
        dx, dcenters = _OPS.soft_quantize_backward(grads, x, centers, sizes, sharpness, want_x, want_centers)
        return (dcenters, *dx)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError("Expected `soft_quantize` to be differentiated once, but got a second derivative of it.")
