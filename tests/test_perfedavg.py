"""Per-FedAvg: the meta-gradients by hand (HF's against the exact Hessian), what is judged, and what it reduces to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import MixedPrecision
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
    LoopLocal,
    PerFedAvg,
    TrainerLocal,
)
from dynfed_lightning.algorithms.perfedavg import MetaSteps
from dynfed_lightning.seeds import derive_seed


def smooth() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, CLASSES))


class Batches:
    def __init__(self, *batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def meta_gradient(model: nn.Module, parts: list[tuple[Tensor, Tensor]], alpha: float, variant: str) -> list[Tensor]:
    """In float64; HF with the exact Hessian, by differentiating twice."""
    named = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    values = list(named.values())

    def f(at: list[Tensor], part: tuple[Tensor, Tensor]) -> Tensor:
        given = dict(zip(named, at, strict=True))
        return F.cross_entropy(torch.func.functional_call(model.double(), given, (part[0].double(),)), part[1])

    g = torch.autograd.grad(f(values, parts[0]), values)
    inner = [(p - alpha * d).detach().requires_grad_() for p, d in zip(values, g, strict=True)]
    v = torch.autograd.grad(f(inner, parts[1]), inner)
    return list(v) if variant == "FO" else corrected(model, list(v), parts[2], alpha)


def corrected(model: nn.Module, v: list[Tensor], part: tuple[Tensor, Tensor], alpha: float) -> list[Tensor]:
    """``v - alpha H(w; D'') v``."""
    named = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    loss = F.cross_entropy(torch.func.functional_call(model.double(), named, (part[0].double(),)), part[1])
    first = torch.autograd.grad(loss, list(named.values()), create_graph=True)
    product = torch.autograd.grad(first, list(named.values()), grad_outputs=v)
    return [a - alpha * h for a, h in zip(v, product, strict=True)]


@pytest.mark.parametrize("variant", ["FO", "HF"])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_by_hand(variant: str, whole: bool, accumulate: int) -> None:
    alpha, lr, n = 0.5, 0.2, {"FO": 2, "HF": 3}[variant]
    x, y = blobs(24, seed=5)
    batches = [(x, y)] if accumulate == 1 else [(x[:12], y[:12]), (x[12:], y[12:])]
    module = ClientModule(smooth().double(), lr=lr)
    meta = MetaSteps(alpha, variant, delta=1e-4, whole=whole)
    outer(1, callbacks=[meta], precision="64-true", accumulate_grad_batches=accumulate).fit(module, Batches(*batches))
    rows = len(batches[0][0])
    cut = [slice(0, rows) if whole else slice(i * rows // n, (i + 1) * rows // n) for i in range(n)]
    if accumulate == 1:
        parts = [[(a[c], b[c]) for c in cut] for a, b in batches]
        grads = [meta_gradient(smooth(), p, alpha, variant) for p in parts]
    else:  # both batches give one gradient, and HF's correction is of that
        grads = [meta_gradient(smooth(), [(a[c], b[c]) for c in cut[:2]], alpha, "FO") for a, b in batches]
    mean = [sum(g) / len(g) for g in zip(*grads, strict=True)]
    if variant == "HF" and accumulate == 2:
        thirds = torch.cat([a[cut[2]] for a, _ in batches]), torch.cat([b[cut[2]] for _, b in batches])
        mean = corrected(smooth(), mean, thirds, alpha)
    for p, q, g in zip(module.parameters(), smooth().parameters(), mean, strict=True):
        torch.testing.assert_close(p.detach(), q.detach().double() - lr * g, rtol=0, atol=1e-8)


def test_hf_is_nearer_to_the_exact_meta_gradient_than_fo() -> None:
    x, y = blobs(24, seed=5)
    exact = meta_gradient(smooth(), [(x, y)] * 3, 0.5, "HF")
    first = meta_gradient(smooth(), [(x, y)] * 3, 0.5, "FO")
    assert sum(float((a - b).square().sum()) for a, b in zip(exact, first, strict=True)) > 1e-4


@pytest.mark.parametrize("variant", ["FO", "HF"])
@pytest.mark.parametrize("local", ["loop", "trainer"])
def test_without_alpha_it_is_fedavg(variant: str, local: str) -> None:
    """Bit for bit, batch norm, dropout and all, on whole batches."""
    found = []
    for algorithm in (PerFedAvg(0.0, variant, whole=True), FedAvg()):
        federation = Federation(ClientModule(NormNet(), lr=0.1), algorithm, local=local)
        run(federation, data_module(4, skewed(4, 1.0)), rounds=3)
        found.append(weights(federation))
    assert_same(*found)


def test_without_alpha_it_is_fedavg_on_the_other_half_of_each_batch() -> None:
    x, y = blobs(32)
    halves = [(x[8:16], y[8:16]), (x[24:], y[24:])]
    ours, theirs = client_module(), client_module()
    outer(1, callbacks=[MetaSteps(0.0)]).fit(ours, Batches((x[:16], y[:16]), (x[16:], y[16:])))
    outer(1).fit(theirs, Batches(*halves))
    assert_same(dict(ours.state_dict()), dict(theirs.state_dict()))


def test_the_running_statistics_are_those_of_the_second_part() -> None:
    x, y = blobs(24)
    module = ClientModule(nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, CLASSES)), lr=0.1)
    outer(1, callbacks=[MetaSteps(0.1, "HF")]).fit(module, Batches((x, y)))
    norm = module.model[0]
    torch.testing.assert_close(norm.running_mean, 0.1 * x[8:16].mean(0), rtol=0, atol=1e-6)
    assert int(norm.num_batches_tracked) == 1


def test_dropout_is_the_same_on_both_sides_of_the_difference() -> None:
    """Were it not, its noise over 2 delta would drown the gradient."""
    moved = []
    for variant in ("FO", "HF"):
        module = ClientModule(nn.Sequential(nn.Linear(WIDTH, 64), nn.Dropout(0.5), nn.Linear(64, CLASSES)), lr=1.0)
        torch.manual_seed(0)
        for p in module.parameters():
            nn.init.normal_(p, std=0.1)
        start = [p.detach().clone() for p in module.parameters()]
        torch.manual_seed(1)
        outer(1, callbacks=[MetaSteps(0.1, variant, delta=1e-3, whole=True)]).fit(module, Batches(blobs(30)))
        moved.append(torch.cat([(p - s).flatten() for p, s in zip(module.parameters(), start, strict=True)]).norm())
    assert 0.5 * moved[0] < moved[1] < 1.5 * moved[0] and moved[0] != moved[1]


# -------------------------------------------------------------------------------------------------------- what is judged


@pytest.mark.parametrize("local", ["loop", "trainer"])
@pytest.mark.parametrize("steps", [1, 3])
def test_clients_are_judged_after_their_own_steps(local: str, steps: int) -> None:
    """The current global model, one (three) steps of SGD at alpha further, on the client's own batches."""
    alpha = 0.3
    algorithm = PerFedAvg(alpha, steps=steps)
    federation = Federation(client_module(optimizer="adam", lr=0.01), algorithm, local=local)
    data = data_module(4, skewed(4, 0.5))
    trainer = run(federation, data, rounds=2)
    x, y = blobs(90, seed=1)
    each = []
    for k in range(4):
        model = client_module()
        model.load_state_dict(weights(federation))
        batches = list(data.client(k).train_loader(derive_seed(0, "adapt", k)))
        for i in range(steps):
            a, b = batches[i]
            grads = torch.autograd.grad(F.cross_entropy(model(a), b), list(model.parameters()))
            with torch.no_grad():
                for p, g in zip(model.parameters(), grads, strict=True):
                    p -= alpha * g
        each.append(float((model(x).argmax(1) == y).float().mean()))
    assert float(trainer.callback_metrics["accuracy"]) == pytest.approx(sum(each) / 4, abs=1e-6)
    model.load_state_dict(weights(federation))
    alone = float((model(x).argmax(1) == y).float().mean())
    assert float(trainer.callback_metrics["global_accuracy"]) == pytest.approx(alone, abs=1e-6)
    assert alone != pytest.approx(sum(each) / 4, abs=1e-4)


