"""What the gradient compression hooks share: their state, the collectives with every byte counted, and where they run.

The collectives of a hook are called in one order on every rank, on the thread that DDP calls the hook from. On a GPU they and
the arithmetic between them are queued on a stream of the hook's own, so that the backward pass goes on meanwhile; on the CPU the
hook returns when they are done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

# torch 2.13 deprecates the older name.
_ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


def check_integer(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"Expected `{name}` to be an integer from {low} to {high}, but got {value!r}.")
    return value


def check_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"Expected `{name}` to be True or False, but got {value!r}.")
    return value


@dataclass
class Traffic:
    """Bytes of one rank.

    Attributes:
        steps: synchronised backward passes (of gradient accumulation, only the last has one).
        payload: what was handed to the collectives, whatever they make of it.
        wire: what this rank has to send for it where the collectives are optimal in bandwidth (rings): of S bytes on W ranks
            ``2 (W-1)/W S`` for an all-reduce, ``(W-1) S`` for an all-gather, ``(W-1)/W S`` for an all-to-all.
        dense_payload, dense_wire: the same had DDP reduced the gradients as they are.
    """

    steps: int = 0
    payload: int = 0
    wire: int = 0
    dense_payload: int = 0
    dense_wire: int = 0

    @property
    def ratio(self) -> float:
        """How many times fewer bytes a rank sent than without the hook (1.0 where nothing had to travel)."""
        return self.dense_wire / self.wire if self.wire else 1.0

    def as_dict(self) -> dict[str, int]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def less(self, earlier: Traffic) -> Traffic:
        return Traffic(*(getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)))


class Wire:
    """The collectives of one process group. Each blocks the current stream (on the CPU: the thread) until its result is there."""

    def __init__(self, group: Any, traffic: Traffic) -> None:
        self.group = group
        self.world = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.traffic = traffic

    def dense(self, buffer: Tensor) -> None:
        """Count what plain DDP would have sent."""
        size = buffer.numel() * buffer.element_size()
        self.traffic.dense_payload += size
        self.traffic.dense_wire += 2 * (self.world - 1) * size // self.world

    def mean(self, t: Tensor) -> None:
        """All-reduce `t` in place. It is divided first, as DDP does: sums of float16 overflow."""
        self.total(t.div_(self.world))

    def total(self, t: Tensor) -> None:
        """All-reduce `t` in place, undivided."""
        self._reduce(t, dist.ReduceOp.SUM)

    def maximum(self, t: Tensor) -> None:
        self._reduce(t, dist.ReduceOp.MAX)

    def _reduce(self, t: Tensor, op: Any) -> None:
        if t.numel():
            size = t.numel() * t.element_size()
            self._count(size, 2 * (self.world - 1) * size // self.world)
            dist.all_reduce(t, op=op, group=self.group)

    def all_gather(self, t: Tensor) -> Tensor:
        """uint8 ``[n]`` on every rank -> ``[world, n]`` in the order of ranks."""
        out = t.new_empty((self.world, t.numel()))
        self._count(t.numel(), (self.world - 1) * t.numel())
        getattr(dist, _ALL_GATHER)(out.view(-1), t, group=self.group)
        return out

    def all_to_all(self, t: Tensor, sizes: Sequence[int]) -> Tensor:
        """uint8 pieces of `sizes` bytes, the k-th for rank k -> what all ranks sent to this one, ``[world, sizes[rank]]``."""
        own = sizes[self.rank]
        out = t.new_empty((self.world, own))
        self._count(t.numel(), t.numel() - own)
        dist.all_to_all_single(out.view(-1), t, [own] * self.world, list(sizes), group=self.group)
        return out

    def _count(self, payload: int, wire: int) -> None:
        self.traffic.payload += payload
        self.traffic.wire += wire


class Plan(Protocol):
    """What a state knows of one bucket of parameters."""

    params: list[Tensor]

    def __call__(self, gradients: list[Tensor], buffer: Tensor, wire: Wire) -> None: ...

    def export(self) -> list[dict[str, Tensor]]:
        """What is kept of each parameter, so that another plan can go on from there."""
        ...

    def scale(self, factor: float) -> None:
        """Multiply what is kept of gradients."""
        ...


class CommState:
    """The part of a hook's state that does not depend on the compression.

    It is made before there are processes and process groups, and can be pickled (for ``ddp_spawn``); what it remembers of
    gradients cannot, and travels by `state_dict`. It is kept by parameter: DDP may put them into other buckets.

    Attributes:
        step: how many synchronised backward passes there have been.
        traffic: the bytes of all of them (`Traffic`).
        last: the bytes of the last complete one.
    """

    def __init__(self, start_step: int, error_feedback: bool, seed: int, process_group: Any) -> None:
        self.start_step = check_integer("start_step", start_step, 0, 2**62)
        self.error_feedback = check_flag("error_feedback", error_feedback)
        self.seed = check_integer("seed", seed, 0, 2**63 - 1)
        self.process_group = process_group
        self.step = 0
        self.traffic = Traffic()
        self.last = Traffic()
        self.reset()

    def reset(self) -> None:
        """Forget what is remembered of gradients, and the parameters; bytes and steps stay."""
        self._before = Traffic(**self.traffic.as_dict())
        self._plans: dict[tuple[int, ...], Plan] = {}
        self._kept: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}  # by id of the parameter that comes first
        self._streams: dict[torch.device, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None:
            raise TypeError(
                "Expected a state to be pickled or copied to have no `process_group`, since none can be: leave it out to use "
                "all ranks, or create the state in each process."
            )
        return {k: v for k, v in self.__dict__.items() if k not in ("_plans", "_kept", "_streams", "_before")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.reset()

    def _make_plan(self, params: list[Tensor], gradients: list[Tensor], index: int, wire: Wire) -> Plan:
        raise NotImplementedError

    def plan(self, bucket: dist.GradBucket, gradients: list[Tensor], wire: Wire) -> Plan:
        """The plan of these parameters; what was remembered of them in other buckets moves into a new one."""
        params = list(bucket.parameters())
        key = tuple(id(p) for p in params)
        if key not in self._plans:
            self._drop(key)
            self._plans[key] = self._make_plan(params, gradients, bucket.index(), wire)
        return self._plans[key]

    def _drop(self, ids: Sequence[int]) -> None:
        """Retire every plan that holds one of these parameters, and keep what it knows."""
        for key in [k for k in self._plans if not set(k).isdisjoint(ids)]:
            plan = self._plans.pop(key)
            self._kept |= {id(p): (p, known) for p, known in zip(plan.params, plan.export(), strict=True)}

    def take(self, param: Tensor) -> dict[str, Tensor]:
        """What is known of a parameter from before; asked once."""
        return self._kept.pop(id(param), (param, {}))[1]

    def rescale(self, factor: float) -> None:
        """Multiply what is remembered of gradients: for a loss scale that changed by `factor`."""
        for plan in self._plans.values():
            plan.scale(factor)
        for _, known in self._kept.values():
            if "residual" in known:
                known["residual"] = known["residual"] * factor

    @torch.no_grad()
    def state_dict(self, module: nn.Module) -> dict[str, Any]:
        """What to write to a checkpoint. **Every rank has to call it**: residuals are averaged over the ranks.

        The mean of the ranks' residuals is all that the mean gradient depends on, so a checkpoint grows by one model and not by
        one per rank, and training may go on with another number of ranks. With low rank factors that is exact (up to rounding);
        a quantiser goes on from the same error, but not with the same bits.

        Args:
            module: the model (wrapped by DDP or not) whose parameters give the names.

        Returns:
            ``step``, ``traffic`` and ``parameters``: by name, tensors on the CPU. `torch.load` reads it with
            ``weights_only=True``.
        """
        all_known = {i: known for i, (_, known) in self._kept.items()}
        for plan in self._plans.values():
            all_known |= {id(p): known for p, known in zip(plan.params, plan.export(), strict=True)}
        found = {}
        for name, param in _named(module):
            if known := all_known.get(id(param)):
                found[name] = {k: v.detach().to("cpu", copy=True) for k, v in known.items()}
        residuals = [known["residual"] for known in found.values() if "residual" in known]
        group = self.process_group
        if residuals and dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
            device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
            for residual in residuals:
                mean = residual.to(device).div_(dist.get_world_size(group))
                dist.all_reduce(mean, group=group)
                residual.copy_(mean)
        return {"step": self.step, "traffic": self.traffic.as_dict(), "parameters": found}

    def load_state_dict(self, state: dict[str, Any], module: nn.Module) -> None:
        """Go on from `state_dict`.

        Args:
            state: what it returned.
            module: the model, with the same names and shapes.

        Raises:
            ValueError: not such a state, or of another model.
        """
        if not isinstance(state, dict) or not {"step", "traffic", "parameters"} <= state.keys():
            raise ValueError(f"Expected `state` to be what `state_dict` returned, but got {type(state).__name__}.")
        parameters = _checked_dict("state['parameters']", state["parameters"])
        params = dict(_named(module))
        kept: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}
        for name, known in parameters.items():
            param = params.get(name)
            if param is None:
                raise ValueError(f"Expected `state` to be of this module, but it has no parameter {name!r}.")
            kept[id(param)] = (param, _checked_memory(name, known, param))
        entries = _checked_dict("state['traffic']", state["traffic"])
        if wrong := sorted(set(map(str, entries)) ^ {f.name for f in fields(Traffic)}):
            raise ValueError(f"Expected `state['traffic']` to have the entries of Traffic, but {wrong} differ.")
        traffic = Traffic(**{k: check_integer(f"state['traffic'][{k!r}]", v, 0, 2**62) for k, v in entries.items()})
        step = check_integer("state['step']", state["step"], 0, 2**62)
        self.reset()
        self.step, self.traffic, self._kept = step, traffic, kept
        self._before = Traffic(**traffic.as_dict())

    def run(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Reduce a bucket: the body of a hook.

        Raises:
            TypeError: gradients that are sparse or not floating point; from the first step on, `start_step` or not.
        """
        buffer = bucket.buffer()
        # DDP gives a sparse gradient a bucket of its own, without `gradients()`: passed over, ranks would drift apart.
        if buffer.layout != torch.strided:
            layout = str(buffer.layout).removeprefix("torch.")
            raise TypeError(f"Expected gradients to be dense, but got {layout}: `sparse=False` in the embedding.")
        if not buffer.dtype.is_floating_point:
            raise TypeError(f"Expected gradients to be floating point, but got {buffer.dtype}.")
        group = self.process_group if self.process_group is not None else dist.group.WORLD
        wire = Wire(group, self.traffic)

        def work() -> None:
            wire.dense(buffer)
            if wire.world == 1:
                return
            if self.step < self.start_step or self.passive:
                wire.mean(buffer)
            else:
                gradients = list(bucket.gradients())
                self.plan(bucket, gradients, wire)(gradients, buffer, wire)

        future = self._launch(buffer, work)
        if bucket.is_last():
            self.step += 1
            self.traffic.steps += 1
            self.last = self.traffic.less(self._before)
            self._before = Traffic(**self.traffic.as_dict())
        return future

    @property
    def passive(self) -> bool:
        """Whether there is nothing to compress with."""
        return False

    def _launch(self, buffer: Tensor, work: Callable[[], None]) -> torch.futures.Future[Tensor]:
        if buffer.device.type != "cuda":
            future: torch.futures.Future[Tensor] = torch.futures.Future()
            with torch.no_grad():
                work()
            future.set_result(buffer)
            return future
        stream = self._streams.get(buffer.device)
        if stream is None:
            stream = self._streams[buffer.device] = torch.cuda.Stream(buffer.device)
        stream.wait_stream(torch.cuda.current_stream(buffer.device))
        future = torch.futures.Future(devices=[buffer.device])
        with torch.cuda.stream(stream), torch.no_grad():
            work()
            future.set_result(buffer)  # records an event on `stream`: whoever waits for the future waits for it
        return future


