"""Tables and figures, from run folders written by hand so that every number can be checked."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynfed_lightning import plots
from dynfed_lightning.report import Comparison, Run, read_csv, summarise


def write_run(
    path: Path,
    accuracy: list[float | None],
    up: int,
    *,
    name: str = "FedAvg",
    bits: list[int | None] | None = None,
    shares: bool = False,
    failures: str = "",
    seconds: float = 0.5,
) -> Run:
    """A run of 3 clients of which two take part in each round; every round sends `up` bytes and receives twice that."""
    path.mkdir(parents=True)
    rounds, clients = [], []
    for t, a in enumerate(accuracy, start=1):
        b = bits[t - 1] if bits else None
        failed = 1 if failures and t == 1 else 0
        cells = [t, a, up, 2 * up, t * up, 2 * t * up, b, b, b, failed, failures if failed else "", seconds]
        rounds.append(["" if c is None else c for c in cells])
        for k in (t % 3, (t + 1) % 3):
            clients.append([t, k, "ok", "" if b is None else b + k, up // 2, 0.25 * (k + 1) if shares else ""])
    header = ["round", "accuracy", "bytes_up", "bytes_down", "total_bytes_up", "total_bytes_down"]
    header += ["bits_mean", "bits_min", "bits_max", "failed", "failures", "seconds"]
    for file, columns, rows in (
        ("rounds.csv", header, rounds),
        ("clients.csv", ["round", "client", "status", "bits", "bytes_up", "teacher_share"], clients),
    ):
        with open(path / file, "w", newline="", encoding="utf-8") as f:
            csv.writer(f).writerows([columns, *rows])
    summary = {"method": name, "name": name, "seed": 0, "num_clients": 4, "dataset": "digits", "seconds": 7.0}
    (path / "summary.json").write_text(json.dumps(summary))
    return Run.read(path)


def test_read_csv_tells_numbers_from_words(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text("a,b,c\n1,ok,\n2.5,,\n")
    columns = read_csv(file)
    assert columns["a"] == [1.0, 2.5]
    assert columns["b"] == ["ok", ""]
    assert all(math.isnan(v) for v in columns["c"])


def test_numbers_of_a_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", [0.5, None, 0.7, 0.9], 1_000_000)
    assert run.final_accuracy(last=2) == pytest.approx(0.8)
    assert run.final_accuracy(last=99) == pytest.approx(0.7)  # a round without validation is no zero
    assert run.best_accuracy() == 0.9
    assert run.rounds_to(0.7) == 3
    assert math.isnan(run.rounds_to(0.95))
    assert run.megabytes_up.tolist() == [1, 2, 3, 4]
    assert run.megabytes_down.tolist() == [2, 4, 6, 8]
    assert run.seconds == 7.0


def test_clients_as_a_matrix(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", [0.5, 0.6], 10, bits=[4, 2])
    values, ids, rounds = run.per_client("bits")
    assert (ids, rounds) == ([0, 1, 2, 3], [1, 2])  # client 3 never took part, and has its row all the same
    nan = math.nan
    np.testing.assert_array_equal(values, [[nan, 2], [5, nan], [6, 4], [nan, nan]])
    assert run.per_client("teacher_share")[1] == []
    assert run.per_client("status")[1] == []
    assert run.per_client("nothing")[1] == []


def test_summary_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", [0.5, 0.75], 2_000_000, bits=[2, 6], failures="nan_loss:1;payload:2")
    lines = dict(line.split(None, 1) for line in summarise(tmp_path / "a").splitlines())
    assert summarise(run) == summarise(tmp_path / "a")
    assert lines["rounds"] == "2"
    assert lines["accuracy"] == "75.00 % at the end, 62.50 % (mean of the last 2), 75.00 % best"
    assert lines["bits"] == "4.00 on average, 2 to 6"
    assert "sent up" in summarise(run) and "4 MB" in summarise(run) and "8 MB" in summarise(run)
    assert "1 client rounds: 1 nan_loss, 2 payload" in summarise(run)


def test_summary_of_an_interrupted_run(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [0.5], 10)
    (tmp_path / "a" / "summary.json").unlink()
    (tmp_path / "a" / "clients.csv").unlink()
    text = summarise(tmp_path / "a")
    assert text.splitlines()[0].split() == ["run", "a"]
    assert "seconds" in text and "0.5" in text


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Expected `run_dir` to be a run's folder with a rounds.csv, but got"):
        summarise(tmp_path)


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    """FedAvg: 0.8 and 0.84 at the end for 12 MB; DynFed: at 0.82 in round 2 with one seed of two, for 2 MB."""
    runs = [
        write_run(tmp_path / "a0", [0.5, 0.6, 0.80], 4_000_000),
        write_run(tmp_path / "d0", [0.7, 0.82, 0.90], 500_000, name="DynFed", bits=[2, 4, 6]),
        write_run(tmp_path / "a1", [0.5, 0.7, 0.84], 4_000_000),
        write_run(tmp_path / "d1", [0.6, 0.70, 0.80], 700_000, name="DynFed", bits=[2, 4, 6]),
    ]
    return Comparison.of(runs, last=1)


def test_comparison_numbers(comparison: Comparison) -> None:
    assert comparison.baseline == "FedAvg"
    assert comparison.target == pytest.approx(0.82)
    fedavg, dynfed = comparison.rows()
    assert (fedavg.label, dynfed.label) == ("FedAvg", "DynFed")
    assert fedavg.final.tolist() == [0.80, 0.84]
    assert fedavg.megabytes_up == 12.0
    assert fedavg.uplink_ratio == 1.0
    assert dynfed.megabytes_up == pytest.approx(1.8)
    assert dynfed.uplink_ratio == pytest.approx(0.15)
    assert dynfed.rounds_to_target[0] == 2 and math.isnan(dynfed.rounds_to_target[1])
    assert dynfed.best.tolist() == [0.90, 0.80]


def test_comparison_table(comparison: Comparison) -> None:
    lines = comparison.markdown().splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert cells[0] == [
        "method", "seeds", "accuracy % (last 1)", "best %", "rounds to 82.0 %", "MB up", "MB down", "uplink / FedAvg", "seconds",
    ]  # fmt: skip
    assert cells[2] == ["FedAvg", "2", "82.0 ± 2.8", "82.0", "3 (1 of 2)", "12", "24", "1", "7"]
    assert cells[3] == ["DynFed", "2", "85.0 ± 7.1", "85.0", "2 (1 of 2)", "1.8", "3.6", "1/6.7", "7"]
    assert len({len(line) for line in lines}) == 1  # aligned
    stored = json.loads(json.dumps(comparison.to_json()))
    assert stored["methods"][1]["final"] == [0.90, 0.80]


def test_comparison_choices(comparison: Comparison, tmp_path: Path) -> None:
    runs = [r for m in comparison.methods for r in m.runs]
    other = Comparison.of(runs, baseline="DynFed", target=0.6, last=1)
    assert [r.uplink_ratio for r in other.rows()] == [pytest.approx(1 / 0.15), 1.0]
    assert other.rows()[0].rounds_to_target.tolist() == [2, 2]
    with pytest.raises(ValueError, match=r"Expected `baseline` to be one of \['FedAvg', 'DynFed'\], but got 'Fed'"):
        Comparison.of(runs, baseline="Fed")
    with pytest.raises(ValueError, match="Expected `runs` to hold at least one"):
        Comparison.of([])


def test_seeds_of_different_length_are_cut(tmp_path: Path) -> None:
    long = write_run(tmp_path / "a", [0.1, 0.2, 0.3], 10)
    short = write_run(tmp_path / "b", [0.3, 0.4], 10)
    method = Comparison.of([long, short]).methods[0]
    np.testing.assert_array_equal(method.curve("accuracy"), [[0.1, 0.2], [0.3, 0.4]])


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of a PNG, from its header."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_plots_of_a_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", [0.5, 0.6, 0.7], 1000, bits=[2, 4, 6], shares=True)
    paths = plots.write_plots(run)
    assert [p.name for p in paths] == ["accuracy.png", "bits.png", "teachers.png"]
    assert all(p.parent == tmp_path / "a" / "plots" and size_of(p)[0] > 600 for p in paths)


def test_plots_only_what_there_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", [0.5, 0.6], 0)
    assert [p.name for p in plots.write_plots(run, tmp_path / "here")] == ["accuracy.png"]
    empty = write_run(tmp_path / "b", [None], 0)
    assert plots.write_plots(empty) == []


def with_factors(run: Run, energy: list[float], rank: list[float], down: list[float] | None = None) -> Run:
    """A run whose codec factored matrices, in the columns that the recorder writes."""
    run.rounds.update(energy=energy, rank=rank, rank_down=down or [math.nan] * len(rank))
    return run


def test_energy_rank_and_bytes_over_the_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, file: figures.append(figure) or save(figure, file))
    run = with_factors(
        write_run(tmp_path / "a", [0.5, 0.6, 0.7], 10**6), [0.95, 0.96, 0.98], [3.0, 4.0, 6.5], [math.nan, 2.0, 3.0]
    )
    assert [p.name for p in plots.write_plots(run)] == ["accuracy.png", "factors.png"]
    energy, rank, sent = figures[-1].axes
    assert energy.lines[0].get_ydata().tolist() == pytest.approx([95, 96, 98])
    np.testing.assert_array_equal(rank.lines[0].get_ydata(), [3.0, 4.0, 6.5])
    np.testing.assert_array_equal(rank.lines[1].get_ydata(), [math.nan, 2.0, 3.0])
    assert [line.get_ydata().tolist() for line in sent.lines] == [[1, 1, 1], [2, 2, 2]]
    assert sent.get_ylabel() == "megabytes" and rank.get_ylim()[0] == 0
    small = with_factors(write_run(tmp_path / "b", [0.5], 700), [0.95], [3.0])
    plots.plot_factors(small, tmp_path / "b.png")
    assert figures[-1].axes[2].get_ylabel() == "kilobytes" and len(figures[-1].axes[1].lines) == 1
    whole = with_factors(
        write_run(tmp_path / "c", [0.5], 700), [1.0], [math.nan]
    )  # an energy, and nothing that reached it
    assert plots.plot_factors(whole, tmp_path / "c.png") is not None
    assert plots.plot_factors(write_run(tmp_path / "d", [0.5], 700), tmp_path / "d.png") is None


def test_energy_rank_and_bytes_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [write_run(tmp_path / "f", [0.5, 0.6], 10**6)]
    for seed, rank in enumerate(([2.0, 3.0], [4.0, 5.0])):
        runs.append(with_factors(write_run(tmp_path / f"k{seed}", [0.5, 0.7], 10**5, name="FedKD"), [0.95, 0.98], rank))
    comparison = Comparison.of(runs)
    accuracy = drawn(comparison, tmp_path / "c.png", monkeypatch)
    colour = next(t.get_color() for t in accuracy.axes[1].texts if t.get_text().startswith("FedKD"))
    figures: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, file: figures.append(figure) or file)
    assert plots.plot_factors_compared(comparison, tmp_path / "f.png") == tmp_path / "f.png"
    (figure,) = figures
    lines = [ax.lines for ax in figure.axes]
    assert [len(own) for own in lines] == [1, 1, 1] and {own[0].get_color() for own in lines} == {colour}
    assert [own[0].get_ydata().tolist() for own in lines] == [
        pytest.approx([95, 98]),
        [3, 4],
        pytest.approx([0.1, 0.1]),
    ]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["FedKD"]
    assert plots.plot_factors_compared(Comparison.of(runs[:1]), tmp_path / "f.png") is None


def test_summary_of_factors(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", [0.5, 0.6], 10)
    assert "rank" not in summarise(run)
    assert "rank         3.5 on average, energy 0.95 to 0.98" in summarise(with_factors(run, [0.95, 0.98], [3.0, 4.0]))
    assert (
        "rank         3.0 on average, energy 0.95"
        in summarise(with_factors(run, [0.95, 0.95], [3.0, 3.0])).splitlines()
    )
    assert "rank         whole, energy 1" in summarise(with_factors(run, [1.0, 1.0], [math.nan, math.nan]))


def test_bits_that_are_all_the_same(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", [0.5], 100, bits=[4])
    run.clients["bits"] = [4.0, 4.0]
    assert plots.plot_bits(run, tmp_path / "b.png") is not None


def test_figure_of_a_comparison(comparison: Comparison, tmp_path: Path) -> None:
    path = plots.plot_comparison(comparison, tmp_path / "deep" / "c.png", title="digits")
    assert size_of(path) == (1650, 630)


def test_figure_where_nothing_was_sent(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", [0.5, 0.6], 0, name="Local")]
    assert plots.plot_comparison(Comparison.of(runs), tmp_path / "c.png").is_file()


def drawn(comparison: Comparison, path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The figure of a comparison, as an object."""
    figures: list[Any] = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, file: figures.append(figure) or save(figure, file))
    plots.plot_comparison(comparison, path)
    return figures[0]


