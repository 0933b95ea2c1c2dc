"""Our own operations as cases of the kernel benchmark, each compared bit for bit with another backend before it is timed.

Implementations: ``ops`` is `dynfed_lightning.ops` as a user calls it, its output allocated by the call; ``out`` the same into
buffers that exist; ``kernel`` the backend's function alone, without argument checks and dispatch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from kernels_timing import OURS, Case, environment
from torch import Tensor

from dynfed_lightning import _ops_backends, ops
from dynfed_lightning.models import build_model

BUCKET = 512
MIXED = (2, 3, 3, 4, 4, 5, 5, 6)  # the bits of eight clients, 4 in the mean
SLICE = 1 << 15  # values of each compared slice
POISON = 0xA5
ROUNDINGS = ("stochastic", "nearest", "eden")  # in the order they are shown


def distilbert_sizes() -> list[int]:
    """The tensors of DistilBERT base, uncased (Sanh et al., arXiv 1910.01108): 66,362,880 values in 100 tensors."""
    d, hidden = 768, 3072
    layer = [*(d * d, d) * 4, d, d, d * hidden, hidden, hidden * d, d, d, d]  # attention, norm, feed-forward, norm
    return [30522 * d, 512 * d, d, d, *layer * 6]


def resnet20_sizes() -> list[int]:
    """The parameters of this package's ResNet-20 (He et al., CVPR 2016, section 4.2)."""
    return [p.numel() for p in build_model("resnet20").parameters()]


MODELS: dict[str, Callable[[], list[int]]] = {"resnet20": resnet20_sizes, "transformer": distilbert_sizes}


# ---- comparing with what another backend makes of a slice ----


