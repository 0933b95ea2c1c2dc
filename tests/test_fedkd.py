"""FedKD: its reductions, what travels and what stays, the literal downlink, teachers of every kind, resuming."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from mutual_support import Sentences, TinyTransformer, text_module
from torch import Tensor, nn
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
    run,
    skewed,
    weights,
)

from dynfed_lightning import (
    FML,
    IID,
    ClientModule,
    Codec,
    CodecContext,
    FedAvg,
    FederatedDataModule,
    Federation,
    FedKD,
    Linear,
    LoopLocal,
    LowRank,
    Quantize,
    TrainerLocal,
)
from dynfed_lightning.codec import inspect
from dynfed_lightning.config import load, parse
from dynfed_lightning.errors import RoundFailure
from dynfed_lightning.schema import Schema
from dynfed_lightning.tensors import added, difference, weighted_mean


def teacher(seed: int = 1) -> nn.Module:
    return network(seed, hidden=24)


def trained(algorithm: Any, rounds: int = 2, module: Any = None, local: Any = "loop", **data: Any) -> Federation:
    federation = Federation(module or client_module(), algorithm, local=local)
    run(federation, data_module(4, skewed(4, 1.0), **data), rounds=rounds)
    assert federation.last_round is not None and federation.last_round.failures == {}
    return federation


def own(federation: Federation, client: int = 0) -> dict[str, Tensor]:
    """A client's teacher, as it remembers it."""
    return federation.store.read(client)["teacher"]


# ------------------------------------------------------------------------------------------------------ reductions


@pytest.mark.parametrize("local", ["loop", "trainer"])
@pytest.mark.parametrize("energy", [None, 1.0])
def test_without_distillation_and_svd_it_is_fedavg_of_the_student(local: str, energy: float | None) -> None:
    """To the bit, with dropout, normalisation statistics and a frozen layer on both sides."""
    off: dict[str, Any] = {"svd": False} if energy is None else {"energy": energy}
    kd = trained(FedKD(NormNet(), distil=False, **off), module=ClientModule(NormNet(), lr=0.1), local=local)
    avg = trained(FedAvg(), module=ClientModule(NormNet(), lr=0.1), local=local)
    assert_same(weights(kd), weights(avg))
    extra = len(',"teacher_loss":1.0123456789012345') + (0 if energy is None else 64)  # the stage's name and index
    assert 0 < kd.total_bytes_up - avg.total_bytes_up <= 4 * 2 * extra
    assert kd.total_bytes_down - avg.total_bytes_down <= (0 if energy is None else 4 * 2 * 64)


def test_without_weight_hidden_loss_and_svd_it_is_fml() -> None:
    """Half of every loss at twice every rate: powers of two, so the same bits."""
    kd = trained(FedKD(teacher(), adaptive=False, svd=False), module=client_module(lr=0.1), rounds=3)
    fml = trained(FML(teacher()), module=client_module(lr=0.2), rounds=3)
    assert_same(weights(kd), weights(fml))
    assert_same(own(kd), fml.store.read(0)["local_model"])


def test_every_switch_changes_something() -> None:
    """Of a run with hidden states, attention maps and factors: no ablation is another one's."""
    seen: list[dict[str, Tensor]] = []
    rows = Sentences(48)
    for switches in (
        {},
        {"hidden": False},
        {"attentions": False},
        {"adaptive": False},
        {"distil": False},
        {"svd": False},
    ):
        algorithm = FedKD(TinyTransformer(2, 6, seed=1), energy=0.7, **switches)
        federation = Federation(text_module(2, 4), algorithm, local="loop")
        run(federation, FederatedDataModule(rows, IID(2), test=rows, batch_size=8), rounds=2)
        seen.append(weights(federation))
    for i, a in enumerate(seen):
        for b in seen[:i]:
            assert any(not torch.equal(a[n], b[n]) for n in a)


def test_both_executors_give_the_same_bits() -> None:
    a, b = (
        trained(FedKD(NormNet(), bits=8), module=ClientModule(NormNet(), lr=0.1), local=x) for x in ("loop", "trainer")
    )
    assert_same(weights(a), weights(b))
    assert_same(own(a, 2), own(b, 2))


# ------------------------------------------------------------------------------------- what travels and what stays


