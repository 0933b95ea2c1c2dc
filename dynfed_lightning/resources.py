"""What a client has to work with: memory, uplink and speed, given, drawn or read from a table."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dynfed_lightning.partition import numpy_generator


@dataclass(frozen=True)
class Resources:
    """What one client has; ``None`` means unknown, which no method treats as a limit.

    Args:
        memory_mb: memory in megabytes (DynFed's c_k, eq. 2).
        bandwidth_mbps: uplink in megabits per second.
        compute: speed relative to a reference client (1 = reference, 0.5 = half as fast).

    Raises:
        ValueError: a value that is not a finite number above 0.
    """

    memory_mb: float | None = None
    bandwidth_mbps: float | None = None
    compute: float | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None and not _positive(value):
                raise ValueError(f"Expected `{f.name}` to be a finite number above 0, but got {value!r}.")


def _positive(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value) and value > 0


class ResourceProfile:
    """Base class: ``profile(client_id, seed)`` says what that client has, the same answer every time."""

    def __call__(self, client_id: int, seed: int = 0) -> Resources:
        raise TypeError("Expected a subclass of ResourceProfile that defines `__call__`, but got the base class.")


class UniformResources(ResourceProfile):
    """The same for every client.

    Args:
        memory_mb: memory in megabytes.
        bandwidth_mbps: uplink in megabits per second.
        compute: relative speed.
    """

    def __init__(
        self, memory_mb: float | None = None, bandwidth_mbps: float | None = None, compute: float | None = None
    ) -> None:
        self._resources = Resources(memory_mb, bandwidth_mbps, compute)

    def __call__(self, client_id: int, seed: int = 0) -> Resources:
        return self._resources


class GivenResources(ResourceProfile):
    """Listed one by one.

    Args:
        clients: a sequence (entry k is client k) or a mapping from client id; each entry a `Resources` or a mapping of its
            fields, e.g. ``{"memory_mb": 4096}``.
        default: what a client without an entry has; without it, such a client is an error.
    """

    def __init__(
        self,
        clients: Sequence[Resources | Mapping[str, float]] | Mapping[int, Resources | Mapping[str, float]],
        default: Resources | Mapping[str, float] | None = None,
    ) -> None:
        items = clients.items() if isinstance(clients, Mapping) else enumerate(clients)
        self._clients = {int(k): _resources(v, f"clients[{k}]") for k, v in items}
        self._default = None if default is None else _resources(default, "default")

    def __call__(self, client_id: int, seed: int = 0) -> Resources:
        found = self._clients.get(client_id, self._default)
        if found is None:
            raise ValueError(
                f"Expected resources for client {client_id}, but only {len(self._clients)} clients have any."
            )
        return found


def _resources(value: Resources | Mapping[str, float], name: str) -> Resources:
    if isinstance(value, Resources):
        return value
    known = [f.name for f in fields(Resources)]
    if not isinstance(value, Mapping) or not set(value) <= set(known):
        raise ValueError(
            f"Expected `{name}` to be a Resources or a mapping with keys among {known}, but got {value!r}."
        )
    return Resources(**value)


class DrawnResources(ResourceProfile):
    """Uniform draws, a function of (seed, client id) only: adding clients changes nobody's draw.

    Args:
        memory_mb: ``(low, high)`` in megabytes; DynFed's paper draws U(2048, 16384), the default. ``None``: unknown.
        bandwidth_mbps: ``(low, high)`` in megabits per second, or ``None``.
        compute: ``(low, high)`` of the relative speed, or ``None``.
    """

    def __init__(
        self,
        memory_mb: tuple[float, float] | None = (2048, 16384),
        bandwidth_mbps: tuple[float, float] | None = None,
        compute: tuple[float, float] | None = None,
    ) -> None:
        self._ranges = {"memory_mb": memory_mb, "bandwidth_mbps": bandwidth_mbps, "compute": compute}
        for name, pair in self._ranges.items():
            if pair is None:
                continue
            if not isinstance(pair, Sequence) or len(pair) != 2 or not all(map(_positive, pair)) or pair[0] > pair[1]:
                raise ValueError(f"Expected `{name}` to be (low, high) with 0 < low <= high, but got {pair!r}.")

    def __call__(self, client_id: int, seed: int = 0) -> Resources:
        # Every field takes its draw whether it is used or not: switching one on leaves the others as they were.
        draws = numpy_generator("resources", int(seed), int(client_id)).random(len(self._ranges))
        values = {
            name: None if pair is None else float(pair[0] + u * (pair[1] - pair[0]))
            for (name, pair), u in zip(self._ranges.items(), draws, strict=True)
        }
        return Resources(**values)


class TableResources(ResourceProfile):
    """Read from a CSV file with the columns ``client`` and any of ``memory_mb,bandwidth_mbps,compute``; empty cells are unknown.

    Args:
        path: the file.

    Raises:
        ValueError: a missing or unknown column, a client listed twice, a cell that is not a number above 0.
        FileNotFoundError: no such file.
    """

    def __init__(self, path: str | Path) -> None:
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"Expected `path` to be a CSV file, but {str(path)!r} does not exist.")
        known = [f.name for f in fields(Resources)]
        self._clients: dict[int, Resources] = {}
        with file.open(newline="", encoding="utf-8-sig") as f:
            reader = csv.DictReader(f, skipinitialspace=True)
            columns = list(reader.fieldnames or [])
            if "client" not in columns or not set(columns) <= {"client", *known}:
                raise ValueError(
                    f"Expected {file.name} to have the column 'client' and any of {known}, but its columns are {columns}."
                )
            for row in reader:
                try:
                    client = int(row["client"])
                    values = {
                        c: float(row[c]) if (row.get(c) or "").strip() else None for c in columns if c != "client"
                    }
                    if client in self._clients:
                        raise ValueError(f"client {client} is listed twice")
                    self._clients[client] = Resources(**values)
                except (TypeError, ValueError) as error:
                    raise ValueError(
                        f"Expected line {reader.line_num} of {file.name} to be readable, but: {error}"
                    ) from None

    def __call__(self, client_id: int, seed: int = 0) -> Resources:
        if client_id not in self._clients:
            raise ValueError(
                f"Expected the table to list client {client_id}, but it lists {len(self._clients)} others."
            )
        return self._clients[client_id]
