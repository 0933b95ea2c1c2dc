"""YAML files of runs: read, merged, checked by name, and turned into objects.

A file's sections are those of `SECTIONS`; a class is given as ``{class_path: DynFed, init_args: {bits: 4}}`` or, with no
arguments, as its name alone. Classes of this package and Lightning's callbacks and loggers go by their short name, anything
else by its import path. ``base: other.yaml`` (or a list) puts a file on top of others. Types are checked by jsonargparse,
names here first, because a typo deserves the name that was meant.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

SECTIONS = {
    "seed": "of everything random: the split, the cohorts, the initial weights, the rounding",
    "name": "the label in tables and figures",
    "out": "the run's folder",
    "trainer": "arguments of lightning.Trainer; max_epochs is the number of rounds",
    "module": "the LightningModule that clients train",
    "algorithm": "the method",
    "local": "how a client trains: trainer, loop, or an executor with arguments",
    "federation": "the other arguments of Federation",
    "data": "arguments of FederatedDataModule",
}
REQUIRED = ("module", "algorithm", "data")
CLASS_SECTIONS = ("module", "algorithm", "local")
_CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
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
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
)

Config = dict[str, Any]


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one line for a person."""


def load(paths: Sequence[str | Path], overrides: Iterable[str] = ()) -> Config:
    """Read and merge configuration files, later ones on top, then ``--key value`` overrides; names are checked.

    Args:
        paths: YAML files; each may name others as its ``base`` (paths relative to itself).
        overrides: command-line words: ``--trainer.max_epochs 3``, ``--algorithm.bits=4`` (``init_args`` may be left out),
            ``--algorithm FedAvg``. Values are YAML.

    Returns:
        the configuration as plain dicts, lists and scalars, with full class paths.

    Raises:
        ConfigError: a file that is missing or not YAML, an unknown key or class (the nearest is suggested).
    """
    config: Config = {}
    for path in paths:
        config = merge(config, _read(Path(path), ()))
    for key, value in _parse_overrides(overrides):
        config = merge(config, _nested(key, value, config))
    return check(config)


def merge(below: Any, above: Any) -> Any:
    """`above` on top of `below`: mappings merge key by key, anything else replaces. Another class drops the old arguments."""
    if not isinstance(below, Mapping) or not isinstance(above, Mapping):
        return above
    if "class_path" in above and above["class_path"] != below.get("class_path"):
        return dict(above)
    return {**below, **{k: merge(below.get(k), v) for k, v in above.items()}}


def _read(path: Path, parents: tuple[Path, ...]) -> Config:
    yaml = _yaml()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"Expected `config` to be a readable YAML file, but {path}: {reason}.") from error
    try:
        config = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"Expected {path} to hold a mapping of sections, but it holds a {type(config).__name__}.")
    config = _classes_by_name(config)
    bases = config.pop("base", [])
    below: Config = {}
    for base in [bases] if isinstance(bases, str) else bases:
        file = (path.parent / base).resolve()
        if file in parents or file == path.resolve():
            raise ConfigError(f"`base` in {path} leads back to itself: {base}.")
        below = merge(below, _read(file, (*parents, path.resolve())))
    return merge(below, config)


def _yaml() -> Any:
    try:
        return importlib.import_module("yaml")
    except ImportError as error:
        raise ImportError("Configuration files need PyYAML: pip install dynfed-lightning[cli]") from error


def _classes_by_name(config: Config) -> Config:
    """``algorithm: FedAvg`` -> ``algorithm: {class_path: FedAvg}``; ``local: loop`` stays, the federation knows it."""
    short = {k: {"class_path": v} for k, v in config.items() if k in CLASS_SECTIONS[:2] and isinstance(v, str)}
    return {**config, **short}


def _parse_overrides(words: Iterable[str]) -> list[tuple[str, Any]]:
    yaml = _yaml()
    pairs: list[tuple[str, Any]] = []
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or len(word) < 3:
            raise ConfigError(f"Expected options like `--trainer.max_epochs 10`, but got `{word}`.")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"Expected a value after `--{key}`.")
            text = words.pop(0)
        try:
            pairs.append((key, yaml.safe_load(text)))
        except yaml.YAMLError as error:
            raise ConfigError(f"Expected the value of `--{key}` to be YAML, but got {text!r}.") from error
    return pairs