class Watched(FedKD):
    """Keeps what the clients uploaded, what the server averaged, and what it knew the clients to hold."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.held: list[dict[str, Tensor]] = []
        self.means: list[dict[str, Tensor]] = []
        self.uploaded: list[list[str]] = []

    def client_step(self, client: Any, module: Any, received: Any) -> Any:
        update = super().client_step(client, module, received)
        self.uploaded.append(list(update.tensors))
        return update

    def server_step(self, server: Any, replies: Any) -> None:
        self.held.append({n: t.clone() for n, t in server.received.items()})
        self.means.append(weighted_mean([r.tensors for r in replies], [r.num_examples for r in replies]))
        super().server_step(server, replies)


def test_only_the_students_trainable_tensors_travel() -> None:
    algorithm = Watched(NormNet())
    federation = trained(algorithm, module=ClientModule(NormNet(), lr=0.1))
    names = ["model.body.0.weight", "model.body.0.bias", "model.body.1.weight", "model.body.1.bias"]
    names += ["model.body.4.weight", "model.body.4.bias", "model.body.1.running_mean", "model.body.1.running_var"]
    assert algorithm.uploaded == [names] * 8
    assert list(federation.runtime.uplink_schema.names) == list(federation.runtime.downlink_schema.names) == names
    state = federation.store.read(0)
    assert not any("frozen" in n for n in state["teacher"])
    assert set(state["teacher"]) == {*names, "model.body.1.num_batches_tracked"}
    assert int(state["teacher"]["model.body.1.num_batches_tracked"]) > 0
    # Everything started somewhere else: an update that is 0 because it was taken from an aliased array would show here.
    start = dict(ClientModule(NormNet()).state_dict())
    moving = [n for n in names if n != "model.body.0.bias"]  # a normalisation follows, so its gradient is 0
    assert all(not torch.equal(weights(federation)[n], start[n]) for n in moving)
    assert all(not torch.equal(state["teacher"][n], start[n]) for n in moving)


def test_what_a_client_remembers_is_replaced_and_not_edited() -> None:
    recipe = ClientModule(teacher(), lr=0.01, optimizer="adam")
    federation = Federation(
        client_module(), FedKD(recipe, features=[("model.1", "1")], keep_optimizer=True), local="loop"
    )
    kept: list[tuple[Any, Any]] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            state = federation.store.read(1)
            kept.append((state, copy.deepcopy(state)))

    run(federation, data_module(3), rounds=3, callbacks=[Watch()])

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
        if isinstance(a, list):
            return len(a) == len(b) and all(map(same, a, b))
        return torch.equal(a, b) if isinstance(a, Tensor) else a == b

    assert all(same(a, b) for a, b in kept)
    for name in ("teacher", "projections", "optimizer"):
        assert not same(kept[0][0][name], kept[1][0][name]), name


@pytest.mark.parametrize("feedback", [False, True])
def test_the_papers_server_forgets_what_the_download_lost(feedback: bool) -> None:
    """By default ``w_t+1 = w^_t + mean``; and what clients get is the factorised mean, not more."""
    algorithm = Watched(teacher(), energy=0.6, downlink_feedback=feedback)
    federation = trained(algorithm, rounds=3)
    assert len(algorithm.held) == 3
    lost = 0.0
    for t in (1, 2):
        got = difference(algorithm.held[t], algorithm.held[t - 1])
        codec, schema = Codec(LowRank(0.6)), Schema.of(algorithm.means[t - 1])
        expected = codec.decode(codec.encode(algorithm.means[t - 1], CodecContext(round=t), schema), schema)
        far = max(float((got[n] - expected[n]).abs().max()) for n in got)
        if t == 1 or not feedback:
            assert far < 1e-5
        else:
            assert far > 1e-3  # what the first download lost came with the second
        lost = max(float((algorithm.means[t - 1][n] - expected[n]).abs().max()) for n in got)
        assert lost > 1e-3  # there was something to lose
    final = weights(federation)
    literal = added(algorithm.held[2], algorithm.means[2])
    far = max(float((final[n] - literal[n]).abs().max()) for n in literal)
    assert (far > 1e-3) if feedback else (far == 0)


@pytest.mark.parametrize("feedback", [False, True])
def test_another_server_optimiser_gets_the_mean_and_nothing_else(feedback: bool) -> None:
    """What the download lost is no gradient: Adam's moments must not hear of it. It steps from what the clients hold."""
    seen: list[tuple[float, float]] = []

    class Spy(Watched):
        def server_step(self, server: Any, replies: Any) -> None:
            before = server.weights()
            super().server_step(server, replies)
            after = server.weights()
            assert all(torch.equal(-p.grad, self.means[-1][n]) for n, p in server.module.named_parameters())
            seen.append(
                tuple(max(float((after[n] - x[n]).abs().max()) for n in after) for x in (self.held[-1], before))
            )

    algorithm = Spy(teacher(), energy=0.4, downlink_feedback=feedback)
    federation = Federation(
        client_module(), algorithm, local="loop", server_optimizer=lambda p: torch.optim.Adam(p, lr=0.05)
    )
    run(federation, data_module(2), rounds=3)
    assert max(lost for _, lost in seen) == 0 if feedback else max(far for far, _ in seen) == 0
    assert max(max(pair) for pair in seen) > 1e-3  # there was something to lose


