"""QuPeD: algorithm 2 by hand, what it reduces to, who keeps what, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from toys import (
    CLASSES,
    WIDTH,
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
    ClientModule,
    FedAvg,
    FederatedDataModule,
    Federation,
    Linear,
    Local,
    LoopLocal,
    QuantizationAware,
    QuPeD,
    TrainerLocal,
    config,
)
from dynfed_lightning.algorithms._peer import Peer
from dynfed_lightning.algorithms._quped_steps import PersonalSteps
from dynfed_lightning.centers import LearnedCenters
from dynfed_lightning.errors import RoundFailure
from dynfed_lightning.losses import taught_kl
from dynfed_lightning.quantized_file import load_quantized
from dynfed_lightning.seeds import derive_seed

ADAM: dict[str, Any] = {"lr": 0.01, "optimizer": "adam"}


def deep(seed: int = 0, hidden: int = 8, norm: bool = True) -> nn.Module:
    """Four layers, of which QuPeD quantises the middle two."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(WIDTH, hidden),
            nn.BatchNorm1d(hidden) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.Sequential(nn.BatchNorm1d(hidden) if norm else nn.Identity(), nn.ReLU()),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, CLASSES),
        )


class Batches:
    """Of an outer Trainer: a list of pairs would be taken for several loaders."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = list(batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def trained(algorithm: Any, local: Any = "loop", rounds: int = 3, module: Any = None, **data: Any) -> Federation:
    federation = Federation(module or client_module(), algorithm, local=local)
    run(federation, data_module(4, skewed(4, 1.0), **data), rounds=rounds)
    assert federation.last_round is not None and federation.last_round.failures == {}
    return federation


# ------------------------------------------------------------------------------------------------- algorithm 2 by hand


def soft(x: Tensor, c: Tensor, sharpness: float) -> Tensor:
    """Q~_c(x), written out."""
    return c[0] + sum(
        (c[j] - c[j - 1]) * torch.sigmoid(sharpness * (x - (c[j] + c[j - 1]) / 2)) for j in range(1, len(c))
    )


def prox_x(y: Tensor, c: Tensor, strength: float) -> Tensor:
    """argmin_z 1/2 (z - y)^2 + strength/2 min_j |z - c_j|, of every value the best among all there could be."""
    out = []
    for v in y.flatten().tolist():
        found = [*c.tolist(), v - strength / 2, v + strength / 2]
        out.append(min(found, key=lambda z: (z - v) ** 2 / 2 + strength / 2 * float((c - z).abs().min())))
    return torch.tensor(out, dtype=torch.float64).view_as(y)


def prox_c(proposal: Tensor, x: Tensor, c: Tensor, strength: float) -> Tensor:
    """argmin_c 1/2 (c - proposal_j)^2 + strength/2 sum_{i in S_j} |x_i - c|, by bisection."""
    nearest = (x.flatten()[:, None] - c).abs().argmin(1)
    out = []
    for j, v in enumerate(proposal.tolist()):
        members = x.flatten()[nearest == j]
        low, high = v - strength * x.numel(), v + strength * x.numel()
        for _ in range(200):
            middle = (low + high) / 2
            slope = middle - v + strength / 2 * float(torch.sign(middle - members).sum())
            low, high = (middle, high) if slope < 0 else (low, middle)
        out.append((low + high) / 2)
    return torch.tensor(out, dtype=torch.float64)


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    p, q = teacher.softmax(1), student.softmax(1)
    return (p * (p / q).log()).sum(1).mean()


@pytest.mark.parametrize("alternate", [True, False])
@pytest.mark.parametrize("global_loss", [True, False])
def test_one_step_by_hand(alternate: bool, global_loss: bool) -> None:
    """Linear models in float64: the three updates, each with its exact gradient and proximal step."""
    torch.manual_seed(0)
    a, b = torch.randn(5, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])
    x0, w0 = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    x0.weight.data = torch.tensor([[0.4, -0.5], [0.2, 0.7]])
    e1, e2, e3, lam, sharpness, lp = 0.3, 0.05, 0.2, 0.4, 6.0, 0.7

    personal, module = ClientModule(x0, lr=e1), ClientModule(copy.deepcopy(w0), lr=e3)
    centers = LearnedCenters(
        1, ends=True, sharpness=sharpness, lam=lam, center_lr=e2, clamp=None, finetune=0, start={"*": [-0.35, 0.45]}
    )
    centers.attach(personal)
    c = centers.centers[0].double().clone()
    x, w = x0.weight.detach().double().clone(), w0.weight.detach().double().clone()
    steps = PersonalSteps(
        Peer(personal, "personal"), centers, lp, round=(0, 1), global_loss=global_loss, alternate=alternate
    )
    outer(1, callbacks=[steps], precision="64-true").fit(module, Batches([(a, b)]))

    def objective(weight: Tensor, t: Tensor) -> Tensor:
        z = a @ weight.T
        return (1 - lp) * F.cross_entropy(z, b) + lp * kl(t, z)

    t = a @ w.T
    x.requires_grad_()
    c.requires_grad_()
    g, h_before = torch.autograd.grad(objective(x, t) + objective(soft(x, c, sharpness), t), [x, c])
    x_next = prox_x((x - e1 * g).detach(), c.detach(), e1 * lam)
    h = torch.autograd.grad(objective(soft(x_next, c, sharpness), t), c)[0] if alternate else h_before
    c_next = prox_c((c - e2 * h).detach(), x_next, c.detach(), e2 * lam).sort().values
    teachers = [x_next, soft(x_next, c_next, sharpness)] if alternate else [x, soft(x, c, sharpness)]
    w.requires_grad_()
    loss = F.cross_entropy(a @ w.T, b) if global_loss else torch.zeros((), dtype=torch.float64)
    loss = loss + lp * sum(kl(a @ w.T, (a @ v.T).detach()) for v in teachers)
    w_next = w - e3 * torch.autograd.grad(loss, w)[0]

    assert x0.weight.dtype == torch.float64
    torch.testing.assert_close(x0.weight.detach(), x_next, rtol=0, atol=1e-12)
    torch.testing.assert_close(centers.centers[0].double(), c_next, rtol=0, atol=1e-7)  # they are float32
    torch.testing.assert_close(module.model.weight.detach().double(), w_next.detach(), rtol=0, atol=1e-7)
    # The case is not one in which the proximal steps, or the order, make no difference.
    assert (x_next - (x - e1 * g)).abs().min() > 1e-3 and (c_next - (c - e2 * h)).abs().min() > 1e-4
    assert (h - h_before).abs().max() > 1e-3 or not alternate


def test_taught_kl() -> None:
    """f_KD against its definition in float64, with the gradients of both."""
    torch.manual_seed(1)
    x, w = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    expected = torch.autograd.grad(kl(w, x), [x, w])
    found = torch.autograd.grad(taught_kl(x, w), [x, w])
    torch.testing.assert_close(taught_kl(x, w), kl(w, x), rtol=0, atol=1e-14)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=0, atol=1e-14)
    with torch.autocast("cpu", torch.bfloat16):
        assert taught_kl(x.float().bfloat16(), w.float()).dtype == torch.float32


# --------------------------------------------------------------------------------------------------------- reductions


class Rounds(L.LightningDataModule):
    """The batches that client `k` trains on, round after round of a federation."""

    def __init__(self, data: FederatedDataModule, client: int) -> None:
        super().__init__()
        self.data, self.client = data, client

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        seed = derive_seed(0, "client", self.trainer.current_epoch, self.client)
        return Batches(self.data.client(self.client).train_loader(seed))


@pytest.mark.parametrize("local", ["loop", "trainer"])
@pytest.mark.parametrize("alternate", [True, False])
@pytest.mark.parametrize("bits", [2, None])
def test_without_distillation_it_is_quantization_aware_training_alone(
    local: str, alternate: bool, bits: int | None
) -> None:
    """Bit for bit over five rounds, two of them fine-tuning: weights, centres, statistics; Adam's moments in between."""
    settings: dict[str, Any] = {
        "bits": bits,
        "lam": 1e-2,
        "center_lr": 1e-2,
        "sharpness": Linear(5.0, 50.0),
        "finetune": 0.4,
        "alternate": alternate,
    }
    algorithm = QuPeD(ClientModule(deep(), **ADAM), lp=0.0, **settings)
    federation = Federation(client_module(), algorithm, local=local)
    data = data_module(2)
    run(federation, data, rounds=5)
    assert federation.server is not None
    for k in range(2):
        alone = ClientModule(deep(), **ADAM)
        quantize = QuantizationAware(**settings)
        outer(5, callbacks=[quantize], reload_dataloaders_every_n_epochs=1).fit(alone, datamodule=Rounds(data, k))
        state = federation.store.read(k)
        assert_same(dict(state["centers"]), quantize.centers)
        personal = algorithm.personal_model(state, federation.server.new_module(), weights(federation), client_id=k)
        assert_same(dict(personal.state_dict()), dict(alone.state_dict()))
        if bits is not None:
            assert len(personal.get_parameter("model.3.weight").unique()) <= 4
            assert quantize.frozen and "index" in state


