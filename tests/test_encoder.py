"""The text encoder: padding, attention maps, BERT's weights, students."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dynfed_lightning.encoder import TextEncoder, student_of
from dynfed_lightning.models import build_model

MASK = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
IDS = torch.tensor([[2, 9, 8, 3, 0, 0, 0], [2, 3, 0, 0, 0, 0, 0], [2, 5, 6, 7, 8, 9, 3]])


def tiny(**changes: Any) -> TextEncoder:
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "num_classes": 3, "layers": 2, "hidden": 16, "heads": 4, "max_length": 12}
    model = TextEncoder(**{**sizes, **changes})
    for p in model.parameters():  # away from the zeros and ones of a new model
        p.data.add_(0.05 * torch.randn_like(p))
    return model.eval()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("maps", [False, True])
def test_padding_has_no_influence(pooling: str, maps: bool) -> None:
    model = tiny(pooling=pooling)
    with torch.no_grad():
        batch = model(IDS, MASK, output_attentions=maps)
        for row, n in enumerate(MASK.sum(1).tolist()):
            alone = model(IDS[row : row + 1, :n], output_attentions=maps)
            torch.testing.assert_close(batch.logits[row : row + 1], alone.logits, atol=1e-6, rtol=0)
            for a, b in zip(batch.hidden_states, alone.hidden_states, strict=True):
                torch.testing.assert_close(a[row, :n], b[0], atol=1e-6, rtol=0)
        other = IDS.masked_fill(MASK == 0, 17)
        assert torch.equal(model(other, MASK).logits, model(IDS, MASK).logits)
        # A mask of ones is no mask.
        ones = model(IDS, torch.ones_like(IDS)).logits
        torch.testing.assert_close(ones, model(IDS).logits, atol=1e-6, rtol=0)
        assert not torch.allclose(ones, batch.logits, atol=1e-3)
        # A row of nothing but padding is some number.
        assert bool(torch.isfinite(model(IDS, MASK * torch.tensor([[1], [0], [1]])).logits).all())


def test_attention_maps_are_the_ones_used() -> None:
    model = tiny()
    with torch.no_grad():
        plain, maps = model(IDS, MASK), model(IDS, MASK, output_attentions=True)
        torch.testing.assert_close(plain.logits, maps.logits, atol=1e-6, rtol=0)
        assert plain.attentions is None and len(maps.attentions) == 2
        assert [tuple(h.shape) for h in maps.hidden_states] == [(3, 7, 16)] * 3
        for weights in maps.attentions:
            assert weights.shape == (3, 4, 7, 7)
            torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 7))
            assert bool((weights.masked_select(MASK[:, None, None] == 0) == 0).all())
        assert model(IDS, MASK, output_hidden_states=False).hidden_states is None
        assert tiny(output_attentions=True)(IDS, MASK).attentions is not None


def test_gradients_with_packing_are_those_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing leaves out what has no influence, forwards and backwards."""
    grads = []
    for packed in (True, False):
        model = tiny()
        if not packed:  # as under torch.compile and on other devices
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        out = model(IDS, MASK, output_attentions=True)
        keep = MASK.unsqueeze(2)
        loss = out.logits.square().sum() + sum((h * keep).square().mean() for h in out.hidden_states)
        (loss + sum((a * keep[:, None]).square().sum() for a in out.attentions)).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
        assert bool((out.hidden_states[1][0, 5] == 0).all()) is packed  # both ways were taken
    for name, grad in grads[0].items():
        assert grad is not None and bool(grad.any()), name
        torch.testing.assert_close(grad, grads[1][name], atol=1e-5, rtol=1e-4)


def test_token_types_and_what_features_and_head_are() -> None:
    model = tiny()
    types = torch.zeros_like(IDS)
    with torch.no_grad():
        expected = model(IDS, MASK).logits
        assert torch.equal(model(IDS, MASK, types).logits, expected)
        assert not torch.allclose(model(IDS, MASK, types + 1).logits, expected)
        assert torch.equal(model.head(model.features(IDS, MASK)), expected)


def test_frozen_embeddings_get_no_gradient() -> None:
    model = tiny().freeze_embeddings()
    model(IDS, MASK).logits.sum().backward()
    frozen = {n for n, p in model.named_parameters() if p.grad is None}
    assert frozen == {f"features.embeddings.{n}" for n in ("word.weight", "position.weight", "token_type.weight")} | {
        "features.embeddings.norm.weight",
        "features.embeddings.norm.bias",
    }


