"""Data-parallel training with compressed gradients: bytes, time and loss of each hook, on ranks of this machine.

    python benchmarks/comm_hooks.py [--steps 60] [--ranks 2] [--models resnet encoder] [--hooks ..] [--timeout 300] [--out CSV]

Each rank is a process, on the CPU with gloo or, where there are enough GPUs, one GPU each with NCCL. Networks are trained on
synthetic data, from the same start, for the same steps, with plain DDP, torch's hooks and this package's. Bytes are those that
a rank hands to the collectives, counted there for all alike, and what it then has to send (a ring's share; see `Traffic`).
Processes of one machine talk through memory: a step's time is that of the training and the compression, with hardly any of the
network's. The two last columns add the network's at 1 Gbit/s and 100 Mbit/s, by calculation: bytes over bandwidth, nothing of it
hidden behind the backward pass. "loss" is the mean of the last ten steps and all ranks.

Every case has processes of its own, and `--timeout` seconds. Some cases cannot be run with gloo: torch's bf16 hook refuses it,
and torch's PowerSGD waits for collectives within the callbacks of others, which with several buckets outnumbers gloo's threads;
there it gets one bucket for all gradients. What is not run, or not to its end, is listed with its reason.

Writes a row per case as soon as it is there; prints a table and puts it beside the CSV (``.md``). Exits with 1 if a case failed.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import multiprocessing
import statistics
import sys
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

BF16, POWER_SGD = "torch bf16", "torch powerSGD, rank 4"
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
    BF16: lambda: (None, bf16_compress_hook),
    POWER_SGD: lambda: (_torch_power_sgd(4), power_sgd.powerSGD_hook),
    "low rank 4": lambda: (LowRankState(4, start_step=2), low_rank_hook),
    "low rank 4, 8-bit factors": lambda: (LowRankState(4, bits=8, start_step=2), low_rank_hook),
    "low rank up to 16, energy 0.8": lambda: (LowRankState(16, energy=0.8, start_step=2), low_rank_hook),
    "4 bits": lambda: (QuantizedState(4), quantized_hook),
    "2 bits, rotated": lambda: (QuantizedState(2, rotate=4096), quantized_hook),
    "1 bit": lambda: (QuantizedState(1), quantized_hook),
}


def refusal(hook: str, backend: str) -> str | None:
    """Why a hook cannot be run; None if it can."""
    if hook == BF16 and backend != "nccl":
        return f"torch's bf16_compress_hook takes NCCL, not {backend}"
    return None


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
    one_bucket = hook == POWER_SGD and dist.get_backend() == "gloo"
    ddp = DDP(
        net,
        device_ids=[device.index] if device.type == "cuda" else None,
        bucket_cap_mb=1024 if one_bucket else None,
    )
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


def work(rank: int, world: int, folder: str, model: str, hook: str, steps: int, timeout: float) -> None:
    torch.set_num_threads(1)
    gpus = on_gpus(world)
    device = torch.device("cuda", rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if gpus else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=max(timeout, 1.0)),
    )
    row = case(model, hook, rank, world, steps, device, Counted(world))
    if rank == 0:
        Path(folder, "row.json").write_text(json.dumps(row))
    dist.destroy_process_group()


def on_gpus(world: int) -> bool:
    return torch.cuda.device_count() >= world


def run(world: int, model: str, hook: str, steps: int, timeout: float) -> dict[str, Any]:
    """One case in processes of its own.

    Raises:
        RuntimeError: with the reason, where a process fails or dies, or the time is over; no process is left then.
    """
    with tempfile.TemporaryDirectory() as folder:
        end = time.monotonic() + timeout
        # Forked from a process that has imported everything, ranks start at once; CUDA does not survive a fork.
        method = "spawn" if on_gpus(world) else "forkserver"
        args = (world, folder, model, hook, steps, timeout)
        context = mp.start_processes(work, args, nprocs=world, join=False, start_method=method)
        try:
            while not context.join(timeout=max(0.0, min(1.0, end - time.monotonic()))):
                if time.monotonic() >= end:
                    raise RuntimeError(f"not done after {timeout:g} seconds")
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as e:
            raise RuntimeError(str(e).strip().splitlines()[-1]) from e
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return json.loads(Path(folder, "row.json").read_text())


def report(rows: list[dict[str, Any]]) -> list[str]:
    head = ["model", "hook", "bytes a step", "fewer", "ms (p50)", "ms at 1 Gbit/s", "ms at 100 Mbit/s", "loss"]
    keys = ("model", "hook", "wire_bytes", "ratio", "p50_ms", "ms_at_1gbit", "ms_at_100mbit", "loss")
    return table(head, [[str(r[k]) for k in keys] for r in rows], numeric=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--hooks", nargs="+", choices=list(HOOKS), default=list(HOOKS))
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds a case may take")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/comm-hooks.csv"))
    args = parser.parse_args()
    if args.steps <= WARM_UP:
        parser.error(f"Expected `--steps` to be above {WARM_UP}, but got {args.steps}.")
    if args.ranks < 2:
        parser.error(f"Expected `--ranks` to be 2 or more, but got {args.ranks}.")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    multiprocessing.set_forkserver_preload(["torch.distributed", "lightning", "dynfed_lightning.encoder"])
    backend = "nccl" if on_gpus(args.ranks) else "gloo"
    rows, missing, failed = [], [], False
    with args.out.open("w", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for model, hook in ((m, h) for m in args.models for h in args.hooks):
            reason = refusal(hook, backend)
            if reason is None:
                try:
                    rows.append(run(args.ranks, model, hook, args.steps, args.timeout))
                except RuntimeError as e:
                    reason, failed = str(e), True
            if reason is not None:
                missing.append(f"{model}, {hook}: not run: {reason}")
                print(missing[-1], flush=True)
                continue
            writer.writerow(rows[-1])
            f.flush()
            print(f"{model}, {hook}: {rows[-1]['p50_ms']} ms, loss {rows[-1]['loss']}", flush=True)
    lines = report(rows) + [line for m in missing for line in (m + ".", "")]
    print("\n".join(["", *lines]))
    args.out.with_suffix(".md").write_text("\n".join(lines))
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
