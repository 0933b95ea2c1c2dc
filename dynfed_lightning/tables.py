"""Arrow tables, from parquet files or from the `datasets` library, to tensors in memory."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynfed_lightning.arrays import LABELS, Arrays, Options, Samples, Texts, coded, codes, pick
from dynfed_lightning.images import CACHE_FROM, cache_folder, cache_key, decode_images, missing, read_cache, write_cache
from dynfed_lightning.text_table import from_ids, text_columns, tokenised

_IDS = ("input_ids", "attention_mask", "token_type_ids")  # of text that somebody has tokenised
_IMAGES = ("image", "img", "pixel_values")


def read_parquet(files: Sequence[Path], o: Options) -> Arrays | Texts:
    """One split from parquet files, with the decoded images or the tokens cached on disk where there are many.

    Args:
        files: the split's files, in order.
        o: columns, image size, tokeniser, cache folder.

    Raises:
        ValueError: a column that is not there or does not hold images, text or labels.
        ImportError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise missing("pyarrow") from None

    try:
        opened = [pq.ParquetFile(f) for f in files]
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"Expected parquet files, but one of {[f.name for f in files]} cannot be read: {error}"
        ) from None
    schema = opened[0].schema_arrow
    image = None if o.text_column is not None else _image_column(schema, o)
    label, group = _other_columns(schema.names, o)
    names = o.class_names or _class_names(schema, label)

    def read(*columns: str | None) -> Any:
        wanted = list(dict.fromkeys(c for c in columns if c))
        try:
            return pa.concat_tables([f.read(columns=wanted) for f in opened])
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"Expected {wanted} alike in all of {[f.name for f in files]}, but: {error}") from None

    if image is None:
        if "input_ids" in schema.names and o.text_column is None:
            return _from_ids(read(*(c for c in _IDS if c in schema.names), label, group), label, group, names, o)
        texts = text_columns(_strings(schema, label, group), schema.names, o)
        if texts is None:
            raise ValueError(
                f"Expected images or text, but the columns are {schema.names}: give `image_column` or `text_column`."
            )
        return _to_texts(read(*texts, label, group), texts, label, group, names, o)

    file = None
    if sum(f.metadata.num_rows for f in opened) >= CACHE_FROM:
        key = cache_key(files, image=image, label=label, group=_named(group), size=o.image_size, names=names)
        file = cache_folder(o.cache_dir) / f"{key}.safetensors"
        cached = read_cache(file)
        if cached is not None:
            return _from_cache(*cached)
    return _to_arrays(read(image, label, group), image, label, group, names, o.image_size, file)


def from_hf(dataset: Any, o: Options) -> Arrays | Samples | Texts:
    """A `datasets.Dataset`: in memory if it has images or text, else read sample by sample as torch tensors."""
    schema = dataset.features.arrow_schema
    label, group = _other_columns(dataset.column_names, o)
    names = o.class_names or getattr(dataset.features[label], "names", None)
    image = None if o.text_column is not None else _image_column(schema, o)
    if image is None:
        if "input_ids" in dataset.column_names and o.text_column is None:
            return _from_ids(dataset.with_format("arrow")[:], label, group, names, o)
        texts = text_columns(_strings(schema, label, group), dataset.column_names, o)
        if texts is not None:
            return _to_texts(dataset.with_format("arrow")[:], texts, label, group, names, o)
        y, names = _labels(dataset.with_format("arrow")[:].column(label), label, names)
        groups, group_names = coded(dataset[group][:] if group else None)
        return Samples(dataset.with_format("torch"), y, _count(y, names), groups, label, group_names)
    file, fingerprint = None, getattr(dataset, "_fingerprint", None)
    if len(dataset) >= CACHE_FROM and fingerprint:
        key = cache_key([fingerprint], image=image, label=label, group=_named(group), size=o.image_size, names=names)
        file = cache_folder(o.cache_dir) / f"{key}.safetensors"
        cached = read_cache(file)
        if cached is not None:
            return _from_cache(*cached)
    table = dataset.with_format("arrow")[:]  # Arrow keeps images encoded, and applies any selection or shuffle
    return _to_arrays(table, image, label, group, names, o.image_size, file)


def _named(group: str | None) -> list[str] | None:
    """For the key of a cache: one that holds the values behind the groups' codes."""
    return [group, "names"] if group else None


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise missing("datasets") from None
    return datasets


def load_hub(hub_name: str, name: str, known: Sequence[str]) -> Mapping[str, Any]:
    """The splits of a set of the public hub.

    Args:
        hub_name: its name there.
        name: what the user wrote, for errors.
        known: names that need no hub.

    Raises:
        ValueError: there is no such set, or the hub cannot be reached.
    """
    near = difflib.get_close_matches(name, known, 1, 0.7) if name not in known else []
    hint = (f" Did you mean {near[0]!r}?" if near else "") + f" Presets: {', '.join(known)}."
    path_like = not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) or name.endswith(".parquet")
    if path_like or (near and "/" not in name):
        raise ValueError(f"Expected `dataset` to be a path or a known name, but got {name!r}.{hint}")
    try:
        found = _datasets().load_dataset(hub_name)
    except ImportError:
        raise
    except Exception as error:  # the hub's client raises a dozen kinds
        raise ValueError(
            f"Expected `dataset` to be a path or a known name, but {name!r} is no path, is in no data folder "
            f"(`data_dir`, DYNFED_DATA) and could not be loaded from the hub: {type(error).__name__}: {error}.{hint}"
        ) from error
    return found


