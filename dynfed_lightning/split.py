"""One deal of a dataset: which rows are whose, and a hash that proves it."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynfed_lightning.arrays import Arrays, MissingColumn, Options, Table
from dynfed_lightning.datasets import load_table, strings
from dynfed_lightning.partition import Natural, Partitioner, stratified_order


@dataclass(frozen=True)
class PublicSet:
    """Data the server may use, disjoint from every client's.

    Args:
        inputs: ``[n, ...]`` as a network takes them; a mapping of such tensors where samples are mappings.
        labels: int64 ``[n]``, or ``None`` where they are hidden.
    """

    inputs: Any
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values()))) if isinstance(self.inputs, Mapping) else len(self.inputs)


class OwnTest:
    """Every client's own test distribution, as weights over groups of test rows.

    Under label skew the test set itself belongs to nobody. A client's own test distribution is then the whole test set with
    every class weighted by the client's share of training rows of it, ``p_k(c) = n_k(c) / n_k``, so that a model's accuracy
    on it is ``sum_c p_k(c) acc(c)`` with its accuracy ``acc(c)`` on the test rows of class c: an expectation, with no noise of
    drawing rows. Classes without test rows are left out, and the other shares scaled to sum to 1.

    Where the rows were dealt by a column that the test rows have too (`Natural`), a client's own are those with its values; a
    client that has none of them is not judged.

    Args:
        labels: int64 ``[n]``, of the training table.
        num_classes: C.
        train: every client's rows of it.
        test_labels: int64, of the test rows in the order in which the test loader gives them.
        owners: int64, of each test row the client it belongs to (-1: none), or ``None``.

    Attributes:
        groups: int64, of each test row its group: its class, or its owner.
        num_groups: how many groups there are.
        num_clients: how many clients there are; of a pooled split those it was made of.
    """

    def __init__(
        self, labels: Tensor, num_classes: int, train: list[Tensor], test_labels: Tensor, owners: Tensor | None = None
    ) -> None:
        self._labels, self._train, self._by_owner = labels, train, owners is not None
        self.num_clients = len(train)
        self.groups = test_labels if owners is None else torch.where(owners < 0, len(train), owners)
        self.num_groups = num_classes if owners is None else len(train) + 1

    def shares(self, client: int) -> tuple[Tensor, Tensor]:
        """The groups a client's distribution has rows of, and their weights.

        Returns:
            int64 ``[m]`` and float64 ``[m]``, which sum to 1.
        """
        if not 0 <= client < self.num_clients:
            raise IndexError(f"Expected a client id from 0 to {self.num_clients - 1}, but got {client}.")
        if self._by_owner:
            return torch.tensor([client]), torch.ones(1, dtype=torch.float64)
        counts = torch.bincount(self._labels[self._train[client]])
        groups = counts.nonzero().flatten()
        return groups, counts[groups].double() / counts.sum()


@dataclass(frozen=True)
class Split:
    """Tables and rows.

    Args:
        table: the training table.
        test: the test table.
        train: for every client, the rows of `table` it trains on; int64, sorted.
        val: for every client, the rows of `table` it keeps for validation; int64, may be empty.
        public_rows: the rows of `table` that are the server's; int64, may be empty.
        test_rows: the rows of `test` to evaluate on; int64, sorted.
        public: the server's data, or ``None``.
        owners: of each of `test_rows` the client it belongs to, -1 for none; int64. ``None``: test rows belong to nobody.
        dealt: `train` as it was before `pooled`.
    """

    table: Table
    test: Table
    train: list[Tensor]
    val: list[Tensor]
    public_rows: Tensor
    test_rows: Tensor
    public: PublicSet | None
    owners: Tensor | None = None
    dealt: list[Tensor] | None = None

    def pooled(self) -> Split:
        """The same rows, all with one client; the clients there were are still there to be judged by (`own_test`)."""
        train, val = (torch.cat(parts).sort().values for parts in (self.train, self.val))
        return replace(self, train=[train], val=[val], dealt=self.train)

    def own_test(self) -> OwnTest:
        """What of the test set is each client's own."""
        labels, classes = self.test.labels[self.test_rows], self.table.num_classes
        return OwnTest(self.table.labels, classes, self.dealt or self.train, labels, self.owners)

    def label_counts(self) -> Tensor:
        """int64 ``[clients, C]``: the training rows each client has of each class."""
        c = self.table.num_classes
        return torch.stack([torch.bincount(self.table.labels[rows], minlength=c) for rows in self.train])

    def hash(self) -> str:
        """64 hex digits over who has which rows, over the public and test rows, and over all labels."""
        digest = hashlib.sha256()
        parts = [*self.train, *self.val, self.public_rows, self.test_rows, self.table.labels, self.test.labels]
        for rows in parts:
            digest.update(len(rows).to_bytes(8, "little"))
            digest.update(rows.numpy().astype("<i8", copy=False).tobytes())
        return digest.hexdigest()


