"""Batched truncated singular value decomposition, by energy or by rank."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class TruncatedSVD(NamedTuple):
    """Factors of a batch of matrices.

    Args:
        U: float32 ``[B, m, k]``, left singular vectors; columns from `rank` on are 0.
        S: float32 ``[B, k]``, singular values, descending; 0 from `rank` on.
        Vh: float32 ``[B, k, n]``, right singular vectors as rows; 0 from `rank` on.
        rank: int64 ``[B]`` on the CPU: how many values each matrix kept; -1 where `max_rank` values do not reach the energy.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    rank: Tensor


@torch.no_grad()
def truncated_svd(
    a: Tensor, energy: float | None = None, rank: int | None = None, max_rank: int | None = None, seed: int = 0
) -> TruncatedSVD:
    """The fewest singular triples that hold a share `energy` of each matrix's squared Frobenius norm, or the first `rank`."""
    if a.ndim != 3 or not a.dtype.is_floating_point:
        raise ValueError(f"Expected `a` to be a floating tensor [B, m, n], but got {a.dtype} of shape {list(a.shape)}.")
    batch, m, n = a.shape
    if (energy is None) == (rank is None):
        raise ValueError(f"Expected one of `energy` and `rank`, but got energy={energy!r}, rank={rank!r}.")
    if energy is not None and not (
        isinstance(energy, (int, float)) and not isinstance(energy, bool) and 0 < energy <= 1
    ):
        raise ValueError(f"Expected `energy` to be above 0 and at most 1, but got {energy!r}.")
    for name, value in (("rank", rank), ("max_rank", max_rank)):
        if value is not None and not (type(value) is int and 1 <= value <= min(m, n)):
            raise ValueError(
                f"Expected `{name}` to be an integer from 1 to min(m, n) = {min(m, n)}, but got {value!r}."
            )
    x = a.double()
    bad = (~torch.isfinite(x)).flatten(1).any(1)
    if bad.any():
        raise ValueError(f"Expected `a` to be finite, but matrix {int(bad.nonzero()[0])} holds NaN or infinity.")
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    ranks = []
    for squares in s.square():
        total = math.fsum(squares.tolist())
        if rank is not None:
            ranks.append(rank)
        elif total == 0:
            ranks.append(0)
        else:
            reached = (squares.cumsum(0) >= energy * total).nonzero()  # type: ignore[operator]
            k = int(reached[0]) + 1 if len(reached) else min(m, n)
            ranks.append(k if max_rank is None or k <= max_rank else -1)
    k = max(0, *ranks) if ranks else 0
    keep = torch.arange(k, device=a.device) < torch.tensor(ranks, device=a.device)[:, None]
    out = [
        (t * mask).float()
        for t, mask in ((u[:, :, :k], keep[:, None]), (s[:, :k], keep), (vh[:, :k], keep[:, :, None]))
    ]
    return TruncatedSVD(*out, torch.tensor(ranks))
