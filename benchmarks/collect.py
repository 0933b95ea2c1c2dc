"""Turn the run folders of ``dynfed compare`` into committed results: one long CSV, one table, one figure.

    dynfed compare benchmarks/configs/mnist-*.yaml --seeds 0 1 2 --jobs 2 --out runs/mnist-0.1
    python benchmarks/collect.py runs/mnist-0.1 mnist-0.1 --last 1

writes ``benchmarks/results/mnist-0.1.{csv,md,png}``. The CSV has a row per method, seed and round; the table and the figure are
made of the CSV alone (``--from-csv`` makes them again), so that whoever doubts a number can find the rows it comes from.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
from pathlib import Path

from dynfed_lightning.plots import plot_comparison
from dynfed_lightning.report import Comparison, Run

RESULTS = Path(__file__).parent / "results"
KEYS = ("name", "method", "seed", "dataset", "model", "num_parameters", "num_clients", "split", "device", "torch")
COLUMNS = [
    "round",
    "accuracy",
    "loss",
    "train_loss",
    "clients",
    "failed",
    "bytes_up",
    "bytes_down",
    "total_bytes_up",
    "total_bytes_down",
    "bits_mean",
    "bits_min",
    "bits_max",
    "distill_loss_before",
    "distill_loss",
    "seconds",
]


def write_csv(folders: list[Path], path: Path) -> None:
    """All rounds of all runs, long format."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*KEYS, *COLUMNS], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for folder in folders:
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            with open(folder / "rounds.csv", newline="", encoding="utf-8") as rounds:
                for row in csv.DictReader(rounds):
                    writer.writerow({**{k: summary.get(k) for k in KEYS}, **row})


def read_runs(path: Path) -> list[Run]:
    """The runs of a CSV that `write_csv` wrote, in its order."""
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            groups.setdefault((row["name"], row["seed"]), []).append(row)
    runs = []
    for rows in groups.values():
        # Through the same reader as a run folder, so that both mean the same by a column.
        with tempfile.TemporaryDirectory() as folder:
            with open(Path(folder) / "rounds.csv", "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)
            seconds = sum(float(r["seconds"]) for r in rows)
            summary = {**{k: rows[0][k] for k in KEYS}, "seconds": seconds}
            (Path(folder) / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
            runs.append(Run.read(folder))
    return runs


def comparison(path: Path, last: int, baseline: str | None = "FedAvg") -> Comparison:
    """The comparison that a results CSV holds; all its runs of one seed must share their split."""
    runs = read_runs(path)
    splits: dict[str, set[str]] = {}
    for run in runs:
        splits.setdefault(run.summary["seed"], set()).add(run.summary["split"])
    mixed = [seed for seed, found in splits.items() if len(found) > 1 and run.summary["method"] != "Centralised"]
    if mixed:
        raise SystemExit(f"{path}: the runs of seed {mixed[0]} were not trained on the same split")
    return Comparison.of(runs, baseline=baseline, last=last)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="the folder given to `dynfed compare --out`")
    parser.add_argument("name", help="what the results are called")
    parser.add_argument("--last", type=int, default=1, help="rounds at the end that make the final accuracy")
    parser.add_argument("--from-csv", action="store_true", help="make table and figure of the committed CSV again")
    parser.add_argument("--order", nargs="*", default=[], help="method names that come first, in this order")
    parser.add_argument("--title", default="")
    options = parser.parse_args()
    path = RESULTS / f"{options.name}.csv"
    if not options.from_csv:
        folders = sorted(p.parent for p in options.runs.glob("*/seed*/summary.json"))
        if not folders:
            raise SystemExit(f"no finished runs in {options.runs}")
        rank = {name: i for i, name in enumerate(options.order)}

        def key(folder: Path) -> tuple[int, str, int]:
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            return rank.get(summary["name"], len(rank)), summary["name"], int(summary["seed"])

        write_csv(sorted(folders, key=key), path)
    made = comparison(path, options.last)
    path.with_suffix(".md").write_text(made.markdown() + "\n", encoding="utf-8")
    plot_comparison(made, path.with_suffix(".png"), options.title)
    sys.stdout.write(made.markdown() + "\n")


if __name__ == "__main__":
    main()
