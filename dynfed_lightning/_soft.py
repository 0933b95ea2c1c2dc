"""Soft quantisation to learned centres, and the proximal steps of QuPeD (Ozkara et al., NeurIPS 2021), in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def _listed(x: Any, *others: Any) -> tuple[bool, list[Any]]:
    if isinstance(x, Tensor):
        return True, [[x], *([o] for o in others)]
    return False, [list(x), *(list(o) if isinstance(o, (list, tuple)) else [o] * len(x) for o in others)]


def _soft(x: Tensor, c: Tensor, sharpness: float) -> Tensor:
    out = c[0].expand_as(x)
    for low, high in zip(c[:-1], c[1:], strict=True):
        out = out + (high - low) * torch.sigmoid(sharpness * (x - (high + low) / 2))
    return out


def soft_quantize(x: Any, centers: Any, sharpness: float | Sequence[float]) -> Any:
    single, lists = _listed(x, centers, sharpness)
    out = [_soft(*args) for args in zip(*lists, strict=True)]
    return out[0] if single else out


def _nearest(x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    index = torch.bucketize(x, (c[:-1] + c[1:]) * 0.5, right=True)
    return index.to(torch.uint8), c[index]


@torch.no_grad()
def nearest_center(x: Any, centers: Any) -> Any:
    single, lists = _listed(x, centers)
    out = [_nearest(*args) for args in zip(*lists, strict=True)]
    return out[0] if single else ([i for i, _ in out], [v for _, v in out])


@torch.no_grad()
def prox_weights(y: Any, centers: Any, threshold: float | Sequence[float], *, out: Any = None) -> Any:
    single, lists = _listed(y, centers, threshold)
    made = []
    for v, c, th in zip(*lists, strict=True):
        q = _nearest(v, c)[1]
        made.append(torch.where(v >= q + th, v - th, torch.where(v <= q - th, v + th, q)))
    if out is not None:
        for o, m in zip([out] if single else out, made, strict=True):
            o.copy_(m)
        return out
    return made[0] if single else made


@torch.no_grad()
def prox_centers(proposal: Any, x: Any, centers: Any, strength: float | Sequence[float]) -> Any:
    single, lists = _listed(proposal, x, centers, strength)
    if not single:
        lists[1], lists[2] = list(x), list(centers)
    made = []
    for mu, v, c, k in zip(*lists, strict=True):
        index = _nearest(v, c)[0].flatten().long()
        new = mu.clone()
        for j in range(len(c)):
            s = v.flatten()[index == j].double().sort().values
            n, m = len(s), float(mu[j])
            # c + k/2 (below - above) = mu: between the sorted members the left side is linear with slope 1.
            below = torch.arange(n + 1)
            free = m - k / 2 * (2.0 * below - n)
            low = torch.cat([torch.tensor([-torch.inf], dtype=torch.float64), s])
            high = torch.cat([s, torch.tensor([torch.inf], dtype=torch.float64)])
            inside = ((free > low) & (free < high)).nonzero()
            if len(inside):
                new[j] = float(free[inside[0, 0]])
            else:  # at a member: where the left side jumps over mu
                new[j] = float(s[int((s + k / 2 * (2.0 * torch.arange(n) + 2 - n) >= m).nonzero()[0, 0])])
        made.append(new.sort().values)
    return made[0] if single else made


@torch.no_grad()
def center_sums(values: Any, index: Any, num_centers: int | Sequence[int]) -> Any:
    single, lists = _listed(values, index, num_centers)
    out = [
        torch.bincount(i.flatten().long(), v.flatten().double(), minlength=m).float()
        for v, i, m in zip(*lists, strict=True)
    ]
    return out[0] if single else out
