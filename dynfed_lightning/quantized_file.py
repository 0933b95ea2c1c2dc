"""Quantised models as files: packed indices and centres instead of weights, in the safetensors format, read strictly.

::

    u64   length of the header (a multiple of 8, little endian)
    JSON  {"__metadata__": {"crc32", "quantized", "layers", "tied"}, "<tensor>": {"dtype", "shape", "data_offsets"}, ...}
    data  tensors back to back, widest dtype first

``__centers__`` (F32) holds the centres of all quantised layers, ``__index__`` (U8) their indices, each layer's packed by
`ops.pack` at its bits and padded to whole bytes; both in the order of ``layers``, which is that of the names:
``[name, shape, dtype, bits, centres]``.
Every other tensor of the state dict (biases, norms, buffers of any dtype) is there under its own name, as it is;
``tied`` maps names of shared tensors to the one that is stored. ``crc32`` is computed over the whole file with eight zeros
in its own place. There is exactly one file for a given content; a reader builds the header again and compares. Everything is
checked before anything is allocated for it, and decoding to float32 gives the same bits on every machine.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dynfed_lightning import ops
from dynfed_lightning._quantized_format import (
    CENTERS,
    CRC,
    INDEX,
    NAMES,
    WEIGHTS,
    LayerTable,
    PlainTensor,
    QuantizedFile,
    QuantizedLayer,
    decode,
    decode_centers,
    entry_of,
    header_of,
    parse,
)
from dynfed_lightning.errors import SchemaMismatchError

__all__ = [
    "LayerTable",
    "PlainTensor",
    "QuantizedFile",
    "QuantizedLayer",
    "describe_quantized",
    "load_quantized",
    "quantized_state_dict",
    "save_quantized",
]


def save_quantized(
    module: nn.Module, path: str | os.PathLike[str], centers: Mapping[str, Tensor] | None = None
) -> QuantizedFile:
    """Write a module whose layers hold few values each; the file decodes to the same bits.

    Args:
        module: any module, on any device; its ``state_dict`` is what is saved.
        path: of the file, by convention ``.safetensors``. It is written atomically: all of it, or what was there stays.
        centers: float32 ``[m]`` per quantised tensor, by name, 1 <= m <= 256, e.g. `QuantizationAware.centers`; None: tensors
            of two or more dimensions with at most 256 distinct values are found, and packed where that is smaller.

    Returns:
        What was written, with its size against float32.

    Raises:
        ValueError: weights that are not among their centres, or a state dict with something else than dense tensors.
    """
    state, tied = _state(module)
    layers: list[QuantizedLayer] = []
    codes: dict[str, Tensor] = {}
    for name in centers or ():
        if name not in state:
            raise ValueError(f"Expected `centers` of tensors of the module, but {name!r} is none of {list(state)}.")
    for name in sorted(state if centers is None else centers):
        t = state[name]
        if centers is None:
            c = _distinct(t)
        else:
            c = centers[name].detach().float().cpu().flatten().unique()
            fits = NAMES.get(t.dtype) in WEIGHTS and bool(torch.isfinite(c.to(t.dtype)).all())
            if not 1 <= len(c) <= 256 or not fits:
                raise ValueError(
                    f"Expected 1 to 256 finite centres of floating weights of {name!r}, but got {len(c)} of {t.dtype}."
                )
        if c is None:
            continue
        index = _index(t, c)
        if index is None:
            if centers is None:
                continue  # e.g. both zeros
            raise ValueError(
                f"Expected the weights of {name!r} to be among its {len(c)} centres, but they are not: QuantizationAware makes "
                "them so when training ends."
            )
        bits = max((len(c) - 1).bit_length(), 1)
        layers.append(QuantizedLayer(name, tuple(t.shape), t.dtype, bits, c.tolist()))
        codes[name] = ops.pack(index, bits)
    data = {n: t for n, t in state.items() if n not in codes}
    if layers:
        data[CENTERS] = torch.tensor([v for r in layers for v in r.centers], dtype=torch.float32)
        data[INDEX] = torch.cat([codes[r.name] for r in layers])
    ordered = sorted(data, key=lambda n: (-data[n].dtype.itemsize, n))
    table, stop = {}, 0
    for name in ordered:
        size = data[name].numel() * data[name].dtype.itemsize
        table[name] = (NAMES[data[name].dtype], list(data[name].shape), stop, stop + size)
        stop += size
    header = header_of("0" * 8, layers, tied, table)
    chunks = [data[n].reshape(-1).view(torch.uint8).numpy() for n in ordered if data[n].numel()]
    crc = zlib.crc32(header)
    for chunk in chunks:
        crc = zlib.crc32(chunk.data, crc)
    header = header[: CRC.start] + f"{crc:08x}".encode() + header[CRC.stop :]
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(header)
            for chunk in chunks:
                file.write(chunk.data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    plain = [PlainTensor(n, tuple(data[n].shape), data[n].dtype) for n in ordered if n not in (CENTERS, INDEX)]
    return QuantizedFile(len(header) + stop, len(header), layers, plain, tied)


def _state(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The module's tensors, contiguous and on the CPU, and which names share one."""
    state: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[int, str] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.dtype not in NAMES:
            what = (
                f"{value.dtype} {value.layout} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
            )
            raise ValueError(f"Expected a state dict of dense tensors of a common dtype, but {name!r} is {what}.")
        if name in (CENTERS, INDEX, "__metadata__"):
            raise ValueError(f"Expected no tensor called {name!r}, which the file format uses itself.")
        if id(value) in seen:
            tied[name] = seen[id(value)]
            continue
        seen[id(value)] = name
        state[name] = value.detach().cpu().contiguous()
    return state, dict(sorted(tied.items()))


