"""The wire format: one safetensors blob that carries its own checksum, written and read strictly.

::

    u64   length of the header (a multiple of 8, little endian)
    JSON  {"__metadata__": {"crc32", "dynfed", "schema", "chain", "index"}, "<arena>": {"dtype", "shape", "data_offsets"}, ...}
    data  the arenas back to back, widest dtype first, so that each is aligned: e.g. scales (F32), codes (U8), raw.F32

``crc32`` comes first in the file, at a fixed place, and is computed over the whole blob with eight zeros in its own place: no
byte is left out. It finds accidents; it is no proof of who sent the payload. ``schema`` is `Schema.hash`; ``chain`` names the
stages; ``index`` is one short JSON value per stage. Everything a reader could ask for beyond that is in the agreed schema.

There is exactly one header for a given content: a reader builds it again and compares, so that spaces, duplicate, missing or
reordered keys are all refused. ``safetensors.numpy.load`` reads the arenas of any payload.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dynfed_lightning.errors import ChecksumError, MalformedPayloadError, NonFiniteError, TruncatedPayloadError

VERSION = "1"
MAX_HEADER = 1 << 18  # of a payload whose schema the reader does not know
_PREFIX = b'{"__metadata__":{"crc32":"'
_CRC = slice(8 + len(_PREFIX), 8 + len(_PREFIX) + 8)
_META_KEYS = ["crc32", "dynfed", "schema", "chain", "index"]
_ARENA_NAME = re.compile(r"[A-Za-z0-9._]{1,32}")
_CHAIN = re.compile(r"[a-z0-9_.,()|=-]{0,512}")
_SCHEMA_HASH = re.compile(r"[0-9a-f]{16}")
_MAX_ARENAS = 32

# Bytes per element, and for the floats an unsigned view, the mask without the sign, and the pattern of infinity: bits at or
# above it are Inf or NaN. Integers compare several times faster than numpy's isfinite on half precision, and for bfloat16 numpy
# has no type at all.
ITEM_SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}
_FLOATS: dict[str, tuple[str, int, int]] = {
    "F64": ("<u8", 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7FFF_FFFF, 0x7F80_0000),
    "F16": ("<u2", 0x7FFF, 0x7C00),
    "BF16": ("<u2", 0x7FFF, 0x7F80),
}


class Arena(NamedTuple):
    """One array of a payload: its dtype and where in the payload its bytes are."""

    dtype: str
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return (self.stop - self.start) // ITEM_SIZES[self.dtype]


class Blob(NamedTuple):
    """A payload whose structure has been checked (its values have not).

    Args:
        schema_hash: 16 hex digits.
        chain: the stages' names.
        metas: one JSON value per stage, not checked.
        arenas: by name.
        header_bytes: everything that is not in an arena.
    """

    schema_hash: str
    chain: tuple[str, ...]
    metas: list[Any]
    arenas: dict[str, Arena]
    header_bytes: int


def write(
    schema_hash: str,
    chain: Sequence[str],
    index: Sequence[Any],
    arenas: Mapping[str, tuple[str, Sequence[NDArray[Any]]]],
) -> bytes:
    """Serialise; the same content gives the same bytes.

    Args:
        schema_hash: 16 hex digits.
        chain: the stages' names.
        index: one JSON value per stage.
        arenas: name -> (safetensors dtype, contiguous arrays that are joined without gaps). An empty arena is not written.
    """
    ordered: dict[str, Arena] = {}
    chunks: list[NDArray[Any]] = []
    stop = 0
    for name in sorted(arenas, key=lambda n: _order(n, arenas[n][0])):
        dtype, pieces = arenas[name]
        size = sum(p.nbytes for p in pieces)
        if size:
            ordered[name] = Arena(dtype, stop, stop + size)
            chunks += [p for p in pieces if p.nbytes]
            stop += size
    text = json.dumps(list(index), separators=(",", ":"), allow_nan=False)
    header = _header("0" * 8, schema_hash, "|".join(chain), text, ordered)
    crc = zlib.crc32(header)
    for chunk in chunks:
        crc = zlib.crc32(chunk.data, crc)
    header = header[: _CRC.start] + f"{crc:08x}".encode() + header[_CRC.stop :]
    return b"".join([header, *(c.data for c in chunks)])


def _order(name: str, dtype: str) -> tuple[int, str]:
    return -ITEM_SIZES[dtype], name


def _header(crc: str, schema_hash: str, chain: str, index: str, arenas: Mapping[str, Arena]) -> bytes:
    """Length and header, padded with spaces so that the data starts at a multiple of 8. Offsets count from the data's start."""
    values = [crc, VERSION, schema_hash, chain, index]
    table: dict[str, Any] = {"__metadata__": dict(zip(_META_KEYS, values, strict=True))}
    for name, arena in arenas.items():
        offsets = [arena.start, arena.stop]
        table[name] = {"dtype": arena.dtype, "shape": [arena.numel], "data_offsets": offsets}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read(payload: bytes, max_header: int = MAX_HEADER, verify: bool = True) -> Blob:
    """Check a payload's checksum and structure. Allocates no more than a few times the header.

    Args:
        payload: bytes from anywhere.
        max_header: the longest header that can make sense.
        verify: compare the checksum; False only for what this process has just written.

    Raises:
        TruncatedPayloadError: too short or too long for what its header says.
        ChecksumError: bytes do not match the checksum.
        MalformedPayloadError: not this format, or a header that contradicts itself.
    """
    if not isinstance(payload, bytes):
        raise MalformedPayloadError(f"Expected a payload of type bytes, but got {type(payload).__name__}.")
    if len(payload) < _CRC.stop:
        raise TruncatedPayloadError(f"Expected a payload of at least {_CRC.stop} bytes, but got {len(payload)}.")
    size = int.from_bytes(payload[:8], "little")
    if payload[8 : _CRC.start] != _PREFIX:
        raise MalformedPayloadError(f"Expected a payload of this package, but it starts with {payload[:24]!r}.")
    if size > max_header:
        raise MalformedPayloadError(f"Expected a header of at most {max_header} bytes, but it claims {size}.")
    if len(payload) < 8 + size:
        raise TruncatedPayloadError(f"Expected a payload of at least {8 + size} bytes, but got {len(payload)}.")
    if not verify:
        return _parse(payload, size)
    view = memoryview(payload)
    crc = zlib.crc32(view[_CRC.stop :], zlib.crc32(b"0" * 8, zlib.crc32(view[: _CRC.start])))
    if payload[_CRC] != f"{crc:08x}".encode():
        # A payload that was merely cut short says so; its header is parsed for the message alone.
        try:
            _parse(payload, size)
        except TruncatedPayloadError:
            raise
        except MalformedPayloadError:
            pass
        raise ChecksumError("The payload does not match its checksum.")
    return _parse(payload, size)


