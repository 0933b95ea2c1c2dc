"""The incumbents of the kernel benchmark: what others offer for the same job, each checked before it is timed.

* ``eager``: the shortest vectorised torch code that does the same; ``compiled``: that through ``torch.compile``;
* ``numpy``: the same in numpy (one thread);
* ``fbgemm``: ``torch.ops.quantized.embedding_bag_{4bit,2bit,byte}_prepack`` and ``_unpack``, inside torch: nearest rounding
  only, and a float16 scale and offset per row of 512 (float32 for 8 bits); ``fbgemm-gpu``: the package's own CPU operators;
* ``bitsandbytes``: blockwise 8 bits (a table of 256 values), ``nf4`` and ``fp4``: nearest rounding;
* ``torchao``: affine int8 and int4 per row, nearest rounding, codes in bytes; and its packing of 1 to 7 bits in shards.

eager, numpy and torch.compile are written for the widths that divide 8, where no code crosses a byte.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from typing import Any

import numpy as np
import torch
from kernels_timing import Case
from torch import Tensor

BUCKET = 512
WIDTHS = (2, 4, 8)  # that eager code packs
FBGEMM = {2: "2bit", 4: "4bit", 8: "byte"}
CHECKED = 1 << 16  # values of the input whose result is compared


# ---- what one would write oneself ----


def eager_pack(codes: Tensor, bits: int) -> Tensor:
    packed = codes[0 :: 8 // bits].clone()
    for i in range(1, 8 // bits):
        packed |= codes[i :: 8 // bits] << (bits * i)
    return packed


def eager_unpack(packed: Tensor, bits: int) -> Tensor:
    return torch.stack([(packed >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)], dim=1).view(-1)


def eager_quantize_pack(x: Tensor, bits: int, stochastic: bool) -> tuple[Tensor, Tensor]:
    rows, levels = x.view(-1, BUCKET), 2 ** (bits - 1) - 1
    scales = rows.abs().amax(dim=1, keepdim=True) / levels
    noise = torch.rand_like(rows) if stochastic else 0.5
    codes = (rows / scales + noise).floor_().clamp_(-levels, levels).add_(2 ** (bits - 1)).to(torch.uint8)
    return eager_pack(codes.view(-1), bits), scales.view(-1)


def eager_dequantize(packed: Tensor, scales: Tensor, bits: int) -> Tensor:
    values = eager_unpack(packed, bits).view(-1, BUCKET).float().sub_(2 ** (bits - 1))
    return values.mul_(scales.view(-1, 1)).view(-1)


def eager_accumulate(out: Tensor, packed: list[Tensor], scales: list[Tensor], bits: int) -> Tensor:
    for p, s in zip(packed, scales, strict=True):
        out.add_(eager_dequantize(p, s, bits), alpha=1 / len(packed))
    return out


def numpy_quantize_pack(x: np.ndarray, bits: int, rng: np.random.Generator | None) -> tuple[np.ndarray, np.ndarray]:
    rows, levels = x.reshape(-1, BUCKET), 2 ** (bits - 1) - 1
    scales = np.abs(rows).max(axis=1, keepdims=True) / np.float32(levels)
    noise = np.float32(0.5) if rng is None else rng.random(rows.shape, dtype=np.float32)
    codes = (np.clip(np.floor(rows / scales + noise), -levels, levels) + 2 ** (bits - 1)).astype(np.uint8).reshape(-1)
    packed = codes[0 :: 8 // bits].copy()
    for i in range(1, 8 // bits):
        packed |= codes[i :: 8 // bits] << (bits * i)
    return packed, scales


def numpy_dequantize(packed: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    codes = np.stack([(packed >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)], axis=1).reshape(-1, BUCKET)
    return (codes.astype(np.float32) - 2 ** (bits - 1)) * scales


# ---- checks: is what a row says what it does? ----


def within_step(x: Tensor, values: Tensor, levels: int, steps: float) -> str:
    """`values` must be the first of `x` to `steps` steps of a grid of `levels` intervals from a row's least to its largest.

    Half a step is nearest rounding, one is stochastic. A scale in float16 is off by 2**-11 of the row's range or less, an
    offset by as much.
    """
    rows = x[:CHECKED].reshape(-1, BUCKET).float()
    error = (values.reshape(-1)[: rows.numel()].view_as(rows).float() - rows).abs().amax(dim=1)
    span = rows.amax(dim=1) - rows.amin(dim=1)
    allowed = steps * span / levels + 2**-9 * span
    assert bool((error <= allowed).all()), f"off by {float((error / span * levels).max()):.3f} steps, not {steps}"
    return f"within {steps:g} step"


def within_symmetric_step(x: Tensor, values: Tensor, bits: int, steps: float) -> str:
    """As `within_step`, for a grid from minus the row's largest magnitude to plus that."""
    rows = x[:CHECKED].reshape(-1, BUCKET).float()
    error = (values.reshape(-1)[: rows.numel()].view_as(rows).float() - rows).abs().amax(dim=1)
    step = rows.abs().amax(dim=1) / (2 ** (bits - 1) - 1)
    assert bool((error <= 1.001 * steps * step).all()), f"off by {float((error / step).max()):.3f} steps, not {steps}"
    return f"within {steps:g} step"


