"""The table of tensors that one call quantises: where each begins, its bits and bucket, and where its payload goes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ._ops_checks import MAX_ELEMENTS, check_bucket, check_int, check_lengths, num_buckets, packed_size


class Layout:
    """How a whole model update lies in memory, tensor by tensor, for the ``*_table`` operations.

    Every tensor starts its own buckets. Payloads follow each other without gaps: first the codes of the first tensor, and so
    on, in one arena of bytes; likewise the scales.

    Args:
        sizes: the number of values of each tensor.
        bits: 1 to 8: one number, or one per tensor.
        bucket: a positive multiple of 8: one number, or one per tensor.
        starts: where each tensor begins in the flat vector; by default one follows the other. No two may overlap.
        offsets: the global index of each tensor's first value, for its random bits: multiples of 8; by default the running
            count of values, rounded up to 8 at each tensor.

    Attributes:
        sizes, bits, bucket, starts, offsets: a tuple each, one number per tensor.
        table: int64 ``[tensors, 7]`` on the CPU: start, length, bits, bucket, offset, first byte, first scale. Not to be changed.
        numel: how long a flat vector must be at least.
        num_bytes: the size of the arena of codes.
        num_scales: the size of the arena of scales.
        largest_bucket: the largest of the buckets.

    Raises:
        ValueError: lists of different lengths, tensors that overlap, or a number out of range.
        TypeError: something that is not an integer.

    Example:
        >>> layout = Layout([1000, 10], bits=[4, 8])
        >>> layout.numel, layout.num_bytes, layout.num_scales
        (1010, 510, 3)
    """

    def __init__(
        self,
        sizes: Sequence[int],
        bits: int | Sequence[int],
        bucket: int | Sequence[int] = 512,
        starts: Sequence[int] | None = None,
        offsets: Sequence[int] | None = None,
    ) -> None:
        sizes = list(sizes)
        for n in sizes:
            check_int("sizes", n, 0, MAX_ELEMENTS)
        bits = [bits] * len(sizes) if isinstance(bits, int) else list(bits)
        bucket = [bucket] * len(sizes) if isinstance(bucket, int) else list(bucket)
        given = starts is not None
        starts = [0, *accumulate(sizes)][: len(sizes)] if starts is None else list(starts)
        if offsets is None:
            offsets = [0, *accumulate(-8 * (-n // 8) for n in sizes)][: len(sizes)]
        check_lengths(sizes=sizes, bits=bits, bucket=bucket, starts=starts, offsets=offsets)
        for b in bits:
            check_int("bits", b, 1, 8)
        for k in bucket:
            check_bucket(k)
        for start in starts:
            check_int("starts", start, 0, MAX_ELEMENTS)
        if given:
            spans = sorted((start, start + n) for start, n in zip(starts, sizes, strict=True) if n)
            for (start, end), (following, _) in pairwise(spans):
                if end > following:
                    raise ValueError(
                        f"Expected `starts` and `sizes` to keep tensors apart, but one from {start} to {end} overlaps one "
                        f"from {following}."
                    )
        for offset in offsets:
            check_int("offsets", offset, 0, 2**62)
            if offset % 8:
                raise ValueError(f"Expected `offsets` to be multiples of 8, but got {offset}.")
        self.sizes, self.bits, self.bucket = tuple(sizes), tuple(bits), tuple(bucket)
        self.starts, self.offsets = tuple(starts), tuple(offsets)
        bytes_at = [0, *accumulate(packed_size(n, b) for n, b in zip(sizes, bits, strict=True))]
        scales_at = [0, *accumulate(num_buckets(n, k) for n, k in zip(sizes, bucket, strict=True))]
        self.numel = max([0, *(s + n for s, n in zip(starts, sizes, strict=True))])
        self.num_bytes, self.num_scales = bytes_at[-1], scales_at[-1]
        self.largest_bucket = max([0, *bucket])
        check_int("the sum of sizes", sum(sizes), 0, MAX_ELEMENTS)
        rows = zip(starts, sizes, bits, bucket, offsets, bytes_at, scales_at, strict=False)
        self.table: Tensor = torch.tensor(list(rows), dtype=torch.int64, device="cpu").reshape(-1, 7)

    def agrees(self, other: Layout) -> bool:
        """Whether both describe the same tensors in the same buckets, perhaps with other bits."""
        return (self.starts, self.sizes, self.bucket) == (other.starts, other.sizes, other.bucket)

    def __len__(self) -> int:
        return len(self.sizes)

    def __repr__(self) -> str:
        return (
            f"Layout({len(self)} tensors, {sum(self.sizes)} values, {self.num_bytes} bytes, {self.num_scales} scales)"
        )
