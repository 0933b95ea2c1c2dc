"""Tensors to bytes and back: a chain of compression stages over the wire format.

Reading order: `Codec`, then `stages/base.py` (what a stage is), then `wire.py` (what the bytes are).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynfed_lightning import wire
from dynfed_lightning.errors import MalformedPayloadError, NonFiniteError, SchemaMismatchError
from dynfed_lightning.inspection import Inspection, TensorRow
from dynfed_lightning.schema import DTYPE_NAMES, Schema, TensorSpec
from dynfed_lightning.stages import ErrorFeedback, LowRank, Quantize, from_wire_name, low_rank
from dynfed_lightning.stages.base import (
    CodecContext,
    Part,
    Stage,
    Table,
    decode_chain,
    encode_chain,
    flatten,
    layout_chain,
    parts_of,
)
from dynfed_lightning.stages.quantize import parse_runs
from dynfed_lightning.tensors import Tensors

__all__ = ["Codec", "CodecContext", "Decoded", "Inspection", "Schema", "TensorSpec", "as_codec", "inspect"]

_NUMPY = {
    "F64": "<f8", "I64": "<i8", "F32": "<f4", "I32": "<i4", "F16": "<f2", "BF16": "<i2", "I16": "<i2", "U8": "u1",
    "I8": "i1", "BOOL": "?",
}  # fmt: skip


@dataclass
class Decoded:
    """What a receiver knows of a payload.

    Args:
        tensors: the decoded tensors, with the schema's names, shapes and dtypes, on the CPU.
        bits: per name the bit-width it was quantised to, None where it was not.
        ranks: per name the rank of the factors it was sent as, None where it was sent whole.
        energy: the share of every matrix's energy that the factors were to keep; None without such a stage.
    """

    tensors: Tensors
    bits: dict[str, int | None]
    ranks: dict[str, int | None] = field(default_factory=dict)
    energy: float | None = None
    _steps: Callable[[], Tensors] = field(default=dict, repr=False)

    def steps(self) -> Tensors:
        """The distance between the quantiser's neighbouring levels at every element: its scale (with one bit, twice that).

        Returns:
            float32, in the tensors' shapes, for the quantised tensors only; 0 for elements that did not travel.
        """
        return self._steps()


class Codec:
    """A chain of stages, and the bytes they end in. Without stages: the identity, to the bit.

    Args:
        stages: applied in this order by `encode`, undone in the opposite order by `decode`. A codec stands for its stages.
            A first ``ErrorFeedback()`` with no stages of its own wraps all that follow, as a list in a file needs it.

    Raises:
        TypeError: something that is not a stage.
        ValueError: `ErrorFeedback` that is not the first stage.

    Example:
        >>> codec = Codec(Quantize(bits=4))
        >>> update = {"w": torch.linspace(-1, 1, 1024), "b": torch.tensor([0.5])}
        >>> payload = codec.encode(update, CodecContext(seed=1))
        >>> schema = Schema.of(update)
        >>> decoded = codec.decode_full(payload, schema)
        >>> decoded.bits, decoded.tensors["b"].tolist()
        ({'w': 4, 'b': None}, [0.5])
    """

    def __init__(self, *stages: Any) -> None:
        self.stages: tuple[Stage, ...] = flatten(stages)
        first = self.stages[0] if self.stages else None
        if isinstance(first, ErrorFeedback) and not first.stages_inside:
            self.stages = (ErrorFeedback(*self.stages[1:]),)
        if any(isinstance(s, ErrorFeedback) for s in self.stages[1:]):
            raise ValueError("Expected `ErrorFeedback` to be the first stage, but it comes after another.")
        self._leaves = tuple(leaf for s in self.stages for leaf in s.leaves)
        self._chain = tuple(leaf.wire_name for leaf in self._leaves)

    @property
    def lossless(self) -> bool:
        """Whether decoding returns the very same bits, whatever the context."""
        return all(s.lossless for s in self.stages)

    def check_rounds(self, num_rounds: int | None) -> None:
        """Check, before any training, that the stages know what to do in the first and the last of so many rounds.

        Raises:
            ValueError: a schedule gives a value out of range, or needs to know how many rounds there are.
        """
        for leaf in self._leaves:
            leaf.check_rounds(num_rounds)

    @torch.no_grad()
    def encode(self, tensors: Tensors, ctx: CodecContext | None = None, schema: Schema | None = None) -> bytes:
        """Compress and serialise. The same tensors and context give the same bytes.

        Args:
            tensors: named tensors, any shapes and devices, of the schema's names, shapes and dtypes; finite.
            ctx: seed, round, instructions, and the sender's memory, which is updated only on success.
            schema: what the receiver expects, in particular which tensors are raw; by default ``Schema.of(tensors)``.

        Raises:
            NonFiniteError: a tensor holds NaN or infinity, or got it by a stage's conversion; the message names it.
            SchemaMismatchError: `tensors` are not what `schema` says.
            ValueError: a bit policy without what it needs, or with bits out of range.
        """
        ctx = CodecContext() if ctx is None else ctx
        schema = Schema.of(tensors) if schema is None else schema
        trial = replace(ctx, state=dict(ctx.state))
        table, metas = encode_chain(self.stages, Table(parts_of(schema), _in_order(tensors, schema)), trial)
        payload = wire.write(schema.hash, self._chain, metas, _gather(table))
        try:
            wire.check_values(payload, wire.read(payload, _header_limit(schema), verify=False))
        except NonFiniteError:
            raise NonFiniteError(_name_culprit(tensors, table)) from None
        ctx.state.update(trial.state)
        return payload

    def decode(self, payload: bytes, schema: Schema) -> Tensors:
        """The tensors of a payload, on the CPU; they own their memory. See `decode_full`."""
        return self.decode_full(payload, schema).tensors

    @torch.no_grad()
    def decode_full(self, payload: bytes, schema: Schema) -> Decoded:
        """Check a payload, and undo the stages. Nothing is allocated for it before its structure has proved sound.

        Args:
            payload: bytes from anywhere.
            schema: what was agreed with the sender.

        Raises:
            SchemaMismatchError: encoded for another schema.
            MalformedPayloadError: encoded by another chain of stages, or not a sound payload.
            PayloadError: every other reason; the subclass says which.
        """
        blob = wire.read(payload, _header_limit(schema))
        _expect_schema(blob, schema)
        if blob.chain != self._chain:
            raise MalformedPayloadError(
                f"Expected a payload of the chain {'|'.join(self._chain)!r}, but got {'|'.join(blob.chain)!r}."
            )
        layers = layout_chain(self._leaves, parts_of(schema), blob.metas)
        starts = _places(layers[-1], blob)
        wire.check_values(payload, blob)
        received = _receive(payload, blob, layers[-1], starts)
        tensors, inners = decode_chain(self._leaves, layers, received, blob.metas)

        def steps() -> Tensors:
            carried: list[Tensor | None] = [None] * len(layers[-1])
            for stage, inner, parts, meta in reversed(
                list(zip(self._leaves, inners, layers[:-1], blob.metas, strict=True))
            ):
                carried = stage.steps(carried, inner, parts, meta)
            return {name: t for name, t in zip(schema.names, carried, strict=True) if t is not None}

        named = dict(zip(schema.names, tensors, strict=True))
        bits = _bits(self._leaves, layers, blob.metas, schema)
        ranks = _ranks(self._leaves, layers, blob.metas, schema)
        return Decoded(named, bits, ranks, _energy(self._leaves, blob.metas), steps)

    def __repr__(self) -> str:
        return f"Codec({'|'.join(s.wire_name for s in self.stages)})"


def as_codec(value: Codec | Stage | None) -> Codec:
    """A codec is returned as it is, a stage becomes a codec of one stage, None the identity."""
    if isinstance(value, Codec):
        return value
    return Codec() if value is None else Codec(value)


def inspect(payload: bytes, schema: Schema | None = None) -> Inspection:
    """What is inside a payload and what each part costs; ``str(...)`` of the result is a readable table.

    Args:
        payload: bytes from anywhere.
        schema: with it, the result has a row per tensor; stages that are not of this package show no rows.

    Raises:
        PayloadError: not a sound payload, or one for another schema.
    """
    blob = wire.read(payload, wire.MAX_HEADER if schema is None else _header_limit(schema))
    stages = [from_wire_name(name) for name in blob.chain]
    counts: dict[int | None, int] = {}
    ranked: dict[int | None, int] = {}
    energy = None
    for stage, meta in zip(stages, blob.metas, strict=False):
        if isinstance(stage, Quantize):
            for width, count in parse_runs(meta):
                counts[width] = counts.get(width, 0) + count
        elif isinstance(stage, LowRank):
            energy = stage.threshold(meta) if energy is None else energy
            for rank, count in low_rank.parse_runs(low_rank.rank_text(meta)):
                ranked[rank] = ranked.get(rank, 0) + count
    arenas = {name: (a.dtype, a.numel, a.stop - a.start) for name, a in blob.arenas.items()}
    rows = None
    if schema is not None:
        _expect_schema(blob, schema)
        leaves = [s for s in stages if s is not None]
        if len(leaves) == len(stages):
            layers = layout_chain(leaves, parts_of(schema), blob.metas)
            _places(layers[-1], blob)
            bits, ranks = (found(leaves, layers, blob.metas, schema) for found in (_bits, _ranks))
            cost = dict.fromkeys(schema.names, 0)
            for part in layers[-1]:
                cost[part.origin] += part.num_bytes
            rows = [
                TensorRow(
                    s.name, s.shape, s.dtype, bits[s.name], cost[s.name], s.numel * s.dtype.itemsize, ranks[s.name]
                )
                for s in schema
            ]
    hashed = blob.schema_hash
    return Inspection(len(payload), blob.header_bytes, hashed, blob.chain, arenas, counts, rows, ranked, energy)


def _header_limit(schema: Schema) -> int:
    """Generous for any index of these tensors, and still small against what the receiver allocates for them anyway."""
    return 1 << 16 if len(schema) < 512 else (1 << 16) + 64 * len(schema)


def _expect_schema(blob: wire.Blob, schema: Schema) -> None:
    if blob.schema_hash != schema.hash:
        raise SchemaMismatchError(
            f"Expected a payload for schema {schema.hash} ({len(schema)} tensors), but it is for {blob.schema_hash}."
        )


def _in_order(tensors: Tensors, schema: Schema) -> list[Tensor]:
    """The tensors in the schema's order.

    Raises:
        SchemaMismatchError: other names, a wrong shape or dtype.
    """
    if len(tensors) != len(schema) or any(n not in tensors for n in schema.names):
        differing = sorted(set(tensors) ^ set(schema.names))
        raise SchemaMismatchError(f"Expected `tensors` to have the schema's names, but {differing[:5]} differ.")
    ordered = [tensors[n].detach() for n in schema.names]
    for spec, tensor in zip(schema, ordered, strict=True):
        if tensor.shape != spec.shape or tensor.dtype != spec.dtype:
            raise SchemaMismatchError(
                f"Expected {spec.name!r} to be {spec.dtype} of shape {spec.shape}, but got {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}."
            )
        if tensor.layout != torch.strided:
            raise SchemaMismatchError(f"Expected {spec.name!r} to be a dense tensor, but got layout {tensor.layout}.")
    return ordered


def _places(parts: Sequence[Part], blob: wire.Blob) -> list[int]:
    """Where in the payload each part starts.

    Raises:
        MalformedPayloadError: an arena is missing, left over, of the wrong dtype, or not exactly filled.
    """
    position = {name: arena.start for name, arena in blob.arenas.items()}
    starts: list[int] = []
    for part in parts:
        name = part.arena_name
        arena = blob.arenas.get(name)
        if part.numel and (arena is None or arena.dtype != DTYPE_NAMES[part.dtype]):
            raise MalformedPayloadError(
                f"Expected `{name}` of {part.dtype} for {part.name!r}, but the payload has none."
            )
        starts.append(position.get(name, 0))
        if part.numel:
            position[name] += part.num_bytes
    for name, arena in blob.arenas.items():
        if position[name] != arena.stop:
            expected, got = position[name] - arena.start, arena.stop - arena.start
            raise MalformedPayloadError(f"Expected `{name}` to have {expected} bytes, but it has {got}.")
    return starts


def _bits(
    leaves: Sequence[Stage], layers: Sequence[tuple[Part, ...]], metas: Sequence[Any], schema: Schema
) -> dict[str, int | None]:
    """Per tensor of the schema, the width of the largest of its parts that was quantised."""
    bits: dict[str, int | None] = dict.fromkeys(schema.names)
    largest: dict[str, int] = {}
    for stage, parts, meta in zip(leaves, layers, metas, strict=False):
        for part, width in zip(parts, stage.bits(parts, meta), strict=True):
            if width is not None and part.numel > largest.get(part.origin, 0):
                bits[part.origin], largest[part.origin] = width, part.numel
    return bits


def _ranks(
    leaves: Sequence[Stage], layers: Sequence[tuple[Part, ...]], metas: Sequence[Any], schema: Schema
) -> dict[str, int | None]:
    """Per tensor of the schema, the rank that the first stage which factored it, or a part of it, gave it."""
    ranks: dict[str, int | None] = dict.fromkeys(schema.names)
    for stage, parts, meta in zip(leaves, layers, metas, strict=False):
        for part, rank in zip(parts, stage.ranks(parts, meta), strict=True):
            if rank is not None and ranks[part.origin] is None:
                ranks[part.origin] = rank
    return ranks


def _energy(leaves: Sequence[Stage], metas: Sequence[Any]) -> float | None:
    """The share of the energy that the first stage which goes by it was to keep."""
    shares = (leaf.threshold(meta) for leaf, meta in zip(leaves, metas, strict=True))
    return next((share for share in shares if share is not None), None)


def _gather(table: Table) -> dict[str, tuple[str, list[np.ndarray]]]:
    """The arrays of each arena, on the CPU. What stages made is small and is joined first: one transfer from a device."""
    pieces: dict[str, list[Tensor]] = {}
    dtypes: dict[str, torch.dtype] = {}
    joined: set[str] = set()
    for part, tensor in zip(table.parts, table.tensors, strict=True):
        name = part.arena_name
        pieces.setdefault(name, []).append(tensor)
        dtypes[name] = part.dtype
        if part.arena is not None:
            joined.add(name)
    for name in joined:
        pieces[name] = [torch.cat(pieces[name])]
    return {n: (DTYPE_NAMES[dtypes[n]], [_to_numpy(t) for t in tensors]) for n, tensors in pieces.items()}


def _to_numpy(tensor: Tensor) -> np.ndarray:
    """The tensor's bytes as a contiguous array on the CPU; a view where it already is one."""
    flat = tensor.cpu().reshape(-1)
    if not flat.is_contiguous():  # a one-dimensional view with gaps or expanded
        flat = flat.contiguous()
    return flat.view(torch.int16).numpy() if flat.dtype == torch.bfloat16 else flat.numpy()


