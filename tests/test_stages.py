"""Each stage by itself: what it sends, what comes back, and its refusals."""

from __future__ import annotations

import io
import math

import pytest
import torch
from test_fuzz_payload import reseal

from dynfed_lightning import ops
from dynfed_lightning.codec import Codec, CodecContext, Schema, inspect
from dynfed_lightning.errors import NonFiniteError
from dynfed_lightning.schedules import Linear
from dynfed_lightning.stages import Cast, ErrorFeedback, Quantize, Stage, TopK, from_wire_name
from dynfed_lightning.stages.quantize import from_runs, parse_runs, to_runs


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def through(codec: Codec, tensor: torch.Tensor, ctx: CodecContext | None = None) -> torch.Tensor:
    return codec.decode(codec.encode({"w": tensor}, ctx), Schema.of({"w": tensor}))["w"]


# ---- Quantize ----


@pytest.mark.parametrize("bits", range(1, 9))
def test_quantize_sends_what_the_kernel_makes(bits):
    update = {"a": normal(5, 7), "b": normal(1100), "c": normal(16)}
    payload = Codec(Quantize(bits, bucket=64)).encode(update, CodecContext(seed=2**64 - 1))
    # Offsets: 0; 35 rounded up to 40; 40 + 1100 = 1140 rounded up to 1144.
    parts = [ops.quantize_pack(t, bits, 64, 2**64 - 1, o) for t, o in zip(update.values(), (0, 40, 1144), strict=True)]
    codes = b"".join(p.numpy().tobytes() for p, _ in parts)
    scales = b"".join(s.numpy().tobytes() for _, s in parts)
    assert payload.endswith(scales + codes)
    decoded = Codec(Quantize(None, bucket=64)).decode(payload, Schema.of(update))
    for (name, t), (p, s) in zip(update.items(), parts, strict=True):
        assert torch.equal(decoded[name].reshape(-1), ops.unpack_dequantize(p, s, bits, 64, t.numel()))


def test_quantize_by_hand():
    # 3 bits, L = 3, scale 3/3 = 1: every value is a level.
    x = torch.tensor([3.0, -3.0, 2.0, -1.0, 0.0, 1.0, -2.0, 3.0])
    assert through(Codec(Quantize(3)), x).tolist() == x.tolist()
    nearest = Codec(Quantize(3, rounding="nearest"))
    assert through(nearest, torch.tensor([3.0, 0.4, 0.6, -0.4, -0.6, 2.4, 1.6, 0.0])).tolist() == [
        3.0, 0.0, 1.0, 0.0, -1.0, 2.0, 2.0, 0.0,
    ]  # fmt: skip


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantize_errs_by_less_than_a_step_and_not_on_average(bits):
    x = normal(4096)
    codec, schema = Codec(Quantize(bits)), Schema.of({"w": x})
    total = torch.zeros_like(x)
    for seed in range(200):
        got = codec.decode_full(codec.encode({"w": x}, CodecContext(seed=seed)), schema)
        steps = got.steps()["w"]
        error = (got.tensors["w"] - x) / steps
        assert error.abs().max() <= 1.0 + 1e-4
        total += error
    # Mean of 200 errors, each uniform-ish with variance at most 1/4: 5 sigma over 4096 * 200 draws.
    assert abs(float(total.mean()) / 200) < 5 * 0.5 / math.sqrt(4096 * 200)
    assert float((total / 200).abs().max()) < 6 * 0.5 / math.sqrt(200)


def test_quantize_starts_buckets_anew_at_each_tensor():
    update = {"big": torch.full((20,), 1000.0), "small": torch.full((20,), 1e-3)}
    codec = Codec(Quantize(4))
    decoded = codec.decode(codec.encode(update), Schema.of(update))
    assert decoded["small"] == pytest.approx(update["small"], rel=1e-6)
    info = inspect(codec.encode(update))
    assert info.arenas["scales"][1] == 2
    assert info.arenas["codes"][1] == 20


@pytest.mark.parametrize(
    ("numel", "bits", "raw"),
    [(0, 4, True), (1, 1, True), (2, 8, False), (1, 8, True), (3, 8, False)],
)
def test_quantize_leaves_tensors_that_would_not_shrink(numel, bits, raw):
    # 1 element: 4 bytes of scale and 1 of code against 4. 2 elements at 8 bits: 6 bytes against 8.
    update = {"w": normal(numel)}
    got = Codec(Quantize(bits)).decode_full(Codec(Quantize(bits)).encode(update), Schema.of(update))
    assert got.bits == {"w": None if raw else bits}
    assert not raw or torch.equal(got.tensors["w"], update["w"])


