"""Data by name: `digits`, presets, parquet files, image folders, the public hub, tensors, text, and any map-style dataset."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, TensorDataset

from dynfed_lightning.arrays import LABELS, Arrays, MissingColumn, Options, Samples, Table, Texts, coded, codes, pick
from dynfed_lightning.images import missing
from dynfed_lightning.partition import stratified_order
from dynfed_lightning.tables import _IDS, _IMAGES, from_hf, load_hub, load_image_folder, read_parquet
from dynfed_lightning.text_table import from_ids, text_columns, tokenised


@dataclass(frozen=True)
class Preset:
    """A known image set: its hub name, its columns, and the mean and deviation of each channel of its training images."""

    hub: str
    image: str
    label: str
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


PRESETS: dict[str, Preset] = {
    "mnist": Preset("ylecun/mnist", "image", "label", 10, (0.1307,), (0.3081,)),
    "fashion_mnist": Preset("zalando-datasets/fashion_mnist", "image", "label", 10, (0.2860,), (0.3530,)),
    "cifar10": Preset("uoft-cs/cifar10", "img", "label", 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Preset(
        "uoft-cs/cifar100", "img", "fine_label", 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    ),
}


@dataclass(frozen=True)
class TextPreset:
    """A known set of texts: its hub name and its columns.

    `hidden` are splits that are there but not to be used, such as a test split whose labels are kept secret.
    """

    hub: str
    text: str
    label: str
    num_classes: int
    hidden: tuple[str, ...] = ()


TEXT_PRESETS: dict[str, TextPreset] = {
    "sst2": TextPreset("stanfordnlp/sst2", "sentence", "label", 2, hidden=("test",)),
    "ag_news": TextPreset("fancyzhx/ag_news", "text", "label", 4),
    "imdb": TextPreset("stanfordnlp/imdb", "text", "label", 2, hidden=("unsupervised",)),
}
_SPLITS = {"train": ("train",), "test": ("test", "val", "dev")}  # beginnings of the names of files and splits
_STARTS = ("train", "test", "val", "dev")


def load_table(source: Any, split: str = "train", options: Options | None = None) -> Table:
    """Whatever a user calls a dataset, as a table.

    Args:
        source: a name or path (see `load_arrays`); a pair of tensors or a ``TensorDataset``; a pair of a list of strings and
            labels; a `datasets` ``Dataset``; a mapping of splits (``DatasetDict``); any map-style torch ``Dataset``; or a table.
        split: ``"train"`` or ``"test"``; a mapping or a named set without ``test`` gives its validation split.
        options: columns, places and the tokeniser.

    Raises:
        ValueError, TypeError: what it is cannot be told, a split or a column is missing.
    """
    o = options or Options()
    if isinstance(source, Arrays | Samples | Texts):
        return source
    if isinstance(source, str | Path):
        return load_arrays(source, split, **vars(o))
    if isinstance(source, TensorDataset):
        source = source.tensors
    if isinstance(source, tuple | list) and len(source) == 2 and strings(source[0]):
        return _lists(source[0], source[1], o)
    if isinstance(source, tuple | list) and len(source) == 2 and not _sample_of_text(source[0]):
        x, y = (torch.as_tensor(t) for t in source)
        if y.dtype.is_floating_point or y.ndim != 1:
            raise ValueError(f"Expected labels to be integers of shape [n], but got {y.dtype} {list(y.shape)}.")
        if o.partition_column is not None:
            raise MissingColumn(f"Expected `partition_column` to be None for tensors, but got {o.partition_column!r}.")
        return Arrays(x, y.long(), int(y.max()) + 1 if len(y) else 0)
    if isinstance(source, Mapping):
        return load_table(source[split_of(list(source), split)], split, o)
    sized = hasattr(source, "__getitem__") and hasattr(source, "__len__")
    if sized and hasattr(source, "features") and hasattr(source, "with_format"):  # a datasets.Dataset
        return from_hf(source, o)
    if not sized or isinstance(source, IterableDataset):
        raise TypeError(
            "Expected `dataset` to be a name, a path, a pair of tensors, a mapping of splits or a map-style dataset, "
            f"but got {type(source).__name__}."
        )
    return _samples(source, o)


def split_of(names: list[str], split: str) -> str:
    for start in _SPLITS.get(split, (split,)):
        for name in names:
            if name.startswith(start):
                return name
    raise ValueError(f"Expected the dataset to have a {split!r} split, but it has {names}.")


def strings(values: Any) -> bool:
    """Whether `values` is a list of strings, or of pairs of strings."""
    if isinstance(values, str | bytes) or not hasattr(values, "__len__") or isinstance(values, Tensor | Mapping):
        return False
    ends = (values[0], values[-1]) if len(values) else (None,)  # a missing text in between is an error of its own
    return all(isinstance(v, str) for v in ends) or all(
        isinstance(v, tuple | list) and len(v) == 2 and all(isinstance(s, str) for s in v) for v in ends
    )


def _sample_of_text(value: Any) -> bool:
    """Whether it is one of two samples ``(text, label)``, or a mapping, rather than all inputs."""
    return isinstance(value, Mapping) or (isinstance(value, tuple | list) and bool(value) and isinstance(value[0], str))


def _lists(texts: Sequence[Any], labels: Any, o: Options) -> Texts:
    if len(texts) != len(labels):
        raise ValueError(f"Expected as many texts as labels, but got {len(texts)} and {len(labels)}.")
    if o.partition_column is not None or o.text_column is not None:
        raise MissingColumn("Expected `partition_column` and `text_column` to be None for a list of texts.")
    y, names = _labels(labels, o)
    first, second = list(texts), None
    if not isinstance(texts[0], str):
        wrong = next((i for i, t in enumerate(texts) if not isinstance(t, tuple | list) or len(t) != 2), None)
        if wrong is not None:
            raise ValueError(f"Expected two texts in every row, but got {texts[wrong]!r} in row {wrong}.")
        first, second = [t[0] for t in texts], [t[1] for t in texts]
    return tokenised(first, second, y, _count(y, names), o, class_names=names)


def _labels(labels: Any, o: Options) -> tuple[Tensor, tuple[str, ...] | None]:
    """Labels as int64 ``[n]``, and the classes' names where they were strings."""
    values = [_item(v) for v in labels]
    if all(isinstance(v, str) for v in values):
        return codes(values, o.class_names)
    y = torch.as_tensor(np.asarray(values))
    if y.dtype.is_floating_point or y.ndim != 1:
        raise ValueError(f"Expected labels to be integers of shape [n], but got {y.dtype} {list(y.shape)}.")
    return y.long(), None


