"""What two models say of one batch besides their loss: logits, hidden states, attention maps, named layers; and which
layer of one is matched with which of the other.

Everything is read by forward hooks while the models' own training steps run, so nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torchmetrics import Metric

from dynfed_lightning.batches import attentions_of, hidden_states_of, logits_of
from dynfed_lightning.module import ClientModule

LayerMap = int | Sequence[tuple[int, int]] | None


class Seen(NamedTuple):
    """What one model returned for one batch.

    Args:
        logits: ``[B, C]``.
        hidden: layers + 1 hidden states ``[B, T, H]``, the embeddings first; None where the model returns none.
        attentions: attention maps ``[B, heads, T, T]``, one a layer; None likewise.
        features: the outputs of the named layers, channels last.
    """

    logits: Tensor
    hidden: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None
    features: tuple[Tensor, ...]


class Capture:
    """Forward hooks on one model.

    Listens to the model itself, to its direct submodules (a training step may call ``self.net(x)`` and not ``self(x)``), and
    to the named layers. Of several calls in a step the last counts.

    Args:
        model: what to listen to.
        who: what messages call it, ``"module"`` or ``"peer"``.
        logits: the name of the submodule whose output are the logits; None: the model, or else the submodule called last that
            returns some.
        features: names of layers whose outputs are wanted.

    Raises:
        ValueError: a name that the model does not have.
    """

    def __init__(self, model: nn.Module, who: str, *, logits: str | None = None, features: Sequence[str] = ()) -> None:
        self.model, self.who, self.logits, self.features = model, who, logits, tuple(features)
        self._seen: dict[str, Any] = {}
        self.listening = False
        children = {n: m for n, m in model.named_children() if not isinstance(m, Metric)}
        targets: dict[str, nn.Module] = {"": model, **children}
        for name in (*(() if logits is None else (logits,)), *self.features):
            targets[name] = find_layer(model, name, who)
        self._handles = [m.register_forward_hook(self._hook(n)) for n, m in targets.items()]

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self.listening:
                self._seen.pop(name, None)  # so that the order is that of the last calls
                self._seen[name] = output

        return hook

    def start(self) -> None:
        """Forget what was seen, and listen."""
        self._seen = {}
        self.listening = True

    def take(self) -> Seen:
        """What was seen since `start`; nothing is kept.

        Raises:
            ValueError: no logits, or a named layer that was not called.
        """
        self.listening = False
        seen, self._seen = self._seen, {}
        hidden = next((h for o in _outermost(seen) if (h := hidden_states_of(o)) is not None), None)
        attentions = next((a for o in _outermost(seen) if (a := attentions_of(o)) is not None), None)
        features = []
        for name in self.features:
            if name not in seen:
                raise ValueError(f"Expected the layer {name!r} of the {self.who} to run in its training step.")
            features.append(_channels_last(seen[name], name, self.who))
        return Seen(self._logits(seen), hidden, attentions, tuple(features))

    def _logits(self, seen: dict[str, Any]) -> Tensor:
        names = [self.logits] if self.logits is not None else [n for n in ("", *reversed(seen)) if n in seen]
        for name in names:
            try:
                logits = logits_of(seen[name])
            except (ValueError, KeyError):
                continue
            if isinstance(logits, Tensor) and logits.ndim == 2 and logits.is_floating_point():
                return logits
        kind = type(self.model).__name__
        raise ValueError(
            f"Expected the {self.who} ({kind}) to return logits [batch, classes], a tensor or an output with `.logits`, but "
            "found none: name the submodule that does in `logits`."
        )

    def remove(self) -> None:
        """Stop listening for good."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._seen = [], {}


def _outermost(seen: dict[str, Any]) -> list[Any]:
    """What the model itself returned first, then what its parts returned, the last one first."""
    return [seen[n] for n in ("", *(n for n in reversed(seen) if n)) if n in seen and not isinstance(seen[n], Tensor)]


def find_layer(model: nn.Module, name: str, who: str) -> nn.Module:
    """The submodule `name` of `model`; of a `ClientModule`, the ``model.`` that its network's names begin with may be left out.

    Raises:
        ValueError: there is none; the message lists the first names there are.
    """
    for path in (name, f"model.{name}") if isinstance(model, ClientModule) else (name,):
        try:
            return model.get_submodule(path)
        except AttributeError:
            continue
    names = [n for n, _ in model.named_modules() if n]
    listed = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    raise ValueError(f"Expected a layer of the {who}, but it has no {name!r}: there are {listed}.")


