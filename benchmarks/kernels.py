"""The low-bit operations against a copy, torch eager and compiled, numpy, FBGEMM, bitsandbytes and torchao, in one run.

    python benchmarks/kernels.py --out benchmarks/results/kernels-cpu.csv
    python benchmarks/kernels.py --device cuda --out kernels-gpu.csv
    python benchmarks/kernels.py --report benchmarks/results/kernels-cpu.csv

Every row is one operation by one implementation: the 20th, 50th and 80th percentile of its times, and its speed as such and as
a fraction of the copy bandwidth, from copies measured beside every single run of it (`kernels_timing.numbers` says which bytes
count). The implementations are described in `kernels_cases` (ours) and `kernels_peers` (others'; `pip install` the ``bench``
extra for them). Results are compared before they are timed: ours bit for bit with the reference, others' with the input.

Beside the CSV a report (``.md``: the verdict on every target, tables) and a roofline figure (``.png``) are written;
``--report`` makes both again from a CSV.
"""

from __future__ import annotations

import argparse
import csv
import gc
import os
import platform
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import kernels_peers
import numpy as np
import torch
from kernels_cases import BUCKET, MODELS, Ours
from kernels_report import write_report
from kernels_timing import COLUMNS, Case, Copy, measure, missing_row, row
from torch import Tensor

from dynfed_lightning import _ops_backends, ops

SECTIONS = ("main", "accumulate", "isa", "threads", "dtype", "layout", "rotate")
SIZES = {"cpu": [2**24, 2**26], "cuda": [2**30, 2**27, 2**24, 2**20]}  # on a GPU what the targets are of comes first
BLOCKS = (512, 4096)  # of the rotation
MANY = 400  # the most runs of what takes microseconds


