"""Comparisons: many runs, what must be the same, failures, resuming, and processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynfed_lightning import compare
from dynfed_lightning.cli import fit, main
from dynfed_lightning.config import load

pytest.importorskip("sklearn")
FOLDER = {"config.yaml", "rounds.csv", "clients.csv", "own_accuracy.csv", "summary.json", "model.safetensors", "plots"}
# Said once where there is no compiler; every run here would say it.
pytestmark = pytest.mark.filterwarnings("ignore:.*kernels of dynfed_lightning are missing.*")


def test_compare(tmp_path: Path, tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(tiny("FedAvg", algorithm="FedAvg")), str(tiny("Four bits", algorithm="FedPAQ"))]
    out = tmp_path / "all"
    command = ["compare", *files, "--seeds", "0", "1", "--out", str(out), "--last", "1"]
    assert main(command) == 0
    assert {p.name for p in out.iterdir()} == {
        "compare.md",
        "compare.json",
        "compare.png",
        "personal.png",
        "fedavg",
        "four-bits",
    }
    table = (out / "compare.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["FedAvg", "Four bits"]
    shown = capsys.readouterr().out
    assert table.strip() in shown and str(out / "compare.png") in shown
    numbers = json.loads((out / "compare.json").read_text())["methods"]
    assert [m["seeds"] for m in numbers] == [2, 2]
    assert 0 < numbers[1]["uplink_ratio"] < 0.5
    seeds = {json.loads((out / "fedavg" / s / "summary.json").read_text())["seed"] for s in ("seed0", "seed1")}
    assert seeds == {0, 1}
    same = {json.loads((out / n / "seed0" / "summary.json").read_text())["split"] for n in ("fedavg", "four-bits")}
    assert len(same) == 1

    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("model.safetensors")}
    assert main([*command, "--resume"]) == 0
    assert {p: p.stat().st_mtime_ns for p in out.rglob("model.safetensors")} == stamps
    assert capsys.readouterr().out.count("kept, finished before") == 4
    assert main([*command, "--resume", "--local.max_steps", "3"]) == 0  # changed, so trained again
    assert all(p.stat().st_mtime_ns != stamp for p, stamp in stamps.items())


def test_compare_goes_on_after_a_failure(
    tmp_path: Path, tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = compare.fit

    def broken(config: dict[str, Any]) -> Path:
        if config["name"] == "bad":
            raise RuntimeError("boom")
        return real(config)

    monkeypatch.setattr(compare, "fit", broken)
    files = [str(tiny("bad", algorithm="FedProx")), str(tiny("good", algorithm="FedAvg"))]
    assert main(["compare", *files, "--out", str(tmp_path / "all")]) == 1
    captured = capsys.readouterr()
    assert f"dynfed: failed: {tmp_path / 'all' / 'bad' / 'seed3'}: RuntimeError: boom" in captured.err
    assert "| good" in captured.out and "| bad" not in captured.out


@pytest.mark.slow
def test_compare_in_processes(tmp_path: Path, tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Two at a time; one dies, its last line is the reason; the other's weights are those of a run in this process."""
    good = tiny("good", algorithm="FedAvg")
    rate = {"init_args": {"lr": 1e30}}
    bad = tiny("bad", algorithm="FedAvg", module=rate)
    out = tmp_path / "all"
    assert main(["compare", str(good), str(bad), "--out", str(out), "--jobs", "2", "--allow-different"]) == 1
    captured = capsys.readouterr()
    assert "good, seed 3: done" in captured.out and "bad, seed 3: failed" in captured.out
    assert "RoundFailure" in captured.err
    folder = out / "good" / "seed3"
    assert {p.name for p in folder.iterdir()} == FOLDER | {"log.txt"}
    here = fit({**load([good]), "out": str(tmp_path / "here")})
    assert (here / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"data": {"partitioner": {"init_args": {"alpha": 0.5}}}}, "data.partitioner.init_args.alpha"),
        ({"data": {"batch_size": 8}}, "data.batch_size"),
        ({"trainer": {"max_epochs": 3}}, "trainer.max_epochs"),
        ({"module": {"init_args": {"lr": 0.2}}}, "module.init_args.lr"),
        ({"local": {"init_args": {"max_steps": 5}}}, "local.init_args.max_steps"),
        ({"local": "loop"}, "local"),
        ({"federation": {"min_clients": 2}}, "federation.min_clients"),
    ],
)
def test_compare_refuses_what_differs(
    changes: dict[str, Any], key: str, tmp_path: Path, tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(tiny("a", algorithm="FedAvg")), str(tiny("b", algorithm="FedProx", **changes))]
    assert main(["compare", *files, "--out", str(tmp_path / "all")]) == 2
    assert f"but `{key}` is" in capsys.readouterr().err
    assert not (tmp_path / "all").exists()
    items = compare.plan(files, tmp_path / "all", allow_different=True)
    assert [i.out.name for i in items] == ["seed3", "seed3"]


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (["--baseline", "FedAvg"], {}, "Expected `baseline` to be one of ['a', 'b'], but got 'FedAvg'."),
        (["--target", "70"], {}, "Expected `target` to be an accuracy in (0, 1], but got 70."),
        (["--target", "0"], {}, "Expected `target` to be an accuracy in (0, 1], but got 0."),
        (["--seeds", "0", "-1"], {}, "Expected `seeds` to be integers of at least 0, but got -1."),
        ([], {"algorithm": {"class_path": "FedPAQ", "init_args": {"bits": 9}}}, "Expected `bits`"),
        ([], {"algorithm": {"class_path": "DynFed", "init_args": {"distillation": "nonsense"}}}, "nonsense"),
        (["--data.partitioner.alpha", "-1"], {}, "a: Expected `alpha` to be a finite number above 0"),
        (["--data.public", "null"], {"algorithm": "DynFed"}, "b: Expected a public set, since DynFed distils"),
        (["--local.max_steps", "0"], {}, "Expected `max_steps`"),
    ],
)
def test_compare_finds_wrong_arguments_before_training(
    options: list[str],
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    tiny: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lightning.Trainer.fit", lambda *a, **k: pytest.fail("trained"))
    files = [str(tiny("a", algorithm="FedAvg")), str(tiny("b", **{"algorithm": "FedProx", **changes}))]
    assert main(["compare", *files, "--out", str(tmp_path / "all"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "all").exists()


def test_compare_needs_distinct_names_and_sane_numbers(
    tmp_path: Path, tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tiny("a", algorithm="FedAvg"))
    assert main(["compare", file, file, "--out", str(tmp_path / "all")]) == 2
    assert "Two of the configurations are called `a`" in capsys.readouterr().err
    assert main(["compare", file, "--jobs", "0"]) == 2
    assert main(["compare", file, "--last", "0"]) == 2


def test_seeds_move_the_split_unless_it_has_its_own(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    free = compare.plan([tiny("a", algorithm="FedAvg")], tmp_path / "x", seeds=[0, 1, 1])
    assert [(i.seed, i.config["data"]["seed"]) for i in free] == [(0, 0), (1, 1)]
    fixed = compare.plan([tiny("a", algorithm="FedAvg", data={"seed": 42})], tmp_path / "x", seeds=[0, 1])
    assert [i.config["data"]["seed"] for i in fixed] == [42, 42]