def make_split(
    dataset: Any,
    test: Any,
    partitioner: Partitioner,
    *,
    public: Any,
    public_labels: bool,
    train_fraction: float,
    val_fraction: float,
    limit_test: int | None,
    seed: int,
    options: Options,
) -> Split:
    """Load `dataset` and deal it; the arguments are those of `FederatedDataModule`.

    Raises:
        ValueError: no test set, more public rows than there are, or a client without rows.
    """
    table = load_table(dataset, "train", options)
    # One stratified order of the rows: clients take from its start, the test share and the public rows from its end, so
    # that switching the public set on does not change what clients have, as long as the rows last.
    order = torch.from_numpy(stratified_order(table.labels, "split", seed))
    held = round(test * len(table)) if isinstance(test, float) else 0
    shared = public if isinstance(public, int) else 0
    left = len(table) - held - shared
    if left < 1:
        raise ValueError(
            f"Expected `public` and `test` to leave rows of the {len(table)} there are to the clients, "
            f"but {shared} are public and {held} held out."
        )
    mine = order[: min(left, max(1, round(train_fraction * (len(table) - held))))].sort().values
    public_rows = order[left : left + shared].sort().values

    if isinstance(test, float):
        test_table, test_rows = table, order[len(table) - held :].sort().values
    else:
        test_table = _test_table(dataset, test, table, options)
        test_rows = torch.arange(len(test_table))
    if limit_test is not None and limit_test < len(test_rows):
        some = stratified_order(test_table.labels[test_rows], "test", 0)[:limit_test]
        test_rows = test_rows[torch.from_numpy(np.sort(some))]

    test_table = _like(test_table, table)
    classes = max(table.num_classes, test_table.num_classes)
    table, test_table = replace(table, num_classes=classes), replace(test_table, num_classes=classes)
    natural = isinstance(partitioner, Natural)
    values = table.groups if natural else table.labels
    assert values is not None
    train, val = [], []
    parts = partitioner(values[mine], seed)
    for k, part in enumerate(parts):
        rows, kept = mine[part], min(round(val_fraction * len(part)), len(part) - 1)
        if kept:
            places = torch.from_numpy(stratified_order(table.labels[rows], "validation", seed, k))
            train.append(rows[places[:-kept]].sort().values)
            val.append(rows[places[-kept:]].sort().values)
        else:
            train.append(rows)
            val.append(rows[:0])
    shown = _public(public, public_labels, table, public_rows, options)
    owners = None
    if natural and test_table.groups is not None:
        owners = _owners(test_table.groups[test_rows], values[mine], parts)
        if (owners < 0).all():
            warnings.warn(
                "No test row belongs to a client, so own test distributions are the test set with each class weighted by the "
                "client's share of it.",
                stacklevel=2,
            )
            owners = None
    return Split(table, test_table, train, val, public_rows, test_rows, shown, owners)


