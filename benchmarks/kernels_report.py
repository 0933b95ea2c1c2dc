"""What a CSV of the kernel benchmark says: the verdict on every target, tables, and the roofline figure."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, str]
MODELS = ("resnet20", "transformer")
MIXED = "dequantize_accumulate 2-6 bits"
STOCHASTIC, NEAREST = "quantize_pack stochastic", "quantize_pack nearest"


@dataclass(frozen=True)
class Verdict:
    """A target, what was measured, and whether that meets it; ``met`` is None where the run did not measure it."""

    what: str
    where: str
    target: str
    measured: str
    met: bool | None

    @property
    def word(self) -> str:
        return {True: "met", False: "missed", None: "not measured"}[self.met]


class Results:
    """The rows of a CSV, with look-up by column."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    @classmethod
    def read(cls, path: Path) -> Results:
        with open(path, newline="", encoding="utf-8") as file:
            return cls(list(csv.DictReader(file)))

    def timed(self, **columns: Any) -> list[Row]:
        """The rows with numbers whose columns are these."""
        return [r for r in self.rows if r["runs"] not in ("", "0") and all(r[k] == str(v) for k, v in columns.items())]

    def one(self, **columns: Any) -> Row | None:
        found = self.timed(**columns)  # of rows measured again, the last
        return found[-1] if found else None

    def sizes(self, section: str) -> list[int]:
        return sorted({int(r["n"]) for r in self.timed(section=section)})

    @property
    def threads(self) -> str:
        most = max(int(r["threads"]) for r in self.rows)
        return f"{most} thread{'s' if most > 1 else ''}"

    @property
    def on_gpu(self) -> bool:
        return any(r["device"] == "cuda" for r in self.rows)


def ms(row: Row) -> float:
    return float(row["p50_ms"])


def times(slow: Row | None, fast: Row | None) -> float | None:
    """How many times the first takes as long as the second."""
    return ms(slow) / ms(fast) if slow and fast else None


def percent_over(row: Row, base: Row) -> float:
    """By how many per cent `row` takes longer than `base`."""
    return 100 * (ms(row) / ms(base) - 1)


def size_name(n: int) -> str:
    for power, unit in ((30, "G"), (20, "M"), (10, "K")):
        if n % (1 << power) == 0:
            return f"{n >> power} {unit}"
    return f"{n:,}"


# ---- the targets ----


def _at_least(what: str, where: str, value: float | None, least: float, unit: str, detail: str = "") -> Verdict:
    shown = "" if value is None else (f"{100 * value:.0f} %" if unit == "%" else f"{value:.2f} {unit}".strip())
    target = f">= {100 * least:g} %" if unit == "%" else f">= {least:g} {unit}".strip()
    return Verdict(what, where, target, shown + detail, None if value is None else value >= least)


def cpu_verdicts(results: Results) -> list[Verdict]:
    """The targets of the CPU; each at every size that was measured."""
    made = []
    for n in results.sizes("main") or [1 << 24]:
        where, main = f"{size_name(n)} float32", {"section": "main", "n": n, "bits": 4}
        ours = results.one(operation=STOCHASTIC, implementation="ops", **main)
        eager = results.one(operation=STOCHASTIC, implementation="eager", **main)
        blockwise = {"section": "main", "n": n, "implementation": "bitsandbytes blockwise", "bits": 8}
        other = results.one(operation=NEAREST, **blockwise)
        name = "stochastic 4-bit quantize_pack"
        share = float(ours["of_memcpy"]) if ours else None
        made.append(_at_least(f"{name}, of memcpy", where, share, 0.85, "%", _milliseconds(ours)))
        made.append(_at_least(f"{name}, against torch eager", where, times(eager, ours), 40, "x"))
        made.append(_at_least(f"{name}, against bitsandbytes 8-bit", where, times(other, ours), 15, "x"))
        ours = results.one(operation=NEAREST, implementation="ops", **main)
        theirs = results.one(operation=NEAREST, implementation="fbgemm", **main)
        name = "nearest 4-bit quantize_pack, against FBGEMM's prepack"
        made.append(_at_least(name, where, times(theirs, ours), 0.95, "x", _milliseconds(ours)))
        mixed = {"section": "accumulate", "n": n, "operation": MIXED}
        together = results.one(implementation="ops", **mixed)
        singly = results.one(implementation="ops, one by one", **mixed)
        name = "dequantize_accumulate, 8 clients, bits 2 to 6"
        made.append(_at_least(f"{name}, against eight single passes", where, times(singly, together), 2.2, "x"))
        share = float(together["of_memcpy"]) / 4 if together else None  # codes, not their 4 bytes
        name = f"{name}: codes per second over memcpy's bytes per second"
        made.append(_at_least(name, where, share, 0.8, "", _milliseconds(together)))
    return made + [layout_verdict(results, model) for model in MODELS]


