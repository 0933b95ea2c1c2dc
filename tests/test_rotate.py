"""The stage `Rotate`: what it sends, what comes back, and its company with `Quantize`."""

from __future__ import annotations

import pytest
import torch
from test_fuzz_payload import reseal

from dynfed_lightning import ops
from dynfed_lightning.codec import Codec, CodecContext, Schema, inspect
from dynfed_lightning.errors import MalformedPayloadError, NonFiniteError
from dynfed_lightning.stages import ErrorFeedback, Quantize, Rotate, from_wire_name


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def update() -> dict[str, torch.Tensor]:
    return {"conv": normal(8, 4, 3, 3), "bias": normal(10), "steps": torch.arange(40), "half": normal(700).half()}


def relative_error(codec: Codec, x: torch.Tensor, seed: int = 0) -> float:
    got = codec.decode(codec.encode({"w": x}, CodecContext(seed=seed)), Schema.of({"w": x}))["w"]
    return float((got - x).square().sum() / x.square().sum())


def test_it_sends_what_the_operation_makes():
    tensors = update()
    payload = Codec(Rotate(64)).encode(tensors, CodecContext(seed=2**64 - 1))
    # "bias" is too small and "steps" no float; of the others the random signs begin at 0 and at 288.
    first = ops.rotate(tensors["conv"].reshape(-1), 64, 2**64 - 1)
    layout = ops.Layout([288, 700], 8)
    flat = ops.rotate(torch.cat([tensors["conv"].reshape(-1), tensors["half"].float()]), 64, 2**64 - 1, layout=layout)
    assert torch.equal(first, flat[:288])
    assert flat[:288].numpy().tobytes() in payload and flat[288:].numpy().tobytes() in payload
    assert tensors["bias"].numpy().tobytes() in payload and tensors["steps"].numpy().tobytes() in payload


def test_there_and_back():
    tensors, codec = update(), Codec(Rotate(256))
    decoded = codec.decode(codec.encode(tensors, CodecContext(seed=9)), Schema.of(tensors))
    assert torch.equal(decoded["bias"], tensors["bias"]) and torch.equal(decoded["steps"], tensors["steps"])
    assert float((decoded["conv"] - tensors["conv"]).abs().max()) < 2e-6
    assert decoded["half"].dtype == torch.float16 and float((decoded["half"] - tensors["half"]).abs().max()) < 2e-3
    for tensor in decoded.values():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_error_is_far_below_stochastic_roundings(bits):
    """Of a vector with outliers, as updates have them: what the stage is for."""
    x = normal(60_000) * normal(60_000, seed=1).abs().pow(3)
    eden = relative_error(Codec(Rotate(), Quantize(bits, rounding="eden")), x)
    assert eden < {1: 0.6, 2: 0.18, 3: 0.043, 4: 0.0122}[bits]
    assert eden < relative_error(Codec(Quantize(bits)), x) / (1.5 if bits == 1 else 4)


def test_the_mean_over_rounds_comes_to_the_vector():
    x = normal(2048) * 0.1 + 1.0  # far from centred: rounding without rotation is biased here
    codec, total = Codec(Rotate(), Quantize(2, rounding="eden")), torch.zeros(2048)
    for seed in range(300):
        total += codec.decode(codec.encode({"w": x}, CodecContext(seed=seed)), Schema.of({"w": x}))["w"] / 300
    assert float((total - x).square().sum() / x.square().sum()) < 1.3 * 0.176 / 300


def test_it_costs_a_seed_in_the_header_and_nothing_else():
    tensors = {"a": normal(300, 300), "b": normal(5000)}
    plain = Codec(Quantize(4, rounding="eden")).encode(tensors, CodecContext(seed=2**63))
    rotated = Codec(Rotate(), Quantize(4, rounding="eden")).encode(tensors, CodecContext(seed=2**63))
    assert 0 < len(rotated) - len(plain) <= 48
    info = inspect(rotated, Schema.of(tensors))
    assert info.chain == ("rotate(4096)", "quantize(512)")
    assert [row.bits for row in info.tensors] == [4, 4]


def test_steps_are_spread_over_the_block():
    x = torch.cat([torch.full((64,), 7.0), torch.full((64,), 70.0)])
    codec, schema = Codec(Rotate(64), Quantize(4, bucket=64, rounding="nearest")), Schema.of({"w": x})
    got = codec.decode_full(codec.encode({"w": x}, CodecContext(seed=1)), schema)
    steps = got.steps()["w"]
    assert steps.shape == x.shape
    assert steps[:64].unique().numel() == steps[64:].unique().numel() == 1
    assert float(steps[64] / steps[0]) > 5
    assert float((got.tensors["w"] - x)[:64].square().mean().sqrt()) < float(steps[0])
    odd = normal(100)
    odd_steps = codec.decode_full(codec.encode({"w": odd}), Schema.of({"w": odd})).steps()["w"]
    assert odd_steps.shape == (100,) and bool((odd_steps > 0).all())


