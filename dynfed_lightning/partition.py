"""Who gets which rows: partitioners from labels (or a column's values) to one index tensor a client.

Every partitioner uses every row exactly once, gives every client at least one row, and is a function of its input and
its seed alone: it never touches torch's or numpy's global generators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynfed_lightning.seeds import derive_seed


def numpy_generator(*key: int | str) -> np.random.Generator:
    """A numpy generator whose stream depends on every part of `key` and on nothing else."""
    return np.random.default_rng(derive_seed(*key))


def torch_generator(*key: int | str) -> torch.Generator:
    """A CPU torch generator whose stream depends on every part of `key` and on nothing else."""
    return torch.Generator().manual_seed(derive_seed(*key))


def check_int(name: str, value: Any, low: int) -> int:
    """`value` as an ``int`` of at least `low`; a ``ValueError`` that names the argument otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low:
        raise ValueError(f"Expected `{name}` to be an integer of at least {low}, but got {value!r}.")
    return int(value)


def stratified_order(labels: Tensor | np.ndarray, *key: int | str) -> np.ndarray:
    """A random order of the rows of which every prefix and suffix holds each class in its share, give or take a row.

    Args:
        labels: integers, shape ``[n]``.
        key: what the order depends on: any integers and words.

    Returns:
        int64 ``[n]``, a permutation of the rows.
    """
    values, rng = np.asarray(labels), numpy_generator("stratify", *key)
    place = np.empty(len(values))
    for c in np.unique(values):
        rows = np.flatnonzero(values == c)
        # The class's rows, shuffled, spread evenly over [0, 1) from a random start.
        place[rng.permutation(rows)] = (np.arange(len(rows)) + rng.random()) / len(rows)
    return np.argsort(place, kind="stable")


