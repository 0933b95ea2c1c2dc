"""Configuration files: merged, checked by name with the nearest one suggested, dumped and read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dynfed_lightning.cli import finish, main
from dynfed_lightning.config import ConfigError, dump, load, merge
from dynfed_lightning.lookup import find_class, parameters

# Said once where there is no compiler; every run here would say it.
pytestmark = pytest.mark.filterwarnings("ignore:.*kernels of dynfed_lightning are missing.*")


def words(file: Path, *more: str) -> list[str]:
    return ["--config", str(file), *more]


def test_files_merge_and_classes_are_found(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    tiny("base", algorithm={"class_path": "FedProx", "init_args": {"mu": 0.5}})
    (tmp_path / "top.yaml").write_text("base: base.yaml\nname: top\nalgorithm: FedAvg\ntrainer: {max_steps: 7}\n")
    config = load([tmp_path / "top.yaml"], ["--local.max_steps", "5", "--data.partitioner.alpha=0.1", "--seed", "9"])
    assert config["algorithm"] == {"class_path": "dynfed_lightning.algorithms.fedavg.FedAvg"}  # mu went with FedProx
    assert config["trainer"] == {"max_epochs": 2, "max_steps": 7}
    assert config["local"]["init_args"] == {"max_steps": 5}
    assert config["data"]["partitioner"]["init_args"] == {"num_clients": 3, "alpha": 0.1}
    assert (config["seed"], config["name"]) == (9, "top")


def test_another_method_takes_its_own_name(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    file = tiny("DynFed", algorithm="DynFed")
    assert finish(load([file]))["name"] == "DynFed"
    assert finish(load([file], ["--algorithm", "FedAvg"]))["name"] == "FedAvg"
    assert finish(load([file], ["--algorithm.class_path", "FedAvg"]))["name"] == "FedAvg"
    assert finish(load([file], ["--name", "mine", "--algorithm", "FedAvg"]))["name"] == "mine"
    assert finish(load([tiny("kept", algorithm="DynFed")], ["--algorithm.bits", "4"]))["name"] == "kept"
    (tmp_path / "top.yaml").write_text("base: DynFed.yaml\nalgorithm: FedAvg\n")
    assert finish(load([tmp_path / "top.yaml"]))["name"] == "FedAvg"


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
        (["--trainer.max_epochs", "null"], "Expected `trainer.max_epochs` to be the number of rounds, but it is not"),
        (["--trainer.max_epochs", "0"], "Expected `trainer.max_epochs` to be at least 1, or -1 for no end, but got 0."),
        (["--seed", "-1"], "Expected `seed` to be an integer of at least 0, but got -1."),
        (["--seed", "1", "2"], "Expected one `seed`, but got also 2: `dynfed compare --seeds` runs several."),
        (["--seed", "[1, 2]"], "Expected one `seed`, but got [1, 2]: `dynfed compare --seeds` runs several."),
        (["--trainer.logger", "CSVLogger"], "Expected `trainer.logger.save_dir` to be given, since CSVLogger requires"),
        (["--trainer.callbacks", "EarlyStopping"], "Expected `trainer.callbacks.monitor` to be given, since EarlySto"),
        (
            ["--data.partitioner", "Dirichlet"],
            "`data.partitioner.num_clients`, `data.partitioner.alpha` to be given, since Dirichlet requires",
        ),
        (["--data.partition_column", "writer"], "but got 'writer' with Dirichlet."),
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
    assert not (tmp_path / "out").exists()


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
