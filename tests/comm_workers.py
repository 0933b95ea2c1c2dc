"""What the processes of test_comm_hooks_ddp.py run: DDP over gloo, one line of results per check."""

from __future__ import annotations

import copy
import datetime
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as power_sgd
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_wrapper
from torch.nn.parallel import DistributedDataParallel as DDP

from dynfed_lightning import _comm_base
from dynfed_lightning.comm_hooks import LowRankState, QuantizedState, low_rank_hook, quantized_hook


class Net(nn.Module):
    """Convolution, norm and linear layers (two of one shape); one layer that the second rank does not use."""

    def __init__(self, skip: bool = False, norm: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.one, self.two = nn.Linear(128, 128), nn.Linear(128, 128)
        self.branch = nn.Linear(128, 128)
        self.out = nn.Linear(128, 10)
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        h = F.avg_pool2d(F.relu(self.norm(self.conv(x))), 2).flatten(1)
        h = F.relu(self.two(F.relu(self.one(h))))
        return self.out(h if self.skip else h + self.branch(h))


def batches(rank: int, count: int, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    """Ten noisy 8 x 8 images; other noise on every rank."""
    images = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    g = torch.Generator().manual_seed(100 + rank)
    labels = [torch.randint(10, (size,), generator=g) for _ in range(count)]
    return [(images[y] + 0.8 * torch.randn(size, 1, 8, 8, generator=g), y) for y in labels]


def wrapped(net: nn.Module, state: Any = None, hook: Any = None, **kwargs: Any) -> DDP:
    model = DDP(net, bucket_cap_mb=0.1, **kwargs)  # several buckets, which DDP rebuilds after the first step
    if hook is None and state is not None:
        hook = low_rank_hook if isinstance(state, LowRankState) else quantized_hook
    if hook is not None:
        model.register_comm_hook(state, hook)
    return model


def train(
    model: DDP, data: list[tuple[Tensor, Tensor]], lr: float = 0.05, each: Callable[[int], None] | None = None
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for i, (x, y) in enumerate(data):
        optimizer.zero_grad()
        F.cross_entropy(model(x.to(next(model.parameters()).dtype)).float(), y).backward()
        optimizer.step()
        if each is not None:
            each(i)


def fresh(**kwargs: Any) -> Net:
    torch.manual_seed(0)
    return Net(**kwargs)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().cpu().float().reshape(-1) for p in model.parameters()])


def same_everywhere(model: nn.Module) -> bool:
    """Whether all ranks have the same bits in their weights."""
    own = flat(model)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    return all(torch.equal(own, other) for other in found)


def loss(model: DDP) -> float:
    net = copy.deepcopy(model.module).eval()
    with torch.no_grad():
        x, y = (torch.cat(t) for t in zip(*batches(7, 20), strict=True))
        return float(F.cross_entropy(net(x), y))


def check_lossless(rank: int, world: int) -> dict[str, Any]:
    results = {}
    plain = wrapped(fresh())
    train(plain, batches(rank, 6))
    for name, state in (
        ("full rank", LowRankState(1000, min_compression_rate=0)),
        ("no bits", QuantizedState(None)),
        ("later", LowRankState(1, start_step=100)),
    ):
        model = wrapped(fresh(), state)
        train(model, batches(rank, 6))
        results[name] = float((flat(model) - flat(plain)).abs().max())
    return results


LOSSLESS_ENOUGH = ("rank 2", "rank 2 in 8 bits", "4 bits", "4 bits scattered", "2 bits rotated")
FORGETFUL = ("2 bits", "1 bit", "rank 1")


def check_training(rank: int, world: int) -> dict[str, Any]:
    """Loss after training, and whether all ranks ended with the same weights."""
    results = {}
    usual = {
        "plain": None,
        "rank 2": LowRankState(2),
        "rank 2 in 8 bits": LowRankState(2, bits=8),
        "4 bits": QuantizedState(4),
        "4 bits scattered": QuantizedState(4, exchange="scatter"),
        "2 bits rotated": QuantizedState(2, rotate=4096),
    }
    rough = {
        "slowly, plain": None,
        "2 bits": QuantizedState(2, min_size=0),
        "2 bits forgetful": QuantizedState(2, min_size=0, error_feedback=False, rounding="nearest"),
        "1 bit": QuantizedState(1, min_size=0),
        "1 bit forgetful": QuantizedState(1, min_size=0, error_feedback=False),
        "rank 1": LowRankState(1, min_compression_rate=0),
        "rank 1 forgetful": LowRankState(1, min_compression_rate=0, error_feedback=False, warm_start=False),
    }
    for states, lr, steps in ((usual, 0.05, 60), (rough, 0.02, 40)):
        for name, state in states.items():
            model = wrapped(fresh(), state)
            train(model, batches(rank, steps), lr=lr)
            results[name] = (loss(model), same_everywhere(model))
    return results


def check_bytes(rank: int, world: int) -> dict[str, Any]:
    """Counted bytes, and those that go through the collectives."""
    results = {}
    originals = {n: getattr(dist, n) for n in ("all_reduce", _comm_base._ALL_GATHER, "all_to_all_single")}
    seen = {"payload": 0, "wire": 0}

    def spy(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            t = args[0] if name == "all_reduce" else args[1]
            size = t.numel() * t.element_size()
            seen["payload"] += size
            if name == "all_reduce":
                seen["wire"] += 2 * (world - 1) * size // world
            elif name == "all_to_all_single":
                seen["wire"] += size - kwargs.get("input_split_sizes", args[3])[rank]
            else:
                seen["wire"] += (world - 1) * size
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(dist, name, spy(name))
    try:
        for label, state in (
            ("low rank", LowRankState(2)),
            ("bits", LowRankState(2, bits=4, exchange="scatter")),
            ("energy", LowRankState(8, energy=0.9, rank_every=2)),
            ("bfloat16", LowRankState(2, factor_dtype=torch.bfloat16)),
            ("gather", QuantizedState(3)),
            ("scatter", QuantizedState(3, exchange="scatter", start_step=1)),
        ):
            seen.update(payload=0, wire=0)
            model = wrapped(fresh(), state)
            train(model, batches(rank, 3))
            dense = 4 * sum(p.numel() for p in model.parameters())
            results[label] = (state.traffic.as_dict(), dict(seen), dense, state.last.as_dict(), state.step)
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return results


def check_against_torch(rank: int, world: int) -> dict[str, Any]:
    """Relative error of the first steps' mean gradient, with torch's PowerSGD and ours, same rank, one matrix."""
    u, v = (torch.linalg.qr(torch.randn(96, 64, generator=torch.Generator().manual_seed(i))).Q[:64] for i in (1, 2))
    target = u @ torch.diag(torch.logspace(0, -2, 64)) @ v.T
    noise = (1 if rank else -1) * torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    errors: dict[str, Any] = {}
    for name, state, hook in (
        ("torch", power_sgd.PowerSGDState(None, 4, start_powerSGD_iter=2, min_compression_rate=1), None),
        ("ours", LowRankState(4, start_step=2, min_compression_rate=1), low_rank_hook),
    ):
        layer = nn.Linear(64, 64, bias=False)
        model = DDP(layer)
        model.register_comm_hook(state, hook or power_sgd.powerSGD_hook)
        total, drift = torch.zeros(64, 64), []
        for step in range(62):
            model.zero_grad()
            (model(torch.eye(64)) * (target + noise).T).sum().backward()
            assert layer.weight.grad is not None
            if step >= 2:
                total += layer.weight.grad
                drift.append(float((total / (step - 1) - target).norm() / target.norm()))
        own = state.error_dict[0] if name == "torch" else next(iter(state._plans.values())).groups[0].memory
        errors[name] = (drift, float(own.norm()))
    return errors


def check_unused(rank: int, world: int) -> dict[str, Any]:
    """A layer that only the first rank uses, and accumulated gradients."""
    results = {}
    for name, state in (("rank", LowRankState(2)), ("bits", QuantizedState(4)), ("plain", None)):
        model = wrapped(fresh(skip=rank == 1), state, find_unused_parameters=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        data = batches(rank, 12)
        for i in range(0, 12, 2):
            optimizer.zero_grad()
            with model.no_sync():
                F.cross_entropy(model(data[i][0]), data[i][1]).backward()
            F.cross_entropy(model(data[i + 1][0]), data[i + 1][1]).backward()
            optimizer.step()
        moved = float((model.module.branch.weight - fresh().branch.weight).detach().abs().max())
        results[name] = (loss(model), same_everywhere(model), moved, state.step if state else 6)
    return results


def check_resume(rank: int, world: int) -> dict[str, Any]:
    """Training in two halves, with a state saved and loaded between them, against training in one."""
    results = {}
    data = batches(rank, 10)
    for name, make in (
        ("rank", lambda: LowRankState(2)),
        ("bits", lambda: QuantizedState(4, exchange="scatter")),
        ("forgotten", lambda: LowRankState(2)),
    ):
        whole = wrapped(fresh(), make())
        state = make()
        first = wrapped(fresh(), state)
        for model, part in ((whole, data), (first, data[:5])):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
            for x, y in part:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        saved = state.state_dict(first)
        later = make()
        net = copy.deepcopy(first.module)
        if name != "forgotten":
            later.load_state_dict(saved, net)
        second = wrapped(net, later)
        optimizer = torch.optim.SGD(second.parameters(), lr=0.02)
        for x, y in data[5:]:
            optimizer.zero_grad()
            F.cross_entropy(second(x), y).backward()
            optimizer.step()
        results[name] = (float((flat(second) - flat(whole)).abs().max()), later.step, same_everywhere(second))
    return results


def check_dtypes(rank: int, world: int) -> dict[str, Any]:
    """Models in half precision, and torch's wrapper around our hook."""
    results = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        for name, state in (("rank", LowRankState(2)), ("bits", QuantizedState(4))):
            model = wrapped(fresh(norm=False).to(dtype), state)
            train(model, batches(rank, 4), lr=0.01)
            results[f"{dtype} {name}"] = (bool(flat(model).isfinite().all()), same_everywhere(model))
    state = LowRankState(2)
    model = wrapped(fresh(), state, fp16_compress_wrapper(low_rank_hook))
    train(model, batches(rank, 4))
    results["wrapper"] = (bool(flat(model).isfinite().all()), same_everywhere(model))
    return results


def check_not_finite(rank: int, world: int) -> dict[str, Any]:
    """A loss that is NaN on one rank only: everyone's gradients say so, and the next step is as if it had not been."""
    results = {}
    data = batches(rank, 4)
    for name, make in (("rank", lambda: LowRankState(2)), ("bits", lambda: QuantizedState(2, rotate=1024))):
        ends = []
        for broken in (False, True):
            model = wrapped(fresh(norm=False), make())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
            poisoned = False
            for i, (x, y) in enumerate(data):
                if i == 3 and broken:
                    optimizer.zero_grad()
                    F.cross_entropy(model(x * (float("nan") if rank == 1 else 1.0)), y).backward()
                    poisoned = all(not p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            ends.append(flat(model))
        results[name] = (poisoned, bool(ends[1].isfinite().all()), float((ends[0] - ends[1]).abs().max()))
    return results


def check_sparse(rank: int, world: int) -> dict[str, Any]:
    """What the first backward pass of a sparse embedding raises; None if nothing."""
    results: dict[str, Any] = {}
    for name, state in (("rank", LowRankState(2, start_step=9)), ("bits", QuantizedState(4, min_size=0))):
        model = wrapped(nn.Sequential(nn.Embedding(100, 16, sparse=True), nn.Linear(16, 16)), state)
        results[name] = None
        try:
            model(torch.arange(8) + rank).sum().backward()
        except TypeError as e:
            results[name] = str(e)
    return results


def on_gpu(rank: int, world: int, folder: str) -> None:
    """Two ranks on one GPU, which gloo serves too (NCCL wants one each): the hook's own stream, against the CPU."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    for make in (lambda: LowRankState(2), lambda: LowRankState(4, energy=0.5), lambda: QuantizedState(4, rotate=1024)):
        ends = []
        for device in ("cpu", "cuda:0"):
            model = wrapped(fresh(norm=False).to(device), make())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
            for x, y in batches(rank, 4):
                optimizer.zero_grad()
                F.cross_entropy(model(x.to(device)), y.to(device)).backward()
                optimizer.step()
            assert same_everywhere(model)
            ends.append(flat(model))
        # Gradients differ in the last bit between devices, and a code that rounds the other way moves a weight a little.
        torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-3)
    dist.destroy_process_group()


class LitNet(L.LightningModule):
    """The network in Lightning, on 8 batches an epoch for all ranks together."""

    def __init__(self, steps_before: int = 0) -> None:
        super().__init__()
        self.net = fresh()
        self.steps_before = steps_before

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def train_dataloader(self) -> Any:
        x, y = (torch.cat(t) for t in zip(*batches(0, 8), strict=True))
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)


class Expect(L.Callback):
    """Raises in the processes if a state is not where it should be."""

    def __init__(self, state: Any, steps: int, residuals: bool) -> None:
        self.state, self.steps, self.residuals = state, steps, residuals

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert trainer.strategy._ddp_comm_state is self.state, "pickling made two of one state"
        assert self.state.step == self.steps, f"at step {self.state.step}, not {self.steps}"

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert same_everywhere(pl_module), "ranks differ in their weights"
        found = self.state.state_dict(pl_module)["parameters"]
        assert any("residual" in known for known in found.values()) == self.residuals
        assert all(name.startswith("net.") for name in found)


CHECKS = {n.removeprefix("check_"): f for n, f in list(globals().items()) if n.startswith("check_")}


def work(rank: int, world: int, folder: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=90)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timeout)
    for name in names:
        try:
            result = ("done", CHECKS[name](rank, world))
        except Exception:
            result = ("failed", traceback.format_exc())
        torch.save(result, Path(folder) / f"{name}.{rank}")
        if result[0] == "failed":  # the other rank waits for a collective that will not come: its time-out ends it
            break
    dist.destroy_process_group()
