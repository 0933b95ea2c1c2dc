"""What rotating before rounding does to the error, at 1 to 4 bits.

    python benchmarks/rotation.py [--values 262144] [--seeds 8] [--out benchmarks/results/rotation.csv]

For vectors of several distributions, and for what a network's training sends, the relative error ``||y - x||^2 / ||x||^2`` of
the value y that the receiver gets: once, and of the mean of eight receptions with different seeds, as when eight clients send
nearly the same. An unbiased rounding has an eighth of its error then; a biased one keeps it. Buckets of 512 values, rotation in
blocks of 4096; a network's tensors are rotated and rounded each on its own. A table (``.md``) and a figure (``.png``) go beside
the CSV.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kernels_report import table
from torch import Tensor

from dynfed_lightning import ops
from dynfed_lightning.models import build_model

BUCKET, BLOCK, MEAN_OF = 512, 4096, 8
BITS = (1, 2, 3, 4)
METHODS = {  # rounding, rotated first
    "stochastic": ("stochastic", False),
    "nearest": ("nearest", False),
    "eden": ("eden", False),
    "rotate + stochastic": ("stochastic", True),
    "rotate + nearest": ("nearest", True),
    "rotate + eden": ("eden", True),
}
COLUMNS = (
    "vector",
    "n",
    "tensors",
    "method",
    "bits",
    "bucket",
    "block",
    "seeds",
    "error",
    "error_std",
    "error_of_mean",
)
# EDEN's error on normally distributed values (dynfed_lightning/_reference.py).
THEORY = (0.571, 0.176, 0.0424, 0.0120)


# ---- the vectors ----


def gaussian(n: int, g: torch.Generator) -> Tensor:
    return torch.randn(n, generator=g)


def laplace(n: int, g: torch.Generator) -> Tensor:
    u = torch.rand(n, generator=g, dtype=torch.float64) - 0.5
    return (-u.sign() * torch.log1p(-2 * u.abs().clamp(max=0.4999999))).float()


def student(n: int, g: torch.Generator) -> Tensor:
    """Student's t with two degrees of freedom: no variance."""
    squares = torch.randn(2, n, generator=g).square().mean(0)
    return torch.randn(n, generator=g) / squares.sqrt()


def sparse(n: int, g: torch.Generator) -> Tensor:
    """Normal, one in a hundred; else zero."""
    return torch.randn(n, generator=g) * (torch.rand(n, generator=g) < 0.01)


