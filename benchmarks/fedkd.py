"""The tables and figures of FedKD: who is judged, what the student itself can do, and what travelled both ways.

    dynfed compare benchmarks/configs/sst2-*.yaml --seeds 0 1 2 --allow-different --out runs/sst2
    python benchmarks/fedkd.py runs/sst2 sst2 --baseline "FedAvg of the teacher"

writes ``benchmarks/results/sst2.{csv,md,png}``, table and figure from the CSV alone; ``--from-csv`` makes those two again.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from pathlib import Path

import collect

BASELINES = {
    "sst2": "FedAvg of the teacher",
    "cifar10": "FedAvg of the student",
    "digits-fedkd": "FedAvg of the student",
}


class Group:
    """The runs of one method: for each seed its last judged round."""

    def __init__(self, name: str, rows: list[dict[str, str]]) -> None:
        self.name = name
        seeds = {r["seed"]: [x for x in rows if x["seed"] == r["seed"]] for r in rows}
        self.seeds = len(seeds)
        last = [[x for x in runs if x["accuracy"]][-1] for runs in seeds.values()]
        self.accuracy = [100 * float(x["accuracy"]) for x in last]
        self.student = [100 * float(x["global_accuracy"]) for x in last if x["global_accuracy"]]
        self.up = statistics.mean(int(x["total_bytes_up"]) for x in last) / 1e6
        self.down = statistics.mean(int(x["total_bytes_down"]) for x in last) / 1e6
        ranks = [float(x["rank"]) for x in rows if x["rank"]]
        self.rank = statistics.mean(ranks) if ranks else None
        self.rounds = len(rows) // self.seeds

    @property
    def bytes(self) -> float:
        """10^6 bytes both ways."""
        return self.up + self.down


def groups(path: Path) -> list[Group]:
    """The methods of a results CSV, in its order."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [Group(name, [r for r in rows if r["name"] == name]) for name in dict.fromkeys(r["name"] for r in rows)]


def spread(values: list[float]) -> str:
    """Mean ± standard deviation over seeds; of one seed no deviation."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def table(path: Path) -> str:
    """A row a method, against the baseline that the name of the results says."""
    found = groups(path)
    baseline = BASELINES[next(k for k in BASELINES if path.name.startswith(k))]
    dense = next(g.bytes for g in found if g.name == baseline)
    lines = [
        f"| method | seeds | accuracy % | global model (student) % | MB up | MB down | fewer bytes than {baseline} | rank |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for g in found:
        saved = (
            "-"
            if g.name == baseline or not g.bytes
            else f"{100 * (1 - g.bytes / dense) + 0.0:.1f} %".replace("-0.0", "0.0")
        )
        student = spread(g.student)
        rank = "-" if g.rank is None else f"{g.rank:.0f}"
        lines.append(
            f"| {g.name} | {g.seeds} | {spread(g.accuracy)} | {student} | {g.up:.1f} | {g.down:.1f} | {saved} | {rank} |"
        )
    return "\n".join(lines)


def figure(path: Path, title: str) -> None:
    """Accuracy of what each method is judged by, and of its student, with every seed; and the bytes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = groups(path)
    places = list(range(len(found)))[::-1]
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 0.45 * len(found) + 1.8), sharey=True, width_ratios=(3, 2))
    for y, g in zip(places, found, strict=True):
        for values, colour, label in ((g.accuracy, "#0072b2", "judged"), (g.student, "#d55e00", "student")):
            if values:
                left.plot(values, [y] * len(values), "o", color=colour, alpha=0.35, markersize=5)
                left.plot([statistics.mean(values)], [y], "|", color=colour, markersize=18, markeredgewidth=2.5)
                if y == max(p for p, h in zip(places, found, strict=True) if (h.student if label == "student" else h)):
                    left.plot([], [], "o", color=colour, label=f"{label} model" if label == "judged" else "its student")
        right.barh(y, g.bytes, color="#555555", height=0.55)
        right.annotate(
            f" {g.bytes:,.0f}" if g.bytes >= 100 else f" {g.bytes:.3g}",
            (max(g.bytes, 1e-9), y),
            va="center",
            fontsize=9,
        )
    left.set_yticks(places, [g.name for g in found])
    left.set_xlabel("accuracy, % (dots: seeds, bars: means)")
    left.legend(frameon=False, loc="best", fontsize=9)
    positive = [g.bytes for g in found if g.bytes]
    right.set_xscale("log")
    right.set_xlim(min(positive) / 3, max(positive) * 6)
    right.set_xlabel("megabytes, both ways")
    for axis in (left, right):
        axis.grid(axis="x", color="#dddddd")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    fig.suptitle(title, x=0.01, ha="left")
    fig.tight_layout()
    fig.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(fig)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="the folder given to `dynfed compare --out`")
    parser.add_argument("name", help="what the results are called")
    parser.add_argument("--title", default="")
    parser.add_argument(
        "--order", nargs="*", default=[], help="method names, in the order of the table; others are left out"
    )
    parser.add_argument("--from-csv", action="store_true")
    options = parser.parse_args()
    path = collect.RESULTS / f"{options.name}.csv"
    if not options.from_csv:
        folders = sorted(p.parent for p in options.runs.glob("*/seed*/summary.json"))
        names = {f: json.loads((f / "summary.json").read_text(encoding="utf-8"))["name"] for f in folders}
        order = options.order or list(dict.fromkeys(names.values()))
        chosen = sorted((f for f in folders if names[f] in order), key=lambda f: (order.index(names[f]), f.name))
        if not chosen:
            raise SystemExit(f"no finished runs in {options.runs}")
        collect.write_csv(chosen, path)
    path.with_suffix(".md").write_text(table(path) + "\n", encoding="utf-8")
    figure(path, options.title)
    sys.stdout.write(table(path) + "\n")


if __name__ == "__main__":
    main()
