"""Payloads from an enemy: a `PayloadError` or sound tensors, never a large allocation.

Most damage is *resealed*, i.e. given a valid checksum, so that the validators behind it are reached."""

from __future__ import annotations

import json
import random
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynfed_lightning import wire
from dynfed_lightning.codec import Codec, CodecContext, Schema, inspect
from dynfed_lightning.errors import (
    ChecksumError,
    MalformedPayloadError,
    NonFiniteError,
    PayloadError,
    SchemaMismatchError,
    TruncatedPayloadError,
)
from dynfed_lightning.stages import Cast, LowRank, Quantize, Rotate, TopK


def table() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(9, 7, generator=g),
        "b": torch.randn(5, generator=g),
        "mean": torch.randn(3, generator=g),
        "h": torch.randn(11, generator=g).bfloat16(),
        "n": torch.tensor(3),
        "flag": torch.tensor([True, False]),
    }


SCHEMA = Schema.of(table(), raw={"mean"})
CODECS = {
    "quantize": Codec(Quantize(3, bucket=16)),
    "topk": Codec(TopK(0.2), Quantize(4)),
    "rotate": Codec(Rotate(64), Quantize(3, rounding="eden")),
    "cast": Codec(Cast(torch.float16)),
    "lowrank": Codec(LowRank(0.75)),
    "lowrankq": Codec(LowRank(0.75), Quantize(3, bucket=16)),
    "identity": Codec(),
}
PAYLOADS = {name: codec.encode(table(), CodecContext(seed=1), SCHEMA) for name, codec in CODECS.items()}


def reseal(payload: bytes) -> bytes:
    """`payload` with the checksum that its bytes call for."""
    zeroed = payload[: wire._CRC.start] + b"0" * 8 + payload[wire._CRC.stop :]
    return zeroed[: wire._CRC.start] + b"%08x" % zlib.crc32(zeroed) + zeroed[wire._CRC.stop :]


def split(payload: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data."""
    size = int.from_bytes(payload[:8], "little")
    return json.loads(payload[8 : 8 + size]), payload[8 + size :]


def join(header: dict[str, Any] | bytes, data: bytes) -> bytes:
    """A sealed payload, in the canonical spacing unless the header is given as bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return reseal(struct.pack("<Q", len(text)) + text + data)


def forged(name: str, edit: Callable[[dict[str, Any]], Any]) -> bytes:
    """A payload whose header was edited in place."""
    header, data = split(PAYLOADS[name])
    edit(header)
    return join(header, data)


def sound_or_refused(name: str, payload: bytes) -> bool:
    """Whether it decoded, and then into what the schema says. Anything but a `PayloadError` fails the test."""
    try:
        decoded = CODECS[name].decode(payload, SCHEMA)
    except PayloadError as error:
        assert str(error)
        return False
    for spec in SCHEMA:
        tensor = decoded[spec.name]
        assert (tensor.shape, tensor.dtype) == (spec.shape, spec.dtype)
        assert not spec.dtype.is_floating_point or torch.isfinite(tensor).all()
    return True


def refused(payload: bytes, kind: type[PayloadError], match: str | None = None, name: str = "quantize") -> None:
    with pytest.raises(kind, match=match) as error:
        CODECS[name].decode(payload, SCHEMA)
    assert type(error.value) is kind


def test_the_tools_of_this_file_do_what_they_say():
    assert all(join(*split(p)) == p and sound_or_refused(name, p) for name, p in PAYLOADS.items())


@pytest.mark.parametrize("name", CODECS)
def test_every_truncation_is_found(name):
    payload = PAYLOADS[name]
    for size in range(len(payload)):
        with pytest.raises(TruncatedPayloadError):
            CODECS[name].decode(payload[:size], SCHEMA)
        if size >= wire._CRC.stop:
            assert not sound_or_refused(name, reseal(payload[:size]))
    for tail in (b"\0", b"\0" * 8, payload):
        refused(payload + tail, TruncatedPayloadError, name=name)
        refused(reseal(payload + tail), TruncatedPayloadError, name=name)


@pytest.mark.parametrize("name", CODECS)
def test_every_single_bit_flip_is_found(name):
    payload = PAYLOADS[name]
    for position in range(len(payload)):
        for bit in range(8):
            damaged = bytearray(payload)
            damaged[position] ^= 1 << bit
            assert not sound_or_refused(name, bytes(damaged))


def test_every_resealed_bit_flip_is_refused_or_harmless():
    for name, payload in PAYLOADS.items():
        size = wire.read(payload).header_bytes
        free = [payload.index(b"[1,") + 1] if name == "rotate" else []  # another seed undoes another rotation
        if name.startswith("lowrank"):  # the energy is for people only
            free = [payload.index(b"[[0.75") + i for i in (4, 5)]
        for position in range(len(payload)):
            damaged = bytearray(payload)
            damaged[position] ^= 1 << (position % 8)
            ok = sound_or_refused(name, reseal(bytes(damaged)))
            # In the header only the checksum's own place may change, since sealing overwrites it.
            assert position >= size or position in free or ok == (wire._CRC.start <= position < wire._CRC.stop)


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data):
    assert not sound_or_refused("quantize", data)
    prefix = struct.pack("<Q", len(data)) + wire._PREFIX
    assert not sound_or_refused("quantize", reseal(prefix + b"0" * 8 + data))


