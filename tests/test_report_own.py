"""Own accuracies in tables and figures, from run folders written by hand."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report import drawn, size_of, write_run

from dynfed_lightning import plots
from dynfed_lightning.report import Comparison, Run, summarise


def with_own(run: Run, mean: list[float], clients: list[float]) -> Run:
    """`run` with columns of own accuracies: the worst tenth is 0.1 below the mean, the spread 0.05."""
    with open(run.path / "rounds.csv", newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    header += ["own_accuracy", "own_accuracy_worst10", "own_accuracy_std"]
    with open(run.path / "rounds.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *([*r, m, m - 0.1, 0.05] for r, m in zip(rows, mean, strict=True))])
    text = "".join(f"{k},{a}\n" for k, a in enumerate(clients))
    (run.path / "own_accuracy.csv").write_text("client,own_accuracy\n" + text)
    return Run.read(run.path)


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    return [
        with_own(write_run(tmp_path / "a0", [0.5, 0.6], 1000), [0.5, 0.6], [0.7, 0.5, 0.6]),
        with_own(write_run(tmp_path / "a1", [0.5, 0.62], 1000), [0.5, 0.64], [0.7, 0.6, 0.62, 0.64]),
        with_own(write_run(tmp_path / "q", [None, None], 100, name="Own"), [0.7, 0.9], [0.95, 0.85, 0.9]),
    ]


def test_the_table_shows_both(runs: list[Run]) -> None:
    comparison = Comparison.of(runs, last=1)
    header, (fedavg, own) = comparison.header(), comparison.cells()
    assert header[2:6] == ["accuracy % (last 1)", "best %", "own accuracy %", "worst 10 % of clients"]
    assert fedavg[2:6] == ["61.0 ± 1.4", "61.0", "62.0 ± 2.8", "52.0 ± 2.8"]
    assert own[2:7] == ["-", "-", "90.0", "80.0", "-"]  # it was not judged on the whole test set
    assert comparison.to_json()["methods"][1]["others"]["own_accuracy"] == [0.9]


def test_the_metric_that_decides_can_be_chosen(runs: list[Run]) -> None:
    comparison = Comparison.of(runs, last=1, metric="own_accuracy")
    assert comparison.target == pytest.approx(0.62)
    header, (fedavg, own) = comparison.header(), comparison.cells()
    assert header[2:7] == [
        "own accuracy % (last 1)",
        "best %",
        "accuracy %",
        "worst 10 % of clients",
        "rounds to 62.0 %",
    ]
    assert fedavg[2:7] == ["62.0 ± 2.8", "62.0", "61.0 ± 1.4", "52.0 ± 2.8", "2 (1 of 2)"]
    assert own[2:7] == ["90.0", "90.0", "-", "80.0", "1"]
    with pytest.raises(
        ValueError, match=r"Expected `metric` to be a column .*\['accuracy', 'own_accuracy', .*but got 'x'"
    ):
        Comparison.of(runs, metric="x")


def test_a_target_that_nobody_can_have(runs: list[Run]) -> None:
    """The baseline was not judged on the whole test set, the other was."""
    comparison = Comparison.of(runs, baseline="Own", last=1)
    assert "rounds to target" in comparison.header()
    assert math.isnan(comparison.target)


def test_summary_text(runs: list[Run]) -> None:
    lines = dict(line.split(None, 1) for line in summarise(runs[2]).splitlines())
    assert lines["accuracy"] == "-"
    assert lines["own"] == (
        "90.00 % on clients' own test distributions, 80.00 % for the worst tenth, 5.0 standard deviation"
    )
    assert "own" not in dict(line.split(None, 1) for line in summarise(_plain(runs[2])).splitlines())


def _plain(run: Run) -> Run:
    kept = {k: v for k, v in run.rounds.items() if not k.startswith("own")}
    return Run(run.path, kept, run.clients, run.summary)


def axes_of(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    figures: list[Any] = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure) or save(figure, path))
    return figures


def test_clients_from_the_worst_to_the_best(runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = axes_of(monkeypatch)
    path = plots.plot_personal(Comparison.of(runs, last=1), tmp_path / "personal.png")
    assert path is not None and size_of(path)[0] > 500
    fedavg, own = figures[0].axes[0].lines
    np.testing.assert_allclose(own.get_xdata(), [100 / 6, 50, 500 / 6])
    np.testing.assert_allclose(own.get_ydata(), [85, 90, 95])
    assert len(fedavg.get_xdata()) == 4 and (np.diff(fedavg.get_ydata()) > 0).all()
    # At 12.5 % the seed of three clients has its worst, that of four too.
    assert fedavg.get_ydata()[0] == pytest.approx((50 + 60) / 2)
    assert plots.plot_personal(Comparison.of([write_run(tmp_path / "n", [0.5], 1)]), tmp_path / "no.png") is None


def test_a_run_draws_its_own(runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    figures = axes_of(monkeypatch)
    names = [p.name for p in plots.write_plots(runs[0])]
    assert names == ["accuracy.png", "personal.png"]
    assert [list(line.get_ydata()) for line in figures[0].axes[1].lines] == [[50, 60], [50, 60], [40, 50]]
    assert [p.name for p in plots.write_plots(runs[2])] == ["accuracy.png", "personal.png"]
    assert len(figures[2].axes[1].lines) == 2


def test_the_figure_shows_the_metric(runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = Comparison.of(runs, last=1, metric="own_accuracy")
    figure = drawn(comparison, tmp_path / "own.png", monkeypatch)
    assert figure.axes[0].get_ylabel() == "accuracy on clients' own test distributions, %"
    assert any(list(np.round(line.get_ydata(), 6)) == [70, 90] for line in figure.axes[1].lines)
    plain = drawn(Comparison.of(runs, baseline="Own", last=1), tmp_path / "whole.png", monkeypatch)
    assert plain.axes[0].get_ylabel() == "test accuracy, %"
