"""The codec as a whole: round trips, bytes, determinism, memory, and what it refuses."""

from __future__ import annotations

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynfed_lightning.bits import InstructedBits, PatternBits
from dynfed_lightning.codec import Codec, CodecContext, Schema, as_codec, inspect
from dynfed_lightning.errors import MalformedPayloadError, NonFiniteError, SchemaMismatchError
from dynfed_lightning.stages import Cast, ErrorFeedback, LowRank, Quantize, Rotate, TopK

CHAINS = {
    "identity": lambda: Codec(),
    "none": lambda: Codec(Quantize(None)),
    "q1": lambda: Codec(Quantize(1)),
    "q4": lambda: Codec(Quantize(4)),
    "q8n": lambda: Codec(Quantize(8, bucket=64, rounding="nearest")),
    "f16": lambda: Codec(Cast(torch.float16)),
    "bf16q": lambda: Codec(Cast(torch.bfloat16), Quantize(3)),
    "topk": lambda: Codec(TopK(0.1)),
    "topkq": lambda: Codec(TopK(k=5), Quantize(8)),
    "topkf16": lambda: Codec(TopK(0.2), Cast(torch.float16)),
    "ef": lambda: Codec(ErrorFeedback(Codec(TopK(0.1), Quantize(2)))),
    "rotate": lambda: Codec(Rotate(64)),
    "eden": lambda: Codec(Rotate(), Quantize(3, rounding="eden")),
    "efeden": lambda: Codec(ErrorFeedback(Codec(Rotate(256), Quantize(1, rounding="eden")))),
    "topkeden": lambda: Codec(TopK(0.5), Rotate(8), Quantize(2, rounding="eden")),
    "f16eden": lambda: Codec(Cast(torch.float16), Rotate(32), Quantize(4, rounding="eden")),
    "lowrank": lambda: Codec(LowRank(0.7)),
    "lowrankq": lambda: Codec(LowRank(0.7), Quantize(4)),
    "lowrankf16": lambda: Codec(LowRank(0.7), Cast(torch.float16)),
    "lowranktopk": lambda: Codec(LowRank(0.7), TopK(0.5), Quantize(8)),
    "lowrankeden": lambda: Codec(LowRank(0.7), Rotate(), Quantize(3, rounding="eden")),
    "eflowrank": lambda: Codec(ErrorFeedback(LowRank(0.7, max_rank=3), Quantize(4))),
    "nested": lambda: Codec(Codec(TopK(0.1)), Codec(Quantize(4))),
}
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
          torch.uint8, torch.bool]  # fmt: skip


def make(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x * 10).abs().to(dtype) if dtype == torch.uint8 else (x * 10).to(dtype)


def everything() -> dict[str, torch.Tensor]:
    shapes = [(), (0,), (1,), (3, 0, 2), (7,), (513,), (16, 9), (4, 3, 3, 3), (1100,)]
    return {f"{d}/{s}": make(s, d, i) for i, d in enumerate(DTYPES) for s in shapes}


def resnet_like(layers: int = 50, width: int = 24) -> dict[str, torch.Tensor]:
    """3 tensors a layer, as convolution and normalisation have them: 150 tensors, 0.26 M parameters."""
    g = torch.Generator().manual_seed(0)
    out = {}
    for i in range(layers):
        out[f"layer{i}.conv.weight"] = torch.randn(width, width, 3, 3, generator=g)
        out[f"layer{i}.bn.weight"] = torch.randn(width, generator=g)
        out[f"layer{i}.bn.bias"] = torch.randn(width, generator=g)
    return out


@pytest.mark.parametrize("name", CHAINS)
def test_every_chain_takes_every_dtype_and_shape(name):
    codec, update = CHAINS[name](), everything()
    schema = Schema.of(update, raw={"torch.float32/(513,)"})
    payload = codec.encode(update, CodecContext(seed=5), schema)
    assert type(payload) is bytes
    decoded = CHAINS[name]().decode(payload, schema)
    assert list(decoded) == list(update)
    for n, t in update.items():
        out = decoded[n]
        assert (out.shape, out.dtype, out.device.type) == (t.shape, t.dtype, "cpu")
        if codec.lossless or not t.is_floating_point() or schema[n].raw:
            assert torch.equal(out, t)
        elif t.numel():
            assert torch.isfinite(out).all()
            # Nothing is further off than its tensor's largest value (dropping or rounding it away altogether); an unbiased
            # estimate from a few bits of what was rotated is not bounded value by value, but it does not get far.
            factor = 4 if "eden" in name else 1.01
            assert float((out.double() - t.double()).abs().max()) <= float(t.abs().max()) * factor
    assert codec.lossless == (name in ("identity", "none"))


