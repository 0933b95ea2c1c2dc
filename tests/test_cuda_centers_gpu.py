"""What is particular to the kernels for learned centres on a GPU: graphs, streams, sums in a fixed order, speed. Both backends.

That every operator is within its bounds on every backend is tested in test_soft_*.py; the backends' functions are compared here
with the reference on models of many layers.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import centers_support as support
import pytest
import torch
from centers_support import DTYPES, LAYERS, Model, awkward, centers_of, model
from ops_support import same
from torch import Tensor

from dynfed_lightning import _ops_cuda, _ops_triton
from dynfed_lightning import _reference as reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_ops_triton.interpreted(), reason="the interpreter is not the GPU"),
]

MANY = tuple((1 + 997 * i % 6007, 1 + i % 17) for i in range(260))  # more layers than any launch takes


@pytest.fixture(params=["cuda", "triton"])
def ops(request: pytest.FixtureRequest) -> ModuleType:
    backend: ModuleType = {"cuda": _ops_cuda, "triton": _ops_triton}[request.param]
    if backend.available():
        pytest.skip(str(backend.available()))
    return backend


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_reference(ops: ModuleType, dtype: torch.dtype) -> None:
    for layers in (LAYERS, MANY):
        for factor in (1.0, 30.0, 1e5):
            support.check_soft(ops, model(layers, dtype, factor=factor), "cuda")
        for factor in (0.0, 0.003, 0.4):
            support.check_exact(ops, model(layers, dtype, factor=factor), "cuda")
        support.check_sums(ops, model(layers, dtype), "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_awkward_values_and_addresses(ops: ModuleType, dtype: torch.dtype) -> None:
    for count in (1, 2, 16, 256):
        c = centers_of(count, seed=count)
        factors = torch.tensor([0.01], dtype=torch.float64)
        support.check_exact(ops, Model([awkward(c, dtype)], c, torch.tensor([0, count]), factors), "cuda")
    m = model(((5003, 5), (300, 2)), dtype=dtype).to("cuda")
    want = support.soft(ops, m), *support.soft_backward(ops, m)
    for by in (1, 3, 4):
        m.x, m.grad = ([torch.cat((t[:by], t))[by:] for t in each] for each in (m.x, m.grad))
        got = support.soft(ops, m), *support.soft_backward(ops, m)
        for a, b in zip((*got[0], *got[1], got[2]), (*want[0], *want[1], want[2]), strict=True):
            assert same(a.float(), b.float())


def test_rounding_to_half_precision(ops: ModuleType) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    factors = torch.tensor([0.3], dtype=torch.float64)
    for dtype in (torch.float16, torch.bfloat16):
        m = Model([every.view(dtype)], torch.tensor([0.37]), torch.tensor([0, 1]), factors)
        support.check_exact(ops, m, "cuda")


@pytest.mark.parametrize("strength", [0.0, 1e-6, 1e-3, 100.0])
def test_prox_centers(strength: float) -> None:
    if _ops_cuda.available():
        pytest.skip(str(_ops_cuda.available()))
    for layers in (LAYERS, MANY, ((3_000_000, 4), (1_000_000, 256))):
        m = model(layers, factor=strength)
        support.check_moved(_ops_cuda, m, m.centers + 0.05, "cuda")


Step = Callable[[], None]


def every_operation(ops: ModuleType, m: Model) -> tuple[Step, list[Tensor]]:
    """All of them once, in buffers that exist beforehand; and the buffers."""
    out, dx, value, prox = (support.like(m.x) for _ in range(4))
    index = support.like(m.x, torch.uint8)
    arenas = [torch.full_like(m.centers, 77) for _ in range(3)]

    def step() -> None:
        ops.soft_quantize(m.x, m.centers, m.first, m.factors, out)
        ops.soft_quantize_backward(m.grad, m.x, m.centers, m.first, m.factors, dx, arenas[0])
        ops.nearest_center(m.x, m.centers, m.first, index, value)
        ops.prox_weights(m.x, m.centers, m.first, m.factors, prox)
        ops.center_sums(m.grad, index, m.first, arenas[1])
        if hasattr(ops, "prox_centers"):
            ops.prox_centers(m.centers, m.x, m.centers, m.first, m.factors, arenas[2])

    return step, [*out, *dx, *value, *prox, *index, *arenas]


def test_a_graph_replays_what_eager_computes(ops: ModuleType) -> None:
    """Of weights, and centres, that have changed in between."""
    m = model(LAYERS + MANY[:40], factor=0.01).to("cuda")
    step, outputs = every_operation(ops, m)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a warm-up, as torch asks for before a capture
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for scale in (0.5, 1.5):
        torch._foreach_mul_(m.x, scale)
        m.centers.mul_(scale)
        for t in outputs:
            t.fill_(77)
        graph.replay()
        replayed = [t.clone() for t in outputs]
        step()
        torch.cuda.synchronize()
        assert all(same(a, b) for a, b in zip(replayed, outputs, strict=True))


def test_work_on_another_stream_waits_and_the_host_does_not(ops: ModuleType) -> None:
    """The stream is busy while everything is launched: an operation elsewhere would read old values, and after one that waits
    for the device the stream would be idle.
    """
    m, new = model(MANY[:40], factor=0.01).to("cuda"), model(MANY[:40], seed=5).to("cuda").x
    old = [t.clone() for t in m.x]
    step, outputs = every_operation(ops, m)
    torch._foreach_copy_(m.x, new)
    step()
    expected = [t.clone() for t in outputs]
    torch._foreach_copy_(m.x, old)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # so that this stream has memory of its own: to allocate might wait
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(500_000_000)  # about a quarter of a second
        torch._foreach_copy_(m.x, new)
        step()
    assert not side.query()
    side.synchronize()
    assert all(same(a, b) for a, b in zip(outputs, expected, strict=True))


def test_sums_are_the_same_every_time(ops: ModuleType) -> None:
    m = model(((3_000_001, 16), (70_000, 3)), factor=20.0).to("cuda")
    index, _ = support.nearest(ops, m)
    want = support.soft_backward(ops, m)[1], support.sums(ops, m, index)
    for _ in range(5):
        assert same(support.soft_backward(ops, m)[1], want[0]) and same(support.sums(ops, m, index), want[1])


def test_gradients_of_a_large_layer(ops: ModuleType) -> None:
    """100 million weights: offsets, and partial sums of many blocks."""
    n, count = 100_000_003, 4
    if torch.cuda.mem_get_info()[0] < 4 * 4 * n:
        pytest.skip("needs 1.6 GB of GPU memory")
    c, factors = centers_of(count, 1), torch.tensor([10.0], dtype=torch.float64)
    part = 1_000_003
    # Gradients of one sign: a block that is lost then lacks in a sum by more than the bound, and does not drown in it.
    x, g = support.draw(part, seed=1), support.draw(part, seed=2).abs() + 0.1
    small = Model([x], c, torch.tensor([0, count]), factors, [g])
    tail = n - (n // part) * part  # the last copy is cut
    repeats = n // part
    large = [torch.cat((t.cuda().repeat(repeats), t[:tail].cuda())) for t in (x, g)]
    m = Model([large[0]], c.cuda(), small.first, factors, [large[1]])
    (dx,), dc = support.soft_backward(ops, m)
    (want_dx,), want_dc = support.soft_backward(reference, small)
    cut = Model([x[:tail]], c, small.first, factors, [g[:tail]])
    want_dc = want_dc.double() * repeats + support.soft_backward(reference, cut)[1].double()
    support.check_close(dc, want_dc, float(g.abs().sum()) * repeats)
    steepest = float(want_dx.abs().max())
    for begin in (0, part * (repeats // 2), part * (repeats - 1), part * repeats):
        got = dx[begin : begin + part]
        support.check_close(got, want_dx[: len(got)], steepest)


def test_it_is_faster_than_torch(ops: ModuleType) -> None:
    """Forward and backward of 32 million weights and 4 centres, against the formula in torch with its autograd."""
    x = torch.randn(1 << 25, device="cuda")
    m = Model(
        [x], centers_of(4, 1).cuda(), torch.tensor([0, 4]), torch.tensor([10.0], dtype=torch.float64), [x.clone()]
    )
    out, dx, dc = support.like(m.x), support.like(m.x), torch.zeros_like(m.centers)
    a, c = x.clone().requires_grad_(), m.centers.clone().requires_grad_()

    def ours() -> None:
        ops.soft_quantize(m.x, m.centers, m.first, m.factors, out)
        ops.soft_quantize_backward(m.grad, m.x, m.centers, m.first, m.factors, dx, dc)

    def torchs() -> None:
        total = c[0].expand_as(a)
        for j in range(1, 4):
            total = total + (c[j] - c[j - 1]) * torch.sigmoid(10.0 * (a - (c[j] + c[j - 1]) / 2))
        torch.autograd.grad(total, (a, c), m.grad[0])

    def seconds(f: Step) -> float:
        f()
        best = float("inf")
        for _ in range(5):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            f()
            end.record()
            end.synchronize()
            best = min(best, begin.elapsed_time(end) / 1000)
        return best

    mine, theirs = seconds(ours), seconds(torchs)
    assert mine < theirs / 2, (mine, theirs)
