"""The format of quantised models: what is in a file, its header, and the strict reading of both. See `quantized_file`."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynfed_lightning import ops
from dynfed_lightning.errors import (
    ChecksumError,
    MalformedPayloadError,
    NonFiniteError,
    TruncatedPayloadError,
)
from dynfed_lightning.inspection import _table

VERSION = "1"
CENTERS, INDEX = "__centers__", "__index__"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
WEIGHTS = ("F64", "F32", "F16", "BF16")  # what a quantised layer may decode to
_PREFIX = b'{"__metadata__":{"crc32":"'
CRC = slice(8 + len(_PREFIX), 16 + len(_PREFIX))
_META = ["crc32", "quantized", "layers", "tied"]
_MAX_HEADER = 1 << 24
_MAX_DIMS = 16


class QuantizedLayer(NamedTuple):
    """One quantised tensor: its centres, and what its indices and centres take."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bits: int
    centers: list[float]

    @property
    def numel(self) -> int:
        """How many weights it has."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Packed indices and float32 centres."""
        return ops.packed_size(self.numel, self.bits) + 4 * len(self.centers)


class PlainTensor(NamedTuple):
    """One tensor that is stored as it is."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """What it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


class LayerTable(list[QuantizedLayer]):
    """Quantised layers; ``str`` shows them as a table."""

    def rows(self) -> list[tuple[str, ...]]:
        """The cells, with a head."""
        rows: list[tuple[str, ...]] = [("layer", "shape", "bits", "centres", "bytes", "of float32")]
        for r in self:
            shape = "x".join(map(str, r.shape)) or "scalar"
            share = f"{r.num_bytes / (4 * r.numel):.1%}" if r.numel else "-"
            rows.append((r.name, shape, str(r.bits), _short(r.centers), f"{r.num_bytes:,}", share))
        return rows

    def __str__(self) -> str:
        return "\n".join(_table(self.rows(), left=2))


@dataclass(frozen=True)
class QuantizedFile:
    """What is in a file of quantised weights, and how much smaller it is than float32.

    Args:
        num_bytes: of the file.
        header_bytes: of it, everything that is not tensor data.
        layers: the quantised tensors.
        tensors: the others.
        tied: names of shared tensors -> the name that is stored.
    """

    num_bytes: int
    header_bytes: int
    layers: list[QuantizedLayer]
    tensors: list[PlainTensor]
    tied: dict[str, str]

    @property
    def layers_bytes(self) -> int:
        """Indices and centres of the quantised layers, and their part of the header."""
        return sum(r.num_bytes + len(entry_of(r)) + 1 for r in self.layers)

    @property
    def layers_ratio(self) -> float:
        """How many times smaller the quantised layers are than in float32; 1 if there are none, or none with weights."""
        weights = sum(r.numel for r in self.layers)
        return 4 * weights / self.layers_bytes if weights else 1.0

    @property
    def float_bytes(self) -> int:
        """All tensors, the floating ones in float32, without a header."""
        plain = [4 * math.prod(t.shape) if t.dtype.is_floating_point else t.num_bytes for t in self.tensors]
        return sum(4 * r.numel for r in self.layers) + sum(plain)

    @property
    def ratio(self) -> float:
        """How many times smaller the file is than all tensors in float32."""
        return self.float_bytes / self.num_bytes

    def __str__(self) -> str:
        rest = sum(t.num_bytes for t in self.tensors)
        rows = [
            *LayerTable(self.layers).rows(),
            ("quantised layers", "", "", "", f"{self.layers_bytes:,}", f"{1 / self.layers_ratio:.1%}"),
            (f"{len(self.tensors)} other tensors", "", "", "", f"{rest:,}", ""),
            ("whole file", "", "", "", f"{self.num_bytes:,}", f"{1 / self.ratio:.1%}" if self.float_bytes else "-"),
        ]
        size = f"{self.ratio:.1f} times smaller than float32, {self.layers_ratio:.1f} times on the quantised layers"
        return "\n".join([*_table(rows, left=2), "", size])


def _short(centers: Sequence[float]) -> str:
    told = [f"{c:.4g}" for c in (centers if len(centers) <= 4 else [centers[0], centers[1], centers[-1]])]
    return " ".join(told if len(centers) <= 4 else [*told[:2], f".. ({len(centers)}) ..", told[2]])


def entry_of(layer: QuantizedLayer) -> str:
    entry = [layer.name, list(layer.shape), NAMES[layer.dtype], layer.bits, len(layer.centers)]
    return json.dumps(entry, separators=(",", ":"))


def header_of(
    crc: str,
    layers: Sequence[QuantizedLayer],
    tied: Mapping[str, str],
    table: Mapping[str, tuple[str, list[int], int, int]],
) -> bytes:
    """Length and header, padded with spaces so that the data starts at a multiple of 8."""
    listed = "[" + ",".join(entry_of(r) for r in layers) + "]"
    values = [crc, VERSION, listed, json.dumps(dict(tied), separators=(",", ":"))]
    entries: dict[str, Any] = {"__metadata__": dict(zip(_META, values, strict=True))}
    for name, (dtype, shape, start, stop) in table.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


