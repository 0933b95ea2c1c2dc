"""The communication hooks on ranks that are threads: every formula, without processes. Real ones: test_comm_hooks_ddp.py."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comm_support import FakeBucket, Ranks, ThreadWorld
from torch import Tensor, nn

from dynfed_lightning import ops
from dynfed_lightning._comm_quantized import QuantizedMean, _cut
from dynfed_lightning.comm_hooks import (
    GradientCompression,
    LowRankState,
    QuantizedState,
    Traffic,
    low_rank_hook,
    quantized_hook,
)

SHAPES = {"a": (40, 24), "b": (40, 24), "bias": (40,), "conv": (16, 4, 3, 3), "wide": (8, 100), "scalar": ()}


def module(shapes: dict[str, tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> nn.ParameterDict:
    return nn.ParameterDict({n: nn.Parameter(torch.zeros(s, dtype=dtype)) for n, s in shapes.items()})


def draw(params: list[nn.Parameter], world: int, seed: int = 0) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(p.shape, generator=generator).to(p.dtype) for p in params] for _ in range(world)]


def mean(gradients: list[list[Tensor]]) -> list[Tensor]:
    return [torch.stack([g.double() for g in same]).mean(0) for same in zip(*gradients, strict=True)]


def named(net: nn.ParameterDict) -> tuple[list[str], list[nn.Parameter]]:
    return [n for n, _ in net.named_parameters()], [p for _, p in net.named_parameters()]


def low_rank(**kwargs: Any) -> Callable[[], LowRankState]:
    return lambda: LowRankState(**{"rank": 2, "min_compression_rate": 0, **kwargs})


def quantized(**kwargs: Any) -> Callable[[], QuantizedState]:
    return lambda: QuantizedState(**{"min_size": 0, "bucket": 64, **kwargs})


COMPRESSIONS = {
    "rank 2": low_rank(),
    "rank 2, cold": low_rank(warm_start=False),
    "rank 2 in bfloat16": low_rank(factor_dtype=torch.bfloat16),
    "rank 2 in 4 bits": low_rank(bits=4),
    "rank 2 in 4 bits, scattered": low_rank(bits=4, exchange="scatter"),
    "rank by energy": low_rank(rank=8, energy=0.3, rank_every=2),
    "4 bits": quantized(bits=4, exchange="gather"),
    "4 bits, scattered": quantized(bits=4, exchange="scatter"),
    "3 bits, stochastic": quantized(bits=3, rounding="stochastic"),
    "2 bits, rotated": quantized(bits=2, rotate=64, exchange="gather"),
    "2 bits, rotated, scattered": quantized(bits=2, rotate=64, exchange="scatter"),
    "1 bit": quantized(bits=1),
}


@pytest.mark.parametrize("world", [2, 5])
@pytest.mark.parametrize("name", COMPRESSIONS)
def test_what_is_not_sent_is_remembered(name: str, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After every step: the sum of all mean gradients = the sum of all results + the mean residual. Nothing is ever lost."""
    net = module()
    names, params = named(net)
    ranks = Ranks(COMPRESSIONS[name], world, monkeypatch)
    given = [torch.zeros(p.shape, dtype=torch.float64) for p in params]
    got = [torch.zeros(p.shape, dtype=torch.float64) for p in params]
    for step in range(4):
        gradients = draw(params, world, seed=step)
        split = [6] if step < 2 else [2, 4]  # DDP rebuilds its buckets, once
        for total, t in zip(given, mean(gradients), strict=True):
            total += t
        results = ranks.step(params, gradients, split)
        for total, t in zip(got, results, strict=True):
            total += t
        residuals = ranks.residuals(net)
        for n, a, b in zip(names, given, got, strict=True):
            missing = residuals[n].reshape(a.shape) if n in residuals else torch.zeros_like(a)
            # Sums over ranks are rounded to 8 bits in bfloat16, which no rank sees.
            atol = 0.03 if "bfloat16" in name and missing.numel() > 1 else 3e-5
            torch.testing.assert_close(b + missing, a, rtol=0, atol=atol, msg=lambda m, n=n: f"{n}: {m}")
    assert {"a", "b", "conv", "wide"} <= residuals.keys()
    assert all(float(r.norm()) > 1e-3 for n, r in residuals.items() if n in ("a", "b", "conv", "wide"))
    assert ("bias" in residuals) != name.startswith("rank")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "make", [low_rank(rank=1000), lambda: QuantizedState(None), lambda: LowRankState(1), quantized(bits=8, rotate=64)]
)
def test_near_lossless_settings_give_the_mean(
    make: Callable[[], Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full rank, no bits and compression that pays for nothing (``LowRankState(1)`` of 3 x 2); and 8 bits to a hundredth."""
    shapes = {"w": (3, 2)} if isinstance(make(), LowRankState) and make().rank == 1 else SHAPES
    _, params = named(module(shapes, dtype))
    gradients = draw(params, 3)
    results = Ranks(make, 3, monkeypatch).step(params, gradients)
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    if isinstance(make(), QuantizedState) and make().bits:
        tolerance += 0.03
    for a, b in zip(results, mean(gradients), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance)


def test_the_approximation_converges_to_the_best_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm starts make power iteration of it: on a constant gradient, without feedback, the truncated SVD."""
    _, params = named(module({"w": (60, 30)}))
    u, v = torch.linalg.qr(torch.randn(60, 30)).Q, torch.linalg.qr(torch.randn(30, 30)).Q
    m = u @ torch.diag(torch.logspace(0, -3, 30)) @ v.T
    best = float((ops.truncated_svd(m[None], rank=3).S ** 2).sum())
    ranks = Ranks(low_rank(rank=3, error_feedback=False), 2, monkeypatch)
    noise = torch.randn(60, 30)
    errors = []
    for _ in range(12):
        out = ranks.step(params, [[m + noise], [m - noise]])[0]  # only the mean counts
        errors.append(float((m - out).square().sum()))
    optimal = float(m.square().sum()) - best
    assert errors[0] > 1.02 * optimal
    assert errors[-1] == pytest.approx(optimal, rel=1e-3)


def test_a_matrix_of_the_rank_is_exact_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, params = named(module({"w": (20, 12), "x": (20, 12)}))
    a, b = torch.randn(20, 2) @ torch.randn(2, 12), torch.randn(20, 1) @ torch.randn(1, 12)
    out = Ranks(low_rank(), 2, monkeypatch).step(params, [[a, b], [3 * a, -b]])
    torch.testing.assert_close(out[0], 2 * a, rtol=0, atol=2e-5)
    torch.testing.assert_close(out[1], torch.zeros(20, 12), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_zero_gradients_stay_zero_and_do_no_harm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's hook divides by the norm of a zero column."""
    _, params = named(module())
    ranks = Ranks(COMPRESSIONS[name], 2, monkeypatch)
    for _ in range(3):
        assert all(float(t.abs().sum()) == 0 for t in ranks.step(params, [[torch.zeros(p.shape) for p in params]] * 2))
    if not name.startswith("rank"):
        return
    dead = torch.zeros(40, 24)
    dead[30:, 20:] = torch.randn(10, 4)  # in none of the first rows or columns
    gradients = [dead if p.shape == (40, 24) else torch.zeros(p.shape) for p in params]
    total = sum(ranks.step(params, [gradients] * 2)[0] for _ in range(6))
    assert float((total * dead).sum() / (6 * dead.square().sum())) > 0.5


@pytest.mark.parametrize("name", COMPRESSIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_passed_on_and_forgotten(
    name: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = module()
    names, params = named(net)
    ranks = Ranks(COMPRESSIONS[name], 3, monkeypatch)
    ranks.step(params, draw(params, 3))
    before = ranks.residuals(net)
    broken = draw(params, 3, seed=1)
    broken[1][names.index("a")][0, 0] = value
    broken[2][names.index("bias")][3] = value
    results = dict(zip(names, ranks.step(params, broken), strict=True))
    assert not results["a"][0, 0].isfinite() and not results["bias"][3].isfinite()
    assert all(results[n].isfinite().all() for n in ("b", "conv", "wide", "scalar"))
    after = ranks.residuals(net)
    spoilt = ~results["a"].isfinite().reshape(-1)
    torch.testing.assert_close(after["a"][spoilt], before["a"][spoilt], rtol=0, atol=1e-6)
    assert not torch.equal(after["b"], before["b"])
    for step in range(2, 4):
        assert all(t.isfinite().all() for t in ranks.step(params, draw(params, 3, seed=step)))


def test_the_energy_chooses_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest answer of all ranks counts; `rank` is the limit; ranks are chosen every `rank_every` steps only."""
    net = module({"full": (50, 40), "one": (50, 40), "three": (50, 40), "zero": (50, 40)})
    _, params = named(net)

    def of(rank: int, seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        q, r = (torch.linalg.qr(torch.randn(k, 40, generator=g)).Q[:, :rank] for k in (50, 40))
        return q @ r.T

    ranks = Ranks(lambda: LowRankState(6, energy=0.999, rank_every=2), 2, monkeypatch)
    first = [of(40, 2), of(1, 0), of(1, 1), torch.zeros(50, 40)]
    second = [of(40, 5), of(1, 3), of(3, 4), torch.zeros(50, 40)]
    ranks.step(params, [first, second])
    assert ranks.states[0].ranks(net) == ranks.states[1].ranks(net)
    assert ranks.states[0].ranks(net) == {"one": 1, "three": 3, "full": 6, "zero": 6}
    third = [of(40, 8), of(4, 6), of(3, 7), torch.zeros(50, 40)]
    ranks.step(params, [third, third])
    assert ranks.states[0].ranks(net)["one"] == 1
    ranks.step(params, [third, third])
    assert ranks.states[0].ranks(net)["one"] >= 4


@pytest.mark.parametrize("rate", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("energy", [None, 0.9])
def test_only_matrices_for_which_it_pays_are_factored(rate: float, energy: float | None) -> None:
    state = LowRankState(5, energy=energy, min_compression_rate=rate)
    for n, m in [(1, 100), (2, 2), (10, 10), (12, 60), (20, 20), (21, 20), (100, 100)]:
        pays = [r for r in range(1, 6) if r <= min(n, m) and (not rate or (n + m) * r * rate < n * m)]
        expected = max(pays, default=0) if energy else min(5, n, m) if min(5, n, m) in pays else 0
        assert state.limit(n, m) == expected


def test_gathered_bits_are_those_of_the_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of what the ranks' quantisers make of their gradients, added up in the order of ranks."""
    _, params = named(module({"w": (40, 24), "b": (24,)}))
    gradients = draw(params, 3)
    out = Ranks(quantized(bits=3, rounding="nearest"), 3, monkeypatch).step(params, gradients)
    for i in range(2):
        want = torch.zeros(params[i].numel())
        for g in gradients:
            packed, scales = ops.quantize_pack(g[i], 3, 64, rounding="nearest")
            ops.dequantize_accumulate(want, packed, scales, 3, 64, 1 / 3)
        assert torch.equal(out[i].reshape(-1), want)


@pytest.mark.parametrize("exchange", ["gather", "scatter"])
def test_stochastic_rounding_is_unbiased_and_differs_between_ranks_and_steps(
    exchange: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, params = named(module({"w": (40, 24)}))
    same = [draw(params, 1)[0]] * 4
    make = quantized(bits=2, error_feedback=False, exchange=exchange)
    assert make().rounding == "stochastic"
    ranks = Ranks(make, 4, monkeypatch)
    steps = torch.stack([ranks.step(params, same)[0] for _ in range(200)])
    assert not torch.equal(steps[0], steps[1])
    # One rank alone would give three levels per bucket; four that draw their own bits give more.
    if exchange == "gather":
        assert len(steps[0].reshape(-1)[:64].unique()) > 3
    deviation, expected = (steps.mean(0) - same[0][0]).square().sum(), steps.var(0).sum() / 200
    assert float(deviation / expected) == pytest.approx(1.0, abs=0.2)


def test_rotation_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    _, params = named(module({"w": (64, 128)}))
    gradients = [[g[0] ** 3] for g in draw(params, 2)]  # heavy tails
    errors = {}
    for name, make in (
        ("plain", quantized(bits=3, bucket=512, error_feedback=False)),
        ("rotated", quantized(bits=3, bucket=512, error_feedback=False, rotate=4096)),
    ):
        out = Ranks(make, 2, monkeypatch).step(params, gradients)[0]
        errors[name] = float((out - mean(gradients)[0]).square().sum() / mean(gradients)[0].square().sum())
    assert errors["rotated"] < 0.1 < 0.5 < errors["plain"]


@pytest.mark.parametrize("world", [2, 3, 7])
@pytest.mark.parametrize("sizes", [[1000], [3, 5, 1], [64, 64, 640, 1, 100], [10000, 7]])
def test_parts_are_even_and_cut_between_buckets(sizes: list[int], world: int) -> None:
    starts = [5 + sum(sizes[:i]) + i for i in range(len(sizes))]
    shards = _cut(list(zip(starts, sizes, strict=True)), 64, world)
    assert len(shards) == world
    values = [v for shard in shards for start, n in shard for v in range(start, start + n)]
    assert values == [v for start, n in zip(starts, sizes, strict=True) for v in range(start, start + n)]
    for start, n in (piece for shard in shards for piece in shard):
        tensor = max(i for i, s in enumerate(starts) if s <= start)
        assert (start - starts[tensor]) % 64 == 0 and (n % 64 == 0 or start + n == starts[tensor] + sizes[tensor])
    counts = [sum(n for _, n in shard) for shard in shards]
    assert max(counts) <= sum(sizes) / world + 64


def test_scattering_takes_bytes_that_do_not_grow_with_the_ranks() -> None:
    n = 200_000
    dense = 4 * n
    for world, exchange in ((2, "gather"), (3, "gather"), (4, "scatter"), (16, "scatter")):
        mean_of = QuantizedMean([(0, n)], 4, 512, "nearest", "auto", world, 0)
        assert mean_of.scatter == (exchange == "scatter")
        sent = sum(s.size for s in mean_of.shards)
        wire = (world - 1) * sent if exchange == "gather" else 2 * (world - 1) * sent / world
        assert wire <= (4 / 32 + 4 / 512 / 4 + 0.001) * dense * min(2.0, world - 1)


def test_parameters_may_move_between_buckets_and_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that was saved goes on as if nothing had happened, in other buckets too."""
    net = module()
    _, params = named(net)
    one = Ranks(low_rank(), 2, monkeypatch)
    for step in range(3):
        one.step(params, draw(params, 2, seed=step))
    saved = [s.state_dict(net) for s in one.states]
    expected = one.step(params, draw(params, 2, seed=9))
    two = Ranks(low_rank(), 2, monkeypatch)
    for state, s in zip(two.states, saved, strict=True):
        state.load_state_dict(s, net)
        assert state.step == 3
    for a, b in zip(expected, two.step(params, draw(params, 2, seed=9), [1, 3, 2]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_saving_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net = module()
    _, params = named(net)
    results = []
    for save in (False, True):
        ranks = Ranks(quantized(bits=2, rotate=64, exchange="scatter"), 3, monkeypatch)
        for step in range(3):
            out = ranks.step(params, draw(params, 3, seed=step))
            if save:
                ranks.residuals(net)
        results.append(out)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_residuals_follow_the_loss_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    net = module()
    _, params = named(net)
    for make in (low_rank(), quantized(bits=2, exchange="scatter")):
        ranks = Ranks(make, 2, monkeypatch)
        ranks.step(params, draw(params, 2))
        before = ranks.residuals(net)
        for state in ranks.states:
            state.rescale(0.5)
        for n, r in ranks.residuals(net).items():
            torch.testing.assert_close(r, before[n] / 2)


def test_plain_steps_first_and_one_rank_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _, params = named(module())
    gradients = draw(params, 2)
    for make in (low_rank(start_step=2), quantized(bits=2, start_step=2)):
        ranks = Ranks(make, 2, monkeypatch)
        for step in range(3):
            out = ranks.step(params, gradients)
            close = all(torch.allclose(a.double(), b, atol=1e-6) for a, b in zip(out, mean(gradients), strict=True))
            assert close == (step < 2)
        alone = Ranks(make, 1, monkeypatch)
        for _ in range(4):
            assert all(torch.equal(a, b) for a, b in zip(alone.step(params, gradients[:1]), gradients[0], strict=True))
        assert alone.states[0].traffic.ratio == 1.0 and alone.states[0].step == 4


def test_states_can_be_pickled() -> None:
    for state in (LowRankState(3, energy=0.9), QuantizedState(2, rotate=1024)):
        copy = pickle.loads(pickle.dumps(state))
        assert type(copy) is type(state)
        assert {k: v for k, v in vars(copy).items() if k[0] != "_"} == {
            k: v for k, v in vars(state).items() if k[0] != "_"
        }
    with pytest.raises(TypeError, match="no `process_group`"):
        pickle.dumps(LowRankState(process_group=object()))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: LowRankState(0), "`rank` to be an integer from 1"),
        (lambda: LowRankState(True), "`rank`"),
        (lambda: LowRankState(2.0), "`rank`"),  # type: ignore[arg-type]
        (lambda: LowRankState(energy=0.0), "`energy` to be above 0 and at most 1, but got 0.0"),
        (lambda: LowRankState(energy=1.5), "`energy`"),
        (lambda: LowRankState(energy=True), "`energy`"),
        (lambda: LowRankState(rank_every=0), "`rank_every`"),
        (lambda: LowRankState(error_feedback=1), "`error_feedback` to be True or False"),  # type: ignore[arg-type]
        (lambda: LowRankState(warm_start=None), "`warm_start`"),  # type: ignore[arg-type]
        (lambda: LowRankState(min_compression_rate=-1), "`min_compression_rate`"),
        (lambda: LowRankState(min_compression_rate=float("nan")), "`min_compression_rate`"),
        (lambda: LowRankState(factor_dtype=torch.int8), "`factor_dtype`"),
        (lambda: LowRankState(bits=9), "`bits` to be an integer from 1 to 8, but got 9"),
        (lambda: LowRankState(bits=4, factor_dtype=torch.float16), "one of `bits` and `factor_dtype`"),
        (lambda: LowRankState(start_step=-1), "`start_step`"),
        (lambda: LowRankState(seed=-1), "`seed`"),
        (lambda: LowRankState(exchange="ring"), "`exchange` to be one of auto, gather, scatter, but got 'ring'"),
        (lambda: QuantizedState(0), "`bits` to be an integer from 1 to 8, but got 0"),
        (lambda: QuantizedState(9), "`bits`"),
        (lambda: QuantizedState(bucket=12), "`bucket` to be a multiple of 8"),
        (lambda: QuantizedState(bucket=2**20), "`bucket`"),
        (lambda: QuantizedState(rounding="up"), "`rounding` to be one of"),
        (lambda: QuantizedState(rounding="eden"), "`rotate` to be set with rounding 'eden'"),
        (lambda: QuantizedState(rotate=100), "`rotate` to be a power of two, but got 100"),
        (lambda: QuantizedState(rotate=8), "`rotate`"),
        (lambda: QuantizedState(min_size=-1), "`min_size`"),
        (lambda: QuantizedState(exchange=None), "`exchange`"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_wrong_states_and_gradients() -> None:
    bucket: Any = FakeBucket([torch.zeros(2)], [torch.zeros(2)])
    with pytest.raises(TypeError, match="`ddp_comm_state` to be a LowRankState, but got NoneType"):
        low_rank_hook(None, bucket)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`ddp_comm_state` to be a QuantizedState, but got LowRankState"):
        quantized_hook(LowRankState(), bucket)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="LowRankState or QuantizedState"):
        GradientCompression(object())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="floating point, but got torch.int64"):
        LowRankState().run(FakeBucket([torch.zeros(2)], [torch.zeros(2, dtype=torch.int64)]))  # type: ignore[arg-type]
    bucket.flat = torch.eye(2).to_sparse()
    for state in (LowRankState(start_step=9), QuantizedState(), QuantizedState(None)):
        with pytest.raises(TypeError, match="to be dense, but got sparse_coo: `sparse=False` in the embedding"):
            state.run(bucket)
        assert state.step == state.traffic.dense_payload == 0


def test_wrong_checkpoints() -> None:
    net = module({"w": (4, 4)})
    traffic = Traffic(steps=1).as_dict()
    good = {"step": 1, "traffic": traffic, "parameters": {"w": {"warm_start": torch.ones(4, 2)}}}
    LowRankState().load_state_dict(good, net)
    with pytest.raises(ValueError, match="what `state_dict` returned, but got list"):
        LowRankState().load_state_dict([], net)  # type: ignore[arg-type]
    for change, match in (
        ({"step": -1}, "`state\\['step'\\]`"),
        ({"traffic": {**traffic, "bytes": 1}}, "entries of Traffic, but \\['bytes'\\] differ"),
        ({"traffic": {}}, "entries of Traffic, but \\['dense_payload'"),
        ({"traffic": {**traffic, "wire": 0.5}}, "`state\\['traffic'\\]\\['wire'\\]` to be an integer"),
        ({"traffic": None}, "`state\\['traffic'\\]` to be a dict, but got NoneType"),
        ({"parameters": []}, "`state\\['parameters'\\]` to be a dict, but got list"),
        ({"parameters": {"w": 1}}, "`state\\['parameters'\\]\\['w'\\]` to be a dict, but got int"),
        ({"parameters": {"v": {}}}, "no parameter 'v'"),
        ({"parameters": {"w": {"residual": torch.zeros(3)}}}, "residual of 'w' to have 16 values, but got 3"),
        ({"parameters": {"w": {"residual": "x"}}}, "residual of 'w' to be a tensor of floats, but got 'x'"),
        ({"parameters": {"w": {"warm_start": torch.ones(3, 2)}}}, "4 rows .* but got shape \\(3, 2\\)"),
        ({"parameters": {"w": {"warm_start": torch.ones(4)}}}, "4 rows .* but got shape \\(4,\\)"),
        ({"parameters": {"w": {"warm_start": torch.ones(4, 0)}}}, "one column or more"),
    ):
        with pytest.raises(ValueError, match=match):
            LowRankState().load_state_dict({**good, **change}, net)


def test_a_rank_that_fails_does_not_hang_the_others() -> None:
    """Of the threads that the other tests stand on."""

    def work(rank: int) -> None:
        if rank == 1:
            raise KeyError("one")
        world.swap(rank)

    world = ThreadWorld(2)
    with pytest.raises(KeyError, match="one"):
        world.run(work)


def test_a_ranks_own_residual_stays_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the ranks' data differ for good, subtracting the mean's approximation (as torch's hook does) would pile up the
    difference for ever: a line, against what error feedback keeps at a level."""
    _, params = named(module({"w": (64, 64)}))
    difference = torch.randn(64, 64)
    ranks = Ranks(low_rank(rank=4), 2, monkeypatch)
    other, norms = torch.zeros(64, 64), {}
    for step in range(1, 401):
        out = ranks.step(params, [[torch.eye(64) + difference], [torch.eye(64) - difference]])[0]
        other += torch.eye(64) + difference - out
        plan: Any = next(iter(ranks.states[0]._plans.values()))
        norms[step] = (float(plan.groups[0].memory.norm()), float(other.norm()))
    assert norms[400][1] > 3.5 * norms[100][1] and norms[400][0] < 1.2 * norms[200][0]
    assert norms[400][0] < norms[400][1] / 8


def test_the_callback_follows_the_loss_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    net = module()
    _, params = named(net)
    ranks = Ranks(low_rank(), 2, monkeypatch)
    ranks.step(params, draw(params, 2))
    before = ranks.residuals(net)
    scaler = SimpleNamespace(get_scale=lambda: next(scales))
    trainer: Any = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler))
    callbacks = [GradientCompression(s) for s in ranks.states]
    scales = iter([s for s in (65536.0, 65536.0, 32768.0) for _ in callbacks])
    for factor in (1.0, 1.0, 0.5):
        for callback in callbacks:
            callback.on_train_batch_start(trainer, None, None, 0)  # type: ignore[arg-type]
        torch.testing.assert_close(ranks.residuals(net)["a"], before["a"] * factor)


def test_equal_shapes_in_one_batch_or_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket treats matrices of one shape as a batch; what comes out is what each alone would give."""
    net = module({"a": (40, 24), "b": (40, 24), "c": (40, 24)})
    _, params = named(net)
    together = Ranks(COMPRESSIONS["rank 2"], 2, monkeypatch)
    together.step(params, draw(params, 2))
    saved = [s.state_dict(net) for s in together.states]
    expected = together.step(params, draw(params, 2, seed=1))
    apart = Ranks(COMPRESSIONS["rank 2"], 2, monkeypatch)
    for state, s in zip(apart.states, saved, strict=True):
        state.load_state_dict(s, net)
    for a, b in zip(expected, apart.step(params, draw(params, 2, seed=1), [1, 1, 1]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
