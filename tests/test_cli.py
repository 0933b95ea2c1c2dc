"""The command, from the outside: files in, exit code, one line of error or a folder of results out."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dynfed_lightning import compare
from dynfed_lightning.cli import describe, fit, main, one_line, slug
from dynfed_lightning.config import ConfigError, dump, load, merge
from dynfed_lightning.lookup import find_class, parameters

pytest.importorskip("sklearn")
ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "benchmarks" / "configs"
FOLDER = {"config.yaml", "rounds.csv", "clients.csv", "summary.json", "model.safetensors", "plots"}
# Lightning says so in every run that has no logger; nobody else's warning is let through.
pytestmark = pytest.mark.filterwarnings("ignore:.*kernels of dynfed_lightning are missing.*")

TINY: dict[str, Any] = {
    "seed": 3,
    "trainer": {"max_epochs": 2},
    "module": {
        "class_path": "ClientModule",
        "init_args": {"lr": 0.1, "model": {"class_path": "MLP", "init_args": {"in_features": 64, "hidden": [8]}}},
    },
    "local": {"class_path": "LoopLocal", "init_args": {"max_steps": 2}},
    "data": {
        "dataset": "digits",
        "partitioner": {"class_path": "Dirichlet", "init_args": {"num_clients": 3, "alpha": 1.0}},
        "public": 20,
        "train_fraction": 0.3,
    },
}


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Path]:
    """Write TINY with changes to a file; ``tiny("a", algorithm="FedAvg")``."""

    def write(name: str, **changes: Any) -> Path:
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(merge(TINY, {"name": name, **changes})))
        return file

    return write


def words(file: Path, *more: str) -> list[str]:
    return ["--config", str(file), *more]


# --------------------------------------------------------------------- reading


def test_files_merge_and_classes_are_found(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    tiny("base", algorithm={"class_path": "FedProx", "init_args": {"mu": 0.5}})
    (tmp_path / "top.yaml").write_text("base: base.yaml\nname: top\nalgorithm: FedAvg\ntrainer: {max_steps: 7}\n")
    config = load([tmp_path / "top.yaml"], ["--local.max_steps", "5", "--data.partitioner.alpha=0.1", "--seed", "9"])
    assert config["algorithm"] == {"class_path": "dynfed_lightning.algorithms.fedavg.FedAvg"}  # mu went with FedProx
    assert config["trainer"] == {"max_epochs": 2, "max_steps": 7}
    assert config["local"]["init_args"] == {"max_steps": 5}
    assert config["data"]["partitioner"]["init_args"] == {"num_clients": 3, "alpha": 0.1}
    assert (config["seed"], config["name"]) == (9, "top")


def test_bases_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ConfigError, match="leads back to itself"):
        load([tmp_path / "a.yaml"])


def test_merge() -> None:
    below = {"a": {"x": 1, "y": [1, 2]}, "b": {"class_path": "A", "init_args": {"p": 1}}}
    assert merge(below, {"a": {"y": [3]}}) == {**below, "a": {"x": 1, "y": [3]}}
    assert merge(below, {"b": {"class_path": "A", "init_args": {"q": 2}}})["b"]["init_args"] == {"p": 1, "q": 2}
    assert merge(below, {"b": {"class_path": "B"}})["b"] == {"class_path": "B"}


def test_parameters_follow_keyword_arguments() -> None:
    class A:
        def __init__(self, x: int, *, y: int = 0) -> None: ...

    class B(A):
        def __init__(self, z: int, **rest: int) -> None: ...

    def make(a: int, b: int = 1) -> A: ...  # type: ignore[empty-body]

    assert parameters(B) == ["z", "x", "y"]
    assert parameters(make) == ["a", "b"]
    assert find_class("collections.OrderedDict", "x").__name__ == "OrderedDict"


def test_resolved_configuration_reads_back_the_same(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    first = load([tiny("a", algorithm="DynFed", trainer={"callbacks": [{"class_path": "LambdaCallback"}]})])
    first["algorithm"]["init_args"] = {"distillation": None}  # a null that is not the default
    (tmp_path / "again.yaml").write_text(dump(first))
    assert load([tmp_path / "again.yaml"])["algorithm"]["init_args"]["distillation"] is None
    assert dump(load([tmp_path / "again.yaml"])) == dump(first)
    assert "lightning.pytorch.callbacks" in dump(first) and "num_nodes: 1" in dump(first)
    first["trainer"]["callbacks"] = [{"class_path": "lightning.pytorch.callbacks.Timer"}]  # its default has no YAML
    assert "lightning.pytorch.callbacks.Timer" in dump(first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--algoritm", "FedAvg"], "Unknown key `algoritm`; did you mean `algorithm`?"),
        (["--trainer.max_epoch", "3"], "Unknown key `trainer.max_epoch`; did you mean `max_epochs`?"),
        (["--algorithm.bitz", "4"], "Unknown key `algorithm.bitz`; did you mean `bits`?"),
        (["--data.partitioner.alfa", "1"], "Unknown key `data.partitioner.alfa`; did you mean `alpha`?"),
        (
            ["--data.partitioner", "{class_pth: IID}"],
            "Unknown key `data.partitioner.class_pth`; did you mean `class_path`?",
        ),
        (
            ["--data.partitioner", "Dirichlt"],
            "Unknown class `Dirichlt` in `data.partitioner`; did you mean `Dirichlet`?",
        ),
        (["--algorithm", "dynfed"], "Unknown class `dynfed` in `algorithm`; did you mean `DynFed`?"),
        (["--algorithm", "xyz"], "Unknown class `xyz` in `algorithm`; there are: Centralised, DAdaQuant, DynFed,"),
        (["--algorithm", "no.such.Thing"], "Cannot import `no.such.Thing` of `algorithm`: No module named 'no'."),
        (["--module.model.class_path", "torch.nn.Linar"], "did you mean `torch.nn.Linear`?"),
        (["--data.batch_size", "big"], "Expected `data.batch_size` to be int, but got 'big'."),
        (["--trainer.max_epochs", "x"], "Expected `trainer.max_epochs` to be int or null, but got 'x'."),
        (["--data.partitioner.alpha", "-1"], "Expected `alpha` to be a finite number above 0, but got -1"),
        (["--algorithm.bits", "9"], "Expected `bits`"),
        (["--local", "lop"], "Expected `local` to be 'trainer', 'loop' or an executor, but got 'lop'."),
        (["--data.dataset", "digitz"], "Did you mean 'digits'?"),
        (["--data.partitioner.num_clients", "100000"], "100000"),
        (["--data.public", "null"], "Expected a public set"),
        (["--module.model.num_classes", "7"], "10"),
        (["--federation.min_client", "3"], "Unknown key `federation.min_client`; did you mean `min_clients`?"),
        (["--trainer.max_epochs"], "Expected a value after `--trainer.max_epochs`."),
        (["surplus"], "Expected options like `--trainer.max_epochs 10`, but got `surplus`."),
        (["--ckpt", "nowhere.ckpt"], "Expected `ckpt` to be a checkpoint file, but there is no nowhere.ckpt."),
    ],
)
def test_bad_input_is_one_line_and_2(
    options: list[str], message: str, tmp_path: Path, tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tiny("a", algorithm="DynFed", out=str(tmp_path / "out"))
    assert main(["fit", *words(file), *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("dynfed: error: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert (
        not (tmp_path / "out" / "rounds.csv").is_file() or "round" not in (tmp_path / "out" / "rounds.csv").read_text()
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not YAML"),
        ("- 1", "to hold a mapping of sections, but it holds a list"),
        ("name: x", "Expected a section `module`"),
        ("trainer: 3\nmodule: ClientModule\nalgorithm: FedAvg\ndata: {}", "Expected a section `data`"),
    ],
)
def test_bad_files(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    assert main(["fit", *words(file)]) == 2
    assert message in capsys.readouterr().err
    assert main(["fit", *words(tmp_path / "missing.yaml")]) == 2
    assert "missing.yaml: No such file or directory" in capsys.readouterr().err


def test_debug_shows_the_traceback(tiny: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError):
        main(["fit", "--debug", *words(tiny("a", algorithm="FedAvg"), "--algoritm", "x")])


def test_unwritable_folder_is_found_before_training(
    tmp_path: Path, tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("lightning.Trainer.fit", lambda *a, **k: pytest.fail("trained"))
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert main(["fit", *words(tiny("a", algorithm="FedAvg"), "--out", str(out))]) == 2
        assert f"Expected `out` to be a folder to write to, but {out}" in capsys.readouterr().err
        assert main(["compare", str(tiny("a", algorithm="FedAvg")), "--out", str(out)]) == 2


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
    assert {p.name for p in (out / "plots").iterdir()} == {"accuracy.png", "bits.png", "teachers.png"}
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


# --------------------------------------------------------------------- compare


def test_compare(tmp_path: Path, tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(tiny("FedAvg", algorithm="FedAvg")), str(tiny("Four bits", algorithm="FedPAQ"))]
    out = tmp_path / "all"
    command = ["compare", *files, "--seeds", "0", "1", "--out", str(out), "--last", "1"]
    assert main(command) == 0
    assert {p.name for p in out.iterdir()} == {"compare.md", "compare.json", "compare.png", "fedavg", "four-bits"}
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
    bad = tiny("bad", algorithm={"class_path": "DynFed", "init_args": {"distillation": "nonsense"}})
    out = tmp_path / "all"
    assert main(["compare", str(good), str(bad), "--out", str(out), "--jobs", "2"]) == 1
    captured = capsys.readouterr()
    assert "good, seed 3: done" in captured.out and "bad, seed 3: failed" in captured.out
    assert "nonsense" in captured.err
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
    """One round of two steps on three clients; MNIST where its files are (DYNFED_DATA names the folder)."""
    short = ["--trainer.max_epochs", "1", "--local.max_steps", "2", "--data.partitioner.num_clients", "3"]
    if file.name.startswith("mnist"):
        folder = Path(os.environ.get("DYNFED_DATA", "no-such-folder")) / "mnist"
        if not folder.is_dir():
            load([file], short)  # the names are checked all the same
            pytest.skip("needs MNIST: DYNFED_DATA=folder with mnist/*.parquet")
        short += ["--data.data_dir", str(folder), "--data.train_fraction", "0.05", "--data.limit_test", "100"]
    monkeypatch.setattr("dynfed_lightning.cli.draw", lambda out: [])
    out = fit(load([file], [*short, "--out", str(tmp_path / "run")]))
    summary = json.loads((out / "summary.json").read_text())
    assert summary["rounds"] == 1 and 0 <= summary["accuracy"] <= 1
