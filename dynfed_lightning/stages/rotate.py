"""Rotate before quantising, so that every vector looks normally distributed to the quantiser."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from dynfed_lightning import ops
from dynfed_lightning.errors import MalformedPayloadError
from dynfed_lightning.stages.base import CodecContext, Meta, Part, Stage, Table

SMALLEST = 16  # values: rotating fewer does not make them look normal
_MAX = torch.finfo(torch.float32).max
_SMALL = 2.0**-20  # below 1 / (8192 * sqrt(8192)); a power of two


class Rotate(Stage):
    """A seeded, blockwise randomised Hadamard transform, undone at the receiver (DRIVE, Vargaftik et al., NeurIPS 2021; EDEN,
    Vargaftik et al., ICML 2022).

    Meant for ``Codec(Rotate(), Quantize(bits, rounding="eden"))``. From 2 bits on the error is several times smaller than that of
    stochastic rounding. (With one bit, that of a single message is larger than that of sign and mean magnitude, but it averages
    out.) The estimate is nearly unbiased where many values of a block matter, and biased where a handful carries it: such
    sparse vectors are better served by `TopK`. The price is the transform's time on both sides. Tensors of fewer than 16
    values, integers and tensors marked raw pass. What is rotated travels as float32 unless a later stage quantises it.

    Args:
        block: how many values are mixed: a power of two from 1 to 8192. Larger blocks spread outliers wider.

    Raises:
        ValueError: another block.
    """

    def __init__(self, block: int = 4096) -> None:
        if isinstance(block, bool) or not isinstance(block, int) or not 1 <= block <= 8192 or block & (block - 1):
            raise ValueError(f"Expected `block` to be a power of two from 1 to 8192, but got {block!r}.")
        self.block = block

    @property
    def wire_name(self) -> str:
        return f"rotate({self.block})"

    def encode(self, table: Table, ctx: CodecContext) -> tuple[Table, Meta]:
        layout, rows = _plan(table.parts)
        tensors = list(table.tensors)
        chosen = [i for i, part in enumerate(table.parts) if _applies(part)]
        if chosen:
            flat = torch.cat([tensors[i].reshape(-1).to(torch.float32) for i in chosen])
            ops.rotate(flat, self.block, ctx.seed, layout=layout, out=flat)
            for i, piece in zip(chosen, flat.split(list(layout.sizes)), strict=True):
                tensors[i] = piece
        return Table(rows, tensors), ctx.seed

    def layout(self, parts: tuple[Part, ...], meta: Meta) -> tuple[Part, ...]:
        _seed(meta)
        return _plan(parts)[1]

    def decode(self, inner: Table, parts: tuple[Part, ...], meta: Meta) -> list[Tensor]:
        layout, _ = _plan(parts)
        tensors = list(inner.tensors)
        chosen = [i for i, part in enumerate(parts) if _applies(part)]
        if chosen:
            flat = torch.cat([tensors[i].reshape(-1) for i in chosen])
            low, high = torch.aminmax(flat)
            # Sums of up to 8192 values, twice with a factor of 1 / sqrt(8192) between them, may overflow: then in smaller units.
            huge = max(-float(low), float(high)) > _MAX * _SMALL
            if huge:
                flat.mul_(_SMALL)
            ops.rotate(flat, self.block, _seed(meta), inverse=True, layout=layout, out=flat)
            if huge:
                flat.clamp_(-_MAX * _SMALL, _MAX * _SMALL).div_(_SMALL)
            for i, piece in zip(chosen, flat.split(list(layout.sizes)), strict=True):
                limit = torch.finfo(parts[i].dtype).max
                values = piece.clamp(-limit, limit) if limit < _MAX else piece
                # Memory of its own: whoever keeps one tensor must not keep them all.
                tensors[i] = values.to(parts[i].dtype, copy=True).view(parts[i].shape)
        return tensors

    def steps(
        self, steps: Sequence[Tensor | None], inner: Table, parts: tuple[Part, ...], meta: Meta
    ) -> list[Tensor | None]:
        """An orthogonal transform spreads the squared error of a block evenly over it: the root mean square of its steps."""
        return [
            None if step is None else self._spread(step.reshape(-1)).view(part.shape) if _applies(part) else step
            for step, part in zip(steps, parts, strict=True)
        ]

    def _spread(self, step: Tensor) -> Tensor:
        n = step.numel()
        size = min(self.block, 1 << (n.bit_length() - 1))
        largest = step.max().clamp_min(1e-30)  # squared, float32 would soon overflow or vanish
        squares = (step / largest).square_()
        whole = squares[: n // size * size].view(-1, size)
        whole.copy_(whole.mean(dim=1, keepdim=True).expand_as(whole))
        if n % size:
            squares[n - size :] = squares[n - size :].mean()
        return squares.sqrt_().mul_(largest)


def _applies(part: Part) -> bool:
    return part.compressible and part.numel >= SMALLEST


@lru_cache(maxsize=64)
def _plan(parts: tuple[Part, ...]) -> tuple[ops.Layout, tuple[Part, ...]]:
    """The table of what is rotated, in a flat vector; and the rows that result."""
    layout = ops.Layout([p.numel for p in parts if _applies(p)], 8)
    rows = tuple(p.child("rotated", (p.numel,), torch.float32, False) if _applies(p) else p for p in parts)
    return layout, rows


def _seed(meta: Meta) -> int:
    if type(meta) is not int or not 0 <= meta < 2**64:
        raise MalformedPayloadError(f"Expected a seed of 64 bits, but got {meta!a:.80}.")
    return meta
