"""The contract of a compression stage: it maps a table of tensors to another one, and back.

A `Codec` chains stages: the schema's tensors are the first table; each stage replaces some rows by others (a matrix by its
factors, a tensor by its codes and scales) and hands on the rest; what the last stage leaves is written as bytes, untouched.
The receiver knows the first table's rows from the schema, and each stage's `layout` says what rows its `encode` must have
made of them, so that nothing but the stages' short `Meta` has to travel beside the data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynfed_lightning.errors import MalformedPayloadError
from dynfed_lightning.schema import DTYPE_NAMES, Schema

Meta = str | int | float | list[Any] | dict[str, Any] | None  # JSON; what `layout` needs besides the rows


@dataclass
class CodecContext:
    """The circumstances of one `encode`.

    Args:
        seed: 0 to 2^64 - 1, the Philox seed of stochastic rounding. Same tensors, same seed: same bytes. Give every
            (run, round, client) its own, or the rounding errors of several clients are the same and no longer average out.
        round: the round, from 0.
        num_rounds: how many rounds there will be, if that is known.
        scalars: what the server instructed, e.g. ``{"bits": 4}``.
        state: the sender's memory between rounds (residuals); holds only tensors, numbers, strings, dicts and lists, so
            that it can be saved and loaded with ``weights_only=True``.

    Raises:
        ValueError: a seed outside 64 bits or a negative round.
    """

    seed: int = 0
    round: int = 0
    num_rounds: int | None = None
    scalars: Mapping[str, float | int] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"Expected `seed` to be from 0 to 2**64 - 1, but got {self.seed}.")
        if self.round < 0:
            raise ValueError(f"Expected `round` to be at least 0, but got {self.round}.")


class Part(NamedTuple):
    """One row of a table.

    Args:
        name: for people; stages append what it holds, e.g. ``"fc.weight.codes"``.
        shape: its shape.
        dtype: its dtype.
        raw: no later stage may change it.
        origin: the schema's tensor it belongs to.
        numel: its number of elements.
        arena: the array of the payload it is written to: a name for what only stages read (the receiver hands them views of
            the array); None, the array of all raw parts of its dtype, for what may reach the user (each gets its own memory).
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    raw: bool
    origin: str
    numel: int
    arena: str | None = None

    @property
    def compressible(self) -> bool:
        """Whether a stage may change it: floating point and not raw."""
        return not self.raw and self.dtype.is_floating_point

    @property
    def num_bytes(self) -> int:
        """What it costs as it is."""
        return self.numel * self.dtype.itemsize

    @property
    def arena_name(self) -> str:
        """The array of the payload it is written to."""
        return self.arena if self.arena is not None else "raw." + DTYPE_NAMES[self.dtype]

    def child(
        self, suffix: str, shape: tuple[int, ...], dtype: torch.dtype, raw: bool, arena: str | None = None
    ) -> Part:
        """A row that a stage makes of this one."""
        return Part(f"{self.name}.{suffix}", shape, dtype, raw, self.origin, math.prod(shape), arena)


@lru_cache(maxsize=64)
def parts_of(schema: Schema) -> tuple[Part, ...]:
    """The rows of the first table."""
    return tuple(Part(s.name, s.shape, s.dtype, s.raw, s.name, s.numel) for s in schema)


class Table(NamedTuple):
    """Rows and their tensors, in the same order."""

    parts: tuple[Part, ...]
    tensors: list[Tensor]