@pytest.mark.parametrize("local", ["loop", "trainer"])
def test_in_full_precision_and_alone_it_is_local_training(local: str) -> None:
    quped = trained(QuPeD(bits=None, lp=0.0), local, module=ClientModule(deep(), lr=0.1))
    alone = trained(Local(), local, module=ClientModule(deep(), lr=0.1))
    for k in range(4):
        mine = quped.store.read(k)["personal"]
        mine = {n: t for n, t in mine.items() if "num_batches" not in n}  # which does not travel, so Local forgets it
        assert_same(mine, alone.store.read(k)["weights"])
    assert quped.trainer.callback_metrics["accuracy"] == alone.trainer.callback_metrics["accuracy"]


def test_without_distillation_the_global_model_is_fedavgs() -> None:
    """Bit for bit, dropout and all: what happens beside it draws from a stream of its own."""
    module = ClientModule(NormNet(), lr=0.1)
    quped = trained(QuPeD(ClientModule(NormNet(), lr=0.1), lp=0.0, ends=True), module=copy.deepcopy(module))
    assert_same(weights(quped), weights(trained(FedAvg(), module=module)))
    assert quped.last_round is not None
    assert quped.last_round.train_loss == pytest.approx(0.9, abs=0.3)


def test_a_distilled_global_model_differs_and_the_personal_loss_is_not_the_global_one() -> None:
    quped = trained(QuPeD(deep(), lp=0.5))
    avg = trained(FedAvg())
    assert any(not torch.equal(a, b) for a, b in zip(weights(quped).values(), weights(avg).values(), strict=True))
    record = quped.last_round
    assert record is not None and record.train_loss != record.metrics["personal_loss"]