def _parse(payload: bytes, size: int) -> Blob:
    table = _json(payload[8 : 8 + size], "header")
    meta = table.pop("__metadata__", None) if isinstance(table, dict) else None
    if not isinstance(meta, dict) or not all(isinstance(v, str) for v in meta.values()):
        raise MalformedPayloadError("Expected a header with a `__metadata__` table of strings, but it has none.")
    if sorted(meta) != sorted(_META_KEYS):
        raise MalformedPayloadError(f"Expected the metadata {_META_KEYS}, but got {sorted(meta)!a:.200}.")
    if meta["dynfed"] != VERSION:
        raise MalformedPayloadError(f"Expected format version {VERSION}, but got {meta['dynfed']!a:.40}.")
    if not _SCHEMA_HASH.fullmatch(meta["schema"]) or not _CHAIN.fullmatch(meta["chain"]):
        raise MalformedPayloadError(
            f"Expected a schema hash and a chain, but got {(meta['schema'], meta['chain'])!a:.120}."
        )
    index = _json(meta["index"].encode(errors="replace"), "index")
    if not isinstance(index, list):
        raise MalformedPayloadError(f"Expected the index to be a list, but got {type(index).__name__}.")
    arenas = _arenas(table)
    stop = max((a.stop for a in arenas.values()), default=0)
    if 8 + size + stop != len(payload):
        raise TruncatedPayloadError(f"Expected a payload of {8 + size + stop} bytes, but got {len(payload)}.")
    canonical = _header(meta["crc32"], meta["schema"], meta["chain"], meta["index"], arenas)
    if canonical != payload[: 8 + size] or meta["index"] != json.dumps(index, separators=(",", ":")):
        raise MalformedPayloadError("The payload's header is not in its canonical form.")
    shifted = {n: Arena(a.dtype, a.start + 8 + size, a.stop + 8 + size) for n, a in arenas.items()}
    chain = tuple(meta["chain"].split("|")) if meta["chain"] else ()
    return Blob(meta["schema"], chain, index, shifted, 8 + size)


