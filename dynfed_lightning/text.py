"""Tokenisers: Hugging Face's, a vocabulary file through the light `tokenizers` library, or a word-level one of our own.

Whatever is given, the rest of the package sees a `TextTokenizer`: rows of ids, the size of the vocabulary, and a fingerprint
under which tokenised text is cached.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tempfile
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynfed_lightning.images import missing
from dynfed_lightning.partition import check_int

_FORMAT, _FORMAT_VERSION = "dynfed words", 2  # 2: words keep their combining marks
# What can be changed on a tokeniser of transformers after it was made, and changes its ids.
_SETTINGS = (
    "truncation_side",
    "special_tokens_map",
    "added_tokens_decoder",
    "model_input_names",
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "do_lower_case",
    "split_special_tokens",
)
_PADS = ("[PAD]", "<pad>", "<|endoftext|>", "</s>")


class Row(NamedTuple):
    """One tokenised text or pair: its `ids`, and how many of the first of them have token type 0 (all, in a single text)."""

    ids: list[int]
    first: int


class TextTokenizer(ABC):
    """What turns text into ids.

    Attributes:
        vocab_size: ids are below it; a model needs at least as many embeddings.
        pad_token_id: what rows are padded with.
    """

    vocab_size: int
    pad_token_id: int

    @abstractmethod
    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None, max_length: int = 128) -> list[Row]:
        """Ids of every text (with its pair), special tokens included, cut to at most `max_length`."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digits that differ where `encode` may."""

    def fit(self, texts: Iterable[str]) -> None:  # noqa: B027
        """Learn from the training texts, before the first of them is encoded; most have nothing to learn."""


class WordTokenizer(TextTokenizer):
    """Words and punctuation marks as ids; needs nothing but Python.

    A text becomes ``[CLS] w1 w2 ... [SEP]``, a pair ``[CLS] a ... [SEP] b ... [SEP]``; a word that is not in the vocabulary is
    ``[UNK]``. Ids 0 to 3 are ``[PAD] [UNK] [CLS] [SEP]``. Text is brought into Unicode's composed form (NFC), and combining
    marks, such as the vowel signs of Hindi, belong to the word they stand in.

    Args:
        words: the vocabulary without the special tokens, in order.
        lower: whether case is ignored.

    >>> tokenizer = WordTokenizer.train(["A fine film.", "A dull film."], size=8)
    >>> tokenizer.words
    ['.', 'a', 'film', 'dull']
    >>> tokenizer.encode(["a fine film"])[0].ids
    [2, 5, 1, 6, 3]
    """

    SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")

    def __init__(self, words: Sequence[str], lower: bool = True) -> None:
        self.words, self.lower = [unicodedata.normalize("NFC", w) for w in words], bool(lower)
        self._ids = {w: i for i, w in enumerate(self.words, len(self.SPECIAL))}
        if len(self._ids) != len(self.words):
            raise ValueError("Expected `words` to be distinct, but some are there twice.")
        self.vocab_size, self.pad_token_id = len(self.words) + len(self.SPECIAL), 0

    @classmethod
    def train(cls, texts: Iterable[str], size: int = 8000, lower: bool = True) -> WordTokenizer:
        """The most frequent words of `texts`; equal counts in alphabetical order, so that the order of texts has no influence.

        Args:
            texts: any number of strings, read once.
            size: of the vocabulary, the four special tokens included; fewer where there are not so many words.
            lower: see `WordTokenizer`.
        """
        check_int("size", size, len(cls.SPECIAL) + 1)
        counts = Counter(word for text in texts for word in _words(text, lower))
        ordered = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(ordered[: size - len(cls.SPECIAL)], lower)

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None, max_length: int = 128) -> list[Row]:
        """See `TextTokenizer.encode`; of a pair the longer text is cut first.

        Raises:
            ValueError: `max_length` has no room for the special tokens: 2 of a text, 3 of a pair.
        """
        check_int("max_length", max_length, 2 if pairs is None else 3)
        rows = []
        for i, text in enumerate(texts):
            a = [self._ids.get(w, 1) for w in _words(text, self.lower)]
            if pairs is None:
                rows.append(Row([2, *a[: max_length - 2], 3], min(len(a), max_length - 2) + 2))
                continue
            b = [self._ids.get(w, 1) for w in _words(pairs[i], self.lower)]
            room = max_length - 3
            if len(a) + len(b) > room:
                half = room // 2
                keep = max(half, room - len(b)) if len(a) > half else len(a)
                a, b = a[:keep], b[: room - min(keep, len(a))]
            rows.append(Row([2, *a, 3, *b, 3], len(a) + 2))
        return rows

    @property
    def fingerprint(self) -> str:
        return _digest(self._json())

    def _json(self) -> str:
        return json.dumps(
            {"format": _FORMAT, "version": _FORMAT_VERSION, "lower": self.lower, "words": self.words},
            ensure_ascii=False,
        )

    def save(self, path: str | Path) -> Path:
        """Write the vocabulary as JSON; `load_tokenizer` reads it."""
        path = Path(path)
        path.write_text(self._json(), encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> WordTokenizer:
        """Read what `save` wrote.

        Raises:
            ValueError: another kind of file, or one of an older version, which split words in another way.
        """
        found = _json_of(Path(path))
        if found.get("format") == _FORMAT and found.get("version") != _FORMAT_VERSION:
            raise ValueError(
                f"Expected {path} to be a vocabulary of version {_FORMAT_VERSION}, but got version "
                f"{found.get('version')}, whose words were split differently: train and save it again."
            )
        if found.get("format") != _FORMAT:
            raise ValueError(
                f"Expected {path} to be a vocabulary that WordTokenizer.save wrote, but it is another file."
            )
        return cls(found["words"], found["lower"])


class _LearnedWords(TextTokenizer):
    """``"words:8000"``: a `WordTokenizer` of the training set's texts."""

    pad_token_id = 0

    def __init__(self, size: int) -> None:
        self.size = self.vocab_size = check_int("size", size, len(WordTokenizer.SPECIAL) + 1)
        self.words: WordTokenizer | None = None

    def fit(self, texts: Iterable[str]) -> None:
        if self.words is None:
            self.words = WordTokenizer.train(texts, self.size)
            self.vocab_size = self.words.vocab_size

    def _learned(self) -> WordTokenizer:
        if self.words is None:
            raise ValueError(
                f"Expected the tokenizer 'words:{self.size}' to have seen training texts first, but it has not."
            )
        return self.words

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None, max_length: int = 128) -> list[Row]:
        return self._learned().encode(texts, pairs, max_length)

    @property
    def fingerprint(self) -> str:
        return self._learned().fingerprint


