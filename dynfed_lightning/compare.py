"""Several configurations, several seeds, the same data: run them all, then one table and one figure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynfed_lightning import config as configs
from dynfed_lightning.cli import build, finish, fit, one_line, slug
from dynfed_lightning.config import Config, ConfigError
from dynfed_lightning.quiet import isolated_rng, quiet_lightning
from dynfed_lightning.recorder import writable
from dynfed_lightning.report import Comparison, Run


@dataclass(frozen=True)
class Item:
    """One run of the comparison: a method with a seed."""

    name: str
    seed: int
    out: Path
    config: Config


def plan(
    paths: Sequence[str | Path],
    out: str | Path,
    seeds: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
    *,
    allow_different: bool = False,
    baseline: str | None = None,
    target: float | None = None,
) -> list[Item]:
    """Read the configurations and check, before anything runs, that they can be compared.

    Args:
        paths: one YAML file a method.
        out: the comparison's folder; runs go to ``out/<name>/seed<k>``.
        seeds: default: the first file's seed, for all.
        overrides: ``--key value`` words for all of them.
        allow_different: do not insist on the same data, module, local training and number of rounds.
        baseline: see `Comparison.of`.
        target: likewise.

    Raises:
        ConfigError: two configurations of the same name, or that differ in what must be the same (it is named); a wrong
            seed, baseline or target; what a constructor refuses.
        OSError: `out` is not writable.
    """
    if target is not None and not 0 < target <= 1:
        raise ConfigError(f"Expected `target` to be an accuracy in (0, 1], but got {target:g}.")
    for seed in seeds or ():
        if seed < 0:
            raise ConfigError(f"Expected `seeds` to be integers of at least 0, but got {seed}.")
    loaded = [finish(configs.load([p], overrides)) for p in paths]
    names = [c["name"] for c in loaded]
    for i, name in enumerate(names):
        if slug(name) in map(slug, names[:i]):
            raise ConfigError(f"Two of the configurations are called `{name}`; give {paths[i]} another `name`.")
    if baseline is not None and baseline not in names:
        raise ConfigError(f"Expected `baseline` to be one of {names}, but got {baseline!r}.")
    if not allow_different:
        for path, other in zip(paths[1:], loaded[1:], strict=True):
            difference = first_difference(_common(loaded[0]), _common(other))
            if difference is not None:
                key, a, b = difference
                raise ConfigError(
                    f"Expected all configurations to share data, module, local training and rounds, but "
                    f"`{key}` is {a!r} in {paths[0]} and {b!r} in {path}; --allow-different compares them all the same."
                )
    chosen = list(dict.fromkeys(seeds)) if seeds else [loaded[0]["seed"]]
    items = []
    for config in loaded:
        split = config["data"]["seed"] if config["data"]["seed"] != config["seed"] else None
        for seed in chosen:
            folder = Path(out) / slug(config["name"]) / f"seed{seed}"
            trainer = {**config["trainer"], "default_root_dir": str(folder)}
            data = {**config["data"], "seed": seed if split is None else split}
            items.append(
                Item(
                    config["name"],
                    seed,
                    folder,
                    {**config, "seed": seed, "out": str(folder), "trainer": trainer, "data": data},
                )
            )
    writable(Path(out))
    for item in items:  # what is wrong in the last file should not wait for the first to finish
        parsed = configs.parse(item.config)
        if item.seed == chosen[0]:
            try:
                with quiet_lightning(), isolated_rng(item.seed):
                    build(parsed)
            except (ValueError, TypeError) as error:
                raise ConfigError(f"{item.name}: {one_line(error)}") from error
    return items


def _common(config: Config) -> Config:
    """The part of a configuration that must be the same for two accuracies to be compared."""
    data = {k: v for k, v in config["data"].items() if k != "seed"}
    rounds = {k: config["trainer"].get(k) for k in ("max_epochs", "max_steps")}
    federation, local = dict(config.get("federation") or {}), config.get("local", "trainer")
    for key in ("store", "store_limit"):  # where state lies changes no number
        federation.pop(key, None)
    return {"data": data, "module": config["module"], "trainer": rounds, "local": local, "federation": federation}


def first_difference(a: Any, b: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first key, depth first, at which two configurations differ, and both values; None if they are the same."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for k in [*a, *(k for k in b if k not in a)]:
            found = first_difference(a.get(k), b.get(k), f"{key}.{k}" if key else str(k))
            if found is not None:
                return found
        return None
    return None if a == b else (key, a, b)


def run_all(items: Sequence[Item], jobs: int = 1, resume: bool = False) -> dict[Path, str]:
    """Train every item; one that fails does not stop the others.

    Args:
        jobs: 1 trains in this process, one after the other; more start that many processes at a time, each with its share
            of the cores and a ``log.txt`` in its folder.
        resume: leave alone what has finished with the same configuration.

    Returns:
        folder -> reason, for the runs that failed.
    """
    todo = []
    for item in items:
        if resume and finished(item):
            _say(f"{_title(item)}: kept, finished before")
        else:
            todo.append(item)
    if jobs == 1:
        outcomes = [_run_here(item) for item in todo]
    else:
        # Threads only wait for the processes they start.
        with ThreadPoolExecutor(jobs) as pool:
            outcomes = list(pool.map(lambda item: _run_apart(item, jobs), todo))
    return {item.out: reason for item, reason in zip(todo, outcomes, strict=True) if reason is not None}


def finished(item: Item) -> bool:
    """Whether the item's folder holds a complete run of exactly this configuration."""
    if not (item.out / "summary.json").is_file() or not (item.out / "config.yaml").is_file():
        return False
    return (item.out / "config.yaml").read_text(encoding="utf-8") == configs.dump(item.config)


