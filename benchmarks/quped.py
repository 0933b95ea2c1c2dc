"""The tables and the figure of learned centres: personal models (QuPeD and rivals), quantisation-aware training, the kernels.

    benchmarks/quped.sh                                  # everything, or:
    dynfed compare benchmarks/configs/cifar10-quped-*.yaml --seeds 0 1 2 --metric own_accuracy --allow-different --out runs/quped
    python benchmarks/quped.py runs/quped --title "..."

writes ``benchmarks/results/quped.{csv,md,png}``, table and figure from the CSV alone; ``--from-csv`` makes those two again.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import collect
from fedkd import spread

ORDER = [
    *("FedAvg", "Local", "Per-FedAvg", "pFedMe", "QuPeD, full precision", "QuPeD, 2 bits", "QuPeD, 1 bit"),
    *("QuPeD, 2 bits, updates in 4 bits", "QuPeD, mixed (2 architectures; 1, 2, 32 bits)"),
]
COLOURS = ["#555555", "#999999", "#e69f00", "#f0e442", "#0072b2", "#009e73", "#d55e00", "#56b4e9", "#cc79a7"]


def read(path: Path) -> dict[str, list[dict[str, str]]]:
    """The rows of a CSV by the method's name, in its order."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [r for r in rows if r["name"] == name] for name in dict.fromkeys(r["name"] for r in rows)}


def judged(rows: list[dict[str, str]], column: str) -> dict[str, list[tuple[int, float]]]:
    """Per seed the rounds in which `column` was measured, and its values in percent."""
    seeds: dict[str, list[tuple[int, float]]] = {}
    for r in rows:
        if r.get(column):
            seeds.setdefault(r["seed"], []).append((int(r["round"]), 100 * float(r[column])))
    return seeds


def final(rows: list[dict[str, str]], column: str) -> list[float]:
    """Per seed the last value in percent."""
    return [values[-1][1] for values in judged(rows, column).values()]


def best(rows: list[dict[str, str]]) -> list[float]:
    """Per seed the best round's own accuracy: what stopping early, with the test set's help, would have given at most."""
    return [max(v for _, v in values) for values in judged(rows, "own_accuracy").values()]


