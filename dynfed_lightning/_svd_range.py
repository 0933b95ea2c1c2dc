"""The algorithm of `ops.truncated_svd`: a randomised range finder with a certified energy, and the full Gram where it pays.

A step of the range finder holds a sketch Z, whose rows span nearly the leading singular subspace of one side (rows, as products
with few rows on the left are quicker than with few columns on the right):

1. ``Q = orthonormal(Z)``, from the float64 Gram of Z (SVQB: Stathopoulos and Wu, SIAM J. Sci. Comput. 2002);
2. ``W = Q A.T`` (or ``Q A``), and the eigenvalues w of the float64 Gram ``W W.T``: as ``||A - A Q.T Q||**2 = ||A||**2 - sum(w)``
   exactly, the first k of them are an energy that U, S and V really hold (Rayleigh-Ritz);
3. the host reads w, once for all matrices, and decides for each: accept; iterate, with W for the next Z, which costs one more
   pass over A; widen, with W and new random rows; or give up and take the full Gram.

Products with A are in the input's precision. All that squares a condition number is in float64 and small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._svd_rows import combine_rows, orthonormal_rows, row_spectrum

FULL_SIDE = 48  # up to this smaller side the full Gram is the quickest
# A sketch of more columns than this share of the smaller side costs more than the full Gram, up to side 128 and beyond: at 768
# with 179 values to find (two threads, a Zen 4) 113 ms against the 226 of a share of 0.4.
FULL_SHARES = (0.5, 0.25)
FULL_ENERGY = 1 - 1e-5  # beyond this float32 products are too coarse to tell what is left
OVERSAMPLE = 16
EPS32 = 2.0**-23
STEEP = 1e4  # a ratio of singular values from which dividing by them no longer gives orthonormal vectors
MOST_PASSES = 6
SLACK = 0.02  # of the rank, that an estimate may fall below it
FULL_CHUNK = 1 << 25  # values of float64 at once


class Wanted(NamedTuple):
    """What to keep: values up to a share `energy`, or `rank` of them (`energy` None); at most `cap`."""

    energy: float | None
    rank: int
    cap: int
    seed: int


class Part(NamedTuple):
    """The factors of the matrices `which` of a batch, all of one width; beyond its `rank` a matrix's are undefined."""

    which: Tensor
    u: Tensor
    s: Tensor
    vh: Tensor
    rank: Tensor


def decompose(a: Tensor, energies: Tensor, wanted: Wanted) -> list[Part]:
    """All matrices of ``a`` [B, m, n], float32 or float64, finite, whose squared norms are `energies`; any order."""
    zero = energies.numpy() == 0
    parts = [_no_part(a, torch.from_numpy(zero.nonzero()[0]))] if zero.any() else []
    if not zero.all():
        with _full_precision():
            parts += _search(_Batch.select(a, energies, torch.from_numpy((~zero).nonzero()[0])), wanted)
    return parts


def _no_part(a: Tensor, index: Tensor) -> Part:
    """Rank 0."""
    b, (m, n) = len(index), a.shape[1:]
    u, s, vh = (torch.empty(shape, device=a.device) for shape in ((b, m, 0), (b, 0), (b, 0, n)))
    return Part(index, u, s, vh, torch.zeros(b, dtype=torch.int64))


# ---- the batch, and what is known of it ----


class _Batch(NamedTuple):
    which: Tensor  # places in the whole batch, on the host
    a: Tensor  # [B, m, n]
    energies: Tensor  # float64 [B] on the host
    scale: Tensor | None  # powers of two [B, 1, 1] that bring norms near 1, where some are extreme

    @staticmethod
    def select(a: Tensor, energies: Tensor, index: Tensor) -> _Batch:
        """The matrices `index`; a copy of them unless they are all."""
        if len(index) < a.shape[0]:
            energies, a = energies[index], a[index.to(a.device)]
        # Squares of norms beyond these leave float32. A power of two changes no mantissa; it stays a normal number.
        half = np.round(np.log2(energies.numpy()) / 2)
        half = np.where(np.abs(half) > 30, half, 0.0).clip(-100, 100)
        scale = torch.from_numpy(np.exp2(-half)).to(a.dtype).to(a.device)[:, None, None] if half.any() else None
        return _Batch(index, a, energies, scale)

    def take(self, places: list[int]) -> _Batch:
        """Some of these matrices."""
        if len(places) == len(self.which):
            return self
        here = torch.tensor(places)
        there = here.to(self.a.device)
        scale = None if self.scale is None else self.scale[there]
        return _Batch(self.which[here], self.a[there], self.energies[here], scale)

    def scaled_energies(self) -> np.ndarray:
        """The squared norms of the scaled matrices."""
        scale = 1.0 if self.scale is None else self.scale.flatten().cpu().double().square().numpy()
        return self.energies.numpy() * scale

    def scaled(self, x: Tensor) -> Tensor:
        return x if self.scale is None else x * self.scale