def test_from_the_clients_models_alone_the_global_model_learns() -> None:
    """The paper's literal update: w sees no label, only what the personal models say."""
    personal = ClientModule(deep(), lr=0.02, optimizer="adam")
    federation = Federation(client_module(lr=0.5), QuPeD(personal, lp=0.6, global_loss=False), local="loop")
    trainer = run(federation, data_module(4), rounds=12)
    assert float(trainer.callback_metrics["global_accuracy"]) > 0.75
    still = trained(QuPeD(deep(), lp=0.0, global_loss=False))
    assert_same(weights(still), {f"model.{n}": t for n, t in network().state_dict().items()})


# --------------------------------------------------------------------------------------------- passes and precision


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({}, 5),
        ({"lp": 0.0}, 3),
        ({"alternate": False}, 2),
        ({"bits": None}, 2),
        ({"bits": None, "alternate": False}, 1),
        ({"finetune": 1.0}, 2),
        ({"finetune": 1.0, "lp": 0.0}, 1),
    ],
)
def test_the_passes_a_step_takes_are_those_it_says(settings: dict[str, Any], passes: int) -> None:
    calls = []

    class Counted(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                calls.append(1)
            return self.inner(x)

    module = client_module()
    algorithm = QuPeD(Counted(deep()), **settings)
    run(Federation(module, algorithm, local=LoopLocal(max_steps=3)), data_module(1), rounds=1)
    assert len(calls) == 3 * passes


def scaled() -> Any:
    class Scaled(MixedPrecision):
        def forward_context(self) -> Any:  # float16 on the CPU is not what is tested here
            return torch.autocast("cpu", enabled=False)

    return Scaled("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize("alternate", [True, False])
@pytest.mark.parametrize("finetune", [0.0, 0.5])
def test_a_gradient_scaler_changes_nothing(alternate: bool, finetune: float) -> None:
    """A scale of 2^16 on float32: powers of two, so the same bits, if everything is unscaled, clipping included."""
    found = []
    for plugins in (None, [scaled()]):
        local = TrainerLocal(trainer_kwargs={"plugins": plugins, "gradient_clip_val": 0.05})
        f = trained(QuPeD(deep(), center_lr=1e-2, alternate=alternate, finetune=finetune), local, rounds=2)
        found.append([weights(f), *(f.store.read(k)[n] for k in range(4) for n in ("personal", "centers"))])
    for a, b in zip(*found, strict=True):
        assert_same(a, b)


def test_a_step_that_the_scaler_skips_moves_neither_weights_nor_centres() -> None:
    class Explodes(ClientModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * torch.inf

    local = TrainerLocal(max_steps=1, trainer_kwargs={"plugins": [scaled()]})
    personal = Explodes(deep(), lr=0.1)
    f = Federation(client_module(), QuPeD(personal, lp=0.0, lam=0.1, center_lr=0.1, finetune=0), local=local)
    with pytest.raises(RoundFailure, match="nan_loss: 1"):
        run(f, data_module(1), rounds=1)  # its loss is not finite, which is said; its model is as it was
    steps = PersonalSteps(Peer(personal, "personal"), LearnedCenters(2, lam=0.1, center_lr=0.1, finetune=0), 0.0)
    steps.centers.attach(personal)
    centres = [c.clone() for c in steps.centers.centers]
    x, y = blobs(16)
    outer(1, callbacks=[steps], plugins=[scaled()]).fit(client_module(), Batches([(x, y)]))
    for name, p in deep().named_parameters():
        assert torch.equal(personal.model.get_parameter(name), p), name
    assert all(torch.equal(a, b) for a, b in zip(steps.centers.centers, centres, strict=True))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_other_precisions(precision: Any) -> None:
    local = TrainerLocal(trainer_kwargs={"precision": precision})
    f = trained(QuPeD(deep(), lp=0.5, center_lr=1e-3), local, rounds=5)
    state = f.store.read(0)
    assert all(c.dtype == torch.float32 for c in state["centers"].values())
    assert f.trainer.callback_metrics["accuracy"] > 0.3


def test_autocast_does_not_keep_old_weights() -> None:
    """Within one training step w learns from the personal model as its step left it. Lightning's own autocast keeps no copies
    of weights, torch's does, and a plugin or a user may be using that."""

    class Keeping(MixedPrecision):
        def forward_context(self) -> Any:
            return torch.autocast("cpu", torch.bfloat16)

    told: list[Tensor] = []

    class Told(PersonalSteps):
        def _steps(self, *args: Any) -> Any:
            told[:] = super()._steps(*args) or []
            return told

    personal = ClientModule(deep(norm=False), lr=1.0)
    centers = LearnedCenters(None)
    centers.attach(personal)
    steps = Told(Peer(personal, "personal"), centers, 0.5)
    x, y = blobs(16)
    outer(1, callbacks=[steps], plugins=[Keeping("bf16-mixed", "cpu")]).fit(client_module(), Batches([(x, y)]))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(told[0], personal(x))


# ------------------------------------------------------------------------------------------------ who keeps what


@pytest.mark.slow
@pytest.mark.parametrize("local", ["loop", "trainer"])
def test_two_architectures_and_three_widths_train_together(local: str) -> None:
    small, large = ClientModule(deep(1), **ADAM), ClientModule(NormNet(), **ADAM)
    algorithm = QuPeD([small, large], [1, None, 2, None, 4], ends=True, lp=[0.3, 0.6], center_lr=1e-3)
    federation = Federation(client_module(), algorithm, local=local)
    trainer = run(federation, data_module(6), rounds=10)
    record = federation.last_round
    assert record is not None and record.failures == {}
    assert trainer.callback_metrics["accuracy"] > 0.55 and trainer.callback_metrics["global_accuracy"] > 0.8
    bits = {r.client: r.metrics["personal_bits"] for r in record.clients}
    assert bits[1] == bits[3] == 32.0 and bits[0] < bits[2] < bits[4] < 32.0
    assert federation.server is not None
    values = {}
    for k in (0, 2, 4):
        personal = algorithm.personal_model(
            federation.store.read(k), federation.server.new_module(), weights(federation), client_id=k
        )
        values[k] = [len(p.unique()) for n, p in personal.named_parameters() if n.endswith("3.weight")]
    assert values[0] == [2] and 2 < values[2][0] <= 4 and 4 < values[4][0] <= 16
    assert record.metrics["personal_mb"] == pytest.approx(
        sum(r.num_examples * r.metrics["personal_mb"] for r in record.clients)
        / sum(r.num_examples for r in record.clients)
    )


def test_what_travels_is_the_global_model() -> None:
    for algorithm in (QuPeD(deep(), 1), FedAvg()):
        federation = trained(algorithm)
        assert list(federation.runtime.uplink_schema.names) == list(weights(federation))
    small = trained(QuPeD(deep(), uplink=4, downlink=8))
    assert small.total_bytes_up < federation.total_bytes_up


def test_the_size_is_that_of_the_file(tmp_path: Path) -> None:
    wide = deep(hidden=64)
    f = trained(QuPeD(wide, {"*3.weight": 1, "*5.weight": 4}), rounds=2)
    algorithm = f.algorithm
    assert isinstance(algorithm, QuPeD) and f.last_round is not None and f.server is not None
    said = {r.client: r.metrics["personal_mb"] for r in f.last_round.clients}
    written = algorithm.save(f, 2, tmp_path / "client2.safetensors")
    size = (tmp_path / "client2.safetensors").stat().st_size
    header = int.from_bytes((tmp_path / "client2.safetensors").read_bytes()[:8], "little") + 8
    assert size - header == pytest.approx(said[2] * 1e6, abs=16)  # num_batches_tracked is in the file
    assert {r.name: r.bits for r in written.layers} == {"model.3.weight": 1, "model.5.weight": 4}
    back = ClientModule(deep(5, hidden=64))
    load_quantized(back, tmp_path / "client2.safetensors")
    mine = algorithm.personal_model(f.store.read(2), f.server.new_module(), weights(f), client_id=2)
    assert_same(dict(back.state_dict()), dict(mine.state_dict()))


def test_a_client_that_is_first_drawn_in_the_last_phase_hardens_then() -> None:
    f = trained(QuPeD(deep(), 1, finetune=0.5, lam=1e-3), rounds=8, clients_per_round=1)
    states = {k: f.store.read(k) for k in range(4)}
    assert any(states.values()) and f.last_round is not None
    last = f.last_round.clients[0].client
    assert "index" in states[last] and f.last_round.metrics["distance"] == 0.0
    assert len(states[last]["personal"]["model.3.weight"].unique()) == 2
    assert f.server is not None
    for k, s in states.items():
        personal = f.algorithm.personal_model(s, f.server.new_module(), weights(f), client_id=k)
        assert len(personal.get_parameter("model.3.weight").unique()) == 2  # whatever they have done so far


def test_schedules_are_over_rounds() -> None:
    seen = []

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            m = pl_module.last_round.metrics
            seen.append((m["lam"], m["sharpness"], m["distance"] > 0))

    f = Federation(client_module(), QuPeD(deep(), lam=1e-3, sharpness=Linear(10, 50)), local="loop")
    run(f, data_module(2), rounds=5, callbacks=[Watch()])
    assert [round(lam, 9) for lam, _, _ in seen] == [1e-3, 2e-3, 3e-3, 4e-3, 5e-3]
    assert [p for _, p, _ in seen] == [10, 20, 30, 40, 50]
    assert [d for _, _, d in seen] == [True] * 4 + [False]


@pytest.mark.parametrize("keep", [True, False])
def test_the_optimisers_memory_stays_or_goes(keep: bool) -> None:
    f = trained(QuPeD(ClientModule(deep(), **ADAM), keep_optimizer=keep), rounds=2)
    state = f.store.read(1)
    assert ("optimizer" in state) == keep
    if keep:
        batches = len(f.runtime.data(1).train_loader(0))
        assert float(next(iter(state["optimizer"]["state"].values()))["step"]) == 2 * batches


@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
def test_moments_of_layers_whose_weights_are_centres_are_forgotten(optimizer: str) -> None:
    """And those of all other tensors go on, over rounds of the last phase."""

    class Own(ClientModule):
        def configure_optimizers(self) -> Any:
            return (torch.optim.Adam if optimizer == "adam" else torch.optim.Adagrad)(self.parameters(), 0.01)

    f = trained(QuPeD(Own(deep(norm=False)), finetune=0.5), rounds=4)
    state = f.store.read(1)
    assert "index" in state
    names = [n for n, _ in Own(deep(norm=False)).named_parameters()]
    kept = {names[i]: s for i, s in state["optimizer"]["state"].items()}
    assert set(kept) == set(names) - set(state["centers"]) and len(state["centers"]) == 2
    batches = len(f.runtime.data(1).train_loader(0))
    assert {float(s["step"]) for s in kept.values()} == {4 * batches}


@pytest.mark.parametrize("alternate", [True, False])
def test_the_proximal_step_is_at_the_rate_of_its_step(alternate: bool) -> None:
    """A scheduler that counts steps has not moved on yet; QuantizationAware alone is the same."""

    class Falls(ClientModule):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.1**k)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    x, y = blobs(64)
    data = Batches((x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16))
    personal, alone = Falls(deep(norm=False)), Falls(deep(norm=False))
    settings: dict[str, Any] = {"finetune": 0.0, "lam": 0.5, "clamp": None}
    centers = LearnedCenters(2, **settings)
    centers.attach(personal)
    steps = PersonalSteps(Peer(personal, "personal"), centers, 0.0, alternate=alternate)
    outer(1, callbacks=[steps]).fit(ClientModule(deep(norm=False), lr=0.1), data)
    quantize = QuantizationAware(2, **settings, alternate=alternate)
    seen: list[dict[str, Tensor]] = []

    class Before(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.append({n: t.detach().clone() for n, t in pl_module.state_dict().items()})

    outer(1, callbacks=[quantize, Before()]).fit(alone, data)
    assert_same(dict(personal.state_dict()), seen[-1])


def test_a_batch_that_the_personal_model_skips_teaches_labels_only_where_they_are_to_teach() -> None:
    class Skips(ClientModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None

    x, y = blobs(64)
    for global_loss in (True, False):
        personal, module = Skips(deep(), lr=0.1), ClientModule(deep(1), lr=0.1)
        before = {n: p.detach().clone() for n, p in module.named_parameters()}
        centers = LearnedCenters(2)
        centers.attach(personal)
        steps = PersonalSteps(Peer(personal, "personal"), centers, 0.5, global_loss=global_loss)
        outer(1, callbacks=[steps]).fit(module, Batches([(x, y)] * 2))
        moved = any(not torch.equal(p.detach(), before[n]) for n, p in module.named_parameters())
        assert moved == global_loss


NO_CHECKPOINT = "ignore:Be aware that when using `ckpt_path`:UserWarning"


@pytest.mark.filterwarnings(NO_CHECKPOINT)
@pytest.mark.parametrize("local", ["loop", "trainer"])
def test_resume_gives_the_same_bits(local: str, tmp_path: Path) -> None:
    def build() -> tuple[Federation, FederatedDataModule]:
        algorithm = QuPeD(ClientModule(NormNet(), **ADAM), ends=True, center_lr=1e-3, finetune=0.34)
        return Federation(ClientModule(NormNet(), lr=0.1), algorithm, local=local), data_module(4, clients_per_round=3)

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 2

    whole, first, second = build(), build(), build()
    run(*whole, rounds=6)
    kept = ModelCheckpoint(tmp_path, save_last=True)
    run(*first, rounds=6, callbacks=[Stop(), kept], enable_checkpointing=True)
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    run(*second, rounds=6, ckpt_path=tmp_path / "last.ckpt")
    assert_same(weights(whole[0]), weights(second[0]))
    for k in range(4):
        a, b = whole[0].store.read(k), second[0].store.read(k)
        assert a.keys() == b.keys()
        for name in ("personal", "centers", "index"):
            assert_same(a.get(name, {}), b.get(name, {}))


@pytest.mark.filterwarnings(NO_CHECKPOINT)
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: QuPeD(deep(), 3), r"checkpoint with bits \[3, 3\], but it was made with \[2, 2\]"),
        (lambda: QuPeD(deep(), [2, None]), r"checkpoint with bits \[2, 'None'\], but it was made with \[2, 2\]"),
        (lambda: QuPeD(deep(7), 2), "checkpoint with initial personal '[0-9a-f]{64}', but it was made with"),
    ],
)
def test_resume_of_other_models_is_refused(other: Any, message: str, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}")
    run(
        Federation(client_module(), QuPeD(deep(), 2), local="loop"),
        data_module(2),
        rounds=1,
        callbacks=[checkpoint],
        enable_checkpointing=True,
    )
    with pytest.raises(ValueError, match=message):
        run(
            Federation(client_module(), other(), local="loop"),
            data_module(2),
            rounds=2,
            ckpt_path=tmp_path / "epoch=0.ckpt",
        )


# -------------------------------------------------------------------------------------------------- what goes wrong


class Tamper(L.Callback):
    """Does something to a federation before its round 2."""

    def __init__(self, what: Any) -> None:
        self.what = what

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            self.what(pl_module)


def failures_after(what: Any, rounds: int = 2) -> tuple[Federation, dict[str, int]]:
    f = Federation(client_module(), QuPeD(deep()), local="loop")
    run(f, data_module(3), rounds=rounds, callbacks=[Tamper(what)])
    assert f.last_round is not None
    return f, f.last_round.failures


def test_lost_memory_is_noticed() -> None:
    f, failures = failures_after(lambda f: f.store.write(1, {}))
    assert failures == {"lost_state": 1} and f.store.read(1) == {}
    assert f.store.read(0)["rounds"] == 2


def test_another_clients_memory_is_noticed() -> None:
    algorithm, module = QuPeD(deep()), client_module()
    g = Federation(module, algorithm, local="loop")
    run(g, data_module(3), rounds=1)
    assert g.server is not None
    with pytest.raises(ValueError, match="Expected the memory of client 1, but got that of client 2"):
        algorithm.personal_model(g.store.read(2), g.server.new_module(), weights(g), client_id=1)
    state = g.store.read(1)
    state["centers"] = {n: c[:2] for n, c in state["centers"].items()}
    with pytest.raises(ValueError, match=r"Expected 4 centres of 'model.3.weight' at 2 bits, but the state has 2"):
        algorithm.personal_model(state, g.server.new_module(), weights(g), client_id=1)
    state = g.store.read(1)
    state["personal"] = {n: t[..., :1] for n, t in state["personal"].items() if t.ndim}
    with pytest.raises(ValueError, match="Expected `personal` to be the model that was trained before, with"):
        algorithm.personal_model(state, g.server.new_module(), weights(g), client_id=1)


@pytest.mark.parametrize(("bits", "alternate"), [(2, True), (2, False), (None, True)])
def test_a_client_whose_model_breaks_is_left_out_and_keeps_what_it_had(bits: int | None, alternate: bool) -> None:
    class Breaks(ClientModule):
        broken = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * (torch.nan if self.broken and batch_idx == 2 else 1.0)

    given = {k: Breaks(deep(), lr=0.1) for k in range(3)}
    f = Federation(
        client_module(), QuPeD(given, bits, lp=0.5 if bits else 0.0, alternate=alternate, finetune=0), local="loop"
    )
    before: dict[str, Any] = {}

    def tamper(f: Federation) -> None:
        before.update(f.store.read(1))
        given[1].broken = True

    run(f, data_module(3), rounds=2, callbacks=[Tamper(tamper)])
    assert f.last_round is not None and f.last_round.failures == {"nan_model": 1}
    after = f.store.read(1)
    assert after["rounds"] == 1 and f.store.read(0)["rounds"] == 2
    assert_same(after["personal"], before["personal"])
    assert_same(after["centers"], before["centers"])
    assert f.trainer.callback_metrics["accuracy"] > 0


def test_a_client_of_one_row() -> None:
    """It trains; with batch norm it cannot, is left out by name, and the others go on."""
    x, y = blobs(33)

    class Uneven(IID):
        def __call__(self, labels: Any, seed: int) -> list[Tensor]:
            return [torch.arange(32), torch.tensor([32])]

    for norm, failures in ((False, {}), (True, {"crash": 1})):
        data = FederatedDataModule((x, y), Uneven(2), test=(x, y), batch_size=16)
        f = Federation(client_module(), QuPeD(deep(norm=norm)), local="loop")
        run(f, data, rounds=2)
        assert f.last_round is not None and f.last_round.failures == failures
        assert bool(f.store.read(1)) != norm


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: QuPeD("resnet"), TypeError, "Expected `personal` to be a torch module"),
        (lambda: QuPeD([]), TypeError, "Expected `personal` to list torch modules"),
        (lambda: QuPeD(bits=9), ValueError, "Expected `bits` to be an integer from 1 to 8, but got 9"),
        (lambda: QuPeD(bits={0: 2, 1: 0}), ValueError, "Expected `bits` to be an integer from 1 to 8, but got 0"),
        (lambda: QuPeD(bits=[2, 16]), ValueError, "Expected `bits` to be an integer from 1 to 8, but got 16"),
        (lambda: QuPeD(bits=[]), ValueError, "to have entries, but it is empty"),
        (lambda: QuPeD(lp=1.5), ValueError, r"Expected `lp` to be in \[0, 1\], but got 1.5"),
        (lambda: QuPeD(lp=[0.5, -1]), ValueError, r"Expected `lp` to be in \[0, 1\], but got -1"),
        (lambda: QuPeD(lam=-1.0), ValueError, "Expected `lam` to be >= 0"),
        (lambda: QuPeD(sharpness=0), ValueError, "Expected `sharpness` to be positive"),
        (lambda: QuPeD(finetune=2), ValueError, "Expected `finetune` to be a number from 0 to 1"),
        (lambda: QuPeD(clamp=0), ValueError, "Expected `clamp` to be a positive number"),
    ],
)
def test_bad_arguments(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuPeD(network(), 2), "to have layers between the first and the last to quantise"),
        (lambda: QuPeD(deep(), {"*9.weight": 2}), r"Expected the pattern '\*9.weight' of `bits` to match a layer"),
        (lambda: QuPeD(deep(), {0: 1, 1: 2}), "Expected `bits` to have an entry for client 2, but it has none"),
        (lambda: QuPeD(deep(), lp={0: 0.1}), "Expected `lp` to have an entry for client 1, but it has none"),
        (lambda: QuPeD({0: deep()}), "Expected `personal` to have a model for each of the 3 clients"),
        (
            lambda: QuPeD(nn.Sequential(*deep()[:-1], nn.Linear(8, 5))),  # type: ignore[index]
            r"logits of the same shape, but got \[2, 5\] and \[2, 3\]",
        ),
        (lambda: QuPeD(deep(), personal_optimizer=lambda p: 3), "Expected `personal_optimizer` to make an Optimizer"),
        (lambda: QuPeD(deep(), bits=lambda k: 9 if k == 2 else 1), "from 1 to 8, but got 9"),
        (
            lambda: QuPeD(deep(), personal_optimizer=lambda p: torch.optim.SGD(list(p)[:4], lr=0.1)),
            "Expected an optimiser to step 'model.3.weight', which is quantised, but none does",
        ),
    ],
)
def test_what_does_not_fit_is_found_before_training(make: Any, message: str) -> None:
    federation = Federation(client_module(), make(), local="loop")
    with pytest.raises((ValueError, TypeError), match=message):
        run(federation, data_module(3))
    assert federation.last_round is None


