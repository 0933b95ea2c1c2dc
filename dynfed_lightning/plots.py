"""The figures of a run and of a comparison. Needs the ``report`` extra (matplotlib); draws to files, never to a screen."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dynfed_lightning.report import MEGABYTE, Comparison, Method, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette without its yellow: distinct for colour-blind readers too. After eight, the dashes change.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6F4E37", "#555555"]
DASHES: list[Any] = ["-", (0, (5, 1.5)), (0, (1, 1))]
FEW = 10  # up to this many rounds each has a dot
INK, FAINT = "#222222", "#8a8a8a"
DPI = 150
Y_LABELS = {
    "accuracy": "test accuracy, %",
    "own_accuracy": "accuracy on clients' own test distributions, %",
    "own_accuracy_worst10": "own accuracy of the worst tenth, %",
    "global_accuracy": "test accuracy of the global model, %",
}


def _figure(width: float, height: float) -> Figure:
    """A figure on the Agg canvas, without pyplot: no global state, no window, whatever the user's backend."""
    try:
        figure = importlib.import_module("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install dynfed-lightning[report]") from error
    importlib.import_module("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return path


def _tidy(ax: Axes, title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=10, color=INK, loc="left")
    ax.set_xlabel(x, fontsize=9)
    ax.set_ylabel(y, fontsize=9)
    ax.tick_params(labelsize=8, colors=INK)
    ax.spines[["top", "right"]].set_visible(False)


def _plain_log(ax: Axes) -> None:
    """A logarithmic x axis whose ticks read 0.5, 1, 2, 5 instead of powers."""
    ticker = importlib.import_module("matplotlib.ticker")
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(ticker.LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=12))
    ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
    ax.xaxis.set_minor_formatter(ticker.NullFormatter())


def _integer_x(ax: Axes) -> None:
    ax.xaxis.set_major_locator(importlib.import_module("matplotlib.ticker").MaxNLocator(integer=True))


def plot_accuracy(run: Run, path: str | Path) -> Path | None:
    """Accuracy against megabytes sent and against rounds, side by side. None if the run has no accuracy.

    Where clients were judged on their own test distributions, their mean and their worst tenth are drawn too.
    """
    kinds = (
        ("accuracy", "whole test set", COLOURS[0], "-"),
        ("own_accuracy", "clients' own, mean", COLOURS[1], "-"),
        ("own_accuracy_worst10", "worst tenth", COLOURS[1], DASHES[1]),
    )
    drawn = [kind for kind in kinds if np.isfinite(run.column(kind[0])).any()]
    if not drawn:
        return None
    figure = _figure(9, 3.4)
    left, right = figure.subplots(1, 2, sharey=True)
    sent = np.nanmax(run.megabytes_up, initial=0) > 0
    for name, label, colour, dash in drawn:
        accuracy, marker = 100 * run.column(name), "o" if len(run.accuracy) <= 40 else None
        style = {
            "color": colour,
            "linestyle": dash,
            "linewidth": 1.6,
            "marker": marker,
            "markersize": 3,
            "label": label,
        }
        if sent:
            left.plot(run.megabytes_up, accuracy, **style)
        right.plot(run.column("round"), accuracy, **style)
    if not sent:
        left.text(0.5, 0.5, "nothing was sent", transform=left.transAxes, ha="center", color=FAINT)
    if len(drawn) > 1:
        right.legend(frameon=False, fontsize=8, loc="best")
    _integer_x(right)
    _tidy(left, f"{run.label}: accuracy against bytes", "megabytes sent by the clients", "test accuracy, %")
    _tidy(right, "against rounds", "round", "")
    for ax in (left, right):
        ax.grid(True, color="#e8e8e8", linewidth=0.6)
    return _save(figure, path)


