"""Low-rank codecs both ways in a federation, agreed initial weights, and the global model judged beside the clients' own."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from toys import CLASSES, WIDTH, assert_same, client_module, data_module, run, skewed, weights

from dynfed_lightning import (
    ClientModule,
    Codec,
    DynFed,
    ErrorFeedback,
    FedAvg,
    Federation,
    Linear,
    LowRank,
    Quantize,
    RunRecorder,
    Scaffold,
    TopK,
)
from dynfed_lightning.message import Message
from dynfed_lightning.tensors import load_weights


def network(seed: int = 0) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Sequential(
            torch.nn.Linear(WIDTH, 40),
            torch.nn.ReLU(),
            torch.nn.Linear(40, 30),
            torch.nn.ReLU(),
            torch.nn.Linear(30, CLASSES),
        )


def wide() -> ClientModule:
    return ClientModule(network(), lr=0.1)


class Spy(L.Callback):
    """Every request and reply, by round and client."""

    def __init__(self, federation: Federation, lose: tuple[tuple[int, int], ...] = ()) -> None:
        self.federation = federation
        self.lose = lose
        self.requests: dict[tuple[int, int], Message] = {}
        self.down = self.up = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        honest = self.federation.transport.run_client  # type: ignore[union-attr]

        def run_client(request: bytes) -> bytes:
            message = Message.from_bytes(request)
            key = message.round, message.client_id
            self.requests[key] = message
            reply = honest(request)
            self.down += len(request)
            self.up += len(reply)
            return reply[:-1] if key in self.lose else reply

        self.federation.transport.run_client = run_client  # type: ignore[union-attr]


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ---- ranks and energies ----


def test_both_directions_ranks_energies_and_bytes_are_told(tmp_path: Path) -> None:
    def both() -> Codec:
        return Codec(LowRank(Linear(0.9, 0.98)), Quantize(8))

    federation = Federation(wide(), FedAvg(uplink=both(), downlink=both()), local="loop")
    spy = Spy(federation)
    trainer = run(federation, rounds=8, callbacks=[spy, RunRecorder(tmp_path)])
    assert trainer.callback_metrics["accuracy"] > 0.8
    assert (spy.up, spy.down) == (federation.total_bytes_up, federation.total_bytes_down)
    dense = Federation(wide(), FedAvg(), local="loop")
    run(dense, rounds=8)
    assert federation.total_bytes_up < 0.25 * dense.total_bytes_up
    assert federation.total_bytes_down < 0.4 * dense.total_bytes_down  # the first round's are whole
    table, clients = rows(tmp_path / "rounds.csv"), rows(tmp_path / "clients.csv")
    assert [float(r["energy"]) for r in table] == pytest.approx([0.9 + 0.08 * t / 7 for t in range(8)], abs=1e-6)
    for t, r in enumerate(table, start=1):
        mine = [c for c in clients if c["round"] == str(t)]
        assert float(r["rank"]) == pytest.approx(sum(float(c["rank"]) for c in mine) / len(mine))
        assert {c["energy"] for c in mine} == {r["energy"]}
        assert 1 <= float(r["rank"]) <= 10 and r["bits_mean"] == "8.0"
    assert table[0]["rank_down"] == "" and all(1 <= float(r["rank_down"]) <= 10 for r in table[1:])
    metrics = trainer.callback_metrics
    assert metrics["rank"] == pytest.approx(float(table[-1]["rank"]))
    assert metrics["energy"] == pytest.approx(0.98) and metrics["rank_down"] > 0


def test_a_round_without_factors_has_no_rank(tmp_path: Path) -> None:
    trainer = run(
        Federation(client_module(), FedAvg(), local="loop"), rounds=1, callbacks=[RunRecorder(tmp_path / "a")]
    )
    assert not {"rank", "rank_down", "energy"} & trainer.callback_metrics.keys()
    row = rows(tmp_path / "a" / "rounds.csv")[0]
    assert row["rank"] == row["energy"] == row["rank_down"] == ""
    whole = Federation(client_module(), FedAvg(uplink=LowRank(1.0)), local="loop")
    trainer = run(whole, rounds=1, callbacks=[RunRecorder(tmp_path / "b")])
    assert trainer.callback_metrics["energy"] == 1.0 and "rank" not in trainer.callback_metrics
    row = rows(tmp_path / "b" / "rounds.csv")[0]
    assert row["energy"] == "1.0" and row["rank"] == ""


def test_energy_one_is_fedavg() -> None:
    plain, low = (
        Federation(wide(), algorithm, local="loop")
        for algorithm in (FedAvg(), FedAvg(uplink=LowRank(1.0), downlink=LowRank(1.0)))
    )
    run(plain, rounds=2)
    run(low, rounds=2)
    assert_same(weights(plain), weights(low))


def test_what_is_cut_off_comes_back_with_error_feedback() -> None:
    """One triple a matrix and round; half the clients' updates would be lost without the residual."""
    runs = []
    for stages in ((ErrorFeedback(LowRank(1.0, max_rank=1)),), (LowRank(1.0, max_rank=1),), ()):
        federation = Federation(wide(), FedAvg(uplink=Codec(*stages)), local="loop")
        run(federation, rounds=6)
        runs.append(weights(federation))
    far = [sum(float((w[n] - runs[2][n]).square().sum()) for n in w) for w in runs[:2]]
    assert far[0] < 0.5 * far[1]


