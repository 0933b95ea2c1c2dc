"""Data by name, by path and as objects: decoded once, the same on every call, and clear about what is missing."""

from __future__ import annotations

import builtins
import io
import os
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from dynfed_lightning import tables
from dynfed_lightning.arrays import Arrays, Options, Samples
from dynfed_lightning.datasets import PRESETS, load_arrays, load_table
from dynfed_lightning.images import decode_images

_SHARED = os.environ.get("DYNFED_DATA") or str(Path(__file__).resolve().parents[2] / "shared" / "data")
needs_mnist = pytest.mark.skipif(not Path(_SHARED, "mnist", "train.parquet").is_file(), reason="needs MNIST's parquet")


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNFED_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DYNFED_DATA", raising=False)

    def no_network(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("no network in tests")

    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda n, **k: real(n, **k) if n == "imagefolder" else no_network())


def png(pixels: np.ndarray, mode: str | None = None) -> bytes:
    out = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(out, "PNG")
    return out.getvalue()


def pixels(n: int, channels: int = 1, size: int = 6, seed: int = 0) -> np.ndarray:
    shape = (n, size, size) if channels == 1 else (n, size, size, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(
    file: Path, images: np.ndarray, labels: list[Any], image: str = "image", label: str = "label", **more: Any
) -> None:
    cells = [{"bytes": png(i), "path": None} for i in images]
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({image: cells, label: labels, **more}), file)


def test_digits_are_scaled_stratified_and_always_the_same() -> None:
    train, test = load_arrays("digits"), load_arrays("digits", "test")
    assert train.inputs.shape == (1437, 1, 8, 8) and test.inputs.shape == (360, 1, 8, 8)
    assert train.inputs.dtype == torch.float32
    assert (float(train.inputs.min()), float(train.inputs.max())) == (0.0, 1.0)
    share = torch.bincount(test.labels, minlength=10) / torch.bincount(train.labels, minlength=10)
    assert share == pytest.approx(np.full(10, 360 / 1437), abs=0.012)
    # Every image once: the sum over both parts is scikit-learn's own.
    assert float(train.inputs.double().sum() + test.inputs.double().sum()) * 16 == pytest.approx(561718)
    assert torch.equal(test.inputs, load_arrays("digits", "test").inputs)


def test_a_preset_is_found_in_a_folder_and_normalised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pixels(4, 3, 32)
    write(tmp_path / "cifar10" / "train.parquet", images, [0, 9, 3, 3], image="img")
    monkeypatch.setenv("DYNFED_DATA", os.pathsep.join(["", str(tmp_path / "nowhere"), str(tmp_path)]))
    by_env = load_arrays("cifar10")
    by_root = load_arrays("cifar10", data_dir=tmp_path)
    by_folder = load_arrays("cifar10", data_dir=tmp_path / "cifar10")
    for got in (by_env, by_root, by_folder):
        assert got.num_classes == 10 and got.labels.tolist() == [0, 9, 3, 3]
        assert torch.equal(got.inputs, torch.from_numpy(images).permute(0, 3, 1, 2))
    preset = PRESETS["cifar10"]
    expected = (images[[2]] / 255 - np.array(preset.mean)) / np.array(preset.std)
    batch = by_env.batch(torch.tensor([2]))
    assert batch.dtype == torch.float32
    np.testing.assert_allclose(batch.permute(0, 2, 3, 1).numpy(), expected, atol=2e-6)


def test_files_without_a_preset_are_scaled_to_one(tmp_path: Path) -> None:
    images = pixels(3)
    write(tmp_path / "train.parquet", images, [0, 2, 1])
    got = load_arrays(tmp_path)
    assert got.inputs.shape == (3, 1, 6, 6) and got.num_classes == 3
    np.testing.assert_allclose(got.batch(torch.arange(3))[:, 0].numpy(), images / 255, atol=1e-6)
    assert torch.equal(load_arrays(tmp_path / "train.parquet").inputs, got.inputs)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        (["train.parquet"], ["validation.parquet"]),
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"], ["test-00000-of-00001.parquet"]),
        (["data/train-0.parquet"], ["data/test-0.parquet"]),
        (["train/a.parquet", "train/b.parquet"], ["test/a.parquet"]),
    ],
)
def test_layouts_of_parquet_folders(tmp_path: Path, train: list[str], test: list[str]) -> None:
    parts = pixels(3 * len(train)).reshape(len(train), 3, 6, 6)
    for name, part in zip(train, parts, strict=True):
        write(tmp_path / name, part, [0, 1, 2])
    held = pixels(2, seed=1)
    write(tmp_path / test[0], held, [1, 0])
    assert torch.equal(load_arrays(tmp_path).inputs[:, 0], torch.from_numpy(parts.reshape(-1, 6, 6)))
    got = load_arrays(tmp_path, "test")
    assert torch.equal(got.inputs[:, 0], torch.from_numpy(held)) and got.labels.tolist() == [1, 0]


