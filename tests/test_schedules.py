"""Schedules: values by hand, ends, and refusals."""

from __future__ import annotations

import math

import pytest

from dynfed_lightning.schedules import Constant, Cosine, Exponential, Linear, Schedule, as_schedule


def test_constant_is_the_same_in_every_round():
    assert [Constant(0.25)(t, T) for t, T in ((0, 1), (7, None), (99, 100))] == [0.25] * 3


def test_exponential_is_the_papers_learning_rate():
    lr = Exponential(0.005, 0.99)
    assert lr(0) == 0.005
    assert lr(1) == 0.005 * 0.99
    assert lr(100) == pytest.approx(0.0018301617, rel=1e-7)


def test_exponential_holds_at_its_minimum_and_survives_overflow():
    assert Exponential(10.0, 0.98, minimum=1e-4)(2000) == 1e-4
    assert Exponential(10.0, 0.98, minimum=1e-4)(1) == pytest.approx(9.8)
    assert Exponential(1.0, 1e300)(10) == math.inf


def test_linear_runs_from_start_to_end_and_stays():
    energy = Linear(0.95, 0.98)
    assert [energy(t, 4) for t in (0, 3, 10)] == [0.95, 0.98, 0.98]
    assert energy(1, 4) == pytest.approx(0.96, abs=1e-12)
    assert Linear(1.0, 2.0)(0, 1) == 2.0  # the only round is the last one


def test_cosine_is_half_a_wave():
    wave = Cosine(2.0, 0.0)
    assert [wave(t, 5) for t in (0, 2, 4, 9)] == pytest.approx([2.0, 1.0, 0.0, 0.0], abs=1e-12)
    assert wave(1, 5) == pytest.approx(1 + math.cos(math.pi / 4))


def test_as_schedule_wraps_numbers_and_keeps_schedules():
    wave = Cosine(1.0)
    assert as_schedule(wave) is wave
    assert isinstance(as_schedule(3), Constant)
    assert isinstance(as_schedule(3), Schedule)
    assert as_schedule(lambda t, T=None: t / 2)(5) == 2.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, True, "0.1", None])
def test_values_that_are_no_numbers_are_refused(bad):
    with pytest.raises(ValueError, match="Expected"):
        as_schedule(bad)
    with pytest.raises(ValueError, match="finite number"):
        Linear(0.0, bad)


@pytest.mark.parametrize("make", [lambda: Exponential(1.0, 0.0), lambda: Exponential(1.0, -0.5)])
def test_a_factor_must_be_positive(make):
    with pytest.raises(ValueError, match="`factor` to be positive"):
        make()


@pytest.mark.parametrize("schedule", [Linear(0, 1), Cosine(1)])
def test_the_number_of_rounds_is_needed_where_it_matters(schedule):
    with pytest.raises(ValueError, match="`T`, the number of rounds"):
        schedule(0, None)
    with pytest.raises(ValueError, match="`T` to be at least 1"):
        schedule(0, 0)


@pytest.mark.parametrize("schedule", [Constant(1), Exponential(1, 0.5), Linear(0, 1), Cosine(1)])
def test_rounds_count_from_zero(schedule):
    with pytest.raises(ValueError, match="`t` to be at least 0, but got -1"):
        schedule(-1, 10)