def table(path: Path) -> str:
    """A row a method: what clients get, the worst tenth of them, the global model, and what it costs."""
    lines = [
        "| method | seeds | own accuracy % | at its best round | worst 10 % of clients | spread over clients | global model % | "
        "a personal model | MB up a client and round |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, rows in read(path).items():
        # The global model is what FedAvg's clients use: `accuracy` is its on the whole test set.
        whole = final(rows, "global_accuracy") or (final(rows, "accuracy") if name == "FedAvg" else [])
        mb = [float(r["personal_mb"]) for r in rows if r.get("personal_mb")]
        numbers = 4e-6 * int(rows[0]["num_parameters"])
        up = statistics.mean(int(r["bytes_up"]) / int(r["clients"]) for r in rows) / 1e6
        size = f"{1e3 * (statistics.mean(mb) if mb else numbers):.0f} kB"
        cells = [spread(final(rows, "own_accuracy")), spread(best(rows)), spread(final(rows, "own_accuracy_worst10"))]
        cells += [f"{statistics.mean(final(rows, 'own_accuracy_std')):.1f}", spread(whole), size, f"{up:.2f}"]
        lines.append(f"| {name} | {len(judged(rows, 'own_accuracy'))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(path: Path, title: str) -> None:
    """Own accuracy over rounds (means over seeds), and at the end with every seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = read(path)
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 0.4 * len(found) + 2.2), width_ratios=(5, 4))
    for i, (name, rows) in enumerate(found.items()):
        colour, y = COLOURS[i % len(COLOURS)], len(found) - i
        seeds = judged(rows, "own_accuracy")
        rounds = [t for t, _ in next(iter(seeds.values()))]
        means = [statistics.mean(v[j][1] for v in seeds.values()) for j in range(len(rounds))]
        left.plot(rounds, means, "-o", color=colour, markersize=4, label=name)
        values, worst = final(rows, "own_accuracy"), final(rows, "own_accuracy_worst10")
        right.plot(values, [y] * len(values), "o", color=colour, alpha=0.4, markersize=5)
        right.plot([statistics.mean(values)], [y], "|", color=colour, markersize=18, markeredgewidth=2.5)
        right.plot(worst, [y] * len(worst), "x", color=colour, alpha=0.7, markersize=5)
    left.set_xlabel("round")
    left.set_ylabel("own accuracy, %, mean over seeds")
    right.set_yticks(range(len(found), 0, -1), list(found))
    right.set_xlabel("%, last round (dots: seeds, bars: means, crosses: worst 10 %)")
    for axis in (left, right):
        axis.grid(color="#dddddd")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    fig.suptitle(title, x=0.01, ha="left")
    fig.tight_layout()
    fig.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(fig)


def qat_table(path: Path) -> str:
    """A row a network and width: mean and spread of the accuracy, and how much smaller what is saved is."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    lines = [
        "| network | bits | seeds | accuracy % | against float32 | weights quantised | smaller there | file, kB | of float32 |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    keys = dict.fromkeys((r["data"], r["model"], r["train"], r["epochs"]) for r in rows)
    for data, model, train, epochs in keys:
        group = [r for r in rows if (r["data"], r["model"], r["train"], r["epochs"]) == (data, model, train, epochs)]
        by: dict[int, list[dict[str, str]]] = {}
        for r in group:
            by.setdefault(int(r["bits"]), []).append(r)
        dense = {r["seed"]: float(r["accuracy"]) for r in by[32]}
        for bits, runs in sorted(by.items(), reverse=True):
            accuracy = [float(r["accuracy"]) for r in runs]
            cells: list[Any] = [bits, len(runs), spread2(accuracy)]
            if bits == 32:
                cells += ["-", "-", "-", f"{4e-3 * int(runs[0]['all_values']):.0f}", "-"]
            else:
                less = statistics.mean(float(r["accuracy"]) - dense[r["seed"]] for r in runs)
                quantised, every = int(runs[0]["quantised_values"]), int(runs[0]["all_values"])
                cells += [f"{less:+.2f}", f"{100 * quantised / every:.0f} %"]
                cells += [
                    f"{4 * quantised / int(runs[0]['bytes_quantised']):.1f} x",
                    f"{int(runs[0]['bytes_file']) / 1e3:.1f}",
                ]
                cells += [f"1/{4 * every / int(runs[0]['bytes_file']):.1f}"]
            name = {"mnist": "MNIST", "cifar10": "CIFAR-10"}[data]
            lines.append(f"| {name}, {model} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def kernels_table(path: Path) -> str:
    """A row an operation and workload of ``soft-quantize-*.csv``: how long ours takes, the rivals in times of it, memory."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rivals = [n for n in dict.fromkeys(r["implementation"] for r in rows) if n != "ours"]
    lines = [
        f"| operation | workload | ms (p50) | copies of the weights | {' | '.join(rivals)} |",
        "|---|---|--:|--:|" + "--:|" * len(rivals),
    ]
    for operation, workload in dict.fromkeys((r["operation"], r["workload"]) for r in rows):
        by = {r["implementation"]: r for r in rows if (r["operation"], r["workload"]) == (operation, workload)}
        if "ours" not in by or not by["ours"]["p50_ms"]:
            continue
        times = [f"{float(by[n]['ratio']):.1f} x" if n in by and by[n]["ratio"] else "-" for n in rivals]
        copies = by["ours"]["copies"] or "-"
        ours = float(by["ours"]["p50_ms"])
        lines.append(f"| {operation} | {workload} | {ours:.3g} | {copies} | {' | '.join(times)} |")
    return "\n".join(lines)


def spread2(values: list[float]) -> str:
    """Mean ± standard deviation over seeds, to two digits."""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="?", help="the folder given to `dynfed compare --out`")
    parser.add_argument("--title", default="")
    parser.add_argument("--from-csv", action="store_true")
    options = parser.parse_args()
    path = collect.RESULTS / "quped.csv"
    if not options.from_csv:
        folders = sorted(options.runs.glob("*/seed*/summary.json")) if options.runs else []
        names = {f.parent: json.loads(f.read_text(encoding="utf-8"))["name"] for f in folders}
        chosen = sorted((f for f in names if names[f] in ORDER), key=lambda f: (ORDER.index(names[f]), f.name))
        if not chosen:
            raise SystemExit(f"no finished runs in {options.runs}")
        collect.write_csv(chosen, path)
    path.with_suffix(".md").write_text(table(path) + "\n", encoding="utf-8")
    figure(path, options.title)
    qat = collect.RESULTS / "qat.csv"
    if qat.exists():
        qat.with_suffix(".md").write_text(qat_table(qat) + "\n", encoding="utf-8")
    sys.stdout.write(table(path) + "\n")


if __name__ == "__main__":
    main()