class _Poisoned(ClientModule):
    """Weights that are not finite on one client, after a loss that is."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.bad = bool((batch[1] == 0).all())

    def on_train_end(self) -> None:
        if self.bad:
            with torch.no_grad():
                self.model[2].weight[3, 4] = float("nan")


@pytest.mark.parametrize(
    "stages", [(LowRank(0.95),), (ErrorFeedback(LowRank(0.95), Quantize(4)),)], ids=["plain", "feedback"]
)
def test_a_client_with_nan_is_left_out_and_counted(stages: Any) -> None:
    from test_federation import _ByClass

    federation = Federation(_Poisoned(network(), lr=0.1), FedAvg(uplink=Codec(*stages)), local="loop")
    trainer = run(federation, data_module(partitioner=_ByClass(CLASSES), batch_size=80), rounds=2)
    assert trainer.callback_metrics["failed/nan_update"] == 1 and trainer.callback_metrics["clients"] == 2
    assert all(bool(torch.isfinite(t).all()) for t in weights(federation).values())
    assert federation.store.read(0) == {}  # nothing of it is remembered


@pytest.mark.parametrize(
    ("algorithm", "match"),
    [
        (lambda: FedAvg(uplink=LowRank(lambda t, T=None: 0.5 + 0.3 * t)), "above 0 and at most 1 in round 2"),
        (lambda: FedAvg(downlink=LowRank(lambda t, T=None: 0.5 + 0.3 * t)), "above 0 and at most 1 in round 2"),
        (lambda: FedAvg(uplink=ErrorFeedback(TopK(lambda t, T=None: 0.5 + 0.3 * t))), "`fraction` to be above 0"),
    ],
)
def test_a_schedule_that_will_leave_the_range_is_found_before_training(algorithm: Any, match: str) -> None:
    federation = Federation(wide(), algorithm(), local="loop")
    with pytest.raises(ValueError, match=match):
        run(federation, rounds=3)
    assert federation.last_round is None
    with pytest.raises(ValueError, match="Expected `T`, the number of rounds, for a linear schedule"):
        run(Federation(wide(), FedAvg(uplink=LowRank()), local="loop"), rounds=-1, max_time="00:00:01:00")


def test_distillation_goes_without_the_quantisers_step_where_factors_have_none() -> None:
    """DynFed dithers weights by their quantiser's step; an update of factors in float32 has none."""

    class LowRankDynFed(DynFed):
        def __init__(self, *stages: Any) -> None:
            super().__init__(distillation="active")
            self.uplink = Codec(*stages)

    for stages in ((LowRank(0.9),), (LowRank(0.9), Quantize(4))):
        trainer = run(Federation(wide(), LowRankDynFed(*stages), local="loop"), data_module(4, public=30), rounds=2)
        assert trainer.callback_metrics["failed"] == 0 and trainer.callback_metrics["distill_loss"] > 0