class LightTokenizer(TextTokenizer):
    """A tokeniser of the `tokenizers` library; a copy of it, so that no setting of the user's is changed.

    Of the user's truncation the direction is kept: which end of a long text is cut off.

    Args:
        tokenizer: a ``tokenizers.Tokenizer``; its post-processor adds the special tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        own = type(tokenizer).from_str(tokenizer.to_str())
        own.no_padding()
        own.no_truncation()
        own.encode_special_tokens = tokenizer.encode_special_tokens  # not in the string
        self._direction = (tokenizer.truncation or {}).get("direction", "right")
        self._text, self._tokenizer, self._length = own.to_str(), own, 0
        self.vocab_size = max(own.get_vocab(with_added_tokens=True).values()) + 1
        padding = tokenizer.padding
        pads = [own.token_to_id(t) for t in _PADS if own.token_to_id(t) is not None]
        self.pad_token_id = padding["pad_id"] if padding else pads[0] if pads else 0

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None, max_length: int = 128) -> list[Row]:
        """See `TextTokenizer.encode`."""
        if self._length != max_length:
            self._tokenizer.enable_truncation(max_length, direction=self._direction)
            self._length = max_length
        rows = self._tokenizer.encode_batch(list(texts) if pairs is None else list(zip(texts, pairs, strict=True)))
        return [Row(r.ids, len(r.ids) if pairs is None else _zeros(r.type_ids)) for r in rows]

    @property
    def fingerprint(self) -> str:
        return _digest(f"{self._direction} {self._tokenizer.encode_special_tokens} {self._text}")


class HubTokenizer(TextTokenizer):
    """A tokeniser of the `transformers` library, as it is.

    Args:
        tokenizer: a ``PreTrainedTokenizer`` or ``PreTrainedTokenizerFast``.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = max(len(tokenizer), max(tokenizer.get_vocab().values(), default=0) + 1)
        pad = tokenizer.pad_token_id
        self.pad_token_id = 0 if pad is None else int(pad)
        self._types = "token_type_ids" in tokenizer.model_input_names

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None, max_length: int = 128) -> list[Row]:
        """See `TextTokenizer.encode`."""
        options = {"truncation": True, "max_length": max_length, "padding": False, "return_attention_mask": False}
        both = (list(texts),) if pairs is None else (list(texts), list(pairs))
        out = self.tokenizer(*both, **options)
        types = out.get("token_type_ids") if pairs is not None else None
        return [
            Row(list(ids), len(ids) if types is None else _zeros(types[i])) for i, ids in enumerate(out["input_ids"])
        ]

    @property
    def fingerprint(self) -> str:
        given = self.tokenizer
        backend = getattr(given, "backend_tokenizer", None)
        told: Any
        if backend is None:
            told = [sorted(given.get_vocab().items()), _vocabulary_files(given)]
        else:
            # Every call sets the backend's truncation and padding: what is left of the last one must not count.
            told = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
        settings = {k: v for k, v in given.init_kwargs.items() if k != "name_or_path" and not k.endswith("_file")}
        also = {name: getattr(given, name, None) for name in _SETTINGS}
        return _digest(json.dumps(_plain([type(given).__name__, settings, also, told]), sort_keys=True))