def mutate(payload: bytes, rng: random.Random) -> bytes:
    """Flip, overwrite, insert, delete, copy, or swap in a telling number."""
    data = bytearray(payload)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at, kind = rng.randrange(8, len(data)), rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.randrange(256)
        elif kind == 2:
            data[at:at] = bytes(rng.choices(b'0123456789"[]{},:\\-eabcdefgh ', k=rng.randrange(1, 6)))
        elif kind == 3:
            del data[at : at + rng.randrange(1, 6)]
        elif kind == 4:
            start = rng.randrange(len(data))
            data[at:at] = data[start : start + rng.randrange(1, 40)]
        else:
            data[at : at + 4] = struct.pack("<I", rng.choice([0, 2**31, 0x7F800000, 0x7FC00000, 0xFF800000, 2**32 - 1]))
    if rng.random() < 0.7:  # keep the claimed header length in step, or most would end there
        size = int.from_bytes(payload[:8], "little") + len(data) - len(payload)
        data[:8] = struct.pack("<Q", max(size, 0))
    return reseal(bytes(data)) if len(data) >= wire._CRC.stop else bytes(data)


def fuzz(count: int, seed: int) -> None:
    rng = random.Random(seed)
    accepted = 0
    names = list(PAYLOADS)
    for i in range(count):
        name = names[i % len(names)]
        accepted += sound_or_refused(name, mutate(PAYLOADS[name], rng))
    # Damaged codes decode to other numbers: some must have come through, or the fuzzer is not reaching the data.
    assert count * 0.02 < accepted < count * 0.6


