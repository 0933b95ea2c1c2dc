"""Send floats in half precision."""

from __future__ import annotations

import torch
from torch import Tensor

from dynfed_lightning.errors import MalformedPayloadError
from dynfed_lightning.stages.base import CodecContext, Meta, Part, Stage, Table

_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


class Cast(Stage):
    """Round wider floats to `dtype`, to the nearest. Tensors marked raw, integers and floats no wider than `dtype` pass.

    A value beyond the range of `dtype` becomes infinite, which `Codec.encode` refuses with `NonFiniteError`.

    Args:
        dtype: ``torch.float16`` or ``torch.bfloat16``.

    Raises:
        ValueError: another dtype.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        if dtype not in _NAMES:
            raise ValueError(f"Expected `dtype` to be torch.float16 or torch.bfloat16, but got {dtype}.")
        self.dtype = dtype

    @property
    def wire_name(self) -> str:
        return f"cast({_NAMES[self.dtype]})"

    def encode(self, table: Table, ctx: CodecContext) -> tuple[Table, Meta]:
        parts = self.layout(table.parts, None)
        tensors = [t.to(p.dtype) for p, t in zip(parts, table.tensors, strict=True)]
        return Table(parts, tensors), None

    def layout(self, parts: tuple[Part, ...], meta: Meta) -> tuple[Part, ...]:
        if meta is not None:
            raise MalformedPayloadError(f"Expected no index for a cast, but got {meta!a:.80}.")
        return tuple(p._replace(dtype=self.dtype) if self._applies(p) else p for p in parts)

    def decode(self, inner: Table, parts: tuple[Part, ...], meta: Meta) -> list[Tensor]:
        return [t.to(p.dtype) for p, t in zip(parts, inner.tensors, strict=True)]

    def _applies(self, part: Part) -> bool:
        return part.compressible and part.dtype.itemsize > self.dtype.itemsize