class Partitioner:
    """Base class: call it with labels and a seed, get one sorted int64 index tensor a client.

    Attributes:
        num_clients: how many clients there will be; ``None`` where only the data can tell (`Natural`).
    """

    num_clients: int | None = None

    def __call__(self, labels: Tensor | np.ndarray | Sequence[int], seed: int = 0) -> list[Tensor]:
        """Deal the rows.

        Args:
            labels: integer class (for `Natural`: the column's values) of every row, shape ``[n]``.
            seed: any integer.

        Returns:
            ``num_clients`` int64 tensors, disjoint, sorted, together ``0..n-1``.

        Raises:
            ValueError: labels of a wrong shape or type, or a client that cannot be given a row.
        """
        values = _vector(labels)
        if self.num_clients is not None and self.num_clients > len(values):
            raise ValueError(
                f"Expected `num_clients` to be at most the {len(values)} rows there are, but got {self.num_clients}."
            )
        parts = self._deal(values, numpy_generator("partition", int(seed)))
        empty = [k for k, p in enumerate(parts) if len(p) == 0]
        if empty:
            raise ValueError(
                f"Expected every client to get at least one row, but {type(self).__name__} left {len(empty)} of "
                f"{len(parts)} without (the first is client {empty[0]}): use fewer clients or more rows."
            )
        return [torch.from_numpy(np.sort(np.asarray(p, dtype=np.int64))) for p in parts]

    def _deal(self, labels: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        raise TypeError("Expected a subclass of Partitioner that defines `_deal`, but got the base class.")

    def __repr__(self) -> str:
        args = ", ".join(f"{k}={v!r}" for k, v in vars(self).items())
        return f"{type(self).__name__}({args})"


def _vector(labels: Tensor | np.ndarray | Sequence[int]) -> np.ndarray:
    values = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if values.ndim != 1 or values.dtype.kind not in "iub":
        raise ValueError(
            f"Expected `labels` to be integers of shape [n], but got {values.dtype} of shape {list(values.shape)}."
        )
    if len(values) == 0:
        raise ValueError("Expected `labels` to hold at least one row, but it is empty.")
    return values


class IID(Partitioner):
    """Rows dealt at random, as evenly as they go: sizes differ by one at most.

    Args:
        num_clients: number of clients, at least 1.
    """

    def __init__(self, num_clients: int) -> None:
        self.num_clients = check_int("num_clients", num_clients, 1)

    def _deal(self, labels: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        assert self.num_clients is not None
        return np.array_split(rng.permutation(len(labels)), self.num_clients)


class Dirichlet(Partitioner):
    """Label skew: the rows of each class are shared out in proportions drawn from Dir(alpha) over the clients.

    The split of Hsu et al. (arXiv 1909.06335) in the per-class form of Yurochkin et al. (ICML 2019, arXiv 1905.12022) that
    FedDF, FedGen and DynFed use: ``p_c ~ Dir(alpha * 1_N)`` for every class c. A draw that leaves a client with fewer than
    `min_rows` is redrawn a few times; where that does not help, rows are moved from the largest clients, one by one.

    Args:
        num_clients: number of clients N, at least 1.
        alpha: concentration, above 0: 0.05 gives a client one or two classes, 100 is nearly IID.
        min_rows: the fewest rows a client may have, at least 1.
        balanced: a client that has its even share of rows (n / N) gets no further class (the rule of the code published
            with arXiv 1905.12022), which evens out the sizes.
    """

    _TRIES = 10

    def __init__(self, num_clients: int, alpha: float, min_rows: int = 1, balanced: bool = False) -> None:
        self.num_clients = check_int("num_clients", num_clients, 1)
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
            raise ValueError(f"Expected `alpha` to be a finite number above 0, but got {alpha!r}.")
        self.alpha = float(alpha)
        self.min_rows = check_int("min_rows", min_rows, 1)
        self.balanced = bool(balanced)

    def _deal(self, labels: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        assert self.num_clients is not None
        if self.num_clients * self.min_rows > len(labels):
            raise ValueError(
                f"Expected `min_rows` * `num_clients` to be at most the {len(labels)} rows there are, "
                f"but got {self.min_rows} * {self.num_clients}."
            )
        best, least = None, -1
        for _ in range(self._TRIES):
            owner = self._draw(labels, rng)
            fewest = int(np.bincount(owner, minlength=self.num_clients).min())
            if fewest > least:
                best, least = owner, fewest
            if fewest >= self.min_rows:
                break
        assert best is not None
        self._top_up(best, rng)
        return _by_owner(best, self.num_clients)

    def _draw(self, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        n = self.num_clients
        assert n is not None
        owner, sizes = np.empty(len(labels), dtype=np.int64), np.zeros(n, dtype=np.int64)
        for c in rng.permutation(np.unique(labels)) if self.balanced else np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == c))
            share = rng.dirichlet(np.full(n, self.alpha))
            if self.balanced:
                share = share * (sizes < len(labels) / n)
            total = share.sum()
            if not (np.isfinite(total) and total > 0):  # an alpha so small that every share underflows
                share, total = np.eye(n)[rng.integers(n)], 1.0
            cuts = np.floor(np.cumsum(share / total)[:-1] * len(rows) + 1e-9).astype(np.int64)
            counts = np.diff(cuts, prepend=0, append=len(rows))
            owner[rows] = np.repeat(np.arange(n), counts)
            sizes += counts
        return owner

    def _top_up(self, owner: np.ndarray, rng: np.random.Generator) -> None:
        assert self.num_clients is not None
        sizes = np.bincount(owner, minlength=self.num_clients)
        for k in np.flatnonzero(sizes < self.min_rows):
            while sizes[k] < self.min_rows:
                # Some client holds more than min_rows, since n >= N * min_rows and k holds fewer.
                donor = int(sizes.argmax())
                owner[rng.choice(np.flatnonzero(owner == donor))] = k
                sizes[donor] -= 1
                sizes[k] += 1


class Shards(Partitioner):
    """Rows sorted by label, cut into equal shards, a few of them dealt to each client (McMahan et al., AISTATS 2017, section 3).

    Args:
        num_clients: number of clients, at least 1.
        shards_per_client: shards each client gets, at least 1 (the paper: 2 of 200, for 100 clients).
    """

    def __init__(self, num_clients: int, shards_per_client: int = 2) -> None:
        self.num_clients = check_int("num_clients", num_clients, 1)
        self.shards_per_client = check_int("shards_per_client", shards_per_client, 1)

    def _deal(self, labels: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        assert self.num_clients is not None
        total = self.num_clients * self.shards_per_client
        if total > len(labels):
            raise ValueError(
                f"Expected `num_clients` * `shards_per_client` to be at most the {len(labels)} rows there are, "
                f"but got {self.num_clients} * {self.shards_per_client}."
            )
        shuffled = rng.permutation(len(labels))
        shards = np.array_split(shuffled[np.argsort(labels[shuffled], kind="stable")], total)
        deal = rng.permutation(total).reshape(self.num_clients, self.shards_per_client)
        return [np.concatenate([shards[s] for s in mine]) for mine in deal]


class Pathological(Partitioner):
    """Every client has rows of a few random classes only; a class's rows are shared evenly among its clients.

    The setting of QuPeD (arXiv 2107.13892, section 5: 50 clients, 4 classes each). Classes are dealt so that each has the
    same number of clients, to within one. A class with fewer rows than clients leaves some of them with fewer classes.

    Args:
        num_clients: number of clients, at least 1.
        classes_per_client: classes each client gets, at least 1.
    """

    def __init__(self, num_clients: int, classes_per_client: int = 2) -> None:
        self.num_clients = check_int("num_clients", num_clients, 1)
        self.classes_per_client = check_int("classes_per_client", classes_per_client, 1)

    def _deal(self, labels: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        assert self.num_clients is not None
        classes, n, per = np.unique(labels), self.num_clients, self.classes_per_client
        if per > len(classes) or n * per < len(classes):
            raise ValueError(
                f"Expected `classes_per_client` to be from {-(-len(classes) // n)} to {len(classes)} for {len(classes)} "
                f"classes and {n} clients (every row has an owner), but got {per}."
            )
        clients_of: list[list[int]] = [[] for _ in classes]
        for k in range(n):
            # The classes with the fewest clients so far, ties in random order.
            taken = np.array([len(c) for c in clients_of]) + rng.random(len(classes)) * 0.5
            for c in np.argsort(taken)[:per]:
                clients_of[c].append(k)
        owner, sizes = np.empty(len(labels), dtype=np.int64), np.zeros(n, dtype=np.int64)
        for c, members in zip(classes, clients_of, strict=True):
            rows = rng.permutation(np.flatnonzero(labels == c))
            # Left-over rows go to the smallest clients first, so that nobody stays empty needlessly.
            order = sorted(members, key=lambda k: (sizes[k], k))
            owner[rows] = np.resize(order, len(rows))
            np.add.at(sizes, owner[rows], 1)
        return _by_owner(owner, n)


class Natural(Partitioner):
    """One client for every value of a column, such as a writer's id: clients in the order of the sorted values.

    Args:
        num_clients: with a number, whole groups are merged into that many clients (the largest group first, always to the
            client with the fewest rows); ``None``: one client a value.
    """

    def __init__(self, num_clients: int | None = None) -> None:
        self.num_clients = None if num_clients is None else check_int("num_clients", num_clients, 1)

    def _deal(self, labels: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        _, group = np.unique(labels, return_inverse=True)
        sizes = np.bincount(group)
        n = self.num_clients
        if n is None:
            return _by_owner(group, len(sizes))
        if n > len(sizes):
            raise ValueError(
                f"Expected `num_clients` to be at most the {len(sizes)} values the column has, but got {n}."
            )
        client_of, load = np.empty(len(sizes), dtype=np.int64), np.zeros(n, dtype=np.int64)
        for g in np.argsort(-sizes, kind="stable"):
            client_of[g] = load.argmin()
            load[client_of[g]] += sizes[g]
        return _by_owner(client_of[group], n)


def _by_owner(owner: np.ndarray, num_clients: int) -> list[np.ndarray]:
    order = np.argsort(owner, kind="stable")
    return np.split(order, np.cumsum(np.bincount(owner, minlength=num_clients))[:-1])