# ---- agreed initial weights ----

CODECS = {"float32": lambda: Codec(), "quantised": lambda: Codec(Quantize(8)), "low-rank": lambda: Codec(LowRank(0.9))}


@pytest.mark.parametrize("name", CODECS)
def test_known_weights_are_not_sent_and_change_nothing(name: str) -> None:
    made = {}
    for initial in ("sent", "known"):
        federation = Federation(wide(), FedAvg(downlink=CODECS[name]()), local="loop", initial=initial)
        spy = Spy(federation)
        run(federation, rounds=3, callbacks=[spy])
        made[initial] = federation, spy
    assert_same(weights(made["sent"][0]), weights(made["known"][0]))
    first = [made["known"][1].requests[0, k] for k in range(4)]
    assert all(m.kind == "known" and list(m.parts) == [] for m in first)
    later = "full" if name == "float32" else "difference"
    assert all(m.kind == later for (t, _), m in made["known"][1].requests.items() if t > 0)
    saved = made["sent"][0].total_bytes_down - made["known"][0].total_bytes_down
    first_sent = sum(len(made["sent"][1].requests[0, k].to_bytes()) for k in range(4))
    assert saved == first_sent - sum(len(m.to_bytes()) for m in first)
    assert max(len(m.to_bytes()) for m in first) < 80
    assert made["known"][0].total_bytes_down == made["known"][1].down


def test_known_weights_under_a_method_that_sends_more() -> None:
    """SCAFFOLD's control variates start at 0, which everyone knows too."""
    both = []
    for initial in ("sent", "known"):
        federation = Federation(wide(), Scaffold(downlink=8), local="loop", initial=initial)
        run(federation, rounds=3, callbacks=[spy := Spy(federation)])
        both.append(weights(federation))
    assert spy.requests[0, 0].kind == "known" and list(spy.requests[0, 0].parts) == []
    assert_same(*both)


class _WarmStart(FedAvg):
    """A server that starts from other weights than its clients know."""

    def broadcast(self, server: Any) -> Any:
        return {n: t + 0.5 if server.round == 0 and n.endswith("bias") else t for n, t in server.weights().items()}

    def server_step(self, server: Any, replies: Any) -> None:
        self.seen = server.received
        super().server_step(server, replies)


@pytest.mark.parametrize("name", CODECS)
def test_a_server_that_starts_elsewhere_sends_what_is_new(name: str) -> None:
    federation = Federation(wide(), algorithm := _WarmStart(downlink=CODECS[name]()), local="loop", initial="known")
    run(federation, rounds=1, callbacks=[spy := Spy(federation)])
    message = spy.requests[0, 0]
    assert (message.kind, len(message.parts)) == (("full" if name == "float32" else "known"), 1)
    torch.testing.assert_close(algorithm.seen["model.0.bias"], network()[0].bias + 0.5, rtol=0, atol=0.01)


def test_who_joins_late_gets_the_differences_so_far_or_the_dense_weights() -> None:
    """All but client 3 in each round; it comes in round 5 for the first time. Bits decide which is smaller."""
    kinds = {}
    for bits in (2, 8):
        federation = Federation(wide(), FedAvg(downlink=Codec(Quantize(bits))), local="loop", initial="known")
        cohorts = [[0, 1, 2]] * 5 + [[0, 3]] + [[3]]
        spy = Spy(federation)

        class Choose(L.Callback):
            def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
                step = federation.training_step  # noqa: B023
                federation.training_step = lambda batch, batch_idx: step(cohorts[trainer.current_epoch], batch_idx)  # type: ignore[method-assign]  # noqa: B023

        run(federation, rounds=7, callbacks=[spy, Choose()])
        late = spy.requests[5, 3]
        kinds[bits] = late.kind, len(late.parts)
        differences = sum(len(p) for t in range(1, 6) for p in spy.requests[t, 0].parts)
        assert spy.requests[5, 0].kind == spy.requests[6, 3].kind == "difference"
        dense = sum(4 * p.numel() for p in federation.module.parameters())
        assert sum(map(len, late.parts)) == (differences if bits == 2 else pytest.approx(dense, rel=0.2))
        assert spy.down == federation.total_bytes_down and federation.last_round.failures == {}
        assert torch.equal(
            federation.store.read(3)["downlink"]["tensors"]["model.0.weight"],
            federation.server.received["model.0.weight"],  # type: ignore[union-attr]
        )
    assert kinds == {2: ("known", 5), 8: ("full", 1)}


