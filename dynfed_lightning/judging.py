"""Who is judged on what: the global model or the clients' own, on the whole test set or on each client's own part of it.

Clients' own models are made, judged and thrown away a block at a time, so that a thousand of them need the memory of a few.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import lightning as L
import numpy as np
import torch

from dynfed_lightning.evaluation import Evaluator, Score, own_sets, whole_set
from dynfed_lightning.seeds import derive_seed
from dynfed_lightning.split import OwnTest

WAYS = ("whole", "own", "both")
BLOCK = 256 << 20  # bytes of clients' own models that are judged side by side; one always is


def check_way(evaluate_on: str, evaluate_clients: int | None) -> None:
    """Refuse what `Judge` cannot do.

    Raises:
        ValueError: naming the argument.
    """
    if evaluate_on not in WAYS:
        raise ValueError(f"Expected `evaluate_on` to be 'whole', 'own' or 'both', but got {evaluate_on!r}.")
    wrong = isinstance(evaluate_clients, bool) or not isinstance(evaluate_clients, int) or evaluate_clients < 1
    if evaluate_clients is not None and wrong:
        raise ValueError(f"Expected `evaluate_clients` to be a positive integer or None, but got {evaluate_clients!r}.")


def sample_clients(num_clients: int, number: int | None, seed: int) -> Sequence[int]:
    """The sorted ids of the clients that are judged: all, or so many that `seed` alone decides on."""
    if number is None or number >= num_clients:
        return range(num_clients)
    return sorted(random.Random(derive_seed(seed, "evaluate")).sample(range(num_clients), number))


class Judge:
    """Judges the models of one run, round after round.

    Args:
        num_classes: C; None or 0: nothing is judged.
        own: the clients' own test distributions.
        clients: the ids of the clients to be judged.
        way: ``"whole"``: on the whole test set; ``"own"``: clients' own models only on rows of their own distributions;
            ``"both"``.

    Attributes:
        own_accuracy: client -> accuracy on its own test distribution, as last judged; without the clients that had no row.
    """

    def __init__(self, num_classes: int | None, own: OwnTest, clients: Sequence[int], way: str) -> None:
        self.clients, self.way = clients, way
        self.own_accuracy: dict[int, float] = {}
        self._shares: _Shares | None = None
        groups = (None, 1) if way == "whole" else (own.groups, own.num_groups)
        self._own = own
        self._evaluator = Evaluator(num_classes, *groups)
        self._global = Evaluator(num_classes)
        self._make: Callable[[int], L.LightningModule] | None = None
        self._reports_global = False
        self._block: list[int] = []
        self._todo: deque[int] = deque()
        self._scores: list[Score] = []
        self._batches = 0

    def start_global(self, module: L.LightningModule) -> None:
        """Begin a pass over the test set with the global model, which every client uses."""
        self._make, self._reports_global = None, False
        self._evaluator.start(module)

    def start_own(self, make: Callable[[int], L.LightningModule], also: L.LightningModule | None = None) -> None:
        """Begin a pass with the clients' own models.

        Args:
            make: a client's model, on the device it is to be judged on.
            also: the global model, to be judged on the whole test set beside them.
        """
        self._make, self._reports_global = make, also is not None
        self.own_accuracy, self._scores, self._todo, self._batches = {}, [], deque(self.clients), 0
        if not self._evaluator.num_classes:
            return
        if also is not None:
            self._global.start(also)
        self._next()

    def _next(self) -> None:
        """Make the next clients' models, as many as go into a block."""
        assert self._make is not None
        models: list[L.LightningModule] = []
        size, self._block = 0, []
        while self._todo and (not models or size < BLOCK):
            self._block.append(self._todo.popleft())
            models.append(self._make(self._block[-1]))
            size += sum(t.numel() * t.element_size() for t in (*models[-1].parameters(), *models[-1].buffers()))
        only = None
        if self.way == "own":
            only = torch.zeros(len(models), self._own.num_groups, dtype=torch.bool)
            for i, k in enumerate(self._block):
                only[i, self._own.shares(k)[0]] = True
        self._evaluator.start(models, only)

    def update(self, batch: Any) -> None:
        """Judge the global model, or the first block of clients, on one batch of the test set."""
        if not self._evaluator.num_classes:
            return
        self._batches += 1
        self._evaluator.update(batch)
        if self._reports_global:
            self._global.update(batch)

    def finish(self, batches: Callable[[], Iterable[Any]]) -> dict[str, float]:
        """Judge who is left and say how it went.

        Args:
            batches: the batches of the test set once more, from the first one on.

        Returns:
            what to log, by name.
        """
        if not self._evaluator.num_classes:
            return {}
        if self._make is None:
            (score,) = self._evaluator.scores()
            return {**whole_set([score], single=True), **self._judge_all(score)}
        self._settle()
        while self._todo:
            self._next()
            for batch in islice(batches(), self._batches):
                self._evaluator.update(batch)
            self._settle()
        self._make = None
        values = whole_set(self._scores, single=False) if self.way != "own" else {}
        values |= own_sets(list(self.own_accuracy.values()))
        for name, value in self._global.compute().items() if self._reports_global else ():
            values[f"global_{name.removeprefix('test_')}"] = value
        return values

    def _settle(self) -> None:
        """Keep of a block's models what they got right."""
        for k, score in zip(self._block, self._evaluator.scores(), strict=True):
            if self.way != "whole":
                self._keep([k], _Shares(self._own, [k]).mean(score))
                score.right = score.rows = score.right[:0]  # of a group for every client they would be N x N
            self._scores.append(score)

    def _judge_all(self, score: Score) -> dict[str, float]:
        """One model on the own test distribution of every client."""
        if self.way == "whole":
            return {}
        if self._shares is None:
            self._shares = _Shares(self._own, self.clients)
        self.own_accuracy = {}
        self._keep(self.clients, self._shares.mean(score))
        return own_sets(list(self.own_accuracy.values()))

    def _keep(self, clients: Sequence[int], accuracies: np.ndarray) -> None:
        self.own_accuracy.update((k, float(a)) for k, a in zip(clients, accuracies, strict=True) if np.isfinite(a))


class _Shares:
    """The clients' own test distributions in one sparse matrix."""

    def __init__(self, own: OwnTest, clients: Sequence[int]) -> None:
        pairs = [own.shares(k) for k in clients]
        self._groups = torch.cat([g for g, _ in pairs]).numpy()
        self._shares = torch.cat([s for _, s in pairs]).numpy()
        self._client = np.repeat(np.arange(len(pairs)), [len(g) for g, _ in pairs])
        self._number = len(pairs)

    def mean(self, score: Score) -> np.ndarray:
        """float64 ``[clients]``: ``sum_g p_k(g) acc(g)`` over the groups that have rows, with shares that sum to 1 over these.

        NaN for a client none of whose groups has rows.
        """
        accuracy = score.group_accuracy().numpy()[self._groups]
        there = np.isfinite(accuracy)
        share, client = self._shares[there], self._client[there]
        total = np.bincount(client, share, minlength=self._number)
        right = np.bincount(client, share * accuracy[there], minlength=self._number)
        return np.divide(right, total, out=np.full(self._number, np.nan), where=total > 0)
