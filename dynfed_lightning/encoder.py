"""A transformer encoder for text classification, in BERT's form, so that BERT's and MiniLM's weights load into it exactly.

Post-layer-norm blocks (Devlin et al., NAACL 2019, arXiv 1810.04805; Vaswani et al., 2017, section 3), with the pieces that
distillation looks at: the hidden states of every layer and, if wanted, the attention maps. `student_of` makes the small model
of FedKD from the first layers of a large one.

On the CPU the linear layers see only the tokens that are there: a batch is packed to ``[N, H]``, N its tokens without
padding, and padded for the attention alone. A batch of 32 sentences of SST-2 is two thirds padding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynfed_lightning.partition import check_int
from dynfed_lightning.pretrained import bert_weights

_POOLINGS = ("mean", "cls")
_ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
M = TypeVar("M", bound=nn.Module)


class EncoderOutput(NamedTuple):
    """What `TextEncoder` returns.

    Attributes:
        logits: ``[B, C]``.
        hidden_states: the embeddings and every layer's output, layers + 1 tensors ``[B, T, H]``, or ``None``. Where
            `attention_mask` is 0 they mean nothing (0 where the batch was packed): leave those places out.
        attentions: every layer's attention after the softmax, ``[B, heads, T, T]``, or ``None``.
    """

    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class _Padding:
    """Between ``[B, T, H]`` and its attended tokens ``[N, H]``; without an index, N = B T and both are views."""

    def __init__(self, batch: int, length: int, index: Tensor | None) -> None:
        self.batch, self.length, self.index = batch, length, index

    def pack(self, x: Tensor) -> Tensor:
        x = x.reshape(self.batch * self.length, *x.shape[2:])
        return x if self.index is None else x.index_select(0, self.index)

    def pad(self, x: Tensor) -> Tensor:
        if self.index is not None:
            x = x.new_zeros(self.batch * self.length, x.shape[1]).index_copy_(0, self.index, x)
        return x.view(self.batch, self.length, -1)


class _Embeddings(nn.Module):
    def __init__(
        self, vocab_size: int, hidden: int, max_length: int, types: int, dropout: float, eps: float, pad: int | None
    ) -> None:
        super().__init__()
        self.word = nn.Embedding(vocab_size, hidden, padding_idx=pad)
        self.position = nn.Embedding(max_length, hidden)
        self.token_type = nn.Embedding(types, hidden)
        self.norm = nn.LayerNorm(hidden, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
        kind = self.token_type.weight[0] if types is None else self.token_type(types)
        return self.dropout(self.norm(self.word(ids) + kind + self.position(positions)))


class _Attention(nn.Module):
    """Multi-head self-attention: three projections, the mixing, and the output projection."""

    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        self.output = nn.Linear(hidden, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, padding: _Padding, bias: Tensor | None, maps: bool) -> tuple[Tensor, Tensor | None]:
        split = (padding.batch, padding.length, self.heads, -1)
        q, k, v = (padding.pad(f(x)).view(split).transpose(1, 2) for f in (self.query, self.key, self.value))
        if maps:
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            weights = (scores if bias is None else scores + bias).softmax(-1)
            mixed = self.dropout(weights) @ v
        else:
            weights = None
            p = self.dropout.p if self.dropout.training else 0.0
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p)
        return self.output(padding.pack(mixed.transpose(1, 2).flatten(2))), weights


class _Layer(nn.Module):
    def __init__(self, hidden: int, heads: int, intermediate: int, dropout: float, eps: float, activation: str) -> None:
        super().__init__()
        self.attention = _Attention(hidden, heads, dropout)
        self.attention_norm = nn.LayerNorm(hidden, eps=eps)
        self.intermediate = nn.Linear(hidden, intermediate)
        self.activation = nn.ReLU() if activation == "relu" else nn.GELU(approximate=_ACTIVATIONS[activation])
        self.output = nn.Linear(intermediate, hidden)
        self.output_norm = nn.LayerNorm(hidden, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, padding: _Padding, bias: Tensor | None, maps: bool) -> tuple[Tensor, Tensor | None]:
        mixed, weights = self.attention(x, padding, bias, maps)
        x = self.attention_norm(x + self.dropout(mixed))
        return self.output_norm(x + self.dropout(self.output(self.activation(self.intermediate(x))))), weights


class _Features(nn.Module):
    """Token ids to a latent vector ``[B, H]``: all of the encoder but its head."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        c, hidden, dropout, eps = config, config["hidden"], config["dropout"], config["layer_norm_eps"]
        self.pooling = c["pooling"]
        self.embeddings = _Embeddings(
            c["vocab_size"], hidden, c["max_length"], c["num_token_types"], dropout, eps, c["pad_token_id"]
        )
        self.layers = nn.ModuleList(
            _Layer(hidden, c["heads"], c["intermediate"], dropout, eps, c["activation"]) for _ in range(c["layers"])
        )
        self.pooler = nn.Linear(hidden, hidden) if self.pooling == "cls" else None
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        return self.encode(input_ids, attention_mask, token_type_ids, False, False)[0]

    def encode(
        self, ids: Tensor, mask: Tensor | None, types: Tensor | None, states: bool, maps: bool
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The latent vector, the hidden states and the attention maps (empty lists where not asked for)."""
        self._check(ids, mask, types)
        b, t = ids.shape
        if t > self.embeddings.position.num_embeddings:
            most = self.embeddings.position.num_embeddings
            raise ValueError(f"Expected at most `max_length` = {most} tokens a row, but got {t}.")
        index, bias = None, None
        # Looking at a value would break a compiled graph, and wait for the device elsewhere.
        visible = mask is not None and mask.device.type == "cpu" and not torch.compiler.is_compiling()
        if mask is not None and not (visible and bool(mask.all())):
            if visible:
                index = mask.flatten().nonzero().squeeze(1)
            dtype = self.embeddings.word.weight.dtype
            if torch.is_autocast_enabled(ids.device.type):
                dtype = torch.get_autocast_dtype(ids.device.type)
            # The lowest number and not -inf: a row of padding alone must not become NaN.
            bias = torch.zeros(b, 1, 1, t, dtype=dtype, device=ids.device)
            bias = bias.masked_fill(mask.view(b, 1, 1, t) == 0, torch.finfo(dtype).min)
        padding = _Padding(b, t, index)
        positions = torch.arange(t, device=ids.device).expand(b, t)
        kinds = None if types is None else padding.pack(types)
        x = self.embeddings(padding.pack(ids), padding.pack(positions), kinds)
        hidden, attentions = [padding.pad(x)] if states else [], []
        for layer in self.layers:
            x, weights = layer(x, padding, bias, maps)
            if states:
                hidden.append(padding.pad(x))
            if weights is not None:
                attentions.append(weights)
        last = hidden[-1] if hidden else padding.pad(x)
        if self.pooler is not None:
            latent = torch.tanh(self.pooler(last[:, 0]))
        elif mask is None:
            latent = last.mean(1)
        else:
            present = mask.to(last.dtype).unsqueeze(2)
            latent = (last * present).sum(1) / present.sum(1).clamp_min(1)
        return self.dropout(latent), hidden, attentions

    def _check(self, ids: Tensor, mask: Tensor | None, types: Tensor | None) -> None:
        if ids.ndim != 2 or 0 in ids.shape:
            raise ValueError(f"Expected `input_ids` of shape [B, T], both at least 1, but got {list(ids.shape)}.")
        for name, values in (("attention_mask", mask), ("token_type_ids", types)):
            if values is not None and values.shape != ids.shape:
                raise ValueError(
                    f"Expected `{name}` of the shape of `input_ids`, {list(ids.shape)}, but got {list(values.shape)}."
                )
        rows = self.embeddings.word.num_embeddings, self.embeddings.token_type.num_embeddings
        for name, values, most in (("input_ids", ids, rows[0]), ("token_type_ids", types, rows[1])):
            if values is not None and values.device.type == "cpu" and not torch.compiler.is_compiling():
                low, high = (int(v) for v in values.aminmax())
                if low < 0 or high >= most:
                    raise IndexError(f"Expected `{name}` from 0 to {most - 1}, but got {low if low < 0 else high}.")


class TextEncoder(nn.Module):
    """BERT's encoder with a classification head.

    ``features`` maps tokens to a latent vector ``[B, H]``, ``head`` that to the logits. New weights are drawn as BERT's (normal,
    deviation 0.02) from torch's global generator.

    Args:
        vocab_size: rows of the word embedding; at least the tokeniser's size.
        num_classes: C.
        layers: transformer blocks: 12 in BERT-base, 6, 4 or 2 in the smaller models of FedKD.
        hidden: width H, a multiple of `heads`.
        heads: attention heads.
        intermediate: width of the feed-forward layers; ``None``: 4 H.
        max_length: tokens in a row, at most.
        dropout: of embeddings, attention maps, block outputs and the latent vector, in [0, 1).
        pooling: ``"mean"`` over the attended tokens, or ``"cls"``: BERT's pooler (linear, tanh) over the first.
        num_token_types: 2 tells the sentences of a pair apart.
        output_attentions: return the attention maps (slower: they have to be made).
        activation: ``"gelu"``, ``"gelu_new"`` (its tanh form) or ``"relu"``.
        layer_norm_eps: of every layer norm.
        pad_token_id: the row of the word embedding that is never trained; ``None``: every row is.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        vocab_size: int,
        num_classes: int = 2,
        layers: int = 6,
        hidden: int = 384,
        heads: int = 12,
        intermediate: int | None = None,
        max_length: int = 512,
        dropout: float = 0.1,
        pooling: str = "mean",
        num_token_types: int = 2,
        output_attentions: bool = False,
        activation: str = "gelu",
        layer_norm_eps: float = 1e-12,
        pad_token_id: int | None = 0,
    ) -> None:
        super().__init__()
        check_int("hidden", hidden, 1)
        config: dict[str, Any] = {
            "vocab_size": check_int("vocab_size", vocab_size, 1),
            "num_classes": check_int("num_classes", num_classes, 2),
            "layers": check_int("layers", layers, 1),
            "hidden": hidden,
            "heads": check_int("heads", heads, 1),
            "intermediate": check_int("intermediate", 4 * hidden if intermediate is None else intermediate, 1),
            "max_length": check_int("max_length", max_length, 1),
            "dropout": dropout,
            "pooling": pooling,
            "num_token_types": check_int("num_token_types", num_token_types, 1),
            "output_attentions": bool(output_attentions),
            "activation": activation,
            "layer_norm_eps": layer_norm_eps,
            "pad_token_id": pad_token_id,
        }
        if hidden % heads:
            raise ValueError(f"Expected `hidden` to be a multiple of `heads` = {heads}, but got {hidden}.")
        if not _is_number(dropout) or not 0 <= dropout < 1:
            raise ValueError(f"Expected `dropout` to be a number in [0, 1), but got {dropout!r}.")
        if not _is_number(layer_norm_eps) or not 0 < layer_norm_eps < math.inf:
            raise ValueError(f"Expected `layer_norm_eps` to be a positive number, but got {layer_norm_eps!r}.")
        if pooling not in _POOLINGS:
            raise ValueError(f"Expected `pooling` to be one of {list(_POOLINGS)}, but got {pooling!r}.")
        if activation not in (*_ACTIVATIONS, "relu"):
            raise ValueError(f"Expected `activation` to be one of {[*_ACTIVATIONS, 'relu']}, but got {activation!r}.")
        if pad_token_id is not None and check_int("pad_token_id", pad_token_id, 0) >= vocab_size:
            raise ValueError(f"Expected `pad_token_id` to be below {vocab_size}, but got {pad_token_id}.")
        self.config = config
        self.output_attentions = bool(output_attentions)
        self.features = _Features(config)
        self.head = nn.Linear(hidden, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                with torch.no_grad():
                    module.weight[module.padding_idx].zero_()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool = True,
        output_attentions: bool | None = None,
    ) -> EncoderOutput:
        """Classify a batch of token rows.

        Args:
            input_ids: int64 ``[B, T]``.
            attention_mask: 1 for tokens, 0 for padding, ``[B, T]``; ``None``: no padding. Padding has no influence.
            token_type_ids: int64 ``[B, T]``; ``None``: all 0.
            output_hidden_states: return them.
            output_attentions: return the maps; ``None``: as the constructor says.

        Raises:
            ValueError: more than `max_length` tokens, an empty batch, a mask or types of another shape.
            IndexError: ids or types beyond their embedding (in words on the CPU alone).
        """
        maps = self.output_attentions if output_attentions is None else output_attentions
        latent, hidden, attentions = self.features.encode(
            input_ids, attention_mask, token_type_ids, output_hidden_states, maps
        )
        return EncoderOutput(self.head(latent), tuple(hidden) or None, tuple(attentions) or None)

    def freeze_embeddings(self) -> TextEncoder:
        """Stop training the embeddings and their layer norm (as FedKD does: then they never travel); returns itself."""
        self.features.embeddings.requires_grad_(False)
        return self

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | Mapping[str, Tensor],
        layers: int | None = None,
        num_classes: int = 2,
        pooling: str = "mean",
        heads: int | None = None,
        dropout: float | None = None,
        output_attentions: bool = False,
        freeze_embeddings: bool = False,
    ) -> TextEncoder:
        """An encoder with the weights of a BERT checkpoint in Hugging Face's layout.

        The head is new, unless the checkpoint has a classifier of `num_classes` classes and `pooling` is ``"cls"``; so is the
        pooler where the checkpoint has none.

        Args:
            source: a folder with ``config.json`` and ``model.safetensors`` (or ``pytorch_model.bin``), or a state dict with
                BERT's names. Nothing is downloaded.
            layers: keep only so many, the first ones; ``None``: all.
            num_classes: C.
            pooling: see `TextEncoder`.
            heads: only with a state dict, whose shapes do not tell it.
            dropout: ``None``: the configuration's (0.1 for a state dict).
            output_attentions: see `TextEncoder`.
            freeze_embeddings: see `freeze_embeddings`.

        Raises:
            ValueError: not BERT's form, a tensor that is missing, fewer layers than wanted.
        """
        found, weights = bert_weights(source, layers, heads)
        if dropout is not None:
            found["dropout"] = dropout
        model = cls(num_classes=num_classes, pooling=pooling, output_attentions=output_attentions, **found)
        own = model.state_dict()
        if pooling != "cls" or weights.get("head.weight", torch.empty(0)).shape != own["head.weight"].shape:
            weights = {k: v for k, v in weights.items() if not k.startswith("head.")}
        if pooling != "cls":
            weights = {k: v for k, v in weights.items() if not k.startswith("features.pooler.")}
        missing = [k for k in own if k not in weights and not k.startswith(("head.", "features.pooler."))]
        if missing:
            raise ValueError(
                f"Expected a checkpoint of BERT with all its weights, but it lacks what becomes {missing[:3]}."
            )
        model.load_state_dict(weights, strict=False)
        return model.freeze_embeddings() if freeze_embeddings else model


