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
import re
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


def kernels_table(path: Path, n: int = 1 << 24) -> str:
    """The 4-bit rows of ``kernels-cpu.csv`` at `n` values: what was measured, against whom, in one run."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if int(r["n"]) == n and r["bits"] in ("4", "32")]
    found: dict[str, list[dict[str, str]]] = {}
    for r in rows:
        label = r["operation"] + (f", {r['clients']} clients" if r["clients"] != "1" else "")
        found.setdefault(label, []).append(r)
    lines = ["| operation, 4 bits, 16 M values | implementation | ms (p50) | billion values/s |", "|---|---|--:|--:|"]
    for label, group in found.items():
        clients = int(group[0]["clients"])
        for r in group:
            if r["implementation"] != "kernel":  # the same without allocating its output; in the CSV
                ms = float(r["p50_ms"])
                lines.append(f"| {label} | {r['implementation']} | {ms:.1f} | {clients * n / ms / 1e6:.2f} |")
    first = rows[0]
    where = f"{first['cpu']}, {first['threads']} threads, `{first['backend']}`, torch {first['torch']}"
    note = f"{where}; all widths and sizes in `benchmarks/results/{path.name}`."
    return "\n".join([*lines, "", note])


def fill_readme(text: str) -> str:
    """`text` with every block between ``<!-- results:NAME -->`` and ``<!-- /results -->`` made from the committed results."""

    def block(match: re.Match[str]) -> str:
        name = match.group(1)
        csv_path = RESULTS / ("kernels-cpu.csv" if name == "kernels" else f"{name}.csv")
        body = kernels_table(csv_path) if name == "kernels" else comparison(csv_path, last=1).markdown()
        return f"<!-- results:{name} -->\n{body}\n<!-- /results -->"

    return re.sub(r"<!-- results:([\w.-]+) -->.*?<!-- /results -->", block, text, flags=re.DOTALL)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="?", help="the folder given to `dynfed compare --out`")
    parser.add_argument("name", nargs="?", help="what the results are called")
    parser.add_argument("--readme", action="store_true", help="only: make the README's tables of the committed results")
    parser.add_argument("--last", type=int, default=1, help="rounds at the end that make the final accuracy")
    parser.add_argument("--from-csv", action="store_true", help="make table and figure of the committed CSV again")
    parser.add_argument("--order", nargs="*", default=[], help="method names that come first, in this order")
    parser.add_argument("--only", nargs="*", default=[], help="method names; default: all there are")
    parser.add_argument("--title", default="")
    options = parser.parse_args()
    if options.readme:
        readme = RESULTS.parent.parent / "README.md"
        readme.write_text(fill_readme(readme.read_text(encoding="utf-8")), encoding="utf-8")
        return
    if options.runs is None or options.name is None:
        parser.error("expected RUNS and NAME, or --readme")
    path = RESULTS / f"{options.name}.csv"
    if not options.from_csv:
        folders = sorted(p.parent for p in options.runs.glob("*/seed*/summary.json"))
        if not folders:
            raise SystemExit(f"no finished runs in {options.runs}")
        rank = {name: i for i, name in enumerate(options.order)}

        def key(folder: Path) -> tuple[int, str, int]:
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            return rank.get(summary["name"], len(rank)), summary["name"], int(summary["seed"])

        folders = [
            f
            for f in folders
            if not options.only or json.loads((f / "summary.json").read_text())["name"] in options.only
        ]
        write_csv(sorted(folders, key=key), path)
    made = comparison(path, options.last)
    path.with_suffix(".md").write_text(made.markdown() + "\n", encoding="utf-8")
    plot_comparison(made, path.with_suffix(".png"), options.title)
    sys.stdout.write(made.markdown() + "\n")


if __name__ == "__main__":
    main()
