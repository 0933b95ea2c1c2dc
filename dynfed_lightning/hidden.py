"""The hidden loss of mutual distillation between two models: which layers, through which W_h, over which tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynfed_lightning.capture import LayerMap, Seen, check_layer_map, match_layers
from dynfed_lightning.losses import Sides, attention_mse, hidden_mse, mean_of_sides, precise

Switch = bool | str


class HiddenLoss(nn.Module):
    """``L_h = MSE(H_t, W_h H_s) + MSE(A_t, A_s)``, each the mean over the matched layers (Wu et al., 2022, eq. 5).

    W_h is a linear map without bias, one per matched pair, float32 ``[H_t, H_s]``. It starts as the identity where the sizes are
    equal and as ``torch.nn.Linear`` does elsewhere, drawn from `seed`. The maps are made when the sizes are first seen.

    Args:
        hidden: compare hidden states: True, False, or ``"auto"``, where both models return some.
        attentions: compare attention maps, likewise; ``"auto"`` also means not without hidden states.
        layer_map: see `dynfed_lightning.capture.match_layers`.
        features: named layers are compared instead of the hidden states a model returns.
        projection: have W_h. Without, the sizes must be equal.
        seed: of the maps' first values.

    Raises:
        ValueError: an argument that is none of the above.
    """

    def __init__(
        self,
        hidden: Switch = "auto",
        attentions: Switch = "auto",
        *,
        layer_map: LayerMap = None,
        features: bool = False,
        projection: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("hidden", hidden), ("attentions", attentions)):
            if not isinstance(value, bool) and value != "auto":
                raise ValueError(f"Expected `{name}` to be True, False or 'auto', but got {value!r}.")
        if features and hidden is False:
            raise ValueError("Expected `hidden` not to be False where `features` names layers to compare.")
        if features and layer_map is not None:
            raise ValueError("Expected `layer_map` or `features`, but got both.")
        self.hidden = hidden
        self.attentions: Switch = False if attentions == "auto" and (hidden is False or features) else attentions
        self.layer_map = check_layer_map(layer_map)
        self.features = features
        self.projection = projection
        self.seed = seed
        self.maps = nn.ParameterList()
        self._layers: list[tuple[int, int]] = []  # matched hidden states
        self._heads: list[tuple[int, int]] = []  # matched attention maps
        self._matched = False

    # ---------------------------------------------------------------- matching

    def match(self, student: Seen, teacher: Seen) -> None:
        """Decide once what is compared with what, and make W_h.

        Raises:
            ValueError: the models do not fit together; the message says what to change.
        """
        if student.logits.shape != teacher.logits.shape:
            raise ValueError(
                f"Expected student and teacher to have logits of the same shape, but got {list(student.logits.shape)} and "
                f"{list(teacher.logits.shape)}."
            )
        states = self._states(student, teacher)
        maps = self._attention_maps(student, teacher)
        self._layers, self._heads = [], []
        if states is not None and self.features:
            self._layers = [(i, i) for i in range(len(states[0]))]
        elif states is not None or maps is not None:
            # Hidden states count the embeddings, attention maps do not.
            ours = [len(states[i]) - 1 if states is not None else len(maps[i]) for i in (0, 1)]  # type: ignore[index]
            pairs = match_layers(ours[0], ours[1], self.layer_map)
            if states is not None:
                self._layers = pairs
            if maps is not None:
                self._heads = [(s - 1, t - 1) for s, t in pairs if s > 0 and t > 0]
        if states is not None:
            self._check_states([(states[0][s], states[1][t]) for s, t in self._layers])
        for s, t in self._heads:
            a, b = maps[0][s].shape, maps[1][t].shape  # type: ignore[index]
            if len(a) != 4 or len(b) != 4 or a[-2:] != b[-2:]:
                raise ValueError(
                    f"Expected attention maps [batch, heads, T, T] over the same tokens, but got {list(a)} and {list(b)}."
                )
        self._matched = True

    def _states(self, student: Seen, teacher: Seen) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None:
        if self.hidden is False:
            return None
        if self.features:
            return student.features, teacher.features
        if student.hidden is not None and teacher.hidden is not None:
            return student.hidden, teacher.hidden
        if self.hidden is True:
            who = "student" if student.hidden is None else "teacher"
            raise ValueError(
                f"Expected `hidden_states` in the output of both models under hidden=True, but the {who} returns none: name "
                "layers in `features`, or take hidden='auto'."
            )
        return None

    def _attention_maps(self, student: Seen, teacher: Seen) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None:
        if self.attentions is False:
            return None
        if student.attentions is not None and teacher.attentions is not None:
            return student.attentions, teacher.attentions
        if self.attentions is True:
            who = "student" if student.attentions is None else "teacher"
            raise ValueError(
                f"Expected `attentions` in the output of both models under attentions=True, but the {who} returns none: its "
                "attention must be one that makes the maps (for Hugging Face, attn_implementation='eager')."
            )
        return None

    def _check_states(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        made = len(self.maps) > 0
        generator = torch.Generator().manual_seed(self.seed)
        for i, (s, t) in enumerate(pairs):
            if s.shape[:-1] != t.shape[:-1]:
                raise ValueError(
                    "Expected matched layers to have the same shape but for the last dimension (channels), but got "
                    f"{list(s.shape)} and {list(t.shape)}."
                )
            if not self.projection:
                if s.shape[-1] != t.shape[-1]:
                    raise ValueError(
                        f"Expected matched layers of equal size without a projection, but got {s.shape[-1]} and "
                        f"{t.shape[-1]}: take projection=True."
                    )
                continue
            if made:
                if list(self.maps[i].shape) != [t.shape[-1], s.shape[-1]]:
                    raise ValueError(
                        f"Expected W_h of shape {[t.shape[-1], s.shape[-1]]}, but got {list(self.maps[i].shape)}."
                    )
                continue
            weight = torch.eye(t.shape[-1], s.shape[-1], dtype=torch.float32)  # whatever the default is
            if s.shape[-1] != t.shape[-1]:
                bound = s.shape[-1] ** -0.5
                weight.uniform_(-bound, bound, generator=generator)
            self.maps.append(nn.Parameter(weight.to(s.device)))

    # -------------------------------------------------------------------- loss

    def forward(self, student: Seen, teacher: Seen, inputs: Any) -> Sides | None:
        """L_h for either side; None where nothing is compared.

        Args:
            student: what the student returned.
            teacher: what the teacher returned.
            inputs: what both were called with; where it is a dict with ``attention_mask``, padding does not count.
        """
        if not self._matched:
            self.match(student, teacher)
        terms = []
        if self._layers:
            ours, theirs = (student.features, teacher.features) if self.features else (student.hidden, teacher.hidden)
            assert ours is not None and theirs is not None
            pairs = []
            for i, (s, t) in enumerate(self._layers):
                projected = precise(ours[s])
                if self.projection:
                    projected = F.linear(projected, self.maps[i].to(projected.dtype))
                pairs.append(hidden_mse(projected, theirs[t], _mask(inputs, theirs[t].shape)))
            terms.append(mean_of_sides(pairs))
        if self._heads:
            assert student.attentions is not None and teacher.attentions is not None
            pairs = []
            for s, t in self._heads:
                b, _, length, _ = student.attentions[s].shape
                mask = _mask(inputs, (b, length, 0))
                pairs.append(attention_mse(student.attentions[s], teacher.attentions[t], mask))
            terms.append(mean_of_sides(pairs))
        if not terms:
            return None
        return Sides(sum(t.student for t in terms), sum(t.teacher for t in terms))  # type: ignore[arg-type]

    def weights(self) -> dict[str, Tensor]:
        """W_h by the number of the pair."""
        return {str(i): w.detach().clone() for i, w in enumerate(self.maps)}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take up what `weights` gave."""
        self.maps = nn.ParameterList([nn.Parameter(weights[str(i)].detach().clone()) for i in range(len(weights))])


def _mask(inputs: Any, shape: Any) -> Tensor | None:
    """True for tokens, False for padding, ``[B, T]``; None without padding or for layers that have no tokens."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or len(shape) != 3 or tuple(mask.shape) != tuple(shape[:2]):
        return None
    return mask != 0
