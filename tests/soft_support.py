"""What the tests of learned centres share: the formulas in float64, written down anew, and awkward centres."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

COUNTS = (1, 2, 3, 4, 8, 15, 16, 17, 31, 32, 33, 64, 255, 256)


def here(x: Tensor) -> Tensor:
    """On the device of the backend under test."""
    return x.to(torch.get_default_device())


def leaf(x: Tensor) -> Tensor:
    """A copy there that wants a gradient."""
    return here(x.detach()).clone().requires_grad_()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def centers(m: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Ascending, unevenly spaced, within [-scale, scale], no two closer than a fifth of the mean distance; on the CPU."""
    gaps = torch.rand(m + 1, generator=generator(1000 * m + seed), device="cpu", dtype=torch.float64) + 0.25
    places = gaps.cumsum(0)
    return ((places[:-1] / places[-1] * 2 - 1) * scale).float()


def weights(n: int, c: Tensor, seed: int = 0, spread: float = 1.0) -> Tensor:
    """Normal values; among them every centre, every midpoint, their neighbours, zeros and values far outside; on the CPU."""
    x = torch.randn(n, generator=generator(seed), device="cpu") * spread
    mid = (c[:-1] + c[1:]) * 0.5
    up, down = torch.full((), torch.inf, device="cpu"), torch.full((), -torch.inf, device="cpu")
    special = torch.cat(
        [
            c,
            mid,
            torch.nextafter(mid, up),
            torch.nextafter(mid, down),
            torch.tensor([0.0, -0.0, 1e-40, 50.0, -1e4, 3e38], device="cpu"),
        ]
    )
    k = min(n // 2, len(special))
    x[torch.randperm(n, generator=generator(seed + 1), device="cpu")[:k]] = special[:k]
    return x


def soft(x: Tensor, c: Tensor, sharpness: float) -> Tensor:
    """Q of the paper, in the dtype of its arguments, with autograd; [n, m] in memory."""
    mid = (c[1:] + c[:-1]) / 2
    return c[0] + ((c[1:] - c[:-1]) * torch.sigmoid(sharpness * (x[..., None] - mid))).sum(-1)


def soft64(x: Tensor, c: Tensor, sharpness: float, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value, gradient to x, gradient to c, and what the terms of the latter come to in magnitude; float64 on the CPU."""
    x, c, grad = (t.detach().cpu().double() for t in (x, c, grad))
    x, c = x.requires_grad_(), c.requires_grad_()
    q = soft(x, c, sharpness)
    dx, dc = torch.autograd.grad((q * grad).sum(), (x, c), allow_unused=True)
    with torch.no_grad():
        s = torch.sigmoid(sharpness * (x.reshape(-1, 1) - (c[1:] + c[:-1]) / 2))
        one = torch.ones(x.numel(), 1, device="cpu", dtype=torch.float64)
        differences = -torch.diff(torch.cat([one, s, 0 * one], dim=1), dim=1)
        products = sharpness / 2 * torch.diff(c) * s * (1 - s)
        terms = differences + torch.cat([products, 0 * one], 1) + torch.cat([0 * one, products], 1)
        size = (grad.reshape(-1, 1).abs() * terms).sum(0)
    return q.detach(), torch.zeros_like(x) if dx is None else dx, dc, size


def calls() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Every operator on learned centres with arguments that it takes, for `opcheck`."""
    sizes = [4, 1, 20]
    each = [centers(m) for m in sizes]
    x = [
        here(t)
        for t in (torch.randn(3, 5, device="cpu"), torch.randn(7, device="cpu"), torch.randn(0, 2, device="cpu"))
    ]
    arena, numbers = here(torch.cat(each)), torch.tensor([0.5, 2.0, 30.0], dtype=torch.float64, device="cpu")
    index = [torch.zeros(t.shape, dtype=torch.uint8) for t in x]
    yield "soft_quantize", (x, arena, sizes, numbers)
    for want in ((True, True), (True, False), (False, True)):
        yield "soft_quantize_backward", ([t + 1 for t in x], x, arena, sizes, numbers, *want)
    yield "nearest_center", (x, arena, sizes)
    yield "prox_weights", (x, arena, sizes, numbers)
    yield "prox_weights_out", (x, arena, sizes, numbers, [torch.zeros_like(t) for t in x])
    yield "prox_centers", (arena + 0.1, x, arena, sizes, numbers)
    yield "center_sums", (x, index, sizes)
