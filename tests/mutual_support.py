"""A toy of two models with hidden states and attention maps, and batches of tokens, for tests of mutual distillation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dynfed_lightning import ClientModule

WORDS, LENGTH, CLASSES = 11, 5, 3


class TinyTransformer(nn.Module):
    """One attention of `heads` heads a layer, nothing else: what it returns has the form of a Hugging Face output."""

    def __init__(self, layers: int = 2, hidden: int = 4, heads: int = 2, seed: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(WORDS, hidden)
            self.queries = nn.ModuleList(nn.Linear(hidden, hidden * heads) for _ in range(layers))
            self.mix = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))
            self.head = nn.Linear(hidden, CLASSES)
        self.dropout = nn.Dropout(dropout)
        self.heads = heads

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        x = self.embedding(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        states, maps = [x], []
        for query, mix in zip(self.queries, self.mix, strict=True):
            q = query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            scores = q @ x.unsqueeze(1).transpose(-1, -2)
            weights = scores.masked_fill(mask[:, None, None, :] == 0, -1e9).softmax(-1)
            x = self.dropout(torch.tanh(mix((weights @ x.unsqueeze(1)).mean(1)) + x))
            states.append(x)
            maps.append(weights)
        pooled = (x * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        return SimpleNamespace(logits=self.head(pooled), hidden_states=tuple(states), attentions=tuple(maps))


class Sentences(Dataset):
    """`n` rows of up to 5 tokens; the label is what the first token is modulo 3."""

    def __init__(self, n: int = 24, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(1, WORDS, (n, LENGTH), generator=g)
        lengths = torch.randint(2, LENGTH + 1, (n,), generator=g)
        self.mask = (torch.arange(LENGTH) < lengths[:, None]).long()
        self.ids = self.ids * self.mask
        self.labels = self.ids[:, 0] % CLASSES

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.ids[i], "attention_mask": self.mask[i], "labels": int(self.labels[i])}


def sentences(n: int = 24, batch_size: int = 8) -> DataLoader:
    return DataLoader(Sentences(n), batch_size)  # type: ignore[arg-type]


def text_module(
    layers: int = 2, hidden: int = 4, *, seed: int = 0, dropout: float = 0.0, **kwargs: Any
) -> ClientModule:
    """A `ClientModule` around a `TinyTransformer`."""
    heads = kwargs.pop("heads", 2)
    return ClientModule(TinyTransformer(layers, hidden, heads, seed, dropout), **{"lr": 0.1, **kwargs})
