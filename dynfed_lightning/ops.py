"""Low-bit operations on whole flattened updates: pack, quantise, dequantise, accumulate, rotate. The one door to the kernels.

Every backend returns the same bits, so a result does not depend on the machine it was computed on. The environment variable
``DYNFED_BACKEND`` chooses one (``auto``, ``reference``, ``cpu``, ``cuda``, ``triton``) and ``DYNFED_CPU_ISA`` an instruction set
of the C++ kernels (``auto``, ``scalar``, ``avx2``, ``avx512``, ``avx512vbmi``). All operations are registered under
``torch.ops.dynfed_lightning`` and work under ``torch.compile(fullgraph=True)``; on a GPU they run on torch's current stream,
without waiting for it, and can be captured in a CUDA graph. `rotate` is differentiable in its input, `unpack_dequantize` in
its scales, and `soft_quantize`, once, in both of its tensors; nothing else is. The exceptions to the same bits are
`soft_quantize` and `truncated_svd`: they are the same to the tolerances that they state.

What the codes mean, for ``bits = b``, a bucket's largest magnitude ``amax`` and ``L = 2**(b-1) - 1`` (QSGD, Alistarh et
al., NeurIPS 2017, eq. 3, with the maximum for the norm; DynFed, He et al., ACM MM 2025, eq. 3):

* scale ``amax / L``; code ``floor(x / scale + u) + 2**(b-1)`` with ``u`` uniform in [0, 1) (``u = 1/2`` for nearest);
* value ``(code - 2**(b-1)) * scale``. Stochastic rounding is unbiased: the mean value is ``x``;
* one bit is the sign, its scale the mean magnitude, its value ``(2 * code - 1) * scale``: biased, and without randomness;
* rounding ``"eden"`` (EDEN, Vargaftik et al., ICML 2022, section 3.1) rounds to the nearest multiple of a step proportional to
  the root mean square, clamps to the levels there are, and has the scale ``sum(x**2) / sum(x * level)``. After `rotate`, and
  where many values of a block matter, it is nearly unbiased, and from 2 bits on of an error several times smaller than
  stochastic rounding's; without `rotate`, it is neither;
* a bucket with NaN or infinity gets a NaN scale (no code is promised); one below 1e-30 throughout counts as zero. Values near
  float32's largest may decode to infinity.

Example:
    >>> import torch
    >>> from dynfed_lightning import ops
    >>> packed, scales = ops.quantize_pack(torch.tensor([1.0, -0.5, 0.25, 0.0]), bits=4, bucket=8, rounding="nearest")
    >>> packed.tolist(), [round(s, 4) for s in scales.tolist()]
    ([95, 138], [0.1429])
    >>> ops.unpack_dequantize(packed, scales, bits=4, bucket=8, n=4).mul(7).round().tolist()
    [7.0, -3.0, 2.0, 0.0]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _ops_autograd
from ._ops_backends import describe
from ._ops_checks import (
    INPUT_DTYPES,
    MAX_ELEMENTS,
    ROUNDINGS,
    check_bucket,
    check_device,
    check_int,
    check_lengths,
    check_out,
    check_packed,
    check_pair,
    check_scales,
    check_tensor,
    num_buckets,
    packed_size,
    rounding_number,
    signed_seed,
    weights_tensor,
    written,
)
from ._ops_layout import Layout
from ._ops_register import OPERATORS as _OPS
from ._ops_table import dequantize_accumulate_table, quantize_pack_table, rotate, unpack_dequantize_table
from ._soft import center_sums, nearest_center, prox_centers, prox_weights, soft_quantize
from ._svd import TruncatedSVD, truncated_svd

__all__ = [
    "ROUNDINGS",
    "Layout",
    "TruncatedSVD",
    "backend",
    "center_sums",
    "dequantize_accumulate",
    "dequantize_accumulate_many",
    "dequantize_accumulate_table",
    "nearest_center",
    "num_buckets",
    "pack",
    "packed_size",
    "prox_centers",
    "prox_weights",
    "quantize_pack",
    "quantize_pack_table",
    "rotate",
    "soft_quantize",
    "truncated_svd",
    "unpack",
    "unpack_dequantize",
    "unpack_dequantize_table",
]


def backend(device: torch.device | str = "cpu") -> str:
    """What runs for tensors on `device`, in words: ``"cpu (avx512)"`` or ``"reference"``."""
    return describe(device)


def pack(codes: Tensor, bits: int, *, out: Tensor | None = None) -> Tensor:
    """Pack codes into a bitstream, least significant bit first: 8 codes make `bits` bytes.

    Args:
        codes: uint8, any shape, values below ``2**bits``; taken in row-major order as n codes.
        bits: 1 to 8.
        out: where to write it; undefined after an error.

    Returns:
        uint8 ``[ceil(n * bits / 8)]``; unused bits of the last byte are zero.

    Raises:
        ValueError: `bits` out of range, or a code of ``2**bits`` or more.
        TypeError: `codes` is not a uint8 tensor.

    On a GPU the check of the codes waits for the kernel; while a CUDA graph is captured there is none, and the upper bits of
    too large a code are dropped.
    """
    check_int("bits", bits, 1, 8)
    check_tensor("codes", codes, (torch.uint8,))
    if out is None:
        return _OPS.pack(codes, bits)
    check_out("out", out, torch.uint8, packed_size(codes.numel(), bits), "codes", codes)
    _OPS.pack_out(codes, bits, out)
    written(out)
    return out


def unpack(packed: Tensor, bits: int, n: int, *, out: Tensor | None = None) -> Tensor:
    """The inverse of `pack`.

    Args:
        packed: uint8 ``[ceil(n * bits / 8)]``.
        bits: 1 to 8.
        n: the number of codes.
        out: where to write them.

    Returns:
        uint8 ``[n]``.

    Raises:
        ValueError: `bits` or `n` out of range, or `packed` not of the size they give.
        TypeError: `packed` is not a uint8 tensor.
    """
    check_int("bits", bits, 1, 8)
    check_int("n", n, 0, MAX_ELEMENTS)
    check_packed("packed", packed, n, bits)
    if out is None:
        return _OPS.unpack(packed, bits, n)
    check_out("out", out, torch.uint8, n, "packed", packed)
    _OPS.unpack_out(packed, bits, out)
    written(out)
    return out


def quantize_pack(
    x: Tensor,
    bits: int,
    bucket: int = 512,
    seed: int = 0,
    offset: int = 0,
    rounding: str = "stochastic",
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantise `x` in buckets, each with its own scale, and pack the codes: one pass over the input.

    The random bits of an element depend on `seed` and its global index ``offset + position`` alone, so a vector may be split
    at bucket boundaries, each part with its own offset, and gives the same bytes.

    Args:
        x: float32, bfloat16 or float16, any shape; taken in row-major order as n values.
        bits: 1 to 8.
        bucket: values that share a scale: a positive multiple of 8. The last bucket may be shorter.
        seed: 0 to ``2**64 - 1``.
        offset: global index of the first value, 0 to ``2**62``. In a table of tensors: the running count rounded up to 8.
        rounding: ``"stochastic"`` (unbiased), ``"nearest"`` (ties upwards) or ``"eden"`` (for rotated vectors; `bucket` at most
            65536). Without effect on one-bit codes.
        out: ``(packed, scales)`` to write to.

    Returns:
        ``(packed, scales)``: uint8 ``[ceil(n * bits / 8)]`` and float32 ``[ceil(n / bucket)]``, on the device of `x`.

    Raises:
        ValueError: `bits`, `bucket`, `seed`, `offset` out of range, or an unknown `rounding`.
        TypeError: `x` is not a tensor of one of the three dtypes, or an argument is not an integer.
    """
    check_int("bits", bits, 1, 8)
    check_bucket(bucket)
    signed = signed_seed(seed)
    check_int("offset", offset, 0, 2**62)
    number = rounding_number(rounding, bucket)
    check_tensor("x", x, INPUT_DTYPES)
    if out is None:
        return _OPS.quantize_pack(x.detach(), bits, bucket, signed, offset, number)
    packed, scales = check_pair("out", out)
    check_out("out[0]", packed, torch.uint8, packed_size(x.numel(), bits), "x", x)
    check_out("out[1]", scales, torch.float32, num_buckets(x.numel(), bucket), "x", x)
    _OPS.quantize_pack_out(x.detach(), bits, bucket, signed, offset, number, packed, scales)
    written(packed, scales)
    return out


