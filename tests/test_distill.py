"""The distillation loss by hand, and what one round of it must do and leave alone."""

from __future__ import annotations

import math
import random
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dynfed_lightning.distill import (
    Batches,
    Distillation,
    DistillResult,
    ServerDistiller,
    choose_among_finite,
    distillation_loss,
)
from dynfed_lightning.quiet import isolated_rng, quiet_fit, quiet_trainer
from dynfed_lightning.teachers import Active, Mean
from dynfed_lightning.teaching import TeacherContext
from dynfed_lightning.tensors import Tensors, weights_of


class Public:
    def __init__(self, inputs: Tensor, labels: Tensor | None = None) -> None:
        self.inputs, self.labels = inputs, labels


def net(seed: int = 0, dropout: float = 0.0, norm: bool = False) -> nn.Sequential:
    with isolated_rng(seed):
        extra = [nn.BatchNorm1d(16)] if norm else []
        return nn.Sequential(nn.Linear(2, 16), *extra, nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))


def blobs(n: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (n,), generator=g)
    angle = y * 2 * math.pi / 3
    return torch.stack([angle.cos(), angle.sin()], 1) * 2 + 0.4 * torch.randn(n, 2, generator=g), y


def trained(x: Tensor, y: Tensor, seed: int) -> Tensors:
    module = net(seed)
    optimizer = torch.optim.Adam(module.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()
    return weights_of(module)


@pytest.fixture(scope="module")
def teachers() -> list[Tensors]:
    return [trained(*blobs(150, k), k) for k in range(3)]


def context(k: int = 3) -> TeacherContext:
    return TeacherContext(num_examples=torch.ones(k), label_counts=torch.full((k, 3), 50))


def run(teachers: list[Tensors], recipe: Distillation | None = None, **changes: Any) -> DistillResult:
    module = net(9)
    arguments: dict[str, Any] = {
        "module": module,
        "teachers": teachers,
        "start": weights_of(module),
        "public": Public(blobs(129, 50)[0]),
        "ctx": context(),
        "seed": 4,
        **changes,
    }
    return (recipe or Distillation()).run(**arguments)


def test_loss_and_gradient_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0]], dtype=torch.float64, requires_grad=True)
    soft = torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([1, 1])
    # p = [1/4, 3/4], [4/5, 1/5]
    taught = (-0.5 * math.log(0.25) - 0.5 * math.log(0.75) - math.log(0.8)) / 2
    true = (-math.log(0.75) - math.log(0.2)) / 2
    loss = distillation_loss(logits, soft, labels, 0.3)
    assert loss.item() == pytest.approx(0.3 * taught + 0.7 * true, abs=1e-12)
    loss.backward()
    # d/dz = (p - target) / B, target = gamma tau + (1 - gamma) onehot(y)
    expected = [[(0.25 - 0.15) / 2, (0.75 - 0.85) / 2], [(0.8 - 0.3) / 2, (0.2 - 0.7) / 2]]
    torch.testing.assert_close(logits.grad, torch.tensor(expected, dtype=torch.float64))
    assert distillation_loss(logits, soft, None, 0.3).item() == pytest.approx(taught, abs=1e-12)
    assert distillation_loss(logits, soft, labels, 1.0).item() == pytest.approx(taught, abs=1e-12)
    kl = distillation_loss(logits, soft, None, 1.0, "kl_logits").item()
    assert kl == pytest.approx(taught - math.log(2) / 2, abs=1e-12)
    zero = distillation_loss(soft[:1].log(), soft[:1], None, 1.0, "kl_logits")
    assert zero.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("policy", ["active", "mean", "variance", "entropy", "random", "competence"])
def test_the_student_learns(teachers: list[Tensors], policy: str) -> None:
    result = run(teachers, Distillation(policy=policy, epochs=20, lr=0.01))
    assert result.num_steps == 2 * 20  # batches of 64 and 65
    assert result.loss_after < 0.5 * result.loss_before
    x, y = blobs(500, 77)
    module = net(9)
    before = float((module(x).argmax(-1) == y).float().mean())
    module.load_state_dict(result.weights)
    after = float((module(x).argmax(-1) == y).float().mean())
    assert after > 0.9 > before
    assert result.choice.soft_labels.shape == (129, 3) and float(result.choice.share.sum()) == pytest.approx(
        1, abs=1e-5
    )