def _count(labels: Tensor, names: Sequence[str] | None) -> int:
    return len(names) if names else int(labels.max()) + 1


def _samples(dataset: Any, o: Options) -> Samples | Texts:
    first = dataset[0] if len(dataset) else ()
    key = None
    if isinstance(first, Mapping):
        key = pick(o.label_column, [c for c in LABELS if c in first], list(first), "label_column")
    elif not (isinstance(first, tuple | list) and len(first) == 2):
        raise TypeError(f"Expected samples (input, label) or mappings, but the first is a {type(first).__name__}.")
    if isinstance(first, Mapping):
        columns = _text_columns(first, key, o)
        if columns is not None:
            return _texts(dataset, columns, key, o)
    elif isinstance(first[0], str) or strings([first[0]]):
        every = [dataset[i] for i in range(len(dataset))]
        return _lists([s[0] for s in every], [s[1] for s in every], replace(o, text_column=None))
    groups, group_names, column, labels = (
        None,
        None,
        o.partition_column,
        getattr(dataset, "targets", None) if key is None else None,
    )
    if column is not None and (key is None or column not in first):
        raise MissingColumn(
            f"Expected `partition_column` to be one of {list(first) if key else []}, but got {column!r}."
        )
    if labels is None or column is not None:
        # No list of labels to ask for: every sample has to be read once.
        labels, values = [], []
        for i in range(len(dataset)):
            sample = dataset[i]
            labels.append(_item(sample[key or 1]))
            values.append(_item(sample[column]) if column else None)
        groups, group_names = coded(values if column else None)
    y = torch.as_tensor(np.asarray(labels))
    if y.dtype.is_floating_point:
        raise ValueError(f"Expected labels to be integers, but got {y.dtype}.")
    return Samples(dataset, y.long(), int(y.max()) + 1, groups, key, group_names)


