from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from toys import (
    CLASSES,
    WIDTH,
    DictModule,
    NormNet,
    assert_same,
    blobs,
    client_module,
    data_module,
    network,
    outer,
    run,
    skewed,
    weights,
)

from dynfed_lightning import (
    IID,
    Cast,
    ClientModule,
    Codec,
    DAdaQuant,
    DynFed,
    ErrorFeedback,
    FedAvg,
    FedDF,
    FederatedDataModule,
    Federation,
    FedPAQ,
    Local,
    LoopLocal,
    Quantize,
    RoundFailure,
    Scaffold,
    TrainerLocal,
)
from dynfed_lightning.errors import PayloadError
from dynfed_lightning.message import Message


def test_learns_and_logs() -> None:
    trainer = run(federation := Federation(client_module(), FedAvg(), local="loop"), rounds=8)
    metrics = trainer.callback_metrics
    assert metrics["accuracy"] > 0.8
    assert metrics["clients"] == 4 and metrics["failed"] == 0
    assert trainer.global_step == 8  # exactly one optimiser step a round
    assert federation.last_round is not None and federation.last_round.round == 8


def test_average_by_hand() -> None:
    """One full-batch SGD step on each of two clients of unequal size, averaged by samples, equals one step on all rows."""
    x, y = blobs(30)
    rows = [torch.arange(10), torch.arange(10, 30)]

    class Two(IID):
        def __call__(self, labels: Any, seed: int) -> list[torch.Tensor]:
            return rows

    module = client_module()
    expected = network()
    F.cross_entropy(expected(x), y).backward()
    with torch.no_grad():
        for p in expected.parameters():
            p -= 0.1 * p.grad  # type: ignore[operator]
    data = FederatedDataModule((x, y), Two(2), test=blobs(30, 1), batch_size=30)
    federation = Federation(module, FedAvg(), local="loop")
    run(federation, data, rounds=1)
    for got, want in zip(federation.module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-7)