@pytest.mark.parametrize("recipe", [Distillation(), Distillation.feddf(epochs=4), Distillation(policy="random")])
def test_same_arguments_same_bits_and_nothing_leaks(teachers: list[Tensors], recipe: Distillation) -> None:
    module = net(9, dropout=0.3)
    module.train()
    module[0].eval()
    start = weights_of(module)
    results = []
    threads = torch.get_num_threads()
    for noise in range(2):
        torch.manual_seed(noise), np.random.seed(noise), random.seed(noise)
        states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
        results.append(run(teachers, recipe, module=module, start=start))
        assert torch.equal(states[0], torch.get_rng_state()) and states[2] == random.getstate()
        assert states[1] == np.random.get_state()[1].tolist()  # type: ignore[index]
        assert torch.get_num_threads() == threads
        assert all(torch.equal(t, start[n]) for n, t in weights_of(module).items())
        assert [m.training for m in module] == [False, True, True, True]
    a, b = results
    assert all(torch.equal(a.weights[n], b.weights[n]) for n in start) and a.loss_after == b.loss_after
    assert not torch.equal(a.weights["0.weight"], start["0.weight"])
    other = run(teachers, recipe, module=module, start=start, seed=5)
    assert not torch.equal(other.weights["0.weight"], a.weights["0.weight"])


def test_gamma_and_labels(teachers: list[Tensors]) -> None:
    x, y = blobs(129, 50)
    wrong = Public(x, (y + 1) % 3)
    recipe = Distillation(gamma=0.0, epochs=20, lr=0.01)
    module = net(9)
    module.load_state_dict(run(teachers, recipe, public=wrong).weights)
    assert float((module(x).argmax(-1) == wrong.labels).float().mean()) > 0.9  # gamma 0: only the labels speak
    # Without labels, whatever gamma: the same as gamma 1; with labels the default is a half.
    unlabelled = [run(teachers, Distillation(gamma=g)).weights["0.weight"] for g in (None, 0.0, 1.0)]
    assert torch.equal(unlabelled[0], unlabelled[1]) and torch.equal(unlabelled[0], unlabelled[2])
    labelled = [run(teachers, Distillation(gamma=g), public=wrong).weights["0.weight"] for g in (None, 0.5, 1.0)]
    assert torch.equal(labelled[0], labelled[1]) and torch.equal(labelled[2], unlabelled[0])
    assert not torch.equal(labelled[0], labelled[2])


def test_temperature_flattens_the_teachers(teachers: list[Tensors]) -> None:
    # The student can reach a loss no lower than the teachers' entropy, which a temperature of 5 raises.
    cold, hot = (run(teachers, Distillation(temperature=t, epochs=30, lr=0.02)) for t in (1.0, 5.0))
    assert hot.loss_after > cold.loss_after + 0.3
    torch.testing.assert_close(hot.choice.soft_labels, cold.choice.soft_labels)


def test_early_stopping_keeps_the_best_epoch(teachers: list[Tensors]) -> None:
    steady = run(teachers, Distillation.feddf(lr=0.01, epochs=6))
    assert steady.num_steps == 6  # 129 - 12 held out: one batch an epoch
    # A rate that destroys the student: the first epoch is the best and two more are waited for.
    wild = run(teachers, Distillation.feddf(policy="mean", lr=3.0, epochs=40, schedule=None, early_stop_patience=2))
    assert wild.num_steps < 40
    one = run(teachers, Distillation.feddf(lr=3.0, epochs=40, schedule=None, early_stop_patience=40))
    assert one.num_steps == 40 and one.loss_after <= wild.loss_after


