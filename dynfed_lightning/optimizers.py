"""What ``configure_optimizers`` may return, read for a loop that steps one optimiser itself; and making one like another."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from torch import nn
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


def same_kind(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """A new optimiser of the class and defaults of `optimizer`, over other parameters.

    Of the defaults only those that the constructor names are passed: torch's AdamW, for one, has others.

    Raises:
        ValueError: the class cannot be made from them alone.
    """
    kind = type(optimizer)
    named = _named_arguments(kind)
    try:
        return kind(parameters, **{n: v for n, v in optimizer.defaults.items() if n in named})
    except TypeError as error:
        raise ValueError(
            f"Expected an optimizer that its class and its defaults make again, but {kind.__name__} is none ({error})."
        ) from error


def _named_arguments(kind: type) -> set[str]:
    """What a class's constructor takes by name; where it passes ``**kwargs`` on, its parent's too."""
    named: set[str] = set()
    for cls in kind.__mro__:
        if "__init__" in vars(cls):
            found = inspect.signature(vars(cls)["__init__"]).parameters.values()
            named |= {p.name for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
            if all(p.kind is not p.VAR_KEYWORD for p in found):
                break
    return named


def take_up(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Load what another one's ``state_dict`` gave, or its ``state`` alone.

    Without ``param_groups`` the optimiser's own stay, as it began: what a scheduler that starts anew reckons with.

    Args:
        optimizer: edited in place; shares no tensor with `saved` afterwards.
        saved: ``state``, and ``param_groups`` where learning rates are to go on as they were.
    """
    groups = saved.get("param_groups") or optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict(copy.deepcopy({"state": saved["state"], "param_groups": groups}))