def test_factors_save_bytes_and_bits_save_more() -> None:
    layers = [nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES)]
    wide = ClientModule(nn.Sequential(*layers), lr=0.05)
    size, found = {}, {}
    for name, kwargs in {
        "raw": {"svd": False},
        "svd": {},
        "svd8": {"bits": 8},
        "bits": {"svd": False, "bits": 8},
    }.items():
        federation = trained(FedKD(teacher(), **kwargs), module=copy.deepcopy(wide))  # type: ignore[arg-type]
        assert federation.last_round is not None
        size[name], found[name] = federation.total_bytes_up, federation.last_round.bits
    assert size["svd8"] < size["svd"] < 0.7 * size["raw"] and size["svd8"] < size["bits"] < 0.5 * size["raw"]
    assert found["svd8"] == found["bits"] == [8.0] * 4 and found["raw"] == []


def test_uploads_are_factors_of_the_energy_of_the_round() -> None:
    algorithm = FedKD(teacher(), energy=Linear(0.5, 0.9))
    payloads: list[bytes] = []
    encode = algorithm.uplink.encode

    def record(*args: Any) -> bytes:
        payloads.append(encode(*args))
        return payloads[-1]

    algorithm.uplink.encode = record  # type: ignore[method-assign]
    federation = trained(algorithm, rounds=3)
    first, last = (algorithm.uplink.decode_full(payloads[i], federation.runtime.uplink_schema) for i in (0, -1))
    assert (first.energy, last.energy) == (0.5, pytest.approx(0.9))
    text = str(inspect(payloads[0], federation.runtime.uplink_schema))
    assert "lowrank" in text and "teacher" not in text


def test_no_update_is_dropped_by_truncation() -> None:
    """A head of 2 x 768, where the public code's loop can keep no singular value at all: the best one is kept at any energy."""
    g = torch.Generator().manual_seed(0)
    head = {"head": torch.randn(2, 768, generator=g)}
    codec = Codec(LowRank(0.01))
    decoded = codec.decode(codec.encode(head), Schema.of(head))["head"]
    u, s, vh = torch.linalg.svd(head["head"], full_matrices=False)
    torch.testing.assert_close(decoded, s[0] * torch.outer(u[:, 0], vh[0]), rtol=0, atol=1e-4)


def test_error_feedback_stays_on_the_client() -> None:
    federation = trained(FedKD(teacher(), energy=0.6, bits=4, error_feedback=True))
    assert any(bool(t.any()) for t in federation.store.read(0)["uplink"]["error_feedback"].values())
    assert "uplink" not in trained(FedKD(teacher(), energy=0.6, bits=4)).store.read(0)


# ------------------------------------------------------------------------------------------------- who is judged


def test_clients_are_judged_by_their_teachers_and_the_student_beside() -> None:
    federation = Federation(client_module(), FedKD(teacher()), local="loop")
    data = data_module(4, skewed(4, 0.5))
    trainer = run(federation, data, rounds=3)
    x, y = blobs(90, seed=1)

    def accuracy(model: nn.Module) -> float:
        return float((model(x).argmax(1) == y).float().mean())

    each = []
    for k in range(4):
        model = ClientModule(teacher())
        model.load_state_dict(own(federation, k))
        each.append(accuracy(model.eval()))
    metrics = trainer.callback_metrics
    assert float(metrics["accuracy"]) == pytest.approx(sum(each) / 4, abs=1e-6)
    assert float(metrics["accuracy_worst"]) == pytest.approx(min(each), abs=1e-6)
    assert float(metrics["global_accuracy"]) == pytest.approx(accuracy(federation.module), abs=1e-6)
    assert len(set(each)) > 1 and metrics["teacher_loss"] > 0 and metrics["student_loss"] == metrics["train_loss"]
    record = federation.last_round
    assert record is not None
    expected = sum(c.metrics["teacher_loss"] * c.num_examples for c in record.clients) / 240
    assert float(metrics["teacher_loss"]) == pytest.approx(expected, rel=1e-6)


def test_a_client_that_never_trained_is_judged_by_the_first_teacher() -> None:
    federation = Federation(client_module(), FedKD(teacher()), local="loop")
    run(federation, data_module(4, clients_per_round=1), rounds=1)
    assert len(federation.store) == 1 and federation.server is not None
    (who,) = federation.store
    for k in range(4):
        model = federation.algorithm.personal_model(
            federation.store.read(k), client_module(), weights(federation), client_id=k
        )
        same = torch.equal(model.model[0].weight, teacher()[0].weight)  # type: ignore[union-attr, index]
        assert same == (k != who)


