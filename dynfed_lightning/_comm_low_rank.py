"""The state of `low_rank_hook`: gradients as matrices of low rank, by one power iteration a step.

PowerSGD (Vogels, Karimireddy and Jaggi, NeurIPS 2019, arXiv 1905.13727, algorithms 1 and 2), in its terms: every rank holds
``M = gradient + e`` of n x m; ``P = M Q``; all-reduce P; ``P^ = orthogonalise(P)``; ``Q = M^T P^``; all-reduce Q; the gradient
becomes ``P^ Q^T``, and Q starts the next step. Here ``e = M - P^ (M^T P^)^T`` with the rank's own Q, which is algorithm 2 to the
letter; torch's hook subtracts the mean instead. The mean of e over ranks is the same either way, and so is every gradient, but a
rank's own e stays short, where the other collects all by which the ranks' data differ, for ever.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dynfed_lightning import ops
from dynfed_lightning._comm_base import CommState, Plan, Wire, check_flag, check_integer, unless
from dynfed_lightning._comm_quantized import QuantizedMean, check_exchange, check_quantizer
from dynfed_lightning.seeds import derive_seed

_FACTOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class LowRankState(CommState):
    """What `low_rank_hook` needs and remembers. Nothing in it needs a process group before the first backward pass.

    Args:
        rank: the rank of the factors, from 1; with `energy` the largest rank.
        energy: in (0, 1]: every `rank_every` steps each matrix gets the smallest rank that holds this share of its squared norm
            on every rank of the process group (`ops.truncated_svd` of each one's own gradient; the largest answer counts).
            That takes as long as the decompositions do. Default: `rank` for all.
        rank_every: how often ranks are chosen again, in steps.
        error_feedback: add what was lost to the next gradient (the paper's algorithm 2). Takes one float32 copy of the matrices.
        warm_start: begin the power iteration where the last step's ended; without, at random.
        min_compression_rate: a matrix is factored if this many times its factors are smaller than itself; else, like vectors, it
            is reduced as it is. 0 factors all.
        factor_dtype: in what the factors travel: float32, bfloat16 or float16. What rounding Q loses is fed back, what the sum
            over ranks rounds is not.
        bits: 1 to 8: quantise the factors, column by column, before they travel (8 costs next to nothing in accuracy, 4 little);
            what rounding Q loses is fed back like the rest. None does not.
        exchange: how quantised factors travel: see `QuantizedState`.
        start_step: reduce uncompressed for so many steps first: gradients change fastest in the beginning.
        seed: of the random starts, which are the same on all ranks.
        process_group: the one that DDP uses; default: all ranks.

    Raises:
        ValueError: an argument outside of what is said above.

    A matrix in which any rank has NaN or infinity comes out as NaN everywhere on every rank; what is remembered of it stays as it
    was. Convolutions are matrices of output channels x all else. Float64 gradients are treated in float64. With a loss scaler
    (``"16-mixed"``), what was fed back into a step that is then skipped is lost: see `comm_hooks`.
    """

    def __init__(
        self,
        rank: int = 4,
        *,
        energy: float | None = None,
        rank_every: int = 100,
        error_feedback: bool = True,
        warm_start: bool = True,
        min_compression_rate: float = 2.0,
        factor_dtype: torch.dtype = torch.float32,
        bits: int | None = None,
        exchange: str = "auto",
        start_step: int = 0,
        seed: int = 0,
        process_group: Any = None,
    ) -> None:
        super().__init__(start_step, error_feedback, seed, process_group)
        self.rank = check_integer("rank", rank, 1, 2**31)
        if energy is not None and not (type(energy) in (int, float) and 0 < energy <= 1):
            raise ValueError(f"Expected `energy` to be above 0 and at most 1, but got {energy!r}.")
        self.energy = energy
        self.rank_every = check_integer("rank_every", rank_every, 1, 2**62)
        self.warm_start = check_flag("warm_start", warm_start)
        if type(min_compression_rate) not in (int, float) or not 0 <= min_compression_rate < float("inf"):
            raise ValueError(
                f"Expected `min_compression_rate` to be a number of 0 or more, but got {min_compression_rate!r}."
            )
        self.min_compression_rate = min_compression_rate
        if factor_dtype not in _FACTOR_DTYPES:
            raise ValueError(f"Expected `factor_dtype` to be float32, bfloat16 or float16, but got {factor_dtype!r}.")
        if bits is not None and factor_dtype != torch.float32:
            raise ValueError("Expected one of `bits` and `factor_dtype`, but got both.")
        self.factor_dtype = factor_dtype
        check_quantizer(bits, 512, "nearest")
        self.bits = bits
        self.exchange = check_exchange(exchange)

    def limit(self, n: int, m: int) -> int:
        """The rank that an n x m matrix may have, 0 if factors do not pay."""
        rank = min(self.rank, n, m)
        if self.min_compression_rate:
            largest = math.ceil(n * m / ((n + m) * self.min_compression_rate)) - 1
            rank = min(rank, largest) if self.energy is not None else rank if rank <= largest else 0
        return rank

    def ranks(self, module: torch.nn.Module) -> dict[str, int]:
        """The ranks of the factored parameters at present, by name."""
        inner = module.module if isinstance(module, torch.nn.parallel.DistributedDataParallel) else module
        found = {id(p): r for plan in self._plans.values() for p, r in plan.ranks()}  # type: ignore[attr-defined]
        return {name: found[id(p)] for name, p in inner.named_parameters() if id(p) in found}

    def _make_plan(self, params: list[Tensor], gradients: list[Tensor], index: int, wire: Wire) -> Plan:
        return _LowRankPlan(self, params, gradients, index, wire)


class _Group:
    """The matrices of one shape and rank in a bucket, treated as one batch."""

    def __init__(self, members: list[int], n: int, m: int, rank: int) -> None:
        self.members, self.n, self.m, self.rank = members, n, m, rank
        self.q = torch.empty(0)  # [B, m, rank]
        self.memory: Tensor | None = None  # [B, n, m]

    def load(self, gradients: list[Tensor], dtype: torch.dtype) -> Tensor:
        """Gradient plus memory of all members: ``[B, n, m]``, in memory of its own."""
        matrices = torch.empty((len(self.members), self.n, self.m), dtype=dtype, device=self.q.device)
        for matrix, i in zip(matrices, self.members, strict=True):
            matrix.copy_(gradients[i].reshape(self.n, self.m))
        return matrices if self.memory is None else matrices.add_(self.memory)


class _LowRankPlan:
    """A bucket: which parameters are factored, in what batches, and what is remembered of them."""

    def __init__(
        self, state: LowRankState, params: list[Tensor], gradients: list[Tensor], index: int, wire: Wire
    ) -> None:
        self.state, self.params, self.index = state, params, index
        # Float64 is for those who check something: nothing is rounded to float32 then.
        exact = gradients[0].dtype == torch.float64
        self.dtype = torch.float64 if exact else torch.float32
        self.factor_dtype = torch.float64 if exact and state.factor_dtype == torch.float32 else state.factor_dtype
        self.device = gradients[0].device
        self.shapes = [(g.shape[0], g.numel() // g.shape[0]) if g.ndim > 1 and g.numel() else (0, 0) for g in gradients]
        self.limits = [state.limit(n, m) if n else 0 for n, m in self.shapes]
        self.plain = [i for i, limit in enumerate(self.limits) if not limit]
        known = [state.take(p) for p in params]
        starts = [k.get("warm_start") for k in known]
        current = [limit if q is None else min(limit, q.shape[1]) for limit, q in zip(self.limits, starts, strict=True)]
        self._arrange(current if state.energy is not None else self.limits, known, wire)

    def _arrange(self, ranks: list[int], known: list[dict[str, Tensor]], wire: Wire) -> None:
        """Batches for these ranks, with what is known of each parameter in them."""
        by_kind: dict[tuple[int, int, int], list[int]] = {}
        for i, rank in enumerate(ranks):
            if rank:
                by_kind.setdefault((*self.shapes[i], rank), []).append(i)
        self.groups = [_Group(members, *kind) for kind, members in by_kind.items()]
        for g in self.groups:
            g.q = self._random(g)
            if self.state.error_feedback:
                g.memory = torch.zeros((len(g.members), g.n, g.m), dtype=self.dtype, device=self.device)
            for b, i in enumerate(g.members):
                if (q := known[i].get("warm_start")) is not None:
                    columns = min(q.shape[1], g.rank)
                    g.q[b, :, :columns].copy_(q[:, :columns])
                if g.memory is not None and (residual := known[i].get("residual")) is not None:
                    g.memory[b].copy_(residual.reshape(g.n, g.m))
        # Both factors of a step lie in one vector, a row for each column of each factor, batch after batch.
        self.p_sizes = [len(g.members) * g.n * g.rank for g in self.groups]
        self.q_sizes = [len(g.members) * g.m * g.rank for g in self.groups]
        self.p_mean = self._mean_of([g.n for g in self.groups], self.p_sizes, wire)
        self.q_mean = self._mean_of([g.m for g in self.groups], self.q_sizes, wire)

    def _mean_of(self, lengths: list[int], sizes: list[int], wire: Wire) -> QuantizedMean | None:
        if self.state.bits is None:
            return None
        rows, start = [], 0
        for length, size in zip(lengths, sizes, strict=True):
            rows += [(start + at, length) for at in range(0, size, length)]
            start += size
        return QuantizedMean(rows, self.state.bits, 512, "nearest", self.state.exchange, wire.world, wire.rank)

    def _random(self, g: _Group) -> Tensor:
        """Random starts, the same on every rank: made on the CPU, since generators differ between kinds of GPU."""
        generator = torch.Generator()
        generator.manual_seed(derive_seed(self.state.seed, "start", self.state.step, self.index, g.members[0]))
        return torch.randn((len(g.members), g.m, g.rank), generator=generator).to(self.device, self.dtype)

    def __call__(self, gradients: list[Tensor], buffer: Tensor, wire: Wire) -> None:
        state = self.state
        if state.energy is not None and (state.step - state.start_step) % state.rank_every == 0:
            self._choose_ranks(gradients, wire)
        matrices = [g.load(gradients, self.dtype) for g in self.groups]
        plain = [gradients[i].reshape(-1) for i in self.plain]
        rest = torch.cat(plain) if plain else buffer.new_empty(0)

        # P = M Q. Orthogonal columns in Q leave the span of P as it is, and P well conditioned.
        factors = torch.empty(sum(self.p_sizes), dtype=self.dtype, device=self.device)
        for g, matrix, p in zip(self.groups, matrices, self._rows(factors, self.p_sizes, "n"), strict=True):
            if not state.warm_start:
                g.q = self._random(g)
            torch.bmm(_orthonormal(g.q).mT, matrix.mT, out=p)
        factors, _ = self._reduce(factors, self.p_mean, "P", rest, wire)
        for t, piece in zip(plain, rest.split([t.numel() for t in plain]), strict=True):
            t.copy_(piece)
        if not self.groups:
            return
        bad, bases = [], []
        for p in self._rows(factors, self.p_sizes, "n"):
            bad.append(~torch.isfinite(p).all(2).all(1)[:, None, None])
            bases.append(_orthonormal(torch.where(bad[-1], 0.0, p).mT))

        # Q = M^T P^; `own` is what the mean contains of this rank's.
        factors = torch.empty(sum(self.q_sizes), dtype=self.dtype, device=self.device)
        for matrix, base, q in zip(matrices, bases, self._rows(factors, self.q_sizes, "m"), strict=True):
            torch.bmm(base.mT, matrix, out=q)
        factors, own = self._reduce(factors, self.q_mean, "Q", factors.new_empty(0), wire)

        means, owns = self._rows(factors, self.q_sizes, "m"), self._rows(own, self.q_sizes, "m")
        for g, matrix, base, q, mine, no in zip(self.groups, matrices, bases, means, owns, bad, strict=True):
            no = no | ~torch.isfinite(q).all(2).all(1)[:, None, None]
            approximation = torch.bmm(base, torch.where(no, torch.nan, q))
            for i, matrix_out in zip(g.members, approximation, strict=True):
                out = gradients[i]
                if out.dtype == torch.float16:
                    matrix_out.clamp_(-65504.0, 65504.0)
                out.copy_(matrix_out.view(out.shape))
            if g.memory is not None:
                g.memory = unless(no, matrix.baddbmm_(base, mine, alpha=-1.0), g.memory)
            if state.warm_start:
                # A column of zeros (a layer without gradient) would stay zero: the last direction is the better start.
                lost = no | (q.abs().amax(2, keepdim=True) == 0)
                g.q = unless(lost.mT, q.mT.contiguous(), g.q)

    def _rows(self, flat: Tensor, sizes: list[int], side: str) -> list[Tensor]:
        """``[B, rank, n or m]`` of each batch."""
        return [
            piece.view(len(g.members), g.rank, getattr(g, side))
            for g, piece in zip(self.groups, flat.split(sizes), strict=True)
        ]

    def _reduce(
        self, factors: Tensor, quantized: QuantizedMean | None, name: str, rest: Tensor, wire: Wire
    ) -> tuple[Tensor, Tensor]:
        """The mean of factors, what it contains of this rank's own, and, in place, the mean of what is sent plainly."""
        if quantized is not None:
            wire.mean(rest)
            if not factors.numel():
                return factors, factors
            error = factors.to(torch.float32, copy=True)
            seed = derive_seed(self.state.seed, "factors", name, self.state.step, self.index)
            mean = quantized(error, seed, wire).to(self.dtype)
            return mean, factors - error
        # Divided before they are rounded: float16 has no room for sums.
        sent = (factors / wire.world).to(self.factor_dtype)
        own = sent.to(self.dtype) * wire.world if name == "Q" else factors
        if rest.dtype == sent.dtype and rest.numel():
            rest.div_(wire.world)
            both = torch.cat([rest, sent])
            wire.total(both)
            rest.copy_(both[: rest.numel()])
            return both[rest.numel() :].to(self.dtype), own
        wire.mean(rest)
        wire.total(sent)
        return sent.to(self.dtype), own

    def _choose_ranks(self, gradients: list[Tensor], wire: Wire) -> None:
        """The smallest ranks that hold the energy, agreed by all; 0 (a zero or broken matrix) leaves a rank as it is."""
        state = self.state
        wanted = [0] * len(self.params)
        now = [0] * len(self.params)
        for g in self.groups:
            matrices = g.load(gradients, self.dtype)
            finite = torch.isfinite(matrices).all(2).all(1)
            matrices = torch.where(finite[:, None, None], matrices, 0.0)
            limit = self.limits[g.members[0]]
            ranks = ops.truncated_svd(matrices, energy=state.energy, max_rank=limit, seed=state.seed).rank.tolist()
            for i, rank in zip(g.members, ranks, strict=True):
                wanted[i], now[i] = limit if rank < 0 else rank, g.rank
        agreed = torch.tensor(wanted, device=self.device)
        wire.maximum(agreed)
        ranks = [rank or old for rank, old in zip(agreed.tolist(), now, strict=True)]
        if ranks != now:
            self._arrange(ranks, self.export(), wire)

    def ranks(self) -> list[tuple[Tensor, int]]:
        return [(self.params[i], g.rank) for g in self.groups for i in g.members]

    def export(self) -> list[dict[str, Tensor]]:
        known: list[dict[str, Tensor]] = [{} for _ in self.params]
        for g in self.groups:
            for b, i in enumerate(g.members):
                known[i]["warm_start"] = g.q[b].clone()
                if g.memory is not None:
                    known[i]["residual"] = g.memory[b].reshape(-1).clone()
        return known

    def scale(self, factor: float) -> None:
        for g in self.groups:
            if g.memory is not None:
                g.memory.mul_(factor)


def _orthonormal(x: Tensor) -> Tensor:
    """``[B, n, r]`` -> orthonormal columns that span the same; Householder's, so that zero or dependent columns do no harm."""
    return torch.linalg.qr(x).Q
