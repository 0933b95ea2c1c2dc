"""Which layers of a module are quantised, and to how many bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn
from torch.optim import Optimizer

Bits = int | Mapping[str, int | None] | Callable[[str, nn.Parameter], int | None] | None
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def candidates(module: nn.Module) -> dict[str, nn.Parameter]:
    """What could be quantised: trainable floating-point parameters of two or more dimensions, in the order of registration,
    but for those of normalisation layers, of ``weight_norm``, ``spectral_norm`` and the like (they are not what the layer
    multiplies by), and of embeddings with ``padding_idx`` (a row of zeros, which need not be a centre), ``sparse`` gradients
    or ``max_norm``. One that several layers share is one, under its first name."""
    float_ones = _own_ways(module)
    return {n: p for n, p in _weights(module).items() if id(p) not in float_ones}


def _weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """`candidates`, and embeddings that are none."""
    made = {
        id(p)
        for m in module.modules()
        for n, p in m.named_parameters(recurse=False)
        if isinstance(m, NORMS) or _is_part(m, n)
    }
    return {
        n: p
        for n, p in module.named_parameters()
        if p.requires_grad
        and p.is_floating_point()
        and p.ndim >= 2
        and p.numel()
        and id(p) not in made
        and "parametrizations." not in n
    }


def _is_part(module: nn.Module, name: str) -> bool:
    """Whether a hook makes the weight of this parameter, as ``torch.nn.utils.weight_norm`` and ``prune`` do."""
    whole, _, part = name.rpartition("_")
    return part in ("g", "v", "orig") and whole not in module._parameters and hasattr(module, whole)


def _own_ways(module: nn.Module) -> set[int]:
    """Embeddings that would not stay among their centres, or whose gradients are no dense tensors."""
    found = [m for m in module.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    return {id(m.weight) for m in found if m.padding_idx is not None or m.sparse or m.max_norm is not None}


def _check_bits(what: str, value: object) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 8):
        raise ValueError(f"Expected {what} to be an integer from 1 to 8, but got {value!r}.")


def check_layer_bits(bits: Bits) -> None:
    """What can be said of `bits` without a module.

    Raises:
        ValueError: an integer out of range, or neither integer, mapping, function nor None.
    """
    if isinstance(bits, Mapping):
        for pattern, value in bits.items():
            _check_bits(f"`bits` of {pattern!r}", value)
    elif not callable(bits):
        _check_bits("`bits`", bits)


def choose_layers(module: nn.Module, bits: Bits, ends: bool = False) -> dict[str, int]:
    """Which parameters are quantised, and to how many bits.

    Args:
        module: whose parameters.
        bits: 1 to 8 for all; a mapping from patterns of names (`fnmatch`, the first that matches counts) to bits or None; a
            function of name and parameter; None: none is quantised.
        ends: quantise the first and the last layer too (in the order of registration).

    Raises:
        ValueError: bits out of range, a pattern that matches no layer, or a number of bits where there is no layer.
    """
    check_layer_bits(bits)
    if bits is None:
        return {}
    found = candidates(module)
    every = list(_weights(module))  # an embedding that stays float may be the first layer all the same
    names = [n for n in (every if ends else every[1:-1]) if n in found]
    chosen: dict[str, int | None] = {}
    if isinstance(bits, Mapping):
        for pattern in bits:
            if not any(fnmatchcase(n, pattern) for n in names):
                kept = [n for n in found if n not in names and fnmatchcase(n, pattern)]
                advice = f" ({kept[0]!r} is first or last: ends=True)" if kept else ""
                if any(fnmatchcase(n, pattern) for n in every if n not in found):
                    advice = " (embeddings with `padding_idx`, `sparse` or `max_norm` stay float)"
                raise ValueError(
                    f"Expected the pattern {pattern!r} of `bits` to match a layer, but there are {names}{advice}."
                )
        for name in names:
            chosen[name] = next((b for p, b in bits.items() if fnmatchcase(name, p)), None)
    elif callable(bits):
        chosen = {n: bits(n, found[n]) for n in names}
    else:
        if not names:
            raise ValueError(
                f"Expected {type(module).__name__} to have layers between the first and the last to quantise, but it has "
                f"{list(found)} in all: ends=True quantises those too."
            )
        chosen = dict.fromkeys(names, bits)
    for name, value in chosen.items():
        _check_bits(f"`bits` of {name!r}", value)
    return {n: b for n, b in chosen.items() if b is not None}


def check_stepped(names: Iterable[str], parameters: Iterable[nn.Parameter], optimizers: Iterable[Optimizer]) -> None:
    """Only what an optimiser steps can be quantised: nothing would clear another's gradients, or undo what moves it.

    Raises:
        ValueError: one of `parameters` is in none of `optimizers`; names it.
    """
    stepped = {id(p) for o in optimizers for g in o.param_groups for p in g["params"]}
    for name, p in zip(names, parameters, strict=True):
        if id(p) not in stepped:
            raise ValueError(
                f"Expected an optimiser to step {name!r}, which is quantised, but none does: `requires_grad_(False)`, or None "
                f"for {name!r} in a mapping of `bits`, leaves it as it is."
            )