def test_it_learns() -> None:
    federation = Federation(client_module(), FedKD(teacher(), bits=8), local=LoopLocal(max_epochs=2))
    trainer = run(federation, data_module(4), rounds=6)
    assert trainer.callback_metrics["accuracy"] > 0.8 and trainer.callback_metrics["global_accuracy"] > 0.8


def test_clients_of_one_class_do_not_run_away() -> None:
    """Their task losses are near 0 and D with them: without a floor L_h / D would be thousands of times the task's."""

    class ByClass(IID):
        def __call__(self, labels: Any, seed: int) -> list[Tensor]:
            return [torch.nonzero(torch.as_tensor(labels) == c).flatten() for c in range(3)]

    algorithm = FedKD(teacher(), features=[("model.1", "1")])
    federation = Federation(client_module(lr=0.3), algorithm, local=LoopLocal(max_epochs=10))
    run(federation, data_module(partitioner=ByClass(3)), rounds=4)
    assert federation.last_round is not None and federation.last_round.failures == {}
    assert max(float(t.abs().max()) for t in own(federation).values()) < 20


# ------------------------------------------------------------------------------------------------ teachers of all kinds


def test_teachers_may_differ_from_client_to_client() -> None:
    def build(client_id: int) -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, 4 + client_id), nn.Tanh(), nn.Linear(4 + client_id, CLASSES))

    mapping = {k: network(seed=k, hidden=3 + k) for k in range(4)}
    for given, width in ((build, 4), (mapping, 3), ({str(k): m for k, m in mapping.items()}, 3)):
        federation = Federation(client_module(), FedKD(given), local="loop")  # type: ignore[arg-type]
        run(federation, data_module(4, clients_per_round=2), rounds=2)  # some are judged before their first round
        for k in federation.store:
            assert own(federation, k)["model.0.weight"].shape == (width + k, WIDTH)


def test_teachers_made_by_a_function_depend_on_seed_and_client_alone() -> None:
    def build(client_id: int) -> nn.Module:
        return nn.Linear(WIDTH, CLASSES)

    first = []
    for seed, junk in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(junk)
        algorithm = FedKD(build)
        federation = Federation(client_module(), algorithm, local="loop", seed=seed)
        run(federation, data_module(2), rounds=1)
        first.append([algorithm.teachers.fresh(k, client_module(), seed).model.weight for k in (0, 1)])  # type: ignore[union-attr]
    assert torch.equal(first[0][0], first[1][0]) and not torch.equal(first[0][0], first[0][1])
    assert not torch.equal(first[0][0], first[2][0])


def test_a_networks_teacher_trains_by_the_students_recipe() -> None:
    """A `ClientModule` student: all its settings. Any other: its optimiser's class and defaults."""
    module = client_module(lr=0.03, momentum=0.5, label_smoothing=0.1)
    algorithm = FedKD(teacher())
    made = algorithm.teachers.fresh(0, module, 0)
    assert isinstance(made, ClientModule) and (made.lr, made.momentum, made.label_smoothing) == (0.03, 0.5, 0.1)
    student = DictModule()
    optimizer = algorithm.teachers.fresh(0, student, 0).configure_optimizers()
    assert type(optimizer) is torch.optim.Adam and optimizer.param_groups[0]["lr"] == 0.01
    assert not {id(p) for g in optimizer.param_groups for p in g["params"]} & {id(p) for p in student.parameters()}

    class Schooled(ClientModule):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.RMSprop(self.parameters(), lr=0.07)

    made = algorithm.teachers.fresh(0, Schooled(network(), label_smoothing=0.1), 0)
    optimizer = made.configure_optimizers()
    assert type(optimizer) is torch.optim.RMSprop and optimizer.param_groups[0]["lr"] == 0.07
    assert made.label_smoothing == 0.1


@pytest.mark.parametrize("kind", ["function", "mapping", "other way round", "alone"])
def test_a_lightning_modules_teacher_keeps_its_recipe_however_it_is_given(kind: str) -> None:
    recipe, bare = ClientModule(teacher(), lr=0.5), network(2)
    given: Any = {
        "function": lambda k: bare if k else recipe,
        "mapping": {0: recipe, 1: bare},
        "other way round": {1: bare, 0: recipe},
        "alone": recipe,
    }[kind]
    models = FedKD(given).teachers
    optimizer = models.fresh(0, DictModule(), 0).configure_optimizers()
    assert type(optimizer) is torch.optim.SGD and optimizer.param_groups[0]["lr"] == 0.5
    if kind != "alone":
        optimizer = models.fresh(1, DictModule(), 0).configure_optimizers()
        assert type(optimizer) is torch.optim.Adam and optimizer.param_groups[0]["lr"] == 0.01


