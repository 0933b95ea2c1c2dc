"""The checks of `dynfed_lightning.ops`: the same words for every backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_ELEMENTS = 1 << 59  # n * bits stays within 63 bits
MAX_BUCKET = 1 << 31
MAX_EDEN_BUCKET = 65536  # csrc/core/eden.h: sums of squares stay within 63 bits
MAX_ROTATE_BLOCK = 8192
ROUNDINGS = ("nearest", "stochastic", "eden")  # their numbers in the operators are their places
FLOAT32_MAX = 3.4028234663852886e38


def packed_size(n: int, bits: int) -> int:
    """Bytes of `n` packed codes: ``ceil(n * bits / 8)``."""
    return (n * bits + 7) // 8


def num_buckets(n: int, bucket: int) -> int:
    """How many scales `n` values have: ``ceil(n / bucket)``."""
    return (n + bucket - 1) // bucket


def check_int(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"Expected `{name}` to be an integer, but got {type(value).__name__}.")
    if not low <= value <= high:
        raise ValueError(f"Expected `{name}` to be an integer from {low} to {high}, but got {value}.")


def check_bucket(bucket: int) -> None:
    check_int("bucket", bucket, 1, MAX_BUCKET)
    if bucket % 8:
        raise ValueError(f"Expected `bucket` to be a positive multiple of 8, but got {bucket}.")


def rounding_number(rounding: str, bucket: int) -> int:
    """The number of a rounding, once it has proved possible with buckets of this size."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"Expected `rounding` to be one of {', '.join(ROUNDINGS)}, but got {rounding!r}.")
    if rounding == "eden" and bucket > MAX_EDEN_BUCKET:
        raise ValueError(f"Expected `bucket` to be at most {MAX_EDEN_BUCKET} with rounding 'eden', but got {bucket}.")
    return ROUNDINGS.index(rounding)


def signed_seed(seed: int) -> int:
    """The seed as operators take it: their arguments are signed 64-bit integers."""
    check_int("seed", seed, 0, 2**64 - 1)
    return seed - 2**64 if seed >= 2**63 else seed


def check_weight(value: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"Expected `weight` to be a number, but got {type(value).__name__}.")
    if not abs(value) <= FLOAT32_MAX:
        raise ValueError(f"Expected `weight` to be a finite float32, but got {value}.")


def check_tensor(name: str, value: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if isinstance(value, Tensor) and value.dtype in dtypes and value.layout == torch.strided:
        return
    allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
    if not isinstance(value, Tensor):
        raise TypeError(f"Expected `{name}` to be a tensor of {allowed}, but got {type(value).__name__}.")
    if value.dtype not in dtypes:
        raise TypeError(f"Expected `{name}` to be a tensor of {allowed}, but got {value.dtype}.")
    raise TypeError(f"Expected `{name}` to be a dense tensor, but got layout {value.layout}.")


def check_packed(name: str, value: Tensor, n: int, bits: int) -> None:
    check_tensor(name, value, (torch.uint8,))
    size = packed_size(n, bits)
    if value.numel() != size:
        raise ValueError(
            f"Expected `{name}` to hold {size} bytes for {n} codes of {bits} bits, but got {value.numel()}."
        )


def check_scales(name: str, value: Tensor, n: int, bucket: int) -> None:
    check_tensor(name, value, (torch.float32,))
    size = num_buckets(n, bucket)
    if value.numel() != size:
        raise ValueError(f"Expected `{name}` to hold {size} values, one per {bucket} of {n}, but got {value.numel()}.")


def check_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"Expected `{name}` to be on the device of `{other_name}` ({other.device}), but got {value.device}."
        )


def check_out(name: str, value: Tensor, dtype: torch.dtype, n: int, other_name: str, other: Tensor) -> None:
    """A tensor to write `n` values to: of this dtype, on the device of `other`, and contiguous."""
    check_tensor(name, value, (dtype,))
    if value.numel() != n:
        raise ValueError(f"Expected `{name}` to hold {n} values, but got {value.numel()}.")
    if not value.is_contiguous():
        raise ValueError(f"Expected `{name}` to be contiguous, but got strides {tuple(value.stride())}.")
    check_device(name, value, other_name, other)


def check_lengths(**lists: Sequence[object]) -> None:
    """Lists that belong together have one length."""
    lengths = tuple(len(values) for values in lists.values())
    if len(set(lengths)) > 1:
        names = ", ".join(f"`{name}`" for name in lists)
        raise ValueError(f"Expected {names} to be lists of one length, but got lengths {lengths}.")