def unpack_dequantize(
    packed: Tensor, scales: Tensor, bits: int, bucket: int, n: int, *, out: Tensor | None = None
) -> Tensor:
    """The values that `quantize_pack`'s result stands for.

    Args:
        packed: uint8 ``[ceil(n * bits / 8)]``.
        scales: float32 ``[ceil(n / bucket)]``, on the same device.
        bits: 1 to 8.
        bucket: a positive multiple of 8.
        n: the number of values.
        out: where to write them.

    Returns:
        float32 ``[n]``; differentiable in `scales` unless written to `out`.

    Raises:
        ValueError: a number out of range, or a tensor not of the size they give, or on another device.
        TypeError: a tensor of another dtype.
    """
    check_int("bits", bits, 1, 8)
    check_bucket(bucket)
    check_int("n", n, 0, MAX_ELEMENTS)
    check_packed("packed", packed, n, bits)
    check_scales("scales", scales, n, bucket)
    check_device("scales", scales, "packed", packed)
    if out is None:
        if _ops_autograd.wanted(scales):
            return _ops_autograd.unpack_dequantize(packed, scales, bits, bucket, n)
        return _OPS.unpack_dequantize(packed, scales.detach(), bits, bucket, n)
    check_out("out", out, torch.float32, n, "packed", packed)
    _OPS.unpack_dequantize_out(packed, scales.detach(), bits, bucket, out.detach())
    written(out)
    return out


