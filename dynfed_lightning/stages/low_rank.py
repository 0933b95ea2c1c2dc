"""Send matrices as the few singular triples that hold most of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dynfed_lightning import ops
from dynfed_lightning.errors import MalformedPayloadError
from dynfed_lightning.schedules import Constant, Cosine, Exponential, Linear, Schedule
from dynfed_lightning.seeds import derive_seed
from dynfed_lightning.stages.base import CodecContext, Meta, Part, Stage, Table

FEDKD = Linear(0.95, 0.98)  # the paper's threshold T(t), eq. 9
_RUNS = re.compile(r"(?:(?:-|0|[1-9][0-9]{0,8})(?:\*[1-9][0-9]{0,8})?(?:,(?!$)|$))*")
_MAX = torch.finfo(torch.float32).max


class LowRank(Stage):
    """Truncated singular value decomposition by energy (FedKD, Wu et al., Nature Communications 2022, eq. 8-9).

    A tensor of two or more dimensions is read as a matrix of P rows, its first dimension, and Q columns, all others (a
    convolution: out x in*kh*kw), and sent as its first ``K = min{K : sum_{j<=K} s_j^2 >= energy * sum_j s_j^2}`` singular
    values and vectors, so that the squared error is at most ``(1 - energy)`` of the tensor's. Of a matrix of zeros nothing
    is sent. A tensor stays whole, and so exact, where factors would be no smaller, ``K (P + Q + 1) >= P Q``: vectors, flat
    spectra, ``energy`` 1; likewise integers and tensors marked raw.

    The factors are rows of singular vectors, ``[K, P]`` and ``[K, Q]``, which later stages compress further
    (``Codec(LowRank(0.95), Quantize(8))``), and K singular values, raw float32. Vectors have the tensor's dtype, float32 for
    float64 tensors. What is cut off is lost: inside `ErrorFeedback` it comes back in later rounds.

    Neighbours: ATOMO (Wang et al., NeurIPS 2018) samples triples, which is unbiased; PowerSGD (Vogels et al., NeurIPS 2019)
    takes a fixed rank from one power iteration, here ``LowRank(1.0, max_rank=r)`` within `ErrorFeedback`.

    Args:
        energy: share of each matrix's squared Frobenius norm to keep, above 0 and at most 1, or a `Schedule` of it; None,
            FedKD's, from 0.95 in the first to 0.98 in the last of a known number of rounds.
        max_rank: send at most so many triples, even where they do not hold `energy`; None: no such limit.
        min_size: tensors with fewer elements stay whole.

    Raises:
        ValueError: an argument outside what is said above; in a round, a schedule's value that is.

    Example:
        >>> from dynfed_lightning.codec import Codec, Schema
        >>> update = {"w": torch.outer(torch.arange(40.0), torch.arange(30.0)), "b": torch.ones(30)}
        >>> codec = Codec(LowRank(0.95))
        >>> decoded = codec.decode_full(codec.encode(update), Schema.of(update))
        >>> decoded.ranks, decoded.energy
        ({'w': 1, 'b': None}, 0.95)
    """

    def __init__(self, energy: float | Schedule | None = None, max_rank: int | None = None, min_size: int = 1) -> None:
        # None and not the schedule itself as the default: a configuration file can say null.
        energy = FEDKD if energy is None else energy
        known = (Constant, Cosine, Exponential, Linear)  # the ends of these can be had without knowing T
        ends = (energy(0, 2), energy(1, 2)) if isinstance(energy, known) else () if callable(energy) else (energy,)
        for value in ends:
            if not _is_share(value):
                raise ValueError(f"Expected `energy` to be above 0 and at most 1, but got {energy!r}.")
        for name, number in (("max_rank", max_rank), ("min_size", min_size)):
            if (type(number) is not int or number < 1) and not (name == "max_rank" and number is None):
                raise ValueError(f"Expected `{name}` to be a positive integer, but got {number!r}.")
        self.energy = energy
        self.max_rank = max_rank
        self.min_size = min_size
        self.lossless = max_rank is None and not callable(energy) and energy == 1

    @property
    def wire_name(self) -> str:
        return "lowrank"

    def check_rounds(self, num_rounds: int | None) -> None:
        for t in {0, (num_rounds or 1) - 1}:
            self._share(t, num_rounds)

    def encode(self, table: Table, ctx: CodecContext) -> tuple[Table, Meta]:
        energy = self._share(ctx.round, ctx.num_rounds)
        seed = derive_seed("low rank", ctx.seed, ctx.round)
        groups: dict[tuple[int, int, torch.dtype], list[int]] = {}  # of equal shape: one decomposition each
        for i, part in enumerate(table.parts):
            if _most(part) and part.numel >= self.min_size and (energy < 1 or self.max_rank is not None):
                groups.setdefault((*_matrix(part), part.dtype), []).append(i)
        factors: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for (p, q, dtype), members in groups.items():
            views = [table.tensors[i].reshape(p, q) for i in members]
            stack = torch.stack(views) if len(views) > 1 else views[0][None]
            found = self._decompose(stack, energy, _most(table.parts[members[0]]), seed)
            for i, uvs in zip(members, found, strict=True):
                if uvs is not None:
                    factors[i] = uvs[0].to(_vectors(dtype)), uvs[1], uvs[2].to(_vectors(dtype))
        runs = to_runs(factors[i][1].numel() if i in factors else None for i, p in enumerate(table.parts) if _most(p))
        rows: list[Tensor] = []
        for i, tensor in enumerate(table.tensors):
            rows += factors.get(i, (tensor,))
        return Table(_plan(table.parts, runs).rows, rows), [_short(energy), runs]

    def _decompose(
        self, stack: Tensor, energy: float, most: int, seed: int
    ) -> list[tuple[Tensor, Tensor, Tensor] | None]:
        """The rows u, s, v of each matrix of `stack` ``[B, P, Q]``; None for one that is to stay whole."""
        found: list[tuple[Tensor, Tensor, Tensor] | None] = [None] * len(stack)
        cap = self.max_rank if self.max_rank is not None and self.max_rank <= most else None
        try:
            if energy < 1:
                _take(
                    found, range(len(stack)), ops.truncated_svd(stack, energy=energy, max_rank=cap or most, seed=seed)
                )
            left = [b for b, uvs in enumerate(found) if uvs is None]
            if cap is not None and left:
                _take(found, left, ops.truncated_svd(stack[left], rank=cap, seed=seed))
        except ValueError:
            norms = torch.linalg.vector_norm(stack.flatten(1), dim=1, dtype=torch.float64)
            fit = (norms <= _MAX).nonzero()[:, 0].tolist()
            if len(fit) == len(stack):
                raise
            # Too large for float32, or NaN or infinity, which the codec refuses and names when it comes to them.
            found = [None] * len(stack)
            for b, uvs in zip(fit, self._decompose(stack[fit], energy, most, seed) if fit else (), strict=True):
                found[b] = uvs
        return found

    def layout(self, parts: tuple[Part, ...], meta: Meta) -> tuple[Part, ...]:
        return _plan(parts, rank_text(meta)).rows

    def check(self, inner: Table, parts: tuple[Part, ...], meta: Meta) -> None:
        rest = iter(inner.tensors)
        for part, rank in zip(parts, self.ranks(parts, meta), strict=True):
            next(rest)
            if rank is not None:
                s, _ = next(rest), next(rest)
                if rank and float(s.min()) < 0:
                    raise MalformedPayloadError(f"Expected no negative singular value of {part.name!r}, but got one.")

    def decode(self, inner: Table, parts: tuple[Part, ...], meta: Meta) -> list[Tensor]:
        rest = iter(inner.tensors)
        out: list[Tensor] = []
        for part, rank in zip(parts, self.ranks(parts, meta), strict=True):
            first = next(rest)
            out.append(first if rank is None else _product(part, first, next(rest), next(rest)))
        return out

    def steps(
        self, steps: Sequence[Tensor | None], inner: Table, parts: tuple[Part, ...], meta: Meta
    ) -> list[Tensor | None]:
        """To first order: steps d, e of u and v move an entry by ``sqrt(sum_k s_k^2 (d_ki^2 v_kj^2 + u_ki^2 e_kj^2))``."""
        rest = iter(zip(steps, inner.tensors, strict=True))
        out: list[Tensor | None] = []
        for part, rank in zip(parts, self.ranks(parts, meta), strict=True):
            d, u = next(rest)
            if rank is not None:
                (_, s), (e, v) = next(rest), next(rest)
                d = None if d is None and e is None else _spread(part, d, u, s, e, v)
            out.append(d)
        return out

    def ranks(self, parts: tuple[Part, ...], meta: Meta) -> Sequence[int | None]:
        return _plan(parts, rank_text(meta)).ranks

    def threshold(self, meta: Meta) -> float | None:
        rank_text(meta)
        return meta[0]  # type: ignore[index,return-value]

    def _share(self, round: int, num_rounds: int | None) -> float:
        value = self.energy(round, num_rounds) if callable(self.energy) else self.energy
        if not _is_share(value):
            raise ValueError(f"Expected `energy` to be above 0 and at most 1 in round {round}, but got {value!r}.")
        return float(value)


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1


def _short(energy: float) -> float:
    """Six digits are enough to tell people."""
    return float(f"{energy:.6g}")


def _matrix(part: Part) -> tuple[int, int]:
    """Rows and columns."""
    return part.shape[0], part.numel // part.shape[0]


def _vectors(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the singular vectors of a tensor of `dtype`."""
    return torch.float32 if dtype == torch.float64 else dtype


