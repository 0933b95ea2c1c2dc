"""Federations that learn from text: our encoder, Hugging Face's, and by the command."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from text_support import PIECES, sentences, vocabulary
from torch import nn

from dynfed_lightning.algorithms import DynFed, FedAvg, FedDF
from dynfed_lightning.batches import split_batch
from dynfed_lightning.cli import main
from dynfed_lightning.data import FederatedDataModule
from dynfed_lightning.distill import Distillation
from dynfed_lightning.encoder import TextEncoder
from dynfed_lightning.evaluation import check_outputs
from dynfed_lightning.federation import Federation
from dynfed_lightning.local import LoopLocal, TrainerLocal
from dynfed_lightning.module import ClientModule
from dynfed_lightning.partition import IID
from dynfed_lightning.predict import predict_probs
from dynfed_lightning.quiet import quiet_lightning

pytestmark = pytest.mark.filterwarnings("ignore:.*kernels of dynfed_lightning are missing.*")


def encoder(**changes: Any) -> TextEncoder:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "layers": 1, "hidden": 16, "heads": 2, "max_length": 16, "dropout": 0.0}
    return TextEncoder(**{**sizes, **changes})


def texts(**changes: Any) -> FederatedDataModule:
    own: dict[str, Any] = {"test": sentences(40, seed=1), "tokenizer": "words:40", "batch_size": 8, **changes}
    return FederatedDataModule(sentences(96), IID(2), **own)


def run(
    module: L.LightningModule, algorithm: Any, data: FederatedDataModule, rounds: int = 3, local: Any = None
) -> Any:
    federation = Federation(module, algorithm, local=local or LoopLocal(max_epochs=2))
    trainer = L.Trainer(
        max_epochs=rounds,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        devices=1,
        accelerator="cpu",
    )
    with quiet_lightning():
        trainer.fit(federation, datamodule=data)
    return federation, {k: float(v) for k, v in trainer.callback_metrics.items()}


class Tokens(nn.Module):
    """A user's own network over a dict: a bag of words."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 2)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return (self.words(batch["input_ids"]) * batch["attention_mask"].unsqueeze(2)).sum(1)


@pytest.mark.parametrize("local", ["loop", "trainer"])
def test_an_encoder_learns_in_a_federation(local: str) -> None:
    executor = LoopLocal(max_epochs=2) if local == "loop" else TrainerLocal(max_epochs=2)
    _, metrics = run(ClientModule(encoder(), lr=0.02, optimizer="adam"), FedAvg(), texts(), local=executor)
    assert metrics["accuracy"] > 0.9


def test_both_executors_and_other_networks() -> None:
    """The loop and the Trainer give the same; so does any network that takes the dict."""
    module = ClientModule(Tokens(), lr=0.5)
    weights = [
        run(copy.deepcopy(module), FedAvg(), texts(), local=local)[0].module.state_dict()
        for local in (LoopLocal(max_epochs=1), TrainerLocal(max_epochs=1))
    ]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert run(module, FedAvg(), texts(), rounds=4)[1]["accuracy"] > 0.9


def test_frozen_embeddings_do_not_travel() -> None:
    up = [
        run(ClientModule(m, lr=0.1), FedAvg(), texts(), rounds=1)[0].total_bytes_up
        for m in (encoder(), encoder().freeze_embeddings())
    ]
    assert 0 <= up[0] - up[1] - 2 * 4 * (40 + 16 + 2 + 2) * 16 < 500  # two clients; names and layout are the rest


@pytest.mark.parametrize("algorithm", ["dynfed", "feddf"])
def test_the_server_distils_on_text(algorithm: str) -> None:
    recipe = {"epochs": 2, "batch_size": 8, "early_stop_patience": 2 if algorithm == "feddf" else None}
    method = (
        FedDF(Distillation.feddf(**recipe))
        if algorithm == "feddf"
        else DynFed(distillation=Distillation("balanced", passes=2, **recipe))
    )
    data = texts(public=16, public_labels=algorithm == "dynfed")
    _, metrics = run(ClientModule(encoder(dropout=0.1), lr=0.02, optimizer="adam"), method, data)
    assert metrics["accuracy"] > 0.8 and metrics["distill_loss"] < 1


