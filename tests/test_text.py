"""Tokenisers: ours word by word, the light library's and transformers' alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from text_support import PIECES, fast_tokenizer, vocabulary

from dynfed_lightning.text import LightTokenizer, WordTokenizer, encode_batch, load_tokenizer

TEXTS = ["The film was good.", "A plot", "scenes"]
IDS = [[2, 11, 13, 17, 5, 20, 3], [2, 12, 14, 3], [2, 16, 19, 3]]  # places in PIECES


def test_words_by_count_then_alphabet_whatever_the_order() -> None:
    texts = ["b a", "A c!", "b"]
    made = WordTokenizer.train(texts, size=100)
    assert made.words == ["a", "b", "!", "c"] and made.vocab_size == 8
    assert WordTokenizer.train(reversed(texts), size=100).words == made.words
    assert WordTokenizer.train(texts, size=6).words == ["a", "b"]
    assert WordTokenizer.train(texts, lower=False).words == ["b", "!", "A", "a", "c"]
    row = made.encode(["C, b A?"])[0]
    assert row.ids == [2, 7, 1, 5, 4, 1, 3] and row.first == 7


@pytest.mark.parametrize(
    "a, b, length, ids, first",
    [
        ("a a a", "b", 20, [2, 4, 4, 4, 3, 5, 3], 5),
        ("a a a a a a", "b", 7, [2, 4, 4, 4, 3, 5, 3], 5),  # the longer one is cut
        ("a", "b b b b b b", 7, [2, 4, 3, 5, 5, 5, 3], 3),
        ("a a a a", "b b b b", 7, [2, 4, 4, 3, 5, 5, 3], 4),
        ("a a a a", "b b b b", 8, [2, 4, 4, 3, 5, 5, 5, 3], 4),
    ],
)
def test_word_pairs(a: str, b: str, length: int, ids: list[int], first: int) -> None:
    row = WordTokenizer(["a", "b"]).encode([a], [b], length)[0]
    assert (row.ids, row.first) == (ids, first)


def test_words_are_cut_saved_and_read_back(tmp_path: Path) -> None:
    made = WordTokenizer(["naïve", "b"], lower=False)
    assert made.encode(["b b b b b"], None, 4)[0] == ([2, 5, 5, 3], 4)
    read = load_tokenizer(made.save(tmp_path / "words.json"))
    assert isinstance(read, WordTokenizer) and (read.words, read.lower) == (made.words, False)
    assert read.fingerprint == made.fingerprint != WordTokenizer(["naïve", "b"]).fingerprint
    assert made.fingerprint != WordTokenizer(["b", "naïve"], lower=False).fingerprint
    with pytest.raises(ValueError, match="distinct"):
        WordTokenizer(["a", "a"])
    with pytest.raises(ValueError, match="`size` to be an integer of at least 5, but got 4"):
        WordTokenizer.train([], size=4)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="WordTokenizer.save wrote"):
        WordTokenizer.load(tmp_path / "other.json")


def test_words_of_the_training_texts_are_learned_once() -> None:
    made = load_tokenizer("words:6")
    with pytest.raises(ValueError, match="seen training texts first"):
        made.encode(["a"])
    made.fit(["a b", "a"])
    made.fit(["c c c c"])
    assert made.encode(["a c"])[0].ids == [2, 4, 1, 3] and made.vocab_size == 6
    assert made.fingerprint == WordTokenizer(["a", "b"]).fingerprint


@pytest.mark.parametrize("how", ["vocab.txt", "folder", "tokenizer.json", "object", "transformers"])
def test_bert_whatever_names_it(tmp_path: Path, how: str) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    file = vocabulary(tmp_path)
    source: Any = {"vocab.txt": file, "folder": str(tmp_path)}.get(how)
    if how == "transformers":
        source = fast_tokenizer(tmp_path)
    elif source is None:
        whole = tokenizers.implementations.BertWordPieceTokenizer({p: i for i, p in enumerate(PIECES)})
        whole.enable_truncation(2)  # the user's own settings have no say, and stay
        whole.save(str(tmp_path / "tokenizer.json"))
        source = tmp_path / "tokenizer.json" if how == "tokenizer.json" else whole._tokenizer
    made = load_tokenizer(source)
    assert [r.ids for r in made.encode(TEXTS)] == IDS
    assert (made.vocab_size, made.pad_token_id) == (len(PIECES), 0)
    assert made.encode(TEXTS, None, 5)[0] == ([2, 11, 13, 17, 3], 5)
    assert [r.ids for r in made.encode(TEXTS, None, 128)] == IDS  # the cut was that call's alone
    pair = made.encode(["a film"], ["the plot"])[0]
    assert pair.ids == [2, 12, 13, 3, 11, 14, 3] and pair.first == 4
    if how == "object":
        assert source.truncation["max_length"] == 2
    assert load_tokenizer(source).fingerprint == made.fingerprint
    batch = encode_batch(source, TEXTS[:2])
    assert batch["input_ids"].tolist() == [IDS[0], IDS[1] + [0, 0, 0]] and set(batch) == {"input_ids", "attention_mask"}
    assert batch["attention_mask"].tolist() == [[1] * 7, [1, 1, 1, 1, 0, 0, 0]]
    two = encode_batch(source, ["a film"], ["the plot"])
    assert two["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]


def test_case_is_what_the_folder_says(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    assert load_tokenizer(vocabulary(tmp_path, lower=False)).encode(["The plot"])[0].ids == [2, 1, 14, 3]


def test_a_folder_that_transformers_wrote(tmp_path: Path) -> None:
    """Read with the light library alone."""
    fast_tokenizer(tmp_path).save_pretrained(tmp_path)
    made = load_tokenizer(str(tmp_path))
    assert isinstance(made, LightTokenizer) and [r.ids for r in made.encode(TEXTS)] == IDS


def test_what_is_no_tokeniser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="`tokenizer` to be a name, a folder, .* but got int"):
        load_tokenizer(3)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad.json to be a tokeniser's JSON file"):
        load_tokenizer(tmp_path / "bad.json")
    pytest.importorskip("tokenizers")
    (tmp_path / "vocab.txt").write_text("a\nb\n[PAD]\n[UNK]\n")
    with pytest.raises(ValueError, match=r"it lacks \['\[CLS\]', '\[SEP\]'\]"):
        load_tokenizer(tmp_path / "vocab.txt")
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(ValueError, match=r"empty.json to be a tokeniser, but"):
        load_tokenizer(tmp_path / "empty.json")
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"'tokenizers' to be installed, .*\[text\]"):
        load_tokenizer(tmp_path / "vocab.txt")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ImportError, match=r"'transformers' to be installed, .*\[text\]"):
        load_tokenizer("some-name")


def test_an_unknown_name_says_what_is_expected(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="'no/such' is no path and could not be loaded"):
        load_tokenizer("no/such")


def whole_words(**options: Any) -> Any:
    """A fast tokeniser of transformers with words w0 to w9, ids 4 to 13."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(10))])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **{**special, **options})


