from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import safetensors.torch
import torch
from toys import client_module, data_module, outer, run, skewed

from dynfed_lightning import DynFed, FedAvg, Federation, FedPAQ, RoundProgress, RunRecorder


def _rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _without_times(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{k: v for k, v in r.items() if k != "seconds"} for r in rows]


def test_a_run_folder_says_what_happened(tmp_path: Path) -> None:
    federation = Federation(client_module(), DynFed(), local="loop", seed=5)
    data = data_module(5, skewed(5), public=30, clients_per_round=3)
    trainer = run(federation, data, rounds=4, callbacks=[RunRecorder(tmp_path / "a" / "b", {"name": "mine"})])
    out = tmp_path / "a" / "b"
    rounds, clients = _rows(out / "rounds.csv"), _rows(out / "clients.csv")
    assert [r["round"] for r in rounds] == ["1", "2", "3", "4"]
    assert len(clients) == 12
    for r in rounds:
        mine = [c for c in clients if c["round"] == r["round"]]
        assert sum(int(c["bytes_up"]) for c in mine) == int(r["bytes_up"])
        assert sum(int(c["bytes_down"]) for c in mine) == int(r["bytes_down"])
        assert sum(float(c["teacher_share"]) for c in mine) == pytest.approx(1, abs=1e-5)
        bits = [float(c["bits"]) for c in mine]
        assert float(r["bits_mean"]) == pytest.approx(sum(bits) / 3) and float(r["bits_max"]) == max(bits)
        assert float(r["distill_loss"]) > 0 and float(r["seconds"]) > 0
    assert sum(int(r["bytes_up"]) for r in rounds) == int(rounds[-1]["total_bytes_up"]) == federation.total_bytes_up
    summary = json.loads((out / "summary.json").read_text())
    assert (
        summary["method"] == "DynFed" and summary["name"] == "mine" and summary["rounds"] == 4 and summary["seed"] == 5
    )
    assert summary["accuracy"] == pytest.approx(float(trainer.callback_metrics["accuracy"]), abs=1e-6)
    assert summary["best_accuracy"] == max(float(r["accuracy"]) for r in rounds)
    assert summary["bytes_up"] == federation.total_bytes_up and summary["split"] == data.split_hash
    saved = safetensors.torch.load_file(out / "model.safetensors")
    for name, tensor in federation.module.state_dict().items():
        assert torch.equal(saved[name], tensor)


def test_failures_are_written(tmp_path: Path) -> None:
    federation = Federation(client_module(), FedPAQ(4), local="loop")

    class Lose(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            federation.transport.run_client = lambda request: b"garbage"  # type: ignore[union-attr]

        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            federation.transport.run_client = (  # type: ignore[union-attr]
                federation.runtime.run if trainer.current_epoch else _flaky(federation)
            )

    run(federation, rounds=2, callbacks=[Lose(), RunRecorder(tmp_path)])
    rounds = _rows(tmp_path / "rounds.csv")
    assert [(r["clients"], r["failed"], r["failures"]) for r in rounds] == [("2", "2", "payload:2"), ("4", "0", "")]
    assert [c["status"] for c in _rows(tmp_path / "clients.csv")][:4] == ["payload", "ok", "payload", "ok"]


def _flaky(federation: Federation) -> Any:
    count = iter(range(100))
    return lambda request: federation.runtime.run(request) if next(count) % 2 else b"garbage"


def test_resumed_tables_equal_uninterrupted_ones(tmp_path: Path) -> None:
    def fresh() -> Federation:
        return Federation(client_module(), DynFed(), local="loop")

    def data() -> Any:
        return data_module(4, public=30)

    run(fresh(), data(), rounds=5, callbacks=[RunRecorder(tmp_path / "straight")])
    trainer = run(fresh(), data(), rounds=2, callbacks=[RunRecorder(tmp_path / "stopped")])
    trainer.save_checkpoint(tmp_path / "2.ckpt")
    run(fresh(), data(), rounds=4, callbacks=[RunRecorder(tmp_path / "stopped")], ckpt_path=tmp_path / "2.ckpt")
    # Back to round 2 once more: rounds 3 and 4 are replaced, not repeated.
    run(fresh(), data(), rounds=5, callbacks=[RunRecorder(tmp_path / "stopped")], ckpt_path=tmp_path / "2.ckpt")
    for name in ("rounds.csv", "clients.csv"):
        a, b = _rows(tmp_path / "straight" / name), _rows(tmp_path / "stopped" / name)
        assert _without_times(a) == _without_times(b)
    one, two = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("straight", "stopped"))
    assert {**one, "seconds": 0} == {**two, "seconds": 0}


