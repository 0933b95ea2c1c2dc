"""What it takes to train a second model inside somebody else's loop: its random numbers, its gradients, its step; and to run
the module's own step again with other weights."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric, MetricCollection


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


class _Step(nn.Module):
    """A module whose forward is another module's training step, for ``functional_call``; it remembers the buffers as the step
    left them, which may have put others in their place."""

    def __init__(self, module: nn.Module, step: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.step = module, step
        self.after: dict[str, Tensor] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.step(*args, **kwargs)
        self.after = {n: b.detach() for n, b in self.module.named_buffers()}
        return output


class StepAgain:
    """Runs a module's own ``training_step`` with other weights or buffers.

    In `silently`, what the step logs or prints goes nowhere, torchmetrics inside the module are not moved, torch's random
    numbers come from a stream of their own, and numpy's and Python's are put back: the module's own step neither sees nor
    notices it. Side effects of another kind (a list that the step appends to, a direct call of ``self.logger.experiment``)
    happen in every pass.

    Args:
        module: not changed.
        step: its own, unwrapped ``training_step``.
        random_stream: for the silent passes.
    """

    def __init__(self, module: L.LightningModule, step: Callable[..., Any], random_stream: RandomStream) -> None:
        self.module, self.random = module, random_stream
        self._step = _Step(module, step)
        kinds = (Metric, MetricCollection)
        parents = [m for m in module.modules() if not isinstance(m, kinds)]
        inside = {id(m) for k in module.modules() if isinstance(k, kinds) for m in k.modules()}
        self._metrics = [
            (parent, name, child, copy.deepcopy(child))
            for parent in parents
            if id(parent) not in inside
            for name, child in parent.named_children()
            if isinstance(child, kinds)
        ]

    def run(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Mapping[str, Tensor]
    ) -> tuple[Any, dict[str, Tensor]]:
        """What the step returns with `tensors`, parameters or buffers by name, in place of the module's own; and the buffers
        as it left them."""
        given = {f"module.{n}": t for n, t in tensors.items()}
        output = torch.func.functional_call(self._step, given, args, kwargs)
        after, self._step.after = self._step.after, {}
        return output, after

    def silently(self, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Mapping[str, Tensor]) -> Tensor | None:
        """The loss of such a run, None where the step returns none, and nothing else of it."""
        own = vars(self.module)
        names = ("log", "log_dict", "print")
        before = {n: own[n] for n in names if n in own}
        numpy_state, python_state = np.random.get_state(), random.getstate()
        try:
            for n in names:
                object.__setattr__(self.module, n, _nothing)
            for parent, name, _, shadow in self._metrics:
                setattr(parent, name, shadow)
            with self.random.used():
                output, _ = self.run(args, kwargs, tensors)
        finally:
            for parent, name, metric, shadow in self._metrics:
                setattr(parent, name, metric)
                shadow.reset()
            for n in names:
                own.pop(n, None)
            for n, value in before.items():
                object.__setattr__(self.module, n, value)
            np.random.set_state(numpy_state)
            random.setstate(python_state)
        return output.get("loss") if isinstance(output, Mapping) else output


def _nothing(*_: Any, **__: Any) -> None:
    """What is logged in a silent pass."""


class Swap:
    """Puts other values into tensors of a module for a while."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor]] = []  # the tensors, and what they held

    @torch.no_grad()
    def put(self, own: Tensor, value: Tensor) -> None:
        """`value` into `own`, until `put_back`."""
        self._kept.append((own, own.detach().clone()))
        own.data.copy_(value)

    @torch.no_grad()
    def put_back(self) -> None:
        """As it was."""
        for own, value in self._kept:
            own.data.copy_(value)
        self._kept = []

    def restore(self, module: nn.Module, state: dict[str, Any]) -> None:
        """In a state dict of the module that was taken meanwhile, put what its tensors hold otherwise."""
        kept = {id(own): value for own, value in self._kept}
        live: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
        live.update(module.named_buffers(remove_duplicate=False))
        for name in state:
            if name in live and id(live[name]) in kept:
                state[name] = kept[id(live[name])]


def check_trainer(trainer: Any, who: str = "MutualDistillation", what: str = "the peer is") -> Precision | None:
    """The precision plugin, None in the bare loop, after refusing what would train the peer wrongly."""
    strategy = getattr(trainer, "strategy", None)
    if strategy is None:
        return None
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise ValueError(
            f"Expected a single device or DDP under {who}, but got {type(strategy).__name__}: {what} not "
            "part of the module, so a strategy that shards or wraps the module would leave it out."
        )
    plugin = trainer.precision_plugin
    if type(plugin) is not Precision and not isinstance(plugin, (MixedPrecision, HalfPrecision, DoublePrecision)):
        raise ValueError(
            f"Expected `precision` to be 32, 64, 16 or bf16, mixed or true, under {who}, but got {plugin.precision}."
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


@torch.no_grad()
def mean_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The mean of each over the ranks, in one collective: the same bits on all of them."""
    flat = torch.cat([t.flatten() for t in tensors])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    return [f.view_as(t) for f, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]


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