def load_image_folder(folder: Path) -> Mapping[str, Any]:
    """The splits of a folder of images in the layout of `datasets`' imagefolder: ``<split>/<class>/<file>``."""
    try:
        return _datasets().load_dataset("imagefolder", data_dir=str(folder))
    except ImportError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"Expected parquet files or an image folder in {folder}, but: {reason}") from error


def _image_column(schema: Any, o: Options) -> str | None:
    import pyarrow as pa

    if o.image_column is not None:
        return pick(o.image_column, (), schema.names, "image_column")
    for field in schema:
        kind = getattr(field.type, "storage_type", field.type)
        if (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0) or pa.types.is_binary(kind):
            return field.name
    return next((c for c in _IMAGES if c in schema.names), None)


def _strings(schema: Any, label: str, group: str | None) -> list[str]:
    import pyarrow as pa

    kinds = (pa.types.is_string, pa.types.is_large_string)
    return [f.name for f in schema if f.name not in (label, group) and any(kind(f.type) for kind in kinds)]


def _other_columns(columns: Sequence[str], o: Options) -> tuple[str, str | None]:
    label = pick(o.label_column, [c for c in LABELS if c in columns], columns, "label_column")
    return label, pick(o.partition_column, (), columns, "partition_column") if o.partition_column else None


def _class_names(schema: Any, label: str) -> tuple[str, ...] | None:
    """The class names the `datasets` library left in the file's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label].get("names")
        return tuple(map(str, names)) if isinstance(names, list) else None
    except (KeyError, ValueError, TypeError, AttributeError):
        return None


def _labels(column: Any, name: str, names: Sequence[str] | None) -> tuple[Tensor, tuple[str, ...] | None]:
    values = column.to_pylist()
    if any(v is None for v in values):
        raise ValueError(f"Expected a label in every row of `{name}`, but row {values.index(None)} has none.")
    if values and all(isinstance(v, int) for v in values):
        return torch.tensor(values, dtype=torch.int64), None if names is None else tuple(names)
    if values and all(isinstance(v, str) for v in values):
        return codes(values, names)
    raise ValueError(f"Expected integers or strings in the label column `{name}`, but its type is {column.type}.")


def _count(labels: Tensor, names: Sequence[str] | None) -> int:
    return len(names) if names else int(labels.max()) + 1 if len(labels) else 0


def _to_arrays(
    table: Any,
    image: str,
    label: str,
    group: str | None,
    names: Sequence[str] | None,
    image_size: int | None,
    file: Path | None,
) -> Arrays:
    y, kept = _labels(table.column(label), label, names)
    groups, group_names = coded(table.column(group).to_pylist() if group else None)
    inputs = _inputs(table.column(image), image, image_size)
    arrays = Arrays(inputs, y, _count(y, kept), groups=groups, class_names=kept, group_names=group_names)
    if file is not None:
        tensors = {"inputs": inputs, "labels": y} | ({} if groups is None else {"groups": groups})
        write_cache(
            file,
            tensors,
            {
                "num_classes": str(arrays.num_classes),
                "class_names": json.dumps(kept),
                "group_names": json.dumps(group_names),
            },
        )
    return arrays


def _to_texts(
    table: Any, texts: Sequence[str], label: str, group: str | None, names: Sequence[str] | None, o: Options
) -> Texts:
    y, kept = _labels(table.column(label), label, names)
    groups, group_names = coded(table.column(group).to_pylist() if group else None)
    columns = [table.column(name).to_pylist() for name in texts]
    pairs = columns[1] if len(columns) > 1 else None
    count, column = _count(y, kept), " and ".join(texts)
    return tokenised(
        columns[0], pairs, y, count, o, column=column, groups=groups, class_names=kept, group_names=group_names
    )


def _from_ids(table: Any, label: str, group: str | None, names: Sequence[str] | None, o: Options) -> Texts:
    y, kept = _labels(table.column(label), label, names)
    groups, group_names = coded(table.column(group).to_pylist() if group else None)
    ids, mask, types = (table.column(c) if c in table.column_names else None for c in _IDS)
    return from_ids(ids, mask, types, y, _count(y, kept), o, groups=groups, class_names=kept, group_names=group_names)


def _inputs(column: Any, name: str, image_size: int | None) -> Tensor:
    cells = column.to_pylist()
    if cells and isinstance(cells[0], dict | bytes | str):
        return decode_images(cells, image_size, name)
    try:
        values = np.asarray(cells)
    except ValueError:
        values = np.empty(0, object)
    if values.dtype.kind not in "iuf" or values.ndim < 2:
        raise ValueError(
            f"Expected images or equally long lists of numbers in `{name}`, but its type is {column.type}."
        )
    if values.ndim == 3:
        values = values[:, None]
    whole = values.dtype.kind in "iu" and values.ndim == 4 and values.min() >= 0 and values.max() <= 255
    return torch.from_numpy(values.astype(np.uint8 if whole else np.float32))


def _from_cache(tensors: dict[str, Tensor], notes: dict[str, str]) -> Arrays:
    names, group_names = json.loads(notes["class_names"]), json.loads(notes.get("group_names", "null"))
    return Arrays(
        tensors["inputs"],
        tensors["labels"],
        int(notes["num_classes"]),
        groups=tensors.get("groups"),
        class_names=tuple(names) if names else None,
        group_names=tuple(group_names) if group_names else None,
    )
