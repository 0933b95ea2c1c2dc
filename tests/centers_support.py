"""What the tests of the kernels for learned centres share: models of layers with centres, and checks against the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType

import torch
from ops_support import same, values
from soft_support import soft64
from torch import Tensor

from dynfed_lightning import _reference as reference

CENTER_CHUNK = 2048
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Pairs of values and centres. None, one, the ends of a group of eight and of a chunk; one centre, no power of two, all 256.
LAYERS = ((0, 4), (1, 1), (7, 2), (8, 3), (2047, 4), (2048, 16), (2049, 5), (5000, 17), (513, 256), (100, 33))
# Of sums and of transcendental functions, relative to the largest result; beside the rounding of half precision.
TOLERANCE = 1e-6
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}  # an ulp: both sides are rounded


def draw(*shape: int, seed: int) -> Tensor:
    """Normal numbers, the same on every device; on the CPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu")


def centers_of(count: int, seed: int, spread: float = 1.5) -> Tensor:
    """Ascending centres around zero, by no means evenly spaced; on the CPU."""
    gaps = torch.rand(count, generator=torch.Generator().manual_seed(seed), device="cpu") + 0.05
    ends = gaps.cumsum(0)
    return (ends - ends.mean()) * (2 * spread / ends[-1])


@dataclass
class Model:
    """Layers and their centres, as backends take them, and one of each number that a layer has."""

    x: list[Tensor]
    centers: Tensor
    first: Tensor
    factors: Tensor  # float64 on the CPU: sharpness, threshold or strength
    grad: list[Tensor] = field(default_factory=list)

    def to(self, device: str) -> Model:
        moved = [t.to(device) for t in self.x], self.centers.to(device), self.first, self.factors
        return Model(*moved, [t.to(device) for t in self.grad])

    @property
    def counts(self) -> list[int]:
        return self.first.diff().tolist()

    def split(self, arena: Tensor) -> list[Tensor]:
        return list(arena.cpu().split(self.counts))


def model(
    layers: Sequence[tuple[int, int]] = LAYERS, dtype: torch.dtype = torch.float32, seed: int = 0, factor: float = 7.0
) -> Model:
    """A layer for each pair of numbers, of values and of centres; on the CPU."""
    x = [draw(n, seed=seed + n).to(dtype) for n, _ in layers]
    grad = [draw(n, seed=seed + n + 1).to(dtype) for n, _ in layers]
    each = [centers_of(m, seed + m) for _, m in layers]
    first = torch.tensor([0, *(m for _, m in layers)], dtype=torch.int64, device="cpu").cumsum(0)
    factors = factor * (1 + 0.25 * torch.arange(len(layers), dtype=torch.float64, device="cpu"))
    return Model(x, torch.cat(each), first, factors, grad)