def dequantize_accumulate(out: Tensor, packed: Tensor, scales: Tensor, bits: int, bucket: int, weight: float) -> Tensor:
    """Add ``weight`` times a payload's values to `out`, in place, without writing them anywhere else.

    ``out[i] = fma(scale * weight, level[i], out[i])`` with one rounding of each of the two results.

    Args:
        out: float32, any shape with n values.
        packed: uint8 ``[ceil(n * bits / 8)]``.
        scales: float32 ``[ceil(n / bucket)]``.
        bits: 1 to 8.
        bucket: a positive multiple of 8.
        weight: a finite number; rounded to float32.

    Returns:
        `out`.

    Raises:
        ValueError: a number out of range, or a tensor not of the size they give, or on another device.
        TypeError: a tensor of another dtype, or a weight that is not a number.
    """
    return dequantize_accumulate_many(out, [packed], [scales], [bits], bucket, [weight])


def dequantize_accumulate_many(
    out: Tensor,
    packed: Sequence[Tensor],
    scales: Sequence[Tensor],
    bits: Sequence[int],
    bucket: int,
    weights: Sequence[float],
) -> Tensor:
    """A server's aggregation: `dequantize_accumulate` for many clients, in one pass over `out`.

    Clients are added in the order given, so results are the same bits as one call after the other.

    Args:
        out: float32, any shape with n values.
        packed: a uint8 tensor ``[ceil(n * bits[k] / 8)]`` per client.
        scales: a float32 tensor ``[ceil(n / bucket)]`` per client.
        bits: 1 to 8, per client.
        bucket: a positive multiple of 8, the same for all.
        weights: a finite number per client; rounded to float32.

    Returns:
        `out`.

    Raises:
        ValueError: lists of different lengths, or as `dequantize_accumulate`.
        TypeError: as `dequantize_accumulate`.
    """
    check_bucket(bucket)
    check_tensor("out", out, (torch.float32,))
    check_lengths(packed=packed, scales=scales, bits=bits, weights=weights)
    for p, s, b in zip(packed, scales, bits, strict=True):
        check_int("bits", b, 1, 8)
        check_packed("packed", p, out.numel(), b)
        check_scales("scales", s, out.numel(), bucket)
        check_device("packed", p, "out", out)
        check_device("scales", s, "out", out)
    _OPS.dequantize_accumulate_many(
        out.detach(), list(packed), [s.detach() for s in scales], list(bits), bucket, weights_tensor(weights)
    )
    written(out)
    return out
