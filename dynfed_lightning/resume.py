"""A checkpoint to resume a federation from, checked before anything is trained."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from dynfed_lightning.federation import Federation


def check_checkpoint(path: str | Path, federation: Federation) -> int:
    """Whether `federation` can go on from the checkpoint at `path`.

    Returns:
        how many rounds the checkpoint has behind it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a checkpoint of Lightning's, not a federation's, or another model's, method's or seed's.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected `ckpt` to be a checkpoint file, but there is no {path}.")

    def refuse(why: str) -> ValueError:
        return ValueError(f"Expected `ckpt` to be a checkpoint of this federation, but {path} {why}.")

    if path.suffix == ".safetensors":
        raise refuse("holds weights alone (safetensors): save one with Lightning's ModelCheckpoint")
    try:
        saved: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # whatever its bytes make of the reader
        raise refuse("is no checkpoint of Lightning's (torch.load cannot read it)") from error
    if not isinstance(saved, dict) or not isinstance(saved.get("state_dict"), dict):
        raise refuse("is no checkpoint of Lightning's (it has no `state_dict`)")
    if not isinstance(saved.get("federation"), dict):
        raise refuse("was made by something else than a Federation (it has no `federation` entry)")
    if "loops" not in saved or "optimizer_states" not in saved:
        raise refuse("holds weights alone: save it with `save_weights_only: false`")
    theirs, mine = _shapes(saved["state_dict"]), _shapes(federation.state_dict())
    for name in [*mine, *theirs]:
        if theirs.get(name) != mine.get(name):
            raise refuse(f"is of another model: `{name}` is {_said(theirs.get(name))}, not {_said(mine.get(name))}")
    for name, value in {"algorithm": federation.algorithm.name, "seed": federation.seed}.items():
        if saved["federation"].get(name) != value:
            raise refuse(f"was made with {name} {saved['federation'].get(name)!r}, not {value!r}")
    try:
        return int(saved["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])
    except (KeyError, TypeError):
        return 0


def _shapes(state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The global model's tensors alone, without the ``module.`` before their names."""
    start = "module."
    return {
        n.removeprefix(start): tuple(t.shape)
        for n, t in state.items()
        if n.startswith(start) and isinstance(t, torch.Tensor)
    }


def _said(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else " x ".join(map(str, shape)) or "a scalar"
