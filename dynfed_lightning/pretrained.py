"""BERT checkpoints in Hugging Face's layout, read with safetensors alone and renamed for `encoder.TextEncoder`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_MARK = "embeddings.word_embeddings.weight"
# Beginnings of names, after whatever stands before `_MARK` (such as "bert.").
_NAMES = (
    (r"embeddings\.word_embeddings\.", "features.embeddings.word."),
    (r"embeddings\.position_embeddings\.", "features.embeddings.position."),
    (r"embeddings\.token_type_embeddings\.", "features.embeddings.token_type."),
    (r"embeddings\.LayerNorm\.", "features.embeddings.norm."),
    (r"encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)\.", r"features.layers.\1.attention.\2."),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"features.layers.\1.attention.output."),
    (r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.", r"features.layers.\1.attention_norm."),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.", r"features.layers.\1.intermediate."),
    (r"encoder\.layer\.(\d+)\.output\.dense\.", r"features.layers.\1.output."),
    (r"encoder\.layer\.(\d+)\.output\.LayerNorm\.", r"features.layers.\1.output_norm."),
    (r"pooler\.dense\.", "features.pooler."),
)


def bert_weights(
    source: str | Path | Mapping[str, Tensor], layers: int | None, heads: int | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A checkpoint's form and weights.

    Args:
        source: a folder, or a state dict.
        layers: see `encoder.TextEncoder.from_pretrained`, as `heads`.

    Returns:
        arguments of `TextEncoder` (sizes, dropout, activation), and tensors by its names.

    Raises:
        ValueError: see there.
    """
    if isinstance(source, Mapping):
        told, tensors = {}, dict(source)
        if heads is None:
            raise ValueError(
                "Expected `heads` to be given with a state dict, whose shapes do not tell it, but got None."
            )
    else:
        told, tensors = _config(Path(source)), _read(Path(source))
        if heads is not None:
            raise ValueError(f"Expected `heads` only with a state dict, but got {heads} with a folder.")
    mark = next((name for name in tensors if name.endswith(_MARK)), None)
    if mark is None:
        raise ValueError(f"Expected a checkpoint of BERT with `{_MARK}`, but its tensors are {sorted(tensors)[:5]} ...")
    weights = _renamed(tensors, mark.removesuffix(_MARK))
    depths = [int(m[1]) for name in weights if (m := re.match(r"features\.layers\.(\d+)\.", name))]
    most = max(depths, default=-1) + 1
    wanted = most if layers is None else layers
    if not 1 <= wanted <= most:
        raise ValueError(f"Expected `layers` to be from 1 to the checkpoint's {most}, but got {wanted}.")
    kept = {
        name: t.detach().float()
        for name, t in weights.items()
        if not (m := re.match(r"features\.layers\.(\d+)\.", name)) or int(m[1]) < wanted
    }
    try:
        word, position, kinds, wide = (
            weights[name].shape
            for name in (
                "features.embeddings.word.weight",
                "features.embeddings.position.weight",
                "features.embeddings.token_type.weight",
                "features.layers.0.intermediate.weight",
            )
        )
    except KeyError as error:
        raise ValueError(f"Expected a checkpoint of BERT, but it lacks what becomes {error}.") from None
    found = {
        "vocab_size": word[0],
        "hidden": word[1],
        "layers": wanted,
        "heads": told.get("num_attention_heads", heads),
        "intermediate": wide[0],
        "max_length": position[0],
        "num_token_types": kinds[0],
        "dropout": told.get("hidden_dropout_prob", 0.1),
        "activation": told.get("hidden_act", "gelu"),
        "layer_norm_eps": told.get("layer_norm_eps", 1e-12),
        "pad_token_id": told.get("pad_token_id", 0),
    }
    return found, kept


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"Expected `source` to be a folder with config.json, but {folder} has none.")
    told = json.loads(file.read_text(encoding="utf-8"))
    kind = told.get("model_type", "bert")
    position = told.get("position_embedding_type", "absolute")
    if kind != "bert" or position != "absolute" or told.get("is_decoder"):
        what = f"model_type {kind!r}" if kind != "bert" else f"{position!r} positions" if position else "a decoder"
        raise ValueError(
            f"Expected a BERT encoder with absolute positions in {folder}, but it has {what}: "
            "`dynfed_lightning.hf.load_encoder` loads others."
        )
    return told


def _read(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if (folder / "model.safetensors").is_file():
        return load_file(folder / "model.safetensors")
    if (folder / "pytorch_model.bin").is_file():
        return torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    raise ValueError(f"Expected model.safetensors or pytorch_model.bin in {folder}, but there is neither.")


def _renamed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        # Checkpoints of the first TensorFlow models call a layer norm's weight and bias gamma and beta.
        plain = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name.removeprefix(prefix)))
        for pattern, ours in _NAMES:
            if re.match(pattern, plain):
                renamed[re.sub(f"^{pattern}", ours, plain)] = tensor
        if name.startswith("classifier."):
            renamed[f"head.{name.removeprefix('classifier.')}"] = tensor
    return renamed
