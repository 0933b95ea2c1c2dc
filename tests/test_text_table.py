"""Text as data: from strings to dict batches, by every way in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from data_support import Records
from text_support import sentences

from dynfed_lightning import text_table
from dynfed_lightning.arrays import Options, Texts
from dynfed_lightning.data import FederatedDataModule
from dynfed_lightning.datasets import TEXT_PRESETS, load_table
from dynfed_lightning.partition import IID, Dirichlet, Natural
from dynfed_lightning.text import WordTokenizer

WORDS = WordTokenizer(["a", "b", "c", "d"])
O = Options(tokenizer=WORDS)
TEXTS, LABELS = ["a", "a b c", "d d", "b c d a b"], [1, 0, 1, 1]


def parquet(path: Path, **columns: list[Any]) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def rows(table: Any) -> list[list[int]]:
    assert isinstance(table, Texts)
    return [table.tokens[a:b].tolist() for a, b in zip(table.offsets[:-1], table.offsets[1:], strict=True)]


EXPECTED = [[2, 4, 3], [2, 4, 5, 6, 3], [2, 7, 7, 3], [2, 5, 6, 7, 4, 5, 3]]


def test_batches_are_padded_to_their_own_longest_row() -> None:
    table = load_table((TEXTS, LABELS), options=O)
    assert rows(table) == EXPECTED and table.tokens.dtype == torch.int32
    assert (table.num_classes, table.vocab_size, table.max_length, len(table)) == (2, 8, 7, 4)
    batch = table.batch(torch.tensor([2, 0]))
    assert batch["input_ids"].tolist() == [[2, 7, 7, 3], [2, 4, 3, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert set(batch) == {"input_ids", "attention_mask"} and all(t.dtype == torch.int64 for t in batch.values())
    assert table.batch(torch.tensor([3, 1]))["input_ids"].tolist() == [EXPECTED[3], EXPECTED[1] + [0, 0]]
    other = Texts(table.tokens, table.offsets, table.labels, 2, 8, pad_token_id=5)
    assert other.batch(torch.tensor([0, 1]))["input_ids"].tolist() == [[2, 4, 3, 5, 5], EXPECTED[1]]


def test_pairs_have_token_types() -> None:
    table = load_table(([("a", "b c"), ("a b", "d")], [0, 1]), options=O)
    assert rows(table) == [[2, 4, 3, 5, 6, 3], [2, 4, 5, 3, 7, 3]]
    batch = table.batch(torch.tensor([0, 1]))
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1]]
    short = load_table(([("a", "b"), ("a b", "d d d")], [0, 1]), options=O).batch(torch.tensor([0, 1]))
    assert short["token_type_ids"].tolist()[0] == [0, 0, 0, 1, 1, 0, 0, 0]  # padding has type 0


def ways(tmp_path: Path) -> dict[str, Any]:
    numbers = list(range(4))
    hf = pytest.importorskip("datasets").Dataset.from_dict({"idx": numbers, "text": TEXTS, "label": LABELS})
    return {
        "lists": (TEXTS, torch.tensor(LABELS)),
        "samples": list(zip(TEXTS, LABELS, strict=True)),
        "records": Records([{"text": t, "label": y, "idx": 0} for t, y in zip(TEXTS, LABELS, strict=True)]),
        "datasets": hf,
        "mapping": {"train": hf},
        "parquet": parquet(tmp_path / "one.parquet", idx=numbers, sentence=TEXTS, label=LABELS),
        "folder": parquet(tmp_path / "set" / "train.parquet", content=TEXTS, label=LABELS).parent,
        "only column of strings": parquet(tmp_path / "two.parquet", utterance=TEXTS, label=LABELS),
        "chosen": parquet(tmp_path / "three.parquet", text=["x"] * 4, mine=TEXTS, label=LABELS),
    }


@pytest.mark.parametrize(
    "way",
    ["lists", "samples", "records", "datasets", "mapping", "parquet", "folder", "only column of strings", "chosen"],
)
def test_every_way_in(tmp_path: Path, way: str) -> None:
    options = Options(tokenizer=WORDS, text_column="mine" if way == "chosen" else None)
    table = load_table(ways(tmp_path)[way], options=options)
    assert rows(table) == EXPECTED and table.labels.tolist() == LABELS and table.num_classes == 2


def test_two_samples_of_text_are_not_inputs_and_labels() -> None:
    assert rows(load_table([("a", 0), ("d d", 1)], options=O)) == [[2, 4, 3], [2, 7, 7, 3]]


def test_pairs_of_columns_groups_and_names(tmp_path: Path) -> None:
    columns = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": ["yes", "no"], "who": ["z", "y"]}
    file = parquet(tmp_path / "x.parquet", **columns)
    table = load_table(file, options=Options(tokenizer=WORDS, partition_column="who"))
    assert isinstance(table, Texts) and rows(table) == [[2, 4, 3, 6, 3], [2, 5, 3, 7, 3]]
    assert table.labels.tolist() == [1, 0] and table.class_names == ("no", "yes")
    assert table.groups is not None and table.groups.tolist() == [1, 0]
    one = load_table(file, options=Options(tokenizer=WORDS, partition_column="who", text_column="sentence2"))
    assert rows(one) == [[2, 6, 3], [2, 7, 3]]
    swapped = Options(tokenizer=WORDS, partition_column="who", text_column=["sentence2", "sentence1"])
    assert rows(load_table(file, options=swapped))[0] == [2, 6, 3, 4, 3]


def test_sst2_is_tested_on_its_validation_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's test split has labels -1."""
    for split, texts, labels in (("train", TEXTS, LABELS), ("validation", ["a", "b"], [0, 1]), ("test", ["c"], [-1])):
        parquet(
            tmp_path / "sst2" / "data" / f"{split}-00000-of-00001.parquet", sentence=texts, label=labels, idx=labels
        )
    monkeypatch.setenv("DYNFED_DATA", str(tmp_path))
    data = FederatedDataModule("sst2", IID(2), tokenizer=WORDS)
    batch = next(iter(data.val_dataloader()))
    assert batch["input_ids"].tolist() == [[2, 4, 3], [2, 5, 3]] and batch["labels"].tolist() == [0, 1]
    assert data.num_classes == 2 and {"sst2", "ag_news", "imdb"} <= TEXT_PRESETS.keys()