def test_who_failed_in_the_first_round_starts_from_what_it_knows() -> None:
    federation = Federation(wide(), FedAvg(downlink=Codec(Quantize(2))), local="loop", initial="known")
    spy = Spy(federation, lose=((0, 1), (1, 1)))
    run(federation, rounds=3, callbacks=[spy])
    assert [(spy.requests[t, 1].kind, len(spy.requests[t, 1].parts)) for t in range(3)] == [
        ("known", t) for t in range(3)
    ]
    assert [spy.requests[t, 0].kind for t in range(3)] == ["known", "difference", "difference"]


@pytest.mark.parametrize("name", CODECS)
def test_known_weights_survive_a_resume(tmp_path: Path, name: str) -> None:
    """The resumed process is given other initial weights: clients that join then must still start from the first ones."""

    def fresh(seed: int = 0) -> tuple[Federation, Any, Spy]:
        federation = Federation(
            ClientModule(network(seed), lr=0.1), FedAvg(downlink=CODECS[name]()), local="loop", initial="known"
        )
        return federation, data_module(8, skewed(8), clients_per_round=2, seed=3), Spy(federation)

    straight, data, told = fresh()
    run(straight, data, rounds=7, callbacks=[told])
    assert name == "float32" or any(m.kind == "known" for (t, _), m in told.requests.items() if t > 2)
    first, data, _ = fresh()
    run(first, data, rounds=2).save_checkpoint(tmp_path / "a.ckpt")
    resumed, data, again = fresh(seed=9)
    run(resumed, data, rounds=7, ckpt_path=tmp_path / "a.ckpt", callbacks=[again])
    assert_same(weights(resumed), weights(straight))
    assert resumed.total_bytes_down == straight.total_bytes_down
    assert [m.kind for m in again.requests.values()] == [m.kind for (t, _), m in told.requests.items() if t > 1]
    with pytest.raises(ValueError, match="checkpoint with initial 'sent', but it was made with 'known'"):
        other = Federation(wide(), FedAvg(downlink=CODECS[name]()), local="loop")
        run(other, fresh()[1], rounds=7, ckpt_path=tmp_path / "a.ckpt")


def test_a_second_fit_starts_from_what_is_known_then() -> None:
    federation = Federation(wide(), FedAvg(downlink=8), local="loop", initial="known")
    run(federation, rounds=2)
    run(federation, rounds=1, callbacks=[spy := Spy(federation)])  # from round 1, with the weights there are now
    assert spy.requests[0, 0].kind == "known" and list(spy.requests[0, 0].parts) == []
    assert federation.last_round.failures == {}  # type: ignore[union-attr]


@pytest.mark.parametrize("value", ["unknown", None, True, 1])
def test_other_beginnings_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=f"Expected `initial` to be 'sent' or 'known', but got {value!r}"):
        Federation(wide(), initial=value)


# ---- the global model beside the clients' own ----


class _Own(FedAvg):
    personalised = True

    def personal_model(
        self,
        client_state: Mapping[str, Any],
        module: L.LightningModule,
        global_weights: Any,
        client_id: int | None = None,
    ) -> L.LightningModule:
        load_weights(module, {n: t * (0.0 if client_id == 1 else 1.0) for n, t in global_weights.items()})
        return module