LONG = " ".join(f"w{i}" for i in range(10))


def test_fingerprints_differ_where_ids_may() -> None:
    given = whole_words()
    right, left = load_tokenizer(given), load_tokenizer(whole_words(truncation_side="left"))
    before = right.fingerprint
    assert right.encode([LONG], None, 5)[0].ids == [2, 4, 5, 6, 3]
    assert left.encode([LONG], None, 5)[0].ids == [2, 11, 12, 13, 3]
    assert before == right.fingerprint  # a call sets the backend's truncation
    assert given(["w1", "w1 w2"], padding=True)["input_ids"] and right.fingerprint == before
    assert before == load_tokenizer(whole_words()).fingerprint != left.fingerprint
    given.truncation_side = "left"  # after it was made
    assert right.fingerprint != before
    given.truncation_side = "right"
    assert right.fingerprint == before
    given.add_special_tokens({"additional_special_tokens": ["w3 w4"]})
    assert right.fingerprint != before


def test_tokenisers_in_python_are_told_apart_by_their_merges(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    class Halves(transformers.PreTrainedTokenizer):  # what a user may bring
        def __init__(self, merges: str, **options: Any) -> None:
            self.merges = merges
            super().__init__(**options)

        vocab_size = 4

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 1, "ab": 2, "ba": 3}

        def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
            file = Path(save_directory) / "merges.txt"
            file.write_text(self.merges)
            return (str(file),)

    class Silent(Halves):
        def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
            raise NotImplementedError

    for kind in (Halves, Silent):
        one, same, other = (load_tokenizer(kind(m)).fingerprint for m in ("a b", "a b", "b a"))
        assert one == same != other, kind


