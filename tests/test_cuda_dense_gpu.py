"""`symmetric_eigh`, `squared_norm` and `truncated_svd` on a GPU: right, the same every time, on its streams and in its graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from dense_support import DTYPES, F64, SHAPES, check_eigh, matrices, norm_in_order, normal, with_eigenvalues
from torch import Tensor

from dynfed_lightning import _ops_cuda, _ops_triton, ops
from dynfed_lightning.codec import Codec, CodecContext, Schema
from dynfed_lightning.stages import LowRank, Quantize

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
OPS = torch.ops.dynfed_lightning


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> ModuleType:
    module = {"cuda": _ops_cuda, "triton": _ops_triton}[request.param]
    if module.available():
        pytest.skip(module.available())
    return module


@pytest.fixture
def kernels() -> ModuleType:
    if _ops_cuda.available():
        pytest.skip(str(_ops_cuda.available()))
    return _ops_cuda


def eigh(module: ModuleType, a: Tensor) -> tuple[Tensor, Tensor]:
    a = a.to(DEVICE)
    w, v = torch.full(a.shape[:2], 7.0, dtype=F64, device=DEVICE), torch.full(a.shape, 7.0, dtype=F64, device=DEVICE)
    module.symmetric_eigh(a, w, v)
    return w.cpu(), v.cpu()


def norm(module: ModuleType, a: Tensor) -> Tensor:
    out = torch.full(a.shape[:1], 7.0, dtype=F64, device=DEVICE)
    module.squared_norm(a.to(DEVICE), out)
    return out.cpu()


def equal(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- symmetric_eigh ----


@pytest.mark.parametrize(
    "l", [1, 2, 3, 5, 16, 17, 31, 32, 33, 48, 63, 64, 65, 95, 96, 97, 118, 119, 127, 128, 129, 200]
)
def test_symmetric_eigh(backend: ModuleType, l: int) -> None:
    """With eigenvectors in shared and, from 119 rows on (on an H200), in global memory; beyond 128 by cuSOLVER."""
    a = matrices(l)
    check_eigh(a, *eigh(backend, a), tolerance=5e-13)


def test_a_large_batch_is_what_each_matrix_is_alone(kernels: ModuleType) -> None:
    """A thousand at once: blocks that share a multiprocessor, and memory others have used before."""
    a = normal(1000, 30, 30)
    a = a + a.mT
    w, v = eigh(kernels, a)
    check_eigh(a, w, v)
    for i in (0, 1, 131, 132, 999):
        assert equal(eigh(kernels, a[i : i + 1]), (w[i : i + 1], v[i : i + 1]))


@pytest.mark.parametrize("l", [5, 32, 47, 65, 96, 128])
def test_eigenvectors_have_the_same_bits_every_time(kernels: ModuleType, l: int) -> None:
    """A race would show here, sooner or later."""
    a = matrices(l).repeat(50, 1, 1)
    w, v = eigh(kernels, a)
    assert equal((w[:6].repeat(50, 1), v[:6].repeat(50, 1, 1)), (w, v))
    for _ in range(5):
        assert equal(eigh(kernels, a), (w, v))


def test_matrices_with_nothing_to_rotate_and_those_that_are_not_finite(backend: ModuleType) -> None:
    a = torch.zeros(4, 33, 33, dtype=F64)
    a[1], a[2] = 3 * torch.eye(33, dtype=F64), torch.diag(torch.arange(33, dtype=F64))
    a[3] = matrices(33)[0]
    expected = eigh(backend, a[[0, 1, 2]])
    a[3, 20, 4] = float("nan")
    w, v = eigh(backend, a)
    assert bool(w[3].isnan().all()) and bool(v[3].isnan().all())
    check_eigh(a[:3], w[:3], v[:3])
    if backend is _ops_cuda:
        assert equal((w[:3], v[:3]), expected)
        assert torch.equal(w[2], torch.arange(33, dtype=F64).flip(0))


@pytest.mark.parametrize("exponent", [-940, -300, 900])
def test_a_power_of_two_changes_nothing_but_the_exponents(kernels: ModuleType, exponent: int) -> None:
    a = matrices(32)[:2]
    half, rest = torch.tensor(exponent // 2), torch.tensor(exponent - exponent // 2)
    w, v = eigh(kernels, torch.ldexp(torch.ldexp(a, half), rest))
    assert equal((torch.ldexp(torch.ldexp(w, -rest), -half), v), eigh(kernels, a))


# ---- squared_norm ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squared_norm(backend: ModuleType, dtype: torch.dtype) -> None:
    for m, n in (*SHAPES, (1000, 777), (768, 3072)):
        a = normal(3, m, n, seed=m + n).to(dtype)
        got, expected = norm(backend, a), a.to(F64).square().sum(dim=(1, 2))
        assert float(((got - expected) / expected).abs().max()) < 1e-13, (m, n)
        assert torch.equal(torch.cat([norm(backend, one[None]) for one in a]), got), (m, n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_order_of_summation(kernels: ModuleType, dtype: torch.dtype) -> None:
    """To the bit what the emulated kernels give: the order is theirs, and the squares are exact."""
    for shape in (*((3, m, n) for m, n in SHAPES), (1, 300, 2049), (48, 200, 768), (1, 3000, 768)):
        a = normal(*shape, seed=shape[1]).to(dtype)
        assert torch.equal(norm(kernels, a), norm_in_order(a)), shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_do_not_depend_on_addresses_and_may_be_no_numbers(backend: ModuleType, dtype: torch.dtype) -> None:
    a = normal(4, 257, 131).to(dtype)
    expected = norm(backend, a)
    for by in (1, 3):
        moved = torch.zeros(a.numel() + by, dtype=dtype, device=DEVICE)[by:].copy_(a.flatten()).view(a.shape)
        assert torch.equal(norm(backend, moved), expected)
    a[1, 256, 130], a[2, 0, 0] = float("nan"), -float("inf")
    got = norm(backend, a)
    assert torch.equal(got[[0, 3]], expected[[0, 3]]) and bool(got[1].isnan()) and float(got[2]) == float("inf")


# ---- both, as torch sees them ----


@pytest.mark.parametrize("name", ["symmetric_eigh", "squared_norm"])
def test_opcheck(name: str) -> None:
    a = matrices(12).to(DEVICE)
    result = torch.library.opcheck(getattr(OPS, name).default, (a,))
    assert set(result.values()) == {"SUCCESS"}, result


def test_in_a_cuda_graph_and_on_another_stream(kernels: ModuleType) -> None:
    a, new = torch.zeros(6, 40, 40, dtype=F64, device=DEVICE), matrices(40).to(DEVICE)
    w, v, out = torch.zeros_like(a[:, 0]), torch.zeros_like(a), torch.zeros(6, dtype=F64, device=DEVICE)

    def step() -> None:
        kernels.symmetric_eigh(a, w, v)
        kernels.squared_norm(a, out)

    expected = (*eigh(kernels, new), norm(kernels, new))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        torch.cuda._sleep(200_000_000)  # some 0.1 s, in which another stream would find zeros
        a.copy_(new)
        step()
    side.synchronize()
    assert equal((w.cpu(), v.cpu(), out.cpu()), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for t in (w, v, out):
        t.fill_(7)
    graph.replay()
    torch.cuda.synchronize()
    assert equal((w.cpu(), v.cpu(), out.cpu()), expected)


# ---- truncated_svd ----


def spectrum(m: int, n: int, s: Tensor, seed: int) -> Tensor:
    k = s.numel()
    u, v = torch.linalg.qr(normal(m, k, seed=seed)).Q, torch.linalg.qr(normal(n, k, seed=seed + 1)).Q
    return (u * s @ v.mT).float()


def decaying(m: int, n: int, power: float, seed: int = 0) -> Tensor:
    return spectrum(m, n, torch.arange(1, min(m, n) + 1, dtype=F64, device="cpu") ** -power, seed)


CASES: dict[str, Callable[[], Tensor]] = {
    "vectors": lambda: torch.stack([decaying(1, 40, 1), decaying(1, 40, 1, 3)]),
    "small": lambda: torch.stack([decaying(10, 12, 1), decaying(10, 12, 3)]),
    "full Gram": lambda: torch.stack([decaying(64, 200, 0.5), decaying(64, 200, 2.0)]),
    "full Gram, tall": lambda: decaying(300, 48, 0.3)[None],
    "square": lambda: torch.stack([decaying(384, 384, p, i) for i, p in enumerate((0.8, 1.0, 1.5, 4.0))]),
    "tall": lambda: torch.stack([decaying(1536, 384, p, i) for i, p in enumerate((1.0, 2.0))]),
    "wide": lambda: decaying(384, 1536, 1.0)[None],
    "long": lambda: decaying(6000, 256, 1.2)[None],
    "one direction": lambda: decaying(500, 300, 9.0)[None],
    "flat": lambda: normal(2, 256, 256).float(),
    "scales": lambda: torch.stack([decaying(200, 180, 1.0) * x for x in (1e-15, 1.0, 1e12)]),
    "rank one": lambda: torch.outer(normal(400), normal(333, seed=1)).float()[None],
}


@pytest.fixture
def tf32_allowed() -> Iterator[None]:
    """A user may allow it; energies must not notice."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def check_svd(a: Tensor, svd: ops.TruncatedSVD, energy: float) -> None:
    """The energy is what it is said to be, to five digits, and reaches the threshold; the factors are orthonormal."""
    for x, u, s, vh, rank in zip(a.double(), *(t.cpu().double() for t in svd[:3]), svd.rank.tolist(), strict=True):
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
        total = float(x.square().sum())
        kept = 1 - float((x - u * s @ vh).square().sum()) / total
        assert abs(kept - float(s.square().sum()) / total) < 1e-5
        assert kept >= energy - 2e-6
        identity = torch.eye(rank, dtype=F64)
        assert float((u.mT @ u - identity).abs().max()) < 1e-4 and float((vh @ vh.mT - identity).abs().max()) < 1e-4


