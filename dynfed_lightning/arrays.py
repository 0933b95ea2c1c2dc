"""Tables of rows: in memory, text as tokens, or a user's dataset read sample by sample."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

LABELS = ("label", "labels", "fine_label", "target", "class", "y")


@dataclass(frozen=True)
class Arrays:
    """A table in memory.

    Args:
        inputs: ``[n, ...]``; uint8 images ``[n, C, H, W]`` are scaled to [0, 1] and normalised batch by batch, everything
            else is used as it is.
        labels: int64 ``[n]``, from 0 to ``num_classes - 1``.
        num_classes: C.
        mean: per channel, of the scaled images; ``None``: no shift.
        std: per channel, of the scaled images; ``None``: no scaling.
        groups: int64 ``[n]``, the partition column's values as codes, or ``None``.
        class_names: the classes' names, or ``None``.
        group_names: the partition column's values behind the codes, or ``None``.
    """

    inputs: Tensor
    labels: Tensor
    num_classes: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    groups: Tensor | None = None
    class_names: tuple[str, ...] | None = None
    group_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _check_labels(self.labels, self.num_classes)
        if len(self.inputs) != len(self.labels):
            raise ValueError(f"Expected as many inputs as labels, but got {len(self.inputs)} and {len(self.labels)}.")

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def _affine(self) -> tuple[Tensor, Tensor]:
        channels = self.inputs.shape[1]
        mean = torch.tensor(self.mean or (0.0,) * channels, dtype=torch.float64)
        std = torch.tensor(self.std or (1.0,) * channels, dtype=torch.float64)
        shape = (channels, 1, 1)
        return (mean * 255).float().view(shape), (1 / (255 * std)).float().view(shape)

    def batch(self, rows: Tensor) -> Tensor:
        """The rows' inputs, ready for a network: ``[B, ...]``, float32 for images."""
        x = self.inputs.index_select(0, rows)
        if x.dtype == torch.uint8 and x.ndim == 4:
            shift, factor = self._affine
            return x.float().sub_(shift).mul_(factor)
        return x


@dataclass(frozen=True)
class Samples:
    """A user's map-style dataset of ``(x, y)`` tuples or of mappings, read sample by sample.

    Args:
        dataset: it.
        labels: int64 ``[n]``.
        num_classes: C.
        groups: int64 ``[n]`` or ``None``.
        label_key: the mapping's key of the label; ``None`` for tuples.
        group_names: see `Arrays`.
    """

    dataset: Any
    labels: Tensor
    num_classes: int
    groups: Tensor | None = None
    label_key: str | None = None
    group_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _check_labels(self.labels, self.num_classes)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Tensor) -> Any:
        """The rows' inputs, collated: a tensor, or a mapping without the label."""
        samples = [self.dataset[i] for i in rows.tolist()]
        if self.label_key is None:
            return default_collate([s[0] for s in samples])
        return default_collate([{k: v for k, v in s.items() if k != self.label_key} for s in samples])


@dataclass(frozen=True)
class Texts:
    """A table of tokenised text: all rows' tokens one after another, padded batch by batch.

    Args:
        tokens: int32 ``[total]``.
        offsets: int64 ``[n + 1]``; row i is ``tokens[offsets[i] : offsets[i + 1]]``.
        labels: int64 ``[n]``, from 0 to ``num_classes - 1``.
        num_classes: C.
        vocab_size: of the tokeniser; ids are below it.
        pad_token_id: what shorter rows of a batch are filled with.
        first: of pairs of texts, how many tokens of each row have token type 0; int32 ``[n]``.
        groups: see `Arrays`, as `class_names` and `group_names`.
    """

    tokens: Tensor
    offsets: Tensor
    labels: Tensor
    num_classes: int
    vocab_size: int
    pad_token_id: int = 0
    first: Tensor | None = None
    groups: Tensor | None = None
    class_names: tuple[str, ...] | None = None
    group_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _check_labels(self.labels, self.num_classes)
        if len(self.offsets) != len(self.labels) + 1:
            rows = len(self.offsets) - 1
            raise ValueError(f"Expected as many texts as labels, but got {rows} and {len(self.labels)}.")

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def max_length(self) -> int:
        """Tokens of the longest row."""
        return int(self.offsets.diff().max())

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """The rows' inputs: ``input_ids`` and ``attention_mask``, of pairs ``token_type_ids`` too, int64 ``[B, T]``.

        T is the longest of these rows.
        """
        return text_batch(self.tokens, self.offsets, rows, self.pad_token_id, self.first)


def text_batch(
    tokens: Tensor, offsets: Tensor, rows: Tensor, pad_token_id: int = 0, first: Tensor | None = None
) -> dict[str, Tensor]:
    """See `Texts.batch`."""
    start, length = offsets[rows], offsets[rows + 1] - offsets[rows]
    place = torch.arange(int(length.max()) if len(rows) else 0)
    there = place < length[:, None]
    at = (start[:, None] + place).clamp_max(max(len(tokens) - 1, 0))
    ids = tokens[at].long().masked_fill_(~there, pad_token_id)
    batch = {"input_ids": ids, "attention_mask": there.long()}
    if first is not None:
        batch["token_type_ids"] = ((place >= first[rows][:, None]) & there).long()
    return batch


Table = Arrays | Samples | Texts


def _check_labels(labels: Tensor, num_classes: int) -> None:
    if labels.dtype != torch.int64 or labels.ndim != 1 or len(labels) == 0:
        raise ValueError(
            f"Expected labels of type int64 and shape [n], n > 0, but got {labels.dtype} {list(labels.shape)}."
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"Expected labels from 0 to {num_classes - 1}, but got {low} to {high}.")


@dataclass(frozen=True)
class Options:
    """How to read a table: which columns, from where; see `load_arrays`."""

    data_dir: str | Path | None = None
    image_column: str | None = None
    label_column: str | None = None
    partition_column: str | None = None
    image_size: int | None = None
    cache_dir: str | Path | None = None
    class_names: tuple[str, ...] | None = None
    text_column: str | Sequence[str] | None = None
    tokenizer: Any = None
    max_length: int = 128


def codes(values: Sequence[Any], names: Sequence[str] | None = None) -> tuple[Tensor, tuple[str, ...]]:
    """Values as int64 codes: each value's place in `names`, by default the sorted distinct values."""
    if names is None:
        distinct, code = np.unique(np.asarray(values), return_inverse=True)
        return torch.from_numpy(code.astype(np.int64).reshape(-1)), tuple(str(v) for v in distinct)
    place = {n: i for i, n in enumerate(names)}
    unknown = [v for v in values if v not in place]
    if unknown:
        raise ValueError(f"Expected labels among the training set's {list(names)[:10]}, but got {unknown[0]!r}.")
    return torch.tensor([place[v] for v in values]), tuple(names)


class MissingColumn(ValueError):
    """A column that was asked for is not there."""


def coded(values: Sequence[Any] | None) -> tuple[Tensor | None, tuple[str, ...] | None]:
    """A partition column as `Arrays.groups` and `Arrays.group_names`; twice None without one."""
    return (None, None) if values is None else codes(values)


def pick(given: str | None, guesses: Sequence[str], columns: Sequence[str], argument: str) -> str:
    """The column to use: the given one, else the first guess there is; an error that lists the columns otherwise."""
    if given is not None and given in columns:
        return given
    if given is None and guesses:
        return guesses[0]
    near = difflib.get_close_matches(given or "", columns, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise MissingColumn(f"Expected `{argument}` to be one of the columns {list(columns)}, but got {given!r}.{hint}")
