"""The kernel benchmark: a tiny run has the promised rows, its percentages are right, its verdicts say what they should."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a file of ``benchmarks/`` as the scripts there do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("DYNFED_BACKEND", "DYNFED_CPU_ISA"):
        environment.pop(name, None)
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]], str]:
    """A run on 4096 values: the CSV's path, its rows, what was printed."""
    out = tmp_path_factory.mktemp("kernels") / "kernels-cpu.csv"
    options = ("--sizes", "4K", "--bits", "3,4,8", "--threads", "1", "--seconds", "0.0005", "--models", "resnet20")
    done = run("kernels.py", *options, "--peers", "eager,numpy,fbgemm,bitsandbytes,torchao", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    with open(out, newline="", encoding="utf-8") as file:
        return out, list(csv.DictReader(file)), done.stdout


def test_a_run_has_the_promised_columns_and_rows(
    tiny: tuple[Path, list[dict[str, str]], str], module: Callable[[str], ModuleType]
) -> None:
    _, rows, _ = tiny
    assert list(rows[0]) == module("kernels_timing").COLUMNS
    found = {(r["section"], r["operation"], r["implementation"], r["bits"], r["clients"]) for r in rows}
    for bits in "348":
        for operation in ("quantize_pack stochastic", "quantize_pack nearest", "quantize_pack eden"):
            assert {("main", operation, kind, bits, "1") for kind in ("ops", "out")} <= found
        for operation in ("unpack_dequantize", "pack", "unpack"):
            assert {("main", operation, kind, bits, "1") for kind in ("ops", "out")} <= found
        assert {("main", "dequantize_accumulate", "ops", bits, k) for k in "18"} <= found
    assert ("main", "quantize_pack stochastic", "kernel", "4", "1") in found
    assert ("main", "memcpy", "torch", "32", "1") in found and ("limits", "read", "torch", "32", "1") in found
    assert {("main", "quantize_pack stochastic", name, "4", "1") for name in ("eager", "numpy")} <= found
    mixed = "dequantize_accumulate 2-6 bits"
    assert {("accumulate", mixed, name, "4", "8") for name in ("ops", "ops, one by one")} <= found
    for kind in ("flat", "table", "list", "mixed bits"):
        assert {("layout", "quantize_pack, resnet20", f"{m}, {kind}", "4", "1") for m in ("ops", "out")} <= found
    assert ("layout", "quantize_pack, resnet20", "ops, a call per tensor", "4", "1") in found
    for block in (512, 4096):
        assert {("rotate", f"rotate {block}", name, "32", "1") for name in ("ops", "in place")} <= found
    assert {r["dtype"] for r in rows if r["section"] == "dtype"} == {"float32", "bfloat16", "float16"}
    assert any(r["section"] == "threads" for r in rows)


def test_every_row_of_ours_is_checked_and_timed(tiny: tuple[Path, list[dict[str, str]], str]) -> None:
    for row in tiny[1]:
        if row["version"] != "dynfed-lightning":
            continue
        assert int(row["runs"]) >= 3 and not row["note"], row
        assert float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert (
            row["checked"] == "bits"
            or "inverse" in row["operation"]
            or "per tensor" in row["implementation"]
            or ("flattened" in row["implementation"])
        )


def test_every_instruction_set_has_rows(tiny: tuple[Path, list[dict[str, str]], str]) -> None:
    from dynfed_lightning import _ops_backends

    if reason := _ops_backends.load_error():
        pytest.skip(reason)
    best = torch.ops.dynfed_lightning_cpu.best_isa()
    names = {f"cpu ({n})" for n, level in _ops_backends.INSTRUCTION_SETS.items() if 0 < level <= best}
    assert {r["backend"] for r in tiny[1] if r["section"] == "isa"} == names


def test_what_is_not_installed_is_named(tiny: tuple[Path, list[dict[str, str]], str]) -> None:
    _, rows, printed = tiny
    missing = {r["implementation"]: r["note"] for r in rows if r["section"] == "missing"}
    assert missing["compiled"] == "missing: left out by --peers" and "missing: compiled: left out" in printed
    for package in ("bitsandbytes", "torchao"):
        if importlib.util.find_spec(package) is None:
            assert "No module named" in missing[package] and f"missing: {package}" in printed
        else:
            assert any(package in r["version"] for r in rows)


def test_the_readme_reads_these_rows(tiny: tuple[Path, list[dict[str, str]], str], monkeypatch: Any) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    table = importlib.import_module("collect").kernels_table(tiny[0], 4096)
    assert "| memcpy | torch |" in table and "| quantize_pack stochastic | ops |" in table
    assert "| dequantize_accumulate, 8 clients | eager |" in table


def test_report_and_figure_lie_beside_the_csv(tiny: tuple[Path, list[dict[str, str]], str]) -> None:
    path, _, printed = tiny
    report = path.with_suffix(".md").read_text()
    for line in ("## Targets", "## 4 K values, 4 bits", "## Rotation", "## Instruction sets"):
        assert line in report
    assert "0 did not" in printed and "0 did not" in report
    if importlib.util.find_spec("matplotlib") is not None:
        assert path.with_suffix(".png").stat().st_size > 10_000


def test_numbers_of_a_row(module: Callable[[str], ModuleType]) -> None:
    timing = module("kernels_timing")
    # A million values and eight clients in 2 ms, beside copies of half as many in 1 ms.
    case = timing.Case("dequantize_accumulate", "ops", 4, 10**6, 12e6, run=lambda: None, clients=8)
    made = timing.numbers(case, timing.Timing([1.0, 2.0, 2.0, 2.0, 3.0], [0.5, 1.0, 1.5]), 500_000)
    assert made["runs"] == 5 and [made[p] for p in ("p20_ms", "p50_ms", "p80_ms")] == ["1.8000", "2.0000", "2.2000"]
    assert made["gb_per_s"] == "16.000" and made["gcodes_per_s"] == "4.000"  # 32 MB and 8e6 codes in 2 ms
    assert made["bytes_per_value"] == "12.0000" and made["moved_gb_per_s"] == "6.000"
    assert made["of_memcpy"] == "8.0000"  # 16 over the 2 GB/s that were copied
    assert made["of_copy"] == "1.5000"  # 6 over the 4 GB/s that the copy read and wrote


def test_a_case_that_fails_is_noted_and_the_others_are_measured(module: Callable[[str], ModuleType]) -> None:
    timing = module("kernels_timing")

    def wrong(_: object) -> str:
        raise AssertionError("7 of 9 values differ from the reference's")

    good = timing.Case("pack", "ops", 4, 512, 768, run=lambda: 1, check=lambda result: "bits" if result == 1 else "no")
    bad = timing.Case("pack", "out", 4, 512, 768, run=lambda: 1, check=wrong)
    broken = timing.Case("pack", "eager", 4, 512, 768, run=lambda: 1 / 0)
    first, second, third = timing.measure([good, bad, broken], timing.Copy(512, torch.device("cpu")), 0.0005)
    assert first.checked == "bits" and len(first.times) == len(first.copies) >= 3 and not first.note
    assert not second.times and "7 of 9" in second.note and "ZeroDivisionError" in third.note
    made = timing.row("main", bad, second, timing.Copy(512, torch.device("cpu")), 1, {})
    assert made["runs"] == 0 and made["p50_ms"] == "" and set(made) == set(timing.COLUMNS)


# ---- verdicts on a hand-made table ----


def _row(operation: str, implementation: str, ms: float, **more: Any) -> dict[str, str]:
    base = {"section": "main", "bits": 4, "n": 1 << 24, "clients": 1, "runs": 9, "threads": 2, "device": "cpu"}
    blank = dict.fromkeys(("backend", "gpu", "of_memcpy", "of_copy", "version", "note", "checked"), "")
    row = {**blank, **base, "operation": operation, "implementation": implementation, "p50_ms": ms, **more}
    return {k: str(v) for k, v in row.items()}


def _cpu_rows() -> list[dict[str, str]]:
    stochastic, nearest, mixed = "quantize_pack stochastic", "quantize_pack nearest", "dequantize_accumulate 2-6 bits"
    layout = {"section": "layout", "n": 272474}
    return [
        _row(stochastic, "ops", 2.0, of_memcpy=0.85),
        _row(stochastic, "eager", 79.9),
        _row(nearest, "bitsandbytes blockwise", 30.0, bits=8),
        _row(nearest, "ops", 2.0),
        _row(nearest, "fbgemm", 1.9),
        _row(mixed, "ops", 4.0, section="accumulate", clients=8, of_memcpy=3.16),
        _row(mixed, "ops, one by one", 10.0, section="accumulate", clients=8),
        _row("quantize_pack, resnet20", "ops, flat", 0.100, **layout),
        _row("quantize_pack, resnet20", "ops, table", 0.109, **layout),
        _row("quantize_pack, resnet20", "out, flat", 0.100, **layout),
        _row("quantize_pack, resnet20", "out, table", 0.111, **layout),
    ]


def test_verdicts_of_a_cpu(module: Callable[[str], ModuleType]) -> None:
    report = module("kernels_report")
    verdicts = report.verdicts(report.Results(_cpu_rows()))
    shown = [(v.word, v.measured, v.target) for v in verdicts]
    assert shown == [
        ("met", "85 % (2.00 ms)", ">= 85 %"),
        ("missed", "39.95 x", ">= 40 x"),
        ("met", "15.00 x", ">= 15 x"),
        ("met", "0.95 x (2.00 ms)", ">= 0.95 x"),
        ("met", "2.50 x", ">= 2.2 x"),
        ("missed", "0.79 (4.00 ms)", ">= 0.8"),  # a quarter of 3.16: codes, not their 4 bytes
        ("missed", "new output: +9.0 %; out=: +11.0 %", "<= 10 %"),
        ("not measured", "", "<= 10 %"),
    ]
    assert "16 M float32" in verdicts[0].where and "272,474" in verdicts[6].where


def test_verdicts_of_a_gpu(module: Callable[[str], ModuleType]) -> None:
    report = module("kernels_report")
    gpu = {"n": 1 << 30, "device": "cuda"}
    rows = [
        _row("quantize_pack stochastic", "ops", 1.2, of_copy=0.9, backend="cuda", **gpu),
        _row("quantize_pack stochastic", "ops", 1.5, of_copy=0.7, backend="triton", **gpu),
        _row("quantize_pack stochastic", "eager", 24.0, **gpu),
        _row("quantize_pack stochastic", "compiled", 6.0, **gpu),
        _row("dequantize_accumulate", "ops", 3.0, of_copy=0.86, backend="cuda", clients=8, **gpu),
    ]
    shown = [(v.word, v.measured) for v in report.verdicts(report.Results(rows))]
    assert shown == [
        ("met", "90 % (1.20 ms)"),
        ("met", "20.00 x (torch.compile: 5.00 x)"),
        ("missed", "70 % (1.50 ms)"),
        ("met", "16.00 x (torch.compile: 4.00 x)"),
        ("met", "86 % (3.00 ms)"),
        ("not measured", " (torch.compile: not measured)"),
        ("not measured", ""),
        ("not measured", " (torch.compile: not measured)"),
    ]


def test_peers_that_do_something_else_are_refused(module: Callable[[str], ModuleType]) -> None:
    peers = module("kernels_peers")
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    packed, scales = peers.eager_quantize_pack(x, 4, False)
    values = peers.eager_dequantize(packed, scales, 4)
    assert peers.within_symmetric_step(x, values, 4, 0.5) == "within 0.5 step"
    with pytest.raises(AssertionError, match="steps, not 0.5"):
        peers.within_symmetric_step(x, peers.eager_dequantize(packed, scales * 1.2, 4), 4, 0.5)
    with pytest.raises(AssertionError, match="steps, not 0.5"):
        peers.within_step(x, values, 31, 0.5)
    with pytest.raises(AssertionError, match="relative error"):
        peers.within_error(x, values, 1e-3)


def test_sizes_of_the_models(module: Callable[[str], ModuleType]) -> None:
    cases = module("kernels_cases")
    assert (sum(cases.distilbert_sizes()), len(cases.distilbert_sizes())) == (66_362_880, 100)
    assert sum(cases.resnet20_sizes()) == 272_474


def test_rotation_lowers_the_error_of_what_is_not_normal(module: Callable[[str], ModuleType]) -> None:
    rotation = module("rotation")
    x = rotation.laplace(1 << 14, torch.Generator().manual_seed(0))
    rows = rotation.measure("Laplace", x, [1 << 14], 2)
    error = {(r["method"], r["bits"]): float(r["error"]) for r in rows}
    mean = {(r["method"], r["bits"]): float(r["error_of_mean"]) for r in rows}
    for bits in (2, 3, 4):
        assert error["rotate + eden", bits] < 0.7 * error["eden", bits] < error["stochastic", bits]
        assert mean["rotate + eden", bits] < 0.2 * error["rotate + eden", bits]  # unbiased: about an eighth
        assert mean["nearest", bits] == pytest.approx(error["nearest", bits], rel=1e-9)  # always the same
    assert abs(error["rotate + eden", 4] / rotation.THEORY[3] - 1) < 0.05
    assert "## Laplace: 16,384 values" in rotation.markdown(rows, "rotation.csv")


def test_the_gpu_script_says_how_it_is_called() -> None:
    script = BENCHMARKS / "gpu.sh"
    assert os.access(script, os.X_OK)
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "usage: benchmarks/gpu.sh OUTDIR" in done.stderr
