"""Soft quantisation to centres and its proximal steps in plain PyTorch: part of `_reference`, the oracle of every backend.

`nearest_center` and `prox_weights` are specified to the bit. The others are sums or transcendental functions: here they are in
float64, in pieces of `CHUNK` values and in a loop over the centres, so that nothing of size [n, m] ever exists.

Every function takes lists of contiguous tensors, a layer each; `centers` is one flat arena in which those of layer l are
``centers[first[l] : first[l + 1]]``, ascending. Values of float64 stay in float64 throughout, others are taken as float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

CHUNK = 1 << 20  # values handled at once: part of no result but the order of float64 sums


def _layers(centers: Tensor, first: Tensor) -> Iterator[Tensor]:
    bounds = first.tolist()
    for begin, end in pairwise(bounds):
        yield centers[begin:end]


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    flat = [t.view(-1) for t in tensors]
    for i in range(0, flat[0].numel(), CHUNK):
        yield tuple(t[i : i + CHUNK] for t in flat)


def _working(x: Tensor) -> torch.dtype:
    """What values of this dtype are computed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def soft_quantize(
    x: Sequence[Tensor], centers: Tensor, first: Tensor, sharpness: Tensor, out: Sequence[Tensor]
) -> None:
    """``out = c_1 + sum_{j>=2} (c_j - c_{j-1}) sigmoid(P (x - (c_j + c_{j-1}) / 2))``, P = sharpness float64 [L]."""
    for value, c, p, into in zip(x, _layers(centers, first), sharpness.tolist(), out, strict=True):
        c = c.double()
        for part, target in _pieces(value, into):
            part = part.double()
            total = torch.zeros_like(part) + c[0]
            for low, high in pairwise(c):
                total += (high - low) * torch.sigmoid(p * (part - (high + low) / 2))
            target.copy_(total)


def soft_quantize_backward(
    grad: Sequence[Tensor],
    x: Sequence[Tensor],
    centers: Tensor,
    first: Tensor,
    sharpness: Tensor,
    dx: Sequence[Tensor],
    dcenters: Tensor,
) -> None:
    """Gradients to the values, `dx`, and to the centres, the arena `dcenters`; an empty one is not wanted.

    With ``s_1 = 1``, ``s_{m+1} = 0`` and ``h_j = P/2 (c_j - c_{j-1}) s_j (1 - s_j)``, which is 0 outside of 2..m:
    ``dQ/dx = 2 sum_j h_j`` and ``dQ/dc_j = s_j - s_{j+1} - h_j - h_{j+1}``.
    """
    arenas = _layers(dcenters if dcenters.numel() else centers, first)
    each = zip(grad, x, _layers(centers, first), sharpness.tolist(), arenas, strict=True)
    for layer, (upstream, value, c, p, into) in enumerate(each):
        c = c.double()
        totals = torch.zeros_like(c)
        for piece in _pieces(upstream, value, *([dx[layer]] if dx else [])):
            g, part = piece[0].double(), piece[1].double()
            slope, before = torch.zeros_like(part), torch.ones_like(part)
            for j in range(1, len(c)):
                s = torch.sigmoid(p * (part - (c[j] + c[j - 1]) / 2))
                h = p / 2 * (c[j] - c[j - 1]) * s * (1 - s)
                slope += 2 * h
                totals[j - 1] += (g * (before - s - h)).sum()
                totals[j] -= (g * h).sum()
                before = s
            totals[-1] += (g * before).sum()
            if dx:
                piece[2].copy_(g * slope)
        if dcenters.numel():
            into.copy_(totals)


def _nearest(x: Tensor, c: Tensor) -> Tensor:
    """int64: how many ``mid_j = fl(fl(c_{j-1} + c_j) / 2)`` are not above x; 0 for NaN."""
    index = torch.bucketize(x, (c[:-1] + c[1:]) * 0.5, right=True)
    return index.masked_fill_(x.isnan(), 0)


def nearest_center(
    x: Sequence[Tensor], centers: Tensor, first: Tensor, index: Sequence[Tensor], value: Sequence[Tensor]
) -> None:
    """The number of the nearest centre, uint8, and the centre; NaN has number 0 and stays NaN."""
    for v, c, i, q in zip(x, _layers(centers, first), index, value, strict=True):
        c = c.to(_working(v))
        for part, number, into in _pieces(v, i, q):
            part = part.to(c.dtype)
            found = _nearest(part, c)
            number.copy_(found)
            into.copy_(torch.where(part.isnan(), part, c[found]))


def prox_weights(y: Sequence[Tensor], centers: Tensor, first: Tensor, threshold: Tensor, out: Sequence[Tensor]) -> None:
    """``y >= fl(q + t) -> fl(y - t)``; ``y <= fl(q - t) -> fl(y + t)``; else q, the nearest centre; t float64 [L], rounded to
    float32. `out` may be `y`."""
    for v, c, t, into in zip(y, _layers(centers, first), threshold.tolist(), out, strict=True):
        c = c.to(_working(v))
        for part, target in _pieces(v, into):
            part = part.to(c.dtype)
            q, step = c[_nearest(part, c)], torch.full_like(part, t)
            moved = torch.where(part >= q + step, part - step, torch.where(part <= q - step, part + step, q))
            target.copy_(torch.where(part.isnan(), part, moved))


def prox_centers(
    proposal: Tensor, x: Sequence[Tensor], centers: Tensor, first: Tensor, strength: Tensor, out: Tensor
) -> None:
    """``argmin_c (c - proposal_j)**2 / 2 + k/2 sum_{i in S_j} |x_i - c|`` for every centre, k = strength float64 [L]; sorted.

    With N members the minimiser is the median of these and of ``proposal_j - k/2 (2 l - N)`` for l = 0..N (Li and Osher, "A new
    median formula with applications to PDE based denoising", 2009). A NaN is nobody's member.
    """
    each = zip(
        _layers(proposal, first), x, _layers(centers, first), strength.tolist(), _layers(out, first), strict=True
    )
    for mu, v, c, k, into in each:
        v = v.view(-1).to(_working(v))
        v = v[~v.isnan()]
        index = _nearest(v, c.to(v.dtype))
        best = []
        for j in range(len(c)):
            members = v[index == j].double()
            n = members.numel()
            steps = 2.0 * torch.arange(n + 1, dtype=torch.float64, device=v.device) - n
            best.append(torch.cat([members, mu[j].double() - k / 2 * steps]).median())
        into.copy_(torch.stack(best).sort().values)


def center_sums(values: Sequence[Tensor], index: Sequence[Tensor], first: Tensor, out: Tensor) -> int | None:
    """``out_j = sum of the values with index j``, per layer.

    Returns:
        The largest index beyond its layer's last, or -1; such values belong to no sum. On a GPU None: nobody waits for it.
    """
    worst = -1
    for v, i, into in zip(values, index, _layers(out, first), strict=True):
        totals = torch.zeros(256, dtype=torch.float64, device=out.device)
        for part, number in _pieces(v, i):
            totals.index_add_(0, number.long(), part.double())
            if out.device.type == "cpu" and int(number.max()) >= len(into):
                worst = max(worst, int(number.max()))
        into.copy_(totals[: len(into)])
    return worst if out.device.type == "cpu" else None