@pytest.mark.parametrize(
    "columns, options, message",
    [
        (
            {"sentence": TEXTS, "label": LABELS},
            {"tokenizer": None},
            "`tokenizer` to be given, since `sentence` is text",
        ),
        ({"sentence": ["a", "", "b"], "label": [0, 1, 0]}, {}, "every row of `sentence`, but in row 1 it is empty"),
        ({"sentence": ["a", " \n", "b"], "label": [0, 1, 0]}, {}, "every row of `sentence`, but in row 1 it is empty"),
        ({"sentence": ["a", None], "label": [0, 1]}, {}, "every row of `sentence`, but in row 1 got NoneType"),
        ({"foo": ["a"], "bar": ["b"], "label": [0]}, {}, r"`text_column` to say which of \['foo', 'bar'\]"),
        (
            {"sentence": TEXTS, "label": LABELS},
            {"text_column": "txt"},
            r"the columns \['sentence', 'label'\], but got 'txt'",
        ),
        ({"text": TEXTS, "label": LABELS}, {"text_column": "label"}, "'label' holds none"),
        ({"text": TEXTS, "label": LABELS}, {"text_column": ["text"] * 3}, "one column or two"),
        ({"text": TEXTS}, {}, r"`label_column` to be one of the columns \['text'\]"),
        ({"number": [1.0], "label": [0]}, {}, "images or text, but the columns are"),
    ],
)
def test_errors_say_what_is_missing(
    tmp_path: Path, columns: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    file = parquet(tmp_path / "x.parquet", **columns)
    with pytest.raises(ValueError, match=message):
        load_table(file, options=Options(**{"tokenizer": WORDS, **options}))


def test_errors_of_lists() -> None:
    with pytest.raises(ValueError, match="as many texts as labels, but got 4 and 3"):
        load_table((TEXTS, [0, 1, 0]), options=O)
    with pytest.raises(ValueError, match="labels to be integers"):
        load_table((TEXTS, [0.5] * 4), options=O)
    with pytest.raises(ValueError, match="row 1 got NoneType"):
        load_table((["a", None, "b"], [0, 1, 0]), options=O)
    with pytest.raises(ValueError, match="two texts in every row, but got 'a' in row 1"):
        load_table(([("a", "b"), "a", ("c", "d")], [0, 1, 0]), options=O)
    with pytest.raises(ValueError, match="`max_length` to be an integer of at least 4, but got 3"):
        FederatedDataModule((TEXTS, LABELS), IID(1), test=0.5, tokenizer=WORDS, max_length=3)
    with pytest.raises(ValueError, match="labels among the training set's"):
        o = Options(tokenizer=WORDS, class_names=("x", "y"))
        load_table((["a", "b"], ["x", "q"]), options=o)


@pytest.mark.parametrize("way", ["parquet", "datasets"])
def test_what_somebody_has_tokenised(tmp_path: Path, way: str) -> None:
    columns: dict[str, list[Any]] = {
        "text": ["x", "y", "z"],  # left over
        "input_ids": [[2, 4, 3], [2, 7, 7, 3, 9, 3], [2, 5, 3, 0, 0]],
        "attention_mask": [[1, 1, 1], [1] * 6, [1, 1, 1, 0, 0]],
        "token_type_ids": [[0, 0, 0], [0, 0, 0, 0, 1, 1], [0] * 5],
        "label": [1, 0, 1],
    }

    def load(options: Options | None = None, **changes: Any) -> Any:
        own = {k: v for k, v in {**columns, **changes}.items() if v is not None}
        if way == "datasets":
            return load_table(pytest.importorskip("datasets").Dataset.from_dict(own), options=options)
        return load_table(parquet(tmp_path / "x.parquet", **own), options=options)

    table = load()
    assert rows(table) == [[2, 4, 3], [2, 7, 7, 3, 9, 3], [2, 5, 3]]
    assert (table.vocab_size, table.pad_token_id, table.num_classes) == (10, 0, 2)
    batch = table.batch(torch.tensor([0, 1]))
    assert batch["token_type_ids"].tolist() == [[0] * 6, [0, 0, 0, 0, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
    plain = load(attention_mask=None, token_type_ids=None)
    assert rows(plain)[2] == [2, 5, 3, 0, 0] and set(plain.batch(torch.tensor([0]))) == {"input_ids", "attention_mask"}
    assert "token_type_ids" not in load(token_type_ids=[[0] * 3, [0] * 6, [0] * 5]).batch(torch.tensor([0]))
    assert load(O).vocab_size == WORDS.vocab_size
    chosen = Options(tokenizer=WordTokenizer(["x"]), text_column="text")
    assert rows(load(chosen)) == [[2, 4, 3], [2, 1, 3], [2, 1, 3]]
    for changes, message in (
        ({"input_ids": [1, 2, 3]}, "lists of integers in `input_ids`"),
        ({"input_ids": [[1], None, [2]]}, "a list in every row of `input_ids`, but 1 have none"),
        (
            {"attention_mask": [[1, 1, 1], [1] * 5, [1] * 5]},
            "`attention_mask` as long as `input_ids`, but row 1 has 5 and 6",
        ),
        ({"attention_mask": [[1, 1, 1], [0] * 6, [1] * 5]}, "every row of `input_ids`, but row 1 has none"),
    ):
        with pytest.raises(ValueError, match=message):
            load(**changes)


# ------------------------------------------------------------------------ cache


def test_tokenised_once_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_table, "CACHE_FROM", 3)
    monkeypatch.setattr(text_table, "_CHUNK", 3)
    calls: list[int] = []
    plain = WordTokenizer.encode

    def counted(self: WordTokenizer, texts: Any, *rest: Any) -> Any:
        calls.append(len(texts))
        return plain(self, texts, *rest)

    monkeypatch.setattr(WordTokenizer, "encode", counted)

    def load(texts: Any = TEXTS, words: Any = WORDS, length: int = 128) -> Any:
        calls.clear()
        o = Options(tokenizer=words, cache_dir=tmp_path / "cache", max_length=length)
        return load_table((texts, [0] * len(texts)), options=o)

    first = load()
    assert calls == [3, 1] and rows(first) == EXPECTED
    again = load(words=WordTokenizer(WORDS.words))  # another object, the same vocabulary
    assert calls == [] and rows(again) == EXPECTED
    for other in (
        {"texts": ["a", "a b c", "d d", "b c d a c"]},
        {"words": WordTokenizer(["d", "c", "b", "a"])},
        {"length": 5},
        {"texts": [(t, "a") for t in TEXTS]},
    ):
        assert load(**other) is not None and calls, other  # type: ignore[arg-type]
    pairs = load(texts=[(t, "a") for t in TEXTS])
    assert calls == [] and pairs.batch(torch.tensor([0]))["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]]
    files = sorted((tmp_path / "cache").iterdir())
    assert {f.suffix for f in files} == {".safetensors"} and len(files) == 5
    for file in files:  # what is broken is made anew
        file.write_bytes(b"")
    assert rows(load()) == EXPECTED and calls == [3, 1]
    load(texts=TEXTS[:2])
    assert len(list((tmp_path / "cache").iterdir())) == 5  # too few to be worth a file


# -------------------------------------------------------------- the data module


def test_clients_public_and_test_batches() -> None:
    texts, labels = sentences(90)
    data = FederatedDataModule(
        (texts, labels), Dirichlet(3, 20.0), test=0.2, tokenizer="words:40", public=12, public_labels=True, batch_size=7
    )
    batch = next(iter(data.client(0).train_loader(0)))
    assert set(batch) == {"input_ids", "attention_mask", "labels"} and batch["labels"].shape == (7,)
    assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1]
    seen = sum(len(b["labels"]) for k in range(3) for b in data.client(k).train_loader(0))
    assert seen == 90 - 18 - 12 == int(data.label_counts().sum())
    assert data.public_set is not None and len(data.public_set) == 12
    assert data.public_set.inputs["input_ids"].shape == data.public_set.inputs["attention_mask"].shape
    assert data.vocab_size == data.tokenizer.vocab_size == 4 + 14 and data.longest_text == 11
    assert f"vocabulary {data.vocab_size}" in data.summary() and "at most 11" in data.summary()
    assert len(next(iter(data.val_dataloader()))["labels"]) == 18
    same = FederatedDataModule(
        (texts, labels), Dirichlet(3, 20.0), test=0.2, tokenizer="words:40", public=12, public_labels=True, batch_size=7
    )
    assert same.split_hash == data.split_hash
    again = next(iter(same.client(0).train_loader(0)))
    assert all(torch.equal(batch[k], again[k]) for k in batch)


def test_a_public_set_of_texts_alone_and_of_its_own(tmp_path: Path) -> None:
    data = FederatedDataModule((TEXTS, LABELS), IID(1), test=(TEXTS, LABELS), tokenizer=WORDS, public=["a b", "d"])
    assert data.public_set is not None and data.public_set.labels is None
    assert data.public_set.inputs["input_ids"].tolist() == [[2, 4, 5, 3], [2, 7, 3, 0]]
    file = parquet(tmp_path / "p.parquet", text=["c", "d d"], label=[1, 0])
    labelled = FederatedDataModule(
        (TEXTS, LABELS), IID(1), test=0.5, tokenizer=WORDS, public=str(file), public_labels=True
    )
    assert labelled.public_set is not None and labelled.public_set.labels is not None
    assert labelled.public_set.inputs["input_ids"].tolist() == [[2, 6, 3, 0], [2, 7, 7, 3]]


def test_natural_partition_of_texts(tmp_path: Path) -> None:
    file = parquet(tmp_path / "x.parquet", text=TEXTS, label=LABELS, who=["u", "v", "u", "w"])
    data = FederatedDataModule(
        str(file), Natural(), partition_column="who", test=(TEXTS, LABELS), tokenizer=WORDS, test_batch_size=3
    )
    assert data.num_clients == 3 and data.client(0).train_rows.tolist() == [0, 2]
    assert [len(b["labels"]) for b in data.val_dataloader()] == [3, 1]


def test_a_token_cache_that_cannot_be_written_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_table, "CACHE_FROM", 3)
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="Tokens are not cached, since"):
        table = load_table((TEXTS, LABELS), options=Options(tokenizer=WORDS, cache_dir=tmp_path / "file"))
    assert rows(table) == EXPECTED