def _arenas(table: dict[str, Any]) -> dict[str, Arena]:
    if len(table) > _MAX_ARENAS:
        raise MalformedPayloadError(f"Expected at most {_MAX_ARENAS} arenas, but got {len(table)}.")
    arenas: dict[str, Arena] = {}
    stop = 0
    for name, entry in table.items():
        if not _ARENA_NAME.fullmatch(name) or not isinstance(entry, dict):
            raise MalformedPayloadError(f"Expected an arena, but got {name!a:.40}.")
        if sorted(entry) != ["data_offsets", "dtype", "shape"]:
            raise MalformedPayloadError(
                f"Expected dtype, shape and data_offsets in {name!a}, but got {sorted(entry)!a:.120}."
            )
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
            raise MalformedPayloadError(f"Expected a known dtype in {name!a}, but got {dtype!a:.40}.")
        if not _counts(shape, 1) or not _counts(offsets, 2):
            raise MalformedPayloadError(
                f"Expected one size and two offsets in {name!a}, but got {(shape, offsets)!a:.120}."
            )
        if shape[0] == 0 or offsets != [stop, stop + shape[0] * ITEM_SIZES[dtype]]:
            raise MalformedPayloadError(
                f"Expected {name!a} at {stop} to hold {shape[0]} x {dtype}, but it spans {offsets[0]} to {offsets[1]}."
            )
        arenas[name] = Arena(dtype, offsets[0], offsets[1])
        stop = offsets[1]
    if list(arenas) != sorted(arenas, key=lambda n: _order(n, arenas[n].dtype)):
        raise MalformedPayloadError(f"Expected the arenas in their canonical order, but got {list(arenas)}.")
    return arenas


def _counts(value: object, n: int) -> bool:
    return isinstance(value, list) and len(value) == n and all(type(v) is int and 0 <= v < 2**62 for v in value)


def _json(text: bytes, what: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            raise MalformedPayloadError(f"The payload's {what} holds a key twice.")
        return out

    def constant(name: str) -> Any:
        raise MalformedPayloadError(f"The payload's {what} holds {name}, which is not JSON.")

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except MalformedPayloadError:
        raise
    except (ValueError, RecursionError):
        raise MalformedPayloadError(f"The payload's {what} is not JSON.") from None


def check_values(payload: bytes, blob: Blob) -> None:
    """Check that floats are finite, scales not negative, and booleans 0 or 1.

    Raises:
        NonFiniteError: NaN or infinity in an arena of floats.
        MalformedPayloadError: a negative scale, or a boolean that is neither 0 nor 1.
    """
    for name, arena in blob.arenas.items():
        if arena.dtype in _FLOATS and not _all_finite(_view(payload, arena, _FLOATS[arena.dtype][0]), arena.dtype):
            raise NonFiniteError(f"Expected finite numbers in `{name}` only, but got NaN or infinity.")
        if name == "scales" and int(_view(payload, arena, "<u4").max()) >> 31:
            raise MalformedPayloadError("Expected no negative number in `scales`, but got one.")
        if arena.dtype == "BOOL" and int(_view(payload, arena, "u1").max()) > 1:
            raise MalformedPayloadError(f"Expected 0 or 1 in `{name}` only, but got something else.")


def _view(payload: bytes, arena: Arena, dtype: str) -> NDArray[Any]:
    return np.frombuffer(payload, dtype, arena.numel, arena.start)


def _all_finite(bits: NDArray[Any], dtype: str) -> bool:
    """Whether the floats with these bits, viewed as unsigned integers, hold neither NaN nor infinity."""
    _, mask, infinity = _FLOATS[dtype]
    m = bits.dtype.type(mask)
    step = 1 << 16  # so that the temporaries stay in the cache
    return all(int((bits[i : i + step] & m).max()) < infinity for i in range(0, bits.size, step))
