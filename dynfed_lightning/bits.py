"""How many bits a tensor gets: an integer, None for "uncompressed", or a policy that decides tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from dynfed_lightning.schema import TensorSpec

if TYPE_CHECKING:
    from dynfed_lightning.stages.base import CodecContext


@runtime_checkable
class BitPolicy(Protocol):
    """Decides the bit-width of one tensor in one round."""

    def __call__(self, spec: TensorSpec, ctx: CodecContext) -> int | None:
        """Bits, 1 to 8, for the tensor called ``spec.name``; None leaves it uncompressed."""
        ...


def check_bits(bits: object, name: str = "bits") -> int | None:
    """`bits` if it is None or an integer from 1 to 8.

    Raises:
        ValueError: anything else.
    """
    if bits is None:
        return None
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"Expected `{name}` to be an integer from 1 to 8, but got {bits!r}.")
    return bits


class FixedBits:
    """The same bits for every tensor in every round.

    Args:
        bits: 1 to 8, or None.
    """

    def __init__(self, bits: int | None) -> None:
        self.bits = check_bits(bits)

    def __call__(self, spec: TensorSpec, ctx: CodecContext) -> int | None:
        return self.bits

    def __repr__(self) -> str:
        return f"FixedBits({self.bits})"


class InstructedBits:
    """What the server told this client for this round: ``ctx.scalars[key]``, rounded to the nearest integer.

    A scalar travels as a number, so DynFed's real-valued bits (eq. 4) may be sent as they are.

    Args:
        key: which scalar holds the bits.
        default: the bits when the server said nothing; without one that is an error.
    """

    def __init__(self, key: str = "bits", default: int | None = None) -> None:
        self.key = key
        self.default = check_bits(default, "default")

    def __call__(self, spec: TensorSpec, ctx: CodecContext) -> int | None:
        value = ctx.scalars.get(self.key, self.default)
        if value is None:
            got = sorted(ctx.scalars) or "no scalars"
            raise ValueError(
                f"Expected the server to instruct `{self.key}` (`ctx.scalars[{self.key!r}]`), but got {got}."
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"Expected the instructed `{self.key}` to be a number from 1 to 8, but got {value!r}.")
        return check_bits(math.floor(value + 0.5), self.key)

    def __repr__(self) -> str:
        return f"InstructedBits({self.key!r})"


class PatternBits:
    """Bits by name: the first shell pattern that matches wins.

    Args:
        patterns: e.g. ``{"*.bias": 8, "conv1.*": None}``; a value is 1 to 8, None, or another policy.
        default: for names that no pattern matches; the same kinds of value.

    Example:
        >>> policy = PatternBits({"*.bias": 8}, default=4)
        >>> import torch
        >>> from dynfed_lightning.codec import CodecContext
        >>> [policy(TensorSpec(n, (3,), torch.float32), CodecContext()) for n in ("fc.bias", "fc.weight")]
        [8, 4]
    """

    def __init__(self, patterns: Mapping[str, int | BitPolicy | None], default: int | BitPolicy | None) -> None:
        self.patterns = {pattern: as_bit_policy(bits) for pattern, bits in patterns.items()}
        self.default = as_bit_policy(default)

    def __call__(self, spec: TensorSpec, ctx: CodecContext) -> int | None:
        for pattern, policy in self.patterns.items():
            if fnmatchcase(spec.name, pattern):
                return policy(spec, ctx)
        return self.default(spec, ctx)

    def __repr__(self) -> str:
        return f"PatternBits({self.patterns}, default={self.default})"


def as_bit_policy(bits: int | BitPolicy | None) -> BitPolicy:
    """A number or None becomes `FixedBits`; a policy is returned as it is.

    Raises:
        ValueError: neither.
    """
    if bits is not None and not isinstance(bits, int) and callable(bits):
        return bits
    return FixedBits(bits)