# ------------------------------------------------------------------------ read


class Parsed(NamedTuple):
    """A file whose structure and checksum are right: what is in it, and where. Values are not checked."""

    file: QuantizedFile  # the layers' centres are NaN still
    table: dict[str, tuple[str, list[int], int, int]]  # dtype, shape, start and end from the file's beginning


def parse(payload: bytes) -> Parsed:
    """Check a file's checksum and structure; allocates no more than a few times the header.

    Raises:
        TruncatedPayloadError: shorter or longer than its header says.
        ChecksumError: other bytes than were written.
        MalformedPayloadError: not this format or version, or a header that contradicts itself.
    """
    if len(payload) < CRC.stop:
        raise TruncatedPayloadError(f"Expected a file of at least {CRC.stop} bytes, but got {len(payload)}.")
    size = int.from_bytes(payload[:8], "little")
    if payload[8 : CRC.start] != _PREFIX:
        raise MalformedPayloadError(f"Expected a file of quantised weights, but it starts with {payload[:24]!r}.")
    if size > _MAX_HEADER:
        raise MalformedPayloadError(f"Expected a header of at most {_MAX_HEADER} bytes, but it claims {size}.")
    if len(payload) < 8 + size:
        raise TruncatedPayloadError(f"Expected a file of at least {8 + size} bytes, but got {len(payload)}.")
    view = memoryview(payload)
    crc = zlib.crc32(view[CRC.stop :], zlib.crc32(b"0" * 8, zlib.crc32(view[: CRC.start])))
    if payload[CRC] != f"{crc:08x}".encode():
        try:  # one that was merely cut short says so
            _structure(payload, size)
        except TruncatedPayloadError:
            raise
        except MalformedPayloadError:
            pass
        raise ChecksumError("The file does not match its checksum.")
    return _structure(payload, size)


def _structure(payload: bytes, size: int) -> Parsed:
    entries = _json(payload[8 : 8 + size], "header")
    meta = entries.pop("__metadata__", None) if isinstance(entries, dict) else None
    if not isinstance(meta, dict) or list(meta) != _META or not all(isinstance(v, str) for v in meta.values()):
        raise MalformedPayloadError(f"Expected a header with the metadata {_META} of a file of quantised weights.")
    if meta["quantized"] != VERSION:
        raise MalformedPayloadError(f"Expected format version {VERSION}, but got {meta['quantized']!a:.40}.")
    table: dict[str, tuple[str, list[int], int, int]] = {}
    stop = 0
    for name, entry in entries.items():
        if not isinstance(entry, dict) or list(entry) != ["dtype", "shape", "data_offsets"]:
            raise MalformedPayloadError(f"Expected dtype, shape and data_offsets of {name!a:.80}.")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise MalformedPayloadError(f"Expected a known dtype of {name!a:.80}, but got {dtype!a:.40}.")
        if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
            raise MalformedPayloadError(f"Expected a shape and two offsets of {name!a:.80}.")
        if offsets != [stop, stop + math.prod(shape) * DTYPES[dtype].itemsize]:
            raise MalformedPayloadError(
                f"Expected {name!a:.80} at {stop} to hold {shape} of {dtype}, but it spans {offsets[0]} to {offsets[1]}."
            )
        stop = offsets[1]
        table[name] = (dtype, shape, *offsets)
    if 8 + size + stop != len(payload):
        raise TruncatedPayloadError(f"Expected a file of {8 + size + stop} bytes, but got {len(payload)}.")
    layers = _layers(_json(meta["layers"].encode(errors="replace"), "table of layers"))
    tied = _json(meta["tied"].encode(errors="replace"), "table of tied tensors")
    names = {*(n for n in table if n not in (CENTERS, INDEX)), *(r.name for r in layers)}
    if not isinstance(tied, dict) or not all(
        isinstance(v, str) and v in names and k not in names for k, v in tied.items()
    ):
        raise MalformedPayloadError("Expected tied names of tensors that are in the file.")
    _check_arenas(layers, table)
    if len(names) != len(table) + len(layers) - 2 * bool(layers) or {CENTERS, INDEX} & {*names, *tied}:
        raise MalformedPayloadError("Expected every tensor once.")
    crc = meta["crc32"]
    if [r.name for r in layers] != sorted(r.name for r in layers) or list(tied) != sorted(tied):
        raise MalformedPayloadError("Expected layers and tied tensors by name.")
    if header_of(crc, layers, tied, table) != payload[: 8 + size] or list(table) != sorted(
        table, key=lambda n: (-DTYPES[table[n][0]].itemsize, n)
    ):
        raise MalformedPayloadError("The file's header is not in its canonical form.")
    plain = [PlainTensor(n, tuple(s), DTYPES[d]) for n, (d, s, _, _) in table.items() if n in names]
    shifted = {n: (d, s, a + 8 + size, b + 8 + size) for n, (d, s, a, b) in table.items()}
    return Parsed(QuantizedFile(len(payload), 8 + size, layers, plain, tied), shifted)