def test_predictions_do_not_depend_on_the_batch() -> None:
    """The public set is padded to its longest row, a batch of it to its own."""
    inputs = texts(public=24).public_set.inputs  # type: ignore[union-attr]
    module = ClientModule(encoder())
    whole = predict_probs(module, inputs, passes=1)
    assert whole.shape == (24, 2)
    torch.testing.assert_close(predict_probs(module, inputs, passes=1, batch_size=5), whole, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"at least one sample, but got shape \{'input_ids': \[0, 2\]\}"):
        predict_probs(module, {"input_ids": torch.zeros(0, 2)})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab_size": 10}, "embeddings for the tokenizer's 18 tokens .* but ClientModule has fewer"),
        ({"max_length": 10}, "texts of up to 11 tokens, but ClientModule refuses them .*`max_length`"),
        ({"num_classes": 3}, r"outputs of shape \[batch, 2\]"),
    ],
)
def test_a_model_that_does_not_fit_is_found_before_training(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(ClientModule(encoder(**changes)), FedAvg(), texts())


def test_pairs_need_token_types() -> None:
    pairs = [("a film", t) for t in sentences(20)[0]], sentences(20)[1]
    data = FederatedDataModule(pairs, IID(1), test=pairs, tokenizer="words:40")
    module = ClientModule(encoder(max_length=20))
    check_outputs(module, data, 2)
    with pytest.raises(ValueError, match="ClientModule has no embedding for type 1"):
        check_outputs(ClientModule(encoder(max_length=20, num_token_types=1)), data, 2)
    inputs, _ = split_batch(next(iter(data.val_dataloader())))
    module.eval()
    assert torch.equal(module(**inputs).logits, module(inputs).logits)  # by name, as Hugging Face's are called


def test_hugging_faces_model_in_a_federation(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from dynfed_lightning.hf import load_encoder

    vocabulary(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.BertConfig(vocab_size=len(PIECES), max_position_embeddings=16, **sizes).save_pretrained(tmp_path)
    torch.manual_seed(0)
    module = ClientModule(load_encoder(str(tmp_path), pretrained=False), lr=0.01, optimizer="adam")
    data = texts(tokenizer=str(tmp_path))
    federation, metrics = run(module, FedAvg(), data, rounds=3)
    assert metrics["accuracy"] > 0.8 and data.vocab_size == len(PIECES)
    assert type(federation.module.model).__name__ == "BertForSequenceClassification"
    longer = FederatedDataModule(
        (["a film " * 12, "it was"] * 4, [0, 1] * 4), IID(2), test=0.5, tokenizer=str(tmp_path)
    )
    with pytest.raises(ValueError, match="texts of up to 26 tokens, but ClientModule refuses them"):
        run(module, FedAvg(), longer)


# ------------------------------------------------------------------ the command


def configuration(tmp_path: Path, name: str, model: dict[str, Any]) -> str:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for split, (words, labels) in {"train": sentences(64), "test": sentences(30, seed=1)}.items():
        pq.write_table(pa.table({"sentence": words, "label": labels}), tmp_path / f"{split}.parquet")
    config = {
        "name": name,
        "trainer": {"max_epochs": 1, "accelerator": "cpu"},
        "module": {"class_path": "ClientModule", "init_args": {"lr": 0.02, "optimizer": "adam", "model": model}},
        "algorithm": "FedAvg",
        "local": {"class_path": "LoopLocal", "init_args": {"max_steps": 3}},
        "data": {
            "dataset": str(tmp_path),
            "tokenizer": "words:40",
            "max_length": 12,
            "partitioner": {"class_path": "IID", "init_args": {"num_clients": 2}},
        },
    }
    file = tmp_path / f"{name}.yaml"
    file.write_text(json.dumps(config))  # JSON is YAML
    return str(file)


OURS = {
    "class_path": "text_encoder",
    "init_args": {"vocab_size": 40, "layers": 1, "hidden": 8, "heads": 2, "max_length": 12},
}


def test_the_command_trains_and_compares_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = configuration(tmp_path, "a", OURS)
    b = configuration(tmp_path, "b", {**OURS, "class_path": "TextEncoder"})
    assert main(["compare", a, b, "--out", str(tmp_path / "both"), "--baseline", "a"]) == 0
    rounds = [(tmp_path / "both" / n / "seed0" / "rounds.csv").read_text().splitlines()[1].split(",") for n in "ab"]
    assert rounds[0][:3] == rounds[1][:3]
    assert "model        TextEncoder" in capsys.readouterr().out or (tmp_path / "both" / "compare.md").is_file()


def test_checkpoints_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=40, max_position_embeddings=12, **sizes))
    model.save_pretrained(tmp_path / "bert")
    folder = str(tmp_path / "bert")
    ours = {"class_path": "load_text_encoder", "init_args": {"folder": folder, "layers": 1, "freeze_embeddings": True}}
    theirs = {"class_path": "hf", "init_args": {"name_or_folder": folder, "layers": 1}}
    for name, model_config, shown in (
        ("ours", ours, "TextEncoder"),
        ("theirs", theirs, "BertForSequenceClassification"),
    ):
        file = configuration(tmp_path, name, model_config)
        assert main(["fit", "--config", file, "--out", str(tmp_path / name)]) == 0
        assert f"model        {shown}" in capsys.readouterr().out
    small = configuration(tmp_path, "small", {**OURS, "init_args": {**OURS["init_args"], "vocab_size": 6}})  # type: ignore[dict-item]
    assert main(["fit", "--config", small]) == 2
    assert "embeddings for the tokenizer's 18 tokens" in capsys.readouterr().err


def test_unknown_models_are_told_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", configuration(tmp_path, "a", {**OURS, "class_path": "text_encodr"})]) == 2
    assert "did you mean `text_encoder`?" in capsys.readouterr().err
    file = configuration(tmp_path, "a", {**OURS, "init_args": {"vocab_siz": 3}})
    assert main(["fit", "--config", file]) == 2
    assert "did you mean `vocab_size`?" in capsys.readouterr().err