def load_tokenizer(source: Any) -> TextTokenizer:
    """A tokeniser from whatever names one.

    Args:
        source: a `TextTokenizer`; a tokeniser object of `transformers` or of `tokenizers`; a folder with ``tokenizer.json`` or
            ``vocab.txt``; such a file, or one that `WordTokenizer.save` wrote; ``"words"`` or ``"words:8000"``, a
            `WordTokenizer` of that size made of the training texts; or a name on the public hub. Nothing local touches the
            network.

    Raises:
        ValueError: nothing of that name, or a file that is no vocabulary.
        TypeError: another kind of object.
        ImportError: a library of the extra ``text`` is missing.
    """
    if isinstance(source, TextTokenizer):
        return source
    if isinstance(source, str | Path):
        learned = re.fullmatch(r"words(?::(\d+))?", str(source))
        if learned and not Path(source).exists():
            return _LearnedWords(int(learned[1] or 8000))
        return _from_path(Path(source)) if Path(source).exists() else _from_hub(str(source))
    if callable(source) and hasattr(source, "model_input_names"):
        return HubTokenizer(source)
    if hasattr(source, "encode_batch") and hasattr(source, "to_str"):
        return LightTokenizer(source)
    raise TypeError(
        "Expected `tokenizer` to be a name, a folder, a vocabulary file or a tokeniser of transformers or tokenizers, "
        f"but got {type(source).__name__}."
    )


def pad_rows(rows: Sequence[Row], pad_token_id: int, types: bool) -> dict[str, Tensor]:
    """Rows as a batch: ``input_ids``, ``attention_mask`` and, with `types`, ``token_type_ids``, int64 ``[B, T]``."""
    length = max((len(r.ids) for r in rows), default=0)
    ids = torch.full((len(rows), length), pad_token_id)
    mask, kinds = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids, dtype=torch.int64)
        mask[i, : len(row.ids)] = 1
        kinds[i, row.first : len(row.ids)] = 1
    return {"input_ids": ids, "attention_mask": mask} | ({"token_type_ids": kinds} if types else {})


def encode_batch(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None = None, max_length: int = 128
) -> dict[str, Tensor]:
    """A few texts as a model takes them, to predict with a trained model.

    Args:
        tokenizer: see `load_tokenizer`.
        texts: B strings.
        pairs: the second sentences, where there are any.
        max_length: cut longer rows to so many tokens.

    Returns:
        ``input_ids`` and ``attention_mask``, for pairs ``token_type_ids`` too, int64 ``[B, T]``.

    Raises:
        TypeError: a string where a list of them is expected.
        ValueError: another number of pairs than of texts.
    """
    for name, values in (("texts", texts), ("pairs", pairs)):
        if isinstance(values, str):
            raise TypeError(f"Expected `{name}` to be a list of strings, but got a string: {values[:40]!r}.")
    if pairs is not None and len(pairs) != len(texts):
        raise ValueError(f"Expected as many `pairs` as `texts`, but got {len(pairs)} and {len(texts)}.")
    own = load_tokenizer(tokenizer)
    return pad_rows(own.encode(texts, pairs, max_length), own.pad_token_id, pairs is not None)