def within_error(x: Tensor, values: Tensor, bound: float) -> str:
    """The squared error of the first values, relative to their squares, must be at most `bound` (and cannot be 0)."""
    x, values = x[:CHECKED].double(), values.reshape(-1)[:CHECKED].double()
    error = float(((x - values) ** 2).sum() / (x**2).sum())
    assert 0 < error <= bound, f"a relative error of {error:.3g}, not {bound:.3g}"
    return f"error {error:.2g}"


def equal(a: Tensor, b: Tensor) -> str:
    assert torch.equal(a, b), "it does not give back the codes"
    return "round trip"


# ---- the cases: an operation each of values `x`, for all `widths` they can, and numbers of clients ----


def payload(n: int, bits: float, scale_bytes: float = 4) -> float:
    """Bytes of `n` codes and their scales."""
    return n * bits / 8 + n / BUCKET * scale_bytes


def eager(x: Tensor, widths: list[int], clients: list[int]) -> Iterator[Case]:
    for bits in widths:
        if bits in WIDTHS:
            yield from _torch_cases("eager", x, bits, clients, lambda f: f)


def compiled(x: Tensor, widths: list[int], clients: list[int]) -> Iterator[Case]:
    if 4 in widths:
        torch.compiler.reset()  # every size is a compilation, and there is a limit to them
        yield from _torch_cases("compiled", x, 4, clients, partial(torch.compile, dynamic=False))


def _torch_cases(name: str, x: Tensor, bits: int, clients: list[int], wrap: Callable[..., Any]) -> Iterator[Case]:
    n, own = x.numel(), {"implementation": name, "bits": bits, "n": x.numel(), "version": f"torch {torch.__version__}"}
    packed, scales = eager_quantize_pack(x, bits, False)
    for rounding, steps in (("stochastic", 1.0), ("nearest", 0.5)):
        quantize = partial(wrap(eager_quantize_pack), x, bits, rounding == "stochastic")
        check = partial(_check_payload, x, bits, steps)
        moved = 4 * n + payload(n, bits)
        yield Case(f"quantize_pack {rounding}", run=quantize, moved=moved, bucket=BUCKET, check=check, **own)
    decode = partial(wrap(eager_dequantize), packed, scales, bits)
    check = partial(within_symmetric_step, x, bits=bits, steps=0.5)
    yield Case("unpack_dequantize", run=decode, moved=4 * n + payload(n, bits), bucket=BUCKET, check=check, **own)
    if bits < 8:  # eight bits are packed already
        codes = eager_unpack(packed, bits)
        moved = n * (1 + bits / 8)
        yield Case("pack", run=partial(wrap(eager_pack), codes, bits), moved=moved, check=partial(equal, packed), **own)
        yield Case(
            "unpack", run=partial(wrap(eager_unpack), packed, bits), moved=moved, check=partial(equal, codes), **own
        )
    for k in clients if bits == 4 else clients[:1]:
        out, many = torch.empty_like(x), ([packed.clone() for _ in range(k)], [scales.clone() for _ in range(k)])
        yield Case(
            "dequantize_accumulate",
            run=partial(wrap(eager_accumulate), out, *many, bits),
            moved=8 * n + k * payload(n, bits),
            clients=k,
            bucket=BUCKET,
            before=out.zero_,
            check=check,
            **own,
        )


