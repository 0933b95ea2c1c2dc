"""Who is judged on what: by the whole test set, by each client's own test distribution, a few clients or all."""

from __future__ import annotations

import csv
import json
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor
from toys import CLASSES, blobs, client_module, data_module, network, outer, run, skewed

from dynfed_lightning import (
    FML,
    Centralised,
    FedAvg,
    FederatedDataModule,
    Federation,
    Local,
    Natural,
    Pathological,
    RunRecorder,
)
from dynfed_lightning.arrays import Arrays
from dynfed_lightning.evaluation import Evaluator, own_sets
from dynfed_lightning.judging import Judge, sample_clients
from dynfed_lightning.split import OwnTest


def by_hand(module: torch.nn.Module, x: Tensor, y: Tensor, counts: Tensor) -> float:
    """The formula of the documentation, class by class."""
    with torch.no_grad():
        right = (module.eval()(x).argmax(1) == y).double()
    total, weight = 0.0, 0.0
    for c in range(CLASSES):
        if bool((y == c).any()) and counts[c]:
            total += float(counts[c]) * float(right[y == c].mean())
            weight += float(counts[c])
    return total / weight


def test_a_global_model_on_every_clients_own_distribution() -> None:
    """Uneven classes in the test set: the plain accuracy of a client's rows would be another number."""
    x, y = blobs(90, seed=1)
    test = (x[:-25], y[:-25])
    federation = Federation(client_module(), FedAvg(), local="loop")
    data = data_module(6, skewed(6, alpha=0.3), test=test)
    metrics = run(federation, data).callback_metrics
    counts = data.label_counts()
    truth = [by_hand(federation.module, *test, counts[k]) for k in range(6)]
    assert len(set(truth)) > 3
    assert federation.own_accuracy == pytest.approx(dict(enumerate(truth)), abs=1e-12)
    assert float(metrics["own_accuracy"]) == pytest.approx(np.mean(truth), abs=1e-6)
    assert float(metrics["own_accuracy_worst10"]) == pytest.approx(min(truth), abs=1e-6)
    assert float(metrics["own_accuracy_std"]) == pytest.approx(np.std(truth), abs=1e-6)
    assert float(metrics["accuracy"]) != pytest.approx(np.mean(truth), abs=1e-3)


def test_clients_own_models_on_their_own_distributions() -> None:
    federation = Federation(client_module(), Local(), local="loop")
    data = data_module(5, Pathological(5, 2))
    metrics = run(federation, data, rounds=3).callback_metrics
    counts, module = data.label_counts(), client_module()
    assert bool((counts == 0).any())
    truth = []
    for k in range(5):
        federation.algorithm.personal_model(federation.store.read(k), module, {}, client_id=k)
        truth.append(by_hand(module, *blobs(90, seed=1), counts[k]))
    assert federation.own_accuracy == pytest.approx(dict(enumerate(truth)), abs=1e-12)
    assert float(metrics["own_accuracy"]) == pytest.approx(np.mean(truth), abs=1e-6)
    assert metrics["own_accuracy"] > metrics["accuracy"] + 0.1  # a client knows its own classes best


@pytest.mark.parametrize("way", ["whole", "own", "both"])
def test_the_ways_log_what_they_say(way: str) -> None:
    whole = {"accuracy", "test_loss", "accuracy_worst", "accuracy_std"}
    own = {"own_accuracy", "own_accuracy_worst10", "own_accuracy_std"}
    reference = run(
        Federation(client_module(), FML(network(1)), local="loop"), data_module(4, Pathological(4, 2)), rounds=1
    )
    trainer = run(
        Federation(client_module(), FML(network(1)), local="loop", evaluate_on=way),
        data_module(4, Pathological(4, 2)),
        rounds=1,
    )
    wanted = {"whole": whole, "own": own, "both": whole | own}[way]
    metrics = trainer.callback_metrics
    assert {k for k in metrics if k in whole | own} == wanted
    for name in (*wanted, "global_accuracy", "global_loss"):
        assert float(metrics[name]) == float(reference.callback_metrics[name]), name
    alone = run(Federation(client_module(), FedAvg(), local="loop", evaluate_on=way), rounds=1).callback_metrics
    assert "accuracy" in alone and ("own_accuracy" in alone) == (way != "whole")


