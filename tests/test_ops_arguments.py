"""Bad arguments give one clear error each, the same for every backend; and the choice of the backend itself."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ops_support import BACKENDS, CPP_BACKENDS, backend_fixture, select

from dynfed_lightning import _ops_backends, ops

any_backend = backend_fixture(BACKENDS)
cpp_backend = backend_fixture(CPP_BACKENDS)

X, P4, S1 = torch.zeros(16), torch.zeros(8, dtype=torch.uint8), torch.zeros(1)
ACC = ops.dequantize_accumulate


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.quantize_pack(X, 9), ValueError, "Expected `bits` to be an integer from 1 to 8, but got 9."),
        (lambda: ops.quantize_pack(X, 0), ValueError, "`bits`.*but got 0"),
        (lambda: ops.quantize_pack(X, 4.0), TypeError, "Expected `bits` to be an integer, but got float."),
        (lambda: ops.quantize_pack(X, True), TypeError, "Expected `bits` to be an integer, but got bool."),
        (
            lambda: ops.quantize_pack(X, 4, 12),
            ValueError,
            "Expected `bucket` to be a positive multiple of 8, but got 12.",
        ),
        (lambda: ops.quantize_pack(X, 4, 0), ValueError, "`bucket`.*but got 0"),
        (lambda: ops.quantize_pack(X, 4, -8), ValueError, "`bucket`.*but got -8"),
        (lambda: ops.quantize_pack(X, 4, 8, seed=-1), ValueError, "`seed`.*but got -1"),
        (lambda: ops.quantize_pack(X, 4, 8, seed=2**64), ValueError, "`seed`.*but got 18446744073709551616"),
        (lambda: ops.quantize_pack(X, 4, 8, offset=-8), ValueError, "`offset`.*but got -8"),
        (
            lambda: ops.quantize_pack(X, 4, 8, rounding="up"),
            ValueError,
            "`rounding` to be one of nearest, stochastic, eden, but got 'up'",
        ),
        (
            lambda: ops.quantize_pack(X.double(), 4),
            TypeError,
            "`x`.*float32 or bfloat16 or float16, but got torch.float64",
        ),
        (lambda: ops.quantize_pack([1.0], 4), TypeError, "`x` to be a tensor.*but got list"),
        (lambda: ops.quantize_pack(X.to_sparse(), 4), TypeError, "`x` to be a dense tensor"),
        (lambda: ops.pack(X, 4), TypeError, "`codes` to be a tensor of uint8, but got torch.float32"),
        (lambda: ops.pack(P4 + 16, 4), ValueError, r"`codes` to hold values below 2\*\*bits = 16, but got 16"),
        (lambda: ops.pack(torch.tensor([0] * 99 + [255]).byte(), 7), ValueError, "but got 255"),
        (lambda: ops.unpack(P4, 4, 17), ValueError, "`packed` to hold 9 bytes for 17 codes of 4 bits, but got 8"),
        (lambda: ops.unpack(P4, 4, -1), ValueError, "`n`.*but got -1"),
        (lambda: ops.unpack(P4.int(), 4, 16), TypeError, "`packed` to be a tensor of uint8"),
        (
            lambda: ops.unpack_dequantize(P4, S1, 4, 8, 16),
            ValueError,
            "`scales` to hold 2 values, one per 8 of 16, but got 1",
        ),
        (lambda: ops.unpack_dequantize(P4, S1.half(), 4, 16, 16), TypeError, "`scales` to be a tensor of float32"),
        (
            lambda: ops.unpack_dequantize(P4, S1.to("meta"), 4, 16, 16),
            ValueError,
            "`scales` to be on the device of `packed`",
        ),
        (lambda: ACC(X.half(), P4, S1, 4, 16, 1.0), TypeError, "`out` to be a tensor of float32"),
        (lambda: ACC(torch.zeros(15), P4, S1, 3, 16, 1.0), ValueError, "`packed` to hold 6 bytes"),
        (lambda: ACC(X, P4, S1, 4, 16, math.nan), ValueError, "`weight` to be a finite float32, but got nan"),
        (lambda: ACC(X, P4, S1, 4, 16, -math.inf), ValueError, "`weight` to be a finite float32, but got -inf"),
        (lambda: ACC(X, P4, S1, 4, 16, 1e300), ValueError, "`weight` to be a finite float32, but got 1e.300"),
        (lambda: ACC(X, P4, S1, 4, 16, "1"), TypeError, "`weight` to be a number, but got str"),
        (lambda: ACC(X, P4.to("meta"), S1, 4, 16, 1.0), ValueError, "`packed` to be on the device of `out`"),
        (lambda: ops.pack(P4, 4, out=P4), ValueError, "`out` to hold 4 values, but got 8"),
        (lambda: ops.pack(P4, 4, out=X[:4]), TypeError, "`out` to be a tensor of uint8, but got torch.float32"),
        (
            lambda: ops.unpack(P4, 4, 16, out=P4.repeat(4)[::2]),
            ValueError,
            r"`out` to be contiguous, but got strides \(2,",
        ),
        (lambda: ops.unpack(P4, 4, 16, out=P4), ValueError, "`out` to hold 16 values, but got 8"),
        (lambda: ops.quantize_pack(X, 4, 8, out=(P4, S1)), ValueError, r"`out\[1\]` to hold 2 values, but got 1"),
        (
            lambda: ops.quantize_pack(X, 4, 16, out=(P4.to("meta"), S1)),
            ValueError,
            r"`out\[0\]` to be on the device of `x`",
        ),
        (lambda: ops.unpack_dequantize(P4, S1, 4, 16, 16, out=X.half()), TypeError, "`out` to be a tensor of float32"),
        (
            lambda: ops.quantize_pack(X, 4, 65544, rounding="eden"),
            ValueError,
            "`bucket` to be at most 65536 with rounding 'eden', but got 65544",
        ),
        (lambda: ops.rotate(X, 12), ValueError, "`block` to be a power of two, but got 12"),
        (lambda: ops.rotate(X, 16384), ValueError, "`block` to be an integer from 1 to 8192, but got 16384"),
        (lambda: ops.rotate(X.int()), TypeError, "`x` to be a tensor of float32 or bfloat16 or float16"),
        (lambda: ops.rotate(X, out=torch.zeros(8)), ValueError, "`out` to hold 16 values, but got 8"),
        (lambda: ops.rotate(X, layout=ops.Layout([17], 4)), ValueError, "`x` to hold at least 17 values, but got 16"),
        (
            lambda: ops.Layout([16, 3], [4]),
            ValueError,
            r"`sizes`, `bits`, .* of one length, but got lengths \(2, 1, 2, 2, 2\)",
        ),
        (lambda: ops.Layout([16], 9), ValueError, "`bits` to be an integer from 1 to 8, but got 9"),
        (lambda: ops.Layout([16], 4, 12), ValueError, "`bucket` to be a positive multiple of 8, but got 12"),
        (lambda: ops.Layout([-1], 4), ValueError, "`sizes` to be an integer from 0 .* but got -1"),
        (lambda: ops.Layout([16], 4, starts=[-1]), ValueError, "`starts` .* but got -1"),
        (lambda: ops.Layout([16], 4, offsets=[4]), ValueError, "`offsets` to be multiples of 8, but got 4"),
        (lambda: ops.Layout([16.0], 4), TypeError, "`sizes` to be an integer, but got float"),
        (
            lambda: ops.quantize_pack_table(X, ops.Layout([9, 8], 4)),
            ValueError,
            "`x` to hold at least 17 values, but got 16",
        ),
        (
            lambda: ops.quantize_pack_table([X, X], ops.Layout([16, 8], 4)),
            ValueError,
            r"`x` to be tensors of the table's sizes \(16, 8\), but got \(16, 16\)",
        ),
        (
            lambda: ops.quantize_pack_table([X, X.to("meta")], ops.Layout([16, 16], 4)),
            ValueError,
            r"`x` to be on the device of `x\[0\]` \(.*\), but got meta",
        ),
        (
            lambda: ops.quantize_pack_table(X, ops.Layout([16], 4, 2**17), rounding="eden"),
            ValueError,
            "`bucket` to be at most 65536",
        ),
        (
            lambda: ops.unpack_dequantize_table(P4, S1, ops.Layout([16], 5)),
            ValueError,
            "`packed` to hold 10 values for Layout.*, but got 8",
        ),
        (
            lambda: ops.unpack_dequantize_table(P4, S1, ops.Layout([16], 4), out=torch.zeros(15)),
            ValueError,
            "`out` to hold at least 16 values, but got 15",
        ),
        (
            lambda: ops.dequantize_accumulate_table(
                X, [P4, P4], [S1, S1], [ops.Layout([16], 4), ops.Layout([16], 4, starts=[1])], [1.0, 1.0]
            ),
            ValueError,
            "`layouts` to differ in bits only, but got Layout",
        ),
        (
            lambda: ops.Layout([16, 16], 4, starts=[0, 15]),
            ValueError,
            "`starts` and `sizes` to keep tensors apart, but one from 0 to 16 overlaps one from 15",
        ),
        (lambda: ops.unpack(P4, 4, 8, out=P4), ValueError, "`packed` to hold 4 bytes"),
        (
            lambda: ops.unpack(P4[:4], 4, 8, out=P4),
            ValueError,
            "`out` and `packed` not to share memory, but they overlap",
        ),
        (
            lambda: ops.unpack_dequantize_table(P4, torch.zeros(2), ops.Layout([8, 8], 4), out=[X[:8], X[4:12]]),
            ValueError,
            "Expected the tensors of `out` not to share memory",
        ),
        (lambda: ops.rotate(X[:8], 8, out=X[4:12]), ValueError, "`out` and `x` not to share memory"),
        (lambda: ops.rotate(X, 8, inverse="no"), TypeError, "`inverse` to be True or False, but got 'no'"),
        (lambda: ops.rotate(X, 8, layout=[16]), TypeError, "`layout` to be a Layout, but got list"),
        (lambda: ops.quantize_pack_table(X, [16]), TypeError, "`layout` to be a Layout, but got list"),
        (
            lambda: ops.quantize_pack(X, 4, out=P4),
            TypeError,
            r"`out` to be a pair of tensors \(packed, scales\), but got Tensor",
        ),
        (
            lambda: ops.dequantize_accumulate_table(X, [P4], [S1], [ops.Layout([16], 4)], [math.inf]),
            ValueError,
            "`weight` to be a finite float32, but got inf",
        ),
        (
            lambda: ops.dequantize_accumulate_many(X, [P4], [S1], [4, 4], 16, [1.0]),
            ValueError,
            r"lists of one length, but got lengths \(1, 1, 2, 1\)",
        ),
    ],
)
def test_bad_arguments(
    any_backend: str,
    call: Callable[[], object],
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("X", "P4", "S1"):  # what the cases' lambdas look up, on the device of the backend
        monkeypatch.setitem(globals(), name, globals()[name].to(torch.get_default_device()))
    with pytest.raises(error, match=message):
        call()


def test_the_kernels_check_sizes_too(cpp_backend: str) -> None:
    """Called around ops.py, a wrong size must still not touch foreign memory."""
    with pytest.raises(RuntimeError, match="Expected `packed` to have 500 elements, but got 8"):
        torch.ops.dynfed_lightning.unpack(P4, 4, 1000)
    with pytest.raises(RuntimeError, match="Expected `scales`"):
        torch.ops.dynfed_lightning.dequantize_accumulate_many(X.clone(), [P4], [torch.zeros(0)], [4], 16, torch.ones(1))
    with pytest.raises(RuntimeError, match="Expected `bits`"):
        torch.ops.dynfed_lightning.quantize_pack(X, 9, 8, 0, 0, 1)


# ---- choosing a backend ----


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_gpu_backends_refuse_cpu_tensors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNFED_BACKEND", name)
    with pytest.raises(ValueError, match=f"Expected tensors on cuda with DYNFED_BACKEND={name}, but got cpu"):
        ops.quantize_pack(X, 4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_gpu_backends_say_why_they_cannot_run(name: str) -> None:
    reason = _ops_backends.missing(name)
    assert reason and not reason.endswith(".")


def test_unknown_backend_and_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNFED_BACKEND", "gpu")
    with pytest.raises(
        ValueError, match="`DYNFED_BACKEND` to be one of auto, reference, cpu, triton, cuda, but got 'gpu'"
    ):
        ops.quantize_pack(X, 4)
    select(monkeypatch, "cpu-scalar")
    assert ops.backend() == "cpu (scalar)"
    monkeypatch.setenv("DYNFED_CPU_ISA", "neon")
    with pytest.raises(
        ValueError, match="`DYNFED_CPU_ISA` to be one of auto, scalar, avx2, avx512, avx512vbmi, but got 'neon'"
    ):
        ops.quantize_pack(X, 4)


def test_without_the_kernels_auto_warns_once_and_cpu_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ops_backends, "load_error", lambda: "it is not built")
    _ops_backends._say_once.cache_clear()
    monkeypatch.setenv("DYNFED_BACKEND", "cpu")
    with pytest.raises(
        RuntimeError,
        match=r"Expected `DYNFED_BACKEND` to be a backend that can run here, but got 'cpu': it is not built\.",
    ):
        ops.pack(P4, 4)
    monkeypatch.setenv("DYNFED_BACKEND", "")
    with pytest.warns(
        RuntimeWarning,
        match=r"kernels of dynfed_lightning for 'cpu' tensors are missing \(cpu: it is not built\); the PyTorch",
    ):
        ops.pack(P4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops.pack(P4, 4).tolist() == [0] * 4
        assert ops.backend() == "reference"


def test_a_library_that_does_not_load_is_a_reason_not_a_crash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    monkeypatch.setattr(_ops_backends, "__file__", str(tmp_path / "_ops_backends.py"))
    reason = _ops_backends.load_error.__wrapped__()
    assert reason.startswith("_C.abi3.so does not load with torch")
    (tmp_path / "_C.abi3.so").unlink()
    assert "is not built" in _ops_backends.load_error.__wrapped__()
