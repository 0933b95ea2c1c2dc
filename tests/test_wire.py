"""The wire format and the schema: exact bytes, readable by safetensors, strict in what they accept."""

from __future__ import annotations

import hashlib
import zlib

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

from dynfed_lightning import wire
from dynfed_lightning.codec import Codec, CodecContext, Schema, TensorSpec
from dynfed_lightning.errors import ChecksumError, MalformedPayloadError, PayloadError, TruncatedPayloadError
from dynfed_lightning.stages import Quantize

HASH = "0123456789abcdef"


def arrays() -> dict[str, tuple[str, list[np.ndarray]]]:
    return {
        "codes": ("U8", [np.array([1, 2], np.uint8), np.array([3], np.uint8)]),
        "scales": ("F32", [np.array([0.5], np.float32), np.array([2.0], np.float32)]),
        "raw.F64": ("F64", [np.array([1.0])]),
        "raw.F32": ("F32", []),
    }


def blob() -> bytes:
    return wire.write(HASH, ["quantize(512)"], ["d2"], arrays())


def test_the_bytes_are_exactly_these():
    header = (
        b'{"__metadata__":{"crc32":"00000000","dynfed":"1","schema":"0123456789abcdef","chain":"quantize(512)",'
        b'"index":"[\\"d2\\"]"},'
        b'"raw.F64":{"dtype":"F64","shape":[1],"data_offsets":[0,8]},'
        b'"scales":{"dtype":"F32","shape":[2],"data_offsets":[8,16]},'
        b'"codes":{"dtype":"U8","shape":[3],"data_offsets":[16,19]}}'
    )
    header += b" " * (-len(header) % 8)
    data = np.array([1.0]).tobytes() + np.array([0.5, 2.0], np.float32).tobytes() + bytes([1, 2, 3])
    zeroed = len(header).to_bytes(8, "little") + header + data
    expected = zeroed.replace(b'"crc32":"00000000"', b'"crc32":"%08x"' % zlib.crc32(zeroed))
    assert blob() == expected


def test_what_was_written_is_read():
    payload = blob()
    read = wire.read(payload)
    assert (read.schema_hash, read.chain, read.metas) == (HASH, ("quantize(512)",), ["d2"])
    assert {n: (a.dtype, a.numel) for n, a in read.arenas.items()} == {
        "raw.F64": ("F64", 1),
        "scales": ("F32", 2),
        "codes": ("U8", 3),
    }
    assert payload[read.arenas["codes"].start : read.arenas["codes"].stop] == bytes([1, 2, 3])
    assert read.header_bytes == len(payload) - 19


def test_safetensors_itself_reads_every_payload(tmp_path):
    update = {
        "w": torch.randn(70, 9),
        "b": torch.randn(3).bfloat16(),
        "n": torch.tensor(5),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 3),
    }
    for codec in (Codec(), Codec(Quantize(3))):
        payload = codec.encode(update)
        loaded = safetensors.torch.load(payload)
        assert loaded["raw.I64"].tolist() == [5]
        assert loaded["raw.BOOL"].tolist() == [True, False, True]
        assert torch.equal(loaded["raw.BF16"], update["b"]) or codec.stages
        (tmp_path / "payload").write_bytes(payload)
        with safetensors.safe_open(tmp_path / "payload", "pt") as file:
            assert file.metadata()["schema"] == Schema.of(update).hash
    assert torch.equal(safetensors.torch.load(Codec().encode(update))["raw.F32"], update["w"].reshape(-1))
    assert safetensors.numpy.load(Codec().encode({})) == {}


def test_same_content_same_bytes_whatever_the_order_it_came_in():
    backwards = dict(reversed(arrays().items()))
    assert wire.write(HASH, ["quantize(512)"], ["d2"], backwards) == blob()


def test_arenas_are_aligned_to_their_element_size():
    payload = blob()
    for arena in wire.read(payload).arenas.values():
        assert arena.start % wire.ITEM_SIZES[arena.dtype] == 0


def test_every_bit_of_a_payload_is_under_the_checksum():
    payload = blob()
    for position in range(len(payload)):
        for bit in range(8):
            damaged = bytearray(payload)
            damaged[position] ^= 1 << bit
            with pytest.raises(PayloadError):
                wire.read(bytes(damaged))


def test_a_flipped_data_bit_is_a_checksum_error_and_a_cut_a_truncation():
    payload = blob()
    with pytest.raises(ChecksumError):
        wire.read(payload[:-1] + bytes([payload[-1] ^ 1]))
    for size in range(len(payload)):
        with pytest.raises(TruncatedPayloadError):
            wire.read(payload[:size])
    with pytest.raises(TruncatedPayloadError, match="but got"):
        wire.read(payload + b"\0")


def test_the_checksum_is_case_sensitive():
    payloads = (wire.write(f"{i:016x}", [], [], {}) for i in range(100))
    payload = next(p for p in payloads if any(c in b"abcdef" for c in p[wire._CRC]))
    upper = payload[: wire._CRC.start] + payload[wire._CRC].upper() + payload[wire._CRC.stop :]
    with pytest.raises(ChecksumError):
        wire.read(upper)


