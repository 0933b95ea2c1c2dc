"""Learned centres: wrong arguments are named, operators are registered, the kernels refuse what they could not hold."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from ops_support import BACKENDS, CPP_BACKENDS, backend_fixture
from soft_support import calls, centers, here
from torch import Tensor

from dynfed_lightning import _ops_backends, _ops_cpu, _reference, ops

backend = backend_fixture(BACKENDS)
cpp = backend_fixture(CPP_BACKENDS)
X, C = torch.randn(6), torch.tensor([-1.0, 0.0, 1.0])


def every(x: Any, c: Any) -> list[Any]:
    """The functions that take values and centres."""
    return [
        lambda: ops.soft_quantize(x, c, 2.0),
        lambda: ops.nearest_center(x, c),
        lambda: ops.prox_weights(x, c, 0.1),
        lambda: ops.prox_centers(c, x, c, 0.1),
    ]


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([0.5, 0.5], "strictly ascending, but got 0.5 and then 0.5 (at 0 and 1)."),
        ([0.0, 1.0, 0.5, 2.0], "strictly ascending, but got 1.0 and then 0.5 (at 1 and 2)."),
        ([0.0, math.nan, 1.0], "finite, but got nan at 1."),
        ([math.inf], "finite, but got inf at 0."),
        ([-math.inf, 0.0], "finite, but got -inf at 0."),
    ],
)
def test_centres_out_of_order(name: str, bad: list[float], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNFED_BACKEND", name)
    for call in every(X, torch.tensor(bad)):
        with pytest.raises(ValueError, match=re.escape(f"Expected `centers` to be {message}")):
            call()
    for call in every([X, X, X], [C, C, torch.tensor(bad)]):
        with pytest.raises(ValueError, match=re.escape(f"Expected `centers[2]` to be {message}")):
            call()
    # A layer may begin below where the last one ended.
    ops.soft_quantize([X, X], [C, C - 5], 2.0)


def test_also_under_compile() -> None:
    compiled = torch.compile(lambda x, c: ops.soft_quantize(x, c, 2.0), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="strictly ascending"):
        compiled(X, C.flip(0))


@pytest.mark.parametrize(
    ("x", "c", "error", "message"),
    [
        (
            X.int(),
            C,
            TypeError,
            "`{x}` to be a tensor of float32 or bfloat16 or float16 or float64, but got torch.int32.",
        ),
        ([1.0], [C], TypeError, "`{x}[0]` to be a tensor of float32 or bfloat16 or float16 or float64, but got float."),
        ("x", [C], TypeError, "`{x}` to be a list of tensors, one a layer, but got str."),
        (X, C.double(), TypeError, "`centers` to be a tensor of float32, but got torch.float64."),
        (X, C.half(), TypeError, "`centers` to be a tensor of float32, but got torch.float16."),
        (X, [0.0, 1.0], TypeError, "`centers` to be a tensor of float32, but got list."),
        ([X], C, TypeError, "`centers` to be a list of tensors, one a layer, but got Tensor."),
        ([X, X.half()], [C, C], TypeError, "`{x}[1]` to be torch.float32 as the first layer, but got torch.float16."),
        ([X.double()] * 2, [C, C.double()], TypeError, "`centers[1]` to be torch.float32 as the first layer's"),
        ([X, X], [C], ValueError, "to be lists of one length, but got lengths (2, 1)."),
        (X, C[:0], ValueError, "`centers` to have shape (m,) with m from 1 to 256, but got (0,)."),
        (X, C[None], ValueError, "`centers` to have shape (m,) with m from 1 to 256, but got (1, 3)."),
        (X, torch.arange(257.0), ValueError, "`centers` to have shape (m,) with m from 1 to 256, but got (257,)."),
        (X, C.to("meta"), ValueError, "`centers` to be on the device of `{x}` (cpu), but got meta."),
        (X.to_sparse(), C, TypeError, "`{x}` to be a dense tensor, but got layout torch.sparse_coo."),
    ],
)
def test_wrong_tensors(x: Any, c: Any, error: type[Exception], message: str) -> None:
    calls = [("x", lambda: ops.soft_quantize(x, c, 2.0)), ("x", lambda: ops.nearest_center(x, c))]
    calls += [("y", lambda: ops.prox_weights(x, c, 0.1)), ("x", lambda: ops.prox_centers(c, x, c, 0.1))]
    for name, call in calls:
        with pytest.raises(error, match=re.escape(message.replace("{x}", name))):
            call()


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_sharpness_is_positive(value: float) -> None:
    with pytest.raises(ValueError, match=f"Expected `sharpness` to be a positive finite number, but got {value}"):
        ops.soft_quantize(X, C, value)
    with pytest.raises(ValueError, match=rf"Expected `sharpness\[1\]` to be a positive finite number, but got {value}"):
        ops.soft_quantize([X, X], [C, C], [1.0, value])


@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf])
def test_thresholds_and_strengths_are_not_negative(value: float) -> None:
    with pytest.raises(ValueError, match=f"Expected `threshold` to be a finite float32 of at least 0, but got {value}"):
        ops.prox_weights(X, C, value)
    with pytest.raises(ValueError, match=f"Expected `strength` to be a finite number of at least 0, but got {value}"):
        ops.prox_centers(C, X, C, value)


def test_numbers_beyond_float32_and_beyond_any_float() -> None:
    largest = 3.4028234663852886e38
    assert torch.equal(ops.prox_weights(X, C, largest), ops.nearest_center(X, C)[1])
    for value in (largest * (1 + 2**-50), 1e39, 1e308):
        with pytest.raises(ValueError, match="Expected `threshold` to be a finite float32 of at least 0, but got"):
            ops.prox_weights(X, C, value)
    for name, call in [
        ("sharpness", lambda f: ops.soft_quantize([X, X], [C, C], f)),
        ("threshold", lambda f: ops.prox_weights([X, X], [C, C], f)),
        ("strength", lambda f: ops.prox_centers([C, C], [X, X], [C, C], f)),
    ]:
        with pytest.raises(ValueError, match=f"Expected `{name}` to be a finite number, but got an integer beyond"):
            call(10**400)
        with pytest.raises(ValueError, match=rf"Expected `{name}\[1\]` to be a finite number, but got an integer"):
            call([1, 10**400])


def test_an_error_names_the_layer() -> None:
    index = torch.zeros(6, dtype=torch.uint8)
    for call, name in [
        (lambda: ops.soft_quantize([X, X], [C, C], [1.0, -2.0]), "`sharpness[1]` to be a positive finite number"),
        (lambda: ops.soft_quantize([X, X], [C, C], -2.0), "`sharpness` to be a positive finite number"),
        (lambda: ops.soft_quantize([X, X], [C, C], [1.0, "2"]), "`sharpness[1]` to be a number"),
        (lambda: ops.prox_weights([X, X], [C, C], [0.0, -1.0]), "`threshold[1]` to be a finite"),
        (lambda: ops.nearest_center([X, X.to("meta")], [C, C]), "`x[1]` to be on the device of `x[0]` (cpu)"),
        (lambda: ops.nearest_center([X, X], [C, C.to("meta")]), "`centers[1]` to be on the device of `x[1]` (cpu)"),
        (
            lambda: ops.prox_centers([C, C.to("meta")], [X, X], [C, C], 0.1),
            "`proposal[1]` to be on the device of `x[1]` (cpu)",
        ),
        (
            lambda: ops.prox_weights([X, X], [C, C], 0.1, out=[X, X.to("meta")]),
            "`out[1]` to be on the device of `y[1]` (cpu)",
        ),
        (
            lambda: ops.center_sums([X, X], [index, index.to("meta")], 3),
            "`index[1]` to be on the device of `values[1]` (cpu)",
        ),
        (lambda: ops.center_sums([X, X], [index, index[1:]], 3), "`index[1]` to have the shape of `values[1]`, (6,)"),
        (lambda: ops.center_sums([X, X], [index, index], [3, 0]), "`num_centers[1]` to be an integer from 1 to 256"),
    ]:
        with pytest.raises((ValueError, TypeError), match=re.escape(f"Expected {name}")):
            call()


@pytest.mark.parametrize("wrong", [3.0, np.int64(3), None, True, "3"])
def test_the_number_of_centres_is_an_integer(wrong: Any) -> None:
    index = torch.zeros(6, dtype=torch.uint8)
    with pytest.raises(TypeError, match=f"Expected `num_centers` to be an integer, but got {type(wrong).__name__}"):
        ops.center_sums(X, index, wrong)
    with pytest.raises(TypeError, match=re.escape("Expected `num_centers[1]` to be an integer, but got")):
        ops.center_sums([X, X], [index, index], [3, wrong])


def test_numbers_per_layer() -> None:
    for wrong in (True, "2", None, [True, 1.0], [1.0, "2"], [1.0, None]):
        with pytest.raises(TypeError, match=r"Expected `sharpness(\[[01]\])?` to be a number"):
            ops.soft_quantize([X, X], [C, C], wrong)
    with pytest.raises(ValueError, match="Expected `sharpness` to be one number, or 2, one a layer, but got 3."):
        ops.soft_quantize([X, X], [C, C], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="Expected `threshold` to be one number, or 1, one a layer, but got 2."):
        ops.prox_weights(X, C, [1.0, 2.0])
    assert torch.equal(ops.soft_quantize(X, C, [2]), ops.soft_quantize(X, C, 2.0))


def test_out_of_prox_weights() -> None:
    for out, error, message in [
        (X.half(), TypeError, "`out` to be a tensor of float32, but got torch.float16."),
        (torch.empty(7), ValueError, "`out` to have shape (6,), but got (7,)."),
        (X.to("meta"), ValueError, "`out` to be on the device of `y` (cpu), but got meta."),
        (None, None, None),
    ]:
        if error is not None:
            with pytest.raises(error, match=re.escape(f"Expected {message}")):
                ops.prox_weights(X, C, 0.1, out=out)
    base = torch.randn(7)
    with pytest.raises(
        ValueError, match="Expected `out` to be `y` or apart from it in memory, but they overlap in part"
    ):
        ops.prox_weights(base[1:], C, 0.1, out=base[:-1])
    with pytest.raises(ValueError, match="Expected the tensors of `out` not to share memory"):
        ops.prox_weights([X, X.clone()], [C, C], 0.1, out=[base[1:], base[:-1]])
    with pytest.raises(TypeError, match="Expected `out` to be a list of tensors"):
        ops.prox_weights([X], [C], 0.1, out=base)
    with pytest.raises(ValueError, match=re.escape("Expected `y`, `out` to be lists of one length")):
        ops.prox_weights([X], [C], 0.1, out=[])


def test_proposals() -> None:
    with pytest.raises(
        ValueError, match=re.escape("Expected `proposal` to have shape (3,), as its centres, but got (2,).")
    ):
        ops.prox_centers(C[:2], X, C, 0.1)
    with pytest.raises(TypeError, match="Expected `proposal` to be a tensor of float32, but got torch.float64"):
        ops.prox_centers(C.double(), X, C, 0.1)
    with pytest.raises(ValueError, match="Expected `proposal`, `x` to be lists of one length"):
        ops.prox_centers([C], [X, X], [C, C], 0.1)


def test_arguments_of_center_sums(backend: str) -> None:
    x, index = here(X), here(torch.tensor([0, 1, 2, 0, 1, 5], dtype=torch.uint8, device="cpu"))
    if x.device.type == "cpu":
        with pytest.raises(ValueError, match="Expected `index` to hold numbers below `num_centers`, but got 5."):
            ops.center_sums(x, index, 3)
        with pytest.raises(ValueError, match="but got 5."):
            ops.center_sums([x, x], [index, index], [6, 5])
    with pytest.raises(TypeError, match="Expected `index` to be a tensor of uint8, but got torch.int64"):
        ops.center_sums(x, index.long(), 6)
    with pytest.raises(
        ValueError, match=re.escape("Expected `index` to have the shape of `values`, (6,), but got (5,).")
    ):
        ops.center_sums(x, index[1:], 6)
    for m in (0, 257):
        with pytest.raises(ValueError, match=f"Expected `num_centers` to be an integer from 1 to 256, but got {m}"):
            ops.center_sums(x, index, m)
    with pytest.raises(ValueError, match="to be lists of one length, but got lengths"):
        ops.center_sums([x], [index], [6, 6])


# ---- registration ----


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_opcheck(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNFED_BACKEND", name)
    for operator, args in calls():
        result = torch.library.opcheck(getattr(torch.ops.dynfed_lightning, operator).default, args)
        assert set(result.values()) == {"SUCCESS"}, (operator, result)


def a_step(x: list[Tensor], c: list[Tensor], threshold: float) -> tuple[Any, ...]:
    moved = ops.prox_weights(x, c, threshold)
    index, value = ops.nearest_center(moved, c)
    again = [v.clone() for v in x]
    ops.prox_weights(again, c, threshold, out=again)
    return (
        *moved,
        *again,
        *index,
        *value,
        *ops.prox_centers(c, moved, c, threshold),
        *ops.center_sums(x, index, [4, 20]),
    )


def test_compile_fullgraph(backend: str) -> None:
    torch._dynamo.reset()
    x = [here(torch.randn(s, device="cpu")) for s in ((4, 5), (30,))]
    c = [here(centers(m)) for m in (4, 20)]
    compiled = torch.compile(a_step, fullgraph=True, backend="aot_eager")
    for threshold in (0.1, 0.2, 0.3):
        for a, b in zip(compiled(x, c, threshold), a_step(x, c, threshold), strict=True):
            assert torch.equal(a, b)


def test_a_backend_may_leave_them_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNFED_BACKEND", "cpu")
    assert _ops_backends.choose("soft_quantize", torch.device("cpu")) is _ops_cpu
    want = ops.soft_quantize(X, C, 3.0)
    monkeypatch.delattr(_ops_cpu, "soft_quantize")
    for name in ("cpu", "auto"):  # which says nothing: warnings are errors
        monkeypatch.setenv("DYNFED_BACKEND", name)
        assert _ops_backends.choose("soft_quantize", torch.device("cpu")) is _reference
    assert torch.allclose(ops.soft_quantize(X, C, 3.0), want, rtol=0, atol=1e-6)


def test_float64_runs_on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNFED_BACKEND", "cpu")
    x = X.double()
    for c in (C, C.double()):
        for result in (ops.soft_quantize(x, c, 3.0), ops.nearest_center(x, c)[1], ops.prox_weights(x, c, 0.1)):
            assert result.dtype == torch.float64
        assert ops.prox_centers(c, x, c, 0.1).dtype == c.dtype


def test_meta_tensors() -> None:
    x, c = X.to("meta"), C.to("meta")
    assert ops.soft_quantize(x, c, 2.0).shape == (6,) and ops.nearest_center(x, c)[0].dtype == torch.uint8
    assert ops.prox_weights([x], [c], 0.1)[0].shape == (6,) and ops.prox_centers(c, x, c, 0.1).shape == (3,)


# ---- the kernels behind ----


def test_the_kernels_refuse_what_they_could_not_hold(cpp: str) -> None:
    kernel = _ops_cpu._C
    first, one = torch.tensor([0, 3]), torch.ones(1, dtype=torch.float64)
    kernel.soft_quantize([X], C, first, one, [torch.empty(6)], 0)
    for args, message in [
        (([X], C, first, one, [torch.empty(5)]), "`out` to have 6 elements, but got 5"),
        (([X], C, first, one, []), "`out` to have 1 entries, but got 0"),
        (([X, X], C, first, one, [X, X]), "`x` to have 1 entries, but got 2"),
        (([X], C, first, one, [torch.empty(6).half()]), "`out` to be a contiguous CPU tensor of the right type"),
        (([X.double()], C, first, one, [X.double()]), "`x` to be a tensor of float32, bfloat16 or float16"),
        (([X], C, torch.tensor([0, 4]), one, [X]), "`first` to go from 0 to 3"),
        (([X], C, torch.tensor([1, 3]), one, [X]), "`first` to go from 0 to 3"),
        (([X, X], C, torch.tensor([0, 5, 3]), one.expand(2).clone(), [X, X]), "every layer to have 1 to 256 centres"),
        (([X], torch.arange(257.0), torch.tensor([0, 257]), one, [X]), "every layer to have 1 to 256 centres"),
        (([X], C, first, one.float(), [X]), "`sharpness` to be a contiguous CPU tensor of the right type"),
        (([X[::2]], C, first, one, [X[:3]]), "`x` to be a contiguous CPU tensor"),
    ]:
        with pytest.raises(RuntimeError, match=re.escape(message)):
            kernel.soft_quantize(*args, 0)
    with pytest.raises(RuntimeError, match="`grad` to have 6 elements, but got 5"):
        kernel.soft_quantize_backward([X[:5]], [X], C, first, one, [torch.empty(6)], torch.empty(3), 0)
    with pytest.raises(RuntimeError, match="`dcenters` to have 3 elements, but got 2"):
        kernel.soft_quantize_backward([X], [X], C, first, one, [torch.empty(6)], torch.empty(2), 0)
    with pytest.raises(RuntimeError, match="`index` to have 6 elements, but got 5"):
        kernel.nearest_center([X], C, first, [torch.empty(5, dtype=torch.uint8)], [torch.empty(6)], 0)
    with pytest.raises(RuntimeError, match="`out` to have 3 elements, but got 4"):
        kernel.prox_centers(C, [X], C, first, one, torch.empty(4), 0)
    with pytest.raises(RuntimeError, match="`first` to go from 0 to 2"):
        kernel.center_sums([X], [torch.zeros(6, dtype=torch.uint8)], first, torch.empty(2))


def test_centres_in_any_order_touch_no_foreign_memory(cpp: str) -> None:
    """The kernels themselves do not look: whatever the centres are, they write their own buffers and end."""
    first, one = torch.tensor([0, 40]), torch.full((1,), 1e3, dtype=torch.float64)
    for c in (
        torch.randn(40),
        torch.full((40,), math.nan),
        torch.randn(40) * 1e38,
        torch.zeros(40),
        torch.full((40,), math.inf),
    ):
        out = [torch.empty(6)]
        _ops_cpu._C.soft_quantize([X], c, first, one, out, 0)
        _ops_cpu._C.soft_quantize_backward([X], [X], c, first, one, out, torch.empty(40), 0)
        _ops_cpu._C.nearest_center([X], c, first, [torch.empty(6, dtype=torch.uint8)], out, 0)
        _ops_cpu._C.prox_centers(c, [X], c, first, one, torch.empty(40), 0)