def _milliseconds(row: Row | None) -> str:
    return f" ({ms(row):.2f} ms)" if row else ""


def layout_verdict(results: Results, model: str, most: float = 10.0) -> Verdict:
    """A flat vector with its table of tensors against one without: met if neither form takes over `most` per cent longer.

    A list of tensors has no flat vector to be compared with: it saves making one, so that is what it is shown beside.
    """
    here = {"section": "layout", "operation": f"quantize_pack, {model}"}
    found: dict[str, float] = {}
    for memory, name in (("ops", "new output"), ("out", "out=")):
        flat = results.one(implementation=f"{memory}, flat", **here)
        row = results.one(implementation=f"{memory}, table", **here)
        if flat and row:
            found[name] = percent_over(row, flat)
    shown = "; ".join(f"{name}: {value:+.1f} %" for name, value in found.items())
    listed, joined = (results.one(implementation=f"ops, {kind}", **here) for kind in ("list", "flattened list"))
    if listed and joined:
        shown += f"; a list of tensors, over making one vector of it first: {percent_over(listed, joined):+.1f} %"
    n = results.timed(**here)[0]["n"] if found else ""
    met = all(value <= most for value in found.values()) if found else None
    what = f"quantize a {model}'s update through the batched layout: overhead over one flat vector"
    return Verdict(what, f"{int(n):,} float32" if n else model, f"<= {most:g} %", shown, met)


def gpu_verdicts(results: Results, n: int = 1 << 30) -> list[Verdict]:
    """The targets of a GPU: of `copy` bandwidth what really moves counts, read and written."""
    made = []
    cases = [("stochastic 4-bit quantize_pack", STOCHASTIC, 1), ("dequantize_accumulate 8 x 4-bit", "", 8)]
    for name, operation, clients in cases:
        here = {"section": "main", "n": n, "bits": 4, "clients": clients}
        here["operation"] = operation or "dequantize_accumulate"
        eager = results.one(implementation="eager", **here)
        compiled = results.one(implementation="compiled", **here)
        for backend in ("cuda", "triton"):
            ours = results.one(implementation="ops", backend=backend, **here)
            where, share = f"{size_name(n)} float32, {backend}", float(ours["of_copy"]) if ours else None
            made.append(_at_least(f"{name}, of the copy bandwidth", where, share, 0.85, "%", _milliseconds(ours)))
            beside = times(compiled, ours)
            detail = f" (torch.compile: {beside:.2f} x)" if beside else " (torch.compile: not measured)"
            made.append(_at_least(f"{name}, against torch eager", where, times(eager, ours), 10, "x", detail))
    return made


def verdicts(results: Results) -> list[Verdict]:
    return gpu_verdicts(results) if results.on_gpu else cpu_verdicts(results)


def identity(results: Results) -> str:
    """How many of our rows were compared with the reference, in a sentence."""
    ours = [r for r in results.rows if r["version"] == "dynfed-lightning"]
    right = [r for r in ours if r["checked"] == "bits"]
    wrong = [r for r in ours if "differ from the reference" in r["note"]]
    backends = ", ".join(sorted({r["backend"] for r in right}))
    return (
        f"Bit for bit: {len(right)} rows of ours ({backends}) returned the reference's bits on the slices compared, "
        f"{len(wrong)} did not."
    )


# ---- the report ----


def table(head: list[str], rows: Iterable[list[str]], numeric: int = 1) -> list[str]:
    """A Markdown table whose columns from `numeric` on are aligned to the right."""
    rule = ["---" if i < numeric else "--:" for i in range(len(head))]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)] + [""]