def _nested(key: str, value: Any, config: Any) -> Config:
    """``a.b`` and v -> {a: {b: v}}, with ``init_args`` put in where `config` has a class and the key does not say it."""
    head, dot, rest = key.partition(".")
    if isinstance(config, Mapping) and "class_path" in config and head not in _CLASS_KEYS:
        return {"init_args": _nested(key, value, config.get("init_args", {}))}
    if not dot:
        return _classes_by_name({head: value})
    below = config.get(head) if isinstance(config, Mapping) else None
    if isinstance(below, str) and head in CLASS_SECTIONS:  # `local: loop` on the way down
        raise ConfigError(f"Expected `{head}` to be a class with arguments before `--{key}`, but it is {below!r}.")
    return {head: _nested(rest, value, below)}


def check(config: Config) -> Config:
    """Check every key and class name of `config`; return it with full class paths.

    Raises:
        ConfigError: the first unknown or missing name, with a suggestion.
    """
    for key in config:
        if key not in SECTIONS:
            raise ConfigError(_unknown("key", str(key), SECTIONS))
    for key in REQUIRED:
        if not config.get(key):
            raise ConfigError(f"Expected a section `{key}` ({SECTIONS[key]}), but there is none.")
    checked = dict(config)
    for key, cls in _section_classes().items():
        if config.get(key) is not None:
            if not isinstance(config[key], Mapping):
                raise ConfigError(f"Expected `{key}` to be a mapping ({SECTIONS[key]}), but got {config[key]!r}.")
            checked[key] = _check_call(cls, config[key], key)
    for key in CLASS_SECTIONS:
        if key in config:
            checked[key] = _check_value(config[key], key)
    return checked


def _section_classes() -> dict[str, type]:
    trainer = importlib.import_module("lightning").Trainer
    federation = importlib.import_module("dynfed_lightning.federation").Federation
    data = importlib.import_module("dynfed_lightning.data").FederatedDataModule
    return {"trainer": trainer, "federation": federation, "data": data}


def _check_call(cls: type, arguments: Mapping[str, Any], where: str) -> Config:
    """Check `arguments` against the signature of `cls`, and whatever classes they hold in turn."""
    known = parameters(cls)
    for key in arguments:
        if known is not None and key not in known:
            raise ConfigError(_unknown("key", str(key), known, where))
    return {k: _check_value(v, f"{where}.{k}") for k, v in arguments.items()}


