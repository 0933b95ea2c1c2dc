"""Add what the last round's compression lost to this round's tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dynfed_lightning.stages.base import (
    CodecContext,
    Meta,
    Part,
    Stage,
    Table,
    decode_chain,
    encode_chain,
    flatten,
    layout_chain,
)

_KEY = "error_feedback"


class ErrorFeedback(Stage):
    """Error feedback (Seide et al., Interspeech 2014; Karimireddy et al., ICML 2019, algorithm 2) around a chain of stages.

    With residual e (0 at first), the sender encodes ``p = x + e`` and keeps ``e <- p - decode(encode(p))``; so the sum of all
    that was decoded equals the sum of all inputs less the last residual. The residual lives in ``ctx.state`` (float32, or
    float64 for float64 tensors) and changes only if the whole `Codec.encode` succeeded. The receiver needs nothing for it: the
    payload is one of the wrapped chain, and a codec without the error feedback decodes it.

    Args:
        stages: the stages (or one `Codec`) to wrap; none: those that follow in the codec. Must be the first stage of its codec.

    Raises:
        ValueError: error feedback inside error feedback.
    """

    def __init__(self, *stages: Any) -> None:
        self.stages_inside = flatten(stages)
        if any(isinstance(s, ErrorFeedback) for s in self.stages_inside):
            raise ValueError("Expected `stages` without error feedback of their own, but got one in another.")
        self.lossless = all(s.lossless for s in self.stages_inside)

    @property
    def wire_name(self) -> str:
        return "|".join(s.wire_name for s in self.leaves)

    @property
    def leaves(self) -> tuple[Stage, ...]:
        return tuple(leaf for s in self.stages_inside for leaf in s.leaves)

    def run(self, table: Table, ctx: CodecContext) -> tuple[Table, list[Meta]]:
        if self.lossless:
            return encode_chain(self.stages_inside, table, ctx)
        memory: dict[str, Tensor] = ctx.state.get(_KEY, {})
        wanted: dict[str, Tensor] = {}  # x + e, in the residual's precision
        tensors: list[Tensor] = []
        for part, tensor in zip(table.parts, table.tensors, strict=True):
            if part.compressible:
                precise = tensor.to(torch.float64 if part.dtype == torch.float64 else torch.float32)
                kept = _residual(memory, part.name, precise)
                wanted[part.name] = precise if kept is None else precise + kept
                tensor = wanted[part.name].to(part.dtype)
            tensors.append(tensor)
        inner, metas = encode_chain(self.stages_inside, Table(table.parts, tensors), ctx)
        layers = layout_chain(self.leaves, table.parts, metas)
        decoded, _ = decode_chain(self.leaves, layers, inner.tensors, metas)
        ctx.state[_KEY] = {
            part.name: wanted[part.name] - out.to(wanted[part.name].dtype)
            for part, out in zip(table.parts, decoded, strict=True)
            if part.compressible
        }
        return inner, metas

    def layout(self, parts: tuple[Part, ...], meta: Meta) -> tuple[Part, ...]:
        raise TypeError("Error feedback is undone by the stages that it wraps: use `leaves`.")


def _residual(memory: dict[str, Tensor], name: str, like: Tensor) -> Tensor | None:
    """What was kept for `name`, on the device of `like`; None in the first round."""
    kept = memory.get(name)
    if kept is None:
        return None
    if kept.shape != like.shape:
        raise ValueError(
            f"Expected the residual of {name!r} in `ctx.state` to have shape {tuple(like.shape)}, but got "
            f"{tuple(kept.shape)}."
        )
    return kept.to(like.device)
