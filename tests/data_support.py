"""What the tests of the data layer share: rows that say which they are, and small datasets of a user's own."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset

from dynfed_lightning.data import FederatedDataModule
from dynfed_lightning.partition import IID


def numbered(n: int = 200, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs ``[n, 1]`` that say which row they are, and labels."""
    return torch.arange(float(n))[:, None], torch.arange(n) % classes


def module(n: int = 200, clients: int = 5, **options: Any) -> FederatedDataModule:
    partitioner = options.pop("partitioner", IID(clients))
    return FederatedDataModule(numbered(n), partitioner, **{"test": numbered(40), "batch_size": 8, **options})


def rows(loader: Any) -> list[int]:
    return [int(v) for x, _ in loader for v in x.flatten()]


class Pairs(Dataset):
    """Samples ``(x, y)`` read one by one."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Any:
        return torch.tensor([float(i)]), i % 3


class Records(Dataset):
    def __init__(self, records: list[dict[str, Any]]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.records[i]
