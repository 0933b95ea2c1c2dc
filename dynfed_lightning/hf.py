"""Hugging Face's encoders as clients' models: by name or from a folder, ready for classification. Needs the extra ``text``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from dynfed_lightning.encoder import student_of
from dynfed_lightning.images import missing
from dynfed_lightning.partition import check_int


def load_encoder(
    name_or_folder: str,
    num_classes: int = 2,
    layers: int | None = None,
    output_hidden_states: bool = True,
    output_attentions: bool = False,
    freeze_embeddings: bool = False,
    pretrained: bool = True,
) -> nn.Module:
    """A sequence classifier of the `transformers` library (``AutoModelForSequenceClassification``).

    It takes the data module's batches as they are and goes into `ClientModule`, a user's own module, or a configuration:
    ``model: {class_path: hf, init_args: {name_or_folder: ./my-bert, num_classes: 2}}``. A classification head that the
    checkpoint lacks, or has for another number of classes, is drawn from torch's global generator.

    Args:
        name_or_folder: a folder with ``config.json`` and weights, which never touches the network; else a name on the hub.
        num_classes: C.
        layers: keep only so many blocks, the first ones (`student_of`); ``None``: all.
        output_hidden_states: return them beside the logits, for losses on hidden states.
        output_attentions: return the attention maps (slower: they have to be made).
        freeze_embeddings: stop training the embeddings: then they never travel.
        pretrained: ``False``: only the configuration is read, and all weights are new.

    Raises:
        ImportError: `transformers` is not installed.
        ValueError: nothing of that name, or no encoder with a classification head; more layers than it has.
    """
    try:
        import transformers
    except ImportError:
        raise missing("transformers", "text") from None
    check_int("num_classes", num_classes, 2)
    local = Path(name_or_folder).exists()
    if local and not (Path(name_or_folder) / "config.json").is_file():
        raise ValueError(f"Expected `name_or_folder` to be a folder with config.json, but {name_or_folder!r} has none.")
    auto = transformers.AutoModelForSequenceClassification
    implementation = {"attn_implementation": "eager"} if output_attentions else {}  # the others make no maps
    try:
        with _quiet(transformers):
            config: Any = transformers.AutoConfig.from_pretrained(
                name_or_folder,
                local_files_only=local,
                num_labels=num_classes,
                output_hidden_states=output_hidden_states,
                output_attentions=output_attentions,
                **implementation,
            )
            if pretrained:
                model: Any = auto.from_pretrained(
                    name_or_folder,
                    config=config,
                    local_files_only=local,
                    ignore_mismatched_sizes=True,
                    **implementation,
                )
            else:
                model = auto.from_config(config, **implementation)
    except Exception as error:  # the hub's client raises a dozen kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        where = "the folder" if local else "no folder, and the hub's model"
        raise ValueError(
            f"Expected `name_or_folder` to be an encoder that can classify, but {where} {name_or_folder!r} could not be "
            f"loaded: {reason}"
        ) from error
    if layers is not None:
        model = student_of(model, layers)
    if freeze_embeddings:
        embeddings = getattr(model.base_model, "embeddings", None)
        (embeddings if isinstance(embeddings, nn.Module) else model.get_input_embeddings()).requires_grad_(False)
    return model


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
