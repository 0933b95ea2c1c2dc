"""Hugging Face's encoders from a folder, in ClientModule and through the checks before training."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from text_support import PIECES

from dynfed_lightning.batches import attentions_of, call_model, hidden_states_of, logits_of
from dynfed_lightning.hf import load_encoder
from dynfed_lightning.module import ClientModule

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
DISTIL = {"dim": 16, "hidden_dim": 32, "n_layers": 3, "n_heads": 2}
BATCH = {
    "input_ids": torch.tensor([[2, 9, 8, 3, 1], [2, 3, 1, 1, 1]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]),
    "token_type_ids": torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]),
    "idx": torch.tensor([0, 1]),
    "labels": torch.tensor([1, 0]),
}


def saved(folder: Path, family: str = "Bert", head: bool = False, **changes: Any) -> str:
    sizes: dict[str, Any] = dict(DISTIL if family == "DistilBert" else SIZES)
    sizes |= {"embedding_size": 16} if family == "Electra" else {}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(PIECES), max_position_embeddings=20, **{**sizes, **changes}
    )
    torch.manual_seed(0)
    kind = "ForSequenceClassification" if head else "Model"
    getattr(transformers, f"{family}{kind}")(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert", "Electra"])
def test_families_train_in_a_client_module(tmp_path: Path, family: str, capfd: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path, family)
    capfd.readouterr()
    torch.manual_seed(1)
    model = load_encoder(folder, num_classes=3, layers=2, output_attentions=True, freeze_embeddings=True)
    told = capfd.readouterr()
    assert told.out == told.err == ""  # no bars, no report of a new head
    module = ClientModule(model, lr=0.1)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    loss = module.training_step(BATCH, 0)
    loss.backward()
    module.configure_optimizers().step()
    moved = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    assert moved and not any(".embeddings." in n for n in moved)
    module.eval()
    with torch.no_grad():
        out = call_model(module, {k: v for k, v in BATCH.items() if k != "labels"})
    assert logits_of(out).shape == (2, 3)
    hidden, maps = hidden_states_of(out), attentions_of(out)
    assert hidden is not None and [tuple(h.shape) for h in hidden] == [(2, 5, 16)] * 3
    assert maps is not None and [tuple(a.shape) for a in maps] == [(2, 2, 5, 5)] * 2
    torch.testing.assert_close(maps[0].sum(-1)[0, :, :4], torch.ones(2, 4))


def test_weights_come_from_the_folder_and_the_head_from_the_seed(tmp_path: Path) -> None:
    folder = saved(tmp_path, head=True)
    theirs = transformers.BertForSequenceClassification.from_pretrained(folder).state_dict()
    kept = load_encoder(folder).state_dict()
    torch.testing.assert_close(kept, theirs, atol=0, rtol=0)
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        heads.append(load_encoder(folder, num_classes=5).state_dict())
    assert heads[0]["classifier.weight"].shape == (5, 16)
    assert torch.equal(heads[0]["classifier.weight"], heads[1]["classifier.weight"])
    assert not torch.equal(heads[0]["classifier.weight"], heads[2]["classifier.weight"])
    body = "bert.encoder.layer.2.output.dense.weight"
    assert torch.equal(heads[0][body], theirs[body])
    fresh = load_encoder(folder, pretrained=False)
    assert not torch.equal(fresh.state_dict()[body], theirs[body])
    assert hidden_states_of(load_encoder(folder, output_hidden_states=False)(BATCH["input_ids"])) is None


def changed(folder: str, to: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> str:
    """A copy of the checkpoint with other tensors or another configuration."""
    to.mkdir()
    told = json.loads((Path(folder) / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**told, **config}))
    found = load_file(Path(folder) / "model.safetensors")
    save_file(found if tensors is None else tensors, to / "model.safetensors", metadata={"format": "pt"})
    return str(to)


def test_weights_that_do_not_load_are_no_random_encoder(tmp_path: Path) -> None:
    folder = saved(tmp_path / "whole")
    found = load_file(Path(folder) / "model.safetensors")
    body = [name for name in found if not name.startswith("pooler.")]
    foreign = changed(folder, tmp_path / "foreign", {f"student.{name}": t for name, t in found.items()})
    with pytest.raises(
        ValueError,
        match=r"hold all of the encoder's weights, but it lacks \['bert\.embeddings\..*'\] "
        + rf"\({len(body)} in all\)",
    ):
        load_encoder(foreign)
    assert load_encoder(foreign, pretrained=False).num_labels == 2  # its configuration is sound
    deep = changed(folder, tmp_path / "deep", num_hidden_layers=4)
    with pytest.raises(ValueError, match=r"it lacks \['bert\.encoder\.layer\.3\..* \(16 in all\)"):
        load_encoder(deep)
    wide = changed(folder, tmp_path / "wide", vocab_size=60)
    with pytest.raises(ValueError, match=r"it lacks \['bert\.embeddings\.word_embeddings\.weight'\] \(1 in all\)"):
        load_encoder(wide)
    without = changed(folder, tmp_path / "no-pooler", {name: found[name] for name in body})
    own = load_encoder(without).state_dict()
    assert all(torch.equal(own[f"bert.{name}"], found[name]) for name in body)


def test_half_precision_checkpoints_train_in_single(tmp_path: Path) -> None:
    folder = saved(tmp_path / "whole")
    found = load_file(Path(folder) / "model.safetensors")
    half = changed(folder, tmp_path / "half", {k: t.half() for k, t in found.items()}, dtype="float16")
    own = load_encoder(half)
    assert {p.dtype for p in own.parameters()} == {torch.float32}
    name = "encoder.layer.1.output.dense.weight"
    assert torch.equal(own.state_dict()[f"bert.{name}"], found[name].half().float())
    assert {p.dtype for p in load_encoder(half, pretrained=False).parameters()} == {torch.float32}
    assert {p.dtype for p in load_encoder(half, layers=1, dtype="bfloat16").parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="`dtype` to be one of .* but got 'half'"):
        load_encoder(half, dtype="half")


def test_a_folder_never_touches_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    assert load_encoder(saved(tmp_path)).num_labels == 2


def test_what_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "a")
    with pytest.raises(ValueError, match="`layers` to be at most the teacher's 3, but got 7"):
        load_encoder(folder, layers=7)
    with pytest.raises(ValueError, match="`num_classes` to be an integer of at least 2, but got 1"):
        load_encoder(folder, num_classes=1)
    with pytest.raises(ValueError, match="a folder with config.json"):
        load_encoder(str(tmp_path))
    (tmp_path / "a" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="an encoder that can classify, but the folder"):
        load_encoder(folder)
    with pytest.raises(ValueError, match="no folder, and the hub's model 'no/such'"):
        load_encoder("no/such")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"'transformers' to be installed, .*\[text\]"):
        load_encoder(folder)