def test_three_thousand_resealed_mutations():
    fuzz(3000, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_many_more_resealed_mutations(seed):
    fuzz(20_000, seed)


# ---- one validator at a time ----


def test_duplicate_keys_are_refused():
    header, data = split(PAYLOADS["quantize"])
    text = json.dumps(header, separators=(",", ":"))
    doubled = text.replace('"codes":', '"codes":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"codes":')
    refused(join(doubled.encode(), data), MalformedPayloadError, "key twice")
    doubled = text.replace('"dynfed":"1"', '"dynfed":"1","dynfed":"1"')
    refused(join(doubled.encode(), data), MalformedPayloadError, "key twice")
    refused(
        forged("topk", lambda h: h["__metadata__"].update(index='[{"a":1,"a":1},"d"]')), MalformedPayloadError, "twice"
    )


@pytest.mark.parametrize(
    "text", [b'{"__metadata__":{"crc32":"00000000"', b"[" * 5000, b"\xff\xfe", b"{} {}", b"null", b"1e999"]
)
def test_headers_that_are_no_json_object_are_refused(text):
    padded = wire._PREFIX + b'00000000"' + text
    refused(join(padded, b""), MalformedPayloadError)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda h: h["__metadata__"].update(extra="1"), "metadata"),
        (lambda h: h["__metadata__"].pop("chain"), "metadata"),
        (lambda h: h["__metadata__"].update(dynfed=1), "table of strings"),
        (lambda h: h["__metadata__"].update(dynfed="2"), "format version 1, but got '2'"),
        (lambda h: h["__metadata__"].update(schema="F" * 16), "schema hash"),
        (lambda h: h["__metadata__"].update(chain="quantize(512)\n"), "schema hash and a chain"),
        (lambda h: h["__metadata__"].update(index="{}"), "index to be a list"),
        (lambda h: h["__metadata__"].update(index="[NaN]"), "not JSON"),
        (lambda h: h["__metadata__"].update(index="[" * 4000), "not JSON"),
        (lambda h: h["__metadata__"].update(index="[" + "9" * 5000 + "]"), "not JSON"),
        (lambda h: h["__metadata__"].update(index='["\ud800"]'), None),
        (lambda h: h["__metadata__"].update(index='[ "c4"]'), "canonical"),
        (lambda h: h["codes"].update(extra=1), "dtype, shape and data_offsets"),
        (lambda h: h["codes"].pop("shape"), "dtype, shape and data_offsets"),
        (lambda h: h["codes"].update(dtype="U9"), "known dtype"),
        (lambda h: h["codes"].update(dtype=["U8"]), "known dtype"),
        (lambda h: h["codes"].update(shape=[True]), "one size"),
        (lambda h: h["codes"].update(shape=[-1]), "one size"),
        (lambda h: h["codes"].update(shape=[1.0]), "one size"),
        (lambda h: h["codes"].update(shape=[2**63]), "one size"),
        (lambda h: h["codes"].update(shape=[2**61]), "to hold"),
        (lambda h: h["codes"].update(data_offsets=[0, h["codes"]["shape"][0]]), "to hold"),
        (lambda h: h["codes"]["data_offsets"].append(0), "two offsets"),
        (lambda h: h.update({"x y": h["codes"]}), "Expected an arena"),
        (lambda h: h.update({f"a{i}": {} for i in range(40)}), "at most 32 arenas"),
        (lambda h: h.update({"zero": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}), "to hold 0"),
    ],
)  # fmt: skip
def test_headers_that_lie_are_refused(edit, match):
    refused(forged("quantize", edit), MalformedPayloadError, match)


def test_spaces_and_reordered_keys_are_refused():
    header, data = split(PAYLOADS["quantize"])
    loose = json.dumps(header).replace('{"__metadata__": {"crc32": "', '{"__metadata__":{"crc32":"').encode()
    refused(join(loose, data), MalformedPayloadError, "canonical")
    text = json.dumps(header, separators=(",", ":")).encode()
    refused(join(text + b" " * 16, data), MalformedPayloadError, "canonical")
    swapped = {**header, "codes": dict(reversed(header["codes"].items()))}
    refused(join(swapped, data), MalformedPayloadError, "canonical")


@pytest.mark.parametrize("claim", [2**16 + 1, 2**31, 2**63, 2**64 - 1])
def test_absurd_header_lengths_are_refused(claim):
    payload = struct.pack("<Q", claim) + PAYLOADS["quantize"][8:]
    refused(payload, MalformedPayloadError, "header of at most")
    with pytest.raises(PayloadError):
        inspect(payload)


@pytest.mark.parametrize(
    "runs", ["c4", "c", "", "c3i", "c30", "c2c", "c03", "-3", "c999999999", "z3", "3c", "0", "9", "c1c2", " c3", None, [3]]
)  # fmt: skip
def test_bits_that_do_not_fit_the_schema_are_refused(runs):
    """Three tensors can be quantised; 0 and 9 bits have no letter; ``-3`` asks for arenas that are not there."""
    index = json.dumps([runs], separators=(",", ":"))
    refused(forged("quantize", lambda h: h["__metadata__"].update(index=index)), MalformedPayloadError)


@pytest.mark.parametrize("index", ["[]", '["c3","c3"]', "[null]", '"c3"'])
def test_an_index_of_another_length_is_refused(index):
    refused(forged("quantize", lambda h: h["__metadata__"].update(index=index)), MalformedPayloadError)


@pytest.mark.parametrize(
    "share", ["0.0", "-0.5", "1.5", "true", "null", '"0.2"', "0", "-3", "281474976710656", "0.9", "7", "1e+300"]
)
def test_topk_shares_that_do_not_fit_are_refused(share):
    edit = lambda h: h["__metadata__"].update(index=f'[{share},"d3"]')  # noqa: E731
    refused(forged("topk", edit), MalformedPayloadError, name="topk")