def _check_payload(x: Tensor, bits: int, steps: float, result: tuple[Tensor, Tensor]) -> str:
    packed, scales = result[0][: CHECKED * bits // 8], result[1][: CHECKED // BUCKET]
    return within_symmetric_step(x, eager_dequantize(packed, scales, bits), bits, steps)


def numpy(x: Tensor, widths: list[int], clients: list[int]) -> Iterator[Case]:
    if 4 not in widths:
        return
    n, array, rng = x.numel(), x.numpy(), np.random.default_rng(0)
    own = {"implementation": "numpy", "bits": 4, "n": n, "version": f"numpy {np.__version__}", "bucket": BUCKET}
    moved = 4 * n + payload(n, 4)
    packed, scales = numpy_quantize_pack(array, 4, None)
    for rounding, source, steps in (("stochastic", rng, 1.0), ("nearest", None, 0.5)):

        def check(result: Any, steps: float = steps) -> str:
            values = numpy_dequantize(result[0], result[1], 4)
            return within_symmetric_step(x, torch.from_numpy(values), 4, steps)

        quantize = partial(numpy_quantize_pack, array, 4, source)
        yield Case(f"quantize_pack {rounding}", run=quantize, moved=moved, check=check, **own)
    yield Case(
        "unpack_dequantize",
        run=partial(numpy_dequantize, packed, scales, 4),
        moved=moved,
        check=lambda result: within_symmetric_step(x, torch.from_numpy(result), 4, 0.5),
        **own,
    )


def fbgemm(x: Tensor, widths: list[int], clients: list[int]) -> Iterator[Case]:
    for bits in widths:
        if bits in FBGEMM:
            prepack = getattr(torch.ops.quantized, f"embedding_bag_{FBGEMM[bits]}_prepack")
            unpack = getattr(torch.ops.quantized, f"embedding_bag_{FBGEMM[bits]}_unpack")
            yield from _rowwise("fbgemm", f"torch {torch.__version__}", x, bits, prepack, unpack)


def fbgemm_gpu(x: Tensor, widths: list[int], clients: list[int]) -> Iterator[Case]:
    theirs, version = torch.ops.fbgemm, f"fbgemm-gpu-cpu {metadata.version('fbgemm-gpu-cpu')}"
    for bits in widths:
        if bits == 8:
            prepack, unpack = theirs.FloatToFused8BitRowwiseQuantized, theirs.Fused8BitRowwiseQuantizedToFloat
        elif bits in FBGEMM:
            prepack = partial(_second, theirs.FloatToFusedNBitRowwiseQuantizedSBHalf, bits)
            unpack = partial(_second, theirs.FusedNBitRowwiseQuantizedSBHalfToFloat, bits)
        else:
            continue
        yield from _rowwise("fbgemm-gpu", version, x, bits, prepack, unpack)


def _second(f: Callable[..., Any], bits: int, rows: Tensor) -> Any:
    return f(rows, bits)


def _rowwise(name: str, version: str, x: Tensor, bits: int, prepack: Any, unpack: Any) -> Iterator[Case]:
    """Codes of a row with its scale and offset behind them: 4 bytes of both in float16, 8 in float32."""
    rows, n = x.view(-1, BUCKET), x.numel()
    theirs = prepack(rows)
    own = {"implementation": name, "bits": bits, "n": n, "version": version, "bucket": BUCKET}
    moved = 4 * n + payload(n, bits, 8 if bits == 8 else 4)
    check = partial(within_step, x, levels=2**bits - 1, steps=0.5)
    yield Case(
        "quantize_pack nearest",
        run=partial(prepack, rows),
        moved=moved,
        check=lambda result: check(unpack(result[: CHECKED // BUCKET])),
        **own,
    )
    yield Case("unpack_dequantize", run=partial(unpack, theirs), moved=moved, check=check, **own)


def bitsandbytes(x: Tensor, widths: list[int], clients: list[int]) -> Iterator[Case]:
    with _no_module("kernels"):  # it looks for a package of that name, and would find this benchmark
        f = importlib.import_module("bitsandbytes.functional")
    n = x.numel()
    own = {"n": n, "version": f"bitsandbytes {metadata.version('bitsandbytes')}", "bucket": BUCKET}
    # Its 4-bit code is slower than anything else here on a CPU: once is enough, at the smaller size.
    kinds = [("nf4", 4, 0.0125), ("fp4", 4, 0.025)] if n <= 1 << 24 or x.is_cuda else []
    for kind, bits, bound in [("blockwise", 8, 2e-4), *kinds]:
        if bits not in widths:
            continue
        options = {"blocksize": BUCKET} | ({"quant_type": kind} if bits == 4 else {})
        quantize = partial(f.quantize_4bit if bits == 4 else f.quantize_blockwise, **options)
        decode = f.dequantize_4bit if bits == 4 else f.dequantize_blockwise
        theirs, moved = quantize(x), 4 * n + payload(n, bits)

        def check(result: Any, decode: Any = decode, bound: float = bound) -> str:
            return within_error(x, decode(*result), bound)

        name = {"implementation": f"bitsandbytes {kind}", "bits": bits}
        yield Case("quantize_pack nearest", run=partial(quantize, x), moved=moved, check=check, **name, **own)
        check = partial(within_error, x, bound=bound)
        yield Case("unpack_dequantize", run=partial(decode, *theirs), moved=moved, check=check, **name, **own)


def torchao(x: Tensor, widths: list[int], clients: list[int]) -> Iterator[Case]:
    primitives = importlib.import_module("torchao.quantization.quant_primitives")
    packing = importlib.import_module("torchao.prototype.dtypes.uintx.bitpacking")
    rows, n, block = x.view(-1, BUCKET), x.numel(), (1, BUCKET)
    own = {"n": n, "version": f"torchao {metadata.version('torchao')}"}
    for bits in (b for b in (4, 8) if b in widths):
        top = 2 ** (bits - 1) - 1
        bounds = (torch.int8, -top, top)

        def quantize(bounds: tuple[torch.dtype, int, int] = bounds) -> tuple[Tensor, Tensor, Tensor]:
            scale, zero = primitives.choose_qparams_affine(rows, primitives.MappingType.SYMMETRIC, block, *bounds)
            return primitives.quantize_affine(rows, block, scale, zero, *bounds), scale, zero

        def decode(codes: Tensor, scale: Tensor, zero: Tensor, bounds: Any = bounds) -> Tensor:
            return primitives.dequantize_affine(codes, block, scale, zero, *bounds)

        def check(result: Any, bits: int = bits, decode: Any = decode) -> str:
            few = CHECKED // BUCKET
            return within_symmetric_step(x, decode(*(t[:few] for t in result)), bits, 0.5)

        moved = 5 * n + n / BUCKET * 8  # codes in bytes whatever their width; a scale and a zero point
        name = {"implementation": "torchao (unpacked)", "bits": bits, "bucket": BUCKET}
        yield Case("quantize_pack nearest", run=quantize, moved=moved, check=check, **name, **own)
        check = partial(within_symmetric_step, x, bits=bits, steps=0.5)
        yield Case("unpack_dequantize", run=partial(decode, *quantize()), moved=moved, check=check, **name, **own)
    for bits in (b for b in widths if b < 8):
        codes = torch.randint(0, 2**bits, (n // BUCKET, BUCKET), dtype=torch.uint8, device=x.device)
        pack, unpack = (partial(f, elem_size=bits, dim=-1) for f in (packing.pack, packing.unpack))
        shards, moved = pack(codes), n * (1 + bits / 8)
        name = {"implementation": "torchao", "bits": bits}
        check = partial(equal, codes)
        yield Case(
            "pack",
            run=partial(pack, codes),
            moved=moved,
            check=lambda r, check=check, unpack=unpack: check(unpack(r)),
            **name,
            **own,
        )
        yield Case("unpack", run=partial(unpack, shards), moved=moved, check=check, **name, **own)


@contextmanager
def _no_module(name: str) -> Iterator[None]:
    """No module of this name can be imported inside the block."""
    before = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


Peer = Callable[[Tensor, list[int], list[int]], Iterator[Case]]
PEERS: dict[str, tuple[Peer, str | None, tuple[str, ...]]] = {  # its cases, what must be importable, where it runs
    "eager": (eager, None, ("cpu", "cuda")),
    "compiled": (compiled, None, ("cpu", "cuda")),
    "numpy": (numpy, None, ("cpu",)),
    "fbgemm": (fbgemm, None, ("cpu",)),
    "fbgemm-gpu": (fbgemm_gpu, "fbgemm_gpu", ("cpu",)),
    "bitsandbytes": (bitsandbytes, "bitsandbytes", ("cpu", "cuda")),
    "torchao": (torchao, "torchao", ("cpu", "cuda")),
}


def missing(name: str, device: str) -> str | None:
    """Why a peer has no rows in this run; None if it has."""
    _, module, devices = PEERS[name]
    if device not in devices:
        return f"it has no {device} implementation"
    if name == "fbgemm" and "fbgemm" not in torch.backends.quantized.supported_engines:
        return "this torch is built without FBGEMM"
    if module is None:
        return None
    try:
        with warnings.catch_warnings(), _no_module("kernels"):
            warnings.simplefilter("ignore")
            logging.disable(logging.ERROR)
            importlib.import_module(module)
    except Exception as error:  # a package for another torch may fail in any way
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    finally:
        logging.disable(logging.NOTSET)
    return None