def _layers(listed: Any) -> list[QuantizedLayer]:
    layers = []
    for row in listed if isinstance(listed, list) else [None]:
        if not isinstance(row, list) or len(row) != 5 or not isinstance(row[0], str):
            raise MalformedPayloadError("Expected a table of layers: name, shape, dtype, bits, centres.")
        name, shape, dtype, bits, count = row
        if not _counts(shape) or dtype not in WEIGHTS or not _counts([bits, count]):
            raise MalformedPayloadError(f"Expected a shape, a floating dtype, bits and centres of {name!a:.80}.")
        if not 1 <= bits <= 8 or not 2 ** (bits - 1) < count + (count == 1) <= 2**bits:
            raise MalformedPayloadError(
                f"Expected 1 to 8 bits and as many centres of {name!a:.80}, but got {bits} and {count}."
            )
        layers.append(QuantizedLayer(name, tuple(shape), DTYPES[dtype], bits, [math.nan] * count))
    return layers


def _check_arenas(layers: Sequence[QuantizedLayer], table: Mapping[str, tuple[str, list[int], int, int]]) -> None:
    """Whether centres and indices have the sizes that the layers say."""
    wanted = {CENTERS: ("F32", sum(len(r.centers) for r in layers)), INDEX: ("U8", sum(_packed(r) for r in layers))}
    for name, (dtype, count) in wanted.items():
        found = table.get(name)
        if found is None if layers else found is not None:
            raise MalformedPayloadError(f"Expected {name} with quantised layers, and only with them.")
        if found is not None and (found[0] != dtype or found[1] != [count]):
            raise MalformedPayloadError(f"Expected {count} x {dtype} in {name}, but got {found[1]} of {found[0]}.")


def _packed(layer: QuantizedLayer) -> int:
    return (layer.numel * layer.bits + 7) // 8


def _counts(value: object) -> bool:
    """A short list of integers that could be sizes, and whose product could be one."""
    if (
        not isinstance(value, list)
        or len(value) > _MAX_DIMS
        or not all(type(v) is int and 0 <= v < 2**48 for v in value)
    ):
        return False
    return math.prod(v for v in value if v) < 2**56


def _json(text: bytes, what: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            raise MalformedPayloadError(f"The file's {what} holds a key twice.")
        return out

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except MalformedPayloadError:
        raise
    except (ValueError, RecursionError):
        raise MalformedPayloadError(f"The file's {what} is not JSON.") from None


def _tensor(payload: bytes, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """A copy of some bytes as a tensor."""
    if start == stop:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(memoryview(payload)[start:stop]), dtype=dtype)


def decode_centers(payload: bytes, parsed: Parsed) -> list[Tensor]:
    """The centres of every layer, float32.

    Raises:
        NonFiniteError: NaN or infinity.
        MalformedPayloadError: not ascending.
    """
    if not parsed.file.layers:
        return []
    _, _, start, stop = parsed.table[CENTERS]
    arena = _tensor(payload, start, stop, torch.float32)
    found = list(arena.split([len(r.centers) for r in parsed.file.layers]))
    for layer, c in zip(parsed.file.layers, found, strict=True):
        if not bool(torch.isfinite(c.to(layer.dtype)).all()):
            raise NonFiniteError(f"Expected finite centres of {layer.name!r}, but got NaN or infinity.")
        if not bool((c[1:] > c[:-1]).all()):
            raise MalformedPayloadError(
                f"Expected the centres of {layer.name!r} to be ascending, but got {c.tolist()!a:.200}."
            )
    return found


def decode(payload: bytes, parsed: Parsed) -> dict[str, Tensor]:
    """All tensors by name, on the CPU.

    Raises:
        PayloadError: as `decode_centers`; an index without a centre, or a bit where none can be.
    """
    state: dict[str, Tensor] = {}
    centers = decode_centers(payload, parsed)
    at = parsed.table[INDEX][2] if centers else 0
    for layer, c in zip(parsed.file.layers, centers, strict=True):
        packed = _tensor(payload, at, at + _packed(layer), torch.uint8)
        at += _packed(layer)
        if layer.numel * layer.bits % 8 and int(packed[-1]) >> layer.numel * layer.bits % 8:
            raise MalformedPayloadError(f"Expected zeros after the last index of {layer.name!r}, but got others.")
        index = ops.unpack(packed, layer.bits, layer.numel)
        if layer.numel and int(index.max()) >= len(c):
            raise MalformedPayloadError(
                f"Expected indices of {layer.name!r} below its {len(c)} centres, but got {int(index.max())}."
            )
        state[layer.name] = c.to(layer.dtype)[index.long()].view(layer.shape)
    for name, shape, dtype in parsed.file.tensors:
        _, _, start, stop = parsed.table[name]
        if dtype == torch.bool and start < stop and int(_tensor(payload, start, stop, torch.uint8).max()) > 1:
            raise MalformedPayloadError(f"Expected 0 or 1 in {name!r} only, but got something else.")
        state[name] = _tensor(payload, start, stop, dtype).view(shape)
    for alias, name in parsed.file.tied.items():
        state[alias] = state[name]
    return state