def test_error_feedback_around_it_loses_nothing_over_time():
    x = normal(3000)
    codec, schema = Codec(ErrorFeedback(Codec(Rotate(), Quantize(1, rounding="eden")))), Schema.of({"w": x})
    ctx, total = CodecContext(), torch.zeros(3000)
    for k in range(60):
        ctx = CodecContext(seed=k, round=k, state=ctx.state)
        total += codec.decode(codec.encode({"w": x}, ctx), schema)["w"]
    assert float((total / 60 - x).norm() / x.norm()) < 0.05


def test_numbers_too_large_to_mix_are_refused() -> None:
    with pytest.raises(
        NonFiniteError, match="Expected 'w' to stay finite while it is encoded, but a value is too large"
    ):
        Codec(Rotate(64)).encode({"w": torch.full((64,), torch.finfo(torch.float32).max)})


@pytest.mark.parametrize("divisor", [1, 130, 200, 1e4, 7e5])
@pytest.mark.parametrize("n", [8192, 6000, 12345])
@pytest.mark.parametrize("block", [64, 256, 4096, 8192])
def test_hostile_numbers_decode_to_finite_ones(block: int, n: int, divisor: float) -> None:
    """Sealed payloads whose rotated values are so large that their sums would overflow."""
    large = torch.full((n,), torch.finfo(torch.float32).max / divisor)
    for dtype in (torch.float32, torch.float16):
        codec, x = Codec(Rotate(block)), {"w": normal(n).to(dtype)}
        payload = codec.encode(x)
        values = ops.rotate(x["w"], block).numpy().tobytes()
        for hostile in (large, -large, ops.rotate(normal(n), block).sign() * large):
            forged = reseal(payload.replace(values, hostile.numpy().tobytes()))
            assert forged != payload
            assert codec.decode(forged, Schema.of(x))["w"].isfinite().all()
    codec, x = Codec(Rotate(block), Quantize(1, rounding="eden")), {"w": normal(n)}
    payload = codec.encode(x)
    scales = ops.quantize_pack(ops.rotate(x["w"], block), 1, rounding="eden")[1]
    forged = reseal(payload.replace(scales.numpy().tobytes(), large[: scales.numel()].numpy().tobytes()))
    assert forged != payload and codec.decode(forged, Schema.of(x))["w"].isfinite().all()


def test_a_handful_of_values_that_carry_a_block_stay_biased() -> None:
    """What the docstring says of sparse vectors: one Hadamard transform spreads two values over four points only."""
    x = torch.zeros(4096)
    x[0], x[1] = 1.0, 0.5
    codec, total = Codec(Rotate(), Quantize(1, rounding="eden")), torch.zeros(4096)
    for seed in range(50):
        total += codec.decode(codec.encode({"w": x}, CodecContext(seed=seed)), Schema.of({"w": x}))["w"] / 50
    assert float(total[0]) == pytest.approx(1.25, abs=0.02) and abs(float(total[1])) < 0.02


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_steps_of_tiny_and_huge_updates(size: float) -> None:
    codec, x = Codec(Rotate(), Quantize(4, rounding="nearest")), {"w": normal(1000) * size}
    steps = codec.decode_full(codec.encode(x), Schema.of(x)).steps()["w"]
    assert bool((steps > 0.1 * size).all()) and bool((steps < size).all())


@pytest.mark.parametrize("block", [0, 3, 16384, -8, 8.0, True, "8"])
def test_it_refuses_other_blocks(block):
    with pytest.raises(ValueError, match="Expected `block` to be a power of two from 1 to 8192, but got"):
        Rotate(block)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "1", None, True])
def test_it_refuses_other_seeds(seed):
    with pytest.raises(MalformedPayloadError, match="Expected a seed of 64 bits, but got"):
        Rotate().layout((), seed)


def test_quantize_refuses_eden_with_huge_buckets():
    with pytest.raises(ValueError, match="`bucket` to be at most 65536 with rounding 'eden', but got 65544"):
        Quantize(4, bucket=65544, rounding="eden")


def test_its_wire_name_leads_back():
    stage = from_wire_name(Rotate(512).wire_name)
    assert isinstance(stage, Rotate) and stage.block == 512
    with pytest.raises(MalformedPayloadError, match="power of two"):
        from_wire_name("rotate(100)")
    assert from_wire_name("rotate") is None
