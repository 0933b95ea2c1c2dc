from __future__ import annotations

import json
import struct
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynfed_lightning.errors import NonFiniteError, PayloadError
from dynfed_lightning.message import Message


def test_round_trip_and_length() -> None:
    message = Message(
        round=3,
        client_id=7,
        scalars={"loss": 0.25, "bits": 4, "word": "x"},
        counters={"labels": [1, 0, 5]},
        num_examples=6,
        num_rounds=10,
        kind="difference",
        base=0,
        parts=[b"abc", b"", b"\x00\xff"],
    )
    data = message.to_bytes()
    assert Message.from_bytes(data) == message
    assert data == message.to_bytes()
    bare = Message(round=0, client_id=0).to_bytes()
    assert len(bare) == 12 + len('{"r":0,"c":0,"p":[]}')


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_survive_exactly(value: float) -> None:
    assert Message.from_bytes(Message(0, 0, scalars={"x": value}).to_bytes()).scalars["x"] == value


def test_non_finite_scalars_are_not_sent() -> None:
    with pytest.raises(NonFiniteError, match="Expected the scalar `loss` to be finite, but got nan"):
        Message(0, 0, scalars={"loss": float("nan")}).to_bytes()


def _framed(text: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<4sII", b"DFM1", len(text), zlib.crc32(text)) + text + body


_GOOD = Message(1, 2, scalars={"a": 1.0}, counters={"n": [1]}, num_examples=3, parts=[b"12345"]).to_bytes()


def test_every_truncation_and_every_bit_of_the_header_is_found() -> None:
    for n in range(len(_GOOD)):
        with pytest.raises(PayloadError):
            Message.from_bytes(_GOOD[:n])
    with pytest.raises(PayloadError):
        Message.from_bytes(_GOOD + b"x")
    for i in range((len(_GOOD) - 5) * 8):  # the parts have checksums of their own
        damaged = bytearray(_GOOD)
        damaged[i // 8] ^= 1 << i % 8
        with pytest.raises(PayloadError):
            Message.from_bytes(bytes(damaged))


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{}",
        b'{"r":0,"c":0}',
        b'{"r":0,"r":1,"c":0,"p":[]}',
        b'{"r":-1,"c":0,"p":[]}',
        b'{"r":true,"c":0,"p":[]}',
        b'{"r":0,"c":0,"p":[99999999999999]}',
        b'{"r":0,"c":0,"p":[-1]}',
        b'{"r":0,"c":0,"p":7}',
        b'{"r":0,"c":0,"p":[],"z":1}',
        b'{"r":0,"c":0,"p":[],"s":{"x":NaN}}',
        b'{"r":0,"c":0,"p":[],"s":{"x":Infinity}}',
        b'{"r":0,"c":0,"p":[],"s":{"x":[1]}}',
        b'{"r":0,"c":0,"p":[],"k":{"x":[-1]}}',
        b'{"r":0,"c":0,"p":[],"k":{"x":[1.5]}}',
        b'{"r":0,"c":0,"p":[],"m":"sideways"}',
        b'{"r":0,"c":0,"p":[],"n":1e400}',
        b"[" * 100_000,
        b"\xff\xfe",
        b"",
    ],
    ids=range(20),
)
def test_malformed_headers_with_a_right_checksum(header: bytes) -> None:
    with pytest.raises(PayloadError):
        Message.from_bytes(_framed(header))


def test_absurd_header_size_is_refused_before_it_is_read() -> None:
    with pytest.raises(PayloadError, match="at most 1048576 bytes, but it claims 4294967295"):
        Message.from_bytes(struct.pack("<4sII", b"DFM1", 2**32 - 1, 0))


@given(st.binary(max_size=200))
def test_random_bytes(data: bytes) -> None:
    with pytest.raises(PayloadError):
        Message.from_bytes(data)


_LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=3)
_JSON = st.recursive(_LEAVES, lambda c: st.lists(c) | st.dictionaries(st.sampled_from("rcpsknmtb"), c))


@given(_JSON)
def test_random_json(value: Any) -> None:
    try:
        Message.from_bytes(_framed(json.dumps(value).encode()))
    except PayloadError:
        return
    assert isinstance(value, dict) and {"r", "c", "p"} <= value.keys()


@pytest.mark.parametrize(
    "wrong",
    [{"num_examples": -1}, {"scalars": {"x": None}}, {"counters": {"n": [-1]}}, {"counters": {"n": [0.5]}}],
    ids=str,
)
def test_what_the_receiver_would_refuse_is_not_sent(wrong: dict[str, Any]) -> None:
    with pytest.raises(PayloadError, match="Expected a message the receiver accepts"):
        Message(0, 0, **wrong).to_bytes()