def _text_columns(sample: Mapping[str, Any], label: str | None, o: Options) -> tuple[str, ...] | None:
    """A mapping's keys of text or of token ids, chosen as a table's columns are; ``None`` where it holds something else."""
    if o.text_column is None:
        if o.image_column is not None or any(k in sample for k in _IMAGES):
            return None
        if "input_ids" in sample:
            return tuple(k for k in _IDS if k in sample)
    texts = [k for k, v in sample.items() if isinstance(v, str) and k not in (label, o.partition_column)]
    return text_columns(texts, list(sample), o)


def _texts(dataset: Any, columns: Sequence[str], label: str | None, o: Options) -> Texts:
    """Mappings with text, or with token ids of any lengths, read once."""
    group = o.partition_column
    wanted = [*columns, label, *([group] if group else [])]
    values: dict[Any, list[Any]] = {name: [] for name in wanted}
    for i in range(len(dataset)):
        sample = dataset[i]
        lacking = next((name for name in wanted if name not in sample), None)
        if lacking is not None:
            raise ValueError(f"Expected every sample to have {lacking!r}, but number {i} has {list(sample)}.")
        for name in wanted:
            values[name].append(sample[name])
    y, names = _labels(values[label], o)
    groups, group_names = coded([_item(v) for v in values[group]] if group else None)
    more: dict[str, Any] = {"groups": groups, "class_names": names, "group_names": group_names}
    if "input_ids" in columns and o.text_column is None:
        ids, mask, types = (values.get(name) for name in _IDS)
        return from_ids(ids, mask, types, y, _count(y, names), o, **more)
    second = values[columns[1]] if len(columns) > 1 else None
    column = " and ".join(columns)
    return tokenised(values[columns[0]], second, y, _count(y, names), o, column=column, **more)


