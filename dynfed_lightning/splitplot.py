"""A picture of a split: how many rows of each class every client has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dynfed_lightning.images import missing

# Up to these numbers stacked bars can be told apart; beyond them a picture of dots says more.
_BARS, _COLOURS = 30, 20


def draw_split(counts: Tensor, path: Path, names: Sequence[str] | None = None, title: str = "") -> Path:
    """Draw who has what.

    Args:
        counts: int64 ``[clients, C]``.
        path: where to; its ending says the format, its folder is made.
        names: the classes' names, if they have any.
        title: above the picture.

    Returns:
        `path`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise missing("matplotlib", "report") from None

    table = counts.cpu().numpy()
    labels = list(names) if names else [str(c) for c in range(table.shape[1])]
    bars = table.shape[0] <= _BARS and table.shape[1] <= _COLOURS
    size = (8.0, 1.2 + 0.24 * table.shape[0]) if bars else (10.0, min(9.0, 1.8 + 0.3 * table.shape[1]))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    (_bars if bars else _dots)(axes, table, labels)
    axes.set_title(f"{title}: {table.sum():,} rows" if title else f"{table.sum():,} rows", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _bars(axes: Any, table: np.ndarray, labels: list[str]) -> None:
    from matplotlib import colormaps

    colours = colormaps["tab10" if len(labels) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    clients, start = np.arange(len(table)), np.zeros(len(table))
    for c, label in enumerate(labels):
        axes.barh(clients, table[:, c], left=start, color=colours[c], label=label, height=0.82, linewidth=0)
        start += table[:, c]
    for k, total in enumerate(start):
        axes.annotate(f"{int(total):,}", (total, k), (3, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set(
        xlabel="rows", ylabel="client", yticks=clients, ylim=(len(table) - 0.4, -0.6), xlim=(0, start.max() * 1.08)
    )
    axes.tick_params(labelsize=8)
    axes.legend(
        title="class", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8, title_fontsize=8
    )


def _dots(axes: Any, table: np.ndarray, labels: list[str]) -> None:
    client, label = np.nonzero(table)
    rows = table[client, label]
    # The area of a dot is its number of rows; the largest nearly fills the height of its line, and may overlap sideways.
    width, height = axes.figure.get_size_inches() * 72 * 0.85
    across = max(5.0, min(3.0 * width / len(table), 0.95 * height / len(labels), 30.0))
    area = across**2 * rows / rows.max()
    axes.scatter(client, label, s=np.maximum(area, 0.3), alpha=0.6, linewidth=0)
    axes.set(xlabel="client", ylabel="class", xlim=(-1, len(table)), ylim=(len(labels) - 0.4, -0.6))
    if len(labels) <= 30:
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.grid(axis="y", linewidth=0.3)
    axes.set_axisbelow(True)
    axes.annotate(
        f"largest dot: {rows.max():,} rows", (1, 1), xycoords="axes fraction", ha="right", va="bottom", fontsize=8
    )
