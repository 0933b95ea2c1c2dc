"""The stage `LowRank`: the ranks it takes, what it sends, what comes back, and its company with other stages."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynfed_lightning import ops
from dynfed_lightning.codec import Codec, CodecContext, Schema, inspect
from dynfed_lightning.downlink import DownlinkReceiver, DownlinkSender
from dynfed_lightning.errors import MalformedPayloadError, NonFiniteError
from dynfed_lightning.schedules import Constant, Exponential, Linear
from dynfed_lightning.stages import Cast, ErrorFeedback, LowRank, Quantize, Rotate, TopK, from_wire_name
from dynfed_lightning.stages.base import parts_of
from dynfed_lightning.stages.low_rank import from_runs, parse_runs, to_runs
from dynfed_lightning.tensors import Tensors


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spectrum(shape: tuple[int, ...], values: list[float], seed: int = 0) -> torch.Tensor:
    """A tensor whose matrix has exactly these singular values (float32 aside)."""
    p, q = shape[0], math.prod(shape[1:])
    u, _ = torch.linalg.qr(normal(p, len(values), seed=seed).double())
    v, _ = torch.linalg.qr(normal(q, len(values), seed=seed + 1).double())
    return ((u * torch.tensor(values, dtype=torch.float64)) @ v.t()).float().reshape(shape)


def decaying(*shape: int, seed: int = 0, power: float = 1.0) -> torch.Tensor:
    return spectrum(shape, [i**-power for i in range(1, 1 + min(shape[0], math.prod(shape[1:])))], seed)


def most(p: int, q: int) -> int:
    """The paper's rule, counted up."""
    return max((k for k in range(1, min(p, q) + 1) if k * (p + q + 1) < p * q), default=0)


def needed(x: torch.Tensor, energy: float) -> int:
    """Eq. 9, by LAPACK in float64."""
    squares = torch.linalg.svdvals(x.reshape(x.shape[0], -1).double()).square()
    return int((squares.cumsum(0) < energy * squares.sum() * (1 - 1e-9)).sum()) + 1


def error(got: torch.Tensor, x: torch.Tensor) -> float:
    """Squared, relative."""
    return float((got.double() - x.double()).square().sum() / x.double().square().sum())


def through(codec: Codec, x: torch.Tensor, **context: int) -> torch.Tensor:
    return codec.decode(codec.encode({"w": x}, CodecContext(**context)), Schema.of({"w": x}))["w"]


def rank_of(x: torch.Tensor, codec: Codec) -> int | None:
    return codec.decode_full(codec.encode({"w": x}), Schema.of({"w": x})).ranks["w"]


