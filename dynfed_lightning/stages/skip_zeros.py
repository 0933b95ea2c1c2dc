"""Leave out tensors of zeros."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from dynfed_lightning.errors import MalformedPayloadError
from dynfed_lightning.stages.base import CodecContext, Meta, Part, Stage, Table


class SkipZeros(Stage):
    """Tensors of zeros travel as one character each: classes without a prototype cost nothing else. Lossless.

    The index says of every tensor whether it travels, ``"1"``, or is all zeros, ``"0"``.
    """

    lossless = True

    @property
    def wire_name(self) -> str:
        return "skipzeros"

    def encode(self, table: Table, ctx: CodecContext) -> tuple[Table, Meta]:
        sent = "".join("1" if _has_bits(t) else "0" for t in table.tensors)
        tensors = [t for t, flag in zip(table.tensors, sent, strict=True) if flag == "1"]
        return Table(self.layout(table.parts, sent), tensors), sent

    def layout(self, parts: tuple[Part, ...], meta: Meta) -> tuple[Part, ...]:
        if not isinstance(meta, str) or len(meta) != len(parts) or not re.fullmatch("[01]*", meta):
            raise MalformedPayloadError(f"Expected a 0 or 1 for each of {len(parts)} tensors, but got {meta!a:.80}.")
        return tuple(p for p, flag in zip(parts, meta, strict=True) if flag == "1")

    def decode(self, inner: Table, parts: tuple[Part, ...], meta: Meta) -> list[Tensor]:
        rest = iter(inner.tensors)
        return [
            next(rest) if flag == "1" else torch.zeros(p.shape, dtype=p.dtype)
            for p, flag in zip(parts, str(meta), strict=True)
        ]

    def steps(
        self, steps: Sequence[Tensor | None], inner: Table, parts: tuple[Part, ...], meta: Meta
    ) -> list[Tensor | None]:
        rest = iter(steps)
        return [next(rest) if flag == "1" else None for flag in str(meta)]


def _has_bits(t: Tensor) -> bool:
    """Whether any bit is set; a negative zero has one."""
    return bool(t.any()) or (t.is_floating_point() and bool(torch.signbit(t).any()))
