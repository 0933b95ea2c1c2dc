"""What it takes to train a second model inside somebody else's loop: its random numbers, its gradients, its step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim import Optimizer


class RandomStream:
    """Random numbers of one's own: inside ``with stream.used():`` torch draws from it, outside nothing has been drawn.

    Args:
        seed: of the stream.
        device: where the model runs; on a GPU its generator is swapped too.
        state: what an earlier stream's `state` was, to go on from.
    """

    def __init__(self, seed: int, device: torch.device, state: Mapping[str, Tensor] | None = None) -> None:
        self._cuda = device if device.type == "cuda" else None
        self.state = {"cpu": torch.Generator().manual_seed(seed).get_state()}
        if self._cuda is not None:
            self.state["cuda"] = torch.Generator(device).manual_seed(seed).get_state()
        for kind in self.state.keys() & (state or {}).keys():
            self.state[kind] = (state or {})[kind].cpu()

    @contextmanager
    def used(self) -> Iterator[None]:
        """Draw from this stream for a while."""
        before = torch.get_rng_state(), None if self._cuda is None else torch.cuda.get_rng_state(self._cuda)
        torch.set_rng_state(self.state["cpu"])
        if self._cuda is not None:
            torch.cuda.set_rng_state(self.state["cuda"], self._cuda)
        try:
            yield
        finally:
            self.state["cpu"] = torch.get_rng_state()
            torch.set_rng_state(before[0])
            if self._cuda is not None and before[1] is not None:
                self.state["cuda"] = torch.cuda.get_rng_state(self._cuda)
                torch.cuda.set_rng_state(before[1], self._cuda)


def check_trainer(trainer: Any) -> Precision | None:
    """The precision plugin, None in the bare loop, after refusing what would train the peer wrongly."""
    strategy = getattr(trainer, "strategy", None)
    if strategy is None:
        return None
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise ValueError(
            f"Expected a single device or DDP under MutualDistillation, but got {type(strategy).__name__}: the peer is not "
            "part of the module, so a strategy that shards or wraps the module would leave it out."
        )
    plugin = trainer.precision_plugin
    if type(plugin) is not Precision and not isinstance(plugin, (MixedPrecision, HalfPrecision, DoublePrecision)):
        raise ValueError(
            f"Expected `precision` to be 32, 64, 16 or bf16, mixed or true, under MutualDistillation, but got {plugin.precision}."
        )
    return plugin


def world_size(trainer: Any) -> int:
    """Ranks; 1 in the bare loop."""
    return int(getattr(trainer, "world_size", 1))


@torch.no_grad()
def start_equal(tensors: Iterable[Tensor]) -> None:
    """Give every rank rank 0's values, in memory of its own: spawned processes share what was passed to them on the CPU, and
    Lightning undoes that for the module alone."""
    for tensor in tensors:
        if tensor.is_shared():
            tensor.data = tensor.data.clone()
        torch.distributed.broadcast(tensor.data, 0)


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """The mean over the ranks, in one collective; a parameter that no rank has a gradient of stays without."""
    used = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    flat = torch.cat(
        [used, *(torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters)]
    )
    torch.distributed.all_reduce(flat)
    used, flat = flat[: len(parameters)], flat[len(parameters) :] / torch.distributed.get_world_size()
    for p, count, grad in zip(parameters, used.tolist(), flat.split([p.numel() for p in parameters]), strict=True):
        if count:
            p.grad = grad.view_as(p).to(p.dtype)


def clip(trainer: Any, parameters: Sequence[nn.Parameter]) -> None:
    """The Trainer's own rule, on the peer's gradients by themselves."""
    value = getattr(trainer, "gradient_clip_val", None)
    if value is None:
        return
    if getattr(trainer, "gradient_clip_algorithm", None) == "value":
        nn.utils.clip_grad_value_(parameters, value)
    else:
        nn.utils.clip_grad_norm_(parameters, value)


def step(trainer: Any, optimizers: Sequence[Optimizer], factor: float = 1.0) -> None:
    """One step of optimisers that the Trainer does not know of; call it in ``on_before_optimizer_step``.

    Gradients are averaged over the ranks, unscaled if there is a gradient scaler (which then skips the step where they are not
    finite, and is updated by the Trainer, once for all), clipped by the Trainer's rule, and cleared after the step.

    Args:
        trainer: the Trainer, or the bare loop's.
        optimizers: with gradients.
        factor: the step is taken at so many times the learning rates.
    """
    parameters = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    if world_size(trainer) > 1:
        average_gradients(parameters)
    scaler = getattr(getattr(trainer, "precision_plugin", None), "scaler", None)
    if scaler is not None:
        for o in optimizers:
            scaler.unscale_(o)
    clip(trainer, parameters)
    for o in optimizers:
        rates = [g["lr"] for g in o.param_groups]
        for group, rate in zip(o.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        if scaler is None:
            o.step()
        else:
            scaler.step(o)
        for group, rate in zip(o.param_groups, rates, strict=True):
            group["lr"] = rate
        o.zero_grad()
