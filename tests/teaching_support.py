"""Cases that the tests of the teacher policies share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dynfed_lightning.teaching import TeacherContext

# Three clients, two samples, two classes.
TINY = torch.tensor(
    [[[0.9, 0.1], [0.5, 0.5]], [[0.6, 0.4], [0.2, 0.8]], [[0.3, 0.7], [0.99, 0.01]]], dtype=torch.float64
)
COUNTS = torch.tensor([[3, 0], [1, 1], [0, 2]])


def context(k: int = 3, **changes: Any) -> TeacherContext:
    return TeacherContext(**{"num_examples": torch.ones(k), **changes})


def random_case(seed: int, k: int = 7, n: int = 23, c: int = 4) -> tuple[Tensor, TeacherContext]:
    g = torch.Generator().manual_seed(seed)
    probs = (3 * torch.randn(k, n, c, generator=g, dtype=torch.float64)).softmax(-1)
    counts = torch.randint(0, 9, (k, c), generator=g)
    counts[:, 1] = 0  # nobody has class 1
    ctx = TeacherContext(
        num_examples=torch.randint(1, 50, (k,), generator=g),
        bits=torch.randint(2, 9, (k,), generator=g),
        label_counts=counts,
        student_probs=torch.randn(n, c, generator=g, dtype=torch.float64).softmax(-1),
        losses=torch.rand(k, generator=g),
        generator=g,
        batch_size=5,
    )
    return probs, ctx


def close(actual: Tensor, expected: object, atol: float = 1e-9) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), atol=atol, rtol=0)
