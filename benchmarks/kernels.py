"""The low-bit operations against memcpy, torch eager, numpy and FBGEMM (the kernels inside torch), in one run.

    python benchmarks/kernels.py [--sizes 16M,64M] [--bits 2,4,8] [--threads 2] [--out results.csv]

Every row is one operation by one implementation: the 20th, 50th and 80th percentile of its times, and how many gigabytes of
float32 it gets through a second (4 bytes per value and client, whatever the operation really moves), as such and as a
fraction of a memcpy of the same vector. Implementations:

* ``ops``: `dynfed_lightning.ops`, as a user calls it, output allocation included; ``kernel``: the same into buffers that exist;
* ``eager``: the shortest vectorised torch code that does the same; ``numpy``: the same in numpy (one thread);
* ``fbgemm``: ``torch.ops.quantized.embedding_bag_{4bit,2bit,byte}_prepack`` and ``_unpack``: nearest rounding only, and a
  float16 scale and offset per row of 512 (float32 for 8 bits).
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dynfed_lightning import ops

BUCKET = 512
COLUMNS = [
    "operation",
    "implementation",
    "bits",
    "n",
    "clients",
    "threads",
    "runs",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "gb_per_s",
]
COLUMNS += ["of_memcpy", "cpu", "backend", "torch", "numpy"]


# ---- what others would write: for widths that divide 8, where packing needs no code that crosses bytes ----


def eager_pack(codes: Tensor, bits: int) -> Tensor:
    packed = codes[0 :: 8 // bits].clone()
    for i in range(1, 8 // bits):
        packed |= codes[i :: 8 // bits] << (bits * i)
    return packed


def eager_unpack(packed: Tensor, bits: int) -> Tensor:
    return torch.stack([(packed >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)], dim=1).view(-1)


def eager_quantize_pack(x: Tensor, bits: int, stochastic: bool) -> tuple[Tensor, Tensor]:
    rows, levels = x.view(-1, BUCKET), 2 ** (bits - 1) - 1
    scales = rows.abs().amax(dim=1, keepdim=True) / levels
    noise = torch.rand_like(rows) if stochastic else 0.5
    codes = (rows / scales + noise).floor_().clamp_(-levels, levels).add_(2 ** (bits - 1)).to(torch.uint8)
    return eager_pack(codes.view(-1), bits), scales.view(-1)


def eager_dequantize(packed: Tensor, scales: Tensor, bits: int) -> Tensor:
    values = eager_unpack(packed, bits).view(-1, BUCKET).float().sub_(2 ** (bits - 1))
    return values.mul_(scales.view(-1, 1)).view(-1)


def numpy_quantize_pack(x: np.ndarray, bits: int, rng: np.random.Generator | None) -> tuple[np.ndarray, np.ndarray]:
    rows, levels = x.reshape(-1, BUCKET), 2 ** (bits - 1) - 1
    scales = np.abs(rows).max(axis=1, keepdims=True) / np.float32(levels)
    noise = np.float32(0.5) if rng is None else rng.random(rows.shape, dtype=np.float32)
    codes = (np.clip(np.floor(rows / scales + noise), -levels, levels) + 2 ** (bits - 1)).astype(np.uint8).reshape(-1)
    packed = codes[0 :: 8 // bits].copy()
    for i in range(1, 8 // bits):
        packed |= codes[i :: 8 // bits] << (bits * i)
    return packed, scales


def numpy_dequantize(packed: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    codes = np.stack([(packed >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)], axis=1).reshape(-1, BUCKET)
    return (codes.astype(np.float32) - 2 ** (bits - 1)) * scales


FBGEMM = {2: "2bit", 4: "4bit", 8: "byte"}

Case = tuple[str, str, int, int, Callable[[], object]]  # operation, implementation, bits, clients, what to time


def our_cases(x: Tensor, bits: int) -> Iterator[Case]:
    n, cpp, isa = x.numel(), torch.ops.dynfed_lightning_cpu, 0
    packed, scales = ops.quantize_pack(x, bits, BUCKET, seed=1)
    codes, out = ops.unpack(packed, bits, n), torch.zeros(n)
    for rounding in ops.ROUNDINGS:
        name = f"quantize_pack {rounding}"
        yield name, "ops", bits, 1, partial(ops.quantize_pack, x, bits, BUCKET, 1, 0, rounding)
        into = (x, packed.clone(), scales.clone(), bits, BUCKET, 1, 0, rounding == "stochastic", isa)
        yield name, "kernel", bits, 1, partial(cpp.quantize_pack, *into)
    yield "unpack_dequantize", "ops", bits, 1, lambda: ops.unpack_dequantize(packed, scales, bits, BUCKET, n)
    yield "unpack_dequantize", "kernel", bits, 1, lambda: cpp.unpack_dequantize(out, packed, scales, bits, BUCKET, isa)
    yield "pack", "ops", bits, 1, lambda: ops.pack(codes, bits)
    yield "pack", "kernel", bits, 1, lambda: cpp.pack(codes, packed, bits, isa)
    yield "unpack", "ops", bits, 1, lambda: ops.unpack(packed, bits, n)
    yield "unpack", "kernel", bits, 1, lambda: cpp.unpack(packed, codes, bits, isa)
    for k in (1, 8):
        # Eight payloads in different memory, as from eight clients.
        many = [packed.clone() for _ in range(k)], [scales.clone() for _ in range(k)], [bits] * k, BUCKET, [1 / k] * k
        yield "dequantize_accumulate", "ops", bits, k, partial(ops.dequantize_accumulate_many, out, *many)


def other_cases(x: Tensor, bits: int) -> Iterator[Case]:
    if bits == 1:
        return
    if bits in FBGEMM:
        rows = x.view(-1, BUCKET)
        prepack = getattr(torch.ops.quantized, f"embedding_bag_{FBGEMM[bits]}_prepack")
        unpack = getattr(torch.ops.quantized, f"embedding_bag_{FBGEMM[bits]}_unpack")
        theirs = prepack(rows)
        yield "quantize_pack nearest", "fbgemm", bits, 1, lambda: prepack(rows)
        yield "unpack_dequantize", "fbgemm", bits, 1, lambda: unpack(theirs)
    if 8 % bits:
        return
    packed, scales = eager_quantize_pack(x, bits, True)
    codes, out = eager_unpack(packed, bits), torch.zeros(x.numel())
    yield "quantize_pack stochastic", "eager", bits, 1, lambda: eager_quantize_pack(x, bits, True)
    yield "quantize_pack nearest", "eager", bits, 1, lambda: eager_quantize_pack(x, bits, False)
    yield "unpack_dequantize", "eager", bits, 1, lambda: eager_dequantize(packed, scales, bits)
    if bits < 8:  # eight bits are packed already
        yield "pack", "eager", bits, 1, lambda: eager_pack(codes, bits)
        yield "unpack", "eager", bits, 1, lambda: eager_unpack(packed, bits)
    for k in (1, 8) if bits == 4 else (1,):

        def accumulate(k: int = k) -> None:
            for _ in range(k):
                out.add_(eager_dequantize(packed, scales, bits), alpha=1 / k)

        yield "dequantize_accumulate", "eager", bits, k, accumulate
    if bits == 4:
        rng, array = np.random.default_rng(0), x.numpy()
        theirs_packed, theirs_scales = numpy_quantize_pack(array, bits, rng)
        yield "quantize_pack stochastic", "numpy", bits, 1, lambda: numpy_quantize_pack(array, bits, rng)
        yield "quantize_pack nearest", "numpy", bits, 1, lambda: numpy_quantize_pack(array, bits, None)
        yield "unpack_dequantize", "numpy", bits, 1, lambda: numpy_dequantize(theirs_packed, theirs_scales, bits)


def measure(f: Callable[[], object], seconds: float) -> list[float]:
    """Times in milliseconds after a run that warms up: as many as fit in `seconds`, 5 to 50; 3 of what takes longer than that."""
    start = time.perf_counter()
    f()
    least = 3 if time.perf_counter() - start > seconds else 5
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or (len(times) < 50 and time.perf_counter() < end):
        start = time.perf_counter()
        f()
        times.append((time.perf_counter() - start) * 1e3)
    return times


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", type=lambda s: [size(v) for v in s.split(",")], default=[2**24, 2**26], help="values: 16M,64M"
    )
    parser.add_argument("--bits", type=lambda s: [int(v) for v in s.split(",")], default=list(range(1, 9)))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.25, help="time spent on each row")
    parser.add_argument("--out", type=Path, default=None, help="a CSV file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not ops.backend().startswith("cpu"):
        parser.error("the C++ kernels are not built, or DYNFED_BACKEND excludes them")

    facts = {"cpu": cpu_name(), "backend": ops.backend(), "torch": torch.__version__, "numpy": np.__version__}
    print(*(f"{k}: {v}" for k, v in facts.items()), sep="\n")
    rows: list[dict[str, object]] = []
    speeds: dict[tuple[str, str, int, int, int], float] = {}
    for n in args.sizes:
        x = torch.randn(n, generator=torch.Generator().manual_seed(0))
        copy, memcpy = torch.empty_like(x), 0.0
        print(f"\n{n} values, {args.threads} threads{'GB/s of float32':>40}{'memcpys':>10}{'p20 / p50 / p80 ms':>28}")
        cases: list[Case] = [("memcpy", "torch", 32, 1, partial(copy.copy_, x))]
        for group in (cases, *(f(x, b) for b in args.bits for f in (our_cases, other_cases))):
            for operation, implementation, bits, clients, f in group:
                times = measure(f, args.seconds)
                p20, p50, p80 = (float(p) for p in np.percentile(times, (20, 50, 80)))
                speed = 4 * n * clients / p50 / 1e6
                memcpy = memcpy or speed
                speeds[operation, implementation, bits, n, clients] = speed
                numbers = (f"{p20:.3f}", f"{p50:.3f}", f"{p80:.3f}", f"{speed:.3f}", f"{speed / memcpy:.3f}")
                row = (operation, implementation, bits, n, clients, args.threads, len(times), *numbers, *facts.values())
                rows.append(dict(zip(COLUMNS, row, strict=True)))
                label = f"{operation} {bits} bits{f' x{clients}' if clients > 1 else ''}"
                print(
                    f"{label:40}{implementation:8}{speed:15.2f}{speed / memcpy:10.2f}   {' / '.join(numbers[:3]):>25}"
                )
    print()
    for (operation, implementation, bits, n, clients), speed in speeds.items():
        ours = speeds.get((operation, "ops", bits, n, clients))
        if ours and implementation not in ("ops", "kernel"):
            print(f"{operation} {bits} bits x{clients}, {n}: ops is {ours / speed:.1f} times {implementation}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
