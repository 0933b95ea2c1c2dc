"""A dataset dealt to clients, as a Lightning data module: an epoch is a round, its one batch the cohort's ids."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from dynfed_lightning.arrays import Options, Table, Texts
from dynfed_lightning.loaders import Augment, Cohorts, RowLoader
from dynfed_lightning.partition import Natural, Partitioner, check_int, numpy_generator
from dynfed_lightning.resources import ResourceProfile, Resources, UniformResources
from dynfed_lightning.split import OwnTest, PublicSet, Split, make_split
from dynfed_lightning.splitplot import draw_split
from dynfed_lightning.text import TextTokenizer, load_tokenizer

__all__ = ["ClientData", "FederatedDataModule", "PublicSet"]


class ClientData:
    """One client's rows.

    Attributes:
        id: the client's id, from 0.
        num_examples: rows it trains on (without its validation rows).
        train_rows: int64, which rows of the training table these are.
        val_rows: int64, the rows it keeps for validation; may be empty.
    """

    def __init__(
        self,
        client_id: int,
        table: Table,
        train_rows: Tensor,
        val_rows: Tensor,
        batch_size: int = 32,
        drop_last: bool = False,
        augment: Augment | None = None,
        group_by_length: bool = False,
    ) -> None:
        self.id, self.table = client_id, table
        self.train_rows, self.val_rows = train_rows, val_rows
        self.num_examples = len(train_rows)
        self._batch_size, self._drop_last, self._augment = batch_size, drop_last, augment
        self._group_by_length = group_by_length

    def label_counts(self) -> Tensor:
        """int64 ``[C]``: how many training rows it has of each class."""
        return torch.bincount(self.table.labels[self.train_rows], minlength=self.table.num_classes)

    def train_loader(self, seed: int) -> RowLoader:
        """Shuffled batches; the order of the loader's k-th iteration is a function of (`seed`, k) only."""
        options = (self._drop_last, self._augment, self._group_by_length)
        return RowLoader(self.table, self.train_rows, self._batch_size, seed, *options)

    def val_loader(self) -> RowLoader | None:
        """The validation rows in order, or ``None`` if it has none."""
        return RowLoader(self.table, self.val_rows, self._batch_size) if len(self.val_rows) else None


