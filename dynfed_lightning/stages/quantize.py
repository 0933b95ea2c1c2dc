"""Quantise to 1..8 bits with one scale per bucket."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

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
        rounding: ``"stochastic"`` (unbiased for 2 bits and more) or ``"nearest"``.

    Raises:
        ValueError: an argument outside what is said above.
    """

    def __init__(self, bits: int | BitPolicy | None, bucket: int = 512, rounding: str = "stochastic") -> None:
        self.policy = as_bit_policy(bits)
        if isinstance(bucket, bool) or not isinstance(bucket, int) or not 8 <= bucket <= 2**30 or bucket % 8:
            raise ValueError(f"Expected `bucket` to be a positive multiple of 8, but got {bucket!r}.")
        if rounding not in ("stochastic", "nearest"):
            raise ValueError(f"Expected `rounding` to be 'stochastic' or 'nearest', but got {rounding!r}.")
        self.bucket = bucket
        self.rounding = rounding
        self.lossless = isinstance(self.policy, FixedBits) and self.policy.bits is None

    @property
    def wire_name(self) -> str:
        return f"quantize({self.bucket})"

    def encode(self, table: Table, ctx: CodecContext) -> tuple[Table, Meta]:
        widths: list[int | None] = []
        parts: list[Part] = []
        tensors: list[Tensor] = []
        offset = (
            0  # of the tensor's first random number: the count of elements before it, rounded up to 8 at each tensor
        )
        for part, tensor in zip(table.parts, table.tensors, strict=True):
            bits = None
            if part.compressible:
                spec = TensorSpec(part.origin, part.shape, part.dtype)
                bits = check_bits(self.policy(spec, ctx), f"bits of {part.origin}")
                widths.append(bits)
            if bits is not None and self._pays(part, bits):
                flat = tensor.reshape(-1).contiguous()
                flat = flat.float() if flat.dtype == torch.float64 else flat
                parts += self._rows(part, bits)
                tensors += ops.quantize_pack(flat, bits, self.bucket, ctx.seed, offset, self.rounding)
            else:
                parts.append(part)
                tensors.append(tensor)
            offset = -8 * (-(offset + part.numel) // 8)
        return Table(parts, tensors), to_runs(widths)

    def layout(self, parts: Sequence[Part], meta: Meta) -> list[Part]:
        rows: list[Part] = []
        for part, bits in zip(parts, self._widths(parts, meta), strict=True):
            rows += [part] if bits is None else self._rows(part, bits)
        return rows

    def check(self, inner: Table, parts: Sequence[Part], meta: Meta) -> None:
        rest = iter(inner.tensors)
        for part, bits in zip(parts, self._widths(parts, meta), strict=True):
            codes = next(rest)
            if bits is not None:
                next(rest)
                used = part.numel * bits % 8
                if used and int(codes[-1]) >> used:
                    raise MalformedPayloadError(f"Expected unused bits after the codes of {part.name!r} to be 0.")

    def decode(self, inner: Table, parts: Sequence[Part], meta: Meta) -> list[Tensor]:
        rest = iter(inner.tensors)
        out: list[Tensor] = []
        for part, bits in zip(parts, self._widths(parts, meta), strict=True):
            codes = next(rest)
            if bits is None:
                out.append(codes)
                continue
            values = ops.unpack_dequantize(codes, scales := next(rest), bits, self.bucket, part.numel)
            limit = torch.finfo(part.dtype).max
            if not _below(scales, limit / 2**bits):
                # The largest value may round to just above what the dtype holds: saturate instead of decoding to infinity.
                values = values.clamp_(-limit, limit)
            out.append(values.to(part.dtype).reshape(part.shape))
        return out

    def steps(
        self, steps: Sequence[Tensor | None], inner: Table, parts: Sequence[Part], meta: Meta
    ) -> list[Tensor | None]:
        rest = iter(inner.tensors)
        out: list[Tensor | None] = []
        for part, bits in zip(parts, self._widths(parts, meta), strict=True):
            next(rest)
            if bits is None:
                out.append(None)
                continue
            # With one bit the levels are -s and s, twice a scale apart.
            scales = next(rest) * (2.0 if bits == 1 else 1.0)
            out.append(scales.repeat_interleave(self.bucket)[: part.numel].reshape(part.shape))
        return out

    def bits(self, parts: Sequence[Part], meta: Meta) -> list[int | None]:
        return self._widths(parts, meta)

    def _pays(self, part: Part, bits: int) -> bool:
        return _packed_bytes(part.numel, bits) + 4 * self._buckets(part) < part.num_bytes

    def _buckets(self, part: Part) -> int:
        return -(-part.numel // self.bucket)

    def _rows(self, part: Part, bits: int) -> list[Part]:
        codes = part.child("codes", (_packed_bytes(part.numel, bits),), torch.uint8, True, "codes")
        return [codes, part.child("scales", (self._buckets(part),), torch.float32, True, "scales")]

    def _widths(self, parts: Sequence[Part], meta: Meta) -> list[int | None]:
        """The bits that each of `parts` really has: None where it is not quantised for whatever reason."""
        candidates = [p for p in parts if p.compressible]
        widths = iter(from_runs(meta, len(candidates)))
        out: list[int | None] = []
        for part in parts:
            bits = next(widths) if part.compressible else None
            out.append(bits if bits is not None and self._pays(part, bits) else None)
        return out


def _packed_bytes(n: int, bits: int) -> int:
    return (n * bits + 7) // 8


def _below(scales: Tensor, limit: float) -> bool:
    return float(scales.max()) < limit


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
    if not isinstance(meta, str) or not _RUNS.fullmatch(meta):
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