def _channels_last(output: Any, name: str, who: str) -> Tensor:
    """A layer's output ``[B, H]`` or ``[B, T, H]``; feature maps ``[B, C, h, w]`` become ``[B, h, w, C]``."""
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor) or not 2 <= output.ndim <= 5:
        raise ValueError(f"Expected the layer {name!r} of the {who} to return a tensor of 2 to 5 dimensions.")
    return output.movedim(1, -1) if output.ndim >= 4 else output


def match_layers(student_layers: int, teacher_layers: int, layer_map: LayerMap = None) -> list[tuple[int, int]]:
    """Which hidden states are compared: pairs of indices into the student's and the teacher's, 0 the embeddings.

    For l = 0, 1, .. the student's layer (last - l) goes with the teacher's layer (last - l * ratio), where ratio is the
    teacher's layers over the student's (Wu et al., 2022, section on the hidden loss).

    Args:
        student_layers: L_s, without the embeddings.
        teacher_layers: L_t.
        layer_map: how many of the student's last layers are matched (None: all), or the pairs themselves, which may count
            from the end with negative numbers.

    Raises:
        ValueError: it does not fit.

    >>> match_layers(2, 6)
    [(2, 6), (1, 3)]
    >>> match_layers(4, 12, 2)
    [(4, 12), (3, 9)]
    >>> match_layers(2, 6, [(1, 2), (-1, -1)])
    [(1, 2), (2, 6)]
    """
    layer_map = check_layer_map(layer_map)
    if layer_map is None or isinstance(layer_map, int):
        if min(student_layers, teacher_layers) < 1:
            raise ValueError(
                f"Expected models with at least one layer, but the student has {student_layers} and the teacher "
                f"{teacher_layers}."
            )
        if teacher_layers % student_layers:
            raise ValueError(
                f"Expected the teacher's layers to be a multiple of the student's, but got {teacher_layers} and "
                f"{student_layers}: give `layer_map` as pairs (student's layer, teacher's layer)."
            )
        count = student_layers if layer_map is None else layer_map
        if count > student_layers:
            raise ValueError(
                f"Expected `layer_map` to match at most the student's {student_layers} layers, not {count}."
            )
        ratio = teacher_layers // student_layers
        return [(student_layers - i, teacher_layers - i * ratio) for i in range(count)]
    pairs = []
    for s, t in layer_map:
        for index, most, who in ((s, student_layers, "student"), (t, teacher_layers, "teacher")):
            if not -most - 1 <= index <= most:
                raise ValueError(
                    f"Expected `layer_map` to name layers of the {who} from 0 (the embeddings) to {most}, but got {index}."
                )
        pairs.append((s % (student_layers + 1), t % (teacher_layers + 1)))
    return pairs


def check_layer_map(layer_map: Any) -> LayerMap:
    """`layer_map` as `match_layers` takes it, pairs as tuples.

    Raises:
        ValueError: neither None, nor a positive integer, nor a list of pairs of integers.
    """
    if layer_map is None or (isinstance(layer_map, int) and not isinstance(layer_map, bool) and layer_map >= 1):
        return layer_map
    try:
        pairs = [(s, t) for s, t in layer_map]
    except (TypeError, ValueError):
        pairs = []
    if not pairs or not all(isinstance(x, int) and not isinstance(x, bool) for pair in pairs for x in pair):
        raise ValueError(
            f"Expected `layer_map` to be None, a positive number of layers, or pairs of layers, but got {layer_map!r}."
        )
    return pairs


class AskForStates:
    """Makes Hugging Face models return hidden states (and attention maps, where their attention computes them) for a while.

    Their configuration decides what they return, and says no unless told; other models are left alone.

    Args:
        model: a model or a LightningModule around one.
        hidden: ask for hidden states.
        attentions: ask for attention maps.
    """

    def __init__(self, model: nn.Module, hidden: bool, attentions: bool) -> None:
        self._before: list[tuple[Any, str, Any]] = []
        for config in {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values():
            wanted = []
            if hidden:
                wanted.append("output_hidden_states")
            # Fused attention has no maps to give.
            if attentions and getattr(config, "_attn_implementation", "eager") == "eager":
                wanted.append("output_attentions")
            for name in wanted:
                if not isinstance(config, dict) and hasattr(config, name) and not getattr(config, name):
                    self._before.append((config, name, getattr(config, name)))
                    setattr(config, name, True)

    def undo(self) -> None:
        """Put the configurations back."""
        for config, name, value in self._before:
            setattr(config, name, value)
        self._before = []