def _heat_map(run: Run, column: str, path: str | Path, title: str, label: str, discrete: bool) -> Path | None:
    """Clients down, rounds across; blank where a client was not in the round."""
    values, ids, rounds = run.per_client(column)
    if not ids:
        return None
    height = min(8.0, max(2.4, 1.2 + 0.16 * len(ids)))
    figure = _figure(min(12.0, max(6.0, 2.5 + 0.09 * len(rounds))), height)
    ax = figure.subplots()
    colors = importlib.import_module("matplotlib.colors")
    matplotlib = importlib.import_module("matplotlib")
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if discrete:
        edges = np.arange(np.floor(low) - 0.5, np.ceil(high) + 1.0)
        cmap = matplotlib.colormaps["viridis_r"].resampled(max(2, len(edges) - 1))
        norm: Any = colors.BoundaryNorm(edges, cmap.N) if len(edges) > 2 else colors.Normalize(low - 0.5, high + 0.5)
    else:
        cmap, norm = matplotlib.colormaps["YlGnBu"], colors.Normalize(0, high if high > 0 else 1)
    cmap = cmap.with_extremes(bad="#f2f2f2")
    extent = (rounds[0] - 0.5, rounds[-1] + 0.5, len(ids) - 0.5, -0.5)
    image = ax.imshow(
        np.ma.masked_invalid(values), aspect="auto", interpolation="none", cmap=cmap, norm=norm, extent=extent
    )
    step = max(1, len(ids) // 20)
    ax.set_yticks(range(0, len(ids), step), [str(k) for k in ids[::step]])
    _integer_x(ax)
    ax.set_xlim(rounds[0] - 0.5, rounds[-1] + 0.5)
    _tidy(ax, title, "round", "client")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ticks = np.arange(np.floor(low), np.ceil(high) + 1) if discrete else None
    bar = figure.colorbar(image, ax=ax, pad=0.01, aspect=max(12, 5 * height), ticks=ticks)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8, length=0)
    bar.outline.set_visible(False)
    if np.isnan(values).any():
        ax.text(
            1.0,
            1.01,
            "grey: not in the round",
            transform=ax.transAxes,
            ha="right",
            va="bottom",
            fontsize=8,
            color=FAINT,
        )
    return _save(figure, path)


def plot_bits(run: Run, path: str | Path) -> Path | None:
    """The bits of every client's upload over the rounds. None if nothing was quantised."""
    return _heat_map(run, "bits", path, f"{run.label}: bits per client", "bits", discrete=True)


def plot_teachers(run: Run, path: str | Path) -> Path | None:
    """The share of the teaching every client did, over the rounds. None if there was no teaching."""
    return _heat_map(run, "teacher_share", path, f"{run.label}: who taught", "share of the teaching", discrete=False)


def plot_factors(run: Run, path: str | Path) -> Path | None:
    """Energy, rank and bytes of each round, one below the other. None if no client's codec factored matrices."""
    if not np.isfinite(run.column("energy")).any():
        return None
    figure = _figure(7, 6.2)
    axes = figure.subplots(3, 1, sharex=True)
    rounds, ways = run.column("round"), (("up", COLOURS[0]), ("down", COLOURS[1]))
    style: dict[str, Any] = {"linewidth": 1.7, "marker": "o" if len(rounds) <= 40 else None, "markersize": 3.5}
    unit, name = _unit(max(np.nanmax(run.column(f"bytes_{way}"), initial=0) for way, _ in ways))
    axes[0].plot(rounds, 100 * run.column("energy"), color=INK, **style)
    for way, colour in ways:
        rank = run.column("rank" if way == "up" else "rank_down")
        if np.isfinite(rank).any():
            axes[1].plot(rounds, rank, color=colour, label=way, **style)
        axes[2].plot(rounds, run.column(f"bytes_{way}") / unit, color=colour, label=way, **style)
    _tidy(axes[0], f"{run.label}: energy to keep", "", "% of the squared norm")
    _tidy(axes[1], "rank, mean of the matrices sent as factors", "", "rank")
    _tidy(axes[2], "sent in the round, all clients together", "round", name)
    _integer_x(axes[2])
    for ax in axes:
        ax.grid(True, color="#e8e8e8", linewidth=0.6)
    for ax in axes[1:]:
        ax.set_ylim(bottom=0)
        if len(ax.lines) > 1:
            ax.legend(frameon=False, fontsize=8.5, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 0.98))
    return _save(figure, path)


