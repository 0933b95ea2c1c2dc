"""What the tests of text share: sentences whose class a word decides, and vocabularies of real tokenisers, made on the spot."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

GOOD, BAD = ("good", "fine", "great"), ("bad", "dull", "awful")
FILLER = ("the", "a", "film", "plot", "actor", "scene", "was", "it")
PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *FILLER, "##s", ".")


def sentences(n: int = 60, seed: int = 0) -> tuple[list[str], list[int]]:
    """Sentences of 2 to 9 words, and their labels: the last word's."""
    draw = random.Random(seed)
    labels = [i % 2 for i in range(n)]
    return [
        " ".join([*draw.choices(FILLER, k=draw.randint(1, 8)), draw.choice((BAD, GOOD)[label])]) for label in labels
    ], labels


def vocabulary(folder: Path, lower: bool = True) -> Path:
    """BERT's ``vocab.txt`` of `PIECES`."""
    file = folder / "vocab.txt"
    file.write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
    return file


def fast_tokenizer(folder: Path) -> Any:
    """The same as a tokeniser of transformers."""
    transformers = pytest.importorskip("transformers")
    return transformers.BertTokenizerFast(vocab={p: i for i, p in enumerate(PIECES)})
