"""Named tensors: what of a module travels, and the little arithmetic a federation does on it.

``Tensors`` is an ordered ``dict[str, Tensor]``. What of a module travels are its trainable parameters and its
floating-point buffers (BatchNorm's running statistics): the latter are averaged like weights but are *raw*, i.e. never
quantised. Frozen parameters and integer buffers never travel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]


def travelling(module: nn.Module) -> tuple[dict[str, Tensor], frozenset[str]]:
    """The live tensors of `module` that travel, and the names among them that are raw statistics.

    Returns:
        ``(live, raw)``: ``live`` maps state-dict names to the module's own tensors (no copies), trainable parameters first
        in module order, then persistent floating-point buffers; ``raw`` holds the names of the latter.
    """
    live: dict[str, Tensor] = {n: p for n, p in module.named_parameters() if p.requires_grad}
    persistent = module.state_dict(keep_vars=True)
    buffers = {n: b for n, b in module.named_buffers() if n in persistent and b.is_floating_point()}
    # torchmetrics keeps its states out of the state dict by default, so metric states do not travel.
    live.update(buffers)
    return live, frozenset(buffers)


def weights_of(module: nn.Module, names: Iterable[str] | None = None) -> Tensors:
    """Detached copies of everything of `module` that travels (see `travelling`), or of the parameters and buffers `names`.

    Names matter after a fit: a callback may have frozen or thawed layers, and what travels was agreed before.
    """
    if names is None:
        live, _ = travelling(module)
    else:
        every = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        live = {n: every[n] for n in names}
    return {n: t.detach().clone() for n, t in live.items()}


@torch.no_grad()
def load_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Copy `weights` into `module`'s travelling tensors.

    Names in `weights` that the module does not have are ignored (an algorithm may broadcast more than weights);
    a travelling tensor missing from `weights` is an error.

    Returns:
        the names of what travels, for `weights_of` after a fit.

    Raises:
        KeyError: a travelling tensor of the module is missing from `weights`.
    """
    live, _ = travelling(module)
    missing = [n for n in live if n not in weights]
    if missing:
        raise KeyError(f"Expected `weights` to hold {len(live)} tensors, but {missing[:3]} are missing.")
    for n, t in live.items():
        t.copy_(weights[n])
    return list(live)


def difference(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> Tensors:
    """``after - before``, tensor by tensor, for the names of `after`."""
    return {n: t.detach() - before[n].to(t.device) for n, t in after.items()}


def added(base: Mapping[str, Tensor], update: Mapping[str, Tensor]) -> Tensors:
    """``base + update`` for the names of `base`; a name without an update is copied."""
    return {n: t + update[n].to(t.device) if n in update else t.clone() for n, t in base.items()}


def weighted_mean(
    updates: Sequence[Mapping[str, Tensor]], weights: Sequence[float], names: Iterable[str] | None = None
) -> Tensors:
    """``sum_k weights[k] * updates[k] / sum(weights)`` in float64, rounded once to each tensor's dtype.

    The order of `updates` is the order of summation: pass them sorted by client id for results that do not depend on arrival.

    Raises:
        ValueError: no updates, or weights that do not sum to a positive number.
    """
    if not updates:
        raise ValueError("Expected `updates` to hold at least one update, but it is empty.")
    total = float(sum(weights))
    if not total > 0:
        raise ValueError(f"Expected `weights` to sum to a positive number, but got {total}.")
    out: Tensors = {}
    for n in names if names is not None else updates[0]:
        acc = torch.zeros(updates[0][n].shape, dtype=torch.float64, device=updates[0][n].device)
        for u, w in zip(updates, weights, strict=True):
            acc.add_(u[n], alpha=w / total)
        out[n] = acc.to(updates[0][n].dtype)
    return out
