"""The checks of `dynfed_lightning.ops`: the same words for every backend."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

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


def weights_tensor(weights: Sequence[float]) -> Tensor:
    """Weights as the operators take them: float64 on the CPU."""
    if not torch.compiler.is_compiling():
        for w in weights:
            check_weight(w)
        return torch.tensor([float(w) for w in weights], dtype=torch.float64, device="cpu")
    # Anything but arithmetic with tensors would compile anew for every value; the operator checks them when it runs.
    one = torch.ones(1, dtype=torch.float64, device="cpu")
    return torch.cat([one * w for w in weights]) if len(weights) else one[:0]


def weights_list(weights: Tensor) -> list[float]:
    """What `weights_tensor` holds, checked."""
    numbers = weights.tolist()
    for w in numbers:
        check_weight(w)
    return numbers


def check_pair(name: str, value: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two tensors."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"Expected `{name}` to be a pair of tensors (packed, scales), but got {type(value).__name__}.")
    return value[0], value[1]


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


def check_out(
    name: str, value: Tensor, dtype: torch.dtype, n: int, other_name: str, other: Tensor, apart: bool = True
) -> None:
    """A tensor to write `n` values to: of this dtype, on the device of `other`, contiguous, and apart from it in memory."""
    check_tensor(name, value, (dtype,))
    if value.numel() != n:
        raise ValueError(f"Expected `{name}` to hold {n} values, but got {value.numel()}.")
    if not value.is_contiguous() or value.is_neg():
        raise ValueError(f"Expected `{name}` to be contiguous, but got strides {tuple(value.stride())}.")
    check_device(name, value, other_name, other)
    if apart and overlap(value, other):
        raise ValueError(f"Expected `{name}` and `{other_name}` not to share memory, but they overlap.")


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share bytes, gaps between strides counted in. False where tensors have no memory (while tracing)."""
    if torch.compiler.is_compiling() or type(a) not in _PLAIN or type(b) not in _PLAIN or a.device.type == "meta":
        return False
    if not a.numel() or not b.numel():
        return False
    (a_first, a_end), (b_first, b_end) = _span(a), _span(b)
    return a_first < b_end and b_first < a_end


_PLAIN = (Tensor, torch.nn.Parameter)


def _span(x: Tensor) -> tuple[int, int]:
    """First byte and end of what a tensor covers."""
    first = x.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return first, first + (last + 1) * x.element_size()


def check_apart(name: str, tensors: Sequence[Tensor]) -> None:
    """Contiguous tensors to be written to do not share memory."""
    if torch.compiler.is_compiling() or any(type(t) not in _PLAIN or t.device.type == "meta" for t in tensors):
        return
    spans = sorted(_span(t) for t in tensors if t.numel())
    if any(end > first for (_, end), (first, _) in pairwise(spans)):
        raise ValueError(f"Expected the tensors of `{name}` not to share memory, but some overlap.")


def check_apart_from_others(name: str, tensors: Sequence[Tensor], other_name: str, others: Sequence[Tensor]) -> None:
    """None of these tensors, which are apart from each other and to be written to, shares memory with one of `others` of
    another place in its list: that would be read when it has been written to.
    """
    each = (*tensors, *others)
    if torch.compiler.is_compiling() or any(type(t) not in _PLAIN or t.device.type == "meta" for t in each):
        return
    spans = sorted((*_span(t), i) for i, t in enumerate(tensors) if t.numel())
    ends = [end for _, end, _ in spans]  # ascending too, as the spans are apart
    for j, other in enumerate(others):
        if not other.numel():
            continue
        first, end = _span(other)
        for at in range(bisect_right(ends, first), len(spans)):
            if spans[at][0] >= end:
                break
            if spans[at][2] != j:
                raise ValueError(
                    f"Expected `{name}[{spans[at][2]}]` to be apart from `{other_name}[{j}]` in memory, but they overlap."
                )


def written(*tensors: Tensor) -> None:
    """Tell autograd that an operator has changed these tensors: a backward pass that needs their old values must fail."""
    if not torch.compiler.is_compiling():  # there functionalisation has seen it
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


def check_lengths(**lists: Sequence[object]) -> None:
    """Lists that belong together have one length."""
    lengths = tuple(len(values) for values in lists.values())
    if len(set(lengths)) > 1:
        names = ", ".join(f"`{name}`" for name in lists)
        raise ValueError(f"Expected {names} to be lists of one length, but got lengths {lengths}.")