def _distinct(t: Tensor) -> Tensor | None:
    """The values of a tensor as centres, if they are few enough for the file to be smaller."""
    if t.ndim < 2 or not t.numel() or NAMES[t.dtype] not in WEIGHTS:
        return None
    if len(t.flatten()[:4096].unique()) > 256:  # most weights: without sorting them all
        return None
    c = t.unique().float()
    if len(c) > 256 or not bool(torch.isfinite(c).all()):
        return None
    layer = QuantizedLayer("", tuple(t.shape), t.dtype, max((len(c) - 1).bit_length(), 1), c.tolist())
    return c if layer.num_bytes + len(entry_of(layer)) < t.numel() * t.dtype.itemsize else None


def _index(t: Tensor, c: Tensor) -> Tensor | None:
    """Which centre every weight is, uint8 in the shape of `t`; None if one is none of them, to the bit."""
    values = c.to(t.dtype)
    index = torch.searchsorted(values.double(), t.double()).clamp_(max=len(c) - 1)
    same = values[index].view(torch.uint8) == t.view(torch.uint8) if t.ndim else values[index] == t
    return index.to(torch.uint8) if bool(same.all()) else None


# ------------------------------------------------------------------------ read


def describe_quantized(path: str | os.PathLike[str]) -> QuantizedFile:
    """What a file of quantised weights holds; ``print`` shows it as a table.

    Raises:
        PayloadError: a file that is cut short, changed, or not of this format.
        OSError: it cannot be read.
    """
    payload = Path(path).read_bytes()
    parsed = parse(payload)
    centers = decode_centers(payload, parsed)
    layers = [r._replace(centers=c.tolist()) for r, c in zip(parsed.file.layers, centers, strict=True)]
    return replace(parsed.file, layers=layers)


def quantized_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a file by name, decoded, on the CPU; names of shared tensors share one.

    Raises:
        PayloadError: a file that is cut short, changed or not of this format, or that holds indices without a centre, or
            centres that are not finite and ascending.
        OSError: it cannot be read.
    """
    payload = Path(path).read_bytes()
    return decode(payload, parse(payload))


def load_quantized(module: nn.Module, path: str | os.PathLike[str]) -> QuantizedFile:
    """Read a file into a module that has the same tensors, to the bit, wherever the module is.

    Args:
        module: whose ``state_dict`` has the file's names, shapes and dtypes. After an error it is as it was.
        path: of the file.

    Returns:
        What was read.

    Raises:
        SchemaMismatchError: another architecture: names the tensor, and what was expected and found.
        PayloadError: see `quantized_state_dict`.
        OSError: the file cannot be read.
    """
    payload = Path(path).read_bytes()
    parsed = parse(payload)
    known = {r.name: (r.shape, r.dtype) for r in parsed.file.layers}
    known.update({t.name: (t.shape, t.dtype) for t in parsed.file.tensors})
    known.update({alias: known[name] for alias, name in parsed.file.tied.items()})
    live = module.state_dict(keep_vars=True)
    who = type(module).__name__
    for name, value in live.items():
        if name not in known:
            raise SchemaMismatchError(f"Expected {name!r} of {who}, but the file has none: it holds another model.")
        shape, dtype = known[name]
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if found != shape:
            raise SchemaMismatchError(f"Expected {name!r} of shape {found}, as in {who}, but the file has {shape}.")
        if value.dtype != dtype:
            raise SchemaMismatchError(
                f"Expected {name!r} of {value.dtype}, as in {who}, but the file has {dtype}: `module.to({dtype})` holds it."
            )
        if value.is_meta:
            raise SchemaMismatchError(f"Expected a module in memory, but {name!r} of {who} is on the meta device.")
    for name in known:
        if name not in live:
            raise SchemaMismatchError(f"Expected the tensors of {who} alone, but the file has {name!r} too.")
    state = decode(payload, parsed)
    first: dict[int, str] = {}
    for name, value in live.items():
        other = first.setdefault(id(value), name)
        if other != name and not torch.equal(state[other], state[name]):
            raise SchemaMismatchError(f"Expected the same values of {other!r} and {name!r}, which {who} shares.")
    with torch.no_grad():
        for name, value in live.items():
            value.data.copy_(state[name])
    centers = decode_centers(payload, parsed)
    layers = [r._replace(centers=c.tolist()) for r, c in zip(parsed.file.layers, centers, strict=True)]
    return replace(parsed.file, layers=layers)