@pytest.mark.parametrize("energy", [0.5, 0.95, 0.98])
@pytest.mark.parametrize("case", CASES)
def test_truncated_svd_by_energy_is_that_of_the_cpu(tf32_allowed: None, case: str, energy: float) -> None:
    a = CASES[case]()
    expected = ops.truncated_svd(a, energy=energy, seed=5)
    got = ops.truncated_svd(a.to(DEVICE), energy=energy, seed=5)
    assert got.U.device.type == DEVICE.type and got.rank.device.type == "cpu"
    assert int((got.rank - expected.rank).abs().max()) <= 1, (got.rank, expected.rank)
    check_svd(a, got, energy)
    k = int(torch.minimum(got.rank, expected.rank).min())
    assert torch.allclose(got.S[:, :k].cpu(), expected.S[:, :k], rtol=2e-3, atol=0.0)
    least = torch.linalg.svdvals(a.double()).square()
    wanted = (least.cumsum(1) < energy * least.sum(1, keepdim=True) * (1 - 1e-6)).sum(1) + 1
    assert bool((got.rank >= wanted).all()) and bool((got.rank <= 1.05 * wanted + 1).all()), (got.rank, wanted)


@pytest.mark.parametrize("rank", [1, 4, 10])
def test_truncated_svd_by_rank(rank: int) -> None:
    for case in ("small", "square", "wide", "long"):
        a = CASES[case]()
        svd = ops.truncated_svd(a.to(DEVICE), rank=rank)
        assert svd.rank.tolist() == [rank] * len(a)
        check_svd(a, svd, 0.0)
        assert torch.allclose(svd.S.cpu().double(), torch.linalg.svdvals(a.double())[:, :rank], rtol=1e-2)