def test_quantize_leaves_half_precision_that_would_not_shrink():
    update = {"two": normal(2).bfloat16(), "seven": normal(7).bfloat16()}  # 6 against 4 bytes; 11 against 14
    codec = Codec(Quantize(8))
    assert codec.decode_full(codec.encode(update), Schema.of(update)).bits == {"two": None, "seven": 8}


def test_quantize_steps_are_the_scales():
    x = torch.cat([torch.full((8,), 7.0), torch.full((4,), 14.0)])
    codec, schema = Codec(Quantize(4, bucket=8)), Schema.of({"w": x})
    steps = codec.decode_full(codec.encode({"w": x}), schema).steps()["w"]
    assert steps.tolist() == pytest.approx([1.0] * 8 + [2.0] * 4, rel=1e-6)
    one = Codec(Quantize(1, bucket=8))
    assert one.decode_full(one.encode({"w": x}), schema).steps()["w"].tolist() == pytest.approx([14.0] * 8 + [28.0] * 4)


def test_quantize_saturates_at_the_ends_of_the_range():
    top = torch.finfo(torch.float32).max
    assert through(Codec(Quantize(8)), torch.tensor([top, -top] * 8)).tolist() == pytest.approx(
        [top, -top] * 8, rel=1e-6
    )
    half = torch.tensor([65504.0, -65504.0] * 8, dtype=torch.float16)
    assert torch.equal(through(Codec(Quantize(8)), half), half)


def test_the_lowest_code_that_no_encoder_writes_saturates_too():
    """Level -8 of 4 bits, which only EDEN's rounding uses, times the largest scale is beyond float32."""
    x = {"w": torch.full((16,), torch.finfo(torch.float32).max)}
    codec = Codec(Quantize(4))
    payload = codec.encode(x)
    codes = ops.quantize_pack(x["w"], 4)[0].numpy().tobytes()
    assert payload.endswith(codes)
    decoded = codec.decode(reseal(payload[: -len(codes)] + bytes(len(codes))), Schema.of(x))["w"]
    assert torch.equal(decoded, -x["w"])


def test_quantize_policies_see_the_tensors_own_names():
    seen = []

    def policy(spec, ctx):
        seen.append((spec.name, spec.shape))
        return 8

    update = {"w": normal(1000), "i": torch.arange(3), "s": normal(30)}
    schema = Schema.of(update, raw={"s"})
    payload = Codec(TopK(0.1), Quantize(policy)).encode(update, schema=schema)
    assert seen == [("w", (100,))]
    assert Codec(TopK(0.1), Quantize(None)).decode_full(payload, schema).bits == {"w": 8, "i": None, "s": None}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"bits": 0}, "`bits` to be an integer from 1 to 8, but got 0"),
        ({"bits": 9}, "`bits` to be an integer from 1 to 8, but got 9"),
        ({"bits": 4, "bucket": 0}, "`bucket`"),
        ({"bits": 4, "bucket": 12}, "`bucket` to be a positive multiple of 8, but got 12"),
        ({"bits": 4, "bucket": 8.0}, "`bucket`"),
        ({"bits": 4, "rounding": "up"}, "`rounding` to be one of nearest, stochastic, eden, but got 'up'"),
    ],
)
def test_quantize_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Quantize(**kwargs)


def test_quantize_refuses_a_policy_that_is_out_of_range():
    with pytest.raises(ValueError, match="`bits of w` to be an integer from 1 to 8, but got 9"):
        Codec(Quantize(lambda spec, ctx: 9)).encode({"w": normal(100)})


def test_runs_are_their_own_inverse_and_canonical():
    widths = [4] * 120 + [8, 8, 8, None, 1, 2, 1, 2] + [None] * 12
    text = to_runs(widths)
    assert text == "d120h3-abab-12"
    assert from_runs(text, len(widths)) == widths
    assert from_runs(to_runs([]), 0) == []
    assert parse_runs("d120h") == [(4, 120), (8, 1)]
    for bad in ("dd", "d1", "d0", "d02", "i", "D", " d2", "d2\n", "d999999999", "2", None, 4, ["d2"]):
        with pytest.raises(ValueError):
            from_runs(bad, 2 if bad != "d1" else 1)


# ---- Cast ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cast_rounds_wide_floats_only(dtype):
    update = {"f": normal(9), "d": normal(9).double(), "b": normal(9).bfloat16(), "i": torch.arange(9), "r": normal(9)}
    schema, codec = Schema.of(update, raw={"r"}), Codec(Cast(dtype))
    decoded = codec.decode(codec.encode(update, schema=schema), schema)
    for name, t in update.items():
        expected = t.to(dtype).to(t.dtype) if name in "fd" else t
        assert decoded[name].dtype == t.dtype
        assert torch.equal(decoded[name], expected)