def test_dropout_acts_in_training_alone_and_everywhere() -> None:
    model = tiny(dropout=0.5)
    with torch.no_grad():
        assert torch.equal(model(IDS, MASK).logits, model(IDS, MASK).logits)
        model.train()
        assert not torch.equal(model(IDS, MASK).logits, model(IDS, MASK).logits)
        maps = model(IDS, MASK, output_attentions=True).attentions[0]
        torch.testing.assert_close(maps.sum(-1), torch.ones(3, 4, 7))  # what is looked at has no holes
        # On attention maps alone, in both implementations.
        for m in model.modules():
            if isinstance(m, torch.nn.Dropout):
                m.eval()
        quiet = model(IDS, MASK).logits
        model.features.layers[1].attention.dropout.train()
        for maps_wanted in (False, True):
            assert not torch.allclose(model(IDS, MASK, output_attentions=maps_wanted).logits, quiet, atol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden": 18}, "`hidden` to be a multiple of `heads` = 4, but got 18"),
        ({"dropout": 1.0}, r"`dropout` to be a number in \[0, 1\), but got 1.0"),
        ({"dropout": "a"}, r"`dropout` to be a number in \[0, 1\), but got 'a'"),
        ({"layer_norm_eps": 0.0}, "`layer_norm_eps` to be a positive number, but got 0.0"),
        ({"layer_norm_eps": -1e-5}, "`layer_norm_eps` to be a positive number, but got -1e-05"),
        ({"hidden": None}, "`hidden` to be an integer of at least 1, but got None"),
        ({"pad_token_id": -1}, "`pad_token_id` to be an integer of at least 0, but got -1"),
        ({"pooling": "max"}, r"`pooling` to be one of \['mean', 'cls'\], but got 'max'"),
        ({"activation": "silu"}, "`activation` to be one of"),
        ({"layers": 0}, "`layers` to be an integer of at least 1, but got 0"),
        ({"pad_token_id": 30}, "`pad_token_id` to be below 30, but got 30"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_too_many_tokens() -> None:
    with pytest.raises(ValueError, match="at most `max_length` = 5 tokens a row, but got 7"):
        tiny(max_length=5)(IDS)


def test_same_seed_same_weights_and_by_name() -> None:
    torch.manual_seed(3)
    a = build_model("text_encoder", vocab_size=30, num_classes=2, layers=1, hidden=8, heads=2)
    torch.manual_seed(3)
    b = TextEncoder(30, 2, layers=1, hidden=8, heads=2)
    assert isinstance(a, TextEncoder)
    torch.testing.assert_close(a.state_dict(), b.state_dict(), atol=0, rtol=0)
    assert bool((a.features.embeddings.word.weight[0] == 0).all())
    assert 0.01 < float(a.features.embeddings.word.weight.detach().std()) < 0.03


# --------------------------------------------------------------------- students


def test_a_student_is_its_teachers_first_layers() -> None:
    teacher = tiny(layers=4, pooling="cls").train().freeze_embeddings()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    state = torch.get_rng_state()
    student = student_of(teacher, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(student, TextEncoder) and len(student.features.layers) == 2 and student.config["layers"] == 2
    assert student.training and not student.features.embeddings.word.weight.requires_grad
    own = student.state_dict()
    assert "features.layers.1.query" not in own and "features.layers.2.attention.query.weight" not in own
    torch.testing.assert_close(own, {k: before[k] for k in own}, atol=0, rtol=0)
    a, b = teacher.eval()(IDS, MASK), student.eval()(IDS, MASK)
    assert torch.equal(a.hidden_states[2], b.hidden_states[2])
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1.0)
    torch.testing.assert_close(dict(teacher.state_dict()), before, atol=0, rtol=0)  # nothing is shared
    with pytest.raises(ValueError, match="`layers` to be at most the teacher's 4, but got 5"):
        student_of(teacher, 5)
    with pytest.raises(TypeError, match="a TextEncoder or a Hugging Face encoder, but got Linear"):
        student_of(torch.nn.Linear(2, 2), 1)


@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert", "Electra"])
def test_students_of_hugging_face_models(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"dim": 16, "hidden_dim": 32, "n_layers": 3, "n_heads": 2} if family == "DistilBert" else {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    }  # fmt: skip
    extra = {"embedding_size": 16} if family == "Electra" else {}
    config = getattr(transformers, f"{family}Config")(vocab_size=30, max_position_embeddings=20, **sizes, **extra)
    torch.manual_seed(0)
    teacher = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    student = student_of(teacher, 2)
    assert type(student) is type(teacher) and student.config.num_hidden_layers == 2
    assert config.num_hidden_layers == 3
    with torch.no_grad():
        a, b = (m(IDS, MASK, output_hidden_states=True) for m in (teacher, student))
    assert len(b.hidden_states) == 3 and torch.equal(a.hidden_states[2], b.hidden_states[2])
    with pytest.raises(ValueError, match="`layers` to be at most the teacher's 3, but got 4"):
        student_of(teacher, 4)


# -------------------------------------------------------------- BERT's weights


def bert(tmp_path: Path, head: bool = False, **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.BertConfig(vocab_size=30, max_position_embeddings=20, **{**sizes, **changes})
    torch.manual_seed(1)
    model = transformers.BertForSequenceClassification(config) if head else transformers.BertModel(config)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    model.eval().save_pretrained(tmp_path)
    return model


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_equal_to_hugging_faces_bert(tmp_path: Path, activation: str) -> None:
    theirs = bert(tmp_path, hidden_act=activation, layer_norm_eps=1e-6, attn_implementation="eager")
    ours = TextEncoder.from_pretrained(tmp_path, num_classes=5, pooling="cls").eval()
    types = torch.randint(0, 2, IDS.shape)
    with torch.no_grad():
        a = theirs(IDS, MASK, types, output_hidden_states=True, output_attentions=True)
        b = ours(IDS, MASK, types, output_attentions=True)
        keep = MASK.bool()
        for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
            torch.testing.assert_close(x[keep], y[keep], atol=1e-5, rtol=0)
        for x, y in zip(a.attentions, b.attentions, strict=True):
            torch.testing.assert_close(x.transpose(1, 2)[keep], y.transpose(1, 2)[keep], atol=1e-5, rtol=0)
        latent = ours.features(IDS, MASK, types)
        torch.testing.assert_close(latent, a.pooler_output, atol=1e-5, rtol=0)
        assert ours(IDS, MASK).logits.shape == (3, 5)


def test_a_fine_tuned_classifier_comes_with_it(tmp_path: Path) -> None:
    theirs = bert(tmp_path, head=True, num_labels=3)
    ours = TextEncoder.from_pretrained(tmp_path, num_classes=3, pooling="cls").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS, MASK).logits, theirs(IDS, MASK).logits, atol=1e-5, rtol=0)
    # Where the classes or the pooling differ, the head is new.
    assert TextEncoder.from_pretrained(tmp_path, num_classes=3).head.bias.tolist() == [0, 0, 0]
    assert TextEncoder.from_pretrained(tmp_path, num_classes=2, pooling="cls").head.bias.tolist() == [0, 0]


def test_first_layers_and_the_old_file_format(tmp_path: Path) -> None:
    bert(tmp_path)
    whole = TextEncoder.from_pretrained(tmp_path).eval()
    first = TextEncoder.from_pretrained(tmp_path, layers=2, dropout=0.0, freeze_embeddings=True).eval()
    assert first.config["layers"] == 2 and first.features.dropout.p == 0.0 and whole.features.dropout.p == 0.1
    assert not first.features.embeddings.word.weight.requires_grad
    assert torch.equal(whole(IDS, MASK).hidden_states[2], first(IDS, MASK).hidden_states[2])
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "model.safetensors")
    old = {
        f"bert.{k}".replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): v
        for k, v in weights.items()
    }
    torch.save(old, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    again = TextEncoder.from_pretrained(tmp_path).eval()
    for name, tensor in whole.features.state_dict().items():
        assert torch.equal(tensor, again.features.state_dict()[name]), name
    from_dict = TextEncoder.from_pretrained(old, heads=4).eval()
    assert torch.equal(from_dict(IDS, MASK).hidden_states[3], whole(IDS, MASK).hidden_states[3])
    with pytest.raises(ValueError, match="`heads` to be given with a state dict"):
        TextEncoder.from_pretrained(old)


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a folder with config.json"):
        TextEncoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "roberta"}))
    with pytest.raises(ValueError, match="but it has model_type 'roberta': .*hf.load_encoder"):
        TextEncoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "num_attention_heads": 2}))
    with pytest.raises(ValueError, match=r"Expected model.safetensors or pytorch_model.bin"):
        TextEncoder.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"its tensors are \['w'\]"):
        TextEncoder.from_pretrained({"w": torch.ones(1)}, heads=2)
    weights: dict[str, Tensor] = {
        f"embeddings.{n}_embeddings.weight": torch.ones(4, 8) for n in ("word", "position", "token_type")
    }
    with pytest.raises(ValueError, match="from 1 to the checkpoint's 0, but got 2"):
        TextEncoder.from_pretrained(weights, layers=2, heads=2)
    weights["encoder.layer.0.intermediate.dense.weight"] = torch.ones(6, 8)
    with pytest.raises(ValueError, match="it lacks what becomes .*features.embeddings.norm"):
        TextEncoder.from_pretrained(weights, heads=2)