class FederatedDataModule(L.LightningDataModule):
    """Clients' data, a cohort for every round, the server's public set and the test set.

    Nothing is read before `setup`; the constructor only checks. The same arguments give the same split on every machine and
    rank (`split_hash` proves it), and no global random generator is read or moved.

    Args:
        dataset: a name (``"digits"``, ``"mnist"``, ``"cifar10"``, ``"sst2"``, any set of images or texts of the public hub), a
            path, a pair of tensors, a ``TensorDataset``, a pair of a list of strings and labels, a `datasets` ``Dataset`` or
            ``DatasetDict``, or a map-style dataset; see `dynfed_lightning.datasets.load_table`.
        partitioner: who gets which rows.
        test: the test set, given like `dataset`; a share such as ``0.2`` is held out of the training rows (stratified);
            ``None``: the dataset's own test split (or its validation split).
        batch_size: rows of a client's batch.
        clients_per_round: how many clients (an integer) or which share of them (a float up to 1) take part in a round;
            ``None``: all.
        public: the server's rows: a number of them, taken from the training set (stratified) before it is dealt, or a
            dataset of its own. Where `train_fraction` leaves rows over, the public ones come from those.
        public_labels: whether the server sees their labels.
        train_fraction: the share of the training set to use, stratified (0.25: a quarter).
        val_fraction: the share of its rows each client keeps for validation, stratified; it always keeps one to train on.
        test_batch_size: rows of a test batch; ``None``: 1000, of text 100 (an encoder's maps and states are large).
        resources: what each client has; ``None``: unknown.
        seed: of the split, the cohorts and the drawn resources.
        data_dir: where a named dataset lies, see `dynfed_lightning.datasets.load_arrays`.
        image_column: name of the images' column, if it is not the usual one.
        label_column: name of the labels' column, likewise.
        partition_column: the column whose values `Natural` deals by, such as a writer's id.
        limit_test: use only this many test rows, stratified.
        drop_last: leave out a client's last batch if it is not full (never its only one).
        augment: ``augment(inputs, generator) -> inputs`` on every training batch of in-memory data.
        image_size: resize images to this many pixels a side.
        cache_dir: where decoded images and tokens are kept.
        tokenizer: for text: a Hugging Face tokeniser or its name or folder, a ``vocab.txt`` or ``tokenizer.json``, a
            `WordTokenizer`, or ``"words:8000"``, which makes one of the training set's words (so of all clients' texts); see
            `dynfed_lightning.text.load_tokenizer`. Batches are dicts with ``input_ids``, ``attention_mask``, for pairs
            ``token_type_ids``, and ``labels``, padded to their longest row.
        text_column: the column of text if it is not the usual one, or the two columns of a pair.
        max_length: cut longer texts to so many tokens.
        group_by_length: train on batches of texts of about the same length: less padding, a faster step.

    Raises:
        ValueError, TypeError: a bad argument, in the constructor where it can be known there, else in `setup`.
    """

    def __init__(
        self,
        dataset: Any,
        partitioner: Partitioner,
        *,
        test: Any = None,
        batch_size: int = 32,
        clients_per_round: int | float | None = None,
        public: Any = None,
        public_labels: bool = False,
        train_fraction: float = 1.0,
        val_fraction: float = 0.0,
        test_batch_size: int | None = None,
        resources: ResourceProfile | None = None,
        seed: int = 0,
        data_dir: str | Path | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        partition_column: str | None = None,
        limit_test: int | None = None,
        drop_last: bool = False,
        augment: Augment | None = None,
        image_size: int | None = None,
        cache_dir: str | Path | None = None,
        tokenizer: Any = None,
        text_column: str | Sequence[str] | None = None,
        max_length: int = 128,
        group_by_length: bool = False,
    ) -> None:
        super().__init__()
        _check_type("partitioner", partitioner, Partitioner)
        _check_type("resources", resources, ResourceProfile, optional=True)
        for name, number in (("public", public), ("limit_test", limit_test), ("image_size", image_size)):
            if isinstance(number, int | float) or (number is not None and name != "public"):
                check_int(name, number, 1)
        if isinstance(test, int | float) and not (isinstance(test, float) and 0 < test < 1):
            raise ValueError(f"Expected `test` to be a dataset or a share between 0 and 1, but got {test!r}.")
        if augment is not None and not callable(augment):
            raise TypeError(f"Expected `augment` to be callable, but got {type(augment).__name__}.")
        if isinstance(partitioner, Natural) and partition_column is None:
            raise ValueError("Expected `partition_column` to be given with the Natural partitioner, but got None.")
        if partition_column is not None and not isinstance(partitioner, Natural):
            raise ValueError(
                "Expected `partition_column` to be given with the Natural partitioner alone, "
                f"but got {partition_column!r} with {type(partitioner).__name__}."
            )
        if data_dir is not None and not Path(data_dir).is_dir():
            raise ValueError(f"Expected `data_dir` to be a folder, but {str(data_dir)!r} is none.")
        self.dataset, self.partitioner, self.test, self.public = dataset, partitioner, test, public
        self.batch_size = check_int("batch_size", batch_size, 1)
        self.test_batch_size = None if test_batch_size is None else check_int("test_batch_size", test_batch_size, 1)
        self.seed = check_int("seed", seed, -(1 << 63))
        self.clients_per_round, self.public_labels = clients_per_round, bool(public_labels)
        self.train_fraction = _check_share("train_fraction", train_fraction, zero=False)
        self.val_fraction = _check_share("val_fraction", val_fraction, zero=True)
        self.limit_test, self.drop_last, self.augment = limit_test, bool(drop_last), augment
        self.group_by_length = bool(group_by_length)
        self.profile = resources or UniformResources()
        if isinstance(text_column, str) and image_column is not None:
            raise ValueError(
                f"Expected `image_column` or `text_column`, but got both: {image_column!r}, {text_column!r}."
            )
        self._options = Options(
            data_dir,
            image_column,
            label_column,
            partition_column,
            image_size,
            cache_dir,
            text_column=text_column,
            tokenizer=tokenizer,
            max_length=check_int("max_length", max_length, 4),
        )
        self._split: Split | None = None
        self._pooled = False
        self._cohort_size(partitioner.num_clients)

    # ------------------------------------------------------------------ set-up

    def prepare_data(self) -> None:
        """Download and decode on one process a node, so that the others find the cache."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Load and deal the rows; the second call does nothing."""
        if self._split is None:
            if self._options.tokenizer is not None:
                self._options = replace(self._options, tokenizer=load_tokenizer(self._options.tokenizer))
            split = make_split(
                self.dataset,
                self.test,
                self.partitioner,
                public=self.public,
                public_labels=self.public_labels,
                train_fraction=self.train_fraction,
                val_fraction=self.val_fraction,
                limit_test=self.limit_test,
                seed=self.seed,
                options=self._options,
            )
            self._cohort_size(len(split.train))
            self._split = split

    def pool(self) -> None:
        """From now on there is one client, 0, with the rows of all: centralised training on the same split."""
        if not self._pooled:
            self._split, self._pooled = self._ready().pooled(), True

    def pooled(self) -> FederatedDataModule:
        """A view of this data module after `pool`; this one stays as it is. Tables are shared, not copied."""
        self.setup()
        view = copy.copy(self)
        view.trainer = None
        view.pool()
        return view

    def _ready(self) -> Split:
        self.setup()
        assert self._split is not None
        return self._split

    def _cohort_size(self, clients: int | None) -> int:
        """How many take part in a round; `clients` is None while nobody knows how many there are."""
        wanted = self.clients_per_round
        if wanted is None:
            return clients or 0
        number = isinstance(wanted, int | float) and not isinstance(wanted, bool)
        if not number or not (wanted >= 1 if isinstance(wanted, int) else 0 < wanted <= 1):
            raise ValueError(
                "Expected `clients_per_round` to be an integer of at least 1, a share in (0, 1] or None, "
                f"but got {wanted!r}."
            )
        if isinstance(wanted, float):
            return max(1, round(wanted * (clients or 0)))
        if clients is not None and wanted > clients:
            raise ValueError(f"Expected `clients_per_round` to be at most the {clients} clients, but got {wanted}.")
        return wanted

    # ------------------------------------------------------- what is in there

    @property
    def num_clients(self) -> int:
        """How many clients there are; the data is read if only it can tell."""
        known = None if self._pooled else self.partitioner.num_clients
        return len(self._ready().train) if known is None else known

    @property
    def num_classes(self) -> int:
        """How many classes the labels have."""
        return self._ready().table.num_classes

    @property
    def tokenizer(self) -> TextTokenizer | None:
        """The tokeniser of the text, ready to use, or ``None``."""
        self.setup()
        return self._options.tokenizer

    @property
    def vocab_size(self) -> int | None:
        """How many embeddings a model of the text needs; ``None`` for other data."""
        split = self._ready()
        sizes = [t.vocab_size for t in (split.table, split.test) if isinstance(t, Texts)]
        shown = split.public.inputs if split.public is not None else None
        if isinstance(shown, Mapping) and "input_ids" in shown and len(shown["input_ids"]):
            sizes.append(int(shown["input_ids"].max()) + 1)
        return max(sizes) if isinstance(split.table, Texts) else None

    @property
    def longest_text(self) -> int | None:
        """Tokens of the longest text there is, after the cut; ``None`` for other data."""
        split = self._ready()
        tables = [t for t in (split.table, split.test) if isinstance(t, Texts)]
        return max(t.max_length for t in tables) if tables else None

    @property
    def public_set(self) -> PublicSet | None:
        """The server's data, or ``None``."""
        return self._ready().public

    @property
    def split_hash(self) -> str:
        """64 hex digits: equal for two runs whose clients, public set and test set have the same rows and labels."""
        return self._ready().hash()

    def client(self, k: int) -> ClientData:
        """Client `k`'s data."""
        split = self._ready()
        if not 0 <= k < len(split.train):
            raise IndexError(f"Expected a client id from 0 to {len(split.train) - 1}, but got {k}.")
        options = (self.batch_size, self.drop_last, self.augment, self.group_by_length)
        return ClientData(int(k), split.table, split.train[k], split.val[k], *options)

    def own_test(self) -> OwnTest:
        """Every client's own test distribution: what ``own_accuracy`` is measured on; of all clients, also after `pool`."""
        return self._ready().own_test()

    def resources(self, k: int) -> Resources:
        """What client `k` has."""
        return self.profile(int(k), self.seed)

    def label_counts(self) -> Tensor:
        """int64 ``[clients, C]``: how many training rows every client has of every class."""
        return self._ready().label_counts()

    def sample_cohort(self, round: int) -> list[int]:
        """The sorted ids of the clients of a round (from 0), drawn without replacement; a function of (seed, round) only.

        Takes time and memory in proportion to the cohort, not to the population.
        """
        clients = self.num_clients
        size = 1 if self._pooled else self._cohort_size(clients)
        if size == clients:
            return list(range(clients))
        rng = numpy_generator("cohort", self.seed, int(round))
        return sorted(rng.choice(clients, size, replace=False, shuffle=False).tolist())

    # ---------------------------------------------------------------- loaders

    def train_dataloader(self) -> Cohorts:
        """One batch an epoch: the ids of the cohort of round ``trainer.current_epoch`` (0 without a trainer)."""
        return Cohorts(lambda: self.sample_cohort(self.trainer.current_epoch if self.trainer is not None else 0))

    def val_dataloader(self) -> RowLoader:
        """The whole test set: after a round, the server's model is judged by it."""
        split = self._ready()
        size = self.test_batch_size or (100 if isinstance(split.test, Texts) else 1000)
        return RowLoader(split.test, split.test_rows, size)

    def test_dataloader(self) -> RowLoader:
        """The whole test set."""
        return self.val_dataloader()

    # ------------------------------------------------------------ for a person

    def summary(self) -> str:
        """A few lines: rows, classes, how uneven the split is, the public and test set, the hash."""
        split, counts = self._ready(), self.label_counts()
        rows, classes = counts.sum(1), (counts > 0).sum(1)
        shown = self.dataset if isinstance(self.dataset, str | Path) else type(self.dataset).__name__
        hidden = "" if self.public_labels else " (labels hidden)"
        table, text = split.table, []
        if isinstance(table, Texts):
            mean = len(table.tokens) / len(table)
            text = [("text", f"{mean:.1f} tokens a row, at most {table.max_length}; vocabulary {self.vocab_size}")]
        lines = [
            ("dataset", f"{shown}: {len(split.table)} training rows, {self.num_classes} classes"),
            *text,
            ("clients", f"{self.num_clients} by {self.partitioner!r}, {len(self.sample_cohort(0))} a round"),
            ("rows each", f"{rows.min()} to {rows.max()}, median {rows.median()}, {rows.sum()} in all"),
            ("classes each", f"{classes.min()} to {classes.max()}, median {classes.median()}"),
            ("validation", f"{sum(map(len, split.val))} rows kept by the clients"),
            ("public", f"{len(split.public)} rows{hidden}" if split.public is not None else "none"),
            ("test", f"{len(split.test_rows)} rows"),
            ("split", split.hash()[:16]),
        ]
        return "\n".join(f"{name:>12}  {text}" for name, text in lines)

    def plot(self, path: str | Path) -> Path:
        """Draw who has what, in the format the file's ending says.

        Args:
            path: the picture's file; its folder is made.

        Returns:
            the file.

        Raises:
            ImportError: matplotlib is not installed.
        """
        names = getattr(self._ready().table, "class_names", None)
        return draw_split(self.label_counts(), Path(path), names, title=repr(self.partitioner))


def _check_type(name: str, value: Any, kind: type, optional: bool = False) -> None:
    if not isinstance(value, kind) and not (optional and value is None):
        raise TypeError(f"Expected `{name}` to be a {kind.__name__}, but got {type(value).__name__}: {value!r}.")


def _check_share(name: str, value: Any, zero: bool) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (0 <= value < 1 if zero else 0 < value <= 1):
        raise ValueError(f"Expected `{name}` to be in {'[0, 1)' if zero else '(0, 1]'}, but got {value!r}.")
    return float(value)