class _Sketch(NamedTuple):
    """A step's result: orthonormal rows Q on one side of A, ``W = Q A.T`` on the other, and the spectrum of ``W W.T``."""

    q: Tensor  # [B, l, ..]
    w: Tensor
    values: Tensor  # float64 [B, l], descending
    vectors: Tensor
    right: bool  # Q is on the right of A

    def take(self, places: list[int]) -> _Sketch:
        """That of some of the matrices."""
        if len(places) == self.q.shape[0]:
            return self
        there = torch.tensor(places, device=self.q.device)
        return _Sketch(self.q[there], self.w[there], self.values[there], self.vectors[there], self.right)


def _search(batch: _Batch, wanted: Wanted) -> list[Part]:
    """The range finder, in groups of equal width, and the full Gram for what it cannot or should not do."""
    m, n = batch.a.shape[1:]
    least = min(m, n)
    width = _first_width(wanted, least)
    if least <= FULL_SIDE or width > _full_share(least) * least or (wanted.energy or 0) > FULL_ENERGY:
        return _full(batch, wanted)
    parts: list[Part] = []
    full: list[int] = []
    # What is still to do: places in `batch`, those matrices, their sketch, how many times more than once all its rows have
    # seen A, and its values before the last time.
    every = list(range(len(batch.which)))
    start = _step(batch, _first_sketch(batch, wanted.seed, width), m >= n)
    work: list[tuple[list[int], _Batch, _Sketch, int, np.ndarray | None]] = [(every, batch, start, 1, None)]
    while work:
        places, group, sketch, passes, before = work.pop()
        values = _host(sketch.values)
        plan = _decide(group, values, wanted, passes, before)
        done = [i for i, p in enumerate(plan) if p.width == 0]
        if done:
            parts.append(_factors(group.take(done), sketch.take(done), [plan[i].rank for i in done]))
        full += [places[i] for i, p in enumerate(plan) if p.width < 0]
        for width in sorted({p.width for p in plan if p.width > 0}):
            rest = [i for i, p in enumerate(plan) if p.width == width]
            some, old = group.take(rest), sketch.take(rest)
            wider = width > old.w.shape[1]
            z = torch.cat((old.w, _more_rows(some, wanted.seed, old, width)), dim=1) if wider else old.w
            step = _step(some, z, not old.right)
            here = [places[i] for i in rest]
            work.append((here, some, step, 0, None) if wider else (here, some, step, passes + 1, values[rest]))
    if full:
        parts += _full(batch.take(sorted(full)), wanted)
    return parts


@lru_cache(maxsize=64)
def _first_width(wanted: Wanted, least: int) -> int:
    """Rows of the first sketch: what singular values 1, 1/2, 1/3, .. need for this energy, and some more."""
    if wanted.energy is None:
        return _round_up(1.15 * wanted.rank + OVERSAMPLE)
    sums = np.cumsum(np.arange(1.0, least + 1) ** -2)
    guess = int(np.searchsorted(sums, wanted.energy * sums[-1])) + 1
    return _round_up(min(guess, wanted.cap) + OVERSAMPLE - 4)


def _full_share(least: int) -> float:
    return FULL_SHARES[least > 128]


def _round_up(width: float, multiple: int = 8) -> int:
    return multiple * math.ceil(width / multiple)


class _Plan(NamedTuple):
    rank: int
    width: int  # of the next sketch; 0: accept this one; -1: the full Gram


def _host(values: Tensor) -> np.ndarray:
    """Eigenvalues that rounding has not made negative, where decisions are made."""
    return np.maximum(values.cpu().numpy(), 0.0)