@pytest.mark.parametrize("maps", [False, True])
def test_mixed_precision(maps: bool) -> None:
    """As under precision="bf16-mixed"."""
    model = tiny()
    expected = model(IDS, MASK).logits.detach()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(IDS, MASK, output_attentions=maps)
        loss = out.logits.float().square().sum()
    loss.backward()
    torch.testing.assert_close(out.logits.detach().float(), expected, atol=0.05, rtol=0.05)
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        other = IDS.masked_fill(MASK == 0, 17)
        assert torch.equal(model(other, MASK, output_attentions=maps).logits, out.logits)


def test_compiles_into_one_graph_on_the_cpu() -> None:
    torch.compiler.reset()
    model = tiny()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for mask in (MASK, torch.ones_like(MASK)):
            torch.testing.assert_close(compiled(IDS, mask).logits, model(IDS, mask).logits, atol=1e-6, rtol=0)
    torch.compiler.reset()


@pytest.mark.parametrize(
    "inputs, message",
    [
        ((IDS[0],), r"`input_ids` of shape \[B, T\], both at least 1, but got \[7\]"),
        ((IDS[:0], MASK[:0]), r"both at least 1, but got \[0, 7\]"),
        ((IDS[:, :0], MASK[:, :0]), r"both at least 1, but got \[3, 0\]"),
        ((IDS, MASK[:, :5]), r"`attention_mask` of the shape of `input_ids`, \[3, 7\], but got \[3, 5\]"),
        ((IDS, MASK[:1]), r"`attention_mask` of the shape of `input_ids`, \[3, 7\], but got \[1, 7\]"),
        ((IDS, MASK, MASK[0]), r"`token_type_ids` of the shape of `input_ids`, \[3, 7\], but got \[7\]"),
        ((IDS, MASK, MASK * 2), "`token_type_ids` from 0 to 1, but got 2"),
        ((IDS + 25,), "`input_ids` from 0 to 29, but got 34"),
        ((IDS - 1,), "`input_ids` from 0 to 29, but got -1"),
    ],
)
def test_inputs_that_do_not_fit(inputs: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(IndexError if " from 0 to" in message else ValueError, match=message):
        tiny()(*inputs)


def test_a_student_keeps_what_was_set_on_its_teacher() -> None:
    teacher = tiny(dropout=0.1)
    teacher.output_attentions = True
    teacher.features.layers[0].dropout.p = 0.3
    teacher.features.embeddings.dropout.p = 0.0
    student = student_of(teacher, 1)
    assert student.output_attentions and student(IDS, MASK).attentions is not None
    assert student_of(student, 1).output_attentions
    found = {n: m.p for n, m in student.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert found.pop("features.layers.0.dropout") == 0.3 and found.pop("features.embeddings.dropout") == 0.0
    assert set(found.values()) == {0.1}


def test_teachers_that_have_no_student() -> None:
    teacher = tiny()
    teacher.head = torch.nn.Linear(16, 5)
    with pytest.raises(ValueError, match=r"but got head\.\w+ of shape \[5.*\], not \[3"):
        student_of(teacher, 1)
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 30, "d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes |= {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    config = transformers.BartConfig(**sizes, max_position_embeddings=20)
    with pytest.raises(ValueError, match="an encoder, but got BartForSequenceClassification, which has a decoder"):
        student_of(transformers.BartForSequenceClassification(config), 1)
    funnel = transformers.FunnelConfig(vocab_size=30, block_sizes=[1, 1], d_model=16, n_head=2, d_head=8, d_inner=16)
    with pytest.raises(ValueError, match="any `num_hidden_layers`, but got FunnelForSequenceClassification: "):
        student_of(transformers.FunnelForSequenceClassification(funnel), 1)