def plot_factors_compared(comparison: Comparison, path: str | Path) -> Path | None:
    """Energy, rank and bytes up of each round, side by side, for the methods whose codecs factor matrices. None if none does.

    Lines are means over seeds, bands reach from the lowest seed to the highest; colours are those of `plot_comparison`.
    """
    styles = _styles(comparison)
    chosen = [m for m in comparison.methods if np.isfinite(m.curve("energy")).any()]
    if not chosen:
        return None
    figure = _figure(11, 3.8)
    axes = figure.subplots(1, 3)
    unit, name = _unit(max(float(m.curve("bytes_up").max(initial=0)) for m in chosen))
    panels = (
        ("energy", 100.0, "Energy to keep", "% of the squared norm"),
        ("rank", 1.0, "Rank, mean of the matrices sent as factors", "rank"),
        ("bytes_up", 1 / unit, "Sent up in the round, all clients", name),
    )
    for ax, (column, scale, title, label) in zip(axes, panels, strict=True):
        for m in chosen:
            _curve(ax, m.curve("round").mean(0), scale * m.curve(column), *styles[m.label])
        _tidy(ax, title, "round", label)
        _integer_x(ax)
        ax.grid(True, color="#e8e8e8", linewidth=0.6)
        if column != "energy":
            ax.set_ylim(bottom=0)
    line = importlib.import_module("matplotlib.lines").Line2D
    looks = [(m.label, *styles[m.label]) for m in chosen]
    handles = [line([], [], color=c, linestyle=d, linewidth=1.7, label=label) for label, c, d in looks]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(4, len(handles)), frameon=False, fontsize=8.5)
    return _save(figure, path)


def _unit(most: float) -> tuple[float, str]:
    """Bytes and name of the unit for an axis that ends at so many bytes."""
    return (MEGABYTE, "megabytes") if most >= 0.1 * MEGABYTE else (1e3, "kilobytes")


def write_plots(run: Run, folder: str | Path | None = None) -> list[Path]:
    """All the figures a run has the data for, into `folder` (its own ``plots/`` by default).

    Returns:
        the paths written, in order.
    """
    folder = Path(folder) if folder is not None else run.path / "plots"
    made = [
        plot_accuracy(run, folder / "accuracy.png"),
        plot_bits(run, folder / "bits.png"),
        plot_factors(run, folder / "factors.png"),
        plot_teachers(run, folder / "teachers.png"),
        plot_personal(Comparison.of([run]), folder / "personal.png"),
    ]
    return [p for p in made if p is not None]


def plot_personal(comparison: Comparison, path: str | Path) -> Path | None:
    """How well every client is served: accuracy on its own test distribution, clients sorted from the worst to the best.

    Of the last judged round. Several seeds: the mean of their sorted curves, and a band from the lowest to the highest. The
    worst tenth is shaded. None if no client was judged so.
    """
    chosen = [m for m in comparison.methods if any(r.client_accuracies.size for r in m.runs)]
    if not chosen:
        return None
    styles = _styles(comparison)
    figure = _figure(7.5, 4.2)
    ax = figure.subplots()
    ax.axvspan(0, 10, color="#f0f0f0", linewidth=0, zorder=0)
    for m in chosen:
        curves = [r.client_accuracies for r in m.runs if r.client_accuracies.size]
        most = max(map(len, curves))
        place = (np.arange(most) + 0.5) / most
        # Seeds may differ in how many clients could be judged: read all their curves at the same places.
        y = np.stack([np.interp(place, (np.arange(len(c)) + 0.5) / len(c), 100 * c) for c in curves])
        _curve(ax, 100 * place, y, *styles[m.label])
        ax.lines[-1].set_label(f"{m.label}  {y.mean():.1f}")
    ax.set_xlim(0, 100)
    _tidy(ax, "Each client's own accuracy, from the worst client to the best", "clients, %", "own test accuracy, %")
    ax.grid(True, color="#e8e8e8", linewidth=0.6)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8.5, title="mean over clients", title_fontsize=8.5)
    return _save(figure, path)