def _decide(batch: _Batch, w: np.ndarray, wanted: Wanted, passes: int, before: np.ndarray | None) -> list[_Plan]:
    """What to do with each matrix, given the eigenvalues of its sketch, now and a pass before."""
    least, width = min(batch.a.shape[1:]), w.shape[1]
    ranks = _ranks(w, batch, wanted)
    if wanted.energy is None:
        # A sketch loses directions below sqrt(sqrt(`DROP`)) of the largest; the full Gram has them, if there are any.
        return [_Plan(r, width if passes < 3 else 0 if r >= wanted.rank else -1) for r in ranks.tolist()]
    least_ranks = _least_ranks(w, batch, wanted.energy, passes, before).tolist()
    energies = batch.scaled_energies().tolist()
    plans = []
    for i, rank in enumerate(ranks.tolist()):
        enough = rank <= width
        if not enough:
            rank = _predict(w[i], energies[i], wanted.energy, least)
        need = _round_up(1.15 * rank + OVERSAMPLE / 2, 16)  # few widths, few groups
        # Accurate: an exact decomposition would hardly do with less.
        # One value too many for `max_rank`, which an exact decomposition might not need.
        near = rank > wanted.cap >= least_ranks[i] and need <= width
        accurate = rank - least_ranks[i] <= SLACK * rank and not near
        if enough and (accurate or passes >= MOST_PASSES):
            plans.append(_Plan(rank if rank <= wanted.cap else -1, 0))
        elif need <= width:
            plans.append(_Plan(rank, width))
        else:
            plans.append(_Plan(rank, need if need <= _full_share(least) * least else -1))
    return plans


def _ranks(w: np.ndarray, batch: _Batch, wanted: Wanted) -> np.ndarray:
    """The rank that each row of eigenvalues (descending, on the host) reaches the energy with; more than there are: none."""
    if wanted.energy is None:
        return np.minimum(_nonzero(w), wanted.rank)
    if wanted.energy == 1:
        return _nonzero(w)
    return (w.cumsum(1) < wanted.energy * batch.scaled_energies()[:, None]).sum(1) + 1


def _nonzero(w: np.ndarray) -> np.ndarray:
    """How many of the values are more than float32's rounding of the largest."""
    return (w > EPS32**2 * w[:, :1]).sum(1)


def _least_ranks(w: np.ndarray, batch: _Batch, energy: float, passes: int, before: np.ndarray | None) -> np.ndarray:
    """An estimate of the rank that exact singular values would have given each matrix, which is at most `_ranks`.

    A sketch of l columns that has seen A ``h + 1`` times holds the i-th direction but for about
    ``sum_{j > l} s_j**(2h + 2) / (s_i**(2h + 2) * (l - k))`` of it (Halko et al., theorem 10.6, without its constants), and the
    sum is at most ``w_l**h`` times the energy outside the sketch. Twice what the first k values so lack, as found on spectra
    of all kinds; or what the last pass has added to them, if that is less: the next one adds at most a part of it.
    """
    width = w.shape[1]
    energies = batch.scaled_energies()[:, None]
    sums = w.cumsum(1)
    outside = np.maximum(energies - sums[:, -1:], 0.0)
    ratios = np.minimum(w[:, -1:] / np.maximum(w, np.finfo(w.dtype).tiny), 1.0) ** passes
    lack = 2 * outside * ratios.cumsum(1) / np.maximum(width - np.arange(1, width + 1), 1)
    if before is not None:
        lack = np.minimum(lack, np.maximum(sums - before.cumsum(1), 0.0))
    return (sums + lack < energy * energies).sum(1) + 1