def test_the_cosine_schedule_ends_at_zero() -> None:
    rates: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    x, _ = blobs(40, 0)
    distiller = ServerDistiller(net(), lr=0.1, schedule="cosine")
    trainer = quiet_trainer(max_epochs=2, callbacks=[Watch()])
    quiet_fit(trainer, distiller, Batches([x, torch.full((40, 3), 1 / 3)], 20, seed=0))
    assert rates == pytest.approx([0.1, 0.05 * (1 + math.sqrt(0.5)), 0.05, 0.05 * (1 - math.sqrt(0.5))])
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_first_step_is_adams() -> None:
    # Adam's first step moves every weight with a gradient by lr, whatever the gradient's size.
    module = nn.Linear(1, 2, bias=False)
    module.weight.data.zero_()
    start = weights_of(module)
    pull = [{"weight": torch.tensor([[5.0], [-5.0]])}]
    ctx = TeacherContext(num_examples=torch.ones(1), label_counts=torch.ones(1, 2))
    recipe = Distillation(epochs=1, lr=0.125, batch_size=4)
    result = recipe.run(module, pull, start, Public(torch.ones(4, 1)), ctx, seed=0)
    torch.testing.assert_close(result.weights["weight"], torch.tensor([[0.125], [-0.125]]), atol=1e-6, rtol=0)
    assert result.loss_before == pytest.approx(math.log(2), abs=1e-6) and result.num_steps == 1


def test_the_student_starts_at_start_whatever_the_module_holds(teachers: list[Tensors]) -> None:
    start = weights_of(net(9))
    here, there = (run(teachers, module=net(seed), start=start) for seed in (9, 3))
    assert here.loss_before == there.loss_before
    assert all(torch.equal(here.weights[n], there.weights[n]) for n in start)
    # The averaged model's own predictions, for the class nobody has, are those of `start` too.
    ctx = TeacherContext(num_examples=torch.ones(3), label_counts=torch.tensor([[5, 5, 0]] * 3))
    unseen = run(teachers, module=net(3), start=start, ctx=ctx).choice.soft_labels[:, 2]
    with torch.no_grad():
        torch.testing.assert_close(unseen, net(9)(blobs(129, 50)[0]).softmax(-1)[:, 2])


def test_the_diversity_counts_mini_batches_of_the_recipe(teachers: list[Tensors]) -> None:
    # A huge lam: one teacher a mini-batch, and whoever taught least so far is next.
    recipe = Distillation(policy=Active(lam=1e3, beta=0.0, keep=1.0), batch_size=43)
    share = run(teachers, recipe, ctx=TeacherContext(num_examples=torch.ones(3))).choice.share
    torch.testing.assert_close(share, torch.full((3,), 1 / 3))  # 129 samples are 3 mini-batches


def test_dither_reaches_the_soft_labels(teachers: list[Tensors]) -> None:
    steps = [{"0.weight": torch.full((16, 2), 0.5)}] * 3
    plain, dithered = run(teachers), run(teachers, steps=steps)
    assert not torch.allclose(plain.choice.soft_labels, dithered.choice.soft_labels, atol=1e-4)
    once = run(teachers, Distillation(passes=1), steps=steps)
    assert torch.equal(once.choice.soft_labels, run(teachers, Distillation(passes=1)).choice.soft_labels)


