"""Batched truncated singular value decomposition, by energy or by rank: the call, its checks, and its answer."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import _svd_range
from ._ops_checks import FLOAT32_MAX, check_tensor
from ._ops_register import OPERATORS as _OPS

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class TruncatedSVD(NamedTuple):
    """Factors of a batch of matrices: ``a[b]`` is nearly ``U[b] * S[b] @ Vh[b]``.

    Args:
        U: float32 ``[B, m, k]``, left singular vectors as columns, each with its entry of largest magnitude positive; columns
            from `rank` on are 0.
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
    """The fewest singular triples that hold a share `energy` of each matrix's squared Frobenius norm, or the first `rank`.

    With ``E = ||A||_F**2`` the rank is the least K with ``s_1**2 + .. + s_K**2 >= energy * E`` (FedKD, Wu et al., Nature
    Communications 2022, "dynamic gradient approximation"). Large matrices go through a randomised range finder (Halko,
    Martinsson and Tropp, SIAM Review 2011, algorithms 4.4 and 5.1), whose values never exceed the true ones, so the rank is
    certified: ``||A - U S Vh||_F**2 <= (1 - energy) * E`` whatever the random numbers; they can only raise it, by a few
    per cent. Small matrices, and high ranks, go through the eigenvalues of ``A.T @ A`` in float64, without randomness.

    Args:
        a: float32 ``[B, m, n]``, strided in any way; bfloat16 and float16 are computed in float32, float64 in float64.
        energy: above 0 and at most 1. 1 keeps every value that float32 tells from zero: above ``2**-23`` of the largest.
        rank: how many triples to keep of every matrix, 1 to ``min(m, n)``. Exactly one of `energy` and `rank` is given.
        max_rank: a matrix that needs more values than this for its energy gets rank -1 and zero factors; default
            ``min(m, n)``. With `rank`, at least that.
        seed: 0 to ``2**64 - 1``, of the range finder. The same call has the same result. A matrix's factors depend on the rest
            of its batch only through the rounding of torch's batched products, which may differ from that of single ones.

    Returns:
        U, S, Vh and the ranks; ``k = max(rank)``, which is 0 for a batch of zero matrices, or for an empty batch.

    Raises:
        ValueError: an argument out of range, a matrix with NaN or infinity (the first one is named), or one whose norm is
            beyond float32.
        TypeError: an argument of a wrong type.

    Matrix products are computed in full float32 whatever `torch.set_float32_matmul_precision` says. The call waits for the
    device, as ranks decide shapes. Not differentiable.
    """
    _check(a, energy, rank, max_rank, seed)
    batch, m, n = a.shape
    if batch == 0 or m == 0 or n == 0:
        return TruncatedSVD(*_zeros(a, 0), torch.zeros(batch, dtype=torch.int64))
    a = a.detach()
    x = a if a.dtype in (torch.float32, torch.float64) else a.float()
    energies = _OPS.squared_norm(x).cpu()
    _check_values(x, energies)
    wanted = _svd_range.Wanted(
        energy=None if energy is None else float(energy), rank=rank or 0, cap=max_rank or min(m, n), seed=seed
    )
    return _assemble(a, _svd_range.decompose(x, energies, wanted))


def _zeros(a: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, m, n = a.shape
    u, s, vh = (a.new_zeros(shape, dtype=torch.float32) for shape in ((batch, m, k), (batch, k), (batch, k, n)))
    return u, s, vh


def _assemble(a: Tensor, parts: list[_svd_range.Part]) -> TruncatedSVD:
    """One padded answer out of those of the groups that matrices were computed in."""
    rank = torch.zeros(a.shape[0], dtype=torch.int64)
    for part in parts:
        rank[part.which] = part.rank
    k = max(int(rank.max()), 0)
    if len(parts) == 1 and len(parts[0].which) == a.shape[0]:
        u, s, vh = parts[0].u, parts[0].s, parts[0].vh
    else:
        u, s, vh = _zeros(a, k)
        for part in parts:
            index, width = part.which.to(a.device), part.s.shape[1]
            u[index, :, :width], s[index, :width], vh[index, :width] = part.u, part.s, part.vh
    if k and bool((rank != k).any()):
        keep = torch.arange(k) < rank[:, None]
        keep = keep.to(a.device)
        u, s, vh = (t.masked_fill_(~mask, 0) for t, mask in ((u, keep[:, None]), (s, keep), (vh, keep[:, :, None])))
    return TruncatedSVD(u, s, vh, rank)


def _check(a: Tensor, energy: float | None, rank: int | None, max_rank: int | None, seed: int) -> None:
    check_tensor("a", a, DTYPES)
    if a.ndim != 3:
        raise ValueError(f"Expected `a` to be a batch of matrices [B, m, n], but got shape {list(a.shape)}.")
    if (energy is None) == (rank is None):
        raise ValueError(f"Expected one of `energy` and `rank`, but got energy={energy!r} and rank={rank!r}.")
    if energy is not None:
        if not isinstance(energy, (int, float)) or isinstance(energy, bool):
            raise TypeError(f"Expected `energy` to be a number, but got {type(energy).__name__}.")
        if not 0 < energy <= 1:
            raise ValueError(f"Expected `energy` to be above 0 and at most 1, but got {energy!r}.")
    least = min(a.shape[1:])
    for name, value in (("rank", rank), ("max_rank", max_rank)):
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"Expected `{name}` to be an integer, but got {type(value).__name__}.")
        if value < 1 or (value > least and a.numel()):
            raise ValueError(f"Expected `{name}` to be an integer from 1 to min(m, n) = {least}, but got {value}.")
    if rank is not None and max_rank is not None and rank > max_rank:
        raise ValueError(f"Expected `rank` to be at most `max_rank`, but got {rank} and {max_rank}.")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"Expected `seed` to be an integer, but got {type(seed).__name__}.")
    if not 0 <= seed < 2**64:
        raise ValueError(f"Expected `seed` to be an integer from 0 to 2**64 - 1, but got {seed}.")


def _check_values(x: Tensor, energies: Tensor) -> None:
    """Raise for the first matrix that is not finite, or has no factors in float32."""
    bad = ~(energies.numpy() <= FLOAT32_MAX**2)
    if not bad.any():
        return
    first = int(bad.argmax())
    if bool(torch.isfinite(x[first]).all()):
        norm = math.sqrt(float(energies[first]))
        raise ValueError(f"Expected `a` to have norms within float32, but that of matrix {first} is {norm:.3g}.")
    raise ValueError(f"Expected `a` to be finite, but matrix {first} holds NaN or infinity.")