def test_a_resumed_run_that_judges_nobody_keeps_what_is_known(tmp_path: Path) -> None:
    def go(rounds: int, **kwargs: Any) -> Any:
        federation, recorder = Federation(client_module(), FedAvg(), local="loop"), RunRecorder(tmp_path / "run")
        return run(federation, rounds=rounds, callbacks=[recorder], check_val_every_n_epoch=2, **kwargs)

    own = tmp_path / "run" / "own_accuracy.csv"
    go(2).save_checkpoint(tmp_path / "2.ckpt")
    known = own.read_text()
    go(3, ckpt_path=tmp_path / "2.ckpt")
    assert own.read_text() == known
    go(4, ckpt_path=tmp_path / "2.ckpt")
    assert own.is_file()
    go(3, ckpt_path=tmp_path / "2.ckpt")  # round 4's, which is no more
    assert not own.exists()


def test_a_new_run_replaces_an_old_one(tmp_path: Path) -> None:
    for rounds in (3, 1):
        run(Federation(client_module(), FedAvg(), local="loop"), rounds=rounds, callbacks=[RunRecorder(tmp_path)])
    assert len(_rows(tmp_path / "rounds.csv")) == 1


def test_rounds_without_validation_have_no_accuracy(tmp_path: Path) -> None:
    federation = Federation(client_module(), FedAvg(), local="loop")
    run(federation, rounds=4, callbacks=[RunRecorder(tmp_path)], check_val_every_n_epoch=2)
    assert [bool(r["accuracy"]) for r in _rows(tmp_path / "rounds.csv")] == [False, True, False, True]


def test_the_users_own_metrics_become_columns(tmp_path: Path) -> None:
    class Mine(L.Callback):
        def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            pl_module.log("mine", 0.5)

    run(Federation(client_module(), FedAvg(), local="loop"), rounds=1, callbacks=[Mine(), RunRecorder(tmp_path)])
    assert float(_rows(tmp_path / "rounds.csv")[0]["mine"]) == 0.5


def test_unwritable_folder_is_found_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    trainer = outer(1, callbacks=[RunRecorder(tmp_path / "file" / "run")])
    federation = Federation(client_module(), FedAvg(), local="loop")
    with pytest.raises(OSError, match="Expected `out` to be a folder to write to"):
        trainer.fit(federation, datamodule=data_module())
    assert federation.last_round is None


def test_progress_prints_a_line_every_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    run(Federation(client_module(), FedPAQ(4), local="loop"), rounds=20, callbacks=[RoundProgress("job")])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("job:")]
    assert (
        len(lines) == 11
        and lines[0].startswith("job: round 1/20  ")
        and lines[-1].startswith("job: round 20/20  accuracy 0.")
    )
    assert "4.00 bits" in lines[-1] and "MB" in lines[-1]


def test_progress_is_never_silent_for_long(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynfed_lightning.recorder.SILENCE", 0.0)
    run(Federation(client_module(), FedAvg(), local="loop"), rounds=20, callbacks=[RoundProgress("job")])
    assert capsys.readouterr().err.count("job: round") == 20


def test_needs_a_federation() -> None:
    class Plain(L.LightningModule):
        def training_step(self, *_: Any) -> None: ...
        def configure_optimizers(self) -> Any: ...

    with pytest.raises(TypeError, match="Expected a Federation in the outer Trainer, but got Plain"):
        outer(1, callbacks=[RunRecorder("x")]).fit(Plain(), [1])
