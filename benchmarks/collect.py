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
    "accuracy_worst",
    "global_accuracy",
    "teacher_loss",
    "student_loss",
    "rank",
    "rank_down",
    "energy",
    "own_accuracy",
    "own_accuracy_worst10",
    "own_accuracy_std",
    "personal_loss",
    "personal_bits",
    "personal_mb",
    "distance",
    "lam",
    "sharpness",
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
    """The rows of ``kernels-cpu.csv`` that a reader compares first, at `n` values: what was measured, against whom."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["runs"] not in ("", "0") and r["n"] == str(n)]
    skipped = ("kernel", "compiled", "ops, one by one")  # in the CSV and its report
    chosen = [r for r in rows if r["section"] in ("main", "accumulate") and r["implementation"] not in skipped]
    found: dict[str, list[dict[str, str]]] = {}
    for r in chosen:
        eight = r["bits"] == "8" and not r["implementation"].startswith("bitsandbytes")
        if (r["bits"] not in ("4", "8", "32", "") and r["section"] == "main") or eight or r["dtype"] != "float32":
            continue
        clients = f", {r['clients']} clients" if r["clients"] != "1" else ""
        found.setdefault(r["operation"] + clients, []).append(r)
    lines = [
        "| operation, 16 M values | implementation | bits | ms (p50) | billion values/s |",
        "|---|---|--:|--:|--:|",
    ]
    for label, group in found.items():
        for r in group:
            ms, speed = float(r["p50_ms"]), float(r["gcodes_per_s"])
            bits = "2-6" if r["section"] == "accumulate" else r["bits"]
            lines.append(f"| {label} | {r['implementation']} | {bits} | {ms:.2f} | {speed:.2f} |")
    first = rows[0]
    where = f"{first['cpu']}, {first['threads']} threads, `{first['backend']}`, torch {first['torch']}"
    note = f"{where}; all widths, sizes and targets: `benchmarks/results/{path.name}` and `{path.stem}.md`."
    return "\n".join([*lines, "", note])


def rotation_table(path: Path) -> str:
    """Relative errors of ``rotation.csv`` for the update of a model: a row for each way of rounding, a column for each width."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["vector"].startswith("update") and r["method"] != "eden"]
    widths = sorted({int(r["bits"]) for r in rows})
    cells = {(r["method"], int(r["bits"])): float(r["error"]) for r in rows}
    head = " | ".join(f"{b} bit{'s' if b > 1 else ''}" for b in widths)
    lines = [f"| {rows[0]['vector']}: relative squared error | {head} |", "|---|" + "--:|" * len(widths)]
    for method in dict.fromkeys(r["method"] for r in rows):
        lines.append(f"| {method} | {' | '.join(f'{cells[method, b]:.3g}' for b in widths)} |")
    return "\n".join(lines)


def svd_table(path: Path) -> str:
    """How many times as long as `truncated_svd` torch's own decompositions take (the quicker of two ways), and how good it is."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["spectrum"] == "1/i"]
    lines = [
        "| matrices, spectrum 1/i, energy 0.95 | ms | `linalg.svd` | `svd_lowrank` | rank | least rank | claimed energy | true |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for workload in dict.fromkeys(r["workload"] for r in rows):
        by = {r["implementation"]: r for r in rows if r["workload"] == workload}
        ours = by["truncated_svd"]
        rivals = {k: float(r["ratio"]) for k, r in by.items() if k != "truncated_svd"}
        best = [min(v for k, v in rivals.items() if k.startswith(n)) for n in ("linalg.svd", "svd_lowrank")]
        ratios = [f"{r:.2f} x" if r < 10 else f"{r:.1f} x" for r in best]
        lines.append(
            f"| {workload} | {float(ours['p50_ms']):.2f} | {' | '.join(ratios)} | {ours['rank']} | {ours['least_rank']} | "
            f"{float(ours['claimed']):.5f} | {float(ours['true']):.5f} |"
        )
    return "\n".join(lines)


def fill_readme(text: str) -> str:
    """`text` with every block between ``<!-- results:NAME -->`` and ``<!-- /results -->`` made from the committed results."""

    def block(match: re.Match[str]) -> str:
        name = match.group(1)
        sys.path.insert(0, str(Path(__file__).parent))  # this file may have been loaded by its path
        import fedkd  # which uses this module in turn
        import quped

        if name == "kernels":
            body = kernels_table(RESULTS / "kernels-cpu.csv")
        elif name == "rotation":
            body = rotation_table(RESULTS / "rotation.csv")
        elif name.startswith(("sst2", "cifar10", "digits-fedkd")):
            body = fedkd.table(RESULTS / f"{name}.csv")
        elif name == "svd":
            body = svd_table(RESULTS / "svd-cpu.csv")
        elif name == "quped":
            body = quped.table(RESULTS / "quped.csv")
        elif name == "qat":
            body = quped.qat_table(RESULTS / "qat.csv")
        elif name == "soft-quantize":
            body = quped.kernels_table(RESULTS / "soft-quantize-cpu.csv")
        else:
            body = comparison(RESULTS / f"{name}.csv", last=1).markdown()
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