def digits_update(steps: int = 30) -> tuple[Tensor, list[int]]:
    """What `steps` of SGD change in a fresh ResNet-8 on scikit-learn's digits; and the sizes of its tensors."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(data.target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model("resnet8", in_channels=1, norm="group")
        before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(steps):
            batch = torch.randint(len(x), (64,))
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimiser.step()
    after = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    return after - before, [p.numel() for p in model.parameters()]


SYNTHETIC: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "Gaussian": gaussian,
    "Laplace": laplace,
    "Student t, 2": student,
    "sparse, 1 %": sparse,
}


def vectors(n: int) -> dict[str, tuple[Tensor, list[int]]]:
    """All vectors by name, each with the sizes of its tensors."""
    made = {name: (f(n, torch.Generator().manual_seed(0)), [n]) for name, f in SYNTHETIC.items()}
    try:
        made["update of a ResNet-8"] = digits_update()
    except ImportError as error:
        print(f"missing: update of a ResNet-8: {error}")
    return made


# ---- the error ----


def received(x: Tensor, layout: ops.Layout, rounding: str, rotated: bool, seed: int) -> Tensor:
    """What a receiver makes of `x`."""
    sent = ops.rotate(x, BLOCK, seed, layout=layout) if rotated else x
    values = ops.unpack_dequantize_table(*ops.quantize_pack_table(sent, layout, seed, rounding), layout)
    return ops.rotate(values, BLOCK, seed, inverse=True, layout=layout) if rotated else values


def relative_error(y: Tensor, x: Tensor) -> float:
    x = x.double()
    return float((y.double() - x).square().sum() / x.square().sum())


def measure(name: str, x: Tensor, sizes: list[int], seeds: int) -> list[dict[str, Any]]:
    """A row per method and width."""
    rows = []
    for method, (rounding, rotated) in METHODS.items():
        for bits in BITS:
            layout = ops.Layout(sizes, bits, BUCKET)
            values = [received(x, layout, rounding, rotated, s).double() for s in range(max(seeds, MEAN_OF))]
            errors = [relative_error(v, x) for v in values[:seeds]]
            together = relative_error(torch.stack(values[:MEAN_OF]).mean(0), x)
            numbers = (f"{np.mean(errors):.6g}", f"{np.std(errors):.3g}", f"{together:.6g}")
            facts = (name, x.numel(), len(sizes), method, bits, BUCKET, BLOCK if rotated else "", seeds)
            rows.append(dict(zip(COLUMNS, (*facts, *numbers), strict=True)))
    return rows


# ---- the report ----


def markdown(rows: list[dict[str, Any]], csv_name: str) -> str:
    lines = ["# Rotation before rounding", ""]
    lines += [
        f"Relative error `||y - x||^2 / ||x||^2`, buckets of {BUCKET}, rotation in blocks of {BLOCK}, mean of "
        f"{rows[0]['seeds']} seeds; in brackets that of the mean of {MEAN_OF} receptions with different seeds. All rows: "
        f"`{csv_name}`; made by `benchmarks/rotation.py`.",
        "",
    ]
    for name in dict.fromkeys(r["vector"] for r in rows):
        here = [r for r in rows if r["vector"] == name]
        tensors = "" if str(here[0]["tensors"]) == "1" else f" in {here[0]['tensors']} tensors"
        lines += [f"## {name}: {int(here[0]['n']):,} values{tensors}", ""]
        body = []
        for method in METHODS:
            found = [r for r in here if r["method"] == method]
            body.append([method, *(f"{float(r['error']):.3g} ({float(r['error_of_mean']):.2g})" for r in found)])
        lines += table(["", *(f"{b} bit{'s' if b > 1 else ''}" for b in BITS)], body)
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> Path:
    """A panel per vector: error over bits; solid as sent once, dashed the mean of eight for the two that are compared."""
    from dynfed_lightning.plots import COLOURS, FAINT, INK, _figure, _save, _tidy

    names = list(dict.fromkeys(r["vector"] for r in rows))
    figure = _figure(2.6 * len(names) + 0.6, 4.3)
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    styles = dict(zip(METHODS, [(COLOURS[i % 3], "-" if i >= 3 else (0, (4, 2))) for i in range(6)], strict=True))
    for ax, name in zip(axes, names, strict=True):
        ax.plot(BITS, THEORY, color=FAINT, linewidth=5, alpha=0.35, label="EDEN, normal values (theory)")
        for method, (colour, dash) in styles.items():
            points = [float(r["error"]) for r in rows if r["vector"] == name and r["method"] == method]
            marker = "o" if method.startswith("rotate") else "s"
            ax.plot(
                BITS, points, color=colour, linestyle=dash, marker=marker, markersize=4, linewidth=1.5, label=method
            )
        ax.set_yscale("log")
        ax.set_xticks(BITS)
        ax.grid(True, which="major", color="#e4e4e4", linewidth=0.6)
        _tidy(ax, name, "bits", "relative error (log)" if ax is axes[0] else "")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8.5, frameon=False)
    figure.suptitle("Error of what is received, by rounding", fontsize=10, color=INK, x=0.01, ha="left")
    return _save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=int, default=1 << 18, help="of the synthetic vectors")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "rotation.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)  # sums in training depend on it
    rows = [r for name, (x, sizes) in vectors(args.values).items() for r in measure(name, x, sizes, args.seeds)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    text = markdown(rows, args.out.name)
    args.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    try:
        plot(rows, args.out.with_suffix(".png"))
    except ImportError as error:
        print(f"no figure: {error}")


if __name__ == "__main__":
    main()