# ------------------------------------------------------- a user's own mappings


def records(**columns: list[Any]) -> Records:
    return Records([dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)])


PAIRED = [[2, 4, 3, 6, 3], [2, 5, 3, 7, 3]]


@pytest.mark.parametrize("names", [("question", "sentence"), ("premise", "hypothesis"), ("one", "two")])
def test_pairs_in_mappings(names: tuple[str, str]) -> None:
    source = records(**{names[0]: ["a", "b"], names[1]: ["c", "d"], "label": [0, 1], "who": ["z", "y"]})
    chosen = names if names[0] == "one" else None
    table = load_table(source, options=Options(tokenizer=WORDS, text_column=chosen, partition_column="who"))
    assert rows(table) == PAIRED and table.first.tolist() == [3, 3]
    assert table.labels.tolist() == [0, 1] and table.groups.tolist() == [1, 0]
    swapped = Options(tokenizer=WORDS, text_column=names[::-1], partition_column="who")
    assert rows(load_table(source, options=swapped)) == [[2, 6, 3, 4, 3], [2, 7, 3, 5, 3]]
    one = load_table(source, options=Options(tokenizer=WORDS, text_column=names[1], partition_column="who"))
    assert rows(one) == [[2, 6, 3], [2, 7, 3]] and one.first is None