def _run_here(item: Item) -> str | None:
    try:
        fit(item.config)
    except Exception as error:
        if os.environ.get("DYNFED_DEBUG") == "1":
            raise
        return one_line(error)
    return None


def _run_apart(item: Item, jobs: int) -> str | None:
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    env = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **os.environ}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)  # classes beside the configurations, too
    try:
        item.out.mkdir(parents=True, exist_ok=True)
        request = item.out / "request.yaml"
        request.write_text(configs.dump(item.config), encoding="utf-8")
        command = [sys.executable, "-m", "dynfed_lightning.cli", "fit", "--config", str(request)]
        with open(item.out / "log.txt", "w", encoding="utf-8") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=env, check=False).returncode
        request.unlink()
    except OSError as error:
        return one_line(error)
    _say(f"{_title(item)}: {'done' if code == 0 else 'failed'}")
    if code == 0:
        return None
    lines = (item.out / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("dynfed: error: ") if lines else f"exit code {code}"


def _title(item: Item) -> str:
    return f"{item.name}, seed {item.seed}"


def _say(text: str) -> None:
    print(text, flush=True)


def write(
    folders: Sequence[Path],
    out: Path,
    *,
    baseline: str | None = None,
    target: float | None = None,
    last: int = 5,
    title: str = "",
    metric: str = "accuracy",
) -> Comparison:
    """Table and figure of finished runs: printed, and written as ``out/compare.{md,json,png}``; where a codec factored matrices,
    ``out/factors.png`` shows its energy, rank and bytes over the rounds; where clients were judged on their own test
    distributions, ``out/personal.png`` shows how well each is served.

    Args:
        folders: run folders, methods in the order of the table.
        out: where to.
        baseline, target, last, metric: see `Comparison.of`.
        title: of the figure.
    """
    runs = [Run.read(f) for f in folders]
    comparison = Comparison.of(runs, baseline=baseline, target=target, last=last, metric=metric)
    written = [out / "compare.md", out / "compare.json"]
    written[0].write_text(comparison.markdown() + "\n", encoding="utf-8")
    written[1].write_text(json.dumps(comparison.to_json(), indent=2, default=float) + "\n", encoding="utf-8")
    try:
        from dynfed_lightning.plots import plot_comparison, plot_factors_compared, plot_personal

        written.append(plot_comparison(comparison, out / "compare.png", title))
        more = [plot_factors_compared(comparison, out / "factors.png"), plot_personal(comparison, out / "personal.png")]
        written += [path for path in more if path is not None]
    except ImportError as error:
        print(f"dynfed: no figure: {error}", file=sys.stderr)
    _show(comparison)
    for path in written:
        print(path)
    print(f"each run's own plots: {out}/*/seed*/plots/*.png")
    return comparison


def _show(comparison: Comparison) -> None:
    """The table, with rich where someone looks at it, as Markdown where a file or a log does."""
    if not sys.stdout.isatty():
        print(comparison.markdown())
        return
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(comparison.markdown())
        return
    table = Table(header_style="bold", box=None, pad_edge=False)
    for i, title in enumerate(comparison.header()):
        table.add_column(title, justify="right" if i else "left", overflow="fold")
    for cells in comparison.cells():
        table.add_row(*cells)
    Console().print(table)
