"""Hugging Face's encoders as clients' models: by name or from a folder, ready for classification. Needs the extra ``text``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dynfed_lightning.encoder import student_of
from dynfed_lightning.images import missing
from dynfed_lightning.partition import check_int

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def load_encoder(
    name_or_folder: str,
    num_classes: int = 2,
    layers: int | None = None,
    output_hidden_states: bool = True,
    output_attentions: bool = False,
    freeze_embeddings: bool = False,
    pretrained: bool = True,
    dtype: str | torch.dtype = "float32",
) -> nn.Module:
    """A sequence classifier of the `transformers` library (``AutoModelForSequenceClassification``).

    It takes the data module's batches as they are and goes into `ClientModule`, a user's own module, or a configuration:
    ``model: {class_path: hf, init_args: {name_or_folder: ./my-bert, num_classes: 2}}``. A classification head that the
    checkpoint lacks, or has for another number of classes, is drawn from torch's global generator, and so is a pooler that it
    lacks; all else has to be in the checkpoint.

    Args:
        name_or_folder: a folder with ``config.json`` and weights, which never touches the network; else a name on the hub.
        num_classes: C.
        layers: keep only so many blocks, the first ones (`student_of`); ``None``: all.
        output_hidden_states: return them beside the logits, for losses on hidden states.
        output_attentions: return the attention maps (slower: they have to be made).
        freeze_embeddings: stop training the embeddings: then they never travel.
        pretrained: ``False``: only the configuration is read, and all weights are new.
        dtype: of the weights, whatever the checkpoint's is: ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"float64"``. To
            train in half precision, leave it and give the trainer ``precision="bf16-mixed"``.

    Raises:
        ImportError: `transformers` is not installed.
        ValueError: nothing of that name, or no encoder with a classification head; weights that are missing or have another
            shape than the configuration says; more layers than it has.
    """
    try:
        import transformers
    except ImportError:
        raise missing("transformers", "text") from None
    check_int("num_classes", num_classes, 2)
    kind = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if kind not in _DTYPES.values():
        raise ValueError(f"Expected `dtype` to be one of {list(_DTYPES)}, but got {dtype!r}.")
    local = Path(name_or_folder).exists()
    if local and not (Path(name_or_folder) / "config.json").is_file():
        raise ValueError(f"Expected `name_or_folder` to be a folder with config.json, but {name_or_folder!r} has none.")
    auto = transformers.AutoModelForSequenceClassification
    # The other implementations make no maps.
    options: dict[str, Any] = {"dtype": kind} | ({"attn_implementation": "eager"} if output_attentions else {})
    loaded: dict[str, Any] = {}
    try:
        with _quiet(transformers):
            config: Any = transformers.AutoConfig.from_pretrained(
                name_or_folder,
                local_files_only=local,
                num_labels=num_classes,
                output_hidden_states=output_hidden_states,
                output_attentions=output_attentions,
                **options,
            )
            if pretrained:
                model: Any
                model, loaded = auto.from_pretrained(
                    name_or_folder,
                    config=config,
                    local_files_only=local,
                    ignore_mismatched_sizes=True,  # a head for another number of classes
                    output_loading_info=True,
                    **options,
                )
            else:
                model = auto.from_config(config, **options)
    except Exception as error:  # the hub's client raises a dozen kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        where = "the folder" if local else "no folder, and the hub's model"
        raise ValueError(
            f"Expected `name_or_folder` to be an encoder that can classify, but {where} {name_or_folder!r} could not be "
            f"loaded: {reason}"
        ) from error
    lacking = _lacking(model, loaded)
    if lacking:
        raise ValueError(
            f"Expected `name_or_folder` to hold all of the encoder's weights, but it lacks {lacking[:3]} "
            f"({len(lacking)} in all)."
        )
    if layers is not None:
        model = student_of(model, layers)
    if freeze_embeddings:
        embeddings = getattr(model.base_model, "embeddings", None)
        (embeddings if isinstance(embeddings, nn.Module) else model.get_input_embeddings()).requires_grad_(False)
    return model


def _lacking(model: nn.Module, loaded: dict[str, Any]) -> list[str]:
    """The encoder's weights that came from no checkpoint, absent there or of another shape; without the head and the pooler.

    `transformers` draws them anew and only logs it: a checkpoint whose names do not match would be a random model.
    """
    base = f"{model.base_model_prefix}."
    absent = [name for name in loaded.get("missing_keys", ()) if "pooler" not in name.split(".")]
    other = [found[0] for found in loaded.get("mismatched_keys", ())]
    body = model.base_model is not model  # else there is no telling the head from the rest
    return sorted(name for name in (*absent, *other) if name.startswith(base) or not body)


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and no report of a new head: they would appear for every model of every run."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
