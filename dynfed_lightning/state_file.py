"""One client's state as one safetensors file: written whole or not at all, and checked when it is read.

The tensors are named by numbers. The metadata holds, beside the client's id, what is around them as JSON: of a dict
``{"d": [[key, value], ...]}``, of a list ``{"l": [...]}``, of a tuple ``{"t": [...]}``, of a tensor ``{"x": number}`` (with its
dtype and shape where safetensors may not know it), a number or string as it is. ``crc32`` is that of the file's bytes with
the eight digits themselves as zeros, so that a flipped bit is found wherever it lies. No pickle, and nothing that runs.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

State = dict[str, Any]
FORMAT = "dynfed-client-state-1"
_BEFORE = b'"crc32":"'
# What every version of safetensors knows; anything else is stored as bytes.
_PLAIN = {
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
}


class StateError(ValueError):
    """A client's state on disk is missing, damaged, or not the one that was asked for."""


def to_bytes(client_id: int, state: State) -> tuple[bytes, int]:
    """The file of a client's state, and its CRC-32.

    Args:
        client_id: whose.
        state: nested dicts (keys: strings, numbers), lists and tuples of tensors, numbers, strings and None. Tensors are
            stored contiguously, on the CPU; one that occurs twice is stored once, and is one again when read.

    Raises:
        TypeError: it holds something else; the message says where.
    """
    writer = _Writer()
    tree = writer.node(state, "")
    notes = {"format": FORMAT, "client": str(client_id), "crc32": "00000000", "tree": json.dumps(tree)}
    data = bytearray(safetensors.torch.save(writer.tensors, notes))
    place = _place(data)
    crc = _checksum(data, place)
    data[place : place + 8] = f"{crc:08x}".encode()
    return bytes(data), crc


def from_bytes(client_id: int, data: bytes, path: str | Path, crc: int | None = None) -> State:
    """What `to_bytes` was given.

    Args and raises: as `check_bytes`.
    """
    tree = json.loads(check_bytes(client_id, data, path, crc)["tree"])
    state: State = _read(tree, safetensors.torch.load(data))
    return state


def check_bytes(client_id: int, data: bytes, path: str | Path, crc: int | None = None) -> dict[str, str]:
    """The metadata of a file, if it is whole and the right one.

    Args:
        client_id: whose state it must be.
        data: the file's bytes.
        path: for messages.
        crc: the CRC-32 it must have; None: the one the file says it has.

    Raises:
        StateError: it is damaged, another client's, or another version than `crc` says.
    """

    def refuse(why: str) -> StateError:
        return StateError(f"Expected {path} to hold the state of client {client_id}, but {why}.")

    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        notes: dict[str, str] = header["__metadata__"]
        known, client = notes["format"] == FORMAT, notes["client"]
        place = _place(data)
        written = int(data[place : place + 8], 16)
    except (ValueError, KeyError, TypeError):
        raise refuse(f"it is damaged: {len(data)} bytes that are no such file") from None
    if not known:
        raise refuse(f"it is of the format {notes['format']!r}")
    if _checksum(data, place) != written:
        raise refuse("it is damaged: its checksum is wrong (a truncated file, or a flipped bit)")
    if client != str(client_id):
        raise refuse(f"it holds that of client {client}")
    if crc is not None and written != crc:
        raise refuse(f"its checksum is {written:08x} instead of {crc:08x}: it is of another run or another round")
    return notes


def _checksum(data: bytes | bytearray, place: int) -> int:
    """CRC-32 with zeros for its own eight digits."""
    view = memoryview(data)
    return zlib.crc32(view[place + 8 :], zlib.crc32(b"00000000", zlib.crc32(view[:place])))


def _place(data: bytes | bytearray) -> int:
    """Where the eight digits of the checksum are. The header is compact JSON, and strings in it cannot hold a bare quote."""
    start = data.find(_BEFORE)
    if start < 0:
        raise ValueError("no checksum")
    return start + len(_BEFORE)


def check_state(state: State) -> None:
    """Refuse what `to_bytes` cannot store, without reading any tensor.

    Raises:
        TypeError: as `to_bytes`.
    """
    _Checker().node(state, "")


class _Writer:
    """Takes a state apart: tensors by number, the rest as JSON."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._numbers: dict[tuple[Any, ...], str] = {}
        self._storages: set[int] = set()

    def node(self, value: Any, where: str) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value, where)
        if isinstance(value, dict):
            for key in value:
                if key is not None and not isinstance(key, str | int | float):
                    raise self._refuse(key, f"{where}.<key>")
            # bool is an int, and JSON tells them apart.
            return {"d": [[k, self.node(v, f"{where}.{k}")] for k, v in value.items()]}
        if isinstance(value, list | tuple):
            return {
                "l" if isinstance(value, list) else "t": [self.node(v, f"{where}.{i}") for i, v in enumerate(value)]
            }
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, int | float):
            return int(value) if isinstance(value, int) else float(value)
        raise self._refuse(value, where)

    @staticmethod
    def _refuse(value: Any, where: str) -> TypeError:
        return TypeError(
            "Expected a client's state to hold dense tensors, numbers, strings, lists and dicts, "
            f"but `{where.removeprefix('.')}` is a {type(value).__name__}."
        )

    def _check(self, tensor: Tensor, where: str) -> None:
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
            raise self._refuse(tensor, where)

    def _tensor(self, tensor: Tensor, where: str) -> dict[str, Any]:
        self._check(tensor, where)
        t = tensor.detach()
        key = (t.device, t.data_ptr(), t.dtype, tuple(t.shape), t.stride(), t.is_conj(), t.is_neg())
        number = self._numbers.get(key) if t.numel() else None
        if number is None:
            number = self._numbers[key] = str(len(self.tensors))
            whole = t.cpu().resolve_conj().resolve_neg().contiguous()
            if t.dtype not in _PLAIN:
                whole = whole.reshape(-1).view(torch.uint8)
            storage = whole.untyped_storage().data_ptr()
            # safetensors refuses tensors that overlap.
            self.tensors[number] = whole.clone() if storage in self._storages else whole
            self._storages.add(storage)
        if t.dtype in _PLAIN:
            return {"x": number}
        return {"x": number, "dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape)}


class _Checker(_Writer):
    """Looks at what a `_Writer` would take apart."""

    def _tensor(self, tensor: Tensor, where: str) -> dict[str, Any]:
        self._check(tensor, where)
        return {}


def _read(node: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    if "x" in node:
        t = tensors[node["x"]]
        return t if "dtype" not in node else t.clone().view(getattr(torch, node["dtype"])).reshape(node["shape"])
    if "d" in node:
        return {k: _read(v, tensors) for k, v in node["d"]}
    if "l" in node:
        return [_read(v, tensors) for v in node["l"]]
    return tuple(_read(v, tensors) for v in node["t"])


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that after a crash at any moment there is the old one or the new one, whole.

    A temporary file beside it (``.<name>.part``), flushed to the disk, renamed over it; then the folder is flushed too.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Make renames in `folder` outlast a power failure, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems
        pass
    finally:
        os.close(descriptor)