class Run:
    """What one call of this script measures; writes its rows after every group, so that a run cut short leaves them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.plan = args.plan or args.device
        self.rows: list[dict[str, Any]] = []
        if args.append and args.out is not None and args.out.exists():
            with args.out.open(newline="", encoding="utf-8") as file:
                self.rows = list(csv.DictReader(file))
        self.peers = [name for name in kernels_peers.PEERS if name in args.peers]
        self.facts = {
            "cpu": cpu_name(),
            "gpu": torch.cuda.get_device_name() if args.device == "cuda" else "",
            "backend": ops.backend(args.device),
            "torch": torch.__version__,
            "numpy": np.__version__,
        }

    def all(self) -> None:
        print(*(f"{k}: {v}" for k, v in self.facts.items() if v), sep="\n")
        for name in kernels_peers.PEERS:
            why = kernels_peers.missing(name, self.args.device) if name in self.peers else "left out by --peers"
            if why:
                print(f"missing: {name}: {why}")
                self.rows.append(missing_row(name, why, self.facts))
                self.peers = [p for p in self.peers if p != name]
        for name, reason in self.missing_backends():
            print(f"missing: backend {name}: {reason}")
            self.rows.append(missing_row(f"backend {name}", reason, self.facts))
        for section in self.args.only:
            if self.plan == "cpu" or section in ("main", "layout", "rotate"):
                getattr(self, section)()
        self.write()

    # ---- the sections ----

    def main(self) -> None:
        """Every operation at every width, ours and others'."""
        for i, n in enumerate(self.args.sizes):
            x, copy = self.values(n), Copy(n, self.device)
            limits = [Case("memcpy", "torch", 32, n, 8 * n, partial(torch.empty_like(x).copy_, x))]
            self.group("main", limits, copy)
            self.group("limits", [Case("read", "torch", 32, n, 4 * n, x.sum)], copy)
            widths = self.args.bits
            if self.plan == "cuda":  # what the targets are of comes first, and the smaller sizes have that alone
                widths = sorted(widths, key=lambda b: b != 4) if i == 0 else [b for b in widths if b == 4]
            for bits in widths:
                kinds = ("ops", "out", "kernel") if bits == 4 else ("ops", "out")
                sources = [self.ours(x, bits, kinds, v, label) for label, v in self.backends()]
                compiles = self.plan == "cpu" or i == 0
                sources += [self.theirs(name, x, bits) for name in self.peers if compiles or name != "compiled"]
                if self.plan == "cpu":  # all implementations of an operation take turns
                    sources = [[case for source in sources for case in source]]
                for source in sources:
                    self.by_operation("main", source, copy)
            del x, copy

    def ours(self, x: Tensor, bits: int, kinds: Iterable[str], variables: dict[str, str], label: str) -> Iterator[Case]:
        ours = Ours(x, variables, label)
        yield from ours.quantize(bits, kinds)
        yield from ours.dequantize(bits, kinds)
        yield from ours.pack(bits, kinds)
        yield from ours.accumulate(bits, (1, 8))

    def theirs(self, name: str, x: Tensor, bits: int) -> Iterator[Case]:
        make = kernels_peers.PEERS[name][0]
        try:
            yield from make(x, [bits], [1, 8])
        except Exception as error:  # it could not even make its input
            print(f"failed: {name}, {bits} bits: {error}")
            self.rows.append(missing_row(name, f"failed at {bits} bits, {x.numel()} values: {error}", self.facts))

    def accumulate(self) -> None:
        for n in self.args.sizes:
            self.group("accumulate", Ours(self.values(n)).accumulate_mixed(), Copy(n, self.device))

    def isa(self) -> None:
        """The instruction sets that this CPU has, at the first size and 4 bits."""
        n, names = self.args.sizes[0], _ops_backends.INSTRUCTION_SETS
        x, copy = self.values(n), Copy(n, self.device)
        best = torch.ops.dynfed_lightning_cpu.best_isa() if _ops_backends.load_error() is None else 0
        sets = [name for name, level in names.items() if 0 < level <= best]
        cases = [
            case
            for name in sets
            for case in self.ours(x, 4, ("out",), {"DYNFED_CPU_ISA": name}, f"cpu ({name})")
            if case.clients in (1, 8)
        ]
        self.by_operation("isa", cases, copy)

    def threads(self) -> None:
        """One thread, at the first size and 4 bits."""
        n = self.args.sizes[0]
        x, copy = self.values(n), Copy(n, self.device)
        memcpy = Case("memcpy", "torch", 32, n, 8 * n, partial(torch.empty_like(x).copy_, x))
        torch.set_num_threads(1)
        try:
            self.by_operation("threads", [memcpy, *self.ours(x, 4, ("out",), {}, "")], copy)
        finally:
            torch.set_num_threads(self.args.threads)

    def dtype(self) -> None:
        n = self.args.sizes[0]
        copy = Copy(n, self.device)
        cases = [
            case
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
            for case in Ours(self.values(n).to(dtype)).quantize(4, ("ops", "out"), ("stochastic", "nearest"))
        ]
        self.by_operation("dtype", cases, copy)

    def layout(self) -> None:
        """A whole model update through its table of tensors, against one flat vector of the same size."""
        for model in self.args.models:
            sizes = MODELS[model]()
            n = sum(sizes)
            for label, variables in self.backends():
                cases = Ours(self.values(n), variables, label).layouts(model, sizes)
                self.group("layout", cases, Copy(n, self.device), most=MANY if n < 1 << 22 else 50)

    def rotate(self) -> None:
        n = self.args.sizes[0]
        x, copy = self.values(n), Copy(n, self.device)
        for label, variables in self.backends():
            for block in BLOCKS:
                self.by_operation("rotate", Ours(x, variables, label).rotate(block), copy)

    # ---- how they are measured ----

    def values(self, n: int) -> Tensor:
        return torch.randn(n, generator=torch.Generator(self.device).manual_seed(0), device=self.device)

    def backends(self) -> list[tuple[str, dict[str, str]]]:
        """The backends to measure, with what selects them."""
        if self.args.device == "cpu":
            return [("", {})]
        lacking = [name for name, _ in self.missing_backends()]
        return [(name, {"DYNFED_BACKEND": name}) for name in self.args.backends if name not in lacking]

    def missing_backends(self) -> list[tuple[str, str]]:
        found = []
        for name in ("cpu",) if self.args.device == "cpu" else self.args.backends:
            try:
                reason = _ops_backends.missing(name)
            except Exception as error:  # a module that does not import
                reason = f"{type(error).__name__}: {error}"
            if reason:
                found.append((name, reason))
        return found

    def by_operation(self, section: str, cases: Iterable[Case], copy: Copy) -> None:
        groups: dict[tuple[str, int], list[Case]] = {}
        try:
            for case in cases:
                groups.setdefault((case.operation, case.clients), []).append(case)
        except Exception as error:  # a backend that fails on the way keeps the cases it gave
            self.rows.append(missing_row(section, f"failed: {type(error).__name__}: {error}", self.facts))
            print(f"failed: {section}: {error}")
        for group in groups.values():
            self.group(section, group, copy)
        groups.clear()
        gc.collect()
        if self.args.device == "cuda":
            torch.cuda.empty_cache()

    def group(self, section: str, cases: Iterable[Case], copy: Copy, most: int = 50) -> None:
        """Measure cases in turn, print and keep their rows."""
        try:
            cases = list(cases)
        except Exception as error:
            self.rows.append(missing_row(section, f"failed: {type(error).__name__}: {error}", self.facts))
            print(f"failed: {section}: {error}")
            return
        threads = torch.get_num_threads()
        for case, timing in zip(cases, measure(cases, copy, self.args.seconds, most), strict=True):
            made = row(section, case, timing, copy, threads, self.facts)
            self.rows.append(made)
            print(line(made), flush=True)
        self.write()

    def write(self) -> None:
        if self.args.out is None:
            return
        self.args.out.parent.mkdir(parents=True, exist_ok=True)
        with self.args.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)