def test_the_light_library_keeps_which_end_is_cut() -> None:
    backend = whole_words().backend_tokenizer
    plain = load_tokenizer(backend)
    backend.enable_truncation(3, direction="left")
    left = load_tokenizer(backend)
    assert plain.encode([LONG], None, 5)[0].ids == [2, 4, 5, 6, 3]
    assert left.encode([LONG], None, 5)[0].ids == [2, 11, 12, 13, 3]
    assert plain.fingerprint != left.fingerprint and backend.truncation["max_length"] == 3


def test_pieces_are_lines_and_nothing_else(tmp_path: Path) -> None:
    """U+2028, U+0085 and the like are pieces of real vocabularies, and no ends of lines."""
    pytest.importorskip("tokenizers")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "\u2028", "\x85", "good", "film"]
    (tmp_path / "vocab.txt").write_bytes("\n".join(pieces).encode())
    without = load_tokenizer(tmp_path / "vocab.txt")
    assert without.encode(["good film"])[0].ids == [2, 6, 7, 3] and without.vocab_size == 8
    (tmp_path / "vocab.txt").write_bytes("\n".join(pieces).encode() + b"\n")
    assert load_tokenizer(tmp_path / "vocab.txt").fingerprint == without.fingerprint


def test_words_keep_their_marks() -> None:
    hindi = "\u0939\u093f\u0928\u094d\u0926\u0940"
    assert WordTokenizer.train([f"{hindi}, {hindi}!"]).words == [hindi, "!", ","]
    apart, composed = "cafe\u0301", "caf\u00e9"
    made = WordTokenizer.train([apart])
    assert made.words == [composed] == WordTokenizer([apart]).words
    assert made.encode([apart, composed, "CAFE\u0301"])[0].ids == [2, 4, 3] == made.encode([composed.upper()])[0].ids


def test_vocabularies_of_the_old_splitting_are_refused(tmp_path: Path) -> None:
    file = WordTokenizer(["a"]).save(tmp_path / "words.json")
    file.write_text(file.read_text().replace('"version": 2', '"version": 1'))
    with pytest.raises(ValueError, match="of version 2, but got version 1, .*: train and save it again"):
        load_tokenizer(file)


def test_lengths_and_strings_that_cannot_be_meant() -> None:
    made = WordTokenizer(["a", "b"])
    assert made.encode(["a b"], None, 2)[0] == ([2, 3], 2) and made.encode(["a"], ["b"], 3)[0] == ([2, 3, 3], 2)
    with pytest.raises(ValueError, match="`max_length` to be an integer of at least 2, but got 1"):
        made.encode(["a b"], None, 1)
    with pytest.raises(ValueError, match="`max_length` to be an integer of at least 3, but got 2"):
        made.encode(["a b"], ["a"], 2)
    with pytest.raises(TypeError, match="`texts` to be a list of strings, but got a string: 'a b'"):
        encode_batch(made, "a b")
    with pytest.raises(TypeError, match="`pairs` to be a list of strings, but got a string: 'ab'"):
        encode_batch(made, ["a", "b"], "ab")
    with pytest.raises(ValueError, match="as many `pairs` as `texts`, but got 2 and 1"):
        encode_batch(made, ["a"], ["a", "b"])
