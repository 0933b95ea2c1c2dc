"""What `codec.inspect` found in a payload, and how it is shown to a person."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


class TensorRow(NamedTuple):
    """One tensor of a payload: what it costs, and what it would cost uncompressed."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bits: int | None
    num_bytes: int
    dense_bytes: int


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
    """

    num_bytes: int
    header_bytes: int
    schema_hash: str
    chain: tuple[str, ...]
    arenas: dict[str, tuple[str, int, int]]
    bits: dict[int | None, int]
    tensors: list[TensorRow] | None = None

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
        rows = [(name, dtype, f"{count:,}", size) for name, (dtype, count, size) in self.arenas.items()]
        rows.append(("header", "JSON", "", self.header_bytes))
        cells = [("part", "type", "elements", "bytes", "share")]
        cells += [(name, dtype, n, f"{size:,}", f"{size / self.num_bytes:.1%}") for name, dtype, n, size in rows]
        lines += ["", *_table(cells, left=2)]
        if self.tensors is not None:
            cells = [("tensor", "shape", "bits", "bytes", "of dense")]
            for row in self.tensors:
                shape = "x".join(map(str, row.shape)) or "scalar"
                share = f"{row.num_bytes / row.dense_bytes:.1%}" if row.dense_bytes else "-"
                cells.append((row.name, shape, str(row.bits or "-"), f"{row.num_bytes:,}", share))
            dense = sum(row.dense_bytes for row in self.tensors)
            total = f"{self.num_bytes / dense:.1%}" if dense else "-"
            cells.append(("whole payload", "", "", f"{self.num_bytes:,}", total))
            lines += ["", *_table(cells, left=2)]
        return "\n".join(lines)


def _table(cells: list[tuple[str, str, str, str, str]], left: int) -> list[str]:
    """Rows in aligned columns, the first `left` of them to the left."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return [
        "  ".join(
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