def unless(bad: Tensor, new: Tensor, kept: Tensor) -> Tensor:
    """`new`, but `kept` where `bad` says so (it broadcasts). A GPU is not waited for."""
    if bad.device.type == "cpu" and not bool(bad.any()):
        return new
    return torch.where(bad, kept, new)


def _checked_dict(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"Expected `{name}` to be a dict, but got {type(value).__name__}.")
    return value


def _checked_memory(name: str, known: Any, param: Tensor) -> dict[str, Tensor]:
    """What a checkpoint has of a parameter, if it fits its shape."""
    known = dict(_checked_dict(f"state['parameters'][{name!r}]", known))
    for kind, value in known.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ValueError(f"Expected the {kind} of {name!r} to be a tensor of floats, but got {value!r:.60}.")
    if (residual := known.get("residual")) is not None and residual.numel() != param.numel():
        raise ValueError(
            f"Expected the residual of {name!r} to have {param.numel()} values, but got {residual.numel()}."
        )
    if (start := known.get("warm_start")) is not None:
        rows = param.numel() // param.shape[0] if param.ndim > 1 and param.numel() else 0
        if start.ndim != 2 or start.shape[0] != rows or not start.shape[1]:
            raise ValueError(
                f"Expected the warm_start of {name!r} to have {rows} rows and one column or more, but got shape "
                f"{tuple(start.shape)}."
            )
    return known


def _named(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    inner = module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module
    return list(inner.named_parameters())