class Decayed(DictModule):
    """A user's module with AdamW, whose defaults hold more than its constructor takes."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, betas=(0.5, 0.9), weight_decay=0.3)


@pytest.mark.parametrize("method", [FedKD, FML])
def test_a_network_beside_a_users_module_with_adamw(method: Any) -> None:
    federation = trained(method(teacher()), module=Decayed(), rounds=1)
    models = federation.algorithm.teachers if method is FedKD else federation.algorithm.models  # type: ignore[attr-defined]
    group = models.fresh(0, Decayed(), 0).configure_optimizers().param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.01, (0.5, 0.9), 0.3)


class Needy(torch.optim.SGD):
    def __init__(self, params: Any, secret: float) -> None:
        super().__init__(params, lr=secret)


@pytest.mark.parametrize("method", [FedKD, FML])
def test_an_optimiser_that_cannot_be_made_again_is_found_before_training(method: Any) -> None:
    class Student(DictModule):
        def configure_optimizers(self) -> Any:
            return Needy(self.parameters(), 0.1)

    federation = Federation(Student(), method(teacher()), local="loop")
    with pytest.raises(ValueError, match=r"its class and its defaults make again, but Needy is none \(.*'secret'"):
        run(federation, data_module(2))
    assert federation.last_round is None
    kwargs = {"teacher_optimizer" if method is FedKD else "local_optimizer": lambda p: Needy(p, 0.1)}
    with pytest.raises(TypeError, match="to make an Optimizer, but it made int"):
        run(Federation(client_module(), method(teacher(), **{n: lambda p: 3 for n in kwargs}), local="loop"))
    if method is FedKD:  # the teacher's may be anything, but W_h needs one like it
        trained(FedKD(teacher(), **kwargs), rounds=1)  # type: ignore[arg-type]
        federation = Federation(client_module(), FedKD(teacher(), features=[("1", "1")], **kwargs), local="loop")  # type: ignore[arg-type]
        with pytest.raises(
            ValueError, match=r"W_h learns by an optimizer like the peer's: .* Needy .*projection=False"
        ):
            run(federation, data_module(2))
        assert federation.last_round is None


def test_a_lightning_modules_teacher_that_was_trained_before() -> None:
    pretrained = ClientModule(teacher(), lr=0.01, optimizer="adam")
    x, y = blobs(48)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 16)
    trainer = L.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                        enable_model_summary=False, accelerator="cpu")  # fmt: skip
    trainer.fit(pretrained, loader)
    federation = trained(FedKD(pretrained))
    assert pretrained._trainer is trainer and not torch.equal(
        own(federation)["model.0.weight"], pretrained.model[0].weight
    )  # type: ignore[index]


def test_the_teachers_optimiser_may_be_given_and_kept() -> None:
    made: list[torch.optim.Optimizer] = []

    def adam(parameters: Any) -> torch.optim.Optimizer:
        made.append(torch.optim.Adam(parameters, lr=0.01))
        return made[-1]

    steps = {}
    for keep in (False, True):
        federation = trained(FedKD(teacher(), teacher_optimizer=adam, keep_optimizer=keep), rounds=3)
        steps[keep] = {float(s["step"]) for o in made[-4:] for s in o.state.values()}
        assert ("optimizer" in federation.store.read(0)) == keep
        made.clear()
    assert max(steps[True]) == 3 * max(steps[False])


def test_a_kept_optimiser_does_not_decay_its_rate_over_the_rounds() -> None:
    """A scheduler starts anew every round, so the rate must too; the moments of teacher and W_h go on."""
    rates: list[float] = []

    class Peer(ClientModule):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)
            step = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": step, "interval": "step"}}

    found = {}
    for keep in (False, True):
        rates.clear()
        algorithm = FedKD(Peer(teacher()), features=[("1", "1")], keep_optimizer=keep)
        federation = Federation(client_module(), algorithm, local=LoopLocal(max_steps=3))
        run(federation, data_module(2), rounds=2)
        assert rates == [0.1, 0.05, 0.025] * 4
        found[keep] = federation.store.read(1)
    for name, tensors in (("optimizer", 4), ("projection_optimizer", 1)):
        assert name not in found[False]
        assert found[True][name].keys() == {"state"} and len(found[True][name]["state"]) == tensors
    assert not torch.equal(found[True]["projections"]["0"], found[False]["projections"]["0"])


def test_the_moments_of_w_h_are_kept_too() -> None:
    """Steps of Adam count on."""
    recipe = ClientModule(teacher(), lr=0.01, optimizer="adam")
    federation = trained(FedKD(recipe, features=[("1", "1")], keep_optimizer=True), rounds=2)
    state = federation.store.read(0)
    steps = [float(s["step"]) for n in ("optimizer", "projection_optimizer") for s in state[n]["state"].values()]
    assert len(steps) == 5 and len(set(steps)) == 1
    once = trained(FedKD(recipe, features=[("1", "1")], keep_optimizer=True), rounds=1).store.read(0)
    assert steps[0] == 2 * float(once["projection_optimizer"]["state"][0]["step"])


# ---------------------------------------------------------------------------------------------------------- resume


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("local", [LoopLocal(lr_decay=0.9), TrainerLocal(lr_decay=0.9)])
def test_resume_gives_the_same_bits(local: Any, tmp_path: Path) -> None:
    def build() -> tuple[Federation, FederatedDataModule]:
        algorithm = FedKD(
            ClientModule(NormNet(), lr=0.01, optimizer="adamw"),
            features=[("model.body.0", "model.body.0")],
            bits=8,
            error_feedback=True,
            keep_optimizer=True,
        )
        federation = Federation(ClientModule(NormNet(), lr=0.1), algorithm, local=copy.deepcopy(local))
        return federation, data_module(4, clients_per_round=3)

    def go(federation: Federation, data: FederatedDataModule, **kwargs: Any) -> None:
        run(federation, data, rounds=4, **kwargs)

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    whole = build()
    go(*whole)
    first = build()
    go(*first, callbacks=[Stop(), ModelCheckpoint(tmp_path, save_last=True)], enable_checkpointing=True)
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    second = build()
    go(*second, ckpt_path=tmp_path / "last.ckpt")
    assert_same(weights(whole[0]), weights(second[0]))
    for k in range(4):
        a, b = whole[0].store.read(k), second[0].store.read(k)
        assert_same(a["teacher"], b["teacher"])
        assert_same(a["projections"], b["projections"])
    assert whole[0].total_bytes_up == second[0].total_bytes_up
    assert not torch.equal(own(first[0])["model.body.0.weight"], own(second[0])["model.body.0.weight"])


class Frozen(nn.Module):
    """A layer that clients do not remember, under one that they do."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.bottom, self.top = network(seed, 7), nn.Linear(CLASSES, CLASSES)
        nn.init.eye_(self.top.weight), nn.init.zeros_(self.top.bias)
        self.bottom.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.bottom(x))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("method", [FedKD, FML])
