"""What the README shows must run, and what it states must be what the committed results say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


def _collect() -> ModuleType:
    spec = importlib.util.spec_from_file_location("collect", ROOT / "benchmarks" / "collect.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")  # what Lightning says to a person is not under test here
def test_the_fifteen_lines_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    block = next(b for b in BLOCKS if "trainer.fit" in b)
    lines = [line for line in block.splitlines() if line.strip()]
    assert len(lines) <= 15
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    shown = eval(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("{")))
    assert shown["accuracy"] > 0.85 and 2 <= shown["bits"] <= 8 and 6 * shown["mb_up"] < shown["mb_down"]
    assert (tmp_path / "runs/readme/rounds.csv").is_file()


def test_the_operations_run() -> None:
    block = next(b for b in BLOCKS if "quantize_pack" in b)
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    import torch

    x, y, mean = names["x"], names["y"], names["mean"]
    assert isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) and isinstance(mean, torch.Tensor)
    torch.testing.assert_close(mean, y, rtol=1e-5, atol=1e-6)
    assert float((x - y).abs().max()) <= float(x.abs().max()) / 7 + 1e-6


def test_the_method_in_one_file_runs() -> None:
    from toys import client_module, data_module, run

    from dynfed_lightning import Federation

    block = next(b for b in BLOCKS if "class MyMethod" in b)
    names: dict[str, type] = {}
    exec(compile(block, "README.md", "exec"), names)
    federation = Federation(client_module(), names["MyMethod"](), local="loop")
    run(federation, data_module(3), rounds=1)
    assert federation.last_round is not None and federation.last_round.metrics["largest"] == 80


@pytest.mark.filterwarnings("ignore")
def test_fedkd_and_its_callback_run() -> None:
    pytest.importorskip("sklearn")
    import lightning as L

    from dynfed_lightning import IID, FederatedDataModule

    names: dict[str, Any] = {}
    for start in ("dfl.FedKD(teacher", "dfl.MutualDistillation("):
        exec(compile(next(b for b in BLOCKS if start in b), "README.md", "exec"), names)
    federation, trainer, teacher = names["federation"], names["trainer"], names["teacher"]
    data = FederatedDataModule("digits", IID(3), batch_size=8)
    outer = L.Trainer(max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    outer.fit(federation, datamodule=data)
    shown = outer.callback_metrics
    assert shown["accuracy"] > 0.5 and shown["global_accuracy"] > 0.2 and shown["rank"] >= 1 and shown["energy"] == 0.98
    before = [p.clone() for p in teacher.parameters()]
    trainer.fit(names["student"], data.client(0).train_loader(0))
    assert any((p != q).any() for p, q in zip(teacher.parameters(), before, strict=True))
    update = {"w": next(iter(teacher.parameters())).detach()}
    assert len(names["codec"].encode(update)) < update["w"].numel() * 4


def test_gradient_compression_is_made() -> None:
    from dynfed_lightning import GradientCompression

    names: dict[str, Any] = {}
    exec(compile(next(b for b in BLOCKS if "GradientCompression(" in b), "README.md", "exec"), names)
    assert isinstance(names["callbacks"][0], GradientCompression)


def test_tables_are_those_of_the_committed_results() -> None:
    pytest.importorskip("matplotlib")
    assert _collect().fill_readme(TEXT) == TEXT


def test_pictures_files_and_links_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target
    for name in re.findall(r"`((?:algorithms/)?\w+\.py)`", TEXT):
        assert (ROOT / "dynfed_lightning" / name).is_file(), name
    for name in re.findall(r"benchmarks/configs/[\w-]+\.yaml", TEXT):
        assert (ROOT / name).is_file(), name


def test_the_configuration_runs(tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse")
    pytest.importorskip("sklearn")
    from dynfed_lightning.cli import main

    (block,) = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)
    (tmp_path / "mine.yaml").write_text(block)
    out = tmp_path / "run"
    assert main(["fit", "-c", str(tmp_path / "mine.yaml"), "--trainer.max_epochs", "2", "--out", str(out)]) == 0
    assert (out / "summary.json").is_file()