def test_cast_refuses_what_does_not_fit():
    with pytest.raises(NonFiniteError, match=r"'w' to stay finite in the conversion to torch.float16"):
        Codec(Cast(torch.float16)).encode({"ok": normal(3), "w": torch.tensor([1e6])})
    with pytest.raises(ValueError, match=r"got torch.float32"):
        Cast(torch.float32)


# ---- TopK ----


def test_topk_keeps_the_largest_and_breaks_ties_by_index():
    x = torch.tensor([0.1, -3.0, 2.0, -2.0, 0.0, 2.0] + [0.0] * 14)
    assert through(Codec(TopK(k=3)), x).tolist() == [0.0, -3.0, 2.0, -2.0] + [0.0] * 16
    assert through(Codec(TopK(0.1)), x).nonzero().flatten().tolist() == [1, 2]
    zeros = torch.zeros(40)
    assert torch.equal(through(Codec(TopK(0.1)), zeros), zeros)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_topk_matches_torch_on_every_dtype(dtype):
    x = normal(33, 31).to(dtype)
    out = through(Codec(TopK(0.05)), x)
    k = round(0.05 * x.numel())
    assert int((out != 0).sum()) == k
    kept = out[out != 0].abs().double().sort().values
    assert torch.equal(kept, x.abs().flatten().topk(k).values.double().sort().values)
    assert torch.equal(out[out != 0], x[out != 0])


def test_topk_sends_small_tensors_whole():
    update = {"w": normal(8), "one": normal(1), "none": normal(0)}
    codec = Codec(TopK(k=4))  # 4 values and 4 indices are as long as 8 values
    decoded = codec.decode(codec.encode(update), Schema.of(update))
    assert all(torch.equal(decoded[n], t) for n, t in update.items())
    assert "indices" not in inspect(codec.encode(update)).arenas


def test_topk_takes_a_schedule():
    codec = Codec(TopK(Linear(0.1, 0.02)))
    x = normal(1000)
    counts = [int((through(codec, x, CodecContext(round=t, num_rounds=5)) != 0).sum()) for t in (0, 2, 4)]
    assert counts == [100, 60, 20]
    with pytest.raises(ValueError, match=r"in round 0, but got 0\.0"):
        Codec(TopK(lambda t, T: 0.0)).encode({"w": x})


def test_topk_carries_the_steps_of_its_values():
    x = normal(1000)
    codec = Codec(TopK(0.02), Quantize(4))
    got = codec.decode_full(codec.encode({"w": x}), Schema.of({"w": x}))
    steps = got.steps()["w"]
    assert steps.shape == x.shape
    assert int((steps > 0).sum()) == 20
    assert float(steps.max()) == pytest.approx(float(x.abs().max()) / 7, rel=1e-6)


@pytest.mark.parametrize("kwargs", [{}, {"fraction": 0.1, "k": 5}, {"fraction": 0.0}, {"fraction": 1.5}, {"fraction": True},
                                    {"fraction": math.nan}, {"k": 0}, {"k": 2.0}, {"k": True}])  # fmt: skip
def test_topk_refuses(kwargs):
    with pytest.raises(ValueError, match="Expected"):
        TopK(**kwargs)


# ---- ErrorFeedback ----


@pytest.mark.parametrize("inside", [(Quantize(2),), (Quantize(1),), (TopK(0.05), Quantize(8)), (Cast(torch.bfloat16),)])
def test_error_feedback_loses_nothing_over_time(inside):
    codec = Codec(ErrorFeedback(*inside))
    state: dict = {}
    schema = Schema.of({"w": normal(700), "b": normal(10)})
    sent = {n: torch.zeros(schema[n].shape, dtype=torch.float64) for n in schema.names}
    got = {n: torch.zeros_like(t) for n, t in sent.items()}
    for t in range(30):
        update = {"w": normal(700, seed=t), "b": normal(10, seed=1000 + t)}
        payload = codec.encode(update, CodecContext(seed=t, round=t, state=state), schema)
        decoded = codec.decode(payload, schema)
        for n in sent:
            sent[n] += update[n].double()
            got[n] += decoded[n].double()
    residual = state["error_feedback"]
    for n in sent:
        assert torch.allclose(got[n], sent[n] - residual[n].double(), rtol=0, atol=2e-4)
        # The memory is needed: without it the identity does not hold.
        assert n == "b" or not torch.allclose(got[n], sent[n], rtol=0, atol=2e-4)