@pytest.mark.parametrize("kind", ["model", "mapping", "function"])
def test_resume_with_another_initial_teacher_is_refused(method: Any, kind: str, tmp_path: Path) -> None:
    def build(seed: int) -> Federation:
        shared = Frozen(1)
        given: Any = {
            "model": Frozen(seed),
            "mapping": {0: shared, 1: shared, 2: Frozen(seed)},
            "function": lambda k: Frozen(seed + k),
        }[kind]
        return Federation(client_module(), method(given), local=LoopLocal(max_steps=1))

    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}")
    run(build(1), data_module(3), rounds=1, callbacks=[checkpoint], enable_checkpointing=True)
    run(build(1), data_module(3), rounds=2, ckpt_path=tmp_path / "epoch=0.ckpt")
    what = "teacher" if method is FedKD else "local_model"
    with pytest.raises(
        ValueError, match=f"Expected a checkpoint with initial {what} '[0-9a-f]{{64}}', but it was made"
    ):
        run(build(99), data_module(3), rounds=2, ckpt_path=tmp_path / "epoch=0.ckpt")


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: FedKD(teacher(), energy=0.0),
            ValueError,
            "Expected `energy` to be above 0 and at most 1, but got 0.0",
        ),
        (
            lambda: FedKD(teacher(), energy=1.5),
            ValueError,
            "Expected `energy` to be above 0 and at most 1, but got 1.5",
        ),
        (lambda: FedKD(teacher(), energy=Linear(0.9, 2)), ValueError, "Expected `energy` to be above 0 and at most 1"),
        (lambda: FedKD(teacher(), bits=9), ValueError, "Expected `bits` to be an integer from 1 to 8, but got 9"),
        (lambda: FedKD(teacher(), floor=0), ValueError, "Expected `floor` to be a positive number, but got 0"),
        (
            lambda: FedKD(teacher(), hidden="no"),
            ValueError,
            "Expected `hidden` to be True, False or 'auto', but got 'no'",
        ),
        (lambda: FedKD(teacher(), layer_map=0), ValueError, "Expected `layer_map` to be None, a positive number"),
        (lambda: FedKD("bert"), TypeError, "Expected `teacher` to be a torch module, a mapping .* but got 'bert'"),
        (lambda: FedKD(nn.Linear), TypeError, "Expected `teacher` to be a torch module, a mapping"),
        (lambda: FedKD({0: "bert"}), TypeError, "Expected `teacher` to map client ids to torch modules"),
        (lambda: FedKD(teacher(), uplink=LowRank(0.9), error_feedback=True), ValueError, "or codecs of your own"),
        (
            lambda: FedKD(teacher(), uplink=Quantize(8), downlink=Quantize(8), bits=4),
            ValueError,
            "or codecs of your own",
        ),
    ],
)
def test_bad_arguments_are_found_in_the_constructor(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("given", "kwargs", "message"),
    [
        (nn.Linear(WIDTH, CLASSES + 1), {}, r"logits of the same shape, but got \[2, 3\] and \[2, 4\]"),
        (network(1), {"hidden": True}, "under hidden=True, but the student returns none"),
        (network(1), {"features": [("model.7", "0")]}, "Expected a layer of the module, but it has no 'model.7'"),
        (
            network(1, 24),
            {"features": [("model.0", "0")], "projection": False},
            "without a projection, but got 8 and 24",
        ),
        ({0: network(1), 2: network(1)}, {}, r"a model for each of the 4 clients, but \[1, 3\] have none"),
        ({0: network(1), 1: network(1), 2: network(1), 3: nn.Linear(WIDTH, 9)}, {}, r"but got \[2, 3\] and \[2, 9\]"),
        (lambda k: "bert", {}, "Expected `teacher` to make a torch module for client 0, but got str"),
        (network(1).requires_grad_(False), {}, "Expected `peer` to have trainable parameters"),
    ],
)
def test_what_does_not_fit_is_found_before_training(given: Any, kwargs: Any, message: str) -> None:
    federation = Federation(client_module(), FedKD(given, **kwargs), local="loop")
    with pytest.raises((ValueError, TypeError), match=message):
        run(federation, data_module(4))
    assert federation.last_round is None and len(federation.store) == 0