def _most(part: Part) -> int:
    """The most triples that take fewer bytes than the tensor itself: largest K with ``K (P + Q + 1) < P Q`` in float32."""
    if not part.compressible or len(part.shape) < 2 or part.numel == 0:
        return 0
    p, q = _matrix(part)
    each = (p + q) * _vectors(part.dtype).itemsize + 4
    return min((part.num_bytes - 1) // each, p, q)


def _take(found: list[tuple[Tensor, Tensor, Tensor] | None], which: Iterable[int], svd: ops.TruncatedSVD) -> None:
    """Put the factors of the matrices `which`, those that reached their energy, into `found`."""
    for b, u, s, v, rank in zip(which, svd.U, svd.S, svd.Vh, svd.rank.tolist(), strict=True):
        if rank >= 0:
            k = min(rank, int((s > 0).sum()))
            found[b] = u[:, :k].t().contiguous(), s[:k].contiguous(), v[:k].contiguous()


def _product(part: Part, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """``sum_k s_k u_k v_k^T`` as the tensor it came from, finite whatever a sender wrote into the factors.

    One multiplication a tensor, straight into its own memory: as fast as padded batches on the CPU, without their copies.
    """
    if not len(s):
        return torch.zeros(part.shape, dtype=part.dtype, device=u.device)
    limit = min(torch.finfo(part.dtype).max, _MAX)
    left = u.float() * s[:, None]
    # A copy, so that on both sides memory is aligned alike: the order of a sum may depend on that.
    right = v.to(torch.float32, copy=True)
    bound = len(s) * float(left.abs().max()) * float(right.abs().max())
    if bound <= limit:
        out = torch.mm(left.t(), right)
    else:  # beyond what the dtype holds, on the way or in the end: saturate
        out = torch.mm((u.double() * s[:, None]).t(), v.double()).clamp_(-limit, limit)
    return out.to(part.dtype).view(part.shape)


def _spread(part: Part, d: Tensor | None, u: Tensor, s: Tensor, e: Tensor | None, v: Tensor) -> Tensor:
    """See `LowRank.steps`; float32, no larger than the largest float32."""
    squares = torch.zeros(_matrix(part), dtype=torch.float64, device=u.device)
    for left, right in ((d, v), (u, e)):
        if left is not None and right is not None:
            squares.addmm_((left.double() * s[:, None]).square().t(), right.double().square())
    return squares.sqrt_().clamp_(max=_MAX).float().view(part.shape)


class _Plan(NamedTuple):
    """What becomes of each part: its rank (None: it stays whole), and the rows that result."""

    ranks: tuple[int | None, ...]
    rows: tuple[Part, ...]


@lru_cache(maxsize=64)
def _plan(parts: tuple[Part, ...], runs: str) -> _Plan:
    most = [_most(part) for part in parts]
    given = iter(from_runs(runs, sum(map(bool, most))))
    ranks: list[int | None] = []
    rows: list[Part] = []
    for part, top in zip(parts, most, strict=True):
        rank = next(given) if top else None
        ranks.append(rank)
        if rank is None:
            rows.append(part)
            continue
        if rank > top:
            raise MalformedPayloadError(f"Expected a rank of at most {top} for {part.name!r}, but got {rank}.")
        p, q = _matrix(part)
        rows.append(part.child("u", (rank, p), _vectors(part.dtype), False))
        rows.append(part.child("s", (rank,), torch.float32, True, "singular"))
        rows.append(part.child("v", (rank, q), _vectors(part.dtype), False))
    return _Plan(tuple(ranks), tuple(rows))


def rank_text(meta: Meta) -> str:
    """The ranks' text of a `Meta`, which is [energy, ranks].

    Raises:
        MalformedPayloadError: not such a pair. (The text is left for `from_runs` to check.)
    """
    if not (isinstance(meta, list) and len(meta) == 2 and type(meta[0]) is float and isinstance(meta[1], str)):
        raise MalformedPayloadError(f"Expected an energy and ranks as run-length text, but got {meta!a:.80}.")
    if not _is_share(meta[0]) or _short(meta[0]) != meta[0]:
        raise MalformedPayloadError(
            f"Expected an energy above 0 and at most 1, in six digits, but got {meta[0]!a:.40}."
        )
    return meta[1]


def to_runs(ranks: Iterable[int | None]) -> str:
    """Ranks of consecutive tensors, ``-`` for one that stays whole, with ``*`` and the run's length unless it is 1.

    Example:
        >>> to_runs([12, 12, 12, 3, None, None, 0])
        '12*3,3,-*2,0'
    """
    runs: list[tuple[str, int]] = []
    for rank in ranks:
        text = "-" if rank is None else str(rank)
        if runs and runs[-1][0] == text:
            runs[-1] = text, runs[-1][1] + 1
        else:
            runs.append((text, 1))
    return ",".join(text if count == 1 else f"{text}*{count}" for text, count in runs)


def parse_runs(text: str) -> list[tuple[int | None, int]]:
    """Runs of (rank, number of tensors) from their text, whose length bounds the work.

    Raises:
        MalformedPayloadError: not such a text.
    """
    if not _RUNS.fullmatch(text):
        raise MalformedPayloadError(f"Expected ranks as run-length text, but got {text!a:.80}.")
    runs = (run.partition("*") for run in text.split(",") if run)
    return [(None if rank == "-" else int(rank), int(count or 1)) for rank, _, count in runs]


def from_runs(text: str, expected: int) -> list[int | None]:
    """Undo `to_runs`, for exactly `expected` tensors.

    Raises:
        MalformedPayloadError: not such a text, another number of tensors, or not its shortest form.
    """
    runs = parse_runs(text)
    total = sum(count for _, count in runs)
    if total != expected:
        raise MalformedPayloadError(f"Expected ranks for {expected} tensors, but got ranks for {total}.")
    ranks = [rank for rank, count in runs for _ in range(count)]
    if to_runs(ranks) != text:
        raise MalformedPayloadError(f"Expected ranks in their shortest form, but got {text!a:.80}.")
    return ranks
