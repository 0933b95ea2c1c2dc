"""Values that depend on the round: a knob is a number or a `Schedule`."""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable


@runtime_checkable
class Schedule(Protocol):
    """A value as a function of the round."""

    def __call__(self, t: int, T: int | None = None) -> float:
        """The value in round `t` (from 0) of `T` rounds; `T` is None where the end is not known."""
        ...


def _finite(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"Expected `{name}` to be a finite number, but got {value!r}.")
    return float(value)


def _progress(t: int, T: int | None, kind: str) -> float:
    """t / (T - 1), held at 1 after the end, so that the last round has the end's value."""
    _check_round(t)
    if T is None:
        raise ValueError(f"Expected `T`, the number of rounds, for a {kind} schedule, but got None.")
    if T < 1:
        raise ValueError(f"Expected `T` to be at least 1, but got {T}.")
    return 1.0 if T == 1 else min(t / (T - 1), 1.0)


def _check_round(t: int) -> None:
    if t < 0:
        raise ValueError(f"Expected `t` to be at least 0, but got {t}.")


class Constant:
    """The same value in every round."""

    def __init__(self, value: float) -> None:
        self.value = _finite("value", value)

    def __call__(self, t: int, T: int | None = None) -> float:
        _check_round(t)
        return self.value

    def __repr__(self) -> str:
        return f"Constant({self.value})"


class Exponential:
    """``start * factor ** t``: the papers' learning rate 0.005 * 0.99^t is ``Exponential(0.005, 0.99)``.

    Args:
        start: the value in round 0.
        factor: positive; what each round multiplies it by.
        minimum: the value never falls below this (FedGen's ``max(1e-4, 10 * 0.98^t)``).
    """

    def __init__(self, start: float, factor: float, minimum: float | None = None) -> None:
        self.start = _finite("start", start)
        self.factor = _finite("factor", factor)
        if self.factor <= 0:
            raise ValueError(f"Expected `factor` to be positive, but got {factor}.")
        self.minimum = None if minimum is None else _finite("minimum", minimum)

    def __call__(self, t: int, T: int | None = None) -> float:
        _check_round(t)
        try:
            value = self.start * self.factor**t
        except OverflowError:
            value = math.copysign(math.inf, self.start)
        return value if self.minimum is None else max(self.minimum, value)

    def __repr__(self) -> str:
        tail = "" if self.minimum is None else f", minimum={self.minimum}"
        return f"Exponential({self.start}, {self.factor}{tail})"


class Geometric:
    """``start * (end / start) ** (t / (T - 1))``: from `start` in the first round to `end` in the last, by the same factor every
    round, and `end` after it. A range of several magnitudes, e.g. QuPeD's 1e-4 to 1e-6 for the centres.

    Args:
        start: positive.
        end: positive.
    """

    def __init__(self, start: float, end: float) -> None:
        self.start, self.end = _finite("start", start), _finite("end", end)
        if not (self.start > 0 and self.end > 0):
            raise ValueError(f"Expected `start` and `end` to be positive, but got {start} and {end}.")

    def __call__(self, t: int, T: int | None = None) -> float:
        p = _progress(t, T, "geometric")
        return self.start ** (1 - p) * self.end**p  # exact at both ends

    def __repr__(self) -> str:
        return f"Geometric({self.start}, {self.end})"


class Linear:
    """``start + (end - start) * t / (T - 1)``: from `start` in the first round to `end` in the last, and `end` after it."""

    def __init__(self, start: float, end: float) -> None:
        self.start, self.end = _finite("start", start), _finite("end", end)

    def __call__(self, t: int, T: int | None = None) -> float:
        p = _progress(t, T, "linear")
        return (1 - p) * self.start + p * self.end

    def __repr__(self) -> str:
        return f"Linear({self.start}, {self.end})"


class Cosine:
    """Half a cosine wave from `start` in the first round to `end` in the last, and `end` after it."""

    def __init__(self, start: float, end: float = 0.0) -> None:
        self.start, self.end = _finite("start", start), _finite("end", end)

    def __call__(self, t: int, T: int | None = None) -> float:
        w = 0.5 * (1.0 + math.cos(math.pi * _progress(t, T, "cosine")))
        return w * self.start + (1 - w) * self.end

    def __repr__(self) -> str:
        return f"Cosine({self.start}, {self.end})"


def as_schedule(value: float | Schedule) -> Schedule:
    """A number becomes `Constant`; a schedule is returned as it is.

    Raises:
        ValueError: `value` is neither a finite number nor callable.

    Example:
        >>> as_schedule(0.5)(t=7), as_schedule(Linear(0.0, 1.0))(t=1, T=3)
        (0.5, 0.5)
    """
    if isinstance(value, (int, float)):
        return Constant(value)
    if callable(value):
        return value
    raise ValueError(f"Expected a finite number or a schedule, but got {value!r}.")