def test_a_lightning_module_as_student(teachers: list[Tensors]) -> None:
    class Users(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body = net(9)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

        def training_step(self, *args: Any) -> Tensor:
            raise AssertionError("only forward may be used")

    module = Users()
    named = [{f"body.{n}": t for n, t in w.items()} for w in teachers]
    result = run(named, module=module, start=weights_of(module))
    expected = run(teachers)
    assert module._trainer is None and list(result.weights) == [f"body.{n}" for n in expected.weights]
    assert all(torch.equal(result.weights[f"body.{n}"], t) for n, t in expected.weights.items())
    images = Public(blobs(129, 50)[0][:, :, None])
    flat = run(named, module=module, start=weights_of(module), public=images, forward=lambda m, x: m(x.flatten(1)))
    assert all(torch.equal(flat.weights[n], t) for n, t in result.weights.items())


def test_batch_norm_trains_its_statistics_and_frozen_stay() -> None:
    module = net(9, norm=True)
    module[0].bias.requires_grad_(False)
    start = weights_of(module)
    assert "0.bias" not in start
    result = Distillation(batch_size=32).run(module, [start, start], start, Public(blobs(65, 1)[0]), context(2), seed=0)
    assert set(result.weights) == set(start) and result.num_steps == 2 * 5  # 32 and 33: never a batch of one
    assert not torch.equal(result.weights["1.running_mean"], start["1.running_mean"])
    assert torch.equal(weights_of(module)["1.running_mean"], start["1.running_mean"])


def test_a_client_that_overflows_does_not_teach(teachers: list[Tensors]) -> None:
    huge = {n: t.clone() for n, t in teachers[0].items()}
    huge["3.weight"].fill_(3e38)
    result = run([teachers[0], huge, teachers[2]])
    assert float(result.choice.share[1]) == 0 and bool((result.choice.weights[1] == 0).all())
    assert float(result.choice.share.sum()) == pytest.approx(1, abs=1e-5)
    pair = TeacherContext(num_examples=torch.ones(2), label_counts=torch.full((2, 3), 50))
    expected = run([teachers[0], teachers[2]], ctx=pair)
    torch.testing.assert_close(result.choice.soft_labels, expected.choice.soft_labels)
    with pytest.raises(ValueError, match="at least one client"):
        choose_among_finite(Mean(), torch.full((2, 1, 2), math.nan), context(2))


def test_batches() -> None:
    t = torch.arange(9)
    batches = Batches([t, t * 2], 4, seed=3)
    first, second = [list(batches) for _ in range(2)]
    assert [len(b[0]) for b in first] == [4, 5] and len(batches) == 2  # the last of one joined
    assert torch.cat([b[0] for b in first]).sort().values.tolist() == list(range(9))
    assert all(torch.equal(b[0] * 2, b[1]) for b in first)
    assert [b[0].tolist() for b in first] != [b[0].tolist() for b in second]
    again = Batches([t, t * 2], 4, seed=3)
    assert [b[0].tolist() for b in again] == [b[0].tolist() for b in first]
    assert [b[0].tolist() for b in Batches([t[:8]], 4, seed=None)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [b[0].tolist() for b in Batches([t[:1]], 4, seed=None)] == [[0]]


def test_bad_input(teachers: list[Tensors]) -> None:
    x, y = blobs(129, 50)
    no_counts = TeacherContext(num_examples=torch.ones(3))
    four = TeacherContext(num_examples=torch.ones(3), label_counts=torch.ones(3, 4))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"public": Public(x[:1])}, "`public` to hold at least 2 samples, but it holds 1"),
        ({"public": Public(x, y[:5])}, r"`public.labels` to have shape \[129\]"),
        ({"ctx": no_counts}, "Expected `label_counts` in the context of Competence, but got None"),
        ({"ctx": four}, r"`label_counts` to have shape \(3, 3\), but got \(3, 4\)"),
        ({"ctx": context(2)}, r"`num_examples` to have shape \(3,\)"),
        ({"num_classes": 10}, r"logits of shape \[129, 10\]"),
        ({"teachers": []}, "at least one client"),
        ({"seed": -1}, "`seed`"),
    ]
    for changes, match in cases:
        with pytest.raises(ValueError, match=match):
            run(**{"teachers": teachers, **changes})
    with pytest.raises(RuntimeError, match="stay finite"):
        run(teachers, Distillation(lr=1e30, epochs=3))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"policy": "activ"}, "Did you mean 'active'"),
        ({"passes": 0}, "`passes` to be at least 1, but got 0"),
        ({"epochs": 0}, "`epochs`"),
        ({"batch_size": -1}, "`batch_size`"),
        ({"early_stop_patience": 0}, "`early_stop_patience`"),
        ({"threads": 0}, "`threads`"),
        ({"lr": 0.0}, "`lr` to be above 0"),
        ({"temperature": math.inf}, "`temperature`"),
        ({"gamma": 1.5}, "`gamma` to be from 0 to 1, but got 1.5"),
        ({"val_fraction": 1.0}, "`val_fraction`"),
        ({"loss": "mse"}, "`loss` to be one of 'ce', 'kl_logits', but got 'mse'"),
        ({"schedule": "linear"}, "`schedule`"),
    ],
)
def test_a_bad_recipe(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Distillation(**arguments)