def _measured(rows: list[Row], on_gpu: bool) -> list[str]:
    """Operation, implementation, and the numbers of rows."""
    head = ["operation", "implementation", "ms (p20 / p50 / p80)", "billion values/s", "of memcpy", "moved, of copy"]
    body = []
    for r in rows:
        clients = f", {r['clients']} clients" if r["clients"] != "1" else ""
        with_backend = r["section"] == "isa" or (on_gpu and r["version"] == "dynfed-lightning")
        name = f"{r['implementation']}, {r['backend']}" if with_backend else r["implementation"]
        dtype = f", {r['dtype']}" if r["dtype"] != "float32" else ""
        spread = " / ".join(f"{float(r[p]):.3g}" for p in ("p20_ms", "p50_ms", "p80_ms"))
        rates = [f"{float(r['gcodes_per_s']):.2f}", f"{float(r['of_memcpy']):.2f}", f"{float(r['of_copy']):.2f}"]
        body.append([f"{r['operation']}{clients}{dtype}", name, spread, *rates])
    return table(head, body, 2)


SECTIONS = {
    "accumulate": "Eight clients, bits 2, 3, 3, 4, 4, 5, 5, 6",
    "isa": "Instruction sets, 4 bits, into existing buffers",
    "threads": "One thread, 4 bits, into existing buffers",
    "dtype": "Input in half precision, 4 bits",
    "layout": "A model update through its table of tensors, 4 bits, stochastic",
    "rotate": "Rotation",
}


def markdown(results: Results, csv_name: str) -> str:
    """The whole report."""
    first, shown = results.rows[0], results.on_gpu
    where = first["gpu"] or first["cpu"]
    threads = "" if shown else f", {results.threads}"
    lines = [f"# Kernels on {'a GPU' if shown else 'a CPU'}", ""]
    lines += [f"{where}{threads}, `{first['backend']}`, torch {first['torch']}. All rows: `{csv_name}`.", ""]
    lines += ["## Targets", ""]
    body = [[v.what, v.where, v.target, v.measured, v.word] for v in verdicts(results)]
    lines += table(["what", "where", "target", "measured", ""], body, 5)
    lines += [identity(results), ""]
    lines += [
        "`ops` allocates its output, `out` writes into buffers that exist, `kernel` is the backend's function alone. Of memcpy: "
        "4 bytes per value and client, over the bytes that a copy of float32 values makes in the same seconds. Moved, of copy: "
        "the bytes that must be read and written, over those the copy reads and writes. A copy is timed beside every run.",
        "",
    ]
    missing = [r for r in results.rows if r["section"] == "missing"]
    lines += [f"- {r['implementation']}: {r['note']}" for r in missing]
    lines += [""] if missing else []
    failed = [r for r in results.rows if r["section"] != "missing" and r["note"]]
    lines += [f"- {r['operation']}, {r['implementation']}, {r['bits']} bits: {r['note']}" for r in failed]
    lines += [""] if failed else []
    for n in results.sizes("main"):
        rows = [r for r in results.timed(section="main", n=n) if r["bits"] in ("4", "32")]
        rows += results.timed(section="limits", n=n)
        rows += [r for r in results.timed(section="main", n=n, bits=8) if r["implementation"].startswith("bitsandb")]
        lines += [f"## {size_name(n)} values, 4 bits (bitsandbytes blockwise: 8)", "", *_measured(rows, shown)]
    for section, title in SECTIONS.items():
        rows = results.timed(section=section)
        if rows:
            lines += [f"## {title}", "", *_measured(rows, shown)]
    return "\n".join(lines)


def write_report(path: Path) -> str:
    """Write ``.md`` and, where matplotlib is installed, ``.png`` beside the CSV at `path`.

    Returns:
        the verdicts, a line each.
    """
    results = Results.read(path)
    path.with_suffix(".md").write_text(markdown(results, path.name), encoding="utf-8")
    lines = [f"{v.word:12} {v.what} ({v.where}): {v.measured}; target {v.target}" for v in verdicts(results)]
    try:
        from roofline import plot_roofline

        plot_roofline(results, path.with_suffix(".png"))
    except ImportError as error:
        lines.append(f"no figure: {error}")
    return "\n".join([*lines, identity(results), f"wrote {path} and the report beside it"])
