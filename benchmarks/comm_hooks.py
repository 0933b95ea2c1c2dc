"""Data-parallel training with compressed gradients: bytes, time and loss of each hook, on ranks of this machine.

    python benchmarks/comm_hooks.py [--steps 60] [--ranks 2] [--models resnet encoder] [--out benchmarks/results/comm-hooks.csv]

Each rank is a process, on the CPU with gloo or, where there are enough GPUs, one GPU each with NCCL. Networks are trained on
synthetic data, from the same start, for the same steps, with plain DDP, torch's hooks and this package's. Bytes are those that
a rank hands to the collectives, counted there for all alike, and what it then has to send (a ring's share; see `Traffic`).
Processes of one machine talk through memory: a step's time is that of the training and the compression, with hardly any of the
network's. The two last columns add the network's at 1 Gbit/s and 100 Mbit/s, by calculation: bytes over bandwidth, nothing of it
hidden behind the backward pass. "loss" is the mean of the last ten steps and all ranks.

Writes a row per case; prints a table and puts it beside the CSV (``.md``).
"""

from __future__ import annotations

import argparse
import csv
import datetime
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from kernels_report import table
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as power_sgd
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel as DDP

from dynfed_lightning import LowRankState, QuantizedState, low_rank_hook, quantized_hook
from dynfed_lightning.batches import logits_of
from dynfed_lightning.encoder import TextEncoder
from dynfed_lightning.models import build_model

WARM_UP = 3  # steps: DDP rebuilds its buckets after the first; torch's PowerSGD needs two uncompressed ones
COLUMNS = (
    "model",
    "parameters",
    "hook",
    "ranks",
    "backend",
    "device",
    "steps",
    "payload_bytes",
    "wire_bytes",
    "ratio",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "loss",
    "ms_at_1gbit",
    "ms_at_100mbit",
    "threads",
    "torch",
)


def _torch_power_sgd(rank: int) -> Any:
    return power_sgd.PowerSGDState(
        None, rank, start_powerSGD_iter=2, orthogonalization_epsilon=1e-8, batch_tensors_with_same_shape=True
    )


# name -> (state, hook); none is plain DDP
HOOKS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "plain": lambda: (None, None),
    "torch bf16": lambda: (None, bf16_compress_hook),
    "torch powerSGD, rank 4": lambda: (_torch_power_sgd(4), power_sgd.powerSGD_hook),
    "low rank 4": lambda: (LowRankState(4, start_step=2), low_rank_hook),
    "low rank 4, 8-bit factors": lambda: (LowRankState(4, bits=8, start_step=2), low_rank_hook),
    "low rank up to 16, energy 0.8": lambda: (LowRankState(16, energy=0.8, start_step=2), low_rank_hook),
    "4 bits": lambda: (QuantizedState(4), quantized_hook),
    "2 bits, rotated": lambda: (QuantizedState(2, rotate=4096), quantized_hook),
    "1 bit": lambda: (QuantizedState(1), quantized_hook),
}


# ---- what is trained ----


def images(step: int, rank: int) -> tuple[Any, Tensor]:
    means = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1000 * step + rank)
    y = torch.randint(10, (16,), generator=g)
    return means[y] + 2.0 * torch.randn(16, 3, 32, 32, generator=g), y


def sentences(step: int, rank: int) -> tuple[Any, Tensor]:
    """Each class has its own fifty words; a fifth of a sentence comes from them."""
    g = torch.Generator().manual_seed(1000 * step + rank)
    y = torch.randint(4, (16,), generator=g)
    common, own = torch.randint(1000, (16, 24), generator=g), torch.randint(50, (16, 24), generator=g)
    return torch.where(torch.rand(16, 24, generator=g) < 0.2, own + 50 * y[:, None], common), y


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], tuple[Any, Tensor]], float]] = {
    "resnet": (lambda: build_model("resnet20"), images, 0.05),
    "encoder": (
        lambda: TextEncoder(1000, 4, layers=2, hidden=256, heads=4, max_length=64, dropout=0.0),
        sentences,
        0.05,
    ),
}


# ---- one case ----