class Stage:
    """One reversible compression step. Stateless: `encode` may keep things in ``ctx.state`` only.

    A subclass gives `wire_name`, `encode`, `layout`, `decode`, and where there is something to check or to say,
    `check_rounds`, `check`, `steps`, `bits`, `ranks` and `threshold`. Values in ``ctx.state`` are replaced, never edited in
    place: the codec drops the replacement if a later step fails.
    """

    lossless: bool = False

    @property
    def wire_name(self) -> str:
        """Identifies, in the payload, everything that decoding depends on, e.g. ``"quantize(512)"``."""
        raise TypeError(f"{type(self).__name__} does not define `wire_name`.")

    @property
    def leaves(self) -> tuple[Stage, ...]:
        """The stages that a receiver needs to undo this one: itself, or what a wrapper wraps."""
        return (self,)

    def check_rounds(self, num_rounds: int | None) -> None:
        """Check, before any training, that the first and the last of so many rounds can be encoded.

        Raises:
            ValueError: a schedule gives a value out of range, or needs to know how many rounds there are.
        """

    def run(self, table: Table, ctx: CodecContext) -> tuple[Table, list[Meta]]:
        """`encode`, with one `Meta` per leaf."""
        inner, meta = self.encode(table, ctx)
        return inner, [meta]

    def encode(self, table: Table, ctx: CodecContext) -> tuple[Table, Meta]:
        """The sender's side: the new table, whose rows must be ``layout(table.parts, meta)``."""
        raise TypeError(f"{type(self).__name__} does not define `encode`.")

    def layout(self, parts: tuple[Part, ...], meta: Meta) -> tuple[Part, ...]:
        """The rows that `encode` makes of `parts`. `meta` comes from outside: allocate nothing, trust nothing.

        Raises:
            MalformedPayloadError: `meta` is not one that `encode` could have made for these rows.
        """
        raise TypeError(f"{type(self).__name__} does not define `layout`.")

    def check(self, inner: Table, parts: tuple[Part, ...], meta: Meta) -> None:
        """Check received contents before `decode`.

        Raises:
            PayloadError: contents that `encode` could not have made.
        """

    def decode(self, inner: Table, parts: tuple[Part, ...], meta: Meta) -> list[Tensor]:
        """The receiver's side: a tensor for each of `parts`."""
        raise TypeError(f"{type(self).__name__} does not define `decode`.")

    def steps(
        self, steps: Sequence[Tensor | None], inner: Table, parts: tuple[Part, ...], meta: Meta
    ) -> list[Tensor | None]:
        """Carry the quantiser's step per element (None: not quantised) from the inner rows back to `parts`."""
        return list(steps) if len(steps) == len(parts) else [None] * len(parts)

    def bits(self, parts: tuple[Part, ...], meta: Meta) -> Sequence[int | None]:
        """The bit-width that this stage gave to each of `parts`."""
        return [None] * len(parts)

    def ranks(self, parts: tuple[Part, ...], meta: Meta) -> Sequence[int | None]:
        """The rank of the factors that this stage made of each of `parts`; None: not factored."""
        return [None] * len(parts)

    def threshold(self, meta: Meta) -> float | None:
        """The share of the energy that this stage was to keep; None: it does not go by that."""
        return None


def flatten(stages: Iterable[Any]) -> tuple[Stage, ...]:
    """Stages, where a codec stands for the stages in it.

    Raises:
        TypeError: something that is neither a stage nor a codec.
    """
    out: list[Stage] = []
    for stage in stages:
        if isinstance(stage, Stage):
            out.append(stage)
        elif isinstance(getattr(stage, "stages", None), tuple):
            out.extend(flatten(stage.stages))
        else:
            raise TypeError(f"Expected every stage to be a `Stage` or a `Codec`, but got {stage!r}.")
    return tuple(out)


def encode_chain(stages: Sequence[Stage], table: Table, ctx: CodecContext) -> tuple[Table, list[Meta]]:
    """Run `stages` in order; one `Meta` per leaf."""
    metas: list[Meta] = []
    for stage in stages:
        table, more = stage.run(table, ctx)
        metas += more
    return table, metas


def layout_chain(leaves: Sequence[Stage], parts: tuple[Part, ...], metas: Sequence[Meta]) -> list[tuple[Part, ...]]:
    """The rows before, between and after the `leaves`.

    Raises:
        MalformedPayloadError: not one `Meta` per leaf, or a `Meta` that its leaf refuses.
    """
    if len(metas) != len(leaves):
        raise MalformedPayloadError(f"Expected an index of {len(leaves)} stages, but got {len(metas)}.")
    layers = [parts]
    for stage, meta in zip(leaves, metas, strict=True):
        layers.append(stage.layout(layers[-1], meta))
    return layers


def decode_chain(
    leaves: Sequence[Stage], layers: Sequence[tuple[Part, ...]], tensors: list[Tensor], metas: Sequence[Meta]
) -> tuple[list[Tensor], list[Table]]:
    """Undo `leaves` from the last to the first.

    Returns:
        The first table's tensors, and every leaf's inner table.
    """
    inners: list[Table] = []
    for stage, meta, parts, inner_parts in zip(
        reversed(leaves), reversed(metas), reversed(layers[:-1]), reversed(layers[1:]), strict=True
    ):
        inner = Table(inner_parts, tensors)
        stage.check(inner, parts, meta)
        tensors = stage.decode(inner, parts, meta)
        inners.append(inner)
    return tensors, inners[::-1]