# ---- what is sent ----


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.95, 0.98])
@pytest.mark.parametrize("shape", [(64, 48), (48, 64), (100, 30), (16, 8, 3, 3), (32, 16, 5), (200, 300)])
def test_the_fewest_triples_that_hold_the_energy(shape, energy):
    x = decaying(*shape)
    k = needed(x, energy)
    codec = Codec(LowRank(energy))
    got = codec.decode_full(codec.encode({"w": x}), Schema.of({"w": x}))
    assert k <= most(shape[0], math.prod(shape[1:]))  # or the case says nothing
    assert k <= got.ranks["w"] <= k + max(1, k // 20)  # a randomised basis may cost one in twenty
    assert got.energy == energy and got.bits == {"w": None}
    assert error(got.tensors["w"], x) <= (1 - energy) * (1 + 1e-5)
    if got.ranks["w"] == k:  # then it is the best there is: what was cut off, and no more
        squares = torch.linalg.svdvals(x.reshape(shape[0], -1).double()).square()
        least = float(squares[k:].sum() / squares.sum())
        assert least * (1 - 1e-5) <= error(got.tensors["w"], x) <= least * 1.02


def test_the_payload_is_the_factors():
    """[u | v] of each matrix in the arena of raw values, singular values in their own, ``K (P + Q + 1)`` floats in all."""
    x, codec = spectrum((40, 5, 5), [8.0, 4.0, 2.0, 1.0]), Codec(LowRank(0.985))
    payload = codec.encode({"w": x})
    info = inspect(payload, Schema.of({"w": x}))
    assert info.ranks == {3: 1} and info.energy == 0.985  # 8^2 + 4^2 + 2^2 of 85
    assert info.arenas == {"raw.F32": ("F32", 3 * 65, 12 * 65), "singular": ("F32", 3, 12)}
    assert len(payload) == info.header_bytes + 4 * 3 * (40 + 25 + 1)
    data = torch.frombuffer(bytearray(payload[info.header_bytes :]), dtype=torch.float32)
    u, v, s = data[:120].view(3, 40), data[120:195].view(3, 25), data[195:]
    assert s.tolist() == pytest.approx([8.0, 4.0, 2.0], rel=1e-5)
    torch.testing.assert_close(u @ u.t(), torch.eye(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(v @ v.t(), torch.eye(3), rtol=0, atol=1e-5)
    torch.testing.assert_close((u.t() * s) @ v, codec.decode(payload, Schema.of({"w": x}))["w"].view(40, 25))


@pytest.mark.parametrize(
    ("p", "q"), [(2, 3), (3, 3), (3, 4), (2, 768), (768, 2), (3, 200), (7, 9), (64, 64), (768, 3072)]
)
def test_factors_only_where_they_are_smaller(p, q):
    k = most(p, q)
    if k == 0:
        assert rank_of(spectrum((p, q), [1.0]), Codec(LowRank(0.5))) is None
        return
    level = [1.0] * (k + 1) if k < min(p, q) else [1.0]  # energy 1 - 1/(2k + 2) takes all of them
    energy = 1 - 0.5 / (k + 1)
    assert rank_of(spectrum((p, q), [1.0] * k), Codec(LowRank(energy))) == k
    if len(level) > 1:
        assert rank_of(spectrum((p, q), level), Codec(LowRank(energy))) is None


WHOLE = {
    "vector": normal(500),
    "scalar": torch.tensor(3.5),
    "row": normal(1, 500),
    "column": normal(500, 1),
    "tiny": normal(2, 2),
    "flat": torch.eye(50) * 3,
    "head": torch.linalg.qr(normal(768, 2))[0].t().contiguous(),  # 2 x 768 with equal singular values
    "nothing": torch.zeros(0, 5),
    "depthwise": torch.eye(9).repeat(4, 1).view(36, 1, 3, 3) + 0,
    "integers": torch.arange(600).view(20, 30),
    "statistics": decaying(20, 30),
}


@pytest.mark.parametrize("after", [(), (TopK(1.0),), (Quantize(None),)], ids=["alone", "topk", "quantize"])
def test_what_stays_whole_stays_exact(after):
    codec, schema = Codec(LowRank(0.95), *after), Schema.of(WHOLE, raw={"statistics"})
    got = codec.decode_full(codec.encode(WHOLE, schema=schema), schema)
    assert all(rank is None for rank in got.ranks.values())
    for name, x in WHOLE.items():
        assert torch.equal(got.tensors[name], x) and got.tensors[name].dtype == x.dtype


@pytest.mark.parametrize("energy", [1.0, 1, Constant(1.0), Linear(1.0, 1.0)])
def test_energy_one_is_the_identity(energy):
    update = {
        "w": decaying(40, 60),
        "z": -torch.zeros(9, 9),
        "low": spectrum((30, 30), [1.0]),
        "d": decaying(20, 20).double(),
    }
    codec = Codec(LowRank(energy))
    got = codec.decode_full(codec.encode(update, CodecContext(num_rounds=3)), Schema.of(update))
    assert set(got.ranks.values()) == {None} and got.energy == 1.0
    assert all(
        torch.equal(got.tensors[n], x) and torch.equal(got.tensors[n].signbit(), x.signbit()) for n, x in update.items()
    )
    assert codec.lossless == (energy == 1 and not callable(energy))
    assert not Codec(LowRank(0.999)).lossless and not Codec(LowRank(1.0, max_rank=2)).lossless


def test_of_zeros_nothing_is_sent():
    update = {"a": torch.zeros(30, 40), "b": torch.zeros(8, 4, 3, 3), "h": torch.zeros(9, 9).bfloat16()}
    for codec in (Codec(LowRank(0.95)), Codec(LowRank(0.95), Rotate(), Quantize(2, rounding="eden"))):
        payload = codec.encode(update)
        got = codec.decode_full(payload, Schema.of(update))
        assert len(payload) == inspect(payload).header_bytes
        assert got.ranks == {"a": 0, "b": 0, "h": 0}
        assert all(torch.equal(got.tensors[n], x) and got.tensors[n].dtype == x.dtype for n, x in update.items())


def test_a_head_keeps_at_least_one_triple():
    """The public code's loop could keep none of them and drop the update of a whole 2 x 768 layer."""
    for seed in range(20):
        x = normal(2, 768, seed=seed) * torch.tensor([[1.0], [1e-3]])
        assert rank_of(x, Codec(LowRank(0.95))) == 1
        assert error(through(Codec(LowRank(0.95)), x), x) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_come_back_as_they_went(dtype):
    """Vectors travel in 16 bits where the tensor has 16, which it then is accurate to; in float32 for float64."""
    x, codec = decaying(60, 80, power=2).to(dtype), Codec(LowRank(0.99))
    payload = codec.encode({"w": x})
    got = codec.decode_full(payload, Schema.of({"w": x}))
    k = got.ranks["w"]
    assert k == needed(x, 0.99) and got.tensors["w"].dtype == dtype
    assert error(got.tensors["w"], x) <= 0.01 + 1e-4
    width = 4 if dtype == torch.float64 else 2
    assert len(payload) == inspect(payload).header_bytes + k * (width * 140 + 4)


def test_values_at_the_ends_of_the_range():
    top = torch.finfo(torch.float32).max
    tiny = decaying(30, 40, power=2) * 1e-30
    assert error(through(Codec(LowRank(0.95)), tiny), tiny) <= 0.05
    large = spectrum((30, 40), [1.0]) / spectrum((30, 40), [1.0]).abs().max() * top  # its norm is beyond float32
    assert torch.isfinite(through(Codec(LowRank(0.95)), large)).all()
    assert error(through(Codec(LowRank(0.95)), large), large) <= 0.05
    half = torch.full((20, 30), 65504.0).half()
    assert torch.equal(through(Codec(LowRank(0.95)), half), half)
    x = {n: decaying(20, 30, seed=i, power=2).double() for i, n in enumerate("abc")}
    x["b"] *= 1e200  # beyond float32: whole, and the others of its batch are not
    codec = Codec(LowRank(0.95))
    got = codec.decode_full(codec.encode(x), Schema.of(x))
    assert got.ranks == {"a": 2, "b": None, "c": 2} and torch.equal(got.tensors["b"], x["b"])
    assert error(got.tensors["c"], x["c"]) <= 0.05


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_tensor_that_is_not_finite_is_named(bad, dtype):
    update = {"fine": decaying(30, 40).to(dtype), "culprit": decaying(30, 40).to(dtype)}  # in one batch
    update["culprit"][7, 8] = bad
    for codec in (Codec(LowRank(0.95)), Codec(ErrorFeedback(LowRank(0.95), Quantize(4)))):
        ctx = CodecContext()
        with pytest.raises(
            NonFiniteError, match="Expected 'culprit' to hold finite numbers only, but got NaN or infinity"
        ):
            codec.encode(update, ctx)
        assert ctx.state == {}


def test_max_rank_and_min_size():
    x = {"big": decaying(60, 80), "small": decaying(10, 12), "flat": torch.eye(40)}
    capped = Codec(LowRank(0.95, max_rank=3))
    got = capped.decode_full(capped.encode(x), Schema.of(x))
    assert got.ranks == {"big": 3, "small": 3, "flat": 3}
    squares = torch.tensor([1.0 / i**2 for i in range(1, 61)])
    least = float(squares[3:].sum() / squares.sum())
    assert least * (1 - 1e-5) <= error(got.tensors["big"], x["big"]) <= least * 1.02
    assert rank_of(decaying(60, 80), Codec(LowRank(0.5, max_rank=3))) == needed(decaying(60, 80), 0.5) == 1
    assert rank_of(decaying(10, 12), Codec(LowRank(0.9999, max_rank=6))) is None  # six triples would not be smaller
    assert rank_of(decaying(60, 80), Codec(LowRank(1.0, max_rank=2))) == 2  # PowerSGD's fixed rank
    large = Codec(LowRank(0.9, min_size=121))
    assert large.decode_full(large.encode(x), Schema.of(x)).ranks == {
        "big": needed(x["big"], 0.9),
        "small": None,
        "flat": None,
    }
    assert rank_of(decaying(10, 12), Codec(LowRank(0.8, min_size=120))) == needed(decaying(10, 12), 0.8)


def test_schedules_follow_the_rounds():
    x = {"w": decaying(100, 120)}
    codec, ranks, energies = Codec(LowRank()), [], []
    for t in range(4):
        got = codec.decode_full(codec.encode(x, CodecContext(round=t, num_rounds=4)), Schema.of(x))
        ranks.append(got.ranks["w"])
        energies.append(got.energy)
    assert energies == pytest.approx([0.95, 0.96, 0.97, 0.98])
    assert ranks == sorted(set(ranks))


def test_same_seed_same_bytes_and_company_does_not_matter():
    a, b = decaying(200, 150), decaying(200, 150, seed=5)
    codec = Codec(LowRank(0.95))
    assert codec.encode({"w": a}, CodecContext(seed=3)) == codec.encode({"w": a}, CodecContext(seed=3))
    alone = through(codec, b, seed=3)
    update = {"a": a, "b": b, "c": a.t().contiguous()}
    together = codec.decode(codec.encode(update, CodecContext(seed=3)), Schema.of(update))["b"]
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)  # sums in another order, at most
    assert torch.equal(through(codec, a.t().contiguous().t(), seed=3), through(codec, a, seed=3))


@settings(max_examples=60)
@given(
    shapes=st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=4), max_size=6),
    decay=st.floats(0.0, 4.0),
    energy=st.floats(0.05, 1.0),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    bits=st.sampled_from([None, 4, 8]),
    seed=st.integers(0, 2**64 - 1),
)
def test_any_table_comes_back(shapes, decay, energy, dtype, bits, seed):
    update: Tensors = {}
    for i, s in enumerate(shapes):
        shape, matrix = tuple(s), len(s) > 1 and math.prod(s) > 0
        update[str(i)] = (decaying(*shape, seed=i, power=decay) if matrix else normal(*shape, seed=i)).to(dtype)
    schema = Schema.of(update)
    stages = [LowRank(energy)] if bits is None else [LowRank(energy), Quantize(bits, bucket=64)]
    codec, plain = Codec(*stages), Codec(LowRank(energy))
    payload = codec.encode(update, CodecContext(seed=seed), schema)
    got = codec.decode_full(payload, schema)
    for name, x in update.items():
        out, k = got.tensors[name], got.ranks[name]
        assert (out.shape, out.dtype) == (x.shape, x.dtype) and torch.isfinite(out).all()
        if k is None:
            assert bits is not None or torch.equal(out, x)
            continue
        p, q = x.shape[0], x.numel() // x.shape[0]
        width = min(x.element_size(), 4)
        assert k >= 1 and k * (width * (p + q) + 4) < x.element_size() * p * q
        if bits is None:  # bfloat16 rounds each of two factors by up to 2^-9
            assert error(out, x) <= 1 - energy + {2: 1e-3, 4: 1e-5}[width]
    assert codec.encode(update, CodecContext(seed=seed), schema) == payload
    rows = inspect(payload, schema).tensors or []
    assert sum(r.num_bytes for r in rows) + inspect(payload).header_bytes == len(payload)
    assert (
        {r.name: r.rank for r in rows}
        == got.ranks
        == plain.decode_full(plain.encode(update, CodecContext(seed=seed)), schema).ranks
    )


