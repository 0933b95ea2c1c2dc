"""Sketches of the truncated SVD, which are few long rows: their spectrum, their orthonormal basis, and combinations of them.

Sums are in float64. On the CPU each is one call of a kernel; elsewhere torch's products around the backend's `symmetric_eigh`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._ops_backends import choose
from ._ops_register import OPERATORS as _OPS

DROP = 1e-13  # of a Gram's largest eigenvalue: directions below are rounding
LOOSE = 1e-8  # kept directions below this leave the basis orthonormal to no better than float32's rounding: it is done twice


def _kernels(x: Tensor) -> Any:
    """The backend, if it has these operations for matrices of this many rows."""
    backend = choose("symmetric_eigh", x.device)
    return backend if x.shape[1] <= getattr(backend, "EIGH_MOST", 0) and x.numel() else None


def row_spectrum(x: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues [B, l], descending, and eigenvectors [B, l, l], as columns, of ``x @ x.mT``, for x [B, l, d]; float64."""
    kernels = _kernels(x)
    if kernels is None:
        x = x.double()
        values, vectors = _OPS.symmetric_eigh(x @ x.mT)
        return values, vectors
    w = x.new_empty(x.shape[:2], dtype=torch.float64)
    v = x.new_empty((*x.shape[:2], x.shape[1]), dtype=torch.float64)
    kernels.row_spectrum(x.contiguous(), w, v)
    return w, v


def orthonormal_rows(x: Tensor) -> Tensor:
    """An orthonormal basis [B, l, d] of the rows of x, in its dtype; as many zero rows as x lacks rank.

    SVQB (Stathopoulos and Wu, SIAM J. Sci. Comput. 2002) in float64 is orthonormal to 1e-3 at the worst condition it lets
    through (1e-16 / `DROP`); one Newton-Schulz step squares that.
    """
    kernels = _kernels(x)
    if kernels is not None:
        q = torch.empty_like(x, memory_format=torch.contiguous_format)
        kernels.orthonormal_rows(x.contiguous(), q, DROP, LOOSE)
        return q
    wide = x.double()
    w, v = _OPS.symmetric_eigh(wide @ wide.mT)
    scaled = v.mul_(torch.where(w > DROP * w[:, :1], w, torch.inf).rsqrt_()[:, None, :])
    q = (scaled.mT @ wide).to(x.dtype)
    return torch.baddbmm(q, q @ q.mT, q, beta=1.5, alpha=-0.5)


def combine_rows(t: Tensor, x: Tensor) -> Tensor:
    """``t @ x`` [B, k, d] in the dtype of x [B, l, d], for t float64 [B, k, l]."""
    kernels = _kernels(x)
    if kernels is None or not t.shape[1]:
        return (t @ x.double()).to(x.dtype)
    out = x.new_empty((x.shape[0], t.shape[1], x.shape[2]))
    kernels.combine_rows(t.contiguous(), x.contiguous(), out)
    return out