def test_names_stand_in_the_order_of_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Up` ends above `Down` although its mean of the last three rounds is below."""
    runs = [
        write_run(tmp_path / "u", [0.1, 0.2, 0.9], 10, name="Up"),
        write_run(tmp_path / "d", [0.8, 0.8, 0.5], 10, name="Down"),
    ]
    figure = drawn(Comparison.of(runs, last=3), tmp_path / "c.png", monkeypatch)
    names = {t.get_text(): t.get_position()[1] for t in figure.axes[1].texts}
    assert set(names) == {"Up  40.0", "Down  70.0"}
    assert names["Up  40.0"] > names["Down  70.0"]
    assert "numbers: mean of the last 3 rounds" in figure.get_suptitle()
    one = drawn(Comparison.of(runs, last=1), tmp_path / "c.png", monkeypatch)
    assert {t.get_text() for t in one.axes[1].texts} == {"Up  90.0", "Down  50.0"}
    assert "numbers: the last round" in one.get_suptitle()


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_a_comparison_of_few_rounds_can_be_read(rounds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [write_run(tmp_path / n, [0.5, 0.6, 0.7][:rounds], 10**6 * i, name=n) for i, n in enumerate("abc")]
    figure = drawn(Comparison.of(runs), tmp_path / "c.png", monkeypatch)
    for ax in figure.axes:
        curves = [line for line in ax.lines if line.get_marker() == "o"]
        assert len(curves) == (2 if ax is figure.axes[0] else 3)  # `a` sent nothing
    low, high = figure.axes[1].get_xlim()
    assert low < 1 <= rounds <= high < rounds + 1
    assert list(figure.axes[1].get_xticks()) == list(range(1, rounds + 1))
    low, high = figure.axes[0].get_xlim()
    assert 0 < low < 1 and high > 2 * rounds and high >= 4 * low


def test_figure_where_one_seed_was_never_judged(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", [0.5, 0.6], 10), write_run(tmp_path / "b", [None, None], 10)]
    assert plots.plot_comparison(Comparison.of(runs, target=0.5), tmp_path / "c.png").is_file()


def test_labels_are_pushed_apart() -> None:
    assert plots._apart([9.0, 5.0, 1.0], 1.0, 0.0, 10.0) == [9.0, 5.0, 1.0]
    assert plots._apart([5.0, 5.0], 1.0, 0.0, 10.0) == [5.5, 4.5]  # both give way
    assert plots._apart([3.0, 5.0, 4.0], 1.0, 0.0, 10.0) == [5.0, 4.0, 3.0]  # the order is given, not the height
    assert plots._apart([10.0, 10.0], 1.0, 0.0, 10.0) == [10.0, 9.0]
    assert plots._apart([0.0, 0.0], 1.0, 0.0, 10.0) == [1.0, 0.0]
    assert plots._apart([], 1.0, 0.0, 10.0) == []


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "a", [0.5], 10)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install dynfed-lightning\[report\]"):
        plots.write_plots(run)