@pytest.mark.filterwarnings("ignore:.*exists and is not empty", "ignore:.*does not have many workers")
def test_the_steps_are_plain_whatever_clients_train_with(tmp_path: Any) -> None:
    """Neither clipped nor accumulated nor cut short nor written to disk."""
    kwargs = {
        "gradient_clip_val": 1e-6,
        "gradient_clip_algorithm": "value",
        "accumulate_grad_batches": 2,
        "max_time": "00:00:00:00",
        "enable_checkpointing": True,
        "default_root_dir": str(tmp_path),
    }
    found = []
    for local in (TrainerLocal(), TrainerLocal(trainer_kwargs=kwargs)):
        data = data_module(2)
        federation = Federation(client_module(), PerFedAvg(0.3, steps=3), local=TrainerLocal())
        run(federation, data, rounds=1)
        assert federation.server is not None
        module = federation.server.new_module()
        client = SimpleNamespace(executor=local, data=data.client(0), id=0, round=0, num_rounds=1, seed=5)
        federation.algorithm.adapt(client, module)  # type: ignore[arg-type]
        found.append({n: p.detach().clone() for n, p in module.named_parameters()})
    assert_same(*found)
    assert not torch.equal(found[0]["model.0.weight"], weights(federation)["model.0.weight"])
    assert not list(tmp_path.rglob("*.ckpt"))


