"""Low-bit operations on whole flattened updates: pack, quantise, dequantise, accumulate. The one door to the kernels.

Every backend returns the same bits, so a result does not depend on the machine it was computed on. The environment
variable ``DYNFED_BACKEND`` chooses one (``auto``, ``reference``, ``cpu``; ``triton`` and ``cuda`` are not in this build) and
``DYNFED_CPU_ISA`` an instruction set of the C++ kernels (``auto``, ``scalar``, ``avx2``, ``avx512``). All operations are
registered under ``torch.ops.dynfed_lightning`` and work under ``torch.compile(fullgraph=True)``. None is differentiable.

What the codes mean, for ``bits = b``, a bucket's largest magnitude ``amax`` and ``L = 2**(b-1) - 1`` (QSGD, Alistarh et
al., NeurIPS 2017, eq. 3, with the maximum for the norm; DynFed, He et al., ACM MM 2025, eq. 3):

* scale ``amax / L``; code ``floor(x / scale + u) + 2**(b-1)`` with ``u`` uniform in [0, 1) (``u = 1/2`` for nearest);
* value ``(code - 2**(b-1)) * scale``. Stochastic rounding is unbiased: the mean value is ``x``;
* one bit is the sign, its scale the mean magnitude, its value ``(2 * code - 1) * scale``: biased, and without randomness;
* a bucket with NaN or infinity gets a NaN scale (no code is promised); one below 1e-30 throughout counts as zero.

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

from ._ops_backends import choose, describe

__all__ = [
    "backend",
    "dequantize_accumulate",
    "dequantize_accumulate_many",
    "num_buckets",
    "pack",
    "packed_size",
    "quantize_pack",
    "unpack",
    "unpack_dequantize",
]

INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_ELEMENTS = 1 << 59  # n * bits stays within 63 bits
MAX_BUCKET = 1 << 31
ROUNDINGS = ("stochastic", "nearest")


# ---- what a person calls: every argument is checked here, in the same words for every backend ----


def packed_size(n: int, bits: int) -> int:
    """Bytes of `n` packed codes: ``ceil(n * bits / 8)``."""
    return (n * bits + 7) // 8


def num_buckets(n: int, bucket: int) -> int:
    """How many scales `n` values have: ``ceil(n / bucket)``."""
    return (n + bucket - 1) // bucket


def backend(device: torch.device | str = "cpu") -> str:
    """What runs for tensors on `device`, in words: ``"cpu (avx512)"`` or ``"reference"``."""
    return describe(device)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into a bitstream, least significant bit first: 8 codes make `bits` bytes.

    Args:
        codes: uint8, any shape, values below ``2**bits``; taken in row-major order as n codes.
        bits: 1 to 8.

    Returns:
        uint8 ``[ceil(n * bits / 8)]``; unused bits of the last byte are zero.

    Raises:
        ValueError: `bits` out of range, or a code of ``2**bits`` or more.
        TypeError: `codes` is not a uint8 tensor.
    """
    _check_int("bits", bits, 1, 8)
    _check_tensor("codes", codes, (torch.uint8,))
    return torch.ops.dynfed_lightning.pack(codes, bits)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack`.

    Args:
        packed: uint8 ``[ceil(n * bits / 8)]``.
        bits: 1 to 8.
        n: the number of codes.

    Returns:
        uint8 ``[n]``.

    Raises:
        ValueError: `bits` or `n` out of range, or `packed` not of the size they give.
        TypeError: `packed` is not a uint8 tensor.
    """
    _check_int("bits", bits, 1, 8)
    _check_int("n", n, 0, MAX_ELEMENTS)
    _check_packed("packed", packed, n, bits)
    return torch.ops.dynfed_lightning.unpack(packed, bits, n)


def quantize_pack(
    x: Tensor, bits: int, bucket: int = 512, seed: int = 0, offset: int = 0, rounding: str = "stochastic"
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
        rounding: ``"stochastic"`` (unbiased) or ``"nearest"`` (ties upwards). Ignored for one bit.

    Returns:
        ``(packed, scales)``: uint8 ``[ceil(n * bits / 8)]`` and float32 ``[ceil(n / bucket)]``, on the device of `x`.

    Raises:
        ValueError: `bits`, `bucket`, `seed`, `offset` out of range, or an unknown `rounding`.
        TypeError: `x` is not a tensor of one of the three dtypes, or an argument is not an integer.
    """
    _check_int("bits", bits, 1, 8)
    _check_bucket(bucket)
    _check_int("seed", seed, 0, 2**64 - 1)
    _check_int("offset", offset, 0, 2**62)
    if rounding not in ROUNDINGS:
        raise ValueError(f"Expected `rounding` to be one of {', '.join(ROUNDINGS)}, but got {rounding!r}.")
    _check_tensor("x", x, INPUT_DTYPES)
    signed = seed - 2**64 if seed >= 2**63 else seed  # operator arguments are signed 64-bit integers
    return torch.ops.dynfed_lightning.quantize_pack(x.detach(), bits, bucket, signed, offset, rounding == "stochastic")


def unpack_dequantize(packed: Tensor, scales: Tensor, bits: int, bucket: int, n: int) -> Tensor:
    """The values that `quantize_pack`'s result stands for.

    Args:
        packed: uint8 ``[ceil(n * bits / 8)]``.
        scales: float32 ``[ceil(n / bucket)]``, on the same device.
        bits: 1 to 8.
        bucket: a positive multiple of 8.
        n: the number of values.

    Returns:
        float32 ``[n]``.

    Raises:
        ValueError: a number out of range, or a tensor not of the size they give, or on another device.
        TypeError: a tensor of another dtype.
    """
    _check_int("bits", bits, 1, 8)
    _check_bucket(bucket)
    _check_int("n", n, 0, MAX_ELEMENTS)
    _check_packed("packed", packed, n, bits)
    _check_scales("scales", scales, n, bucket)
    _check_device("scales", scales, "packed", packed)
    return torch.ops.dynfed_lightning.unpack_dequantize(packed, scales.detach(), bits, bucket, n)


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
    _check_bucket(bucket)
    _check_tensor("out", out, (torch.float32,))
    lengths = (len(packed), len(scales), len(bits), len(weights))
    if len(set(lengths)) > 1:
        raise ValueError(
            f"Expected `packed`, `scales`, `bits`, `weights` to be lists of one length, but got lengths {lengths}."
        )
    for p, s, b, w in zip(packed, scales, bits, weights, strict=True):
        _check_int("bits", b, 1, 8)
        if not isinstance(w, (int, float)) or isinstance(w, bool):
            raise TypeError(f"Expected `weight` to be a number, but got {type(w).__name__}.")
        if not abs(w) <= 3.4028234663852886e38:
            raise ValueError(f"Expected `weight` to be a finite float32, but got {w}.")
        _check_packed("packed", p, out.numel(), b)
        _check_scales("scales", s, out.numel(), bucket)
        _check_device("packed", p, "out", out)
        _check_device("scales", s, "out", out)
    torch.ops.dynfed_lightning.dequantize_accumulate_many(
        out.detach(), list(packed), [s.detach() for s in scales], list(bits), bucket, [float(w) for w in weights]
    )
    return out


def _check_int(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"Expected `{name}` to be an integer, but got {type(value).__name__}.")
    if not low <= value <= high:
        raise ValueError(f"Expected `{name}` to be an integer from {low} to {high}, but got {value}.")


def _check_bucket(bucket: int) -> None:
    _check_int("bucket", bucket, 1, MAX_BUCKET)
    if bucket % 8:
        raise ValueError(f"Expected `bucket` to be a positive multiple of 8, but got {bucket}.")


def _check_tensor(name: str, value: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
    if not isinstance(value, Tensor):
        raise TypeError(f"Expected `{name}` to be a tensor of {allowed}, but got {type(value).__name__}.")
    if value.dtype not in dtypes:
        raise TypeError(f"Expected `{name}` to be a tensor of {allowed}, but got {value.dtype}.")
    if value.layout != torch.strided:
        raise TypeError(f"Expected `{name}` to be a dense tensor, but got layout {value.layout}.")


def _check_packed(name: str, value: Tensor, n: int, bits: int) -> None:
    _check_tensor(name, value, (torch.uint8,))
    size = packed_size(n, bits)
    if value.numel() != size:
        raise ValueError(
            f"Expected `{name}` to hold {size} bytes for {n} codes of {bits} bits, but got {value.numel()}."
        )


def _check_scales(name: str, value: Tensor, n: int, bucket: int) -> None:
    _check_tensor(name, value, (torch.float32,))
    size = num_buckets(n, bucket)
    if value.numel() != size:
        raise ValueError(f"Expected `{name}` to hold {size} values, one per {bucket} of {n}, but got {value.numel()}.")


def _check_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"Expected `{name}` to be on the device of `{other_name}` ({other.device}), but got {value.device}."
        )


# ---- registration: one schema, one kernel and one fake each; the kernel asks `choose` for the backend at run time ----

_LIBRARY = torch.library.Library("dynfed_lightning", "DEF")  # lives as long as the process


def _flat(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1)


def _pack(codes: Tensor, bits: int) -> Tensor:
    return choose(codes.device).pack(_flat(codes), bits)


def _pack_fake(codes: Tensor, bits: int) -> Tensor:
    return codes.new_empty(packed_size(codes.numel(), bits))


def _unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    return choose(packed.device).unpack(_flat(packed), bits, n)


def _unpack_fake(packed: Tensor, bits: int, n: int) -> Tensor:
    return packed.new_empty(n)


def _quantize_pack(
    x: Tensor, bits: int, bucket: int, seed: int, offset: int, stochastic: bool
) -> tuple[Tensor, Tensor]:
    return choose(x.device).quantize_pack(_flat(x), bits, bucket, seed, offset, stochastic)


def _quantize_pack_fake(
    x: Tensor, bits: int, bucket: int, seed: int, offset: int, stochastic: bool
) -> tuple[Tensor, Tensor]:
    packed = x.new_empty(packed_size(x.numel(), bits), dtype=torch.uint8)
    return packed, x.new_empty(num_buckets(x.numel(), bucket), dtype=torch.float32)


def _unpack_dequantize(packed: Tensor, scales: Tensor, bits: int, bucket: int, n: int) -> Tensor:
    return choose(packed.device).unpack_dequantize(_flat(packed), _flat(scales), bits, bucket, n)


def _unpack_dequantize_fake(packed: Tensor, scales: Tensor, bits: int, bucket: int, n: int) -> Tensor:
    return scales.new_empty(n)


def _accumulate_many(
    out: Tensor, packed: list[Tensor], scales: list[Tensor], bits: list[int], bucket: int, weights: list[float]
) -> None:
    target = _flat(out)  # shares memory with `out` unless that is not contiguous
    choose(out.device).accumulate(target, [_flat(p) for p in packed], [_flat(s) for s in scales], bits, bucket, weights)
    if not out.is_contiguous():
        out.copy_(target.view(out.shape))


def _accumulate_many_fake(
    out: Tensor, packed: list[Tensor], scales: list[Tensor], bits: list[int], bucket: int, weights: list[float]
) -> None:
    return None


for _schema, _kernel, _fake in (
    ("pack(Tensor codes, int bits) -> Tensor", _pack, _pack_fake),
    ("unpack(Tensor packed, int bits, SymInt n) -> Tensor", _unpack, _unpack_fake),
    (
        "quantize_pack(Tensor x, int bits, int bucket, SymInt seed, SymInt offset, bool stochastic) -> (Tensor, Tensor)",
        _quantize_pack,
        _quantize_pack_fake,
    ),
    (
        "unpack_dequantize(Tensor packed, Tensor scales, int bits, int bucket, SymInt n) -> Tensor",
        _unpack_dequantize,
        _unpack_dequantize_fake,
    ),
    (
        "dequantize_accumulate_many(Tensor(a!) out, Tensor[] packed, Tensor[] scales, int[] bits, int bucket, "
        "float[] weights) -> ()",
        _accumulate_many,
        _accumulate_many_fake,
    ),
):
    _name = _schema.split("(")[0]
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dynfed_lightning::{_name}", _fake, lib=_LIBRARY)