def _words(text: str, lower: bool) -> list[str]:
    text = text.lower() if lower else text
    if text.isascii():
        return re.findall(r"\w+|[^\w\s]", text)
    return _any_script().findall(unicodedata.normalize("NFC", text))


@cache
def _any_script() -> re.Pattern[str]:
    r"""Words and single other characters. ``\w`` has no combining marks (Mn, Mc), which would tear words apart."""
    marks = [chr(c) for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)) in ("Mn", "Mc")]
    return re.compile(rf"\w[\w{re.escape(''.join(marks))}]*|[^\w\s]")


def _plain(value: Any) -> Any:
    """As JSON can say it, without any object's address."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return sorted(map(str, value)) if isinstance(value, set | frozenset) else [_plain(v) for v in value]
    if value is None or isinstance(value, str | int | float):
        return value
    return repr(value) if hasattr(value, "content") else type(value).__name__  # an AddedToken with its flags


def _vocabulary_files(tokenizer: Any) -> Any:
    """Of a tokeniser in Python what it saves, such as merges or a SentencePiece model; else its attributes."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer.save_vocabulary(folder)
        except (NotImplementedError, AttributeError, OSError, TypeError, ValueError):
            return _plain(vars(tokenizer))
        files = sorted(f for f in Path(folder).rglob("*") if f.is_file())
        return [(f.name, hashlib.sha256(f.read_bytes()).hexdigest()) for f in files]


def _zeros(types: Sequence[int]) -> int:
    return next((i for i, kind in enumerate(types) if kind), len(types))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _json_of(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"Expected {file} to be a tokeniser's JSON file, but: {error}") from None
    return found if isinstance(found, dict) else {}


def _from_path(path: Path) -> TextTokenizer:
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        inside = [path / name for name in ("tokenizer.json", "vocab.txt") if (path / name).is_file()]
        if not inside:
            return _from_hub(str(path))  # such as a byte-pair vocabulary in two files, which transformers puts together
        path = inside[0]
    if path.suffix == ".json" and _json_of(path).get("format") == _FORMAT:
        return WordTokenizer.load(path)
    try:
        import tokenizers
    except ImportError:
        raise missing("tokenizers", "text") from None
    if path.suffix == ".json":
        try:
            return LightTokenizer(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises plain Exceptions
            raise ValueError(f"Expected {path} to be a tokeniser, but: {error}") from None
    return _word_pieces(path, folder / "tokenizer_config.json")


def _word_pieces(file: Path, config: Path) -> TextTokenizer:
    """BERT's tokeniser over a ``vocab.txt``, one piece a line; lower case unless the configuration beside it says otherwise."""
    from tokenizers.implementations import BertWordPieceTokenizer

    pieces = file.read_text(encoding="utf-8").split("\n")  # other line separators, such as U+2028, are pieces
    if not pieces[-1]:
        pieces.pop()
    lacking = [t for t in WordTokenizer.SPECIAL if t not in pieces]
    if lacking:
        raise ValueError(
            f"Expected {file} to be BERT's vocabulary with {list(WordTokenizer.SPECIAL)}, but it lacks {lacking}."
        )
    lower = bool(_json_of(config).get("do_lower_case", True)) if config.is_file() else True
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    return LightTokenizer(BertWordPieceTokenizer(vocabulary, lowercase=lower)._tokenizer)


def _from_hub(name: str) -> TextTokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise missing("transformers", "text") from None
    try:
        return HubTokenizer(AutoTokenizer.from_pretrained(name, local_files_only=Path(name).exists()))
    except Exception as error:  # the hub's client raises a dozen kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"Expected `tokenizer` to be a folder, a vocabulary file or a name on the hub, but {name!r} is no path and could "
            f"not be loaded: {reason}"
        ) from error