def test_text_labels_groups_and_names(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", pixels(4), ["cat", "ant", "cat", "bee"], writer=["z", "a", "z", "m"])
    write(tmp_path / "test.parquet", pixels(2), ["cat", "bee"], writer=["a", "a"])
    train = load_arrays(tmp_path, partition_column="writer")
    assert train.class_names == ("ant", "bee", "cat") and train.labels.tolist() == [2, 0, 2, 1]
    assert train.groups is not None and train.groups.tolist() == [2, 0, 2, 1]
    test = load_arrays(tmp_path, "test", class_names=train.class_names)
    assert test.labels.tolist() == [2, 1] and test.num_classes == 3
    write(tmp_path / "test.parquet", pixels(1), ["dog"])
    with pytest.raises(ValueError, match=r"labels among .* but got 'dog'"):
        load_arrays(tmp_path, "test", class_names=train.class_names)


def test_class_names_in_the_files_metadata_set_the_number_of_classes(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c", "d"])})
    rows = {"image": [Image.fromarray(p) for p in pixels(2)], "label": [0, 1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "train.parquet"))
    got = load_arrays(tmp_path)
    assert got.num_classes == 4 and got.class_names == ("a", "b", "c", "d")


def test_columns_of_numbers(tmp_path: Path) -> None:
    table = {"image": pixels(3).tolist(), "label": [0, 1, 1]}
    pq.write_table(pa.table(table), tmp_path / "train.parquet")
    assert torch.equal(load_arrays(tmp_path).inputs, torch.from_numpy(pixels(3))[:, None])
    pq.write_table(pa.table({"vector": [[0.5, 1.5]] * 3, "label": [0, 1, 1]}), tmp_path / "train.parquet")
    assert load_arrays(tmp_path, image_column="vector").inputs.tolist() == [[0.5, 1.5]] * 3


@pytest.fixture
def big(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tables, "CACHE_FROM", 8)
    write(tmp_path / "set" / "train.parquet", pixels(9), list(range(9)), writer=list("aabbccdde"))
    return tmp_path / "set"


def test_the_cache_spares_decoding_and_follows_the_source(
    big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_arrays(big, partition_column="writer")
    cache = tmp_path / "cache"
    assert len(list(cache.iterdir())) == 1

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("decoded again")

    with monkeypatch.context() as m:
        m.setattr(tables, "decode_images", never)
        again = load_arrays(big, partition_column="writer")
        with pytest.raises(AssertionError, match="decoded again"):
            load_arrays(big)  # other columns, another key
    assert torch.equal(first.inputs, again.inputs) and torch.equal(first.labels, again.labels)
    assert first.groups is not None and again.groups is not None and torch.equal(first.groups, again.groups)
    assert (again.num_classes, again.class_names) == (9, None)
    write(big / "train.parquet", pixels(9, seed=5), list(range(9)), writer=list("aabbccdde"))
    assert torch.equal(load_arrays(big, partition_column="writer").inputs[:, 0], torch.from_numpy(pixels(9, seed=5)))


def test_a_torn_cache_file_is_made_anew_and_an_unwritable_folder_is_a_warning(big: Path, tmp_path: Path) -> None:
    first = load_arrays(big)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(load_arrays(big).inputs, first.inputs)
    assert file.stat().st_size > 300
    (tmp_path / "plain").write_text("")
    with pytest.warns(UserWarning, match="not cached"):
        load_arrays(big, cache_dir=tmp_path / "plain" / "x")
    assert not list((tmp_path / "cache").glob("*.part"))


def test_decoding_modes_and_sizes() -> None:
    grey, colour = pixels(2), pixels(1, 3)[0]
    assert decode_images([png(g) for g in grey]).shape == (2, 1, 6, 6)
    mixed = decode_images([png(grey[0]), png(colour)])
    assert torch.equal(mixed[0], torch.from_numpy(grey[0]).expand(3, 6, 6))
    assert torch.equal(mixed[1], torch.from_numpy(colour).permute(2, 0, 1))
    assert decode_images([png(grey[0]), png(pixels(1, size=9)[0])], image_size=4).shape == (2, 1, 4, 4)
    with pytest.raises(ValueError, match="row 1 is 9x9: give `image_size`"):
        decode_images([png(grey[0]), png(pixels(1, size=9)[0])])
    with pytest.raises(ValueError, match="row 1 of `x`, but it cannot be read"):
        decode_images([png(grey[0]), png(grey[0])[:40]], column="x")
    with pytest.raises(ValueError, match="row 0 of `image`, but got NoneType"):
        decode_images([{"bytes": None, "path": None}])
    with pytest.raises(ValueError, match=r"8-bit images .* mode 'I"):
        decode_images([png(pixels(1)[0].astype(np.uint16) * 200)])


def test_image_folders(tmp_path: Path) -> None:
    images = pixels(4)
    for i, p in enumerate(images):
        file = tmp_path / "set" / ("train" if i < 3 else "test") / ("cat" if i % 2 else "ant") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(p))
    train, test = load_arrays(tmp_path / "set"), load_arrays(tmp_path / "set", "test")
    assert train.class_names == ("ant", "cat") and sorted(train.labels.tolist()) == [0, 0, 1]
    assert torch.equal(test.inputs[0, 0], torch.from_numpy(images[3])) and test.labels.tolist() == [1]


def test_hub_sets_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"image": [Image.fromarray(p) for p in pixels(3, size=28)], "label": [5, 0, 4]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    made = datasets.DatasetDict(train=datasets.Dataset.from_dict(rows, features=features))
    asked: list[str] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name: (asked.append(name), made)[1])
    got = load_arrays("mnist")
    assert asked == ["ylecun/mnist"] and got.num_classes == 10 and got.mean == (0.1307,)
    assert torch.equal(got.inputs[:, 0], torch.from_numpy(pixels(3, size=28)))
    with pytest.raises(ValueError, match=r"a 'test' split, but it has \['train'\]"):
        load_arrays("someone/something", "test")


def test_datasets_objects_selected_and_shuffled() -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [Image.fromarray(p) for p in pixels(5)], "label": [0, 1, 2, 3, 4]}
    whole = datasets.Dataset.from_dict(rows, features=features)
    some = load_table(whole.select([4, 0]))
    assert isinstance(some, Arrays) and some.labels.tolist() == [4, 0]
    assert torch.equal(some.inputs[:, 0], torch.from_numpy(pixels(5)[[4, 0]]))
    split = datasets.DatasetDict(train=whole, validation=whole.select([1]))
    assert load_table(split, "test").labels.tolist() == [1]


