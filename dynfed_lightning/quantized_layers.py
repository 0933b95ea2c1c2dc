"""Which layers of a module are quantised, and to how many bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

from torch import nn

Bits = int | Mapping[str, int | None] | Callable[[str, nn.Parameter], int | None] | None
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def candidates(module: nn.Module) -> dict[str, nn.Parameter]:
    """What could be quantised: trainable floating-point parameters of two or more dimensions, in the order of registration,
    but for those of normalisation layers and of ``torch.nn.utils.parametrizations`` (they are not what the layer multiplies
    by). One that several layers share is one, under its first name."""
    norms = {id(p) for m in module.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}
    return {
        n: p
        for n, p in module.named_parameters()
        if p.requires_grad
        and p.is_floating_point()
        and p.ndim >= 2
        and p.numel()
        and id(p) not in norms
        and "parametrizations." not in n
    }


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
    names = list(found) if ends else list(found)[1:-1]
    chosen: dict[str, int | None] = {}
    if isinstance(bits, Mapping):
        for pattern in bits:
            if not any(fnmatchcase(n, pattern) for n in names):
                kept = [n for n in found if n not in names and fnmatchcase(n, pattern)]
                advice = f" ({kept[0]!r} is first or last: ends=True)" if kept else ""
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
