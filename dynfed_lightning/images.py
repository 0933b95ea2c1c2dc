"""Encoded images to one uint8 tensor, once: decoding with pillow and a cache on disk."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_GREY, _COLOUR = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
# Below this many images decoding takes well under a second, and a cache file is not worth its disk space.
CACHE_FROM = 4096
_VERSION = "1"


def missing(package: str, extra: str = "data") -> ImportError:
    """The error for a package of an extra that is not installed."""
    return ImportError(f"Expected {package!r} to be installed, but it is not: pip install dynfed-lightning[{extra}]")


def decode_images(cells: Sequence[Any], image_size: int | None = None, column: str = "image") -> Tensor:
    """Decode encoded images, all into the same size and mode.

    Args:
        cells: a ``{"bytes", "path"}`` mapping (the layout of the `datasets` library), bytes, or a path, for every row.
        image_size: resize to this many pixels a side; ``None``: every image must have the size of the first.
        column: its name, for errors.

    Returns:
        uint8 ``[n, 1, H, W]`` where all images are grey, else ``[n, 3, H, W]``.

    Raises:
        ValueError: an image that cannot be decoded, or of another size than the first.
        ImportError: pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        raise missing("pillow") from None

    def opened(row: int) -> Any:
        cell = cells[row]
        if isinstance(cell, dict):
            cell = cell.get("bytes") or cell.get("path")
        if not isinstance(cell, bytes | str | Path):
            raise ValueError(f"Expected an encoded image in row {row} of `{column}`, but got {type(cell).__name__}.")
        try:
            image = Image.open(io.BytesIO(cell) if isinstance(cell, bytes) else cell)
            image.load()
        except (OSError, SyntaxError) as error:
            raise ValueError(f"Expected an image in row {row} of `{column}`, but it cannot be read: {error}") from None
        if image.mode not in _GREY + _COLOUR:
            raise ValueError(f"Expected 8-bit images in `{column}`, but row {row} has pillow's mode {image.mode!r}.")
        return image

    mode, row = "L", 0
    out: np.ndarray = np.empty((0, 0, 0), np.uint8)
    while row < len(cells):
        image = opened(row)
        if mode == "L" and image.mode not in _GREY:
            mode, row = "RGB", 0  # the first coloured image: start again, all in colour
            continue
        if image.mode != mode:
            image = image.convert(mode)
        if image_size is not None and image.size != (image_size, image_size):
            image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
        pixels = np.asarray(image)
        if row == 0:
            out = np.empty((len(cells), *pixels.shape), np.uint8)
        elif pixels.shape != out.shape[1:]:
            raise ValueError(
                f"Expected every image of `{column}` to be {out.shape[2]}x{out.shape[1]} pixels like the first, but row {row} "
                f"is {pixels.shape[1]}x{pixels.shape[0]}: give `image_size`."
            )
        out[row] = pixels
        row += 1
    images = torch.from_numpy(out)
    return images.unsqueeze(1) if mode == "L" else images.permute(0, 3, 1, 2).contiguous()


def cache_folder(cache_dir: str | Path | None) -> Path:
    """Where decoded images are kept: `cache_dir`, else ``$DYNFED_CACHE``, else ``$XDG_CACHE_HOME/dynfed_lightning``."""
    if cache_dir is not None:
        return Path(cache_dir)
    if os.environ.get("DYNFED_CACHE"):
        return Path(os.environ["DYNFED_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynfed_lightning"


def cache_key(sources: Sequence[Path | str], **options: Any) -> str:
    """A hex key that changes with any source's path, size or time of change, and with how it is read."""
    told: list[Any] = [_VERSION, options]
    for s in sources:
        if isinstance(s, Path):
            stat = s.stat()
            told.append([str(s.resolve()), stat.st_size, stat.st_mtime_ns])
        else:
            told.append(s)
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:32]


def read_cache(file: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """The tensors and notes of a cache file; ``None`` if it is not there or not whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None


def write_cache(file: Path, tensors: dict[str, Tensor], notes: dict[str, str]) -> None:
    """Write a cache file so that readers see the whole of it or nothing; a folder that cannot be written is a warning."""
    from safetensors.torch import save_file

    temporary = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".part")
        os.close(handle)
        save_file(tensors, temporary, metadata=notes)
        os.replace(temporary, file)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        what = "Tokens" if notes.get("kind") == "tokens" else "Decoded images"
        warnings.warn(f"{what} are not cached, since {file.parent} cannot be written: {error}", stacklevel=2)