def load_text_encoder(
    folder: str,
    num_classes: int = 2,
    layers: int | None = None,
    pooling: str = "mean",
    dropout: float | None = None,
    output_attentions: bool = False,
    freeze_embeddings: bool = False,
) -> TextEncoder:
    """`TextEncoder.from_pretrained` for configurations: ``{class_path: load_text_encoder, init_args: {folder: ...}}``."""
    return TextEncoder.from_pretrained(
        folder, layers, num_classes, pooling, None, dropout, output_attentions, freeze_embeddings
    )


def student_of(teacher: M, layers: int) -> M:
    """A smaller model made of a larger one: its embeddings, its **first** `layers` blocks, its pooler and head, all copied.

    That is how FedKD makes its students (Wu et al., 2022, Methods). What is frozen in the teacher is frozen in the student.

    Args:
        teacher: a `TextEncoder`, or an encoder of Hugging Face's (BERT, RoBERTa, DistilBERT, ELECTRA, ...): any model that is
            built from its ``config`` and whose blocks are numbered from 0. It stays as it is.
        layers: from 1 to the teacher's number of layers.

    Raises:
        ValueError: more layers than the teacher has, a teacher with a decoder, one whose configuration does not take a number
            of layers, or one with a part of another size than its configuration says, such as an exchanged head.
        TypeError: another kind of model.
    """
    check_int("layers", layers, 1)
    config: Any = getattr(teacher, "config", None)
    if isinstance(teacher, TextEncoder):
        most = config["layers"]
    elif hasattr(config, "num_hidden_layers"):
        most = config.num_hidden_layers
    else:
        raise TypeError(
            f"Expected `teacher` to be a TextEncoder or a Hugging Face encoder, but got {type(teacher).__name__}."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"Expected `teacher` to be an encoder, but got {type(teacher).__name__}, which has a decoder.")
    if layers > most:
        raise ValueError(f"Expected `layers` to be at most the teacher's {most}, but got {layers}.")
    with torch.random.fork_rng(devices=[]):  # the new weights are overwritten: they cost no random numbers
        if isinstance(teacher, TextEncoder):
            student: Any = type(teacher)(**{**config, "layers": layers})
        else:
            config = copy.deepcopy(config)
            try:
                config.num_hidden_layers = layers
                student = type(teacher)(config)
            except (NotImplementedError, AttributeError, ValueError, TypeError) as error:
                raise ValueError(
                    "Expected `teacher` to be built from a config with any `num_hidden_layers`, but got "
                    f"{type(teacher).__name__}: {error}"
                ) from error
    weights = teacher.state_dict()
    lacking = [name for name in student.state_dict() if name not in weights]
    if lacking:
        raise ValueError(f"Expected a teacher that has all its student's weights, but it lacks {lacking[:3]}.")
    for name, w in student.state_dict().items():
        got, wanted = list(weights[name].shape), list(w.shape)
        if got != wanted:
            raise ValueError(
                f"Expected `teacher` to be as its config says, but got {name} of shape {got}, not {wanted}."
            )
    first = next(teacher.parameters())
    student = student.to(device=first.device, dtype=first.dtype)
    student.load_state_dict({name: weights[name] for name in student.state_dict()})
    trainable = {name: p.requires_grad for name, p in teacher.named_parameters()}
    for name, p in student.named_parameters():
        p.requires_grad_(trainable[name])
    modules = dict(teacher.named_modules())
    for name, module in student.named_modules():
        if isinstance(module, nn.Dropout):  # what was set after the teacher was made is not in its config
            module.p = modules[name].p
    if isinstance(teacher, TextEncoder):
        student.output_attentions = student.config["output_attentions"] = teacher.output_attentions
    return student.train(teacher.training)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