def test_weights_beyond_the_clamp() -> None:
    """Given models must begin within it; those that begin as the global model are clamped."""
    large = deep()
    with torch.no_grad():
        large[3].weight[0, 0] = 3.0  # type: ignore[index]
    f = Federation(client_module(), QuPeD(large), local="loop")
    with pytest.raises(ValueError, match=r"weights of 'model.3.weight' within `clamp` = 1.0, but the largest is 3"):
        run(f, data_module(3))
    g = trained(QuPeD(finetune=0), module=ClientModule(large, lr=0.1), rounds=1)
    assert g.store.read(0)["personal"]["model.3.weight"].abs().max() <= 1.0


def test_accumulated_gradients_are_refused() -> None:
    local = TrainerLocal(trainer_kwargs={"accumulate_grad_batches": 2})
    with pytest.raises(ValueError, match="Expected `accumulate_grad_batches` to be 1 beside `personal`"):
        run(Federation(client_module(), QuPeD(deep()), local=local), data_module(2))


def test_it_needs_to_know_how_many_rounds() -> None:
    with pytest.raises(ValueError, match="Expected a number of rounds"):
        run(
            Federation(client_module(), QuPeD(deep()), local="loop"), data_module(2), rounds=-1, max_time={"minutes": 1}
        )


def test_from_yaml(tmp_path: Path) -> None:
    """Two architectures dealt out in turn, bits by list and by client, schedules by name; what is written is read again."""
    pytest.importorskip("jsonargparse")
    text = """
trainer: {max_epochs: 2, accelerator: cpu, logger: false, enable_checkpointing: false, enable_progress_bar: false}
module:
  class_path: ClientModule
  init_args: {lr: 0.05, model: &net {class_path: PaperCNN, init_args: {channels: [2, 3], latent: 8}}}
data: {dataset: digits, partitioner: {class_path: IID, init_args: {num_clients: 3}}}
algorithm:
  class_path: QuPeD
  init_args:
    personal: [*net, {class_path: PaperCNN, init_args: {channels: [3, 5], latent: 16}}]
    bits: BITS
    lp: [0.2, 0.5]
    sharpness: {class_path: Linear, init_args: {start: 10, end: 50}}
"""
    for i, (said, meant) in enumerate(
        (("[1, null, '{model.conv2.weight: 4}']", 3), ("{0: 1, 1: 2, 2: null}", 3), ("2", 0))
    ):
        file = tmp_path / f"{i}.yaml"
        file.write_text(text.replace("BITS", said.replace("'", "")))
        loaded = config.load([file])
        file.write_text(config.dump(loaded))
        algorithm = config.instantiate(*config.parse(config.load([file]))).algorithm
        assert isinstance(algorithm, QuPeD) and algorithm.models is not None and len(algorithm.models.given) == 2  # type: ignore[arg-type]
        assert meant == 0 or len(algorithm.bits) == meant
        assert [algorithm._bits(k) for k in range(3)] == [
            [1, None, {"model.conv2.weight": 4}],
            [1, 2, None],
            [2, 2, 2],
        ][i]
        assert algorithm._lp(2) == 0.2