class Counted:
    """Counts what goes through the collectives that hooks call. Plain DDP's own are out of Python's sight."""

    NAMES = ("all_reduce", "all_gather_single", "all_gather_into_tensor", "all_to_all_single")

    def __init__(self, world: int) -> None:
        self.world, self.payload, self.wire = world, 0, 0.0
        for name in self.NAMES:
            if hasattr(dist, name):
                setattr(dist, name, self._spy(name, getattr(dist, name)))

    def _spy(self, name: str, original: Any) -> Any:
        share = {"all_reduce": 2 * (self.world - 1) / self.world, "all_to_all_single": (self.world - 1) / self.world}

        def call(*args: Any, **kwargs: Any) -> Any:
            t = args[0] if name == "all_reduce" else args[1]
            size = t.numel() * t.element_size()
            self.payload += size
            self.wire += share.get(name, self.world - 1) * size
            return original(*args, **kwargs)

        return call


def case(model: str, hook: str, rank: int, world: int, steps: int, device: torch.device, counted: Counted) -> dict:
    build, batch, lr = MODELS[model]
    torch.manual_seed(0)
    net = build().to(device)
    ddp = DDP(net, device_ids=[device.index] if device.type == "cuda" else None)
    state, function = HOOKS[hook]()
    if function is not None:
        ddp.register_comm_hook(state, function)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    times, losses = [], []
    for step in range(steps):
        x, y = batch(step, rank)
        x, y = x.to(device), y.to(device)
        if step == WARM_UP:
            counted.payload, counted.wire = 0, 0.0
        dist.barrier()
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = F.cross_entropy(logits_of(ddp(x)), y)
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
        optimizer.step()
        losses.append(float(loss.detach()))
    measured = steps - WARM_UP
    payload, wire = counted.payload / measured, counted.wire / measured
    parameters = sum(p.numel() for p in net.parameters())
    dense = 4 * parameters * 2 * (world - 1) / world
    if function is None:
        payload, wire = 4.0 * parameters, dense
    mean = torch.tensor(statistics.fmean(losses[-10:]), device=device)
    dist.all_reduce(mean)
    times = sorted(times[WARM_UP:])
    p20, p50, p80 = (times[int(q * (len(times) - 1))] for q in (0.2, 0.5, 0.8))
    return {
        "model": model,
        "parameters": parameters,
        "hook": hook,
        "ranks": world,
        "backend": dist.get_backend(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "steps": steps,
        "payload_bytes": round(payload),
        "wire_bytes": round(wire),
        "ratio": round(dense / wire, 2),
        "p20_ms": round(p20, 3),
        "p50_ms": round(p50, 3),
        "p80_ms": round(p80, 3),
        "loss": round(float(mean) / world, 4),
        "ms_at_1gbit": round(p50 + 1e3 * 8 * wire / 1e9, 3),
        "ms_at_100mbit": round(p50 + 1e3 * 8 * wire / 1e8, 3),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def work(rank: int, world: int, store: str, models: list[str], hooks: list[str], steps: int, out: str) -> None:
    torch.set_num_threads(1)
    gpus = torch.cuda.device_count() >= world
    device = torch.device("cuda", rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if gpus else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=120),
    )
    counted = Counted(world)
    rows = []
    for model in models:
        for hook in hooks:
            rows.append(case(model, hook, rank, world, steps, device, counted))
            if rank == 0:
                print(model, hook, rows[-1]["p50_ms"], "ms", rows[-1]["loss"], flush=True)
    if rank == 0:
        with open(out, "w", newline="") as f:
            writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    dist.destroy_process_group()


def report(rows: list[dict[str, str]]) -> list[str]:
    head = ["model", "hook", "bytes a step", "fewer", "ms (p50)", "ms at 1 Gbit/s", "ms at 100 Mbit/s", "loss"]
    keys = ("model", "hook", "wire_bytes", "ratio", "p50_ms", "ms_at_1gbit", "ms_at_100mbit", "loss")
    return table(head, [[r[k] for k in keys] for r in rows], numeric=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--hooks", nargs="+", choices=list(HOOKS), default=list(HOOKS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/comm-hooks.csv"))
    args = parser.parse_args()
    if args.steps <= WARM_UP:
        parser.error(f"Expected `--steps` to be above {WARM_UP}, but got {args.steps}.")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        mp.spawn(
            work, (args.ranks, store, args.models, args.hooks, args.steps, str(args.out)), nprocs=args.ranks, join=True
        )
    with args.out.open(newline="") as f:
        lines = report(list(csv.DictReader(f)))
    print("\n".join(lines))
    args.out.with_suffix(".md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
