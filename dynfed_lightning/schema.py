"""What sender and receiver agree on before anything travels: names, shapes, dtypes, and what must stay lossless.

A payload never carries names or shapes, only the schema's hash, so both sides find out at once when they disagree.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import torch
from torch import Tensor

# The dtypes that a payload can hold, under the names that safetensors and the schema's hash use for them.
DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}
_MAX_ELEMENTS = 2**48  # far above any model, and small enough that no sum of byte counts leaves 64 bits


@dataclass(frozen=True)
class TensorSpec:
    """One named tensor of a schema.

    Args:
        name: its name, unique within a schema.
        shape: its shape; ``()`` is a scalar, and a dimension may be 0.
        dtype: float16, bfloat16, float32, float64, bool or an integer type up to 64 bits.
        raw: it travels losslessly whatever the codec (normalisation statistics, counters).

    Raises:
        ValueError: a negative dimension, an absurd size, or a dtype that cannot travel.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    raw: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_NAMES:
            known = ", ".join(str(d).removeprefix("torch.") for d in DTYPE_NAMES)
            raise ValueError(f"Expected `dtype` of {self.name!r} to be one of {known}, but got {self.dtype}.")
        if self.shape and min(self.shape) < 0:
            raise ValueError(f"Expected `shape` of {self.name!r} to hold no negative size, but got {self.shape}.")
        if self.numel > _MAX_ELEMENTS:
            raise ValueError(f"Expected {self.name!r} to have at most 2**48 elements, but got shape {self.shape}.")

    @property
    def numel(self) -> int:
        """How many elements the tensor has."""
        return math.prod(self.shape)


class Schema:
    """An immutable sequence of `TensorSpec`.

    Args:
        specs: the tensors, in the order in which they are encoded.

    Raises:
        ValueError: two tensors of one name.

    Example:
        >>> schema = Schema.of({"w": torch.zeros(2, 3), "mean": torch.zeros(3)}, raw={"mean"})
        >>> schema.names, schema.num_elements, schema["mean"].raw
        (('w', 'mean'), 9, True)
    """

    def __init__(self, specs: Iterable[TensorSpec] = ()) -> None:
        self.specs: tuple[TensorSpec, ...] = tuple(specs)
        self._index = {s.name: i for i, s in enumerate(self.specs)}
        if len(self._index) != len(self.specs):
            names = [s.name for s in self.specs]
            twice = sorted({n for n in names if names.count(n) > 1})
            raise ValueError(f"Expected `specs` to have unique names, but got {twice[:3]} more than once.")

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], raw: Collection[str] = frozenset()) -> Schema:
        """The schema of `tensors`, in their order.

        Args:
            tensors: named tensors of any shape.
            raw: names that travel losslessly.

        Raises:
            ValueError: a name in `raw` that `tensors` does not have, or a dtype that cannot travel.
        """
        unknown = [n for n in raw if n not in tensors]
        if unknown:
            raise ValueError(f"Expected `raw` to hold names of `tensors` only, but got {sorted(unknown)[:3]}.")
        return cls(TensorSpec(n, tuple(t.shape), t.dtype, n in raw) for n, t in tensors.items())

    @cached_property
    def hash(self) -> str:
        """16 hex digits over names, shapes, dtypes and raw flags, in order: the head of their SHA-256."""
        rows = [[s.name, list(s.shape), DTYPE_NAMES[s.dtype], int(s.raw)] for s in self.specs]
        text = json.dumps(rows, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The tensors' names, in order."""
        return tuple(s.name for s in self.specs)

    @cached_property
    def num_elements(self) -> int:
        """How many elements all tensors have together."""
        return sum(s.numel for s in self.specs)

    def __iter__(self) -> Iterator[TensorSpec]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, name: object) -> bool:
        return name in self._index

    @overload
    def __getitem__(self, key: str) -> TensorSpec: ...
    @overload
    def __getitem__(self, key: int) -> TensorSpec: ...
    def __getitem__(self, key: str | int) -> TensorSpec:
        return self.specs[self._index[key] if isinstance(key, str) else key]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schema) and self.specs == other.specs

    def __hash__(self) -> int:
        return hash(self.hash)

    def __repr__(self) -> str:
        return f"Schema({len(self)} tensors, {self.num_elements} elements, {self.hash})"
