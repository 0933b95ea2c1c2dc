"""Send only the largest entries."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dynfed_lightning.errors import MalformedPayloadError
from dynfed_lightning.schedules import Schedule
from dynfed_lightning.stages.base import CodecContext, Meta, Part, Stage, Table

# Bits of a float as an integer of its own width, and the mask that drops the sign: non-negative floats order as their bits do.
_BITS: dict[torch.dtype, tuple[torch.dtype, int]] = {
    torch.float64: (torch.int64, 0x7FFF_FFFF_FFFF_FFFF),
    torch.float32: (torch.int32, 0x7FFF_FFFF),
    torch.float16: (torch.int16, 0x7FFF),
    torch.bfloat16: (torch.int16, 0x7FFF),
}


class TopK(Stage):
    """Keep each tensor's `k` entries of largest magnitude; the others decode to 0 (Aji & Heafield, EMNLP 2017).

    Of entries with equal magnitude those with the lower index are kept. The values can be compressed further by the stages
    that follow; the indices (int32) are raw. A tensor for which values and indices would take as many bytes as the tensor
    itself stays whole. Tensors marked raw and integers pass. Use it within `ErrorFeedback`: what is dropped is lost otherwise.

    Args:
        fraction: share of each tensor's entries to keep, above 0 and at most 1, or a `Schedule` of it; at least one entry.
        k: instead of `fraction`, how many entries to keep; a smaller tensor stays whole.

    Raises:
        ValueError: neither or both of `fraction` and `k`, or one out of range.
    """

    def __init__(self, fraction: float | Schedule | None = None, k: int | None = None) -> None:
        if (fraction is None) == (k is None):
            raise ValueError(f"Expected one of `fraction` and `k`, but got fraction={fraction!r}, k={k!r}.")
        if fraction is not None and not callable(fraction) and not _is_fraction(fraction):
            raise ValueError(
                f"Expected `fraction` to be above 0 and at most 1 (give `k=` for a number), but got {fraction!r}."
            )
        if k is not None and (type(k) is not int or not 1 <= k < 2**48):
            raise ValueError(f"Expected `k` to be a positive integer, but got {k!r}.")
        self.fraction = fraction
        self.k = k

    @property
    def wire_name(self) -> str:
        return "topk"

    def check_rounds(self, num_rounds: int | None) -> None:
        for t in {0, (num_rounds or 1) - 1} if self.k is None else ():
            self._fraction(t, num_rounds)

    def encode(self, table: Table, ctx: CodecContext) -> tuple[Table, Meta]:
        meta: Meta = self.k if self.k is not None else self._fraction(ctx.round, ctx.num_rounds)
        parts: list[Part] = []
        tensors: list[Tensor] = []
        for part, tensor in zip(table.parts, table.tensors, strict=True):
            k = _kept(part, meta)
            if k is None:
                parts.append(part)
                tensors.append(tensor)
                continue
            flat = tensor.reshape(-1)
            indices = _largest(flat, k)
            parts += _rows(part, k)
            tensors += [flat[indices], indices.to(_index_dtype(part.numel))]
        return Table(tuple(parts), tensors), meta

    def layout(self, parts: tuple[Part, ...], meta: Meta) -> tuple[Part, ...]:
        if not (type(meta) is int and 1 <= meta < 2**48) and not (type(meta) is float and _is_fraction(meta)):
            raise MalformedPayloadError(f"Expected a count or a share of entries, but got {meta!a:.80}.")
        rows: list[Part] = []
        for part in parts:
            k = _kept(part, meta)
            rows += [part] if k is None else _rows(part, k)
        return tuple(rows)

    def check(self, inner: Table, parts: tuple[Part, ...], meta: Meta) -> None:
        rest = iter(inner.tensors)
        for part in parts:
            next(rest)
            if _kept(part, meta) is not None:
                indices = next(rest)
                ascending = bool((indices[1:] > indices[:-1]).all())
                if not ascending or int(indices[0]) < 0 or int(indices[-1]) >= part.numel:
                    raise MalformedPayloadError(
                        f"Expected the indices of {part.name!r} to ascend from 0 to at most {part.numel - 1}."
                    )

    def decode(self, inner: Table, parts: tuple[Part, ...], meta: Meta) -> list[Tensor]:
        rest = iter(inner.tensors)
        out: list[Tensor] = []
        for part in parts:
            values = next(rest)
            k = _kept(part, meta)
            out.append(values if k is None else _scatter(part, values, next(rest)))
        return out

    def steps(
        self, steps: Sequence[Tensor | None], inner: Table, parts: tuple[Part, ...], meta: Meta
    ) -> list[Tensor | None]:
        rest = iter(zip(steps, inner.tensors, strict=True))
        out: list[Tensor | None] = []
        for part in parts:
            step, _ = next(rest)
            if _kept(part, meta) is not None:
                _, indices = next(rest)
                step = None if step is None else _scatter(part, step, indices)
            out.append(step)
        return out

    def _fraction(self, round: int, num_rounds: int | None) -> float:
        value = self.fraction(round, num_rounds) if callable(self.fraction) else self.fraction
        if not _is_fraction(value):
            raise ValueError(f"Expected `fraction` to be above 0 and at most 1 in round {round}, but got {value!r}.")
        return float(value)  # type: ignore[arg-type]


def _is_fraction(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1


def _kept(part: Part, meta: Meta) -> int | None:
    """How many entries of `part` travel; None: all of them, without indices."""
    if not part.compressible or part.numel == 0:
        return None
    assert isinstance(meta, (int, float))
    k = meta if isinstance(meta, int) else max(1, math.floor(meta * part.numel + 0.5))
    return k if k * (part.dtype.itemsize + _index_dtype(part.numel).itemsize) < part.num_bytes else None


def _rows(part: Part, k: int) -> list[Part]:
    index = _index_dtype(part.numel)
    arena = "indices" if index == torch.int32 else "indices64"
    return [part.child("values", (k,), part.dtype, False), part.child("indices", (k,), index, True, arena)]


def _index_dtype(n: int) -> torch.dtype:
    return torch.int32 if n < 2**31 else torch.int64


def _largest(flat: Tensor, k: int) -> Tensor:
    """Ascending indices of the `k` largest magnitudes, ties to the lower index. NaN counts as the largest of all."""
    dtype, mask = _BITS[flat.dtype]
    magnitude = flat.contiguous().view(dtype) & mask
    if magnitude.device.type == "cpu":
        kth = int(np.partition(magnitude.numpy(), flat.numel() - k)[-k])
    else:
        kth = int(magnitude.topk(k, sorted=False).values.min())
    above = (magnitude > kth).nonzero()[:, 0]
    ties = (magnitude == kth).nonzero()[: k - above.numel(), 0]
    return torch.cat([above, ties]).sort().values


def _scatter(part: Part, values: Tensor, indices: Tensor) -> Tensor:
    out = torch.zeros(part.numel, dtype=values.dtype, device=values.device)
    out[indices.long()] = values
    return out.reshape(part.shape)
