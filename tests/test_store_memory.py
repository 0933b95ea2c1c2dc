"""A thousand clients with a ResNet-20 and Adam's moments each, 3.3 GB in all, in the memory of a cohort."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).parent / "store_worker.py"
STATE = 3_300_000  # bytes of one client's, and a little


def measured(folder: Path, clients: int, store: str) -> dict[str, Any]:
    command = [sys.executable, str(WORKER), str(folder), str(clients), store]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    assert result["steps"] and result["clients"] == clients
    return result


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_clients(tmp_path: Path) -> None:
    """After the first three rounds, which have every buffer made that a round needs, it grows by less than a cohort's states."""
    cohort = 20 * STATE
    disk = measured(tmp_path / "disk", 1000, "disk")
    assert disk["state"] > 1000 * STATE * 0.99
    assert disk["peak"] - disk["rounds"][3] < 1.5 * cohort < 0.04 * disk["state"]
    assert disk["after the checkpoint"] - disk["peak"] < 0.5 * cohort and disk["checkpoint"] < 1_500_000
    # The measure itself: in memory, a fifth of the clients already need their states' size.
    memory = measured(tmp_path / "memory", 200, "memory")
    assert memory["peak"] - memory["rounds"][3] > 150 * STATE