def test_another_teacher_than_the_remembered_one() -> None:
    federation = trained(FedKD(network(1, hidden=7)), rounds=1)
    other = FedKD(network(1, hidden=9))
    with pytest.raises(ValueError, match=r"Expected `teacher` to be the model that was trained before, .* \[7, 6\]"):
        other.personal_model(federation.store.read(0), client_module(), {}, client_id=0)


def test_a_nan_in_one_clients_teacher_leaves_that_client_out() -> None:
    class Poisoned(nn.Module):
        def __init__(self, bad: bool) -> None:
            super().__init__()
            self.net, self.bad = teacher(), bad

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * (torch.nan if self.bad and self.training else 1.0)

    federation = Federation(client_module(), FedKD(lambda k: Poisoned(k == 1)), local="loop")
    run(federation, data_module(3), rounds=1)
    assert federation.last_round is not None and federation.last_round.failures == {"nan_loss": 1}
    assert list(federation.store) == [0, 2]


class Explodes(ClientModule):
    """Where `hit`, a step leaves infinity in a weight, after a loss that was fine."""

    def __init__(self, model: nn.Module, hit: bool) -> None:
        super().__init__(model, lr=0.01)
        self.hit = hit

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = super().configure_optimizers()
        if self.hit:
            weight = self.get_parameter("model.0.weight")
            optimizer.register_step_post_hook(lambda *_: weight.data[0, 0].fill_(torch.inf))
        return optimizer


@pytest.mark.parametrize("method", [FedKD, FML])
def test_a_teacher_that_diverged_is_not_remembered(method: Any) -> None:
    """The client is left out, counted, and goes on from the teacher it had; the loss alone does not show it."""
    hit = {"now": False}

    def build(k: int) -> nn.Module:
        return Explodes(teacher(), hit=hit["now"] and k == 1)

    federation = Federation(client_module(), method(build), local=LoopLocal(max_steps=1))
    key = "teacher" if method is FedKD else "local_model"
    failures, states = [], []

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            failures.append(federation.last_round.failures)  # type: ignore[union-attr]
            states.append(federation.store.read(1)[key]["model.0.weight"])
            hit["now"] = trainer.current_epoch == 0

    run(federation, data_module(3), rounds=3, callbacks=[Watch()])
    assert failures == [{}, {"nan_model": 1}, {}]
    assert torch.equal(states[0], states[1]) and not torch.equal(states[1], states[2])
    assert bool(torch.isfinite(states[2]).all())