def _owners(groups: Tensor, values: Tensor, parts: list[Tensor]) -> Tensor:
    """Which client each test row belongs to: the one that was dealt the rows of its group; -1 if nobody was."""
    owner = torch.full((int(max(groups.max(), values.max())) + 2,), -1)  # the last is for groups of -1: unknown values
    for k, part in enumerate(parts):
        owner[values[part]] = k
    return owner[groups]


def _test_table(dataset: Any, test: Any, table: Table, options: Options) -> Table:
    """The test set; with the partition column where it has one, its values numbered as in the training set (-1: unknown)."""
    o = replace(options, class_names=getattr(table, "class_names", None))
    if o.partition_column is not None:
        try:
            found = _read_test(dataset, test, o)
        except MissingColumn:
            pass
        else:
            if found.groups is None or found.group_names is None or table.group_names is None:
                return found
            codes = _same_values(found.group_names, table.group_names)
            if (codes < 0).all():
                warnings.warn(
                    f"No value of {o.partition_column!r} in the test set ({_some(found.group_names)}) is one of the training "
                    f"set's ({_some(table.group_names)}), so no client has test rows of its own: own test distributions are "
                    "the test set with each class weighted by the client's share of it.",
                    stacklevel=2,
                )
                return replace(found, groups=None, group_names=None)
            return replace(found, groups=codes[found.groups], group_names=table.group_names)
    return _read_test(dataset, test, replace(o, partition_column=None))


def _same_values(names: Sequence[str], known: Sequence[str]) -> Tensor:
    """Where in `known` each name is, as text or else as a number (``"3.0"`` is ``"3"``); -1: nowhere."""
    place = {name: i for i, name in enumerate(known)}
    numbers = [_number(name) for name in known]
    count = Counter(numbers)
    unique: dict[float | int | None, int] = {n: i for i, n in enumerate(numbers) if n is not None and count[n] == 1}
    return torch.tensor([place.get(name, unique.get(_number(name), -1)) for name in names], dtype=torch.int64)


def _number(text: str) -> float | int | None:
    for kind in (int, float):
        try:
            return kind(text) if math.isfinite(kind(text)) else None
        except (ValueError, OverflowError):
            continue
    return None


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")


def _read_test(dataset: Any, test: Any, o: Options) -> Table:
    if test is not None:
        whole = isinstance(test, str | Path) and Path(test).is_file()
        return load_table(test, "train" if whole else "test", o)
    if not isinstance(dataset, str | Path | Mapping):
        raise ValueError(
            f"Expected `test` to be given, since a {type(dataset).__name__} has no test split: a dataset, or a share such "
            "as test=0.2 to hold out."
        )
    return load_table(dataset, "test", o)


def _like(other: Table, table: Table) -> Table:
    """`other` with its images normalised as the training images are, whatever set they come from."""
    if isinstance(other, Arrays) and isinstance(table, Arrays) and other.inputs.shape[1:2] == table.inputs.shape[1:2]:
        return replace(other, mean=table.mean, std=table.std)
    return other


def _public(public: Any, labelled: bool, table: Table, rows: Tensor, options: Options) -> PublicSet | None:
    if public is None:
        return None
    if isinstance(public, Tensor):
        if labelled:
            raise ValueError(
                "Expected `public` to have labels, since `public_labels` is True, but got a tensor of inputs."
            )
        return PublicSet(public)
    if strings(public) and not labelled and isinstance(public, list):
        unknown = (public, [0] * len(public))  # texts alone
        return PublicSet(
            load_table(unknown, "train", replace(options, text_column=None)).batch(torch.arange(len(public)))
        )
    if not isinstance(public, int):
        plain = replace(options, image_column=None, label_column=None, partition_column=None, text_column=None)
        table = _like(load_table(public, "train", plain), table)
        rows = torch.arange(len(table))
    return PublicSet(table.batch(rows), table.labels[rows] if labelled else None)