def _item(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def load_arrays(
    name_or_path: str | Path,
    split: str = "train",
    *,
    data_dir: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    partition_column: str | None = None,
    image_size: int | None = None,
    cache_dir: str | Path | None = None,
    class_names: tuple[str, ...] | None = None,
    text_column: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    max_length: int = 128,
) -> Arrays | Texts:
    """Load one split of a set of images or texts into memory.

    Args:
        name_or_path: ``"digits"`` (built in), a preset (`PRESETS`, `TEXT_PRESETS`), a name on the public hub, a parquet file,
            a folder with ``train*.parquet`` and ``test*.parquet`` or ``validation*.parquet``, or an image folder. A name is
            looked for in `data_dir` and in the folders of ``$DYNFED_DATA`` before the hub.
        split: ``"train"`` or ``"test"`` (the validation split where there is no test split).
        data_dir: a folder that holds ``<name>/train.parquet``, or is that folder.
        image_column, label_column: by default the preset's, or the first that looks like one.
        partition_column: a column to keep as `Arrays.groups`, such as a writer's id.
        image_size: resize images to this many pixels a side.
        cache_dir: where decoded images and tokens are kept; default ``$DYNFED_CACHE``, else the user's cache folder.
        class_names: the names behind labels that are strings, in order (the training split's).
        text_column: the column of text, or the two of a pair; by default the first that looks like one.
        tokenizer: for text, see `text.load_tokenizer`.
        max_length: cut longer texts to so many tokens.

    Raises:
        ValueError: an unknown dataset, split or column.
        ImportError: a package of the ``data`` extra is missing.
    """
    o = Options(
        data_dir,
        image_column,
        label_column,
        partition_column,
        image_size,
        cache_dir,
        class_names,
        text_column,
        tokenizer,
        max_length,
    )
    name = str(name_or_path)
    if name == "digits":
        if image_size not in (None, 8):
            raise ValueError(f"Expected `image_size` to be None or 8 for digits, but got {image_size}.")
        for argument, column in (("image", image_column), ("label", label_column), ("partition", partition_column)):
            pick(column, ("",), ("image", "label"), f"{argument}_column")
        return _digits(split)
    preset: Preset | TextPreset | None = PRESETS.get(name) or TEXT_PRESETS.get(name)
    hidden: tuple[str, ...] = ()
    if isinstance(preset, Preset):
        o = replace(o, image_column=image_column or preset.image, label_column=label_column or preset.label)
    elif preset is not None:
        o = replace(o, text_column=text_column or preset.text, label_column=label_column or preset.label)
        hidden = preset.hidden
    found = _find(name, data_dir) if preset or not Path(name).exists() else Path(name)
    if found is None:
        splits = load_hub(preset.hub if preset else name, name, ("digits", *PRESETS, *TEXT_PRESETS))
        arrays = from_hf(splits[split_of([s for s in splits if s not in hidden], split)], o)
    elif found.is_file() or _parquet_files(found):
        arrays = read_parquet(_split_files(found, split, hidden), o)
    else:
        splits = load_image_folder(found)
        arrays = from_hf(splits[split_of(list(splits), split)], o)
    if isinstance(arrays, Samples):
        columns = list(arrays.dataset.features)
        raise ValueError(f"Expected {name!r} to have images or text, but its columns are {columns}.")
    return _finish(arrays, preset)


def _finish(arrays: Arrays | Texts, preset: Preset | TextPreset | None) -> Arrays | Texts:
    if isinstance(arrays, Texts):
        return replace(arrays, num_classes=max(arrays.num_classes, preset.num_classes)) if preset else arrays
    if (
        not isinstance(preset, Preset)
        or arrays.inputs.dtype != torch.uint8
        or arrays.inputs.shape[1] != len(preset.mean)
    ):
        return arrays
    return replace(arrays, num_classes=preset.num_classes, mean=preset.mean, std=preset.std)


def _find(name: str, data_dir: str | Path | None) -> Path | None:
    roots = [Path(r) for r in os.environ.get("DYNFED_DATA", "").split(os.pathsep) if r]
    if data_dir is not None:
        roots = [Path(data_dir)]
        if any(roots[0].glob("*.parquet")):
            return roots[0]
    candidates = [r / n for r in roots for n in dict.fromkeys((name, name.rpartition("/")[2]))]
    found = next((c for c in candidates if c.is_dir() and _parquet_files(c)), None)
    if found is None and data_dir is not None:
        raise ValueError(
            f"Expected `data_dir` to hold {name}/train*.parquet or train*.parquet, but {data_dir} does not."
        )
    return found


def _parquet_files(folder: Path) -> list[Path]:
    """The folder's parquet files, or those of its subfolders as the hub lays them out: ``data``, a configuration, or splits."""
    here = sorted(folder.glob("*.parquet"))
    below = sorted(folder.glob("*/*.parquet"))
    parents = {f.parent.name for f in below}
    return here or (below if len(parents) == 1 or all(p.startswith(_STARTS) for p in parents) else [])


def _split_files(path: Path, split: str, hidden: tuple[str, ...] = ()) -> list[Path]:
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"Expected a .parquet file or a folder, but got {str(path)!r}.")
        if split != "train":
            raise ValueError(f"Expected a {split!r} split, but {path.name} is a single file, all of it for training.")
        return [path]
    # `train-00000-of-00002.parquet` as the hub names them, or `train/part-0.parquet`.
    names = {f: f.name if f.name.startswith(_STARTS) else f.relative_to(path).parts[0] for f in _parquet_files(path)}
    if hidden:
        names = {f: n for f, n in names.items() if not n.startswith(hidden)}
    if split == "train" and not any(n.startswith(_STARTS) for n in names.values()):
        return list(names)
    start = next((s for s in _SPLITS.get(split, (split,)) if any(n.startswith(s) for n in names.values())), None)
    if start is None:
        raise ValueError(f"Expected a {split!r} split in {path}, but its files are {sorted(set(names.values()))}.")
    return [f for f, n in names.items() if n.startswith(start)]


def _digits(split: str) -> Arrays:
    """scikit-learn's 1,797 images of 8x8 pixels, scaled to [0, 1]: 1,437 to train, 360 to test, stratified, always the same."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise missing("scikit-learn") from None
    bunch = load_digits()
    order = stratified_order(bunch.target, "digits")
    rows = np.sort(order[-360:] if split == "test" else order[:-360])
    inputs = torch.from_numpy((bunch.images[rows] / 16.0).astype(np.float32)).unsqueeze(1)
    return Arrays(inputs, torch.from_numpy(bunch.target[rows].astype(np.int64)), 10)
