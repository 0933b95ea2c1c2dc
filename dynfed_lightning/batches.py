"""What a batch and a model's output are made of, whatever the user's data set and model call it.

A batch is ``(inputs, targets)`` or a dict. Inputs are a tensor, or for text a dict of tensors that all begin with the
batch's dimension: ``{"input_ids": int64 [B, T], "attention_mask": int64 [B, T]}`` and what else the tokeniser gives.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Tensor | Mapping[str, Tensor]

_INPUT_KEYS = ("image", "images", "img", "x", "input", "inputs", "pixel_values", "features")
_TARGET_KEYS = ("label", "labels", "target", "targets", "y")
_TEXT_KEYS = ("input_ids", "inputs_embeds")


def split_batch(batch: Any) -> tuple[Any, Tensor]:
    """Inputs and targets of a batch: ``(x, y)`` or a dict with one of the usual names.

    Of a dict of text (with ``input_ids``) the inputs are the dict without the targets; of any other, one entry of it.

    Raises:
        ValueError: neither; the message lists the dict's keys.
    """
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return batch[0], batch[1]
    if isinstance(batch, Mapping):
        target = next((k for k in _TARGET_KEYS if k in batch), None)
        rest = {k: v for k, v in batch.items() if k != target}
        if target is not None and any(k in batch for k in (*_TEXT_KEYS, *_INPUT_KEYS)):
            return inputs_of(rest), batch[target]
        raise ValueError(
            f"Expected a dict batch with one of {_TEXT_KEYS + _INPUT_KEYS} and one of {_TARGET_KEYS}, "
            f"but got the keys {sorted(batch)}."
        )
    raise ValueError(f"Expected batches as (inputs, targets) or dicts, but got {type(batch).__name__}.")


def inputs_of(inputs: Any) -> Any:
    """What a model is called with: a dict of text as it is, the one usual entry of any other dict, else `inputs` itself."""
    if isinstance(inputs, Mapping) and not any(k in inputs for k in _TEXT_KEYS):
        source = next((k for k in _INPUT_KEYS if k in inputs), None)
        return inputs if source is None else inputs[source]
    return inputs


def call_model(module: nn.Module, inputs: Any) -> Any:
    """``module(inputs)``, and for a mapping ``module(**inputs)`` where the module's ``forward`` names its entries.

    Entries that ``forward`` cannot take (a row's number, the token types of a model that has none) are left out. A
    ``forward`` that names none of them and takes one argument gets the mapping itself.
    """
    if not isinstance(inputs, Mapping):
        return module(inputs)
    kinds = inspect.signature(module.forward).parameters
    named = {n for n, p in kinds.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    anything = any(p.kind == p.VAR_KEYWORD for p in kinds.values())
    needed = {n for n in named if kinds[n].default is inspect.Parameter.empty} - inputs.keys()
    if named & inputs.keys() or (anything and not needed):
        return module(**(inputs if anything else {k: v for k, v in inputs.items() if k in named}))
    return module(inputs)


def num_rows(inputs: Any) -> int:
    """How many samples `inputs` hold."""
    return len(next(iter(inputs.values()))) if isinstance(inputs, Mapping) else len(inputs)


def take(inputs: Any, rows: int | slice | Tensor) -> Any:
    """The first `rows` samples, or the chosen ones, of a tensor or of every tensor of a mapping."""
    index = slice(rows) if isinstance(rows, int) else rows
    if isinstance(inputs, Mapping):
        return trimmed({k: take(v, index) for k, v in inputs.items()})
    if isinstance(index, Tensor) and isinstance(inputs, Tensor):
        index = index.to(inputs.device)
    return inputs[index]


def trimmed(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Text without the last columns that no row attends to: what stays of padding after rows were chosen."""
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.numel() == 0 or mask.device.type != "cpu":
        return dict(inputs)
    used = torch.nonzero(mask.any(0))
    length = int(used[-1]) + 1 if len(used) else 1
    if length == mask.shape[1]:
        return dict(inputs)
    return {k: v[:, :length] if getattr(v, "shape", ())[:2] == mask.shape else v for k, v in inputs.items()}


def to_device(inputs: Any, device: torch.device | str) -> Any:
    """A tensor, or every tensor of a mapping, on `device`."""
    if isinstance(inputs, Mapping):
        return {k: v.to(device) for k, v in inputs.items()}
    return inputs.to(device)


def logits_of(output: Any) -> Tensor:
    """The logits ``[B, C]`` of a model's output: the tensor itself, its ``logits`` attribute or entry.

    Raises:
        ValueError: there are none.
    """
    if isinstance(output, Tensor):
        return output
    logits = _part(output, "logits")
    if logits is None:
        raise ValueError(f"Expected a model that returns logits, but it returned {type(output).__name__}.")
    return logits


def hidden_states_of(output: Any) -> tuple[Tensor, ...] | None:
    """A model's hidden states, the embeddings first: layers + 1 tensors ``[B, T, H]``; ``None`` where it returns none."""
    states = _part(output, "hidden_states")
    return tuple(states) if states else None


def attentions_of(output: Any) -> tuple[Tensor, ...] | None:
    """A model's attention maps, after the softmax: a tensor ``[B, heads, T, T]`` a layer; ``None`` where it returns none."""
    maps = _part(output, "attentions")
    return tuple(maps) if maps else None


def _part(output: Any, name: str) -> Any:
    if isinstance(output, Mapping) and name in output:
        return output[name]
    return None if isinstance(output, Tensor) else getattr(output, name, None)