def test_the_global_model_is_judged_beside_the_clients_own(tmp_path: Path) -> None:
    class Both(_Own):
        reports_global = True

    plain, own, both = (Federation(wide(), a, local="loop") for a in (FedAvg(), _Own(), Both()))
    truth = run(plain, rounds=4).callback_metrics
    alone = run(own, rounds=4).callback_metrics
    metrics = run(both, rounds=4, callbacks=[RunRecorder(tmp_path)]).callback_metrics
    assert "global_accuracy" not in alone and "global_accuracy" not in truth
    assert metrics["global_accuracy"] == truth["accuracy"] > metrics["accuracy"] == alone["accuracy"]
    assert metrics["global_loss"] == truth["test_loss"] and metrics["test_loss"] == alone["test_loss"]
    assert metrics["accuracy_worst"] == pytest.approx(1 / 3)  # client 1 knows nothing
    row = rows(tmp_path / "rounds.csv")[-1]
    assert float(row["global_accuracy"]) == pytest.approx(float(truth["accuracy"]), abs=1e-6) and row["global_loss"]


# ---- configuration files ----


def _algorithm(tiny: Any, **arguments: Any) -> FedAvg:
    from dynfed_lightning.cli import build, finish
    from dynfed_lightning.config import dump, load, parse

    file = tiny("a", algorithm={"class_path": "FedAvg", "init_args": arguments}, federation={"initial": "known"})
    config = finish(load([file]))
    file.with_name("again.yaml").write_text(dump(config))
    _, federation, _ = build(parse(load([file.with_name("again.yaml")])))
    assert federation.initial == "known"
    return federation.algorithm


def test_codecs_with_factors_from_yaml(tiny: Any) -> None:
    number = {"class_path": "LowRank", "init_args": {"energy": 0.9}}
    schedule = {
        "class_path": "LowRank",
        "init_args": {"energy": {"class_path": "Linear", "init_args": {"start": 0.9, "end": 0.99}}, "max_rank": 5},
    }
    quantize = {"class_path": "Quantize", "init_args": {"bits": 4}}
    made = _algorithm(tiny, uplink=number, downlink=[schedule, quantize])
    (stage,) = made.uplink.stages
    assert isinstance(stage, LowRank) and (stage.energy, stage.max_rank, stage.min_size) == (0.9, None, 1)
    stage, four = made.downlink.stages
    assert isinstance(stage, LowRank) and stage.energy(1, 2) == 0.99 and stage.max_rank == 5
    assert isinstance(four, Quantize) and four.policy.bits == 4
    (stage,) = _algorithm(tiny, uplink={"class_path": "LowRank"}).uplink.stages
    assert isinstance(stage, LowRank) and [stage.energy(t, 2) for t in (0, 1)] == [0.95, 0.98]


def test_feedback_around_factors_from_yaml(tiny: Any) -> None:
    """A chain in a file is a list; error feedback in front of it wraps the others."""
    chain = [
        {"class_path": "LowRank", "init_args": {"energy": 0.9}},
        {"class_path": "Quantize", "init_args": {"bits": 4}},
    ]
    made = _algorithm(tiny, uplink=[{"class_path": "ErrorFeedback"}, *chain])
    (feedback,) = made.uplink.stages
    assert isinstance(feedback, ErrorFeedback) and repr(made.uplink) == "Codec(lowrank|quantize(512))"
    assert [type(s) for s in feedback.stages_inside] == [LowRank, Quantize]


@pytest.mark.parametrize(
    ("energy", "message"),
    [
        (1.5, "Expected `energy` to be above 0 and at most 1, but got 1.5."),
        (
            {"class_path": "Linear", "init_args": {"start": 0.9, "end": 1.1}},
            "Expected `energy` to be above 0 and at most 1",
        ),
        ("much", "much"),
    ],
)
def test_wrong_energies_in_yaml(tiny: Any, energy: Any, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    from dynfed_lightning.cli import main

    uplink = {"class_path": "LowRank", "init_args": {"energy": energy}}
    file = tiny("a", algorithm={"class_path": "FedAvg", "init_args": {"uplink": uplink}})
    assert main(["fit", "--config", str(file)]) == 2
    assert message in (error := capsys.readouterr().err) and error.count("\n") == 1
    assert main(["fit", "--config", str(tiny("b", algorithm="FedAvg", federation={"initial": "maybe"}))]) == 2
    assert "Expected `initial` to be 'sent' or 'known', but got 'maybe'." in capsys.readouterr().err