def test_pairs_in_samples() -> None:
    assert rows(load_table(Records([(("a", "c"), 0), (("b", "d"), 1)]), options=O)) == PAIRED


def test_mappings_whose_text_cannot_be_told() -> None:
    with pytest.raises(ValueError, match=r"`text_column` to say which of \['foo', 'bar'\]"):
        load_table(records(foo=["a", "b"], bar=["c", "d"], label=[0, 1]), options=O)
    with pytest.raises(ValueError, match="`text_column` to be among the columns .* but got 'baz'"):
        load_table(records(foo=["a"], label=[0]), options=Options(tokenizer=WORDS, text_column=("foo", "baz")))
    with pytest.raises(ValueError, match="every sample to have 'text', but number 1 has"):
        load_table(Records([{"text": "a", "label": 0}, {"label": 1}]), options=O)
    image = load_table(records(image=[torch.zeros(1)] * 2, file=["x", "y"], label=[0, 1]))
    assert not isinstance(image, Texts)  # a string beside an image is no text


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_token_ids_in_mappings(kind: Any) -> None:
    ids = [[2, 4, 3], [2, 7, 7, 3, 9, 3], [2, 5, 3, 0, 0]]
    mask = [[1, 1, 1], [1] * 6, [1, 1, 1, 0, 0]]
    types = [[0] * 3, [0, 0, 0, 0, 1, 1], [0] * 5]
    columns = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    source = records(**{k: [kind(v) for v in values] for k, values in columns.items()}, label=["y", "x", "y"])
    table = load_table(source, options=Options(max_length=5))
    assert rows(table) == [[2, 4, 3], [2, 7, 7, 3, 3], [2, 5, 3]] and table.first.tolist() == [3, 4, 3]
    assert (table.vocab_size, table.labels.tolist(), table.class_names) == (10, [1, 0, 1], ("x", "y"))
    data = FederatedDataModule(source, IID(1), test=source, batch_size=3)
    batch = next(iter(data.client(0).train_loader(0)))
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert batch["input_ids"].shape == (3, 6)
    for wrong in (None, [0.5, 1.0], torch.ones(1, 4)):
        with pytest.raises(ValueError, match="a list of integers in every row of `input_ids`, but row 1 has"):
            load_table(records(input_ids=[[1], wrong], label=[0, 1]))