def plot_comparison(comparison: Comparison, path: str | Path, title: str = "") -> Path:
    """Accuracy of all methods against uplink megabytes (logarithmic) and against rounds.

    Lines are means over seeds, bands reach from the lowest seed to the highest. The methods are named once, at the end of
    their curves on the right, in their own colour, with the table's final accuracy; the title says of how many rounds that
    is the mean. The dashed line is the target accuracy.
    """
    methods = [m for m in comparison.methods if np.isfinite(m.curve(comparison.metric)).any()]
    figure = _figure(11, max(4.2, 1.6 + 0.3 * len(methods)))
    left, right = figure.subplots(1, 2, sharey=True)
    ends = []
    styles = _styles(comparison)
    for method in methods:
        colour, dash = styles[method.label]
        accuracy = 100 * method.curve(comparison.metric)
        rounds, sent = method.curve("round").mean(0), method.curve("megabytes_up").mean(0)
        _curve(right, rounds, accuracy, colour, dash)
        if (sent > 0).any():  # local and centralised training send nothing: they have no place on a byte axis
            _curve(left, sent, accuracy, colour, dash)
        ends.append((_final(method, comparison), method.label, colour, rounds[-1], _end(accuracy)))
    _plain_log(left)
    _integer_x(right)
    _limits(left, right, methods)
    what = Y_LABELS.get(comparison.metric, comparison.metric)
    _tidy(left, "Accuracy against what the clients sent", "megabytes sent, all clients together (log)", what)
    _tidy(right, "Accuracy against rounds", "round", "")
    for ax in (left, right):
        ax.grid(True, which="major", color="#e8e8e8", linewidth=0.6)
        if np.isfinite(comparison.target):
            ax.axhline(100 * comparison.target, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    if np.isfinite(comparison.target):
        style: dict[str, Any] = {
            "transform": left.get_yaxis_transform(),
            "fontsize": 7.5,
            "color": FAINT,
            "va": "bottom",
        }
        left.text(0.01, 100 * comparison.target, f" {comparison.baseline}, final", **style)
    _name_at_end(right, ends)
    seeds = sorted({len(m.runs) for m in methods})
    longest = max((m.curve(comparison.metric).shape[1] for m in methods), default=0)
    last = min(comparison.last, longest)
    numbers = f"numbers: mean of the last {last} rounds" if last > 1 else "numbers: the last round"
    note = (
        f"mean of {' or '.join(map(str, seeds))} seeds; band: lowest to highest seed"
        if seeds and seeds[-1] > 1
        else "one seed"
    )
    note = f"{note}; {numbers}"
    figure.suptitle(f"{title}  ({note})" if title else note, fontsize=10 if title else 9, color=INK, x=0.01, ha="left")
    return _save(figure, path)


def _styles(comparison: Comparison) -> dict[str, tuple[str, Any]]:
    """Colour and dash of each method that has the comparison's metric, and of the others after them."""
    judged = [m for m in comparison.methods if np.isfinite(m.curve(comparison.metric)).any()]
    order = judged + [m for m in comparison.methods if m not in judged]
    pairs = [(COLOURS[i % len(COLOURS)], DASHES[(i // len(COLOURS)) % len(DASHES)]) for i in range(len(order))]
    return {m.label: pair for m, pair in zip(order, pairs, strict=True)}


def _final(method: Method, comparison: Comparison) -> float:
    return 100 * float(np.mean([r.final_accuracy(comparison.last, comparison.metric) for r in method.runs]))


def _end(accuracy: np.ndarray) -> float:
    """The last value a mean curve shows; accuracy is ``[seeds, rounds]``, NaN in rounds that were not judged."""
    shown = accuracy.mean(0)
    shown = shown[np.isfinite(shown)]
    return float(shown[-1] if shown.size else np.nanmean(accuracy))  # a seed that was never judged hides the mean


def _curve(ax: Axes, x: np.ndarray, y: np.ndarray, colour: str, dash: Any) -> None:
    """The mean over the first axis of y ``[seeds, rounds]``, and the range of the seeds."""
    if len(y) > 1:
        ax.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.13, linewidth=0, zorder=2)
    marker = "o" if y.shape[1] <= FEW else None  # a line of one point is invisible
    style = {"linestyle": dash, "linewidth": 1.7, "marker": marker, "markersize": 4, "solid_capstyle": "round"}
    ax.plot(x, y.mean(0), color=colour, zorder=3, clip_on=marker is None, **style)  # the last dot lies on the edge


def _limits(left: Axes, right: Axes, methods: Sequence[Method]) -> None:
    """Room around one point or none: matplotlib cannot make a log axis of nothing, nor a range of one round."""
    sent = np.concatenate([[0.0], *(m.curve("megabytes_up").mean(0) for m in methods)])
    sent = sent[sent > 0]
    if not sent.size:
        left.set_xlim(0.1, 10)
        left.text(0.5, 0.5, "nothing was sent", transform=left.transAxes, ha="center", color=FAINT)
    elif sent.max() < 4 * sent.min():  # the logarithmic ticks are a factor of 2 to 2.5 apart
        left.set_xlim(sent.min() / 2, 2 * sent.max())
    rounds = np.concatenate([[1.0], *(m.curve("round").mean(0) for m in methods)])
    if rounds.max() <= 3:
        right.set_xlim(0.5, rounds.max())
        right.set_xticks(range(1, int(rounds.max()) + 1))


def _name_at_end(ax: Axes, ends: list[tuple[float, str, str, float, float]]) -> None:
    """Write each method's name and final accuracy to the right of its curve, pushed apart until none overlap.

    In the order of the curves' ends, whatever the final accuracies: the lines that lead to the names do not cross.
    """
    if not ends:
        return
    low, high = ax.get_ylim()
    gap = (high - low) * 0.052 * max(1.0, len(ends) / 16)
    order = sorted(ends, key=lambda e: -e[4])
    places = _apart([e[4] for e in order], gap, low + gap / 2, high - gap / 2)
    edge = max(e[3] for e in ends)
    span = edge - ax.get_xlim()[0]
    for (final, label, colour, x, y), place in zip(order, places, strict=True):
        ax.plot(
            [x, edge + 0.015 * span, edge + 0.05 * span], [y, y, place], color=colour, lw=0.7, clip_on=False, alpha=0.8
        )
        name = f"{label}  {final:.1f}"
        ax.text(edge + 0.06 * span, place, name, color=colour, fontsize=8.5, va="center", clip_on=False)
    ax.set_xlim(right=edge)


def _apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The places nearest to `wanted` (least squares) in the given order, each at least `gap` below the one before.

    Pool-adjacent-violators: labels that would overlap form a block that sits around the mean of their wishes.
    The result is moved as a whole into low..high where it fits.
    """
    blocks: list[tuple[float, int]] = []  # (mean of `want + index * gap`, members)
    for i, want in enumerate(wanted):
        mean, size = want + i * gap, 1
        while blocks and mean > blocks[-1][0]:
            above, count = blocks.pop()
            mean, size = (mean * size + above * count) / (size + count), size + count
        blocks.append((mean, size))
    places = [mean for mean, size in blocks for _ in range(size)]
    places = [place - i * gap for i, place in enumerate(places)]
    shift = min(0.0, high - places[0]) if places else 0.0
    if places and places[-1] + shift < low:
        shift = low - places[-1]
    return [place + shift for place in places]