@pytest.mark.parametrize(
    "meta",
    [
        '[0.75,"4"]', '[0.75,"-"]', '[0.75,"0"]', '[0.75,"2"]', '[0.75,"3*1"]', '[0.75,"3,"]', '[0.75,",3"]',
        '[0.75,"3*2"]', '[0.75,""]', '[0.75,"03"]', '[0.75,"-3"]', '[0.75," 3"]', '[0.75,"3\\n"]',
        '[0.75,"999999999"]', '[0.75,"3*999999999"]', '[0.75,3]', '[0.75,[3]]', '["0.75","3"]', '[1,"3"]',
        '[0.0,"3"]', '[1.5,"3"]', '[true,"3"]', '[0.75000001,"3"]', '[-0.75,"3"]', '[null,"3"]', '"3"', "3", '["3"]',
        '[0.75,"3",0]', "null", '{"3":0.75}', "[]",
    ],
)  # fmt: skip
def test_ranks_that_do_not_fit_the_schema_are_refused(meta):
    """One matrix, 9 x 7, which at most three triples make smaller: it came with three."""
    edit = lambda h: h["__metadata__"].update(index=f"[{meta}]")  # noqa: E731
    assert split(PAYLOADS["lowrank"])[0]["__metadata__"]["index"] == '[[0.75,"3"]]'
    refused(forged("lowrank", edit), MalformedPayloadError, name="lowrank")
    with pytest.raises(MalformedPayloadError):
        inspect(forged("lowrank", edit), SCHEMA)


def edited_arena(name: str, arena: str, kind: str, edit: Callable[[np.ndarray], Any]) -> bytes:
    payload = bytearray(PAYLOADS[name])
    place = wire.read(PAYLOADS[name]).arenas[arena]
    edit(np.frombuffer(payload, kind, place.numel, place.start))
    return reseal(bytes(payload))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("name", "arena", "kind"), [("quantize", "scales", "<f4"), ("quantize", "raw.F32", "<f4"),
                                                     ("cast", "raw.F16", "<f2"), ("topk", "scales", "<f4")])  # fmt: skip
def test_non_finite_numbers_are_refused(name, arena, kind, bad):
    refused(edited_arena(name, arena, kind, lambda a: a.__setitem__(-1, bad)), NonFiniteError, arena, name)
    refused(edited_arena("cast", "raw.BF16", "<u2", lambda a: a.__setitem__(0, 0xFF80)), NonFiniteError, name="cast")


def test_negative_scales_and_strange_booleans_are_refused():
    for value in (-1.0, -0.0):
        payload = edited_arena("quantize", "scales", "<f4", lambda a, v=value: a.__setitem__(0, v))
        refused(payload, MalformedPayloadError, "negative")
    refused(edited_arena("quantize", "raw.BOOL", "u1", lambda a: a.__setitem__(0, 2)), MalformedPayloadError, "0 or 1")


def test_huge_scales_still_decode_to_finite_numbers():
    payload = edited_arena("quantize", "scales", "<f4", lambda a: a.fill(np.finfo(np.float32).max))
    assert sound_or_refused("quantize", payload)


def test_huge_factors_still_decode_to_finite_numbers():
    top = np.finfo(np.float32).max
    payload = edited_arena("lowrank", "singular", "<f4", lambda a: a.fill(top))
    assert sound_or_refused("lowrank", payload)
    payload = edited_arena("lowrank", "raw.F32", "<f4", lambda a: a.fill(-top))
    assert sound_or_refused("lowrank", payload)
    w = CODECS["lowrank"].decode(payload, SCHEMA)["w"]
    assert torch.equal(w, torch.full((9, 7), top))
    payload = edited_arena("lowrankq", "scales", "<f4", lambda a: a.fill(top))
    assert sound_or_refused("lowrankq", payload)


def test_negative_singular_values_are_refused():
    payload = edited_arena("lowrank", "singular", "<f4", lambda a: a.__setitem__(1, -1.0))
    refused(payload, MalformedPayloadError, "no negative singular value of 'w'", "lowrank")