def test_rows_that_are_tokenised_already_are_cut(tmp_path: Path) -> None:
    ids = [[2, 10, 11, 12, 13, 14, 3, 0], [2, 3], [2, 10, 11, 3, 12, 13, 3], [2, 5, 6, 3]]
    mask = [[1] * 7 + [0], [1] * 2, [1] * 7, [1] * 4]
    types = [[0] * 8, [0] * 2, [0, 0, 0, 0, 1, 1, 1], [0] * 4]
    columns = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "label": [0, 1, 0, 1]}
    file = parquet(tmp_path / "x.parquet", **columns)
    table = load_table(file, options=Options(max_length=5))
    assert rows(table) == [[2, 10, 11, 12, 3], [2, 3], [2, 10, 11, 3, 3], [2, 5, 6, 3]]
    assert table.first is not None and table.first.tolist() == [5, 2, 4, 4] and table.max_length == 5
    assert rows(load_table(file, options=Options(max_length=7)))[2] == ids[2]


def test_the_vocabulary_is_that_of_every_set(tmp_path: Path) -> None:
    train = parquet(tmp_path / "a.parquet", input_ids=[[2, 5, 3], [2, 3]], label=[0, 1])
    test = parquet(tmp_path / "b.parquet", input_ids=[[2, 9, 3], [2, 3]], label=[0, 1])
    public = parquet(tmp_path / "c.parquet", input_ids=[[2, 11, 3], [2, 3]], label=[0, 1])
    data = FederatedDataModule(str(train), IID(1), test=str(test))
    assert data.vocab_size == 10 and "vocabulary 10" in data.summary()
    assert FederatedDataModule(str(train), IID(1), test=str(test), public=str(public)).vocab_size == 12
