"""YAML files of runs: read, merged, checked by name, and turned into objects.

A file's sections are those of `SECTIONS`; a class is given as ``{class_path: DynFed, init_args: {bits: 4}}`` or, with no
arguments, as its name alone. Classes of this package and Lightning's callbacks and loggers go by their short name, anything
else by its import path. ``base: other.yaml`` (or a list) puts a file on top of others. Types are checked by jsonargparse,
names here first, because a typo deserves the name that was meant.
"""

from __future__ import annotations

import difflib
import importlib
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynfed_lightning.lookup import ConfigError, find_class, parameters, short_names, unknown

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
Config = dict[str, Any]
__all__ = [
    "SECTIONS",
    "Config",
    "ConfigError",
    "check",
    "dump",
    "dump_namespace",
    "instantiate",
    "load",
    "merge",
    "parse",
]


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
        config = _on_top(config, _read(Path(path), ()))
    pairs = _parse_overrides(overrides)
    for key, value in pairs:
        config = _on_top(config, _nested(key, value, config))
    names = [value for key, value in pairs if key == "name"]
    return check({**config, "name": names[-1]} if names else config)


def merge(below: Any, above: Any) -> Any:
    """`above` on top of `below`: mappings merge key by key, anything else replaces. Another class drops the old arguments."""
    if not isinstance(below, Mapping) or not isinstance(above, Mapping):
        return above
    if "class_path" in above and above["class_path"] != below.get("class_path"):
        return dict(above)
    return {**below, **{k: merge(below.get(k), v) for k, v in above.items()}}


def _on_top(below: Config, above: Config) -> Config:
    """`merge` of whole configurations: another method does not go by the name of the one below it."""
    merged = merge(below, above)
    before, after = _method(below), _method(merged)
    if before is not None and before != after and "name" not in above:
        merged.pop("name", None)
    return merged


def _method(config: Config) -> str | None:
    """The class of the method, without its module."""
    algorithm = config.get("algorithm")
    name = algorithm.get("class_path") if isinstance(algorithm, Mapping) else None
    return name.rpartition(".")[2] if isinstance(name, str) else None


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
        below = _on_top(below, _read(file, (*parents, path.resolve())))
    return _on_top(below, config)


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
        if pairs and pairs[-1][0] == "seed" and re.fullmatch(r"-?\d+", word):
            raise ConfigError(f"Expected one `seed`, but got also {word}: `dynfed compare --seeds` runs several.")
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
            raise ConfigError(unknown("key", str(key), SECTIONS))
    for key in REQUIRED:
        if not config.get(key):
            raise ConfigError(f"Expected a section `{key}` ({SECTIONS[key]}), but there is none.")
    _check_numbers(config)
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


def _check_numbers(config: Config) -> None:
    """The seed, and that somebody has said how many rounds: Lightning's own default is 1000."""
    seed = config.get("seed", 0)
    if isinstance(seed, list | tuple):
        raise ConfigError(f"Expected one `seed`, but got {seed!r}: `dynfed compare --seeds` runs several.")
    if isinstance(seed, int) and seed < 0:
        raise ConfigError(f"Expected `seed` to be an integer of at least 0, but got {seed}.")
    trainer = config.get("trainer") or {}
    if not isinstance(trainer, Mapping):
        return
    given = {k: trainer[k] for k in ("max_epochs", "max_steps", "max_time") if trainer.get(k) is not None}
    if not given or given == {"max_steps": -1}:
        raise ConfigError("Expected `trainer.max_epochs` to be the number of rounds, but it is not given.")
    for key in ("max_epochs", "max_steps"):
        value = given.get(key, 1)
        if isinstance(value, int) and value < 1 and value != -1:
            raise ConfigError(f"Expected `trainer.{key}` to be at least 1, or -1 for no end, but got {value}.")


def _section_classes() -> dict[str, type]:
    trainer = importlib.import_module("lightning").Trainer
    federation = importlib.import_module("dynfed_lightning.federation").Federation
    data = importlib.import_module("dynfed_lightning.data").FederatedDataModule
    return {"trainer": trainer, "federation": federation, "data": data}


