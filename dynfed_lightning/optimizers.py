"""What ``configure_optimizers`` may return, read for a loop that steps one optimiser itself."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from torch.optim import Optimizer


def one_optimizer(module: L.LightningModule, who: str, advice: str = "") -> tuple[Optimizer, list[Any]]:
    """The single optimiser of `module` and its schedulers, each with ``scheduler``, ``interval`` and ``frequency``.

    Args:
        module: whose ``configure_optimizers`` is called.
        who: what the messages say expects it, e.g. ``"local='loop'"``.
        advice: what the messages end with.

    Raises:
        ValueError: more than one optimiser, none, or a scheduler that needs what such a loop does not have.
    """
    found: Any = module.configure_optimizers()
    end = f": {advice}" if advice else "."
    schedulers: list[Any] = []
    if isinstance(found, Mapping):
        schedulers = [found["lr_scheduler"]] if found.get("lr_scheduler") is not None else []
        found = found["optimizer"]
    elif isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], (list, tuple)):
        found, schedulers = found[0], list(found[1])
    if isinstance(found, (list, tuple)):
        if len(found) != 1 or not isinstance(found[0], Optimizer):
            raise ValueError(f"{who} expects one optimizer, but `configure_optimizers` returned {len(found)}{end}")
        found = found[0]
    if not isinstance(found, Optimizer):
        raise ValueError(f"{who} expects one torch optimizer, but got {type(found).__name__}{end}")
    configs = []
    for s in schedulers:
        config = dict(s) if isinstance(s, Mapping) else {"scheduler": s}
        if isinstance(config["scheduler"], torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ValueError(f"{who} has no metric for ReduceLROnPlateau{end}")
        unknown = config.keys() - {"scheduler", "interval", "frequency", "name"}
        if unknown:
            raise ValueError(f"{who} does not honour {sorted(unknown)} of a scheduler{end}")
        configs.append(SimpleNamespace(**{"interval": "epoch", "frequency": 1, **config}))
    return found, configs
