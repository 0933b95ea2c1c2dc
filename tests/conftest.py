"""What every test relies on: one thread, no network, no display, and markers that skip what this machine lacks."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Path]:
    """Write a small configuration, with changes, to a file: ``tiny("a", algorithm="FedAvg")``; two rounds, three clients."""
    from dynfed_lightning.config import merge

    def write(name: str, **changes: Any) -> Path:
        file = tmp_path / f"{name}.yaml"
        file.write_text(json.dumps(merge(TINY, {"name": name, **changes})))  # JSON is YAML
        return file

    return write