def _receive(payload: bytes, blob: wire.Blob, parts: Sequence[Part], starts: Sequence[int]) -> list[Tensor]:
    """The parts' tensors: views of a copy of the arena for what only stages read, else memory of their own."""
    sizes: dict[str, list[int]] = {}
    for part in parts:
        if part.arena is not None:
            sizes.setdefault(part.arena, []).append(part.numel)
    views = {
        name: iter(_to_tensor(payload, blob.arenas[name].dtype, sum(ns), blob.arenas[name].start).split(ns))
        for name, ns in sizes.items()
        if name in blob.arenas
    }
    return [
        next(views[p.arena])
        if p.arena in views
        else _to_tensor(payload, DTYPE_NAMES[p.dtype], p.numel, start).reshape(p.shape)
        for p, start in zip(parts, starts, strict=True)
    ]


def _to_tensor(payload: bytes, dtype: str, count: int, start: int) -> Tensor:
    """A copy of `count` elements of the payload."""
    tensor = torch.from_numpy(np.frombuffer(payload, _NUMPY[dtype], count, start if count else 0).copy())
    return tensor.view(torch.bfloat16) if dtype == "BF16" else tensor


def _name_culprit(tensors: Tensors, table: Table) -> str:
    """Say which tensor made the payload non-finite, and whether it came so."""
    for part, tensor in zip(table.parts, table.tensors, strict=True):
        if part.dtype.is_floating_point and not torch.isfinite(tensor).all():
            given = tensors[part.origin]
            if torch.isfinite(given).all() and part.dtype == given.dtype:
                return f"Expected {part.origin!r} to stay finite while it is encoded, but a value is too large."
            if torch.isfinite(given).all():
                return f"Expected {part.origin!r} to stay finite in the conversion to {part.dtype}, but a value is too large."
            return f"Expected {part.origin!r} to hold finite numbers only, but got NaN or infinity."
    return "Expected finite numbers only, but got NaN or infinity."
