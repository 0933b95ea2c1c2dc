"""What a run wrote, read back: tables for a terminal and a README, and the numbers behind the figures of `plots.py`.

A run folder holds ``rounds.csv`` (a row per round), ``clients.csv`` (a row per client and round), ``summary.json`` and
``config.yaml``, and ``own_accuracy.csv`` (a row per client, of the last judged round). Accuracies are fractions of the whole
test set, own accuracies of each client's own test distribution (`OwnTest`); bytes are the lengths of encoded payloads, and a
megabyte is 10^6 bytes.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

MEGABYTE = 1e6
# Columns of rounds.csv that the methods of a comparison can be judged by, and what tables call them.
METRICS = {
    "accuracy": "accuracy %",
    "own_accuracy": "own accuracy %",
    "own_accuracy_worst10": "worst 10 % of clients",
    "global_accuracy": "global accuracy %",
}


def read_csv(path: str | Path) -> dict[str, list[Any]]:
    """The columns of a CSV file: floats where every filled cell is a number (empty cells are NaN), otherwise strings.

    Returns:
        column name -> one value per row, in file order. A header without rows gives empty lists.
    """
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        names = list(reader.fieldnames or [])
    return {n: _numbers([r.get(n) or "" for r in rows]) for n in names}


def _numbers(cells: list[str]) -> list[Any]:
    try:
        return [float(c) if c else math.nan for c in cells]
    except ValueError:
        return cells


@dataclass(frozen=True)
class Run:
    """One run folder. Make it with `Run.read`."""

    path: Path
    rounds: dict[str, list[Any]]
    clients: dict[str, list[Any]]
    summary: dict[str, Any]
    own: dict[str, list[Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> Run:
        """Read a run folder; all but ``rounds.csv`` may be missing (a run that was interrupted).

        Raises:
            FileNotFoundError: `path` holds no ``rounds.csv``.
        """
        path = Path(path)
        if not (path / "rounds.csv").is_file():
            raise FileNotFoundError(
                f"Expected `run_dir` to be a run's folder with a rounds.csv, but got {str(path)!r}."
            )
        clients, own = path / "clients.csv", path / "own_accuracy.csv"
        summary = path / "summary.json"
        return cls(
            path=path,
            rounds=read_csv(path / "rounds.csv"),
            clients=read_csv(clients) if clients.is_file() else {},
            summary=json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {},
            own=read_csv(own) if own.is_file() else {},
        )

    @property
    def label(self) -> str:
        """What the run is called in tables: its ``name``, else its method, else its folder's name."""
        return str(self.summary.get("name") or self.summary.get("method") or self.path.name)

    def column(self, name: str) -> np.ndarray:
        """A numeric column of ``rounds.csv``, float64 ``[rounds]``; NaN everywhere if it is missing or not numeric."""
        values = self.rounds.get(name)
        length = len(self.rounds.get("round", []))
        if values is None or any(isinstance(v, str) for v in values):
            return np.full(length, np.nan)
        return np.asarray(values, dtype=np.float64)

    @property
    def accuracy(self) -> np.ndarray:
        """Test accuracy after each round, ``[rounds]``, in 0..1."""
        return self.column("accuracy")

    @property
    def megabytes_up(self) -> np.ndarray:
        """Megabytes all clients have sent by the end of each round, ``[rounds]``."""
        return self.column("total_bytes_up") / MEGABYTE

    @property
    def megabytes_down(self) -> np.ndarray:
        """Megabytes all clients have received by the end of each round, ``[rounds]``."""
        return self.column("total_bytes_down") / MEGABYTE

    @property
    def client_accuracies(self) -> np.ndarray:
        """Each judged client's accuracy on its own test distribution in the last judged round, worst first; ``[clients]``."""
        return np.sort(np.asarray(self.own.get("own_accuracy", []), dtype=np.float64))

    def final_accuracy(self, last: int = 5, metric: str = "accuracy") -> float:
        """Mean of `metric` over the last `last` rounds: one round alone swings by several points on skewed data."""
        values = self.column(metric)
        values = values[np.isfinite(values)]
        return float(values[-last:].mean()) if values.size else math.nan

    def best_accuracy(self, metric: str = "accuracy") -> float:
        values = self.column(metric)
        values = values[np.isfinite(values)]
        return float(values.max()) if values.size else math.nan

    def rounds_to(self, target: float, metric: str = "accuracy") -> float:
        """The first round whose `metric` is at least `target`; NaN if none is."""
        reached = np.flatnonzero(self.column(metric) >= target - 1e-9)  # a mean of equal numbers may miss them by a bit
        return float(self.column("round")[reached[0]]) if reached.size else math.nan

    @property
    def seconds(self) -> float:
        return float(self.summary.get("seconds", np.nansum(self.column("seconds"))))

    def per_client(self, column: str) -> tuple[np.ndarray, list[int], list[int]]:
        """A column of ``clients.csv`` as a matrix.

        Returns:
            ``(values [clients, rounds], client ids, rounds)``; NaN where a client took no part or the cell is empty.
            All three are empty if the column is missing or has no value.
        """
        values = self.clients.get(column, [])
        if not values or any(isinstance(v, str) for v in values) or not np.isfinite(values).any():
            return np.empty((0, 0)), [], []
        ids = [int(k) for k in self.clients["client"]]
        when = [int(t) for t in self.clients["round"]]
        population = int(self.summary.get("num_clients", 0))
        rows = sorted(set(ids) | set(range(population)))
        columns = list(range(min(when), max(when) + 1))
        matrix = np.full((len(rows), len(columns)), np.nan)
        where = {k: i for i, k in enumerate(rows)}
        for k, t, v in zip(ids, when, values, strict=True):
            matrix[where[k], t - columns[0]] = v
        return matrix, rows, columns


