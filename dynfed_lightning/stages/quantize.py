"""Quantise to 1..8 bits with one scale per bucket."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dynfed_lightning import ops
from dynfed_lightning.bits import BitPolicy, FixedBits, as_bit_policy, check_bits
from dynfed_lightning.errors import MalformedPayloadError
from dynfed_lightning.schema import TensorSpec
from dynfed_lightning.stages.base import CodecContext, Meta, Part, Stage, Table

_RUNS = re.compile(r"(?:[a-h-](?:[1-9][0-9]{0,8})?)*")
_RUN = re.compile(r"([a-h-])([0-9]*)")
_LETTERS = "-abcdefgh"


class Quantize(Stage):
    """QSGD's stochastic quantiser (DynFed eq. 3; Alistarh et al., NeurIPS 2017) with the absolute maximum of a bucket as scale.

    Every tensor starts its own buckets, so small ones neither share a scale with another layer nor pay for a whole bucket. A
    tensor whose codes and scales would take as many bytes as the tensor itself stays as it is: both sides see that from its
    shape. Tensors marked raw and integers pass.

    Args:
        bits: 1 to 8, a `BitPolicy`, or None for no quantisation.
        bucket: how many values share a scale; a positive multiple of 8.
        rounding: ``"stochastic"`` (unbiased for 2 bits and more), ``"nearest"``, or ``"eden"``, which is meant for what `Rotate`
            has rotated: there of small error and nearly unbiased (`dynfed_lightning.ops`); `bucket` at most 65536 with it.

    Raises:
        ValueError: an argument outside what is said above.
    """

    def __init__(self, bits: int | BitPolicy | None, bucket: int = 512, rounding: str = "stochastic") -> None:
        self.policy = as_bit_policy(bits)
        if isinstance(bucket, bool) or not isinstance(bucket, int) or not 8 <= bucket <= 2**30 or bucket % 8:
            raise ValueError(f"Expected `bucket` to be a positive multiple of 8, but got {bucket!r}.")
        if rounding not in ops.ROUNDINGS:
            raise ValueError(f"Expected `rounding` to be one of {', '.join(ops.ROUNDINGS)}, but got {rounding!r}.")
        if rounding == "eden" and bucket > 65536:
            raise ValueError(f"Expected `bucket` to be at most 65536 with rounding 'eden', but got {bucket}.")
        self.bucket = bucket
        self.rounding = rounding
        self.lossless = isinstance(self.policy, FixedBits) and self.policy.bits is None

    @property
    def wire_name(self) -> str:
        return f"quantize({self.bucket})"

    def encode(self, table: Table, ctx: CodecContext) -> tuple[Table, Meta]:
        specs = _candidates(table.parts)
        runs = to_runs([check_bits(self.policy(s, ctx), f"bits of {s.name}") for s in specs])
        plan = _plan(table.parts, runs, self.bucket)
        tensors = list(table.tensors)
        chosen = [i for i, bits in enumerate(plan.bits) if bits is not None]
        if not chosen:
            return Table(plan.rows, tensors), runs
        x = [tensors[i].float() if tensors[i].dtype == torch.float64 else tensors[i] for i in chosen]
        packed, scales = ops.quantize_pack_table(x, plan.table, ctx.seed, self.rounding)
        codes = iter(packed.split(plan.num_bytes))
        scale = iter(scales.split(plan.num_scales))
        rows: list[Tensor] = []
        for tensor, bits in zip(tensors, plan.bits, strict=True):
            rows += [tensor] if bits is None else [next(codes), next(scale)]
        return Table(plan.rows, rows), runs

    def layout(self, parts: tuple[Part, ...], meta: Meta) -> tuple[Part, ...]:
        return _plan(parts, _text(meta), self.bucket).rows

    def check(self, inner: Table, parts: tuple[Part, ...], meta: Meta) -> None:
        rest = iter(inner.tensors)
        for part, bits in zip(parts, self.bits(parts, meta), strict=True):
            codes = next(rest)
            if bits is not None:
                next(rest)
                used = part.numel * bits % 8
                if used and int(codes[-1]) >> used:
                    raise MalformedPayloadError(f"Expected unused bits after the codes of {part.name!r} to be 0.")

    def decode(self, inner: Table, parts: tuple[Part, ...], meta: Meta) -> list[Tensor]:
        plan = _plan(parts, _text(meta), self.bucket)
        rest = iter(inner.tensors)
        out: list[Tensor] = []
        codes: list[Tensor] = []
        scales: list[Tensor] = []
        for part, bits in zip(parts, plan.bits, strict=True):
            if bits is None:
                out.append(next(rest))
            else:
                codes.append(next(rest))
                scales.append(next(rest))
                out.append(torch.empty(part.shape, dtype=torch.float32, device=codes[0].device))
        if not codes:
            return out
        arena, all_scales = torch.cat(codes), torch.cat(scales)
        values = [t for t, bits in zip(out, plan.bits, strict=True) if bits is not None]
        ops.unpack_dequantize_table(arena, all_scales, plan.table, out=values)
        largest = float(all_scales.max())
        for i, (part, bits) in enumerate(zip(parts, plan.bits, strict=True)):
            if bits is None:
                continue
            limit = torch.finfo(part.dtype).max
            if largest > limit / 256:
                # The largest value may round to just above what the dtype holds: saturate instead of decoding to infinity.
                out[i].clamp_(-limit, limit)
            out[i] = out[i].to(part.dtype)
        return out

    def steps(
        self, steps: Sequence[Tensor | None], inner: Table, parts: tuple[Part, ...], meta: Meta
    ) -> list[Tensor | None]:
        rest = iter(inner.tensors)
        out: list[Tensor | None] = []
        for part, bits in zip(parts, self.bits(parts, meta), strict=True):
            next(rest)
            if bits is None:
                out.append(None)
                continue
            # With one bit the levels are -s and s, twice a scale apart.
            scales = (next(rest) * (2.0 if bits == 1 else 1.0)).clamp(max=torch.finfo(torch.float32).max)
            width = min(self.bucket, max(part.numel, 1))  # a bucket may be far larger than the tensor
            out.append(scales.repeat_interleave(width)[: part.numel].reshape(part.shape))
        return out

    def bits(self, parts: tuple[Part, ...], meta: Meta) -> Sequence[int | None]:
        return _plan(parts, _text(meta), self.bucket).bits


class _Plan(NamedTuple):
    """What becomes of each part: its bits (None: it stays), the rows that result, and the table of those that are quantised."""

    bits: tuple[int | None, ...]
    rows: tuple[Part, ...]
    table: ops.Layout
    num_bytes: list[int]  # of each quantised tensor's codes
    num_scales: list[int]


@lru_cache(maxsize=64)
def _candidates(parts: tuple[Part, ...]) -> tuple[TensorSpec, ...]:
    """The parts that a policy gives bits to, under the names of the tensors they came from."""
    return tuple(TensorSpec(p.origin, p.shape, p.dtype) for p in parts if p.compressible)


@lru_cache(maxsize=64)
def _plan(parts: tuple[Part, ...], runs: str, bucket: int) -> _Plan:
    # Cached, since a round encodes and decodes the same few tables again and again.
    widths = iter(from_runs(runs, sum(p.compressible for p in parts)))
    bits: list[int | None] = []
    rows: list[Part] = []
    quantised: list[tuple[int, int, int]] = []
    offset = 0  # the count of elements before the tensor, rounded up to 8 at each
    for part in parts:
        width = next(widths) if part.compressible else None
        if width is not None:
            packed, buckets = ops.packed_size(part.numel, width), ops.num_buckets(part.numel, bucket)
            if packed + 4 * buckets < part.num_bytes:
                rows.append(part.child("codes", (packed,), torch.uint8, True, "codes"))
                rows.append(part.child("scales", (buckets,), torch.float32, True, "scales"))
                quantised.append((part.numel, width, offset))
            else:
                width = None
        if width is None:
            rows.append(part)
        bits.append(width)
        offset = -8 * (-(offset + part.numel) // 8)
    sizes, some, offsets = ([q[i] for q in quantised] for i in range(3))
    table = ops.Layout(sizes, some, bucket, offsets=offsets)
    num_bytes = [ops.packed_size(n, b) for n, b in zip(sizes, some, strict=True)]
    num_scales = [ops.num_buckets(n, bucket) for n in sizes]
    return _Plan(tuple(bits), tuple(rows), table, num_bytes, num_scales)


def _text(meta: Meta) -> str:
    if not isinstance(meta, str):
        raise MalformedPayloadError(f"Expected bits as run-length text, but got {meta!a:.80}.")
    return meta


def to_runs(widths: Iterable[int | None]) -> str:
    """Bits of consecutive tensors as letters (``a`` is 1, ``h`` is 8, ``-`` is None) with the run's length unless it is 1.

    Example:
        >>> to_runs([4, 4, 4, 8, None, None])
        'd3h-2'
    """
    out: list[str] = []
    last, count = "", 0
    for letter in [*(_LETTERS[b or 0] for b in widths), ""]:
        if letter != last:
            out.append(last + (str(count) if count > 1 else ""))
            last, count = letter, 0
        count += 1
    return "".join(out)


def parse_runs(meta: Meta) -> list[tuple[int | None, int]]:
    """Runs of (bits, number of tensors) from their text, whose length bounds the work.

    Raises:
        MalformedPayloadError: not such a text.
    """
    if not _RUNS.fullmatch(meta := _text(meta)):
        raise MalformedPayloadError(f"Expected bits as run-length text, but got {meta!a:.80}.")
    return [(_LETTERS.index(letter) or None, int(digits or 1)) for letter, digits in _RUN.findall(meta)]


def from_runs(meta: Meta, expected: int) -> list[int | None]:
    """Undo `to_runs`, for exactly `expected` tensors.

    Raises:
        MalformedPayloadError: not such a text, another number of tensors, or not its shortest form.
    """
    runs = parse_runs(meta)
    total = sum(count for _, count in runs)
    if total != expected:
        raise MalformedPayloadError(f"Expected bits for {expected} tensors, but got bits for {total}.")
    widths = [bits for bits, count in runs for _ in range(count)]
    if to_runs(widths) != meta:
        raise MalformedPayloadError(f"Expected bits in their shortest form, but got {meta!a:.80}.")
    return widths
