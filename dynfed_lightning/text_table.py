"""Columns of text to a table of tokens, once: tokenised, kept flat, cached on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynfed_lightning.arrays import Options, Texts
from dynfed_lightning.images import CACHE_FROM, cache_folder, read_cache, write_cache
from dynfed_lightning.text import TextTokenizer, load_tokenizer

_VERSION = "2"
_CHUNK = 2048  # texts tokenised at a time: what is in memory as lists of Python integers
TEXTS = ("sentence", "text", "content", "review", "document", "comment", "tweet", "headline", "question")
PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
)


def text_columns(strings: Sequence[str], columns: Sequence[str], o: Options) -> tuple[str, ...] | None:
    """The column of text to use, or the two; ``None`` where there is none.

    Args:
        strings: the columns that hold strings, without labels and groups.
        columns: all of them.
        o: with `text_column` the user's choice.

    Raises:
        ValueError: the user's choice is not there or holds no text, or it cannot be told which of several is meant.
    """
    if o.text_column is not None:
        given = (o.text_column,) if isinstance(o.text_column, str) else tuple(o.text_column)
        for name in given:
            if name not in columns:
                raise ValueError(f"Expected `text_column` to be among the columns {list(columns)}, but got {name!r}.")
            if name not in strings:
                raise ValueError(f"Expected `text_column` to be a column of strings, but {name!r} holds none.")
        if len(given) not in (1, 2):
            raise ValueError(f"Expected `text_column` to be one column or two, but got {list(given)}.")
        return given
    pair = next((p for p in PAIRS if p[0] in strings and p[1] in strings), None)
    if pair is not None:
        return pair
    single = next((name for name in TEXTS if name in strings), None)
    if single is None and len(strings) > 1:
        raise ValueError(f"Expected `text_column` to say which of {list(strings)} is the text, but got None.")
    return (single,) if single else tuple(strings) or None


def tokenised(
    texts: Sequence[Any],
    pairs: Sequence[Any] | None,
    labels: Tensor,
    num_classes: int,
    o: Options,
    *,
    column: str = "text",
    groups: Tensor | None = None,
    class_names: tuple[str, ...] | None = None,
    group_names: tuple[str, ...] | None = None,
) -> Texts:
    """A table of tokens from strings.

    Args:
        texts: n strings, none of them empty.
        pairs: the second sentences, where there are any.
        labels: int64 ``[n]``.
        num_classes: C.
        o: the tokeniser, the most tokens of a row, the cache folder.
        column: where the texts come from, for errors.
        groups: see `Texts`, as `class_names` and `group_names`.

    Raises:
        ValueError: no tokeniser is given, or a row has no text.
    """
    if o.tokenizer is None:
        raise ValueError(
            f"Expected `tokenizer` to be given, since `{column}` is text, but got None: a Hugging Face tokeniser or its name "
            "or folder, a vocab.txt, or 'words:8000' for the training set's own words."
        )
    tokenizer = load_tokenizer(o.tokenizer)
    for values in (texts, pairs or ()):
        for row, value in enumerate(values):
            if not isinstance(value, str) or not value.strip():
                what = "it is empty" if isinstance(value, str) else f"got {type(value).__name__}"
                raise ValueError(f"Expected text in every row of `{column}`, but in row {row} {what}.")
    tokenizer.fit([*texts, *(pairs or ())])
    tokens, offsets, first = _tokens(texts, pairs, tokenizer, o)
    return Texts(
        tokens,
        offsets,
        labels,
        num_classes,
        vocab_size=tokenizer.vocab_size,
        pad_token_id=tokenizer.pad_token_id,
        first=first,
        groups=groups,
        class_names=class_names,
        group_names=group_names,
    )


def from_ids(
    ids: Any,
    mask: Any,
    types: Any,
    labels: Tensor,
    num_classes: int,
    o: Options,
    *,
    groups: Tensor | None = None,
    class_names: tuple[str, ...] | None = None,
    group_names: tuple[str, ...] | None = None,
) -> Texts:
    """A table from columns that somebody has tokenised already; rows may differ in length, and padding is taken out.

    Args:
        ids: ``input_ids``: an Arrow column of lists of integers, or a list of lists or of int tensors ``[T]``.
        mask: ``attention_mask``, or ``None``.
        types: ``token_type_ids``, or ``None``.
        labels: int64 ``[n]``, as the others: see `tokenised`.
        num_classes: C.
        o: with a tokeniser its padding and vocabulary count, without it 0 and the largest id there is. Rows of more than
            `max_length` tokens are cut before their last one, which is the separator in most.
        groups: see `Texts`, as `class_names` and `group_names`.

    Raises:
        ValueError: lists that are missing, empty or differ in length from those of `ids`.
    """
    flat, lengths = _flat(ids, "input_ids")
    kept = np.ones(len(flat), bool)
    first = None
    rows = np.repeat(np.arange(len(lengths)), lengths)
    if mask is not None:
        kept = _like(mask, "attention_mask", lengths) != 0
    if types is not None:
        kinds = _like(types, "token_type_ids", lengths)
    counts = np.bincount(rows[kept], minlength=len(lengths))
    place = np.cumsum(kept) - 1 - (np.cumsum(counts) - counts)[rows]
    kept &= (place < o.max_length - 1) | (place == counts[rows] - 1)
    counts = np.minimum(counts, o.max_length)
    if types is not None and kinds.any():
        first = np.bincount(rows[kept], weights=kinds[kept] == 0, minlength=len(lengths)).astype(np.int32)
    if not counts.all():
        raise ValueError(f"Expected tokens in every row of `input_ids`, but row {int(counts.argmin())} has none.")
    tokenizer = None if o.tokenizer is None else load_tokenizer(o.tokenizer)
    return Texts(
        torch.from_numpy(flat[kept].astype(np.int32)),
        torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)),
        labels,
        num_classes,
        vocab_size=int(flat.max()) + 1 if tokenizer is None else tokenizer.vocab_size,
        pad_token_id=0 if tokenizer is None else tokenizer.pad_token_id,
        first=None if first is None else torch.from_numpy(first),
        groups=groups,
        class_names=class_names,
        group_names=group_names,
    )


def _flat(column: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A column of lists, Arrow's or a plain list, as all its values and the rows' lengths."""
    if isinstance(column, list):
        return _flat_rows(column, name)
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not lists or not (pa.types.is_integer(kind.value_type) or pa.types.is_boolean(kind.value_type)):
        raise ValueError(f"Expected lists of integers in `{name}`, but its type is {kind}.")
    if column.null_count:
        raise ValueError(f"Expected a list in every row of `{name}`, but {column.null_count} have none.")
    values = pc.list_flatten(column)
    return values.to_numpy(zero_copy_only=False), pc.list_value_length(column).to_numpy().astype(np.int64)