def test_own_only_rows_of_ones_own_classes_are_judged() -> None:
    seen: dict[int, set[int]] = {}
    x, y = blobs(90, seed=1)
    label_of = {tuple(row.tolist()): int(c) for row, c in zip(x, y, strict=True)}

    class Spied(Local):
        def personal_model(
            self,
            client_state: Mapping[str, Any],
            module: L.LightningModule,
            global_weights: Any,
            client_id: int | None = None,
        ) -> L.LightningModule:
            model = super().personal_model(client_state, module, global_weights, client_id)
            assert client_id is not None
            labels = seen.setdefault(client_id, set())
            model.register_forward_pre_hook(lambda _, args: labels.update(label_of[tuple(r.tolist())] for r in args[0]))
            return model

    data = data_module(4, Pathological(4, 1), test_batch_size=7)
    run(Federation(client_module(), Spied(), local="loop", evaluate_on="own"), data, rounds=1, num_sanity_val_steps=0)
    counts = data.label_counts()
    assert seen == {k: set(counts[k].nonzero().flatten().tolist()) for k in range(4)}


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One model at a time, or all at once; also of a test set that is cut short."""
    alive = {"now": 0, "most": 0}

    class Counted(Local):
        def personal_model(self, *args: Any, **kwargs: Any) -> L.LightningModule:
            model = super().personal_model(*args, **kwargs)
            alive["now"] += 1
            alive["most"] = max(alive["most"], alive["now"])
            weakref.finalize(model, lambda: alive.update(now=alive["now"] - 1))
            return model

    found = {}
    for block in (1, 600, 1 << 30):  # bytes; a model has 4 * 83
        monkeypatch.setattr("dynfed_lightning.judging.BLOCK", block)
        alive.update(now=0, most=0)
        federation = Federation(client_module(), Counted(), local="loop")
        data = data_module(7, skewed(7), test_batch_size=20)
        metrics = run(federation, data, limit_val_batches=3).callback_metrics
        found[block] = {k: float(v) for k, v in metrics.items() if "accuracy" in k or k == "test_loss"}
        found[block] |= {str(k): v for k, v in federation.own_accuracy.items()}
        assert alive["most"] <= {1: 2, 600: 4, 1 << 30: 14}[block]  # the block before may still be there
    assert found[1] == found[600] == found[1 << 30] and len(found[1]) == 7 + 7


def test_a_few_clients_always_the_same() -> None:
    chosen = []
    for algorithm in (Local(), FedAvg(), Local()):
        federation = Federation(client_module(), algorithm, local="loop", evaluate_clients=3)
        run(federation, data_module(9), rounds=1)
        chosen.append(sorted(federation.own_accuracy))
    assert chosen[0] == chosen[1] == chosen[2] and len(set(chosen[0])) == 3
    assert chosen[0] == list(sample_clients(9, 3, seed=0)) != list(sample_clients(9, 3, seed=2))
    assert list(sample_clients(4, 9, seed=0)) == [0, 1, 2, 3]
    everyone = Federation(client_module(), Local(), local="loop")
    run(everyone, data_module(9), rounds=1)
    assert federation.own_accuracy == {k: everyone.own_accuracy[k] for k in chosen[0]}


def test_pooled_data_is_judged_by_the_clients_it_came_from() -> None:
    federation = Federation(client_module(), Centralised(), local="loop")
    data = data_module(6, skewed(6, alpha=0.3))
    run(federation, data)
    counts = data.label_counts()
    truth = {k: by_hand(federation.module, *blobs(90, seed=1), counts[k]) for k in range(6)}
    assert federation.own_accuracy == pytest.approx(truth, abs=1e-12)


def test_worst_tenth() -> None:
    for n, tenth in ((1, 1), (9, 1), (10, 1), (11, 2), (20, 2), (21, 3)):
        values = [i / n for i in range(n)][::-1]
        got = own_sets(values)
        assert got["own_accuracy_worst10"] == pytest.approx(sum(sorted(values)[:tenth]) / tenth)
        assert got["own_accuracy"] == pytest.approx(sum(values) / n)
    assert own_sets([]) == {}


def test_classes_that_are_not_in_the_test_set() -> None:
    """They are left out and the shares scaled; a client that has none but those is not judged."""
    own = OwnTest(
        torch.tensor([0, 0, 0, 1, 2, 2]),
        3,
        [torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5])],
        torch.tensor([0, 0, 1, 1]),
    )
    groups, shares = own.shares(0)
    assert groups.tolist() == [0, 1] and shares.tolist() == [0.75, 0.25]
    x, y = torch.eye(3)[[0, 1, 1, 1]], torch.tensor([0, 0, 1, 1])  # half of class 0, all of class 1

    class Fixed(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.p = torch.nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.p

    judge = Judge(3, own, range(2), "both")
    judge.start_global(Fixed())
    judge.update((x, y))
    assert judge.finish(lambda: ())["own_accuracy"] == pytest.approx(0.75 * 0.5 + 0.25 * 1.0)
    assert judge.own_accuracy == {0: pytest.approx(0.625)}
    judge.start_own(lambda k: Fixed())
    judge.update((x[:2], y[:2]))  # no row of class 1 yet: the share of class 0 becomes 1
    assert judge.finish(lambda: ())["own_accuracy"] == pytest.approx(0.5)
    with pytest.raises(IndexError, match="Expected a client id from 0 to 1, but got 2"):
        own.shares(2)


def test_natural_clients_are_judged_on_their_own_test_rows() -> None:
    """Rows held out of a table with a writer in every row."""
    g = torch.Generator().manual_seed(0)
    x, y = blobs(240)
    writers = torch.randint(0, 5, (240,), generator=g)
    table = Arrays(x, y, CLASSES, groups=writers)
    for clients in (None, 3):
        federation = Federation(client_module(), FedAvg(), local="loop")
        data = FederatedDataModule(table, Natural(clients), partition_column="writer", test=0.3)
        run(federation, data)
        split = data._ready()
        owner = {int(w): k for k in range(data.num_clients) for w in writers[data.client(k).train_rows]}
        with torch.no_grad():
            right = federation.module.eval()(x[split.test_rows]).argmax(1) == y[split.test_rows]
        owners = torch.tensor([owner[int(w)] for w in writers[split.test_rows]])
        truth = {k: float(right[owners == k].double().mean()) for k in range(data.num_clients)}
        assert federation.own_accuracy == pytest.approx(truth, abs=1e-12) and len(set(truth.values())) > 1
        personal = Federation(client_module(), Local(), local="loop", evaluate_on="own")
        run(personal, data)
        assert len(personal.own_accuracy) == data.num_clients


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"evaluate_on": "mine"}, "Expected `evaluate_on` to be 'whole', 'own' or 'both', but got 'mine'"),
        ({"evaluate_clients": 0}, "Expected `evaluate_clients` to be a positive integer or None, but got 0"),
        ({"evaluate_clients": 2.0}, "Expected `evaluate_clients` to be a positive integer or None, but got 2.0"),
        ({"evaluate_clients": True}, "Expected `evaluate_clients` to be a positive integer or None, but got True"),
    ],
)
def test_wrong_arguments(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Federation(client_module(), **wrong)


def test_no_classes_nothing_judged() -> None:
    federation = Federation(client_module(), Local(), local="loop", num_classes=0)
    metrics = run(federation, rounds=1).callback_metrics
    assert not [k for k in metrics if "accuracy" in k] and federation.own_accuracy == {}


def test_evaluator_counts_groups() -> None:
    evaluator = Evaluator(2, torch.tensor([1, 0, 1, 2]), 3)

    class First(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.p = torch.nn.Parameter(torch.tensor([1.0, 0.0]))

        def forward(self, x: Tensor) -> Tensor:
            return self.p.expand(len(x), 2)

    evaluator.start(First())
    evaluator.update((torch.zeros(3, 1), torch.tensor([0, 1, 1])))
    evaluator.update((torch.zeros(1, 1), torch.tensor([0])))
    (score,) = evaluator.scores()
    assert score.right.tolist() == [0, 1, 1] and score.rows.tolist() == [1, 2, 1] and score.accuracy == 0.5


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_run_folder_holds_it(tmp_path: Path) -> None:
    federation = Federation(client_module(), Local(), local="loop")
    run(
        federation,
        data_module(5, clients_per_round=2),
        rounds=4,
        callbacks=[RunRecorder(tmp_path)],
        check_val_every_n_epoch=2,
    )
    rounds, clients, own = (rows(tmp_path / f"{n}.csv") for n in ("rounds", "clients", "own_accuracy"))
    assert [bool(r["own_accuracy"]) for r in rounds] == [False, True, False, True]
    assert all(rounds[1][n] for n in ("own_accuracy_worst10", "own_accuracy_std"))
    assert [bool(c["own_accuracy"]) for c in clients] == [False] * 2 + [True] * 2 + [False] * 2 + [True] * 2
    assert {int(r["client"]): float(r["own_accuracy"]) for r in own} == pytest.approx(federation.own_accuracy, abs=1e-7)
    assert len(own) == 5
    last = {c["client"]: c["own_accuracy"] for c in clients if c["round"] == "4"}
    assert last.items() <= {r["client"]: r["own_accuracy"] for r in own}.items()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["own_accuracy"] == float(rounds[-1]["own_accuracy"])
    assert summary["best_own_accuracy"] == max(float(r["own_accuracy"]) for r in rounds if r["own_accuracy"])
    assert summary["own_accuracy_worst10"] == float(rounds[-1]["own_accuracy_worst10"])


def test_own_with_a_trainer_validating_alone() -> None:
    federation = Federation(client_module(), Local(), local="loop", evaluate_on="own")
    trainer = run(federation, data_module(4, Pathological(4, 2)), rounds=1)
    before = float(trainer.callback_metrics["own_accuracy"])
    again = outer(1).validate(federation, datamodule=data_module(4, Pathological(4, 2)), verbose=False)
    assert again[0]["own_accuracy"] == before


class _Written:
    """A map-style dataset of mappings with a writer; the test set has writers the training set lacks, and the other way round."""

    def __init__(self, rows: int, seed: int, writers: list[str] | None) -> None:
        self.x, self.y = blobs(rows, seed)
        self.writers = writers

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> dict[str, Any]:
        sample = {"x": self.x[i], "label": int(self.y[i])}
        return sample if self.writers is None else {**sample, "writer": self.writers[i % len(self.writers)]}


@pytest.mark.parametrize("clients", [None, 2])
def test_natural_clients_and_a_test_set_with_the_column(clients: int | None) -> None:
    train, test = _Written(140, 0, ["d", "b", "a", "g"]), _Written(90, 1, ["b", "c", "d", "a", "z"])
    data = FederatedDataModule(train, Natural(clients), test=test, partition_column="writer")
    federation = Federation(client_module(), FedAvg(), local="loop")
    run(federation, data)
    owner = {train[int(i)]["writer"]: k for k in range(data.num_clients) for i in data.client(k).train_rows}
    with torch.no_grad():
        right = federation.module.eval()(test.x).argmax(1) == test.y
    owners = torch.tensor([owner.get(test[i]["writer"], -1) for i in range(len(test))])
    there = sorted(set(owners.tolist()) - {-1})
    assert federation.own_accuracy == pytest.approx(
        {k: float(right[owners == k].double().mean()) for k in there}, abs=1e-12
    )
    assert len(there) == (3 if clients is None else 2)  # nobody tested writer g, nobody trains on those of c and z


def test_natural_clients_and_a_test_set_without_the_column() -> None:
    """Then as under label skew."""
    data = FederatedDataModule(
        _Written(140, 0, ["b", "a"]), Natural(), test=_Written(90, 1, None), partition_column="writer"
    )
    own = data.own_test()
    assert own.num_groups == CLASSES and torch.equal(own.groups, blobs(90, 1)[1])
    pairs = FederatedDataModule(_Written(140, 0, ["b", "a"]), Natural(), test=0.2, partition_column="writer").own_test()
    assert pairs.num_groups == 3 and set(pairs.groups.tolist()) == {0, 1}


def test_natural_clients_whose_values_are_numbers_of_another_kind() -> None:
    """Text compares first: "01" and "1" are two writers."""
    train = _Written(140, 0, [0, 1, 2])  # type: ignore[list-item]
    test = _Written(90, 1, [1.0, 0.0, 7.0])  # type: ignore[list-item]
    data = FederatedDataModule(train, Natural(), test=test, partition_column="writer")
    assert data.own_test().groups.tolist() == [1, 0, 3] * 30
    train, test = _Written(140, 0, ["01", "1", "x"]), _Written(90, 1, ["1", "1.0", "nan"])
    data = FederatedDataModule(train, Natural(), test=test, partition_column="writer")
    assert data.own_test().groups.tolist() == [1, 3, 3] * 30


def test_natural_clients_that_no_test_row_belongs_to() -> None:
    train, test = _Written(140, 0, ["b", "a"]), _Written(90, 1, ["B", "A", "C", "D"])
    said = r"'writer' in the test set .'A', 'B', 'C', .... is one of the training set's .'a', 'b'., so no client"
    with pytest.warns(UserWarning, match=said):
        own = FederatedDataModule(train, Natural(), test=test, partition_column="writer").own_test()
    assert own.num_groups == CLASSES and torch.equal(own.groups, test.y)


def test_a_parquet_files_writers(tmp_path: Path) -> None:
    """Also from the cache of decoded images, and of texts."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for split, writers in (("train", ["w2", "w0", "w5"]), ("test", ["w5", "w9", "w2", "w0"])):
        n = 60
        rows = {
            "image": [[[float(i + j) for j in range(2)], [0.0, 1.0]] for i in range(n)],
            "label": [i % 3 for i in range(n)],
            "writer": [writers[i % len(writers)] for i in range(n)],
        }
        parquet.write_table(pa.table(rows), tmp_path / f"{split}.parquet")
    for _ in range(2):
        data = FederatedDataModule(tmp_path, Natural(), partition_column="writer", cache_dir=tmp_path / "cache")
        assert data.own_test().groups.tolist() == [2, 3, 1, 0] * 15  # clients in the order of w0, w2, w5; 3: nobody