def line(made: dict[str, Any]) -> str:
    """A row for the eye: times, billion values a second, fractions of the copy."""
    clients = f" x{made['clients']}" if made["clients"] > 1 else ""
    dtype = "" if made["dtype"] == "float32" else f" {made['dtype']}"
    label = f"{made['operation']} {made['bits']} bits{clients}{dtype}"
    named = made["version"] and made["backend"] and (made["section"] == "isa" or made["device"] == "cuda")
    by = made["implementation"] + (f", {made['backend']}" if named else "")
    start = f"{made['section']:10} {made['n']:>10} {label:44} {by:28}"
    if not made["runs"]:
        return f"{start} {made['note']}"
    times = " / ".join(f"{float(made[p]):.3f}" for p in ("p20_ms", "p50_ms", "p80_ms"))
    rates = f"{made['gcodes_per_s']:>9} G/s {float(made['of_memcpy']):7.2f} memcpy {float(made['of_copy']):6.2f} copy"
    return f"{start} {times:>28} ms {rates} {made['checked']}{' ' + made['note'] if made['note'] else ''}"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return f"{facts['model name']} (family {facts['cpu family']}, model {facts['model']}), {os.cpu_count()} cores"
    except (OSError, KeyError):
        return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def size(text: str) -> int:
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    n = int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)
    if n <= 0 or n % BUCKET:
        raise argparse.ArgumentTypeError(f"Expected a size to be a positive multiple of {BUCKET}, but got {text}.")
    return n


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--plan", choices=("cpu", "cuda"), default=None, help="another device's rows: a dry run")
    parser.add_argument("--sizes", type=lambda s: [size(v) for v in s.split(",")], default=None, help="16M,64M")
    parser.add_argument("--bits", type=lambda s: [int(v) for v in s.split(",")], default=list(range(1, 9)))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each row, the copies beside it included")
    parser.add_argument("--only", type=words, default=list(SECTIONS), help=f"sections, of {','.join(SECTIONS)}")
    parser.add_argument("--peers", type=words, default=list(kernels_peers.PEERS), help="others, of all by default")
    parser.add_argument("--backends", type=words, default=["cuda", "triton"], help="ours to measure on a GPU")
    parser.add_argument("--models", type=words, default=list(MODELS), help="of the section layout")
    parser.add_argument("--out", type=Path, default=None, help="a CSV file to write; report and figure go beside it")
    parser.add_argument("--append", action="store_true", help="keep the rows that the CSV has, and add to them")
    parser.add_argument("--report", type=Path, default=None, help="only: make report and figure of this CSV again")
    args = parser.parse_args()
    choices = {
        "only": SECTIONS,
        "peers": (*kernels_peers.PEERS, "none"),
        "backends": ("cuda", "triton"),
        "models": MODELS,
    }
    for name, allowed in choices.items():
        if unknown := set(getattr(args, name)) - set(allowed):
            parser.error(f"--{name}: expected some of {', '.join(allowed)}, but got {', '.join(sorted(unknown))}")
    if args.report is not None:
        print(write_report(args.report))
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no GPU")
    args.sizes = args.sizes or SIZES[args.plan or args.device]
    torch.set_num_threads(args.threads)
    Run(args).all()
    if args.out is not None:
        print(write_report(args.out))


if __name__ == "__main__":
    main()