def test_unused_bits_must_be_zero():
    # w: 63 * 3 = 189 bits, so 3 unused in byte 23; b: 15, 1 in byte 25; h: 33, 7 in byte 30.
    for byte, bits in ((23, (5, 6, 7)), (25, (7,)), (30, (1, 2, 3, 4, 5, 6, 7))):
        for bit in range(8):
            payload = edited_arena(
                "quantize", "codes", "u1", lambda a, i=byte, b=bit: a.__setitem__(i, a[i] ^ (1 << b))
            )
            if bit in bits:
                refused(payload, MalformedPayloadError, "unused bits")
            else:
                assert sound_or_refused("quantize", payload)


@pytest.mark.parametrize("edit", [
    lambda a: a.__setitem__(0, -1),
    lambda a: a.__setitem__(12, 63),
    lambda a: a.__setitem__(12, 2**31 - 1),
    lambda a: a.__setitem__(1, a[0]),
    lambda a: a.__setitem__(slice(0, 2), a[[1, 0]]),
])  # fmt: skip
def test_indices_must_ascend_within_the_tensor(edit):
    refused(edited_arena("topk", "indices", "<i4", edit), MalformedPayloadError, "indices of 'w' to ascend", "topk")


def test_arenas_must_be_exactly_filled():
    """Sound blobs by themselves, with more, less, or other than the schema asks for."""
    read = wire.read(PAYLOADS["quantize"])
    arenas = {}
    for name, a in read.arenas.items():
        arenas[name] = (a.dtype, [np.frombuffer(PAYLOADS["quantize"][a.start : a.stop], np.uint8)])

    def written(**changed: Any) -> bytes:
        kept = {n: a for n, a in {**arenas, **changed}.items() if a is not None}
        return wire.write(read.schema_hash, read.chain, read.metas, kept)

    assert written() == PAYLOADS["quantize"]
    codes = arenas["codes"][1][0]
    one = np.zeros(4, np.uint8)
    for changed in (
        {"codes": ("U8", [codes[:-1]])},
        {"codes": ("U8", [codes, one])},
        {"codes": ("I8", [codes])},
        {"codes": None},
        {"scales": None},
        {"scales": ("I32", arenas["scales"][1])},
        {"scales": ("F32", [*arenas["scales"][1], one])},
        {"raw.I32": ("I32", [one])},
        {"extra": ("U8", [one])},
        {"raw.F32": ("I32", arenas["raw.F32"][1])},
    ):
        refused(written(**changed), MalformedPayloadError, "Expected `")


def test_foreign_schemas_and_chains_are_told_apart():
    other = Schema.of({**table(), "w": torch.zeros(7, 9)}, raw={"mean"})
    with pytest.raises(SchemaMismatchError):
        CODECS["quantize"].decode(PAYLOADS["quantize"], other)
    for name, codec in CODECS.items():
        for sent, payload in PAYLOADS.items():
            if sent != name:
                with pytest.raises(MalformedPayloadError, match="of the chain"):
                    codec.decode(payload, SCHEMA)
    refused(PAYLOADS["quantize"][:-1] + b"\xff", ChecksumError)


def test_refusing_allocates_next_to_nothing():
    """Claims of exabytes, and megabytes of damaged data: the peak stays far below either."""
    absurd = [
        forged("quantize", lambda h: h["codes"].update(shape=[2**61], data_offsets=[72, 72 + 2**61])),
        forged("quantize", lambda h: h["__metadata__"].update(index='["c999999999"]')),
        forged("quantize", lambda h: h["__metadata__"].update(index="[" + "[]," * 15000 + "[]]")),
        forged("lowrank", lambda h: h["__metadata__"].update(index='[[0.75,"3*999999999"]]')),
        forged("lowrank", lambda h: h["__metadata__"].update(index='[[0.75,"999999999"]]')),
        struct.pack("<Q", 2**63) + PAYLOADS["quantize"][8:],
        PAYLOADS["quantize"] + bytes(8 << 20),
        reseal(PAYLOADS["quantize"] + bytes(8 << 20)),
    ]
    for payload in absurd:
        tracemalloc.start()
        for read in (CODECS["quantize"].decode, inspect):
            with pytest.raises(PayloadError):
                read(payload, SCHEMA)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 << 20