def test_weights_that_become_infinite_are_not_judged(caplog: Any) -> None:
    """With a loss that was finite before the step."""

    class Far(PerFedAvg):
        def client_callbacks(self, client: Any, received: Any) -> list[L.Callback]:
            return []

    class Steep(ClientModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return 100 * super().training_step(batch, batch_idx)

    federation = Federation(Steep(network(), lr=1e-4), Far(3e38), local="loop")
    trainer = run(federation, data_module(2), rounds=1)
    assert trainer.callback_metrics["accuracy"] == trainer.callback_metrics["global_accuracy"] > 0
    assert "adapted model to stay finite" in caplog.text


def test_judging_changes_nothing() -> None:
    """Neither the federation's weights, nor its randomness, nor the callbacks and logger that clients train with."""
    seen = []

    class Tell(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(1)

    found = []
    for often in (1, 3):
        local = TrainerLocal(callbacks=[Tell()])
        federation = Federation(ClientModule(NormNet(), lr=0.1), PerFedAvg(0.2), local=local)
        run(federation, data_module(3), rounds=3, check_val_every_n_epoch=often)
        found.append(weights(federation))
        assert local.max_steps == -1 and len(local.callbacks) == 1
    assert_same(*found)
    assert len(seen) == 2 * 3 * 3


def test_a_client_that_cannot_be_adapted_is_judged_by_the_global_model(caplog: Any) -> None:
    class Adapts(PerFedAvg):
        def adapt(self, client: Any, module: Any) -> None:
            module.broken = True
            super().adapt(client, module)

    class Broken(ClientModule):
        broken = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * (torch.nan if self.broken else 1.0)

    federation = Federation(Broken(network(), lr=0.1), Adapts(0.2), local="loop")
    trainer = run(federation, data_module(2), rounds=1)
    assert trainer.callback_metrics["accuracy"] == trainer.callback_metrics["global_accuracy"] > 0
    assert "is judged by the global model" in caplog.text


@pytest.mark.slow
def test_it_personalises() -> None:
    """Skewed clients: a step on one's own rows is worth more after Per-FedAvg than the global model is."""
    federation = Federation(client_module(), PerFedAvg(0.3, steps=3), local="loop")
    trainer = run(federation, data_module(6, skewed(6, 0.2)), rounds=15)
    own = float(trainer.callback_metrics["own_accuracy"])
    average = Federation(client_module(), FedAvg(), local="loop")
    other = run(average, data_module(6, skewed(6, 0.2)), rounds=15)
    assert own > float(other.callback_metrics["own_accuracy"])


# ------------------------------------------------------------------------------------------------- modules and batches


def test_modules_of_every_kind() -> None:
    x, y = blobs()
    rows = [{"x": a, "label": b} for a, b in zip(x, y, strict=True)]
    data = FederatedDataModule(rows, IID(3), test=rows[:60], batch_size=16)
    trainer = run(Federation(DictModule(), PerFedAvg(0.1, "HF", uplink=8)), data, rounds=3)
    assert trainer.callback_metrics["accuracy"] > 0.4 and trainer.callback_metrics["failed"] == 0
    for precision in ("bf16-mixed", "bf16-true"):
        for variant in ("FO", "HF"):
            local = TrainerLocal(trainer_kwargs={"precision": precision, "gradient_clip_val": 1.0})
            federation = Federation(client_module(), PerFedAvg(0.1, variant), local=local)
            run(federation, data_module(4), rounds=2)
            assert federation.last_round is not None and federation.last_round.failures == {}


@pytest.mark.parametrize("variant", ["FO", "HF"])
def test_a_gradient_scaler_changes_nothing(variant: str) -> None:
    class Scaled(MixedPrecision):
        def forward_context(self) -> Any:  # float16 on the CPU is not what is tested here
            return torch.autocast("cpu", enabled=False)

    found = []
    for plugins in (None, [Scaled("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]):
        module = client_module()
        outer(2, callbacks=[MetaSteps(0.2, variant)], plugins=plugins, gradient_clip_val=0.5).fit(
            module, Batches(blobs(32), blobs(32, seed=2))
        )
        found.append(dict(module.state_dict()))
    assert_same(*found)


def test_loop_and_trainer_give_the_same_bits() -> None:
    found = []
    for local in (LoopLocal(max_epochs=2), TrainerLocal(max_epochs=2)):
        federation = Federation(ClientModule(NormNet(), lr=0.1), PerFedAvg(0.1, "HF"), local=local)
        trainer = run(federation, data_module(3), rounds=2)
        found.append({**weights(federation), "accuracy": trainer.callback_metrics["accuracy"]})
    assert_same(*found)


@pytest.mark.parametrize("variant", ["FO", "HF"])
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_small_batches_are_used_whole(variant: str, rows: int) -> None:
    sizes: set[int] = set()

    class Sized(ClientModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            sizes.add(len(batch[0]))
            return super().training_step(batch, batch_idx)

    x, y = blobs(24)

    class Few(IID):
        def __call__(self, labels: Any, seed: int) -> list[Tensor]:
            return [torch.arange(rows)]

    federation = Federation(Sized(network(), lr=0.1), PerFedAvg(0.1, variant), local="loop")
    run(federation, FederatedDataModule((x, y), Few(1), test=(x, y), batch_size=8), rounds=1)
    assert federation.last_round is not None and federation.last_round.failures == {}
    assert sizes == ({2, 3, 5} if (variant, rows) == ("FO", 5) else {rows})  # the last is of `adapt`


def test_batches_without_rows_and_manual_optimisation_are_refused() -> None:
    class Odd(ClientModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return sum(p.sum() for p in self.parameters())

    with pytest.raises(ValueError, match="Expected batches that hold tensors of rows under PerFedAvg"):
        outer(1, callbacks=[MetaSteps(0.1)]).fit(Odd(network()), Batches("rows"))
    module = client_module()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="automatic optimisation"):
        outer(1, callbacks=[MetaSteps(0.1)]).fit(module, Batches(blobs(8)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -0.1}, "Expected `alpha` to be a number >= 0, but got -0.1"),
        ({"variant": "SO"}, "Expected `variant` to be 'FO' or 'HF', but got 'SO'"),
        ({"delta": 0.0}, "Expected `delta` to be a positive number, but got 0.0"),
        ({"steps": 0}, "Expected `steps` to be a positive integer, but got 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PerFedAvg(**arguments)
