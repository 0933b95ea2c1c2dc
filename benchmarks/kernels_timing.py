"""What the kernel benchmark measures and how: a case, its times beside those of a copy, and the row that comes of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

COLUMNS = [
    "section",
    "operation",
    "implementation",
    "version",
    "backend",
    "device",
    "dtype",
    "bits",
    "bucket",
    "n",
    "clients",
    "threads",
    "runs",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "copy_ms",
    "copy_n",
    "gb_per_s",
    "gcodes_per_s",
    "bytes_per_value",
    "moved_gb_per_s",
    "of_memcpy",
    "of_copy",
    "checked",
    "note",
    "cpu",
    "gpu",
    "torch",
    "numpy",
]


OURS = "dynfed-lightning"  # the version column of our own rows


@dataclass
class Case:
    """One operation by one implementation.

    Attributes:
        moved: bytes that have to travel between memory and processor for one run: every input read once, every output
            written once.
        before: makes the outputs something they must not be (or the accumulator something known) before the first run.
        check: raises AssertionError if the result of the first run is wrong; says in a word or two what it compared.
        environment: variables that hold while it runs: ``DYNFED_BACKEND``, ``DYNFED_CPU_ISA``.
    """

    operation: str
    implementation: str
    bits: int
    n: int
    moved: float
    run: Callable[[], Any]
    clients: int = 1
    dtype: str = "float32"
    bucket: int | None = None
    version: str = ""
    backend: str = ""
    before: Callable[[], Any] | None = None
    check: Callable[[Any], str] | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Timing:
    """Times of a case and of the copies beside it, in milliseconds; or why there are none."""

    times: list[float]
    copies: list[float]
    checked: str = ""
    note: str = ""


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Environment variables, for as long as the block runs."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Copy:
    """A copy into an existing buffer, timed beside every single run of a case, so that a busy neighbour slows both.

    On a GPU it is of at least 2**26 values: it takes longer than the launch of what follows, which so leaves no gap, and
    it replaces what is in the cache.
    """

    def __init__(self, n: int, device: torch.device, least: int = 1 << 26) -> None:
        self.device, self.n = device, max(n, least) if device.type == "cuda" else n
        self.source = torch.randn(self.n, device=device)
        self.target = torch.empty_like(self.source)

    def run(self) -> Tensor:
        return self.target.copy_(self.source)

    def beside(self, f: Callable[[], Any]) -> tuple[float, float]:
        """Milliseconds of a copy, and of `f` right after it."""
        if self.device.type == "cuda":
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
            marks[0].record()
            self.run()
            marks[1].record()
            f()
            marks[2].record()
            marks[2].synchronize()
            return marks[0].elapsed_time(marks[1]), marks[1].elapsed_time(marks[2])
        start = time.perf_counter()
        self.run()
        middle = time.perf_counter()
        f()
        return (middle - start) * 1e3, (time.perf_counter() - middle) * 1e3

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure(cases: list[Case], copy: Copy, seconds: float, most: int = 50) -> list[Timing]:
    """Times of all cases, taken in turn: as many rounds as fit in `seconds` per case, 5 to `most`, or 3 of what is slow.

    The first run of a case warms up and is checked. One that raises is reported and left out.
    """
    timings = [Timing([], []) for _ in cases]
    rounds = [0] * len(cases)
    for i, case in enumerate(cases):
        try:
            with environment(case.environment):
                if case.before is not None:
                    case.before()
                result = case.run()
                copy.synchronize()
                if case.check is not None:
                    timings[i].checked = case.check(result)
                del result
                once = sum(copy.beside(case.run)) / 1e3
            rounds[i] = int(min(max(seconds / once, 5 if once < seconds else 3), most))
        except Exception as error:  # one implementation that fails must not cost the others' rows
            text = str(error).strip().splitlines()
            timings[i].note = f"failed: {type(error).__name__}: {text[0] if text else ''}"
    for r in range(max(rounds, default=0)):
        for i, case in enumerate(cases):
            if r >= rounds[i]:
                continue
            try:
                with environment(case.environment):
                    copied, taken = copy.beside(case.run)
            except Exception as error:
                rounds[i] = 0
                timings[i].note = f"failed: {type(error).__name__}: {error}"
                continue
            timings[i].copies.append(copied)
            timings[i].times.append(taken)
    return timings


def numbers(case: Case, timing: Timing, copy_n: int) -> dict[str, Any]:
    """The numbers of a row. Percentiles are of the times; every rate is at the median.

    ``gb_per_s`` counts 4 bytes per value and client, whatever really moves, and ``of_memcpy`` is that over the bytes copied a
    second (read once, written once, counted once). ``moved_gb_per_s`` counts what has to move, and ``of_copy`` is that over
    what the copy moves (read and written, counted twice).
    """
    p20, p50, p80 = (float(p) for p in np.percentile(timing.times, (20, 50, 80)))
    copied = float(np.median(timing.copies))
    copy_speed = 4 * copy_n / copied / 1e6
    speed, moved = 4 * case.n * case.clients / p50 / 1e6, case.moved / p50 / 1e6
    return {
        "runs": len(timing.times),
        "p20_ms": f"{p20:.4f}",
        "p50_ms": f"{p50:.4f}",
        "p80_ms": f"{p80:.4f}",
        "copy_ms": f"{copied:.4f}",
        "copy_n": copy_n,
        "gb_per_s": f"{speed:.3f}",
        "gcodes_per_s": f"{speed / 4:.3f}",
        "bytes_per_value": f"{case.moved / case.n:.4f}",
        "moved_gb_per_s": f"{moved:.3f}",
        "of_memcpy": f"{speed / copy_speed:.4f}",
        "of_copy": f"{moved / (2 * copy_speed):.4f}",
    }


def row(section: str, case: Case, timing: Timing, copy: Copy, threads: int, facts: dict[str, str]) -> dict[str, Any]:
    """A row of the CSV; without numbers if the case failed."""
    values: dict[str, Any] = {**dict.fromkeys(COLUMNS, ""), **facts}
    values |= {
        "section": section,
        "operation": case.operation,
        "implementation": case.implementation,
        "version": case.version,
        "backend": case.backend or (facts.get("backend", "") if case.version in ("", OURS) else ""),
        "device": copy.device.type,
        "dtype": case.dtype,
        "bits": case.bits,
        "bucket": case.bucket or "",
        "n": case.n,
        "clients": case.clients,
        "threads": threads,
        "checked": timing.checked,
        "note": timing.note,
    }
    return values | (numbers(case, timing, copy.n) if timing.times else {"runs": 0})


def missing_row(implementation: str, why: str, facts: dict[str, str]) -> dict[str, Any]:
    """The row that names an implementation which this run did not have."""
    empty: dict[str, Any] = {**dict.fromkeys(COLUMNS, ""), **facts}
    zeros = dict.fromkeys(("bits", "n", "clients", "threads", "runs"), 0)
    named = {"section": "missing", "operation": "missing", "implementation": implementation, "note": f"missing: {why}"}
    return empty | zeros | named