def summarise(run_dir: str | Path | Run) -> str:
    """A run in ten lines of text: what ran, how well, at what cost, and what went wrong.

    Args:
        run_dir: a run's folder, or a `Run`.
    """
    run = run_dir if isinstance(run_dir, Run) else Run.read(run_dir)
    s, rounds = run.summary, run.column("round")
    bits = run.column("bits_mean")
    rows: list[tuple[str, str]] = [("run", run.label), ("method", str(s.get("method", "?")))]
    rows += [(k, str(s[k])) for k in ("dataset", "model", "num_clients", "seed") if s.get(k) is not None]
    rows.append(("rounds", str(int(rounds[-1])) if rounds.size else "0"))
    judged = run.accuracy[np.isfinite(run.accuracy)]
    if judged.size:
        mean = f"{_percent(run.final_accuracy())} (mean of the last {min(5, judged.size)})"
        rows.append(("accuracy", f"{_percent(judged[-1])} at the end, {mean}, {_percent(run.best_accuracy())} best"))
    else:
        rows.append(("accuracy", "-"))
    own = np.flatnonzero(np.isfinite(run.column("own_accuracy")))
    if own.size:
        mean, worst, spread = (run.column(f"own_accuracy{end}")[own[-1]] for end in ("", "_worst10", "_std"))
        text = f"{_percent(mean)} on clients' own test distributions, {_percent(worst)} for the worst tenth"
        rows.append(("own", f"{text}, {100 * spread:.1f} standard deviation"))
    for way, total in (("up", run.megabytes_up), ("down", run.megabytes_down)):
        rows.append((f"sent {way}", f"{_mb(total[-1] if total.size else math.nan)} MB"))
    if np.isfinite(bits).any():
        low, high = np.nanmin(run.column("bits_min")), np.nanmax(run.column("bits_max"))
        rows.append(("bits", f"{np.nanmean(bits):.2f} on average, {low:g} to {high:g}"))
    rank, energy = run.column("rank"), run.column("energy")
    if np.isfinite(energy).any():
        low, high = float(np.nanmin(energy)), float(np.nanmax(energy))
        kept = f"energy {low:.4g}" if low == high else f"energy {low:.4g} to {high:.4g}"
        rows.append(
            ("rank", f"{np.nanmean(rank):.1f} on average, {kept}" if np.isfinite(rank).any() else f"whole, {kept}")
        )
    failed = np.nansum(run.column("failed"))
    if failed:
        rows.append(("left out", f"{int(failed)} client rounds: {_reasons(run.rounds.get('failures', []))}"))
    rows.append(("seconds", f"{run.seconds:.1f}"))
    width = max(len(k) for k, _ in rows)
    return "\n".join(f"{k:<{width}}  {v}" for k, v in rows)


