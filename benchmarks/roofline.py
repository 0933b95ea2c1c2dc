"""The roofline figure of the kernel benchmark: values per second of every implementation, against what memory allows."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynfed_lightning.plots import COLOURS, FAINT, INK, _figure, _save, _tidy

if TYPE_CHECKING:
    from kernels_report import Results
    from matplotlib.axes import Axes

PANELS = (  # operation, clients, title
    ("quantize_pack stochastic", 1, "quantise and pack, stochastic"),
    ("quantize_pack nearest", 1, "quantise and pack, nearest"),
    ("unpack_dequantize", 1, "unpack and dequantise"),
    ("dequantize_accumulate", 8, "dequantise and add, 8 clients"),
    ("pack", 1, "pack codes"),
    ("unpack", 1, "unpack codes"),
)
# The one style of an implementation wherever it appears: colour and marker.
STYLES: dict[str, tuple[str, str]] = {
    "ours": (COLOURS[0], "o"),
    "ours, new output": (COLOURS[0], "$\\circ$"),
    "ours, triton": (COLOURS[5], "o"),
    "fbgemm": (COLOURS[1], "s"),
    "fbgemm-gpu": (COLOURS[4], "s"),
    "compiled": (COLOURS[2], "^"),
    "eager": (COLOURS[2], "v"),
    "numpy": (COLOURS[6], "D"),
    "torchao": (COLOURS[3], "P"),
    "torchao (unpacked)": (COLOURS[3], "X"),
    "bitsandbytes blockwise": (COLOURS[7], "*"),
    "bitsandbytes nf4": (COLOURS[7], "h"),
    "bitsandbytes fp4": (COLOURS[7], "p"),
}
LABELS = {
    "ours": "ours (out=)",
    "compiled": "torch.compile",
    "eager": "torch eager",
    "bitsandbytes blockwise": "bitsandbytes 8-bit",
}


def _series(results: Results, operation: str, clients: int, n: int) -> dict[str, dict[int, float]]:
    """Billion values (codes, with several clients) per second of each implementation, by bits."""
    found: dict[str, dict[int, float]] = {}
    for row in results.timed(section="main", operation=operation, clients=clients, n=n):
        name = row["implementation"]
        if row["version"] == "dynfed-lightning":
            if name == "kernel" or (name == "ops" and operation.startswith("quantize")):
                continue  # a line on the line of `out`
            new = name == "ops" and not operation.startswith("dequantize")  # the others allocate what they return, too
            name = "ours, triton" if row["backend"] == "triton" else "ours, new output" if new else "ours"
        found.setdefault(name, {})[int(row["bits"])] = float(row["gcodes_per_s"])
    return found


def _panel(ax: Axes, results: Results, operation: str, clients: int, n: int, copy: float, read: float) -> None:
    """`copy` and `read` in GB/s: read and written together, and read alone."""
    widths = list(range(1, 9))
    extra = 4 / 512
    inputs = {"pack": 1.0, "unpack": 0.0, "unpack_dequantize": 0.0, "dequantize_accumulate": 4.0}.get(operation, 4.0)
    outputs = {"pack": 0.0, "unpack": 1.0, "unpack_dequantize": 4.0, "dequantize_accumulate": 4.0}.get(operation, 0.0)
    scales = 0.0 if operation in ("pack", "unpack") else extra
    payload = [clients * (b / 8 + scales) for b in widths]
    copied = [clients * copy / (inputs + outputs + p) for p in payload]
    ax.plot(widths, copied, color=INK, linewidth=1.2, zorder=2)
    ax.fill_between(widths, copied, 1e6, color="#f4f4f4", linewidth=0, zorder=0)
    if read and not outputs:  # what writes little is limited by reading
        ax.plot(widths, [clients * read / inputs] * len(widths), color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
    series = _series(results, operation, clients, n)
    for name, points in series.items():
        colour, marker = STYLES.get(name, (FAINT, "."))
        bits = sorted(points)
        style: dict[str, Any] = {"linewidth": 1.9 if name in ("ours", "ours, triton") else 1.1, "markersize": 4.8}
        if name == "ours, new output":
            style["linestyle"] = (0, (3, 2))
        label = LABELS.get(name, name)
        ax.plot(bits, [points[b] for b in bits], color=colour, marker=marker, label=label, zorder=3, **style)
    values = [v for points in series.values() for v in points.values()] + copied
    ax.set_yscale("log")
    ax.set_ylim(min(values) / 2, max([*values, clients * read / inputs if read and not outputs else 0]) * 2)
    ax.set_xlim(0.6, 8.4)
    ax.set_xticks(widths)


def plot_roofline(results: Results, path: Path, n: int | None = None) -> Path:
    """Six operations over the bits of a code; logarithmic in values per second, one size of vector.

    The solid line is the roof: what a kernel would reach that moves its bytes, read and written, as fast as a copy does. The
    dashed line is the other limit of what writes little: its input alone, read as fast as a sum reads.
    """
    sizes = results.sizes("main")
    n = n or (sizes[-1] if sizes else 0)
    memcpy = results.one(section="main", operation="memcpy", n=n)
    reading = results.one(section="limits", operation="read", n=n)
    copy = 2 * float(memcpy["gb_per_s"]) if memcpy else 0.0
    read = float(reading["gb_per_s"]) if reading else 0.0
    figure = _figure(11, 7)
    axes = figure.subplots(2, 3).ravel()
    handles: dict[str, Any] = {}
    for ax, (operation, clients, title) in zip(axes, PANELS, strict=True):
        _panel(ax, results, operation, clients, n, copy, read)
        _tidy(ax, title, "bits of a code", "billion values per second (log)" if ax in axes[::3] else "")
        ax.grid(True, which="major", color="#e4e4e4", linewidth=0.6)
        _plain_numbers(ax)
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    order = [label for name in STYLES if (label := LABELS.get(name, name)) in handles]
    lines = importlib.import_module("matplotlib.lines")
    limits = {
        f"limit: bytes moved at the copy's {copy:,.0f} GB/s": lines.Line2D([], [], color=INK, linewidth=1.2),
        f"limit: input read at {read:,.0f} GB/s": lines.Line2D([], [], color=INK, linewidth=1, linestyle=(0, (4, 3))),
    }
    named = {**{label: handles[label] for label in order}, **limits}
    figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=5, fontsize=8.5, frameon=False)
    first = memcpy or results.rows[0]
    where = first["gpu"] or f"{first['cpu']}, {results.threads}"
    figure.suptitle(f"{n:,} values; {where}; {first['backend']}", fontsize=9.5, color=INK, x=0.01, ha="left")
    return _save(figure, path)


def _plain_numbers(ax: Axes) -> None:
    """Ticks that read 0.1, 1, 10 on the logarithmic axis."""
    ticker = importlib.import_module("matplotlib.ticker")
    ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
    ax.yaxis.set_minor_formatter(ticker.NullFormatter())
