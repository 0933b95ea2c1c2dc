"""benchmarks/comm_hooks.py from end to end, on two processes."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="needs the benchmarks of the source tree"),
    pytest.mark.skipif(torch.cuda.device_count() >= 2, reason="is about gloo, on the CPU"),
]


def bench(out: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "comm_hooks.py"), "--out", str(out), "--steps", "4", *args]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=600, check=False)


def test_rows_and_reasons(tmp_path: Path) -> None:
    ours = ["low rank 4", "low rank 4, 8-bit factors", "4 bits", "2 bits, rotated", "1 bit"]
    out = tmp_path / "hooks.csv"
    done = bench(out, "--models", "encoder", "--hooks", "plain", "torch bf16", "torch powerSGD, rank 4", *ours)
    assert done.returncode == 0, done.stdout + done.stderr
    with out.open(newline="") as f:
        rows = {row["hook"]: row for row in csv.DictReader(f)}
    assert list(rows) == ["plain", "torch powerSGD, rank 4", *ours]
    for hook, row in rows.items():
        assert (row["model"], row["ranks"], row["backend"], row["steps"]) == ("encoder", "2", "gloo", "4")
        assert 0 < float(row["loss"]) < 4 and float(row["p50_ms"]) > 0
        assert (float(row["ratio"]) == 1.0) == (hook == "plain")
        assert float(row["ratio"]) == pytest.approx(int(rows["plain"]["wire_bytes"]) / int(row["wire_bytes"]), rel=0.02)
    # Rank 4 in float32: the same factors in both.
    theirs, own = (int(rows[h]["wire_bytes"]) for h in ("torch powerSGD, rank 4", "low rank 4"))
    assert own == pytest.approx(theirs, rel=0.05)
    text = out.with_suffix(".md").read_text()
    assert "encoder, torch bf16: not run: torch's bf16_compress_hook takes NCCL, not gloo." in text
    assert all(f"| {hook} |" in text for hook in rows)


def test_a_case_that_takes_too_long_is_ended_and_reported(tmp_path: Path) -> None:
    out = tmp_path / "hooks.csv"
    done = bench(out, "--models", "encoder", "--hooks", "4 bits", "--timeout", "0.2")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "encoder, 4 bits: not run: not done after 0.2 seconds." in out.with_suffix(".md").read_text()
    assert len(out.read_text().splitlines()) == 1