def test_only_bytes_are_payloads():
    for thing in (None, "text", bytearray(blob()), 5):
        with pytest.raises(MalformedPayloadError, match="of type bytes"):
            wire.read(thing)  # type: ignore[arg-type]


def test_overhead_is_small_and_independent_of_names():
    short = {f"w{i}": torch.ones(700) for i in range(150)}
    long = {("a_very_long_module_path." * 5) + n: t for n, t in short.items()}
    codec = Codec(Quantize(4))
    payload = codec.encode(short)
    assert len(payload) == len(codec.encode(long))
    assert wire.read(payload).header_bytes < 300


def test_values_behind_the_structure_are_checked():
    def written(**changed: tuple[str, list[np.ndarray]]) -> bytes:
        return wire.write(HASH, [], [], {**arrays(), **changed})

    def check(payload: bytes) -> None:
        wire.check_values(payload, wire.read(payload))

    check(written())
    for bad in (np.nan, np.inf, -np.inf):
        for name, dtype, kind in (
            ("scales", "F32", np.float32),
            ("raw.F64", "F64", np.float64),
            ("x", "F16", np.float16),
        ):
            many = np.zeros(70_000, kind)
            many[-1] = bad
            with pytest.raises(PayloadError, match=name):
                check(written(**{name: (dtype, [many])}))
    with pytest.raises(MalformedPayloadError, match="negative"):
        check(written(scales=("F32", [np.array([-1.0], np.float32)])))
    with pytest.raises(MalformedPayloadError, match="0 or 1"):
        check(written(**{"raw.BOOL": ("BOOL", [np.array([2], np.uint8)])}))
    with pytest.raises(PayloadError, match="BF16"):
        check(written(**{"raw.BF16": ("BF16", [np.array([0x7F80], np.uint16)])}))
    largest = np.array([np.finfo(np.float32).max, -np.finfo(np.float32).max, 1e-45], np.float32)
    check(written(**{"raw.F32": ("F32", [largest])}))


# ---- the schema ----


def test_a_schema_is_an_immutable_sequence():
    update = {"w": torch.zeros(2, 3), "s": torch.tensor(1.0), "m": torch.zeros(3, dtype=torch.float64)}
    schema = Schema.of(update, raw={"m"})
    assert [s.name for s in schema] == ["w", "s", "m"] == list(schema.names)
    assert (len(schema), schema.num_elements, schema[1].shape, schema["m"].raw) == (3, 10, (), True)
    assert schema == Schema.of(update, raw={"m"}) != Schema.of(update)
    assert "w" in schema and "x" not in schema
    assert len({schema, Schema.of(update, raw={"m"})}) == 1


def test_the_hash_depends_on_all_that_matters_and_on_nothing_else():
    base = [TensorSpec("a", (2, 3), torch.float32), TensorSpec("b", (4,), torch.float32)]
    others = [
        [TensorSpec("a2", (2, 3), torch.float32), base[1]],
        [TensorSpec("a", (3, 2), torch.float32), base[1]],
        [TensorSpec("a", (2, 3), torch.float16), base[1]],
        [TensorSpec("a", (2, 3), torch.float32, raw=True), base[1]],
        [base[1], base[0]],
        base[:1],
    ]
    hashes = [Schema(specs).hash for specs in [base, *others]]
    assert len(set(hashes)) == len(hashes)
    assert hashes[0] == Schema(tuple(base)).hash
    # Fixed for ever: a payload of today must be readable tomorrow.
    rows = '[["a",[2,3],"F32",0],["b",[4],"F32",0]]'
    assert hashes[0] == hashlib.sha256(rows.encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schema([TensorSpec("a", (), torch.float32)] * 2), "unique names"),
        (lambda: Schema.of({"a": torch.zeros(1)}, raw={"b"}), "names of `tensors` only"),
        (lambda: TensorSpec("a", (1,), torch.complex64), "`dtype` of 'a'"),
        (lambda: TensorSpec("a", (2, -1), torch.float32), "no negative size"),
        (lambda: TensorSpec("a", (2**25, 2**25), torch.float32), r"at most 2\*\*48 elements"),
    ],
)
def test_impossible_schemas_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_encode_refuses_what_the_schema_does_not_say():
    update = {"a": torch.zeros(3), "b": torch.zeros(2)}
    schema = Schema.of(update)
    wrong = [
        ({"a": torch.zeros(3)}, "'b'"),
        ({**update, "c": torch.zeros(1)}, "'c'"),
        ({"a": torch.zeros(4), "b": update["b"]}, r"shape \(4,\)"),
        ({"a": torch.zeros(3).half(), "b": update["b"]}, "float16"),
        ({"a": torch.zeros(3).to_sparse(), "b": update["b"]}, "dense"),
    ]
    for tensors, message in wrong:
        with pytest.raises(PayloadError, match=message):
            Codec().encode(tensors, CodecContext(), schema)
    backwards = {"b": update["b"], "a": update["a"]}
    assert Codec().encode(backwards, schema=schema) == Codec().encode(update)
