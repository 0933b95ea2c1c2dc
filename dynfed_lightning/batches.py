"""What a batch and a model's output are made of, whatever the user's data set calls it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_INPUT_KEYS = ("image", "images", "img", "x", "input", "inputs", "pixel_values", "features")
_TARGET_KEYS = ("label", "labels", "target", "targets", "y")


def split_batch(batch: Any) -> tuple[Any, Tensor]:
    """Inputs and targets of a batch: ``(x, y)`` or a dict with one of the usual names.

    Raises:
        ValueError: neither; the message lists the dict's keys.
    """
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return batch[0], batch[1]
    if isinstance(batch, Mapping):
        target = next((k for k in _TARGET_KEYS if k in batch), None)
        source = next((k for k in _INPUT_KEYS if k in batch), None)
        if target is not None and source is not None:
            return batch[source], batch[target]
        raise ValueError(
            f"Expected a dict batch with one of {_INPUT_KEYS} and one of {_TARGET_KEYS}, but got the keys {sorted(batch)}."
        )
    raise ValueError(f"Expected batches as (inputs, targets) or dicts, but got {type(batch).__name__}.")


def logits_of(output: Any) -> Tensor:
    """The logits ``[B, C]`` of a model's output: the tensor itself, its ``logits`` attribute or entry.

    Raises:
        ValueError: there are none.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if hasattr(output, "logits"):
        return output.logits
    raise ValueError(f"Expected a model that returns logits, but it returned {type(output).__name__}.")