def _reasons(cells: Iterable[Any]) -> str:
    """Sum ``"nan_loss:1;payload:2"`` cells over the rounds."""
    total: dict[str, int] = {}
    for cell in cells:
        for part in str(cell).split(";"):
            reason, colon, count = part.partition(":")
            if colon and count.isdigit():
                total[reason] = total.get(reason, 0) + int(count)
    return ", ".join(f"{n} {r}" for r, n in sorted(total.items())) or "no reason given"


@dataclass
class Method:
    """All seeds of one method. Curves are cut to the shortest of the seeds."""

    label: str
    runs: list[Run] = field(default_factory=list)

    def curve(self, name: str) -> np.ndarray:
        """The runs' `name` (``accuracy``, ``megabytes_up``, ...) as float64 ``[seeds, rounds]``."""
        values = [getattr(r, name) if hasattr(r, name) else r.column(name) for r in self.runs]
        length = min((len(v) for v in values), default=0)
        return np.stack([v[:length] for v in values]) if values else np.empty((0, 0))


@dataclass(frozen=True)
class Row:
    """A line of the comparison. Arrays have one number a seed; `rounds_to_target` is NaN for a seed that never got there.

    `final` and `best` are of the comparison's metric, `others` the final values of the other `METRICS` that any run has.
    """

    label: str
    seeds: int
    final: np.ndarray
    best: np.ndarray
    rounds_to_target: np.ndarray
    megabytes_up: float
    megabytes_down: float
    uplink_ratio: float
    seconds: float
    others: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Several methods, several seeds each, on the same data.

    Args:
        methods: in the order of the tables and figures.
        baseline: the label whose uplink is 1 and whose final accuracy is the default target.
        target: the accuracy of "rounds to target", 0..1.
        last: how many rounds at the end make the final accuracy.
        metric: the column of ``rounds.csv`` that methods are judged by, such as ``own_accuracy``.
    """

    methods: list[Method]
    baseline: str
    target: float
    last: int = 5
    metric: str = "accuracy"

    @classmethod
    def of(
        cls,
        runs: Sequence[Run],
        baseline: str | None = None,
        target: float | None = None,
        last: int = 5,
        metric: str = "accuracy",
    ) -> Comparison:
        """Group `runs` by label, in order of appearance.

        Raises:
            ValueError: no runs, no method is called `baseline`, or no run has the column `metric`.
        """
        if not runs:
            raise ValueError("Expected `runs` to hold at least one finished run, but it is empty.")
        if metric != "accuracy" and not any(np.isfinite(r.column(metric)).any() for r in runs):
            known = [m for m in METRICS if any(np.isfinite(r.column(m)).any() for r in runs)]
            raise ValueError(
                f"Expected `metric` to be a column of the runs' rounds.csv, such as {known}, but got {metric!r}."
            )
        methods: dict[str, Method] = {}
        for run in runs:
            methods.setdefault(run.label, Method(run.label)).runs.append(run)
        if baseline is None:
            named = [m for m in methods if m.lower() == "fedavg"]
            by_method = [
                m.label for m in methods.values() if str(m.runs[0].summary.get("method", "")).lower() == "fedavg"
            ]
            baseline = (named + by_method + list(methods))[0]
        elif baseline not in methods:
            raise ValueError(f"Expected `baseline` to be one of {list(methods)}, but got {baseline!r}.")
        if target is None:
            target = float(np.mean([r.final_accuracy(last, metric) for r in methods[baseline].runs]))
        return cls(list(methods.values()), baseline, target, last, metric)

    @property
    def others(self) -> list[str]:
        """The `METRICS` beside the one that decides which some run has."""
        runs = [r for m in self.methods for r in m.runs]
        return [n for n in METRICS if n != self.metric and any(np.isfinite(r.column(n)).any() for r in runs)]

    def rows(self) -> list[Row]:
        """The comparison's numbers, one `Row` a method, in order."""
        base = next(m for m in self.methods if m.label == self.baseline)
        base_up = _last(base, "megabytes_up")
        rows = []
        for m in self.methods:
            up = _last(m, "megabytes_up")
            rows.append(
                Row(
                    label=m.label,
                    seeds=len(m.runs),
                    final=np.array([r.final_accuracy(self.last, self.metric) for r in m.runs]),
                    best=np.array([r.best_accuracy(self.metric) for r in m.runs]),
                    rounds_to_target=np.array([r.rounds_to(self.target, self.metric) for r in m.runs]),
                    megabytes_up=up,
                    megabytes_down=_last(m, "megabytes_down"),
                    uplink_ratio=up / base_up if base_up > 0 else math.nan,
                    seconds=float(np.mean([r.seconds for r in m.runs])),
                    others={n: np.array([r.final_accuracy(self.last, n) for r in m.runs]) for n in self.others},
                )
            )
        return rows

    def header(self) -> list[str]:
        """The titles of the table's columns."""
        return [
            "method",
            "seeds",
            f"{METRICS.get(self.metric, self.metric)} (last {self.last})",
            "best %",
            *(METRICS[name] for name in self.others),
            f"rounds to {100 * self.target:.1f} %" if math.isfinite(self.target) else "rounds to target",
            "MB up",
            "MB down",
            f"uplink / {self.baseline}",
            "seconds",
        ]

    def cells(self) -> list[list[str]]:
        """The table's cells as text, one list a method."""
        return [
            [
                r.label,
                str(r.seeds),
                _spread(100 * r.final),
                f"{100 * r.best.mean():.1f}" if np.isfinite(r.best).all() else "-",
                *(_spread(100 * r.others[name]) for name in self.others),
                _reached(r.rounds_to_target),
                _mb(r.megabytes_up),
                _mb(r.megabytes_down),
                _ratio(r.uplink_ratio),
                f"{r.seconds:.0f}",
            ]
            for r in self.rows()
        ]

    def markdown(self) -> str:
        """The table in Markdown, columns aligned for reading as plain text too."""
        return _grid(self.header(), self.cells())

    def to_json(self) -> dict[str, Any]:
        """The table's numbers, for files that other programs read."""
        return {
            "baseline": self.baseline,
            "target": self.target,
            "last": self.last,
            "metric": self.metric,
            "methods": [_plain({k: v for k, v in vars(r).items() if k != "others" or v}) for r in self.rows()],
        }