@pytest.mark.parametrize("local", ["trainer", "loop"])
def test_one_client_is_plain_sgd(local: str) -> None:
    x, y = blobs(48)
    module = client_module()
    data = FederatedDataModule((x, y), IID(1), test=blobs(30, 1), batch_size=48)
    federation = Federation(module, FedAvg(), local=local)
    plain = client_module()
    outer(5).fit(plain, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 48))
    run(federation, data, rounds=5)
    for got, want in zip(federation.module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_communication_counts_are_payload_lengths() -> None:
    sizes: dict[str, list[int]] = {"up": [], "down": []}
    federation = Federation(client_module(), FedPAQ(4), local="loop")

    class Spy(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            runtime = federation.transport.run_client  # type: ignore[union-attr]

            def spy(request: bytes) -> bytes:
                reply = runtime(request)
                sizes["down"].append(len(request))
                sizes["up"].append(len(reply))
                return reply

            federation.transport.run_client = spy  # type: ignore[union-attr]

    run(federation, rounds=3, callbacks=[Spy()])
    assert len(sizes["up"]) == 12
    assert federation.total_bytes_up == sum(sizes["up"]) and federation.total_bytes_down == sum(sizes["down"])


def test_statistics_travel_raw_and_frozen_and_integers_do_not() -> None:
    federation = Federation(ClientModule(NormNet(), lr=0.1), FedAvg(uplink=Codec(Quantize(2))), local="loop")
    frozen = federation.module.model.frozen.weight.clone()
    run(federation, rounds=2)
    schema = {s.name: s.raw for s in federation.runtime.uplink_schema}
    assert schema["model.body.1.running_mean"] and not schema["model.body.0.weight"]
    assert not any("frozen" in n or "num_batches" in n for n in schema)
    assert torch.equal(federation.module.model.frozen.weight, frozen)
    assert int(federation.module.model.body[1].num_batches_tracked) == 0
    assert float(federation.module.model.body[1].running_mean.abs().sum()) > 0


def test_dict_batches_user_module_both_executors() -> None:
    x, y = blobs()
    rows = [{"x": a, "label": b} for a, b in zip(x, y, strict=True)]
    results = []
    for local in ("trainer", "loop"):
        data = FederatedDataModule(rows, IID(3), test=rows[:60], batch_size=16)
        federation = Federation(DictModule(), FedAvg(), local=local)
        trainer = run(federation, data, rounds=2)
        assert trainer.callback_metrics["failed"] == 0
        assert {"accuracy", "my_accuracy"} <= trainer.callback_metrics.keys()
        # The module's own step says the same of the same model and data.
        assert trainer.callback_metrics["my_accuracy"] == pytest.approx(
            float(trainer.callback_metrics["accuracy"]), abs=1e-6
        )
        results.append(weights(federation))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "make",
    [
        lambda: FedAvg(),
        lambda: Scaffold(),
        lambda: DynFed(bits=(2, 6), distillation=None, downlink=Codec(Quantize(6))),
        lambda: DynFed(bits=(2, 8), distillation="random"),
        lambda: FedAvg(uplink=Codec(ErrorFeedback(Quantize(2)))),
        lambda: DynFed(signal="loss_delta"),
        lambda: DynFed(signal="random", distillation=None),
        lambda: DAdaQuant(patience=1),
        lambda: FedDF(),
        lambda: Local(),
    ],
    ids=["avg", "scaffold", "downlink", "distil", "feedback", "loss-delta", "random", "dadaquant", "feddf", "local"],
)
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resume_is_bit_identical(tmp_path: Path, make: Any) -> None:
    def fresh() -> tuple[Federation, FederatedDataModule]:
        data = data_module(6, skewed(6), clients_per_round=3, public=30, seed=3)
        return Federation(ClientModule(NormNet(), lr=0.05), make(), local="loop", seed=7), data

    straight, data = fresh()
    run(straight, data, rounds=5)
    first, data = fresh()
    keep = ModelCheckpoint(tmp_path / "kept", filename="round3", enable_version_counter=False)
    run(first, data, rounds=3, callbacks=[keep], enable_checkpointing=True)
    assert torch.load(tmp_path / "kept" / "round3.ckpt", weights_only=True)["federation"]["seed"] == 7
    resumed, data = fresh()
    again = ModelCheckpoint(tmp_path / "kept", filename="round5", enable_version_counter=False)
    path = tmp_path / "kept" / "round3.ckpt"
    run(resumed, data, rounds=5, ckpt_path=path, callbacks=[again], enable_checkpointing=True)
    assert_same(weights(resumed), weights(straight))
    assert resumed.total_bytes_up == straight.total_bytes_up
    assert resumed.total_bytes_down == straight.total_bytes_down


def test_resume_refuses_another_method_and_seed(tmp_path: Path) -> None:
    run(Federation(client_module(), FedAvg(), local="loop"), rounds=1).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="algorithm 'SCAFFOLD', but it was made with 'FedAvg'"):
        run(Federation(client_module(), Scaffold(), local="loop"), rounds=2, ckpt_path=tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="seed 1, but it was made with 0"):
        run(Federation(client_module(), FedAvg(), local="loop", seed=1), rounds=2, ckpt_path=tmp_path / "a.ckpt")


def test_order_of_clients_does_not_matter() -> None:
    def go(shuffle: bool) -> dict[str, torch.Tensor]:
        federation = Federation(client_module(), FedPAQ(3), local="loop")

        class Shuffle(L.Callback):
            def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
                exchange = federation.transport.exchange  # type: ignore[union-attr]

                def reversed_exchange(requests: Any) -> Any:
                    outcomes = exchange(list(requests)[::-1])
                    return outcomes[1:] + outcomes[:1]

                federation.transport.exchange = reversed_exchange  # type: ignore[union-attr, method-assign]

        run(federation, data_module(5), rounds=3, callbacks=[Shuffle()] if shuffle else [])
        return weights(federation)

    assert_same(go(False), go(True))