def test_truncated_svd_of_zeros_of_too_flat_a_spectrum_and_of_no_numbers() -> None:
    a = torch.stack([torch.zeros(128, 128), decaying(128, 128, 2.0), normal(128, 128).float()]).to(DEVICE)
    svd = ops.truncated_svd(a, energy=0.95, max_rank=30)
    assert svd.rank.tolist()[0] == 0 and 1 <= svd.rank.tolist()[1] <= 3 and svd.rank.tolist()[2] == -1
    assert not bool(svd.U[[0, 2]].any()) and not bool(svd.S[[0, 2]].any()) and not bool(svd.Vh[[0, 2]].any())
    a[1, 5, 6] = float("inf")
    with pytest.raises(ValueError, match="matrix 1"):
        ops.truncated_svd(a, energy=0.95)


@pytest.mark.parametrize("case", ["square", "long", "full Gram", "flat"])
def test_truncated_svd_is_the_same_every_time(case: str) -> None:
    a = CASES[case]().to(DEVICE)
    first = ops.truncated_svd(a, energy=0.95, seed=3)
    for _ in range(3):
        torch.rand(1000, device=DEVICE)  # its random numbers are its own
        assert equal(tuple(first), tuple(ops.truncated_svd(a, energy=0.95, seed=3)))


def test_truncated_svd_of_repeated_singular_values() -> None:
    s = torch.tensor([2.0] * 8 + [1.0] * 8 + [1e-3] * 80, dtype=F64, device="cpu")
    a = spectrum(300, 200, s, 0)[None]
    svd = ops.truncated_svd(a.to(DEVICE), energy=0.89)
    assert svd.rank.tolist() == [12]  # 8 * 4 + 4 of 40, which is 0.9
    check_svd(a, svd, 0.89)
    check_eigh(with_eigenvalues(s[:20])[None], *eigh(_ops_triton, with_eigenvalues(s[:20])[None]))


def test_a_codec_of_low_rank_on_the_gpu() -> None:
    """What a client sends from a GPU decodes to what one on the CPU would have sent, and keeps the energy."""
    update = {
        "a": decaying(384, 384, 1.5),
        "b": decaying(384, 384, 1.2, 7),
        "c": decaying(768, 384, 1.5, 9),
        "d": torch.ones(9),
    }
    schema = Schema.of(update)
    for stages in ((LowRank(0.95),), (LowRank(0.95), Quantize(8))):
        codec = Codec(*stages)
        on_cpu = codec.decode_full(codec.encode(update, CodecContext(seed=3)), schema)
        payload = codec.encode({n: t.to(DEVICE) for n, t in update.items()}, CodecContext(seed=3))
        decoded = codec.decode_full(payload, schema)
        assert decoded.ranks is not None and on_cpu.ranks is not None and decoded.ranks["d"] is None
        for name in ("a", "b", "c"):
            rank, expected = decoded.ranks[name], on_cpu.ranks[name]
            assert rank is not None and expected is not None and abs(rank - expected) <= 1
            back, x = decoded.tensors[name].double(), update[name].double()
            assert float((back - x).square().sum() / x.square().sum()) < 0.052
        assert codec.encode({n: t.to(DEVICE) for n, t in update.items()}, CodecContext(seed=3)) == payload
