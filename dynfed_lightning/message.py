"""What really travels: a small JSON header and one or more codec payloads, in one ``bytes``.

Layout: ``b"DFM1"``, header length (u32, little endian), crc32 of the header (u32), the header (JSON), the parts back to back.
Every part is a codec payload with its own checksum. The length of a message is what every communication figure counts.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dynfed_lightning.errors import ChecksumError, MalformedPayloadError, NonFiniteError, TruncatedPayloadError

_MAGIC = b"DFM1"
_PREFIX = struct.Struct("<4sII")
_MAX_HEADER = 1 << 20


@dataclass
class Message:
    """A request or a reply.

    Args:
        round: the round, from 0.
        client_id: whose round.
        scalars: small finite numbers or strings.
        counters: lists of integers.
        num_examples: rows the client trained on (replies).
        num_rounds: rounds planned (requests).
        kind: how the parts are to be read: ``"full"`` weights, a ``"difference"``, or ``"known"``: differences, perhaps none,
            to the initial weights that were agreed when the client joined.
        base: the round whose weights a ``"difference"`` is added to.
        parts: codec payloads.
    """

    round: int
    client_id: int
    scalars: dict[str, Any] = field(default_factory=dict)
    counters: dict[str, list[int]] = field(default_factory=dict)
    num_examples: int = 0
    num_rounds: int | None = None
    kind: str = "full"
    base: int | None = None
    parts: Sequence[bytes] = ()

    def to_bytes(self) -> bytes:
        """Serialise; the same message gives the same bytes.

        Raises:
            NonFiniteError: a scalar is NaN or infinite.
        """
        for name, value in self.scalars.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise NonFiniteError(f"Expected the scalar `{name}` to be finite, but got {value}.")
        header: dict[str, Any] = {"r": self.round, "c": self.client_id, "p": [len(p) for p in self.parts]}
        optional = {"s": self.scalars, "n": self.num_examples, "k": self.counters, "t": self.num_rounds, "b": self.base}
        header.update({key: value for key, value in optional.items() if value})
        if self.base == 0:
            header["b"] = 0
        if self.kind != "full":
            header["m"] = self.kind
        for key, value in header.items():  # what the other side would refuse is this side's mistake
            if not _CHECKS[key](value):
                raise MalformedPayloadError(
                    f"Expected a message the receiver accepts, but its {key!r} is {str(value)[:60]}."
                )
        text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
        return b"".join([_PREFIX.pack(_MAGIC, len(text), zlib.crc32(text)), text, *self.parts])

    @classmethod
    def from_bytes(cls, data: bytes) -> Message:
        """Parse and validate; no part is decoded yet.

        Raises:
            PayloadError: truncated, damaged or malformed; the subclass says which.
        """
        if len(data) < _PREFIX.size:
            raise TruncatedPayloadError(f"Expected a message of at least {_PREFIX.size} bytes, but got {len(data)}.")
        magic, size, crc = _PREFIX.unpack_from(data)
        if magic != _MAGIC:
            raise MalformedPayloadError(f"Expected a message that starts with {_MAGIC!r}, but got {magic!r}.")
        if size > _MAX_HEADER:
            raise MalformedPayloadError(
                f"Expected a message header of at most {_MAX_HEADER} bytes, but it claims {size}."
            )
        text = data[_PREFIX.size : _PREFIX.size + size]
        if len(text) != size:
            raise TruncatedPayloadError(f"Expected a message header of {size} bytes, but only {len(text)} came.")
        if zlib.crc32(text) != crc:
            raise ChecksumError("The message header does not match its checksum.")
        header = _parse_header(text)
        sizes = header["p"]
        start = _PREFIX.size + size
        if start + sum(sizes) != len(data):
            raise TruncatedPayloadError(f"Expected a message of {start + sum(sizes)} bytes, but got {len(data)}.")
        parts = []
        for n in sizes:
            parts.append(data[start : start + n])
            start += n
        return cls(
            round=header["r"],
            client_id=header["c"],
            scalars=header.get("s", {}),
            counters=header.get("k", {}),
            num_examples=header.get("n", 0),
            num_rounds=header.get("t"),
            kind=header.get("m", "full"),
            base=header.get("b"),
            parts=parts,
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_scalar(value: object) -> bool:
    if isinstance(value, int):
        return abs(value) < 2**63
    return isinstance(value, str) or (isinstance(value, float) and math.isfinite(value))


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "r": _is_count,
    "c": _is_count,
    "n": _is_count,
    "t": _is_count,
    "b": _is_count,
    "m": lambda v: v in ("full", "difference", "known"),
    "p": lambda v: isinstance(v, list) and all(_is_count(x) for x in v),
    "s": lambda v: isinstance(v, dict) and all(_is_scalar(x) for x in v.values()),
    "k": lambda v: (
        isinstance(v, dict) and all(isinstance(x, list) and all(_is_count(i) for i in x) for x in v.values())
    ),
}


def _parse_header(text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            raise MalformedPayloadError("The message header holds a key twice.")
        return out

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, MalformedPayloadError):
            raise
        raise MalformedPayloadError(f"The message header is not JSON: {error}.") from None
    if not isinstance(header, dict) or not {"r", "c", "p"} <= header.keys():
        raise MalformedPayloadError("The message header lacks the round, the client or the parts.")
    for key, value in header.items():
        check = _CHECKS.get(key)
        if check is None:
            raise MalformedPayloadError(f"The message header has an unknown key {key[:20]!r}.")
        if not check(value):
            raise MalformedPayloadError(f"The message header's {key!r} is not valid: {str(value)[:60]}.")
    return header