def _predict(w: np.ndarray, energy: float, share: float, least: int) -> int:
    """The rank a matrix will need, more than ``len(w)``: from a power law through its values that leaves what is left."""
    anchor = max(len(w) // 2, 1)
    rest = energy - float(w[:anchor].sum())
    ratio = np.arange(anchor + 1, least + 1) / anchor
    low, high = 0.0, 8.0
    for _ in range(20):
        power = (low + high) / 2
        low, high = (power, high) if w[anchor - 1] * float((ratio**-power).sum()) > rest else (low, power)
    tail = np.cumsum(ratio**-low)
    target = share * energy - (energy - rest)
    rank = anchor + 1 + int(np.searchsorted(tail * (rest / tail[-1]), target))
    return int(min(max(rank, len(w) + 1), least))


# ---- one step ----


def _first_sketch(batch: _Batch, seed: int, width: int) -> Tensor:
    """Random signs times ``A.T A`` for a tall A, ``A A.T`` for a wide one: [B, width, min(m, n)]."""
    a = batch.a if batch.a.shape[1] >= batch.a.shape[2] else batch.a.mT
    return batch.scaled(_random_rows(batch, a, seed, 0, width)) @ a


def _more_rows(batch: _Batch, seed: int, old: _Sketch, width: int) -> Tensor:
    """New random signs times A, or its transpose: rows to put below ``old.w``."""
    return _random_rows(batch, batch.a if old.right else batch.a.mT, seed, old.w.shape[1], width)


def _random_rows(batch: _Batch, a: Tensor, seed: int, begin: int, end: int) -> Tensor:
    """Random signs, the same for all matrices, times the transpose of `a`."""
    signs = _signs(seed, a.shape[2], begin, end, a.dtype, a.device)
    return torch.bmm(batch.scaled(signs.expand(a.shape[0], -1, -1)), a.mT)


@lru_cache(maxsize=16)
def _signs(seed: int, columns: int, begin: int, end: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows `begin` to `end` of a matrix of random signs [.., columns]: bits of Philox4x64-10 with the seed for its key."""
    words = -(-columns // 64)
    raw = np.random.Philox(key=seed).random_raw(words * end)[words * begin :].astype("<u8")
    bits = np.unpackbits(raw.view(np.uint8).reshape(end - begin, -1), axis=1, count=columns, bitorder="little")
    return torch.from_numpy(bits).to(dtype).mul_(2).sub_(1).to(device)


def _step(batch: _Batch, z: Tensor, right: bool) -> _Sketch:
    """Orthonormalise the sketch, apply A, and find the spectrum of what comes out."""
    q = orthonormal_rows(z)
    w = batch.scaled(q) @ (batch.a.mT if right else batch.a)
    return _Sketch(q, w, *row_spectrum(w), right)


# ---- factors ----


def _factors(batch: _Batch, sketch: _Sketch, ranks: list[int]) -> Part:
    """U, S and V of the accepted ranks (-1: none)."""
    k = max(max(ranks), 0)
    vectors = sketch.vectors[:, :, :k].mT
    one, s = _divided(sketch.w, sketch.values[:, :k], vectors, ranks)
    other = combine_rows(vectors, sketch.q)
    return _part(batch, *((one, s, other) if sketch.right else (other, s, one)), ranks)


def _divided(w: Tensor, values: Tensor, vectors: Tensor, ranks: list[int]) -> tuple[Tensor, Tensor]:
    """``V W / s`` for rows V of eigenvectors of ``W W.T``, so orthonormal, and s; by a QR where s is too steep for that."""
    s = values.clamp_min(0).sqrt()
    t = vectors * torch.where(s > 0, 1 / s, 0)[:, :, None]
    u = combine_rows(t, w)
    if s.shape[1]:
        sizes = s.cpu().numpy()
        for i, k in enumerate(ranks):
            if k > 0 and sizes[i, 0] > STEEP * sizes[i, k - 1]:
                q, r = torch.linalg.qr((t[i, :k] @ w[i].double()).mT)
                size = r.diagonal()
                u[i, :k] = (q * torch.where(size < 0, -1.0, 1.0)).mT.to(u.dtype)
                s[i, :k] *= size.abs()
    return u, s


def _part(batch: _Batch, u: Tensor, s: Tensor, v: Tensor, ranks: list[int]) -> Part:
    """Factors from rows U and V: in float32, unscaled, and with the signs that make a result unique."""
    if batch.scale is not None:
        s = s / batch.scale[:, :, 0].double()
    u, v = u.float(), v.float()
    if s.shape[1]:
        largest = u.abs().argmax(dim=2, keepdim=True)
        sign = torch.where(u.gather(2, largest) < 0, -1.0, 1.0)
        u, v = u * sign, v * sign
    return Part(batch.which, u.mT.contiguous(), s.float(), v.contiguous(), torch.tensor(ranks))


# ---- the full Gram ----


def _full(batch: _Batch, wanted: Wanted) -> list[Part]:
    """All singular values from the float64 Gram of the smaller side, a bounded number of matrices at a time."""
    step = max(FULL_CHUNK // batch.a[0].numel(), 1)
    count = len(batch.which)
    return [_full_chunk(batch.take(list(range(i, min(i + step, count)))), wanted) for i in range(0, count, step)]


def _full_chunk(batch: _Batch, wanted: Wanted) -> Part:
    tall = batch.a.shape[1] > batch.a.shape[2]
    x = batch.scaled(batch.a.mT if tall else batch.a).contiguous()
    values, vectors = row_spectrum(x)
    w = _host(values)
    found = np.minimum(_ranks(w, batch, wanted), _nonzero(w))  # what all values lack of the energy is rounding
    ranks = [r if r <= wanted.cap else -1 for r in found.tolist()]
    k = max(max(ranks), 0)
    other = vectors[:, :, :k].mT
    one, s = _divided(x, values[:, :k], other, ranks)
    return _part(batch, *((one, s, other) if tall else (other, s, one)), ranks)


# ---- float32 in full ----


@contextmanager
def _full_precision() -> Iterator[None]:
    """Matrix products in float32 proper: TF32 or bfloat16, which a user may have allowed, would falsify the energies."""
    settings: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [s.fp32_precision for s in settings]
    try:
        for s in settings:
            s.fp32_precision = "ieee"
        yield
    finally:
        for s, value in zip(settings, before, strict=True):
            s.fp32_precision = value