@pytest.mark.parametrize("name", CHAINS)
def test_same_input_same_bytes(name):
    update = resnet_like(3)
    first = CHAINS[name]().encode(update, CodecContext(seed=11))
    assert CHAINS[name]().encode({n: t.clone() for n, t in update.items()}, CodecContext(seed=11)) == first
    if name in ("q4", "bf16q", "rotate", "eden"):
        assert CHAINS[name]().encode(update, CodecContext(seed=12)) != first


@pytest.mark.parametrize("name", CHAINS)
def test_strided_tensors_encode_as_their_copies(name):
    base = make((40, 60), torch.float32, 0)
    views = {"t": base.t(), "s": base[::2, 1::3], "e": base[0, :1].expand(30), "p": torch.nn.Parameter(base[3])}
    copies = {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in views.items()}
    assert CHAINS[name]().encode(views) == CHAINS[name]().encode(copies)


def test_identity_keeps_every_bit():
    bits = torch.tensor([0, 1, -(2**31), -(2**31) + 1, 0x7F7FFFFF, 0x00800000], dtype=torch.int32)
    x = {"w": bits.view(torch.float32)}
    for codec in (Codec(), Codec(Quantize(None)), Codec(Quantize(PatternBits({}, None)))):
        out = codec.decode(codec.encode(x), Schema.of(x))["w"]
        assert torch.equal(out.view(torch.int32), bits)


def test_nothing_is_a_table_too():
    for name in CHAINS:
        payload = CHAINS[name]().encode({})
        assert CHAINS[name]().decode(payload, Schema()) == {}
        assert len(payload) < 200


@settings(max_examples=60)
@given(
    shapes=st.lists(st.lists(st.integers(0, 20), max_size=3), max_size=6),
    bits=st.lists(st.sampled_from([None, 1, 2, 3, 4, 5, 6, 7, 8]), min_size=6, max_size=6),
    bucket=st.sampled_from([8, 16, 64, 512]),
    seed=st.integers(0, 2**64 - 1),
)
def test_any_table_comes_back(shapes, bits, bucket, seed):
    update = {str(i): make(tuple(s), torch.float32, i) for i, s in enumerate(shapes)}
    codec = Codec(Quantize(lambda spec, ctx: bits[int(spec.name)], bucket=bucket))
    schema = Schema.of(update)
    payload = codec.encode(update, CodecContext(seed=seed))
    got = codec.decode_full(payload, schema)
    steps = got.steps()
    for n, t in update.items():
        size = math.ceil(t.numel() * (bits[int(n)] or 0) / 8) + 4 * math.ceil(t.numel() / bucket)
        quantised = bits[int(n)] is not None and size < 4 * t.numel()
        assert got.bits[n] == (bits[int(n)] if quantised else None)
        assert (n in steps) == quantised
        if not quantised:
            assert torch.equal(got.tensors[n], t)
        elif bits[int(n)] > 1:
            assert bool(((got.tensors[n] - t).abs() <= steps[n] * 1.0001).all())
    rows = inspect(payload, schema).tensors
    assert rows is not None
    assert sum(r.num_bytes for r in rows) + inspect(payload).header_bytes == len(payload)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_the_length_is_codes_scales_and_a_little(bits):
    """At most 3 % + 1 KiB above codes and scales, for any model of more than 10,000 parameters."""
    tables = {
        "resnet": resnet_like(),
        "tiny": {"w": make((101, 100), torch.float32, 0)},
        "many": {f"{i}": make((34,), torch.float32, i) for i in range(300)},
        "wide": {f"{i}": make((1000, 30), torch.float32, i) for i in range(40)},
    }
    for update in tables.values():
        assert sum(t.numel() for t in update.values()) > 10_000
        budget = sum(math.ceil(t.numel() * bits / 8) + 4 * math.ceil(t.numel() / 512) for t in update.values())
        payload = Codec(Quantize(bits)).encode(update)
        assert budget < len(payload) <= budget + 400 <= budget * 1.03 + 1024