def test_datasets_objects_without_images_give_samples() -> None:
    table = datasets.Dataset.from_dict({"ids": [[1, 2], [3, 4], [5, 6]], "label": [1, 0, 1], "who": ["b", "a", "b"]})
    got = load_table(table, options=Options(partition_column="who"))
    assert isinstance(got, Samples) and got.labels.tolist() == [1, 0, 1] and got.num_classes == 2
    assert got.groups is not None and got.groups.tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="`tokenizer` to be given, since `text` is text"):
        load_table(datasets.Dataset.from_dict({"text": ["a"], "label": [0]}))


class Pairs(Dataset):
    def __init__(self, labels: list[int], targets: bool = False) -> None:
        self._labels, self.reads = labels, 0
        if targets:
            self.targets = labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, i: int) -> Any:
        self.reads += 1
        return torch.full((2,), float(i)), self._labels[i]


def test_tensors_and_torch_datasets() -> None:
    x, y = torch.rand(4, 3), torch.tensor([0, 1, 1, 2], dtype=torch.int32)
    for source in ((x, y), TensorDataset(x, y), {"train": [x, y]}):
        got = load_table(source)
        assert (
            isinstance(got, Arrays) and got.num_classes == 3 and torch.equal(got.batch(torch.tensor([3, 0])), x[[3, 0]])
        )
    told, read = Pairs([0, 2], targets=True), Pairs([0, 2])
    for pairs in (told, read):
        samples = load_table(pairs)
        assert isinstance(samples, Samples) and samples.labels.tolist() == [0, 2] and samples.num_classes == 3
        assert samples.batch(torch.tensor([1, 0])).tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert told.reads < read.reads


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        yield torch.zeros(1), 0


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        (Stream(), TypeError, "map-style dataset, but got Stream"),
        (7, TypeError, "but got int"),
        ([torch.zeros(2)], TypeError, "Expected samples"),
        ((torch.zeros(2), torch.zeros(2)), ValueError, "labels to be integers"),
        ((torch.zeros(3), torch.zeros(2).long()), ValueError, "as many inputs as labels, but got 3 and 2"),
        ((torch.zeros(2), torch.tensor([-1, 0])), ValueError, "labels from 0 to 0, but got -1 to 0"),
        ((torch.zeros(0), torch.zeros(0).long()), ValueError, "n > 0"),
        ({"test": 1}, ValueError, "'train' split"),
    ],
)
def test_what_is_no_dataset(source: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        load_table(source)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("minst", "Did you mean 'mnist'.* Presets: digits, mnist"),
        ("cifar-10", "Did you mean 'cifar10'"),
        ("nobody/nothing", "could not be loaded from the hub: ConnectionError"),
        ("./no/such/folder", "known name, but got './no/such/folder'"),
        ("missing.parquet", "known name, but got 'missing.parquet'"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_arrays(name)


def test_what_a_file_or_folder_lacks(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", pixels(2), [0, 1])
    with pytest.raises(
        ValueError, match=r"`label_column` .* \['image', 'label'\], but got 'lable'. Did you mean 'label'"
    ):
        load_arrays(tmp_path, label_column="lable")
    with pytest.raises(ValueError, match="`image_column` to be one of"):
        load_arrays(tmp_path, image_column="img")
    with pytest.raises(ValueError, match="`partition_column` to be one of"):
        load_arrays(tmp_path, partition_column="writer")
    with pytest.raises(ValueError, match=r"'test' split .* its files are"):
        load_arrays(tmp_path, "test")
    with pytest.raises(ValueError, match="single file"):
        load_arrays(tmp_path / "train.parquet", "test")
    with pytest.raises(ValueError, match="`data_dir` to hold mnist/train"):
        (tmp_path / "empty").mkdir()
        load_arrays("mnist", data_dir=tmp_path / "empty")
    with pytest.raises(ValueError, match="`partition_column` to be one of the columns"):
        load_arrays("digits", partition_column="writer")
    for labels, message in (
        ([0, None], "row 1 has none"),
        ([0.5, 1.0], "integers or strings"),
        ([-1, 0], "but got -1"),
    ):
        write(tmp_path / "train.parquet", pixels(2), labels)
        with pytest.raises(ValueError, match=message):
            load_arrays(tmp_path)
    (tmp_path / "train.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="parquet files"):
        load_arrays(tmp_path)
    with pytest.raises(ValueError, match="image folder"):
        load_arrays(tmp_path / "empty")


@pytest.mark.parametrize(
    ("package", "name"), [("sklearn.datasets", "scikit-learn"), ("PIL", "pillow"), ("pyarrow", "pyarrow")]
)
def test_a_missing_extra_is_named(package: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "train.parquet", pixels(2), [0, 1])
    real = builtins.__import__

    def without(wanted: str, *args: Any, **kwargs: Any) -> Any:
        if wanted == package:
            raise ImportError(wanted)
        return real(wanted, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=rf"{name}.*pip install dynfed-lightning\[data\]"):
        load_arrays("digits" if name == "scikit-learn" else tmp_path)


@needs_mnist
def test_mnist_from_parquet(tmp_path: Path) -> None:
    train = load_arrays("mnist", data_dir=_SHARED, cache_dir=tmp_path)
    test = load_arrays("mnist", "test", data_dir=_SHARED, cache_dir=tmp_path)
    assert train.inputs.shape == (60000, 1, 28, 28) and test.inputs.shape == (10000, 1, 28, 28)
    # The counts of the original MNIST, and the preset's constants are its own.
    assert torch.bincount(train.labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert torch.bincount(test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    scaled = train.inputs.double() / 255
    assert (float(scaled.mean()), float(scaled.std())) == pytest.approx((0.1307, 0.3081), abs=5e-5)
    start = time.perf_counter()
    again = load_arrays("mnist", data_dir=_SHARED, cache_dir=tmp_path)
    assert time.perf_counter() - start < 1.0
    assert torch.equal(again.inputs, train.inputs) and torch.equal(again.labels, train.labels)