def test_error_feedback_by_hand():
    codec, state = Codec(ErrorFeedback(TopK(k=1))), {}
    schema = Schema.of({"w": torch.zeros(4)})
    outs = []
    for x in ([3.0, 2.0, 0.0, 0.0], [0.0, 2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]):
        outs.append(codec.decode(codec.encode({"w": torch.tensor(x)}, CodecContext(state=state)), schema)["w"].tolist())
    assert outs == [[3.0, 0, 0, 0], [0, 4.0, 0, 0], [0, 0, 1.0, 0]]
    assert state["error_feedback"]["w"].tolist() == [0.0] * 4


def test_error_feedback_keeps_half_precision_residuals_in_float32():
    x = {"w": normal(700).bfloat16(), "d": normal(700).double(), "i": torch.arange(3)}
    state: dict = {}
    Codec(ErrorFeedback(Quantize(4))).encode(x, CodecContext(state=state))
    assert {n: t.dtype for n, t in state["error_feedback"].items()} == {"w": torch.float32, "d": torch.float64}


def test_error_feedback_travels_as_its_chain():
    x = {"w": normal(700)}
    plain = Codec(TopK(0.1), Quantize(4))
    for wrapped in (Codec(ErrorFeedback(plain)), Codec(ErrorFeedback(TopK(0.1), Quantize(4)))):
        payload = wrapped.encode(x, CodecContext(seed=3))
        assert payload == plain.encode(x, CodecContext(seed=3))
        assert torch.equal(plain.decode(payload, Schema.of(x))["w"], wrapped.decode(payload, Schema.of(x))["w"])


def test_error_feedback_is_kept_only_if_encoding_succeeded():
    codec, state = Codec(ErrorFeedback(Quantize(2))), {"other": 1}
    codec.encode({"w": normal(700)}, CodecContext(state=state))
    kept = state["error_feedback"]["w"].clone()
    with pytest.raises(NonFiniteError):
        codec.encode({"w": torch.full((700,), math.nan)}, CodecContext(state=state))
    assert torch.equal(state["error_feedback"]["w"], kept)
    assert state["other"] == 1


def test_error_feedback_resumes_from_a_checkpoint_to_the_bit():
    codec = Codec(ErrorFeedback(TopK(0.05), Quantize(3)))
    straight: dict = {}
    payloads = [codec.encode({"w": normal(900, seed=t)}, CodecContext(seed=t, state=straight)) for t in range(4)]
    resumed: dict = {}
    for t in range(2):
        codec.encode({"w": normal(900, seed=t)}, CodecContext(seed=t, state=resumed))
    file = io.BytesIO()
    torch.save(resumed, file)
    file.seek(0)
    resumed = torch.load(file, weights_only=True)
    again = [codec.encode({"w": normal(900, seed=t)}, CodecContext(seed=t, state=resumed)) for t in (2, 3)]
    assert again == payloads[2:]


def test_error_feedback_around_nothing_is_lossless():
    x = torch.tensor([-0.0, 1.0, 1e-40])
    codec, state = Codec(ErrorFeedback(Quantize(None))), {}
    assert codec.lossless
    out = through(codec, x, CodecContext(state=state))
    assert torch.equal(out.view(torch.int32), x.view(torch.int32))
    assert state == {}


def test_error_feedback_refuses():
    with pytest.raises(ValueError, match="error feedback of their own"):
        ErrorFeedback(ErrorFeedback(Quantize(2)))
    with pytest.raises(ValueError, match="to be the first stage"):
        Codec(Cast(torch.float16), ErrorFeedback(Quantize(2)))
    state = {"error_feedback": {"w": torch.zeros(5)}}
    with pytest.raises(ValueError, match=r"residual of 'w' .* shape \(700,\), but got \(5,\)"):
        Codec(ErrorFeedback(Quantize(2))).encode({"w": normal(700)}, CodecContext(state=state))


# ---- all ----


@pytest.mark.parametrize("stage", [Quantize(4, bucket=64), Cast(torch.float16), Cast(torch.bfloat16), TopK(0.1)])
def test_wire_names_lead_back_to_the_stage(stage):
    again = from_wire_name(stage.wire_name)
    assert type(again) is type(stage)
    assert again.wire_name == stage.wire_name


@pytest.mark.parametrize("name", ["", "lowrank(3)", "quantize", "quantize()", "cast(int8)", "topk()x", "quantize(-8)"])
def test_other_wire_names_lead_nowhere(name):
    assert from_wire_name(name) is None


@pytest.mark.parametrize("name", ["quantize(12)", "quantize(9999999999)"])
def test_impossible_wire_names_are_refused(name):
    with pytest.raises(ValueError, match="`bucket`"):
        from_wire_name(name)


def test_a_stage_says_what_it_lacks():
    with pytest.raises(TypeError, match="Half does not define `wire_name`"):

        class Half(Stage):
            pass

        Codec(Half())