def like(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [torch.full_like(t, 77, dtype=dtype or t.dtype) for t in tensors]


def middles(centers: Tensor) -> Tensor:
    """The values that lie halfway between neighbours: they go up, and what is just below them down."""
    return (centers[:-1] + centers[1:]) * 0.5


def awkward(centers: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values on centres and middles, just beside them, zeros, infinities, NaN, denormals, and many magnitudes."""
    at = torch.cat((centers, middles(centers)))
    beside = [torch.nextafter(at, torch.full_like(at, end)) for end in (torch.inf, -torch.inf)]
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-39, -1e-45, 3e38], device="cpu")
    return torch.cat((at, *beside, special, values(300, seed=3).cpu())).to(dtype)


# ---- what a backend must compute ----


def soft(ops: ModuleType, m: Model) -> list[Tensor]:
    out = like(m.x)
    ops.soft_quantize(m.x, m.centers, m.first, m.factors, out)
    return out


def soft_backward(
    ops: ModuleType, m: Model, want_x: bool = True, want_centers: bool = True
) -> tuple[list[Tensor], Tensor]:
    dx, dcenters = like(m.x) if want_x else [], torch.full_like(m.centers, 77)
    dcenters = dcenters if want_centers else dcenters[:0]
    ops.soft_quantize_backward(m.grad, m.x, m.centers, m.first, m.factors, dx, dcenters)
    return dx, dcenters


def nearest(ops: ModuleType, m: Model) -> tuple[list[Tensor], list[Tensor]]:
    index, value = like(m.x, torch.uint8), like(m.x)
    ops.nearest_center(m.x, m.centers, m.first, index, value)
    return index, value


def prox(ops: ModuleType, m: Model, in_place: bool = False) -> list[Tensor]:
    y = [t.clone() for t in m.x]
    out = y if in_place else like(y)
    ops.prox_weights(y, m.centers, m.first, m.factors, out)
    assert in_place or all(same(a.float(), b.float()) for a, b in zip(y, m.x, strict=True))
    return out


def moved(ops: ModuleType, m: Model, proposal: Tensor) -> Tensor:
    out = torch.full_like(m.centers, 77)
    ops.prox_centers(proposal, m.x, m.centers, m.first, m.factors, out)
    return out


def sums(ops: ModuleType, m: Model, index: Sequence[Tensor]) -> Tensor:
    out = torch.full_like(m.centers, 77)
    assert ops.center_sums(m.x, list(index), m.first, out) in (None, -1)
    return out


def check_close(got: Tensor, want: Tensor, scale: float, dtype: torch.dtype = torch.float32) -> None:
    """Within TOLERANCE of `scale`, NaN where the reference has it; and the rounding of `dtype`."""
    got, want = got.cpu().double(), want.cpu().double()
    assert torch.equal(got.isnan(), want.isnan())
    error = (got - want).abs().nan_to_num(0.0)
    bound = TOLERANCE * scale + ROUNDING[dtype] * want.abs().nan_to_num(0.0).clamp(min=2.0**-14)
    assert bool((error <= bound).all()), f"{float((error - bound).max())} beyond the bound at scale {scale}"


def check_soft(ops: ModuleType, m: Model, device: str = "cpu") -> None:
    """Values and both gradients of every layer, as `test_soft_quantize.check`: values in proportion to the largest centre,
    gradients to them to the largest that is possible, those to the centres to the sum of the magnitudes of their terms.

    Beyond a sharpness of 1000, where a float32 says too little of a value near a middle, such values pass no gradient on; the
    others must be their nearest centres.
    """
    dtype, middle = m.x[0].dtype, [0.5 * (c[:-1].double() + c[1:].double()) for c in m.split(m.centers)]
    m = Model(m.x, m.centers, m.first, m.factors, [g.clone() for g in m.grad])
    away = []
    for x, g, at, p in zip(m.x, m.grad, middle, m.factors.tolist(), strict=True):
        sharp = p > 1000
        away.append(
            ((x.double()[:, None] - at).abs() > 40 / p).all(1) if sharp else torch.ones_like(x, dtype=torch.bool)
        )
        g[~away[-1]] = 0.0
    assert sum(int(a.sum()) for a in away) > 0.9 * sum(x.numel() for x in m.x)
    on = m.to(device)
    out, (dx, dcenters) = soft(ops, on), soft_backward(ops, on)
    for layer, (c, dc) in enumerate(zip(m.split(m.centers), m.split(dcenters), strict=True)):
        x, g, p, kept = m.x[layer], m.grad[layer], float(m.factors[layer]), away[layer]
        if not x.numel():
            assert not dc.any()
            continue
        largest, at = float(c.abs().max()), middle[layer]
        # P/4 times the largest step, and more where steps overlap; it is steepest about a middle.
        steepest = float(soft64(at, c, p, torch.ones_like(at))[1].max()) if len(c) > 1 else 0.0
        if p <= 1000:
            value, want_dx, want_dc, size = soft64(x, c, p, g)
        else:
            nearest = torch.bucketize(x.double(), at)
            value, want_dx, size = c[nearest].double(), torch.zeros_like(x).double(), g.abs().double()
            want_dc = torch.zeros(len(c), dtype=torch.float64).index_add_(0, nearest, g.double())
            size = torch.zeros_like(want_dc).index_add_(0, nearest, size)
        check_close(out[layer].cpu()[kept], value[kept], largest, dtype)
        check_close(dx[layer], want_dx, float(g.abs().max()) * steepest, dtype)
        check_close(dc, want_dc, float(size.max()))


def check_exact(ops: ModuleType, m: Model, device: str = "cpu") -> None:
    """What is specified to the bit."""
    on = m.to(device)
    index, value = nearest(ops, on)
    want_index, want_value = nearest(reference, m)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(index, want_index, strict=True))
    assert all(same(a.float(), b.float()) for a, b in zip(value, want_value, strict=True))
    for in_place in (False, True):
        each = zip(prox(ops, on, in_place), prox(reference, m), strict=True)
        assert all(same(a.float(), b.float()) for a, b in each)


def check_moved(ops: ModuleType, m: Model, proposal: Tensor, device: str = "cpu") -> None:
    """Exactly the reference's."""
    got, want = moved(ops, m.to(device), proposal.to(device)).cpu(), moved(reference, m, proposal)
    assert torch.equal(got, want), (got[got != want], want[got != want])


def check_sums(ops: ModuleType, m: Model, device: str = "cpu") -> None:
    index, _ = nearest(reference, m)
    on = m.to(device)
    got, want = sums(ops, on, [i.to(device) for i in index]), sums(reference, m, index)
    for a, b, x in zip(m.split(got), m.split(want), m.x, strict=True):
        check_close(a, b, float(x.abs().sum()) if x.numel() else 1.0)
