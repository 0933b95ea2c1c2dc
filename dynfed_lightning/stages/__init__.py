"""Compression stages: each maps a table of tensors to another and back. `Codec` chains them."""

from __future__ import annotations

import re

import torch

from dynfed_lightning.errors import MalformedPayloadError
from dynfed_lightning.stages.base import CodecContext, Part, Stage, Table
from dynfed_lightning.stages.cast import Cast
from dynfed_lightning.stages.error_feedback import ErrorFeedback
from dynfed_lightning.stages.low_rank import LowRank
from dynfed_lightning.stages.quantize import Quantize
from dynfed_lightning.stages.rotate import Rotate
from dynfed_lightning.stages.skip_zeros import SkipZeros
from dynfed_lightning.stages.topk import TopK

__all__ = [
    "Cast",
    "CodecContext",
    "ErrorFeedback",
    "LowRank",
    "Part",
    "Quantize",
    "Rotate",
    "SkipZeros",
    "Stage",
    "Table",
    "TopK",
    "from_wire_name",
]

_CASTS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def from_wire_name(name: str) -> Stage | None:
    """A stage that decodes what the stage of this `Stage.wire_name` encoded; None for one that is not of this package.

    Raises:
        MalformedPayloadError: a stage of this package with an impossible argument.
    """
    match = re.fullmatch(r"([a-z0-9_]+)(?:\(([a-z0-9_.,-]*)\))?", name)
    if match is None:
        return None
    kind, argument = match[1], match[2]
    try:
        if kind == "quantize" and argument is not None and re.fullmatch(r"[1-9][0-9]{0,9}", argument):
            return Quantize(None, bucket=int(argument))
        if kind == "rotate" and argument is not None and re.fullmatch(r"[1-9][0-9]{0,3}", argument):
            return Rotate(int(argument))
        if kind == "cast" and argument in _CASTS:
            return Cast(_CASTS[argument])
    except ValueError as error:
        raise MalformedPayloadError(str(error)) from None
    plain = {"topk": TopK(fraction=1.0), "lowrank": LowRank(1.0), "skipzeros": SkipZeros()}
    return plain.get(name)