def test_global_rng_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    run(Federation(ClientModule(NormNet(), lr=0.1), DynFed(), local="loop"), data_module(3, public=20), rounds=1)
    assert torch.equal(before, torch.get_rng_state())


# ------------------------------------------------------------------------------------------------------- failures


class _Faulty(ClientModule):
    """Misbehaves on clients whose data holds the class it is told."""

    def __init__(self, fault: str) -> None:
        super().__init__(network(), lr=0.1)
        self.fault = fault

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        if not bool((batch[1] == 0).all()):
            return loss
        if self.fault == "nan":
            return loss * float("nan")
        if self.fault == "weights":  # a finite loss, but weights that are not
            with torch.no_grad():
                self.model[0].weight.fill_(float("inf"))
            return loss * 0 + 1.0 if torch.isfinite(loss) else torch.ones((), requires_grad=True)
        raise RuntimeError("out of paper")


class _ByClass(IID):
    def __call__(self, labels: Any, seed: int) -> list[torch.Tensor]:
        labels = torch.as_tensor(labels)
        return [torch.nonzero(labels == c).flatten() for c in range(CLASSES)]


@pytest.mark.parametrize(("fault", "reason"), [("nan", "nan_loss"), ("crash", "crash"), ("weights", "nan_update")])
@pytest.mark.parametrize("local", ["trainer", "loop"])
def test_failing_client_is_left_out_and_counted(
    fault: str, reason: str, local: str, caplog: pytest.LogCaptureFixture
) -> None:
    federation = Federation(_Faulty(fault), FedAvg(), local=local)
    with caplog.at_level(logging.WARNING):
        trainer = run(federation, data_module(partitioner=_ByClass(CLASSES), batch_size=80), rounds=2)
    assert trainer.callback_metrics["failed"] == 1 and trainer.callback_metrics[f"failed/{reason}"] == 1
    assert trainer.callback_metrics["clients"] == 2
    assert "client 0 left out" in caplog.text
    assert all(bool(torch.isfinite(t).all()) for t in weights(federation).values())
    record = federation.last_round
    assert record is not None and [c.status for c in record.clients] == [reason, "ok", "ok"]