def test_mixed_bits_stay_within_the_overhead_too():
    update = resnet_like()
    widths = {n: 1 + (7 * i + i // 3) % 8 for i, n in enumerate(update)}  # no two neighbours alike
    codec = Codec(Quantize(PatternBits(widths, default=None)))
    payload = codec.encode(update)
    budget = sum(math.ceil(t.numel() * widths[n] / 8) + 4 * math.ceil(t.numel() / 512) for n, t in update.items())
    assert budget < len(payload) <= budget + 600
    assert codec.decode_full(payload, Schema.of(update)).bits == widths


def test_decoded_tensors_own_their_memory():
    update = {**resnet_like(2), "n": torch.arange(5), "s": torch.tensor(2.0)}
    schema = Schema.of(update, raw={"layer0.bn.weight"})
    for chain in CHAINS.values():
        payload = chain().encode(update, schema=schema)
        before = bytes(bytearray(payload))
        decoded = chain().decode(payload, schema)
        storages = {t.untyped_storage().data_ptr() for t in decoded.values()}
        assert len(storages) == len(decoded)
        for t in decoded.values():
            assert t.untyped_storage().nbytes() == t.numel() * t.element_size()
            t.zero_()
        assert payload == before


def test_the_chain_is_unbiased():
    x = {"w": make((2000,), torch.float32, 0), "b": make((20,), torch.float32, 1)}
    codec, schema, n = Codec(Cast(torch.bfloat16), Quantize(3)), Schema.of(x), 300
    mean = {k: torch.zeros(t.shape, dtype=torch.float64) for k, t in x.items()}
    for seed in range(n):
        got = codec.decode_full(codec.encode(x, CodecContext(seed=seed)), schema)
        for k in mean:
            mean[k] += (got.tensors[k].double() - x[k].bfloat16().double()) / got.steps()[k].double() / n
    for t in mean.values():
        assert abs(float(t.mean())) < 5 * 0.5 / math.sqrt(n * t.numel())


def test_instructed_bits_reach_the_payload():
    update, codec = resnet_like(2), Codec(Quantize(InstructedBits()))
    lengths = []
    for bits in (2, 4, 8):
        payload = codec.encode(update, CodecContext(scalars={"bits": float(bits)}))
        lengths.append(len(payload))
        assert set(codec.decode_full(payload, Schema.of(update)).bits.values()) == {bits}
        assert inspect(payload).bits == {bits: 6}
    assert lengths == sorted(set(lengths))
    with pytest.raises(ValueError, match="instruct `bits`"):
        codec.encode(update)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_tensors_are_named(name, bad):
    update = {**resnet_like(2), "culprit": make((900,), torch.float32, 0)}
    update["culprit"][345] = bad
    with pytest.raises(NonFiniteError, match="'culprit' to hold finite numbers only"):
        CHAINS[name]().encode(update)


def test_raw_tensors_must_be_finite_too():
    update = {"w": torch.ones(100), "var": torch.tensor([math.inf])}
    with pytest.raises(NonFiniteError, match="'var'"):
        Codec(Quantize(4)).encode(update, schema=Schema.of(update, raw={"var"}))


def test_foreign_payloads_are_refused_in_words():
    update = resnet_like(1)
    schema, payload = Schema.of(update), Codec(Quantize(4)).encode(update)
    with pytest.raises(SchemaMismatchError, match=r"for schema [0-9a-f]{16} \(2 tensors\)"):
        Codec(Quantize(4)).decode(payload, Schema(schema.specs[:2]))
    for other in (Codec(), Codec(Quantize(4, bucket=64)), Codec(TopK(0.1), Quantize(4))):
        with pytest.raises(MalformedPayloadError, match="of the chain"):
            other.decode(payload, schema)
    # Bits, policy and rounding are the sender's business.
    assert Codec(Quantize(8, rounding="nearest")).decode(payload, schema).keys() == update.keys()


def test_inspect_reads_a_payload_alone_and_with_its_schema():
    update = {**resnet_like(2), "n": torch.tensor(3)}
    schema = Schema.of(update, raw={"layer1.bn.bias"})
    codec = Codec(ErrorFeedback(TopK(0.1), Quantize(PatternBits({"*.conv.*": 2}, 8))))
    payload = codec.encode(update, schema=schema)
    info = inspect(payload)
    assert info.num_bytes == len(payload) == info.header_bytes + sum(size for _, _, size in info.arenas.values())
    assert info.chain == ("topk", "quantize(512)")
    assert info.bits == {2: 2, 8: 3}
    assert info.tensors is None
    assert set(info.arenas) == {"codes", "scales", "indices", "raw.F32", "raw.I64"}
    text = str(inspect(payload, schema))
    assert "topk | quantize(512)" in text
    assert f"payload  {len(payload):,} bytes" in text
    # 518 of 5,184 values: 2 bits each, 2 scales, 4 bytes of index each.
    row = next(r for r in inspect(payload, schema).tensors or [] if r.name == "layer0.conv.weight")
    assert (row.bits, row.num_bytes, row.dense_bytes) == (2, 130 + 8 + 2072, 20736)
    with pytest.raises(SchemaMismatchError):
        inspect(payload, Schema())


def test_codecs_are_made_of_stages():
    codec = Codec(Quantize(4))
    assert as_codec(codec) is codec
    assert as_codec(None).stages == ()
    assert [type(s) for s in as_codec(TopK(0.1)).stages] == [TopK]
    assert [type(s) for s in Codec(Codec(TopK(0.1)), Quantize(4)).stages] == [TopK, Quantize]
    assert repr(CHAINS["topkq"]()) == "Codec(topk|quantize(512))"
    with pytest.raises(TypeError, match="got 4"):
        Codec(4)
    x, wrapped = {"w": make((40, 50), torch.float32, 0)}, Codec(ErrorFeedback(TopK(0.1), Quantize(4)))
    for codec in (
        Codec(ErrorFeedback(), TopK(0.1), Quantize(4)),
        Codec(Codec(ErrorFeedback()), Codec(TopK(0.1), Quantize(4))),
    ):
        ctx = CodecContext()
        assert codec.encode(x, ctx) == wrapped.encode(x) and set(ctx.state) == {"error_feedback"}
    with pytest.raises(ValueError, match="without error feedback of their own"):
        Codec(ErrorFeedback(), ErrorFeedback(), Quantize(4))
    assert Codec(ErrorFeedback()).lossless and Codec(ErrorFeedback()).encode(x) == Codec().encode(x)


def test_a_context_is_only_read_but_for_its_state():
    ctx = CodecContext(seed=1, round=2, num_rounds=3, scalars={"bits": 4})
    Codec(Quantize(InstructedBits())).encode(resnet_like(1), ctx)
    assert ctx == CodecContext(seed=1, round=2, num_rounds=3, scalars={"bits": 4})
    Codec(ErrorFeedback(Quantize(InstructedBits()))).encode(resnet_like(1), ctx)
    assert set(ctx.state) == {"error_feedback"}


def test_a_million_parameters_are_a_matter_of_milliseconds_outside_the_kernels(monkeypatch):
    """Generous for a busy machine; a Python loop over elements would take seconds."""
    update = resnet_like(50, 47)
    schema, codec = Schema.of(update), Codec(Quantize(4))
    from dynfed_lightning import ops

    def quantize(x, bits, bucket, seed, offset, rounding):
        return torch.zeros((x.numel() * bits + 7) // 8, dtype=torch.uint8), torch.ones(-(-x.numel() // bucket))

    monkeypatch.setattr(ops, "quantize_pack", quantize)
    monkeypatch.setattr(ops, "unpack_dequantize", lambda codes, scales, bits, bucket, n: torch.empty(n))
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        codec.decode(codec.encode(update, schema=schema), schema)
        best = min(best, time.perf_counter() - start)
    assert best < 0.05


@pytest.mark.gpu
def test_cuda_tensors_give_the_same_bytes():
    update = everything()
    for name, chain in CHAINS.items():
        payload = chain().encode({n: t.cuda() for n, t in update.items()}, CodecContext(seed=9))
        assert payload == chain().encode(update, CodecContext(seed=9)), name
