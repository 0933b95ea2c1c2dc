"""Ranks for the tests of the communication hooks: threads of this process, or processes that speak gloo."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from dynfed_lightning import _comm_base


class FakeBucket:
    """What DDP hands to a hook: parameters, and their gradients in one buffer."""

    def __init__(
        self, params: Sequence[Tensor], gradients: Sequence[Tensor], index: int = 0, last: bool = True
    ) -> None:
        self.params, self.at, self.last = list(params), index, last
        self.flat = torch.cat([g.reshape(-1) for g in gradients])

    def buffer(self) -> Tensor:
        return self.flat

    def gradients(self) -> list[Tensor]:
        pieces = self.flat.split([p.numel() for p in self.params])
        return [piece.view(p.shape) for piece, p in zip(pieces, self.params, strict=True)]

    def parameters(self) -> list[Tensor]:
        return self.params

    def index(self) -> int:
        return self.at

    def is_last(self) -> bool:
        return self.last


class ThreadWorld:
    """A process group of threads. Sums are taken in the order of ranks, so all ranks get the same bits."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.slots: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)
        self.local = threading.local()

    def swap(self, value: Any) -> list[Any]:
        self.slots[self.local.rank] = value
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        results: list[Any] = [None] * self.size
        failures: list[BaseException] = []

        def thread(rank: int) -> None:
            self.local.rank = rank
            try:
                results[rank] = work(rank)
            except BaseException as e:
                failures.append(e)
                self.barrier.abort()

        threads = [threading.Thread(target=thread, args=(r,)) for r in range(self.size)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        self.barrier.reset()
        if failures:
            raise next((f for f in failures if not isinstance(f, threading.BrokenBarrierError)), failures[0])
        return results


class ThreadWire(_comm_base.Wire):
    def __init__(self, world: ThreadWorld, traffic: _comm_base.Traffic) -> None:
        self.threads, self.traffic = world, traffic
        self.world, self.rank = world.size, world.local.rank

    def _reduce(self, t: Tensor, op: Any) -> None:
        if t.numel():
            stack = torch.stack(self.threads.swap(t.clone()))
            t.copy_(stack.amax(0) if op == torch.distributed.ReduceOp.MAX else stack.sum(0))

    def all_gather(self, t: Tensor) -> Tensor:
        return torch.stack(self.threads.swap(t.clone()))

    def all_to_all(self, t: Tensor, sizes: Sequence[int]) -> Tensor:
        return torch.stack([other.split(list(sizes))[self.rank] for other in self.threads.swap(t.clone())])


class Ranks:
    """One state per rank, and steps of all of them at once."""

    def __init__(self, make: Callable[[], Any], world: int, monkeypatch: Any) -> None:
        self.world = ThreadWorld(world)
        self.states = [make() for _ in range(world)]
        monkeypatch.setattr(_comm_base, "Wire", lambda group, traffic: ThreadWire(self.world, traffic))

    def step(
        self, params: Sequence[nn.Parameter], gradients: Sequence[Sequence[Tensor]], split: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Reduce ``gradients[rank]`` in buckets of `split` parameters; the result, the same bits on all ranks."""

        def work(rank: int) -> list[Tensor]:
            out, start = [], 0
            sizes = list(split or [len(params)])
            for i, size in enumerate(sizes):
                rows = slice(start, start + size)
                bucket = FakeBucket(params[rows], gradients[rank][rows], i, last=i == len(sizes) - 1)
                result = self.states[rank].run(bucket).wait()
                assert result is bucket.buffer()
                out += bucket.gradients()
                start += size
            return out

        results = self.world.run(work)
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert a.shape == b.shape and a.dtype == b.dtype
                assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
        return results[0]

    def residuals(self, module: nn.Module) -> dict[str, Tensor]:
        """The mean of what the ranks remember, by name."""
        dicts = [s.state_dict(module)["parameters"] for s in self.states]
        names = [n for n, known in dicts[0].items() if "residual" in known]
        return {n: torch.stack([d[n]["residual"] for d in dicts]).mean(0) for n in names}


def processes(target: Callable[..., None], world: int, *args: Any, timeout: float = 240.0) -> None:
    """``target(rank, world, *args)`` in `world` processes; an error where one fails or the time is over."""
    context = mp.start_processes(target, (world, *args), nprocs=world, join=False, start_method="spawn")
    try:
        end = time.monotonic() + timeout
        while not context.join(timeout=1.0):
            if time.monotonic() > end:
                raise TimeoutError(f"{target.__name__} took longer than {timeout} seconds.")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()
