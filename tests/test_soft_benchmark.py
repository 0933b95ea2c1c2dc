"""benchmarks/soft_quantize.py on a small workload: every implementation agrees, and all rows are there."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_a_small_run(tmp_path: Path) -> None:
    out = tmp_path / "soft.csv"
    options = ["--threads", "1", "--size", "70000", "--centers", "2", "3", "--seconds", "0.01", "--memory", "1e-3"]
    done = subprocess.run(
        [sys.executable, "benchmarks/soft_quantize.py", *options, "--no-compile", "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with out.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    one = {
        "forward": 3,
        "forward + backward": 3,
        "nearest_center": 2,
        "prox_weights": 2,
        "prox_centers": 2,
        "center_sums": 2,
    }
    for workload in ("2 centres", "3 centres"):
        operations = [r["operation"] for r in rows if r["workload"] == workload]
        assert {o: operations.count(o) for o in one} == one and len(operations) == 14
    assert [r["implementation"] for r in rows if r["workload"] == "ResNet-20"] == [
        "ours",
        "ours, a call a layer",
        "plain",
        "ours",
        "torch",
    ]
    for r in rows:
        assert 0 < float(r["p20_ms"]) <= float(r["p50_ms"]) <= float(r["p80_ms"])
        assert r["implementation"] != "ours" or float(r["ratio"]) == 1
        assert float(r["error"] or 0) < 1e-4
    assert any("scaled" in r["note"] for r in rows)  # less memory than plain torch would need
    assert out.with_suffix(".md").read_text(encoding="utf-8").count("\n|") == len(rows) + 2