def test_too_few_clients_says_why() -> None:
    federation = Federation(_Faulty("crash"), FedAvg(), local="loop", min_clients=3)
    with pytest.raises(RoundFailure, match=r"Round 1: 2 of 3 clients replied, 3 needed \(crash: 1\)") as caught:
        run(federation, data_module(partitioner=_ByClass(CLASSES), batch_size=80))
    assert "out of paper" in str(caught.value.__cause__)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda b: b[:-3], "payload"),
        (lambda b: b[:60] + bytes([b[60] ^ 1]) + b[61:], "payload"),
        (lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:], "payload"),
        (lambda b: b"", "payload"),
        (lambda b: _edited(b, round=9), "wrong_round"),
        (lambda b: _edited(b, client_id=2), "wrong_round"),
        (lambda b: _edited(b, num_examples=0), "malformed"),
        (lambda b: _edited(b, parts=[]), "malformed"),
    ],
)
def test_damaged_reply_is_left_out(damage: Any, reason: str) -> None:
    federation = Federation(client_module(), FedPAQ(4), local="loop")

    class Damage(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            honest = federation.transport.run_client  # type: ignore[union-attr]

            def run_client(request: bytes) -> bytes:
                reply = honest(request)
                return damage(reply) if Message.from_bytes(request).client_id == 1 else reply

            federation.transport.run_client = run_client  # type: ignore[union-attr]

    trainer = run(federation, rounds=2, callbacks=[Damage()])
    assert trainer.callback_metrics[f"failed/{reason}"] == 1 and trainer.callback_metrics["clients"] == 3


@pytest.mark.parametrize(
    "change",
    [
        {"scalars": {"grad_norm": 1.0}},
        {"scalars": {"loss": 1.0}},
        {"scalars": {"loss": "low", "grad_norm": 1.0}},
        {"scalars": {"loss": True, "grad_norm": 1.0}},
        {"counters": {}},
        {"counters": {"labels": [1, 2]}},
        {"counters": {"labels": [2**62, 2**62, 2**62]}},
        {"num_examples": 2**62},
    ],
    ids=str,
)
def test_replies_that_lie_are_left_out(change: dict[str, Any]) -> None:
    """In the first round; afterwards the client behaves, and what it lied about was not kept."""
    federation = Federation(client_module(), DynFed(), local="loop")
    failed: list[dict[str, int]] = []

    class Lie(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            honest = federation.transport.run_client  # type: ignore[union-attr]

            def run_client(request: bytes) -> bytes:
                reply, message = honest(request), Message.from_bytes(request)
                return _edited(reply, **change) if message.client_id == 1 and message.round == 0 else reply

            federation.transport.run_client = run_client  # type: ignore[union-attr]

        def on_train_batch_end(self, *_: Any) -> None:
            failed.append(federation.last_round.failures)  # type: ignore[union-attr]

    data = data_module(4, public=30)
    trainer = run(federation, data, rounds=2, callbacks=[Lie()])
    assert failed == [{"malformed": 1}, {}] and trainer.callback_metrics["failed/malformed"] == 0
    assert federation.server.state["labels"]["1"] == data.client(1).label_counts().tolist()  # type: ignore[union-attr]


def test_huge_integers_are_no_scalars() -> None:
    with pytest.raises(PayloadError):
        Message.from_bytes(Message(0, 0, scalars={"loss": 10**400}).to_bytes())


def test_a_lost_reply_changes_nothing_on_the_client() -> None:
    """SCAFFOLD's c is the mean of the c_k only if both sides remember the same rounds."""
    federation = Federation(client_module(), Scaffold(), local="loop")

    class Lose(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            honest = federation.transport.run_client  # type: ignore[union-attr]

            def run_client(request: bytes) -> bytes:
                reply, message = honest(request), Message.from_bytes(request)
                return reply[:-1] if message.client_id == 1 and message.round in (1, 2) else reply

            federation.transport.run_client = run_client  # type: ignore[union-attr]

    run(federation, rounds=4, callbacks=[Lose()])
    own = [federation.store.read(k)["control"]["model.0.weight"] for k in range(4)]
    control = federation.server.state["control"]["model.0.weight"]  # type: ignore[union-attr]
    torch.testing.assert_close(control, torch.stack(own).mean(0), rtol=0, atol=1e-6)


def test_a_round_that_fails_is_forgotten_by_its_clients() -> None:
    federation = Federation(_Faulty("crash"), Scaffold(), local="loop", min_clients=3)
    with pytest.raises(RoundFailure):
        run(federation, data_module(partitioner=_ByClass(CLASSES), batch_size=80))
    assert len(federation.store) == 0


def _edited(data: bytes, **changes: Any) -> bytes:
    message = Message.from_bytes(data)
    for name, value in changes.items():
        setattr(message, name, value)
    return message.to_bytes()


# ------------------------------------------------------------------------------------------------------ Lightning


class _Counter(L.Callback):
    """A user's own callback; class attributes survive the deep copies that clients get."""

    batches = 0
    fits = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        type(self).fits += 1

    def on_train_batch_end(self, *_: Any) -> None:
        type(self).batches += 1


def test_outer_callbacks_and_loggers(tmp_path: Path) -> None:
    class Outer(_Counter):
        batches = fits = 0

    checkpoint = ModelCheckpoint(tmp_path / "ckpt", monitor="accuracy", mode="max", save_top_k=1, save_last=True)
    stop = EarlyStopping("accuracy", mode="max", patience=2, min_delta=1.0)
    logger = CSVLogger(tmp_path / "logs")
    federation = Federation(client_module(), FedAvg(), local="loop")
    trainer = run(
        federation,
        rounds=20,
        callbacks=[checkpoint, stop, Outer()],
        logger=logger,
        enable_checkpointing=True,
        log_every_n_steps=1,
    )
    assert trainer.current_epoch == 3  # nothing gains a whole point: stopped after the first round and `patience` more
    assert Outer.fits == 1 and Outer.batches == 3
    assert Path(checkpoint.best_model_path).is_file() and (tmp_path / "ckpt" / "last.ckpt").is_file()
    text = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert "accuracy" in text and "mb_up" in text


@pytest.mark.parametrize("executor", [TrainerLocal, LoopLocal])
def test_client_callbacks(executor: type) -> None:
    class Inner(_Counter):
        batches = fits = 0

    federation = Federation(client_module(), FedAvg(), local=executor(max_steps=3, callbacks=Inner()))
    run(federation, rounds=2)
    assert Inner.fits == 8 and Inner.batches == 24


def test_server_optimizer_and_its_state_resume(tmp_path: Path) -> None:
    def make() -> Federation:
        adam = lambda p: torch.optim.Adam(p, lr=0.05)  # noqa: E731
        return Federation(client_module(), FedAvg(), local="loop", server_optimizer=adam)

    straight = make()
    run(straight, rounds=4)
    trainer = run(make(), rounds=2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = make()
    run(resumed, rounds=4, ckpt_path=tmp_path / "a.ckpt")
    assert_same(weights(resumed), weights(straight))


def test_precision_of_clients() -> None:
    local = TrainerLocal(trainer_kwargs={"precision": "bf16-mixed", "gradient_clip_val": 0.5})
    trainer = run(Federation(client_module(), FedAvg(), local=local), rounds=2)
    assert trainer.callback_metrics["failed"] == 0


def test_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    trainer = outer(2)
    capfd.readouterr()
    trainer.fit(Federation(client_module(), DynFed(), local="trainer"), datamodule=data_module(public=20))
    text = "".join(capfd.readouterr())
    assert text.count("\n") <= 2, text  # what the outer Trainer says at its end; nothing per client


def test_validate_a_checkpoint(tmp_path: Path) -> None:
    trainer = run(Federation(client_module(), FedAvg(), local="loop"), rounds=3)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fresh = Federation(client_module(seed=9), FedAvg(), local="loop")
    (metrics,) = outer().validate(fresh, datamodule=data_module(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert metrics["accuracy"] == pytest.approx(float(trainer.callback_metrics["accuracy"]))


# ------------------------------------------------------------------------------------------------------ bad input


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="Expected `module` to be a LightningModule, but got Sequential"):
        Federation(network())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Expected `algorithm` to be an Algorithm, but got str"):
        Federation(client_module(), "fedavg")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Expected `local` to be 'trainer', 'loop' or an executor, but got 'fast'"):
        Federation(client_module(), local="fast")
    with pytest.raises(ValueError, match="Expected `min_clients` to be a positive integer, but got 0"):
        Federation(client_module(), min_clients=0)
    with pytest.raises(ValueError, match="trainable parameters"):
        Federation(ClientModule(nn.Flatten()))


def test_wrong_number_of_classes_is_found_before_training() -> None:
    federation = Federation(ClientModule(nn.Linear(WIDTH, 7), lr=0.1), FedAvg(), local="loop")
    with pytest.raises(ValueError, match=r"shape \[batch, 3\].*gives \[2, 7\]"):
        run(federation)


def test_missing_public_set_is_found_before_training() -> None:
    with pytest.raises(ValueError, match="Expected a public set, since DynFed distils"):
        run(Federation(client_module(), DynFed(), local="loop"))


def test_needs_a_federated_data_module() -> None:
    with pytest.raises(TypeError, match="Expected `datamodule` to be a FederatedDataModule, but got NoneType"):
        outer().fit(Federation(client_module()), [[0]])


def test_cast_downlink_converges() -> None:
    federation = Federation(client_module(), FedAvg(downlink=Codec(Cast(torch.float16))), local="loop")
    trainer = run(federation, rounds=6)
    assert trainer.callback_metrics["accuracy"] > 0.75