def slices(n: int) -> list[tuple[int, int]]:
    """The first, a middle and the last stretch of n values, each from a multiple of the bucket."""
    starts = {0, n // 2 // BUCKET * BUCKET, max(0, -(-n // BUCKET) * BUCKET - SLICE)}
    return [(a, min(n, a + SLICE)) for a in sorted(starts)]


def same(a: Tensor, b: Tensor) -> None:
    """Equal bit patterns."""
    a = a.to(b.device)
    if a.dtype == torch.float32:
        a, b = a.view(torch.int32), b.view(torch.int32)
    assert torch.equal(a, b), f"{int((a != b).sum())} of {a.numel()} values differ from the reference's"


def by_oracle() -> Any:
    """What runs in this context is the plain PyTorch reference."""
    return environment({"DYNFED_BACKEND": "reference"})


def span(a: int, b: int, bits: int) -> slice:
    """The bytes of the codes of values a to b; a is a multiple of 8."""
    return slice(a * bits // 8, ops.packed_size(b, bits))


def scale_span(a: int, b: int) -> slice:
    return slice(a // BUCKET, ops.num_buckets(b, BUCKET))


def check_quantized(x: Tensor, bits: int, rounding: str, result: tuple[Tensor, Tensor]) -> str:
    packed, scales = result
    with by_oracle():
        for a, b in slices(x.numel()):
            want = ops.quantize_pack(x[a:b].cpu(), bits, BUCKET, 1, a, rounding)
            same(packed[span(a, b, bits)], want[0])
            same(scales[scale_span(a, b)], want[1])
    return "bits"


def check_values(packed: Tensor, scales: Tensor, bits: int, result: Tensor) -> str:
    with by_oracle():
        for a, b in slices(result.numel()):
            part = packed[span(a, b, bits)].cpu(), scales[scale_span(a, b)].cpu()
            same(result[a:b], ops.unpack_dequantize(*part, bits, BUCKET, b - a))
    return "bits"


def check_sum(x: Tensor, many: Sequence[Any], result: Tensor) -> str:
    packed, scales, bits, _, weights = many
    with by_oracle():
        for a, b in slices(x.numel()):
            parts = [p[span(a, b, k)].cpu() for p, k in zip(packed, bits, strict=True)]
            want = x[a:b].cpu().clone()
            ops.dequantize_accumulate_many(
                want, parts, [s[scale_span(a, b)].cpu() for s in scales], bits, BUCKET, weights
            )
            same(result[a:b], want)
    return "bits"


def check_packed(codes: Tensor, bits: int, result: Tensor) -> str:
    with by_oracle():
        for a, b in slices(codes.numel()):
            same(result[span(a, b, bits)], ops.pack(codes[a:b].cpu(), bits))
    return "bits"


def check_codes(packed: Tensor, bits: int, result: Tensor) -> str:
    with by_oracle():
        for a, b in slices(result.numel()):
            same(result[a:b], ops.unpack(packed[span(a, b, bits)].cpu(), bits, b - a))
    return "bits"


def check_rotated(x: Tensor, block: int, seed: int, result: Tensor) -> str:
    with by_oracle():
        for a, b in slices(x.numel()):
            a, b = a // block * block, -(-b // block) * block
            # A slice's signs are those of its place: 128 of them to a step of 8 in the offset.
            layout = ops.Layout([b - a], 8, offsets=[a // 128 * 8])
            same(result[a:b], ops.rotate(x[a:b].cpu(), block, seed, layout=layout))
    return "bits"


# ---- the cases ----


class Ours:
    """Cases of one backend, and with it of one instruction set.

    Args:
        x: the values, flat.
        variables: what selects the backend: ``DYNFED_BACKEND``, ``DYNFED_CPU_ISA``.
        label: what to call it in the ``backend`` column; empty: what the run uses anyway.
    """

    def __init__(self, x: Tensor, variables: dict[str, str] | None = None, label: str = "") -> None:
        self.x, self.n, self.label, self.variables = x, x.numel(), label, variables or {}

    def backend(self, operation: str) -> Any:
        with environment(self.variables):
            return _ops_backends.choose(operation, self.x.device)

    def case(self, operation: str, implementation: str, bits: int, moved: float, run: Any, **more: Any) -> Case:
        dtype = str(self.x.dtype).removeprefix("torch.")
        own = {"dtype": dtype, "version": OURS, "backend": self.label, "environment": self.variables}
        return Case(operation, implementation, bits, more.pop("n", self.n), moved, run, **{**own, **more})

    def payload(self, bits: int) -> float:
        """Bytes of a client's codes and scales."""
        return ops.packed_size(self.n, bits) + 4 * ops.num_buckets(self.n, BUCKET)

    def empty(self, bits: int) -> tuple[Tensor, Tensor]:
        """Buffers for codes and scales."""
        packed = torch.empty(ops.packed_size(self.n, bits), dtype=torch.uint8, device=self.x.device)
        return packed, torch.empty(ops.num_buckets(self.n, BUCKET), device=self.x.device)

    def quantized(self, bits: int, seed: int = 1) -> tuple[Tensor, Tensor]:
        with environment(self.variables):
            return ops.quantize_pack(self.x, bits, BUCKET, seed)

    def quantize(self, bits: int, kinds: Sequence[str], roundings: Sequence[str] = ROUNDINGS) -> Iterator[Case]:
        moved = self.x.element_size() * self.n + self.payload(bits)
        backend = self.backend("quantize_pack")
        for rounding in roundings:
            name, into, number = f"quantize_pack {rounding}", self.empty(bits), ops.ROUNDINGS.index(rounding)

            def poison(into: tuple[Tensor, Tensor] = into) -> None:
                into[0].fill_(POISON)
                into[1].fill_(float("nan"))

            def kernel(into: tuple[Tensor, Tensor] = into, number: int = number) -> tuple[Tensor, Tensor]:
                backend.quantize_pack(self.x, bits, BUCKET, 1, 0, number, *into)
                return into

            common = {"bucket": BUCKET, "check": partial(check_quantized, self.x, bits, rounding)}
            call = partial(ops.quantize_pack, self.x, bits, BUCKET, 1, 0, rounding)
            runs = {"ops": call, "out": partial(call, out=into), "kernel": kernel}
            for kind in kinds:
                yield self.case(name, kind, bits, moved, runs[kind], before=poison, **common)

    def dequantize(self, bits: int, kinds: Sequence[str]) -> Iterator[Case]:
        packed, scales = self.quantized(bits)
        out = torch.empty(self.n, device=self.x.device)
        dequantize = self.backend("unpack_dequantize").unpack_dequantize

        def kernel() -> Tensor:
            dequantize(packed, scales, bits, BUCKET, out)
            return out

        call = partial(ops.unpack_dequantize, packed, scales, bits, BUCKET, self.n)
        runs = {"ops": call, "out": partial(call, out=out), "kernel": kernel}
        common = {"bucket": BUCKET, "check": partial(check_values, packed, scales, bits)}
        for kind in kinds:
            before = partial(out.fill_, float("nan"))
            moved = 4 * self.n + self.payload(bits)
            yield self.case("unpack_dequantize", kind, bits, moved, runs[kind], before=before, **common)

    def pack(self, bits: int, kinds: Sequence[str]) -> Iterator[Case]:
        packed = self.quantized(bits)[0]
        with environment(self.variables):
            codes = ops.unpack(packed, bits, self.n)
        into, moved = (torch.empty_like(packed), torch.empty_like(codes)), self.n * (1 + bits / 8)
        pack, unpack = self.backend("pack").pack, self.backend("unpack").unpack

        def pack_kernel() -> Tensor:
            pack(codes, bits, into[0])
            return into[0]

        def unpack_kernel() -> Tensor:
            unpack(packed, bits, into[1])
            return into[1]

        call = partial(ops.pack, codes, bits)
        back = partial(ops.unpack, packed, bits, self.n)
        runs = {"ops": call, "out": partial(call, out=into[0]), "kernel": pack_kernel}
        backs = {"ops": back, "out": partial(back, out=into[1]), "kernel": unpack_kernel}
        for kind in kinds:
            before, check = partial(into[0].fill_, POISON), partial(check_packed, codes, bits)
            yield self.case("pack", kind, bits, moved, runs[kind], before=before, check=check)
        for kind in kinds:
            before, check = partial(into[1].fill_, POISON), partial(check_codes, packed, bits)
            yield self.case("unpack", kind, bits, moved, backs[kind], before=before, check=check)

    def clients(self, bits: Sequence[int]) -> tuple[list[Tensor], list[Tensor], list[int], int, list[float]]:
        """Payloads of different clients in different memory, of the same values with other random bits."""
        payloads = [self.quantized(b, seed) for seed, b in enumerate(bits)]
        k = len(bits)
        return [p for p, _ in payloads], [s for _, s in payloads], list(bits), BUCKET, [1 / (k + i) for i in range(k)]

    def accumulate(self, bits: int, clients: Sequence[int]) -> Iterator[Case]:
        out = torch.empty(self.n, device=self.x.device)
        for k in clients:
            many = self.clients([bits] * k)
            run = partial(ops.dequantize_accumulate_many, out, *many)
            yield self._accumulate(out, many, "dequantize_accumulate", "ops", bits, run)

    def accumulate_mixed(self) -> Iterator[Case]:
        """Eight clients with bits 2 to 6: in one pass, and one after the other."""
        out, many = torch.empty(self.n, device=self.x.device), self.clients(MIXED)
        packed, scales, bits, _, weights = many

        def singly() -> Tensor:
            for p, s, b, w in zip(packed, scales, bits, weights, strict=True):
                ops.dequantize_accumulate(out, p, s, b, BUCKET, w)
            return out

        name, together = "dequantize_accumulate 2-6 bits", partial(ops.dequantize_accumulate_many, out, *many)
        yield self._accumulate(out, many, name, "ops", 4, together)
        yield self._accumulate(out, many, name, "ops, one by one", 4, singly)

    def _accumulate(self, out: Tensor, many: Any, name: str, implementation: str, bits: int, run: Any) -> Case:
        moved = 8 * self.n + sum(self.payload(b) for b in many[2])
        check = partial(check_sum, self.x, many)
        more = {"clients": len(many[2]), "bucket": BUCKET, "before": partial(out.copy_, self.x), "check": check}
        return self.case(name, implementation, bits, moved, run, **more)

    def rotate(self, block: int) -> Iterator[Case]:
        """Into a new vector, in place, and back in place."""
        if self.n % block:
            return
        y, moved = self.x.clone(), 8 * self.n
        check, seed = partial(check_rotated, self.x, block, 3), 3
        reset = partial(y.copy_, self.x)
        runs = {"ops": partial(ops.rotate, self.x, block, seed), "in place": partial(ops.rotate, y, block, seed, out=y)}
        for kind, run in runs.items():
            yield self.case(f"rotate {block}", kind, 32, moved, run, before=reset, check=check)
        inverse = partial(ops.rotate, y, block, seed, inverse=True, out=y)
        yield self.case(f"rotate {block}, inverse", "in place", 32, moved, inverse)

    # ---- a table of tensors against one flat vector of the same size ----

    def layouts(self, model: str, sizes: list[int], bits: int = 4) -> Iterator[Case]:
        """The update of a model: `self.x` is its flat vector. Stochastic, into existing buffers and into new ones."""
        mixed = [2 + i % 5 for i in range(len(sizes))]  # 4 in the mean over tensors
        tensors = [t.clone() for t in self.x.split(sizes)]
        layout, other, flat = ops.Layout(sizes, bits, BUCKET), ops.Layout(sizes, mixed, BUCKET), self.empty(bits)
        device = self.x.device

        def arenas(table: ops.Layout) -> tuple[Tensor, Tensor]:
            codes = torch.empty(table.num_bytes, dtype=torch.uint8, device=device)
            return codes, torch.empty(table.num_scales, device=device)

        def check(table: ops.Layout, result: tuple[Tensor, Tensor]) -> str:
            with by_oracle():
                for start, size, width, _, offset, byte, scale in table.table.tolist():
                    cut = size if size <= 1 << 12 else 1 << 12  # whole buckets of a large tensor
                    want = ops.quantize_pack(self.x[start : start + cut].cpu(), width, BUCKET, 1, offset)
                    same(result[0][byte:][: want[0].numel()], want[0])
                    same(result[1][scale:][: want[1].numel()], want[1])
            return "bits"

        name = f"quantize_pack, {model}"
        quantize, table = partial(ops.quantize_pack, self.x, bits, BUCKET, 1), ops.quantize_pack_table
        runs = {
            "flat": (quantize, flat, partial(check_quantized, self.x, bits, "stochastic")),
            "table": (partial(table, self.x, layout, 1), arenas(layout), partial(check, layout)),
            "list": (partial(table, tensors, layout, 1), arenas(layout), partial(check, layout)),
            "mixed bits": (partial(table, self.x, other, 1), arenas(other), partial(check, other)),
        }
        for kind, (run, out, checked) in runs.items():
            moved = 4 * self.n + out[0].numel() + 4 * out[1].numel()
            more = {"bucket": BUCKET, "check": checked}
            yield self.case(name, f"ops, {kind}", bits, moved, run, **more)
            yield self.case(name, f"out, {kind}", bits, moved, partial(run, out=out), **more)

        def flattened() -> tuple[Tensor, Tensor]:
            return ops.quantize_pack(torch.cat(tensors), bits, BUCKET, 1)

        moved = 4 * self.n + self.payload(bits)
        yield self.case(name, "ops, flattened list", bits, moved + 8 * self.n, flattened, bucket=BUCKET)

        def loop() -> list[Any]:
            return [ops.quantize_pack(t, bits, BUCKET, 1, at) for t, at in zip(tensors, layout.offsets, strict=True)]

        yield self.case(name, "ops, a call per tensor", bits, moved, loop, bucket=BUCKET)
