"""What the tests of `symmetric_eigh` and `squared_norm` share: matrices of every kind, and what a right answer is."""

from __future__ import annotations

import torch
from torch import Tensor

F64 = torch.float64
NORM_CHUNK, LANES, THREADS = 2048, 32, 256
SHAPES = ((1, 1), (1, 7), (3, 5), (64, 32), (2047, 1), (1, 2049), (50, 121), (64, 96), (257, 131))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Made on the CPU whatever the default device is, so that every device tests the same numbers."""
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed), device="cpu")


def orthogonal(l: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(l, l, seed=seed)).Q


def with_eigenvalues(w: Tensor, seed: int = 0) -> Tensor:
    q = orthogonal(w.numel(), seed)
    a = q * w @ q.mT
    return (a + a.mT) / 2


def matrices(l: int) -> Tensor:
    """float64 [6, l, l]: any symmetric matrix; Gram matrices of full rank, graded over 12 decades and of rank l / 3; eigenvalues
    that repeat; pairs of opposite sign.
    """
    x, y, z = normal(l, l, seed=l), normal(2 * l, l, seed=l + 1), normal(max(l // 3, 1), l, seed=l + 2)
    graded = y * torch.logspace(0, -6, l, dtype=F64, device="cpu")
    repeated = torch.arange(l, dtype=F64, device="cpu") // 3
    opposite = torch.arange(l, dtype=F64, device="cpu") - (l - 1) / 2
    cases = (x + x.mT, y.mT @ y, graded.mT @ graded, z.mT @ z, with_eigenvalues(repeated), with_eigenvalues(opposite))
    return torch.stack([(a + a.mT) / 2 for a in cases])


def check_eigh(a: Tensor, w: Tensor, v: Tensor, tolerance: float = 2e-13) -> None:
    """Eigenvalues as LAPACK's, descending; residual and orthogonality: all relative to the largest magnitude."""
    a, w, v = a.cpu(), w.cpu(), v.cpu()
    expected = torch.linalg.eigvalsh(a).flip(1)
    scale = expected.abs().amax(dim=1)
    scale = torch.where(scale > 0, scale, 1.0)
    assert bool((w.diff(dim=1) <= 0).all()), "not descending"
    assert float(((w - expected).abs().amax(dim=1) / scale).max()) <= tolerance / 2
    residual = (a / scale[:, None, None]) @ v - v * (w / scale[:, None])[:, None, :]
    assert float(residual.abs().max()) <= tolerance
    assert float((v.mT @ v - torch.eye(a.shape[1], dtype=F64)).abs().max()) <= tolerance


def norm_in_order(a: Tensor) -> Tensor:
    """The squared norms, added up exactly as the CUDA kernels do; their bits, where a square is exact in float64."""
    batch, size = a.shape[0], a[0].numel()
    vector = 16 // a.element_size()
    chunks = -(-size // NORM_CHUNK)
    x = torch.nn.functional.pad(a.reshape(batch, size).to(F64), (0, chunks * NORM_CHUNK - size))
    x = x.reshape(batch, chunks, -1, LANES, vector).square()
    sums = torch.zeros_like(x[:, :, 0])
    for step in x.unbind(2):
        sums = sums + step
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    partial = _over_lanes(sums[..., 0])
    if chunks == 1:
        return partial[:, 0]
    partial = torch.nn.functional.pad(partial, (0, -chunks % THREADS)).reshape(batch, -1, THREADS)
    sums = torch.zeros_like(partial[:, 0])
    for step in partial.unbind(1):
        sums = sums + step
    total = torch.zeros_like(sums[:, 0])
    for warp in _over_lanes(sums.reshape(batch, -1, LANES)).unbind(1):
        total = total + warp
    return total


def _over_lanes(x: Tensor) -> Tensor:
    """The butterfly of a warp: 32 lanes, at distances 16, 8, .. 1."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]
