"""What `codec.inspect` found in a payload, and how it is shown to a person."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch


class TensorRow(NamedTuple):
    """One tensor of a payload: what it costs, and what it would cost uncompressed; `rank` None: no factors."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bits: int | None
    num_bytes: int
    dense_bytes: int
    rank: int | None = None


@dataclass(frozen=True)
class Inspection:
    """The parts of a payload.

    Args:
        num_bytes: ``len(payload)``.
        header_bytes: everything that is not tensor data.
        schema_hash: the schema it was made for.
        chain: the stages' names.
        arenas: name -> (dtype, elements, bytes).
        bits: how many tensors were given each bit-width (None: uncompressed); empty without a quantising stage.
        tensors: a row per tensor, where the schema was known.
        ranks: how many matrices were sent as factors of each rank (None: whole); empty without a stage that factors.
        energy: the share of each matrix's squared norm that the factors were to keep, if there are any.
    """

    num_bytes: int
    header_bytes: int
    schema_hash: str
    chain: tuple[str, ...]
    arenas: dict[str, tuple[str, int, int]]
    bits: dict[int | None, int]
    tensors: list[TensorRow] | None = None
    ranks: dict[int | None, int] = field(default_factory=dict)
    energy: float | None = None

    def __str__(self) -> str:
        lines = [
            f"payload  {self.num_bytes:,} bytes",
            f"schema   {self.schema_hash}",
            f"stages   {' | '.join(self.chain) or 'none (uncompressed)'}",
        ]
        if self.bits:
            widths = sorted(self.bits, key=lambda b: 99 if b is None else b)
            given = [f"{'none' if b is None else b}: {self.bits[b]}" for b in widths]
            lines.append(f"bits     {', '.join(given)} (bits: tensors)")
        if self.ranks:
            lines.append(f"ranks    {self._ranks()}")
        rows = [(name, dtype, f"{count:,}", size) for name, (dtype, count, size) in self.arenas.items()]
        rows.append(("header", "JSON", "", self.header_bytes))
        cells = [("part", "type", "elements", "bytes", "share")]
        cells += [(name, dtype, n, f"{size:,}", f"{size / self.num_bytes:.1%}") for name, dtype, n, size in rows]
        lines += ["", *_table(cells, left=2)]
        if self.tensors is not None:
            rank = ("rank",) if self.ranks else ()
            table: list[tuple[str, ...]] = [("tensor", "shape", *rank, "bits", "bytes", "of dense")]
            for row in self.tensors:
                shape = "x".join(map(str, row.shape)) or "scalar"
                share = f"{row.num_bytes / row.dense_bytes:.1%}" if row.dense_bytes else "-"
                given = [*(["-" if row.rank is None else str(row.rank)] if rank else []), str(row.bits or "-")]
                table.append((row.name, shape, *given, f"{row.num_bytes:,}", share))
            dense = sum(row.dense_bytes for row in self.tensors)
            total = f"{self.num_bytes / dense:.1%}" if dense else "-"
            table.append(("whole payload", "", *([""] if rank else []), "", f"{self.num_bytes:,}", total))
            lines += ["", *_table(table, left=2)]
        return "\n".join(lines)

    def _ranks(self) -> str:
        """The mean and the range of the factors' ranks, how many matrices went whole, and the energy kept."""
        factored = {rank: count for rank, count in self.ranks.items() if rank is not None}
        told = [f"whole: {self.ranks[None]}"] if None in self.ranks else []
        if factored:
            n = sum(factored.values())
            mean = sum(rank * count for rank, count in factored.items()) / n
            told.insert(0, f"{mean:.1f} on average, {min(factored)} to {max(factored)} (of {n} matrices)")
        return f"{', '.join(told)}; energy {self.energy:g}"


def _table(cells: Sequence[tuple[str, ...]], left: int) -> list[str]:
    """Rows in aligned columns, the first `left` of them to the left."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return [
        "  ".join(
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
