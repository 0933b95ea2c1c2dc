"""What every test relies on: one thread, no network, no display, and markers that skip what this machine lacks."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Before anything imports them.
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
from hypothesis import HealthCheck, settings

# A busy machine must not fail a property; the same examples every time, so that a red build can be repeated.
settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip ``gpu`` without a GPU and ``flower`` without flwr."""
    lacking = {}
    if not torch.cuda.is_available():
        lacking["gpu"] = "needs an NVIDIA GPU"
    if importlib.util.find_spec("flwr") is None:
        lacking["flower"] = "needs flwr"
    for item in items:
        for marker, reason in lacking.items():
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums differ in the last bit with the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