def _check_value(value: Any, where: str) -> Any:
    if isinstance(value, list):
        return [_check_value(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    if "class_path" not in value:
        if "init_args" in value or difflib.get_close_matches("class_path", map(str, value), cutoff=0.8):
            extra = (
                next(str(k) for k in value if k != "init_args") if len(value) > 1 or "init_args" not in value else ""
            )
            raise ConfigError(
                _unknown("key", extra, ("class_path",), where) if extra else f"`{where}` lacks `class_path`."
            )
        return {k: _check_value(v, f"{where}.{k}") for k, v in value.items()}
    for key in value:
        if key not in _CLASS_KEYS:
            raise ConfigError(_unknown("key", str(key), _CLASS_KEYS, where))
    cls = find_class(value["class_path"], where)
    arguments = value.get("init_args") or {}
    if not isinstance(arguments, Mapping):
        raise ConfigError(f"Expected `{where}.init_args` to be a mapping, but got {arguments!r}.")
    checked = {**value, "class_path": f"{cls.__module__}.{cls.__qualname__}"}
    if arguments:
        checked["init_args"] = _check_call(cls, arguments, where)
    return checked


def parameters(cls: type) -> list[str] | None:
    """The names `cls` takes, following ``**kwargs`` to its base classes; None if a C function hides them."""
    names: dict[str, None] = {}
    for base in cls.__mro__:
        init = base.__dict__.get("__init__")
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
            for n, p in list(signature.parameters.items())[1:]
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


def find_class(name: Any, where: str) -> type:
    """The class called `name`: a short name, or an import path ``package.module.Class``.

    Raises:
        ConfigError: nothing of that name; the nearest short name is suggested.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(f"Expected `{where}.class_path` to be a class's name, but got {name!r}.")
    module, dot, attribute = name.rpartition(".")
    if not dot:
        known = short_names()
        if name in known:
            return known[name]
        fitting = _fitting(known, where)
        raise ConfigError(_unknown("class", name, fitting, where, listing=len(fitting) < 30))
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ConfigError(f"Cannot import `{name}` of `{where}`: {error}.") from error
    except AttributeError as error:
        candidates = [n for n, v in vars(importlib.import_module(module)).items() if isinstance(v, type)]
        raise ConfigError(_unknown("class", name, [f"{module}.{c}" for c in candidates], where)) from error
    if not isinstance(found, type):
        raise ConfigError(f"Expected `{where}.class_path` to be a class, but `{name}` is a {type(found).__name__}.")
    return found


def _fitting(known: Mapping[str, type], where: str) -> list[str]:
    """For the sections whose type is known, only the names that fit there."""
    home = {"algorithm": "dynfed_lightning.algorithm", "local": "dynfed_lightning.local"}.get(where)
    if home is None:
        return list(known)
    base = getattr(importlib.import_module(home), {"algorithm": "Algorithm", "local": "LocalExecutor"}[where])
    return [n for n, c in known.items() if issubclass(c, base) and c is not base]


def _unknown(what: str, name: str, known: Iterable[str], where: str = "", listing: bool = True) -> str:
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


def parser() -> Any:
    """The jsonargparse parser of a run: checks the types of a configuration, and builds its objects."""
    try:
        jsonargparse = importlib.import_module("jsonargparse")
    except ImportError as error:
        raise ImportError("The command needs jsonargparse: pip install dynfed-lightning[cli]") from error
    lightning = importlib.import_module("lightning")
    classes = _section_classes()
    short_names()  # imports what short names in nested arguments refer to
    executor = importlib.import_module("dynfed_lightning.local").LocalExecutor
    p = jsonargparse.ArgumentParser(prog="dynfed fit", exit_on_error=False)
    p.add_argument("--seed", type=int, default=0, help=SECTIONS["seed"])
    p.add_argument("--name", type=str, default="run", help=SECTIONS["name"])
    p.add_argument("--out", type=str, default="runs/run", help=SECTIONS["out"])
    p.add_class_arguments(classes["trainer"], "trainer", instantiate=False)
    p.add_subclass_arguments(lightning.LightningModule, "module", required=True, help=SECTIONS["module"])
    algorithm = importlib.import_module("dynfed_lightning.algorithm").Algorithm
    p.add_subclass_arguments(algorithm, "algorithm", required=True, help=SECTIONS["algorithm"])
    p.add_argument("--local", type=str | executor, default="trainer", help=SECTIONS["local"])
    skip = {"module", "algorithm", "local", "seed"}
    p.add_class_arguments(classes["federation"], "federation", skip=skip, instantiate=False)
    p.add_class_arguments(
        classes["data"], "data", skip={"seed"} & set(parameters(classes["data"]) or ()), instantiate=False
    )
    return p


def parse(config: Config) -> tuple[Any, Any]:
    """Check the types of `config` and fill in every default.

    Returns:
        ``(parser, namespace)``.

    Raises:
        ConfigError: a value of the wrong type.
    """
    p = parser()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jsonargparse's own deprecations
        try:
            return p, p.parse_object(config)
        except Exception as error:
            raise ConfigError(_one_line(str(error))) from error


def dump(config: Config) -> str:
    """`config` with every default that is not None, as YAML: what a run's ``config.yaml`` holds, and `load` reads back."""
    return dump_namespace(*parse(config))


def dump_namespace(p: Any, namespace: Any) -> str:
    """What `parse` returned, as YAML."""
    return p.dump(namespace, skip_none=True)


def instantiate(p: Any, namespace: Any) -> Any:
    """Build the objects of what `parse` returned; constructors' own errors come through as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return p.instantiate(namespace)


def _one_line(message: str) -> str:
    """The essence of jsonargparse's nested message: the full key, what was expected, what came."""
    keys = re.findall(r'Parser key "([^"]+)"', message)
    values = re.findall(r"Given value: (.*)", message)
    expected = re.findall(r"Subtypes: \[(.*)\]", message) or re.findall(r"Expected an? (<class '[^']+'>)", message)
    if keys and values:
        # The innermost key comes last; its value is the first one printed.
        kinds = re.sub(r"<class '(?:builtins\.)?([\w.]+)'>", r"\1", expected[-1] if expected else "")
        kinds = kinds.replace("NoneType", "null").replace(", ", " or ") or "another value"
        if "[" not in kinds:
            return f"Expected `{'.'.join(keys)}` to be {kinds}, but got {values[0]!r}."
        return f"Expected `{'.'.join(keys)}` to be of type {expected[-1]}, but got {values[0]!r}."
    return " ".join(message.split())