def _plain(value: Any) -> Any:
    """Arrays as lists."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value


def _last(method: Method, name: str) -> float:
    curve = method.curve(name)
    return float(curve[:, -1].mean()) if curve.size else math.nan


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _mb(value: float) -> str:
    """Three significant digits, no exponent."""
    if not math.isfinite(value):
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _ratio(value: float) -> str:
    """A share of the baseline's uplink: ``1``, ``1/6.3``, ``2.0``."""
    if not math.isfinite(value) or value < 0:
        return "-"
    if value == 0:
        return "0"
    if math.isclose(value, 1.0, rel_tol=5e-3):
        return "1"
    return f"1/{1 / value:.1f}" if value < 1 else f"{value:.1f}"


def _spread(values: np.ndarray) -> str:
    """``mean ± sample standard deviation``, or the value alone for one seed."""
    if not np.isfinite(values).all():
        return "-"
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}" if values.size > 1 else f"{values.mean():.1f}"


def _reached(values: np.ndarray) -> str:
    """The mean over the seeds that got there, and how many that were if not all."""
    ok = values[np.isfinite(values)]
    if not ok.size:
        return "-"
    return f"{ok.mean():.1f}".removesuffix(".0") + (f" ({ok.size} of {values.size})" if ok.size < values.size else "")


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(c) for c in column) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *(line(r) for r in rows)])
