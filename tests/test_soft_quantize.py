"""`ops.soft_quantize`: values and both gradients of every backend against float64, limits, autograd."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from ops_support import BACKENDS, CPP_BACKENDS, backend_fixture
from soft_support import COUNTS, centers, generator, here, leaf, soft, soft64, weights
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dynfed_lightning import ops

backend = backend_fixture(BACKENDS)
cpp = backend_fixture(CPP_BACKENDS)
instantiated = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # torch.compile's own


def check(x: Tensor, c: Tensor, sharpness: float, grad: Tensor) -> None:
    """Values within 1e-6 of the largest centre; gradients to x within 1e-6 of the largest; those to the centres within 1e-6 of
    the largest sum of magnitudes, as they are differences of numbers that for many centres, or random signs, nearly cancel."""
    a, b = leaf(x), leaf(c)
    q = ops.soft_quantize(a, b, sharpness)
    q.backward(here(grad))
    assert q.dtype == x.dtype and q.shape == x.shape and a.grad.dtype == x.dtype and b.grad.dtype == c.dtype
    value, dx, dc, size = soft64(x, c, sharpness, grad)
    for got, want, scale in ((q, value, c.abs().max()), (a.grad, dx, dx.abs().max()), (b.grad, dc, size.max())):
        error = float((got.detach().cpu().double() - want).abs().max())
        assert error <= 1e-6 * float(scale), (error, float(scale))


@pytest.mark.parametrize(
    "m", [m if m in (1, 2, 3, 16, 17, 33, 256) else pytest.param(m, marks=pytest.mark.slow) for m in COUNTS]
)
@pytest.mark.parametrize("sharpness", [1.0, 10.0, 100.0, 1000.0])
def test_values_and_gradients(backend: str, m: int, sharpness: float) -> None:
    c = centers(m)
    x = weights(1501, c)
    check(x, c, sharpness, torch.randn(1501, generator=generator(2), device="cpu"))
    check(x, c, sharpness, torch.rand(1501, generator=generator(3), device="cpu"))
    check(x * 0.1, c, sharpness, torch.ones(1501, device="cpu"))


@pytest.mark.parametrize("scale", [1e-3, 100.0])
@pytest.mark.parametrize("m", [2, 16, 40])
def test_small_and_large_centres(backend: str, m: int, scale: float) -> None:
    for sharpness in (0.01, 1.0, 1000.0):
        c = centers(m, 1, scale)
        check(weights(1000, c, spread=scale), c, sharpness, torch.randn(1000, generator=generator(4), device="cpu"))


def test_far_outside_of_the_centres_nothing_is_left(backend: str) -> None:
    c = centers(16)
    x = torch.tensor([1.5, 3.0, 1e3, 1e30, 3e38, math.inf], device="cpu")
    x = torch.cat([x, -x])
    for sharpness in (100.0, 1e4):
        a, b = leaf(x), leaf(c)
        q = ops.soft_quantize(a, b, sharpness)
        q.sum().backward()
        assert torch.allclose(q.detach().cpu(), torch.cat([c[-1:].expand(6), c[:1].expand(6)]), rtol=0, atol=2e-7)
        assert float(a.grad.abs().max()) < 1e-9 and torch.isfinite(a.grad).all()
        want = torch.zeros(16, device="cpu")
        want[0] = want[-1] = 6
        assert torch.allclose(b.grad.cpu(), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("m", [2, 5, 16, 20])
def test_gradients_are_finite_differences(backend: str, m: int) -> None:
    """Of the formula in float64; 1e-6 of the largest."""
    sharpness, step = 7.0, 1e-6
    c = centers(m, 3)
    x = torch.randn(200, generator=generator(5), device="cpu")
    grad = torch.rand(200, generator=generator(6), device="cpu")
    a, b = leaf(x), leaf(c)
    ops.soft_quantize(a, b, sharpness).backward(here(grad))
    x64, c64, g64 = x.double(), c.double(), grad.double()
    dx = g64 * (soft(x64 + step, c64, sharpness) - soft(x64 - step, c64, sharpness)) / (2 * step)
    eye = torch.eye(m, dtype=torch.float64, device="cpu") * step
    dc = torch.stack([(g64 * (soft(x64, c64 + e, sharpness) - soft(x64, c64 - e, sharpness))).sum() for e in eye]) / (
        2 * step
    )
    assert float((a.grad.cpu() - dx).abs().max()) <= 1e-6 * float(dx.abs().max())
    assert float((b.grad.cpu() - dc).abs().max()) <= 1e-6 * float(dc.abs().max())


def test_gradcheck_in_float64() -> None:
    x = torch.randn(3, 4, generator=generator(7), dtype=torch.float64, requires_grad=True)
    one, five = (centers(m).double().requires_grad_() for m in (1, 5))
    assert torch.autograd.gradcheck(lambda x, c: ops.soft_quantize(x, c, 3.0), (x, five))
    assert torch.autograd.gradcheck(
        lambda x, a, b: tuple(ops.soft_quantize([x, x], [a, b], [2.0, 9.0])), (x, one, five)
    )
    single = five.detach().float().requires_grad_()  # float64 values may have float32 centres
    q = ops.soft_quantize(x, single, 3.0)
    q.sum().backward()
    assert q.dtype == torch.float64 and single.grad.dtype == torch.float32
    assert torch.allclose(q, soft(x, single.double(), 3.0), rtol=0, atol=1e-15)


@pytest.mark.parametrize("m", [2, 3, 16, 17, 256])
def test_without_end_sharp_it_is_the_nearest_centre(backend: str, m: int) -> None:
    c = centers(m)
    x = weights(2000, c)
    mid = (c[:-1].double() + c[1:].double()) / 2
    x = x[(x.double()[:, None] - mid).abs().amin(1) > 1e-6]
    nearest = c[torch.bucketize(x.double(), mid)]
    for sharpness in (1e8, 1e12, 1e30, 1e38):
        a, b = leaf(x), leaf(c)
        q = ops.soft_quantize(a, b, sharpness)
        assert torch.allclose(q.detach().cpu(), nearest, rtol=0, atol=2e-7)
        assert torch.allclose(q, ops.nearest_center(a, b)[1], rtol=0, atol=2e-7)
        q.sum().backward()
        assert float(a.grad.abs().max()) < 1e-6
        counts = torch.bincount(torch.bucketize(x.double(), mid), minlength=m)
        assert torch.allclose(b.grad.cpu(), counts.float(), rtol=1e-6, atol=1e-6)


def test_one_centre(backend: str) -> None:
    x, c = (
        leaf(torch.randn(50, device="cpu")),
        leaf(torch.tensor([0.3], device="cpu")),
    )
    q = ops.soft_quantize(x, c, 5.0)
    q.sum().backward()
    assert q.eq(c).all() and not x.grad.any() and c.grad.item() == 50


def test_a_model_in_one_call_is_its_layers_one_by_one(backend: str) -> None:
    sizes, shapes = (2, 16, 1, 256, 5, 33), ((40, 30), (17,), (3, 3), (0, 4), (8, 4, 3, 3), (9001,))
    x = [leaf(torch.randn(s, generator=generator(8), device="cpu")) for s in shapes]
    c = [leaf(centers(m)) for m in sizes]
    sharp = [3.0, 10.0, 1.0, 100.0, 1000.0, 50.0]
    together = ops.soft_quantize(x, c, sharp)
    grads = torch.autograd.grad(sum(q.sin().sum() for q in together), [*x, *c])
    alone = [ops.soft_quantize(*args) for args in zip(x, c, sharp, strict=True)]
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(grads, torch.autograd.grad(sum(q.sin().sum() for q in alone), [*x, *c]), strict=True):
        assert torch.equal(a, b)


def test_only_what_is_asked_for(backend: str) -> None:
    c, x = here(centers(16)), here(weights(5000, centers(16)))
    both = [t.clone().requires_grad_() for t in (x, c)]
    ops.soft_quantize(*both, 20.0).sin().sum().backward()
    one, other = x.clone().requires_grad_(), c.clone().requires_grad_()
    ops.soft_quantize(one, c, 20.0).sin().sum().backward()
    ops.soft_quantize(x, other, 20.0).sin().sum().backward()
    assert torch.equal(one.grad, both[0].grad) and torch.equal(other.grad, both[1].grad)
    assert not ops.soft_quantize(x, c, 20.0).requires_grad
    with torch.no_grad():
        assert not ops.soft_quantize(one, other, 20.0).requires_grad
    # Of two layers one is frozen, and so are the other's centres.
    x2, c2 = [one.detach().clone().requires_grad_(), x], [c, other.detach().clone().requires_grad_()]
    sum(q.sin().sum() for q in ops.soft_quantize(x2, c2, 20.0)).backward()
    assert torch.equal(x2[0].grad, one.grad) and torch.equal(c2[1].grad, other.grad)
    assert x2[1].grad is None and c2[0].grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_float32_rounded_once(backend: str, dtype: torch.dtype) -> None:
    c, x = centers(16), weights(3000, centers(16)).clamp(-6e4, 6e4).to(dtype)
    grad = torch.randn(3000, generator=generator(9), device="cpu").to(dtype)
    a, b = leaf(x), leaf(c)
    q = ops.soft_quantize(a, b, 10.0)
    q.backward(here(grad))
    wide, narrow = leaf(x.float()), leaf(c)
    want = ops.soft_quantize(wide, narrow, 10.0)
    want.backward(here(grad).float())
    assert q.dtype == a.grad.dtype == dtype and b.grad.dtype == torch.float32
    # The reference rounds its float64; a value in the middle of two may then go the other way.
    assert (q != want.detach().to(dtype)).float().mean() < 0.002 and torch.allclose(
        q.float(), want, rtol=0.01, atol=1e-7
    )
    assert (a.grad != wide.grad.to(dtype)).float().mean() < 0.002
    assert torch.allclose(b.grad, narrow.grad, rtol=0, atol=1e-6 * float(narrow.grad.abs().max()))


def test_the_same_bits_for_any_number_of_threads(cpp: str) -> None:
    shapes, sizes = ((300, 411), (5,), (100_000,), (64, 64)), (16, 2, 256, 1)
    x = [torch.randn(s, generator=generator(10)).requires_grad_() for s in shapes]
    c = [centers(m).requires_grad_() for m in sizes]
    found = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)  # `conftest` undoes it
        q = ops.soft_quantize(x, c, 30.0)
        found.append([*q, *torch.autograd.grad(sum(v.sin().sum() for v in q), [*x, *c])])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_odd_lengths_and_addresses(cpp: str) -> None:
    """What is at the end of a buffer, or begins within a line, is what it is elsewhere, and nothing beside it is written."""
    c, x = centers(16), weights(9000, centers(16))
    grad = torch.randn(9000, generator=generator(11))
    whole = ops.soft_quantize(x, c, 10.0)
    a = x.clone().requires_grad_()
    ops.soft_quantize(a, c, 10.0).backward(grad)
    for begin in (0, 1, 7):
        for n in (0, 1, 2, 15, 16, 63, 64, 65, 129, 511, 513, 8191, 8193):
            part = x[begin : begin + n].requires_grad_()
            q = ops.soft_quantize(part, c, 10.0)
            assert torch.equal(q, whole[begin : begin + n])
            assert torch.equal(torch.autograd.grad(q, part, grad[begin : begin + n])[0], a.grad[begin : begin + n])


def test_strides_and_shapes(backend: str) -> None:
    c = here(centers(7))
    base = here(torch.randn(6, 5, 4, 3, generator=generator(12), device="cpu"))
    for x in (base.mT, base[::2], base[..., 1], base.to(memory_format=torch.channels_last), base[0, 0, 0, 0], base[:0]):
        a = x.detach().requires_grad_()
        spread = torch.stack([c, c], 1)[:, 0]  # centres may be strided too
        q = ops.soft_quantize(a, spread, 4.0)
        assert q.shape == x.shape and torch.allclose(q, soft(x.double(), c.double(), 4.0).float(), rtol=0, atol=1e-6)
        (q * 2).sum().backward()
        assert a.grad.shape == x.shape
        b = x.detach().contiguous().requires_grad_()
        (ops.soft_quantize(b, c, 4.0) * 2).sum().backward()
        assert torch.equal(a.grad, b.grad)
    assert ops.soft_quantize([], [], 2.0) == []


def test_nan_stays_where_it_is(backend: str) -> None:
    for m in (2, 16, 40):
        c, x = here(centers(m)), here(torch.randn(1000, generator=generator(13), device="cpu"))
        want = ops.soft_quantize(x, c, 200.0)
        x[[3, 500, 999]] = math.nan
        a = x.clone().requires_grad_()
        q = ops.soft_quantize(a, c, 200.0)
        q.sum().backward()
        assert q.isnan().nonzero().flatten().tolist() == a.grad.isnan().nonzero().flatten().tolist() == [3, 500, 999]
        assert torch.equal(q[~x.isnan()], want[~x.isnan()])


def test_a_second_derivative_is_refused(backend: str) -> None:
    x, c = leaf(torch.randn(9, device="cpu")), leaf(centers(4))
    q = ops.soft_quantize(x, c, 3.0)
    plain = torch.autograd.grad(q.sum(), (x, c), retain_graph=True)
    dx, dc = torch.autograd.grad(q.sum(), (x, c), create_graph=True)
    assert torch.equal(dx, plain[0]) and torch.equal(dc, plain[1])
    for d in (dx, dc):
        with pytest.raises(
            RuntimeError, match="`soft_quantize` to be differentiated once, but got a second derivative"
        ):
            torch.autograd.grad(d.sum(), x, retain_graph=True)


def test_it_keeps_nothing_but_its_arguments() -> None:
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    x, c = torch.randn(1000).requires_grad_(), centers(16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ops.soft_quantize(x, c, 3.0)
    assert sorted(t.numel() for t in saved) == [1, 16, 1000] and any(t.data_ptr() == x.data_ptr() for t in saved)


def test_functional_gradients(backend: str) -> None:
    x, c = here(torch.randn(9, device="cpu")), here(centers(4))
    a = x.clone().requires_grad_()
    ops.soft_quantize(a, c, 3.0).sum().backward()
    assert torch.equal(torch.func.grad(lambda t: ops.soft_quantize(t, c, 3.0).sum())(x), a.grad)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # forward mode's own
@pytest.mark.parametrize("transform", ["vmap", "jacrev", "jvp", "jacfwd", "batched"])
def test_what_other_transforms_would_need_is_refused(transform: str) -> None:
    x, c = torch.randn(9), centers(4)
    leaf_ = x.clone().requires_grad_()

    def quantized(t: Tensor) -> Tensor:
        return ops.soft_quantize(t, c, 3.0)

    calls: dict[str, Callable[[], object]] = {
        "vmap": lambda: torch.func.vmap(quantized)(x[None]),
        "jacrev": lambda: torch.func.jacrev(quantized)(x),
        "jvp": lambda: torch.func.jvp(quantized, (x,), (x,)),
        "jacfwd": lambda: torch.func.jacfwd(quantized)(x),
        "batched": lambda: torch.autograd.grad(quantized(leaf_), leaf_, torch.eye(9), is_grads_batched=True),
    }
    with pytest.raises(RuntimeError):
        calls[transform]()


def test_the_largest_centre_up_to_which_the_sharpness_is_what_it_says(backend: str) -> None:
    """Up to ``P max |c| = 3e8``, a centre far from the others changes nothing about these."""
    for p, far in ((1000.0, 1e5), (1000.0, 3e5), (30.0, 1e7)):
        c, x = torch.tensor([-0.01, 0.01, far], device="cpu"), torch.linspace(-3, 3, 101, device="cpu") / p
        near, grad = c[:2], torch.rand(101, generator=generator(15), device="cpu") + 0.1
        a, b, alone, pair = leaf(x), leaf(c), leaf(x), leaf(near)
        q = ops.soft_quantize(a, b, p)
        q.backward(here(grad))
        want = ops.soft_quantize(alone, pair, p)
        want.backward(here(grad))
        for got, expected in ((q, want), (a.grad, alone.grad), (b.grad[:2], pair.grad)):
            assert torch.allclose(got, expected, rtol=1e-5, atol=0), (p, far)


def loss(x: list[Tensor], c: list[Tensor], sharpness: float) -> Tensor:
    return torch.stack([q.sin().sum() for q in ops.soft_quantize(x, c, sharpness)]).sum()


@instantiated
def test_compile_fullgraph_forward_and_backward(backend: str) -> None:
    torch._dynamo.reset()
    x = [leaf(torch.randn(s, generator=generator(14), device="cpu")) for s in ((4, 5), (30,))]
    c = [leaf(centers(m)) for m in (4, 20)]
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=count)
    for sharpness in (3.0, 4.0, 5.5):
        value, want = compiled(x, c, sharpness), loss(x, c, sharpness)
        assert torch.equal(value, want)
        for a, b in zip(torch.autograd.grad(value, [*x, *c]), torch.autograd.grad(want, [*x, *c]), strict=True):
            assert torch.equal(a, b)
    assert count.frame_count <= 2  # a number that changes is compiled for once more, and then no longer