# ---- with other stages ----


@pytest.mark.parametrize(("bits", "limit"), [(8, 1e-3), (4, 0.08)])
def test_factors_are_quantised_each_by_its_own_bits(bits, limit):
    update = {"w": spectrum((64, 128), [4.0, 2.0, 1.0]), "flat": torch.eye(40), "b": normal(64), "n": torch.arange(8)}
    codec, schema = Codec(LowRank(0.95), Quantize(bits)), Schema.of(update)
    payload = codec.encode(update, CodecContext(seed=1))
    got = codec.decode_full(payload, schema)
    assert got.ranks == {"w": 2, "flat": None, "b": None, "n": None}
    assert got.bits == {"w": bits, "flat": bits, "b": bits, "n": None}
    assert error(got.tensors["w"], spectrum((64, 128), [4.0, 2.0, 0.0])) < limit
    row = next(r for r in inspect(payload, schema).tensors or [] if r.name == "w")
    # u: 2 x 64 and v: 2 x 128 values, one scale each; two singular values in float32.
    assert (row.rank, row.bits, row.num_bytes) == (2, bits, (128 + 256) * bits // 8 + 8 + 8)


def test_policies_see_the_tensors_own_names():
    seen = []
    policy = lambda spec, ctx: seen.append((spec.name, spec.shape)) or 8  # noqa: E731
    Codec(LowRank(0.9), Quantize(policy)).encode({"w": spectrum((40, 50), [3.0, 2.0]), "b": normal(40)})
    assert seen == [("w", (2, 40)), ("w", (2, 50)), ("b", (40,))]


@pytest.mark.parametrize(
    ("after", "limit"),
    [
        ([Rotate(), Quantize(4, rounding="eden")], 0.06),
        ([Cast(torch.float16)], 1e-5),
        ([TopK(0.7)], 0.25),
        ([TopK(0.7), Quantize(8)], 0.25),
        ([LowRank(0.9)], 1e-9),  # orthonormal rows: a flat spectrum, which stays whole
    ],
    ids=["eden", "cast", "topk", "topk-quantize", "twice"],
)
def test_stages_that_follow(after, limit):
    x = spectrum((64, 200), [4.0, 2.0, 1.0, 1.0])
    codec = Codec(LowRank(0.9), *after)
    got = codec.decode_full(codec.encode({"w": x}, CodecContext(seed=1)), Schema.of({"w": x}))
    assert got.ranks == {"w": 2}
    assert error(got.tensors["w"], spectrum((64, 200), [4.0, 2.0, 0.0, 0.0])) <= limit


@pytest.mark.parametrize("before", [TopK(0.1), Rotate(), Quantize(8)], ids=["topk", "rotate", "quantize"])
def test_stages_that_leave_no_matrix_leave_it_nothing_to_do(before):
    x = {"w": decaying(40, 60)}
    plain, both = Codec(before), Codec(before, LowRank(0.5))
    schema = Schema.of(x)
    assert torch.equal(
        both.decode(both.encode(x, CodecContext(seed=4)), schema)["w"],
        plain.decode(plain.encode(x, CodecContext(seed=4)), schema)["w"],
    )


@pytest.mark.parametrize("stages", [(Quantize(8),), (Quantize(4),), (Rotate(), Quantize(4, rounding="eden")), ()])
def test_error_feedback_knows_to_the_bit_what_the_receiver_got(stages):
    codec, state = Codec(ErrorFeedback(LowRank(0.7), *stages)), {}
    shapes = {"a": (33, 47), "b": (33, 47), "c": (16, 8, 3, 3), "d": (70,)}
    sent = {n: torch.zeros(s) for n, s in shapes.items()}
    wanted = {n: torch.zeros(s) for n, s in shapes.items()}
    for t in range(6):
        x = {n: normal(*s, seed=t) for n, s in shapes.items()}
        before = dict(state.get("error_feedback", {}))
        payload = codec.encode(x, CodecContext(seed=t, round=t, state=state))
        got = Codec(LowRank(0.7), *stages).decode(payload, Schema.of(x))  # a receiver needs no error feedback
        for n in x:
            assert torch.equal(state["error_feedback"][n], x[n] + before.get(n, torch.zeros(())) - got[n])
            sent[n] += got[n]
            wanted[n] += x[n]
    for n in shapes:  # what was cut off is still owed, not lost
        torch.testing.assert_close(sent[n] + state["error_feedback"][n], wanted[n], rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_steps_say_how_far_quantised_factors_move_an_entry(bits):
    """A uniform error has a variance of a twelfth of its step squared, stochastic rounding's one of a sixth."""
    x = {"w": spectrum((60, 90), [5.0, 3.0, 2.0]), "b": normal(60), "z": torch.zeros(30, 30)}
    codec, plain, schema = Codec(LowRank(0.999), Quantize(bits)), Codec(LowRank(0.999)), Schema.of(x)
    squares = expected = torch.zeros(60, 90)
    exact = plain.decode(plain.encode(x), schema)["w"]
    for seed in range(40):
        got = codec.decode_full(codec.encode(x, CodecContext(seed=seed)), schema)
        steps = got.steps()
        squares = squares + (got.tensors["w"] - exact).square()
        expected = expected + steps["w"].square() / 6
    assert set(steps) == {"w", "b"} and steps["w"].shape == (60, 90)
    assert float(squares.sum() / expected.sum()) == pytest.approx(1, abs=0.1)
    assert float(torch.corrcoef(torch.stack([squares.flatten(), expected.flatten()]))[0, 1]) > 0.5
    assert plain.decode_full(plain.encode(x), schema).steps() == {}


def test_steps_of_huge_factors_stay_finite():
    x = {"w": spectrum((40, 50), [1.0]) * 1e37}
    codec = Codec(LowRank(0.9), Quantize(2))
    steps = codec.decode_full(codec.encode(x), Schema.of(x)).steps()["w"]
    assert torch.isfinite(steps).all() and float(steps.max()) > 0


@pytest.mark.parametrize("stages", [(), (Quantize(8),)])
def test_downlink_of_truncated_differences(stages):
    """Sender and receiver hold the same bits, and what one round cut off comes with the next."""
    codec = Codec(LowRank(0.8), *stages)
    sender, receiver, state = DownlinkSender(codec), DownlinkReceiver(codec), {}
    w, errors = {"w": decaying(80, 120), "b": torch.ones(3)}, []
    for t in range(8):
        schema = Schema.of(w)
        reference = sender.prepare(w, schema, t, seed=t)
        d = sender.download(0)
        assert d.kind == ("full" if t == 0 else "difference")
        got = receiver.receive(d.kind, d.base, d.parts, schema, t, state)
        sender.confirm(0, received=True)
        assert all(torch.equal(got[n], reference[n]) for n in w)
        errors.append(float((got["w"] - w["w"]).norm()))
        if t < 3:
            w = {"w": w["w"] + 0.1 * decaying(80, 120, seed=10 + t), "b": w["b"] + 1}
    assert errors[0] == 0 and errors[7] < 0.25 * max(errors)


def test_inspect_shows_ranks():
    update = {
        "w": spectrum((40, 50), [3.0, 2.0]),
        "v": spectrum((40, 50), [3.0]),
        "z": torch.zeros(9, 9),
        "b": normal(40),
    }
    update["flat"] = torch.eye(30)
    payload = Codec(LowRank(0.95), Quantize(4)).encode(update)
    for schema in (None, Schema.of(update)):
        info = inspect(payload, schema)
        assert info.ranks == {2: 1, 1: 1, 0: 1, None: 1} and info.energy == 0.95
        assert "ranks    1.0 on average, 0 to 2 (of 3 matrices), whole: 1; energy 0.95" in str(info)
    lines = [re.split(r"  +", line.strip()) for line in str(info).splitlines()]
    assert ["tensor", "shape", "rank", "bits", "bytes", "of dense"] in lines
    assert [
        "w",
        "40x50",
        "2",
        "4",
        "106",
        "1.3%",
    ] in lines  # 80 and 100 values at 4 bits, two scales, two singular values
    assert ["z", "9x9", "0", "-", "0", "0.0%"] in lines and ["b", "40", "-", "4", "24", "15.0%"] in lines
    whole = Codec(LowRank(0.95)).encode({"flat": torch.eye(30)})
    assert "ranks    whole: 1; energy 0.95" in str(inspect(whole))
    assert "rank" not in str(inspect(Codec(Quantize(4)).encode(update), Schema.of(update)))


# ---- refusals ----


@pytest.mark.parametrize("energy", [0, 0.0, -0.1, 1.01, math.nan, math.inf, True, False, "0.9", [0.9], Linear(0.9, 1.1),
                                    Linear(0.0, 0.9), Exponential(0.9, 1.5), Constant(2.0)])  # fmt: skip
def test_it_refuses_other_energies(energy):
    with pytest.raises(ValueError, match="Expected `energy` to be above 0 and at most 1, but got"):
        LowRank(energy)


@pytest.mark.parametrize("name", ["max_rank", "min_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
def test_it_refuses_other_counts(name, value):
    with pytest.raises(ValueError, match=f"Expected `{name}` to be a positive integer, but got {value!r}"):
        LowRank(0.9, **{name: value})


@pytest.mark.parametrize("value", [1.2, 0.0, math.nan, "0.9", True])
def test_it_refuses_a_schedule_that_leaves_the_range(value):
    codec = Codec(ErrorFeedback(LowRank(lambda t, T=None: value if t == 2 else 0.9)))
    x = {"w": decaying(20, 30)}
    codec.encode(x, CodecContext(round=1))
    with pytest.raises(
        ValueError, match=re.escape(f"`energy` to be above 0 and at most 1 in round 2, but got {value!r}.")
    ):
        codec.encode(x, CodecContext(round=2))
    codec.check_rounds(2)
    with pytest.raises(ValueError, match="in round 2"):
        codec.check_rounds(3)


def test_a_schedule_that_needs_the_end_says_so():
    with pytest.raises(ValueError, match="Expected `T`, the number of rounds, for a linear schedule, but got None"):
        Codec(LowRank()).check_rounds(None)
    Codec(LowRank(0.9), TopK(Constant(0.5)), Quantize(4)).check_rounds(None)


def test_runs_are_their_own_inverse_and_canonical():
    ranks = [12, 12, 12, 3, None, None, 0, 0, 100, None]
    assert to_runs(ranks) == "12*3,3,-*2,0*2,100,-"
    assert from_runs(to_runs(ranks), 10) == ranks
    assert parse_runs("12*3,-") == [(12, 3), (None, 1)] and from_runs("", 0) == []
    for bad in (
        "12*2,12",
        "12*1",
        "12*0",
        "012",
        "+1",
        "1*03",
        " 1",
        "1\n",
        "1,",
        ",1",
        "1,,1",
        "-*",
        "*2",
        "9999999999",
        "--",
        "1*-",
    ):
        with pytest.raises(MalformedPayloadError):
            from_runs(bad, 1 if bad not in ("12*2,12", "1*03") else 3)


@settings(max_examples=200)
@given(st.lists(st.one_of(st.none(), st.integers(0, 10**9 - 1)), max_size=30))
def test_any_ranks_come_back(ranks):
    assert from_runs(to_runs(ranks), len(ranks)) == ranks


def test_a_rank_that_does_not_pay_is_refused_by_name():
    parts = parts_of(Schema.of({"w": torch.zeros(9, 7)}))
    assert [p.shape for p in LowRank().layout(parts, [0.5, "3"])] == [(3, 9), (3,), (3, 7)]
    with pytest.raises(MalformedPayloadError, match="Expected a rank of at most 3 for 'w', but got 4"):
        LowRank().layout(parts, [0.5, "4"])


def test_rounds_and_seeds_draw_other_bases(monkeypatch):
    seeds, real = [], ops.truncated_svd
    monkeypatch.setattr(ops, "truncated_svd", lambda *a, **k: seeds.append(k["seed"]) or real(*a, **k))
    for context in ({"seed": 0}, {"seed": 1}, {"seed": 0, "round": 1}, {"seed": 2**64 - 1}, {"seed": 0}):
        through(Codec(LowRank(0.9)), decaying(20, 30), **context)
    assert len(set(seeds)) == 4 and seeds[0] == seeds[4]


def test_its_wire_name_leads_back():
    assert isinstance(from_wire_name(LowRank(0.3, max_rank=4).wire_name), LowRank)
    assert from_wire_name("lowrank(3)") is None
    x = {"w": decaying(20, 30)}  # the energy, limits and seed are the sender's business
    payload = Codec(LowRank(0.8, max_rank=2)).encode(x)
    assert torch.equal(
        Codec(LowRank(1.0)).decode(payload, Schema.of(x))["w"], Codec(LowRank(0.8)).decode(payload, Schema.of(x))["w"]
    )


@pytest.mark.gpu
def test_cuda_tensors_are_factored_where_they_are():
    x = {"a": decaying(60, 80), "b": decaying(60, 80, seed=3), "z": torch.zeros(30, 30), "c": decaying(16, 8, 3, 3)}
    codec, schema, state = Codec(ErrorFeedback(LowRank(0.95), Quantize(8))), Schema.of(x), {}
    payload = codec.encode({n: t.cuda() for n, t in x.items()}, CodecContext(state=state))
    got = codec.decode_full(payload, schema)
    assert got.ranks == codec.decode_full(codec.encode(x), schema).ranks
    for n in x:
        torch.testing.assert_close(state["error_feedback"][n].cpu(), x[n] - got.tensors[n], rtol=0, atol=1e-5)
