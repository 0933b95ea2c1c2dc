"""Classes by name for configuration files: short names, import paths, and the name that was meant by a typo."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

# Where short names are looked up, in this order.
_SHORT = (
    "dynfed_lightning.algorithms",
    "dynfed_lightning.module",
    "dynfed_lightning.local",
    "dynfed_lightning.models",
    "dynfed_lightning.partition",
    "dynfed_lightning.resources",
    "dynfed_lightning.schedules",
    "dynfed_lightning.bits",
    "dynfed_lightning.codec",
    "dynfed_lightning.stages",
    "dynfed_lightning.teachers",
    "dynfed_lightning.distill",
    "dynfed_lightning.callbacks",
    "dynfed_lightning.mutual",
    "dynfed_lightning.comm_hooks",
    "dynfed_lightning.recorder",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
)

# The sections whose classes have one base.
_HOMES = {
    "algorithm": ("dynfed_lightning.algorithm", "Algorithm"),
    "local": ("dynfed_lightning.local", "LocalExecutor"),
}
# Other names, some of functions that make what is asked for.
_ALIASES = {
    "text_encoder": "dynfed_lightning.encoder.TextEncoder",
    "load_text_encoder": "dynfed_lightning.encoder.load_text_encoder",
    "hf": "dynfed_lightning.hf.load_encoder",
}


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one line for a person."""


def parameters(cls: Callable[..., Any]) -> list[str] | None:
    """The names `cls` takes, following ``**kwargs`` to its base classes; None if a C function hides them."""
    names: dict[str, None] = {}
    for base in cls.__mro__ if isinstance(cls, type) else [cls]:
        init = base.__dict__.get("__init__") if isinstance(base, type) else base
        if init is None:
            continue
        try:
            # Lightning's Trainer wraps its __init__; the signature is that of the function inside.
            signature = inspect.signature(init)
        except (TypeError, ValueError):
            return None
        kinds = [p.kind for p in signature.parameters.values()]
        names |= {
            n: None
            for n, p in list(signature.parameters.items())[isinstance(base, type) :]  # without `self`
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        }
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            return list(names)
    return None if names == {} else list(names)


def short_names() -> dict[str, type]:
    """Every class that goes by its short name -> the class; names earlier in `_SHORT` win."""
    found: dict[str, type] = {}
    for module in _SHORT:
        try:
            loaded = importlib.import_module(module)
        except ImportError as error:
            if error.name and error.name.startswith(module):
                continue  # this part of the package is not there
            raise
        public = getattr(loaded, "__all__", None) or [n for n in vars(loaded) if not n.startswith("_")]
        for name in public:
            value = getattr(loaded, name, None)
            own = isinstance(value, type) and value.__module__.startswith(("dynfed_lightning", "lightning.pytorch"))
            if own and isinstance(value, type):
                found.setdefault(name, value)
    return found


def find_class(name: Any, where: str) -> Callable[..., Any]:
    """The class called `name`: a short name, or an import path ``package.module.Class`` (or of a function that makes one).

    Raises:
        ConfigError: nothing of that name; the nearest short name is suggested.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(f"Expected `{where}.class_path` to be a class's name, but got {name!r}.")
    module, dot, attribute = _ALIASES.get(name, name).rpartition(".")
    if not dot:
        known = short_names()
        if name in known:
            return known[name]
        fitting = [*_fitting(known, where), *(_ALIASES if where not in _HOMES else ())]
        raise ConfigError(unknown("class", name, fitting, where, listing=len(fitting) < 30))
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ConfigError(f"Cannot import `{name}` of `{where}`: {error}.") from error
    except AttributeError as error:
        candidates = [n for n, v in vars(importlib.import_module(module)).items() if isinstance(v, type)]
        raise ConfigError(unknown("class", name, [f"{module}.{c}" for c in candidates], where)) from error
    if not isinstance(found, type) and not inspect.isfunction(found):
        raise ConfigError(f"Expected `{where}.class_path` to be a class, but `{name}` is a {type(found).__name__}.")
    return found


def _fitting(known: Mapping[str, type], where: str) -> list[str]:
    """For the sections whose type is known, only the names that fit there."""
    if where not in _HOMES:
        return list(known)
    home, base_name = _HOMES[where]
    base = getattr(importlib.import_module(home), base_name)
    return [n for n, c in known.items() if issubclass(c, base) and c is not base]


def unknown(what: str, name: str, known: Iterable[str], where: str = "", listing: bool = True) -> str:
    known = [str(k) for k in known]
    full = f"{where}.{name}" if where and what == "key" else name
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not near:  # `dynfed` for `DynFed`
        near = [k for k in known if k.lower() == name.lower()] or near
    place = f" in `{where}`" if what == "class" else ""
    if near:
        return f"Unknown {what} `{full}`{place}; did you mean `{near[0]}`?"
    return f"Unknown {what} `{full}`{place}" + (
        f"; there are: {', '.join(sorted(known))}." if listing and known else "."
    )