def test_the_message_names_the_tensor_and_w_h_counts_too(monkeypatch: Any, caplog: Any) -> None:
    algorithm = FedKD(lambda k: Explodes(teacher(), hit=k == 1))
    federation = Federation(client_module(), algorithm, local=LoopLocal(max_steps=1))
    run(federation, data_module(2), rounds=1)
    assert "client 1's teacher to stay finite, but 'model.0.weight' holds NaN or infinity." in caplog.text
    from dynfed_lightning.hidden import HiddenLoss

    weights = HiddenLoss.weights
    monkeypatch.setattr(HiddenLoss, "weights", lambda self: {n: t / 0 for n, t in weights(self).items()})
    federation = Federation(client_module(), FedKD(teacher(), features=[("1", "1")]), local="loop", min_clients=1)
    with pytest.raises(RoundFailure, match="nan_model: 2"):
        run(federation, data_module(2), rounds=1)
    assert "client 0's W_h to stay finite, but '0' holds NaN or infinity." in caplog.text
    assert len(federation.store) == 0


def test_a_mask_of_infinities_is_no_divergence() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = teacher()
            self.register_buffer("mask", torch.full((2, 2), -torch.inf))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    assert bool(own(trained(FedKD(Masked()), rounds=2))["model.mask"].isinf().all())


@pytest.mark.parametrize("odd", [0, 2])
def test_every_model_that_a_function_makes_is_checked(odd: int) -> None:
    federation = Federation(
        client_module(), FedKD(lambda k: nn.Linear(WIDTH, 9 if k == odd else CLASSES)), local="loop"
    )
    with pytest.raises(ValueError, match=r"logits of the same shape, but got \[2, 3\] and \[2, 9\]"):
        run(federation, data_module(4))
    assert federation.last_round is None


def test_of_many_clients_a_fixed_sample_is_checked() -> None:
    models = FedKD(lambda k: nn.Linear(WIDTH, CLASSES)).teachers
    assert models.kinds(64) == list(range(64))
    sample = models.kinds(1000)
    assert sample == models.kinds(1000) and sample[0] == 0 and len(set(sample)) == 64 and max(sample) < 1000
    assert {k % 4 for k in sample} == {0, 1, 2, 3}


def test_from_yaml(tiny: Any) -> None:
    mlp = {"class_path": "MLP", "init_args": {"in_features": 64, "hidden": [16, 8]}}
    for given in (mlp, {"class_path": "ClientModule", "init_args": {"model": mlp, "lr": 0.2}}):
        arguments = {
            "teacher": given,
            "energy": {"class_path": "Linear", "init_args": {"start": 0.9, "end": 0.99}},
            "bits": 8,
        }
        config = load([tiny("kd", algorithm={"class_path": "FedKD", "init_args": arguments})])
        p, namespace = parse(config)
        built = p.instantiate(namespace)
        assert isinstance(built.algorithm, FedKD) and isinstance(built.algorithm.teachers.given, nn.Module)
        assert built.algorithm.energy(1, 2) == 0.99


def test_the_default_schedule_survives_a_configuration_file() -> None:
    from dynfed_lightning import config

    model = {"class_path": "MLP", "init_args": {"in_features": 64, "hidden": [8]}}
    given = {
        "trainer": {"max_epochs": 2},
        "module": {"class_path": "ClientModule", "init_args": {"model": model}},
        "algorithm": {"class_path": "FedKD", "init_args": {"teacher": model, "uplink": {"class_path": "LowRank"}}},
        "data": {"dataset": "digits", "partitioner": {"class_path": "IID", "init_args": {"num_clients": 2}}},
    }
    text = config.dump(config.check(given))
    assert "Unable" not in text
    parser, namespace = config.parse(config.check(given))
    algorithm = config.instantiate(parser, namespace).algorithm
    assert algorithm.downlink.stages[0].energy(0, 2) == 0.95 and algorithm.uplink.stages[0].energy(1, 2) == 0.98


def test_a_teacher_that_learns_nothing_from_its_student_is_trained_as_if_alone() -> None:
    settings = {"distil": False}, {"weight": (1.0, 0.0)}, {"weight": 1.0}
    alone, one_way, both = (trained(FedKD(teacher(), **kw)) for kw in settings)
    for k in range(2):
        first, second, third = (own(f, k) for f in (alone, one_way, both))
        assert all(torch.equal(first[n], second[n]) for n in first)
        assert any(not torch.equal(first[n], third[n]) for n in first)
    weights = [f.server.weights() for f in (alone, one_way)]
    assert any(not torch.equal(weights[0][n], weights[1][n]) for n in weights[0])


def test_weight_is_checked_at_once() -> None:
    with pytest.raises(ValueError, match="Expected `weight` to be a number >= 0 or a pair"):
        FedKD(teacher(), weight=-1.0)
