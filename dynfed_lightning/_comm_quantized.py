"""The mean of vectors over ranks, sent in few bits; and the state of `quantized_hook`, which does that to gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dynfed_lightning import ops
from dynfed_lightning._comm_base import CommState, Plan, Wire, check_integer, unless
from dynfed_lightning.seeds import derive_seed

EXCHANGES = ("auto", "gather", "scatter")
_ALIGN = 16  # bytes: where codes and scales may begin
_GATHER_UP_TO = 3  # ranks: beyond, gathering W - 1 payloads takes 1.5 times the bytes of scattering and more


def check_exchange(exchange: str) -> str:
    if exchange not in EXCHANGES:
        raise ValueError(f"Expected `exchange` to be one of {', '.join(EXCHANGES)}, but got {exchange!r}.")
    return exchange


def check_quantizer(bits: int | None, bucket: int, rounding: str) -> None:
    if bits is not None:
        check_integer("bits", bits, 1, 8)
    if isinstance(bucket, bool) or not isinstance(bucket, int) or not 8 <= bucket <= 65536 or bucket % 8:
        raise ValueError(f"Expected `bucket` to be a multiple of 8 from 8 to 65536, but got {bucket!r}.")
    if rounding not in ops.ROUNDINGS:
        raise ValueError(f"Expected `rounding` to be one of {', '.join(ops.ROUNDINGS)}, but got {rounding!r}.")


def _aligned(n: int) -> int:
    return -_ALIGN * (-n // _ALIGN)


class _Payload:
    """One message: the codes of a table of tensors, then their scales, in one vector of bytes."""

    def __init__(self, layout: ops.Layout) -> None:
        self.layout = layout
        self.scales_at = _aligned(layout.num_bytes)
        self.size = _aligned(self.scales_at + 4 * layout.num_scales)

    def parts(self, message: Tensor) -> tuple[Tensor, Tensor]:
        if not self.layout.num_scales:  # an empty tensor may lie where no float32 could
            return message[:0], torch.empty(0, device=message.device)
        end = self.scales_at + 4 * self.layout.num_scales
        return message[: self.layout.num_bytes], message[self.scales_at : end].view(torch.float32)

    def encode(self, values: Tensor, seed: int, rounding: str, message: Tensor) -> None:
        ops.quantize_pack_table(values, self.layout, seed, rounding, out=self.parts(message))

    def add(self, out: Tensor, messages: Sequence[Tensor], weight: float) -> None:
        """``out += weight * sum of messages``, in the order given."""
        packed, scales = zip(*(self.parts(m) for m in messages), strict=True)
        count = len(messages)
        ops.dequantize_accumulate_table(out, packed, scales, [self.layout] * count, [weight] * count)


class QuantizedMean:
    """The mean over ranks of a vector of which every rank holds its own, the same bits on all of them.

    Gathering, every rank sends its codes to all others. Scattering, rank s gets the s-th part of everyone's codes, takes the
    mean, quantises it again, and sends that to all (QSGD, Alistarh et al., NeurIPS 2017, has the first; the second is the
    parameter server of DoubleSqueeze, Tang et al., ICML 2019, one part on each rank): twice the rounding, but about
    ``2 * bits / 32`` of the bytes however many ranks there are, where gathering takes ``(W - 1) * bits / 32``.

    Args:
        tensors: ``(start, size)`` of each tensor in the vector; what lies between them is not sent. Each has its own buckets.
        bits, bucket, rounding: of `ops.quantize_pack_table`.
        exchange: ``"gather"``, ``"scatter"`` or ``"auto"``.
        world, rank: of the process group.
    """

    def __init__(
        self,
        tensors: Sequence[tuple[int, int]],
        bits: int,
        bucket: int,
        rounding: str,
        exchange: str,
        world: int,
        rank: int,
    ) -> None:
        self.rounding, self.world, self.rank = rounding, world, rank
        self.scatter = exchange == "scatter" or (exchange == "auto" and world > _GATHER_UP_TO)
        pieces = _cut(tensors, bucket, world) if self.scatter else [list(tensors)]
        self.shards = []
        offset = 0  # so that no two values of the vector share random bits
        for piece in pieces:
            offsets = []
            for _, size in piece:
                offsets.append(offset)
                offset = _aligned(offset + size)
            starts, sizes = [start for start, _ in piece], [size for _, size in piece]
            self.shards.append(_Payload(ops.Layout(sizes, bits, bucket, starts, offsets)))
        own = pieces[rank if self.scatter else 0]
        # Where this rank's part of the vector lies.
        self.span = slice(own[0][0], own[-1][0] + own[-1][1]) if own else slice(0, 0)

    def __call__(self, values: Tensor, seed: int, wire: Wire, server: Tensor | None = None) -> Tensor:
        """Exchange.

        Args:
            values: float32 ``[n]``, contiguous. Afterwards it holds this rank's error: the mean over ranks of `values` before is
                the result plus the mean of `values` after, up to rounding.
            seed: the same on all ranks.
            wire: the collectives.
            server: when scattering, float32 of the size of `span`: the error of the second rounding, from the last time and for
                the next, kept apart from `values`; None leaves it in `values`.

        Returns:
            float32 ``[n]``; zero where no tensor lies; NaN in every bucket where some rank has NaN or infinity.
        """
        message = torch.zeros(sum(s.size for s in self.shards), dtype=torch.uint8, device=values.device)
        parts = message.split([s.size for s in self.shards])
        for shard, part in zip(self.shards, parts, strict=True):
            shard.encode(values, derive_seed(seed, "send", self.rank), self.rounding, part)
        for shard, part in zip(self.shards, parts, strict=True):
            shard.add(values, [part], -1.0)
        mean = torch.zeros_like(values)
        if not self.scatter:
            self.shards[0].add(mean, wire.all_gather(message).unbind(), 1.0 / self.world)
            return mean
        own = self.shards[self.rank]
        own.add(mean, wire.all_to_all(message, [s.size for s in self.shards]).unbind(), 1.0 / self.world)
        part = mean[self.span]
        if server is not None:
            part += server
        # One size for all: an all-gather knows no other.
        reply = torch.zeros(max(s.size for s in self.shards), dtype=torch.uint8, device=values.device)
        own.encode(mean, derive_seed(seed, "reply", self.rank), self.rounding, reply)
        own.add(mean, [reply], -1.0)
        if server is None:
            values[self.span].add_(part, alpha=self.world)
        else:
            server.copy_(part)
        for shard, answer in zip(self.shards, wire.all_gather(reply).unbind(), strict=True):
            packed, scales = shard.parts(answer)
            ops.unpack_dequantize_table(packed, scales, shard.layout, out=mean)
        return mean


def _cut(tensors: Sequence[tuple[int, int]], bucket: int, world: int) -> list[list[tuple[int, int]]]:
    """The tensors in `world` parts of about the same number of values, one after the other, cut between buckets."""
    total = sum(size for _, size in tensors)
    shards: list[list[tuple[int, int]]] = [[] for _ in range(world)]
    shard = done = 0
    for start, size in tensors:
        at = 0
        while at < size:
            room = total * (shard + 1) // world - done
            if shard < world - 1 and room <= bucket // 2:
                shard += 1
                continue
            take = size - at
            if shard < world - 1 and take > room:
                take = min(take, max(bucket, (room + bucket // 2) // bucket * bucket))
            shards[shard].append((start + at, take))
            at += take
            done += take
    return shards


class QuantizedState(CommState):
    """What `quantized_hook` needs and remembers. Nothing in it needs a process group before the first backward pass.

    Args:
        bits: 1 to 8; None reduces gradients uncompressed. 1 or 2 want care with momentum: see below.
        error_feedback: each rank adds what its quantiser lost to its next gradient (Seide et al., Interspeech 2014;
            Karimireddy et al., ICML 2019): nothing is lost, but it comes late. Takes one float32 copy of the gradients.
        rounding: ``"nearest"``, ``"stochastic"`` or ``"eden"`` (`dynfed_lightning.ops`). By default ``"nearest"`` with error
            feedback (which needs a rounding whose error is never longer than what it rounds: stochastic rounding of 2 or 3 bits
            is not of that kind, and errors may grow without bound), ``"eden"`` after a rotation, else ``"stochastic"``, unbiased.
        rotate: rotate gradients before they are quantised, in blocks of this many values (a power of two from 16 to 8192, 4096
            is good): several times smaller errors at 2 to 4 bits, for the time that two rotations take; None does not.
        bucket: how many values share a scale: a multiple of 8, up to 65536. Small ones (64 takes half a bit a value for scales)
            follow gradients of uneven size better, and leave less to feed back.
        min_size: tensors of fewer values (biases, norms) travel uncompressed.
        exchange: ``"gather"`` (all ranks send to all), ``"scatter"`` (each rank reduces a part: bytes do not grow with the number
            of ranks, but gradients are rounded twice) or ``"auto"``: gather up to 3 ranks.
        start_step: reduce uncompressed for so many steps first.
        seed: for the random bits, which differ from rank to rank and step to step.
        process_group: the one that DDP uses; default: all ranks.

    Raises:
        ValueError: an argument outside of what is said above.

    At 1 or 2 bits the quantiser loses so much that what is fed back is many steps old, and momentum carries it further still. At
    small learning rates feedback makes up for much of the loss; at larger ones it can do harm: a small network after 60 steps of
    SGD, learning rate 0.05, momentum 0.9, had a loss of 0.17 uncompressed, of 1.37 with 1 bit and `bucket` 512, of 0.36 with
    `bucket` 64; without momentum there was no harm. Then: ``bucket=64``, or `rotate`, and a warm-up by `start_step`.

    With a loss scaler (``"16-mixed"``), what was fed back into a step that is then skipped is lost: see `comm_hooks`.

    NaN and infinity come out as NaN on every rank, in the whole bucket of values (with `rotate`, the block) where they are on
    any; what is remembered stays there as it was.
    """

    def __init__(
        self,
        bits: int | None = 4,
        *,
        error_feedback: bool = True,
        rounding: str | None = None,
        rotate: int | None = None,
        bucket: int = 512,
        min_size: int = 1024,
        exchange: str = "auto",
        start_step: int = 0,
        seed: int = 0,
        process_group: Any = None,
    ) -> None:
        super().__init__(start_step, error_feedback, seed, process_group)
        if rounding is None:
            rounding = "eden" if rotate is not None else "nearest" if error_feedback else "stochastic"
        check_quantizer(bits, bucket, rounding)
        if rotate is not None and (check_integer("rotate", rotate, 16, 8192) & (rotate - 1)):
            raise ValueError(f"Expected `rotate` to be a power of two, but got {rotate}.")
        if rounding == "eden" and rotate is None:
            raise ValueError("Expected `rotate` to be set with rounding 'eden', which is meant for rotated vectors.")
        self.bits, self.bucket, self.rounding, self.rotate = bits, bucket, rounding, rotate
        self.min_size = check_integer("min_size", min_size, 0, 2**62)
        self.exchange = check_exchange(exchange)

    @property
    def passive(self) -> bool:
        return self.bits is None

    def pays(self, gradient: Tensor) -> bool:
        """Whether codes and scales are smaller than the gradient itself."""
        assert self.bits is not None
        n = gradient.numel()
        size = ops.packed_size(n, self.bits) + 4 * ops.num_buckets(n, self.bucket)
        return n >= self.min_size and size < n * gradient.element_size()

    def _make_plan(self, params: list[Tensor], gradients: list[Tensor], index: int, wire: Wire) -> Plan:
        return _QuantizedPlan(self, params, gradients, index, wire)


class _QuantizedPlan:
    """A bucket: which tensors are quantised, and what was lost of them so far (rotated, where they are sent so)."""

    def __init__(
        self, state: QuantizedState, params: list[Tensor], gradients: list[Tensor], index: int, wire: Wire
    ) -> None:
        assert state.bits is not None
        self.state, self.params, self.index = state, params, index
        self.sizes = [g.numel() for g in gradients]
        self.chosen = [state.pays(g) for g in gradients]
        ends = torch.tensor([0, *self.sizes]).cumsum(0).tolist()
        self.rows = [(start, n) for start, n, yes in zip(ends, self.sizes, self.chosen, strict=False) if yes]
        self.holes = [(start, n) for start, n, yes in zip(ends, self.sizes, self.chosen, strict=False) if not yes]
        self.layout = ops.Layout([n for _, n in self.rows], 8, starts=[start for start, _ in self.rows])
        self.exchange = QuantizedMean(
            self.rows, state.bits, state.bucket, state.rounding, state.exchange, wire.world, wire.rank
        )
        self.memory: Tensor | None = None  # float32 [numel of the bucket]
        self.server: Tensor | None = None  # the second rounding's, of this rank's part
        known = [state.take(p).get("residual") for p in params]
        if state.error_feedback and self.rows:
            device = gradients[0].device
            self.memory = torch.zeros(sum(self.sizes), device=device)
            for (start, n), old in zip(
                self.rows, [k for k, y in zip(known, self.chosen, strict=True) if y], strict=True
            ):
                if old is not None:
                    self.memory[start : start + n].copy_(old.reshape(-1))
            self._turn(self.memory, 0)
            if self.exchange.scatter:
                self.server = torch.zeros_like(self.memory[self.exchange.span])

    def _turn(self, values: Tensor, step: int, inverse: bool = False) -> None:
        if self.state.rotate is not None:
            # What is remembered is rotated too, so with error feedback the rotation stays the same from step to step.
            seed = derive_seed(self.state.seed, "rotation", self.index, 0 if self.state.error_feedback else step)
            ops.rotate(values, self.state.rotate, seed, layout=self.layout, inverse=inverse, out=values)

    def __call__(self, gradients: list[Tensor], buffer: Tensor, wire: Wire) -> None:
        state = self.state
        plain = [g.reshape(-1) for g, yes in zip(gradients, self.chosen, strict=True) if not yes]
        rest = torch.cat(plain) if plain else None
        if rest is not None:
            wire.mean(rest)
        if self.rows:
            values = buffer.to(torch.float32, copy=True)
            if rest is not None:  # what is sent plainly leaves no error behind
                torch._foreach_zero_([values[start : start + n] for start, n in self.holes])
            self._turn(values, state.step)
            if self.memory is not None:
                values += self.memory
            before = self.server.clone() if self.server is not None else None
            mean = self.exchange(values, derive_seed(state.seed, "quantize", state.step, self.index), wire, self.server)
            if self.memory is not None:
                self._remember(values, mean, before)
            self._turn(mean, state.step, inverse=True)
            if buffer.dtype == torch.float16:
                mean.clamp_(-65504.0, 65504.0)  # rounded up, the largest would become infinite; NaN stays
            buffer.copy_(mean)
        if rest is not None:
            for g, piece in zip(plain, rest.split([g.numel() for g in plain]), strict=True):
                g.copy_(piece)

    def _remember(self, values: Tensor, mean: Tensor, before: Tensor | None) -> None:
        assert self.memory is not None
        if mean.device.type == "cpu" and math.isfinite(float(mean.sum())):
            self.memory = values
            return
        bad = ~torch.isfinite(mean)
        self.memory = unless(bad, values, self.memory)
        if self.server is not None and before is not None:
            self.server = unless(bad[self.exchange.span], self.server, before)

    def export(self) -> list[dict[str, Tensor]]:
        if self.memory is None:
            return [{} for _ in self.params]
        natural = self.memory.clone()
        if self.server is not None:
            # The part's owner sends on for all: as one of `world` ranks it has to add so many times what is missing.
            natural[self.exchange.span].add_(self.server, alpha=self.exchange.world)
        self._turn(natural, 0, inverse=True)
        pieces = natural.split(self.sizes)
        return [{"residual": p.clone()} if yes else {} for p, yes in zip(pieces, self.chosen, strict=True)]

    def scale(self, factor: float) -> None:
        for kept in (self.memory, self.server):
            if kept is not None:
                kept.mul_(factor)