def _check_call(cls: Callable[..., Any], arguments: Mapping[str, Any], where: str) -> Config:
    """Check `arguments` against the signature of `cls`, and whatever classes they hold in turn."""
    known = parameters(cls)
    for key in arguments:
        if known is not None and key not in known:
            raise ConfigError(unknown("key", str(key), known, where))
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
                unknown("key", extra, ("class_path",), where) if extra else f"`{where}` lacks `class_path`."
            )
        return {k: _check_value(v, f"{where}.{k}") for k, v in value.items()}
    for key in value:
        if key not in _CLASS_KEYS:
            raise ConfigError(unknown("key", str(key), _CLASS_KEYS, where))
    cls = find_class(value["class_path"], where)
    arguments = value.get("init_args") or {}
    if not isinstance(arguments, Mapping):
        raise ConfigError(f"Expected `{where}.init_args` to be a mapping, but got {arguments!r}.")
    path = value["class_path"] if "." in value["class_path"] else f"{cls.__module__}.{cls.__qualname__}"
    checked = {**value, "class_path": path}
    if arguments:
        checked["init_args"] = _check_call(cls, arguments, where)
    return checked


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
    p.add_argument("--module", type=lightning.LightningModule, help=SECTIONS["module"])
    algorithm = importlib.import_module("dynfed_lightning.algorithm").Algorithm
    p.add_argument("--algorithm", type=algorithm, help=SECTIONS["algorithm"])
    p.add_argument("--local", type=str | executor, default="trainer", help=SECTIONS["local"])
    skip = {"module", "algorithm", "local", "seed"}
    p.add_class_arguments(classes["federation"], "federation", skip=skip, instantiate=False)
    p.add_class_arguments(classes["data"], "data", instantiate=False)
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
    """`config` with its defaults filled in, as YAML: what a run's ``config.yaml`` holds, and `load` reads back the same."""
    return dump_namespace(*parse(config), config)


def dump_namespace(p: Any, namespace: Any, config: Config) -> str:
    """What `parse` made of `config`, as YAML. A null is kept only where `config` says it: most defaults are null."""
    yaml = _yaml()
    try:
        filled = yaml.safe_load(p.dump(namespace, skip_unset=False))
    except ValueError:  # a default that YAML cannot say, such as a member of an enumeration: say what was said
        filled = config
    return yaml.safe_dump(_said(filled, config), sort_keys=False, allow_unicode=True)


def _said(filled: Any, given: Any) -> Any:
    if isinstance(filled, list):
        givens = given if isinstance(given, list) and len(given) == len(filled) else [None] * len(filled)
        return [_said(f, g) for f, g in zip(filled, givens, strict=True)]
    if not isinstance(filled, Mapping):
        return filled
    given = given if isinstance(given, Mapping) else {}
    return {k: _said(v, given.get(k)) for k, v in filled.items() if v is not None or k in given}


def instantiate(p: Any, namespace: Any) -> Any:
    """Build the objects of what `parse` returned.

    Raises:
        ConfigError: a constructor refused its arguments; the message is its own.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return p.instantiate(namespace)
        except (ValueError, TypeError) as error:
            raise ConfigError(_one_line(str(error))) from error


def _one_line(message: str) -> str:
    """The essence of jsonargparse's nested message: the full key, what was expected, what came."""
    keys = re.findall(r'Parser key "([^"]+)"', message)
    lost = re.search(r"Expected a dot import path string: (\S+)", message)
    if lost:
        return unknown("class", lost[1], short_names(), ".".join(keys), listing=False)
    lacking = re.search(
        r"Problem with given class_path '([^']+)':\s*the following arguments are required: ([^\n]+)", message
    )
    if lacking:
        key, cls = ".".join(keys), lacking[1].rpartition(".")[2]
        needed = ", ".join(f"`{key}.{n.strip()}`" for n in lacking[2].split(","))
        return f"Expected {needed} to be given, since {cls} requires it, but it is missing."
    own = re.findall(r"Expected `.*", message)
    if own:  # what a constructor said
        return own[-1].strip()
    values = re.findall(r"(?:Given value|Got value): (.*)", message)
    kinds = re.findall(r"Expected an? <class '([^']+)'>", message) or re.findall(r"Expected an? ([^\n<`]\S*)", message)
    kinds = list(dict.fromkeys(k.rstrip(".,").replace("NoneType", "null") for k in kinds))
    if keys and values and kinds:
        # The innermost key comes last, its value first.
        return f"Expected `{'.'.join(keys)}` to be {' or '.join(kinds)}, but got {values[0].strip()!r}."
    return " ".join(message.split())