def _flat_rows(column: list[Any], name: str) -> tuple[np.ndarray, np.ndarray]:
    rows = []
    for i, row in enumerate(column):
        values = None if row is None else np.asarray(row)
        if values is None or values.ndim != 1 or (values.size and values.dtype.kind not in "iub"):
            what = "nothing" if values is None else f"{values.dtype} {list(values.shape)}"
            raise ValueError(f"Expected a list of integers in every row of `{name}`, but row {i} has {what}.")
        rows.append(values.astype(np.int64))
    flat = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    return flat, np.asarray([len(r) for r in rows], np.int64)


def _like(column: Any, name: str, lengths: np.ndarray) -> np.ndarray:
    flat, own = _flat(column, name)
    if not np.array_equal(own, lengths):
        row = int((own != lengths).argmax())
        raise ValueError(f"Expected `{name}` as long as `input_ids`, but row {row} has {own[row]} and {lengths[row]}.")
    return flat


def _tokens(
    texts: Sequence[str], pairs: Sequence[str] | None, tokenizer: TextTokenizer, o: Options
) -> tuple[Tensor, Tensor, Tensor | None]:
    file: Path | None = None
    if len(texts) >= CACHE_FROM:
        file = cache_folder(o.cache_dir) / f"{_key(texts, pairs, tokenizer, o.max_length)}.safetensors"
        cached = read_cache(file)
        if cached is not None:
            found = cached[0]
            return found["tokens"], found["offsets"], found.get("first")
    parts: list[np.ndarray] = []
    lengths, first = np.zeros(len(texts), np.int64), np.zeros(len(texts), np.int32)
    for start in range(0, len(texts), _CHUNK):
        some = slice(start, start + _CHUNK)
        rows = tokenizer.encode(texts[some], None if pairs is None else pairs[some], o.max_length)
        lengths[some], first[some] = [len(r.ids) for r in rows], [r.first for r in rows]
        parts.append(np.concatenate([np.asarray(r.ids, np.int32) for r in rows]))
    tokens = torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0, dtype=torch.int32)
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    found = {"tokens": tokens, "offsets": offsets} | ({} if pairs is None else {"first": torch.from_numpy(first)})
    if file is not None:
        write_cache(file, found, {"kind": "tokens"})
    return tokens, offsets, found.get("first")


def _key(texts: Sequence[str], pairs: Sequence[str] | None, tokenizer: TextTokenizer, max_length: int) -> str:
    """Of the texts themselves, the tokeniser and the cut: no file's name or date has a say."""
    digest = hashlib.sha256(f"{_VERSION} {tokenizer.fingerprint} {max_length} {pairs is not None}".encode())
    for values in (texts, pairs or ()):
        for value in values:
            encoded = value.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
    return digest.hexdigest()[:32]
