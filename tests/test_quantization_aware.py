"""QuantizationAware against algorithm 1 by hand, what a user sees of it, and how it ends."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback
from lightning.pytorch.plugins import MixedPrecision
from quantization_support import HIDDEN, Module, algorithm_1, fit, loader, nearest, net, served, soft, state
from torch import Tensor, nn
from torch.utils.data import DataLoader
from toys import DictModule, assert_same, blobs, data_module

from dynfed_lightning import Geometric, Linear, LoopLocal, QuantizationAware, ScaleLearningRate, TrainerLocal
from dynfed_lightning.module import ClientModule

NEVER = {"finetune": 0.0}  # no last phase


class Steps(L.Callback):
    """What the module and the callback hold after every optimiser step (of one batch)."""

    def __init__(self, quantize: QuantizationAware) -> None:
        self.quantize = quantize
        self.weights: list[dict[str, Tensor]] = []
        self.centers: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.weights.append(state(pl_module))
        self.centers.append({n: c.clone() for n, c in self.quantize.centers.items()})


# ---------------------------------------------------------------------------------------------- algorithm 1


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("alternate", [True, False])
def test_algorithm_1_by_hand(bits: int, alternate: bool) -> None:
    """Six steps in float64 over two epochs on three layers, with pulls that some weights and centres feel: every weight and
    centre, to what float32 centres allow."""
    module = Module().double()
    quantize = QuantizationAware(
        bits,
        ends=True,
        sharpness=Linear(20.0, 60.0),
        lam=0.05,
        center_lr=Geometric(0.05, 0.01),
        alternate=alternate,
        clamp=None,
        **NEVER,
    )
    spy = Steps(quantize)
    start = copy.deepcopy(module.net)
    first = {}
    for n, p in start.named_parameters():
        if n.endswith("weight"):
            w = p.detach()
            first[n] = torch.linspace(float(w.min()), float(w.max()), 2**bits).double()
            if bits == 1:
                first[n] = torch.stack([w[w < 0].mean(), w[w > 0].mean()])
    fit(module, [quantize, spy], loader(dtype=torch.float64), epochs=2, precision="64-true")
    expected, centers = algorithm_1(
        start,
        list(loader(dtype=torch.float64)) * 2,
        first,
        lr=0.1,
        sharpness=[20.0] * 3 + [60.0] * 3,
        lam=[0.05] * 3 + [0.1] * 3,
        center_lr=[0.05] * 3 + [0.01] * 3,
        alternate=alternate,
    )
    for n, p in expected.named_parameters():
        torch.testing.assert_close(spy.weights[-1][f"net.{n}"], p.detach(), rtol=0, atol=1e-6, msg=n)
    for n, c in centers.items():
        torch.testing.assert_close(spy.centers[-1][f"net.{n}"].double(), c, rtol=0, atol=1e-6, msg=n)
        assert float((c - first[n]).abs().max()) > 1e-3  # they have moved
    w, c = spy.weights[-1][HIDDEN], centers["2.weight"]
    home = int(((w - c[nearest(w, c)]).abs() < 1e-6).sum())
    assert 0 < home < w.numel()  # some weights are at their centres


def test_the_two_ways_differ() -> None:
    """Or the parameter of the test above would say nothing."""
    found = []
    for alternate in (True, False):
        quantize = QuantizationAware(2, center_lr=0.5, alternate=alternate, **NEVER)
        fit(Module(), quantize)
        found.append(quantize.centers[HIDDEN])
    assert float((found[0] - found[1]).abs().max()) > 1e-4


def test_a_step_of_the_centres_goes_down() -> None:
    """The public code's goes up. Weights are held still, so that only the centres change f(Q~)."""
    for alternate in (True, False):
        module = Module(lambda p: torch.optim.SGD(p, lr=0.0))
        quantize = QuantizationAware(2, sharpness=30.0, lam=0.0, center_lr=0.01, alternate=alternate, **NEVER)
        spy = Steps(quantize)
        batch = list(loader())[:1]
        fit(module, [quantize, spy], served(batch), epochs=8)
        x, y = batch[0]

        def f(c: Tensor, x: Tensor = x, y: Tensor = y, w: Tensor = spy.weights[0][HIDDEN]) -> float:
            return float(
                F.cross_entropy(torch.func.functional_call(net(), {"2.weight": soft(w, c, 30.0)}, (x,)), y).detach()
            )

        losses = [f(c[HIDDEN]) for c in spy.centers]
        assert all(b < a for a, b in pairwise(losses)), losses


def test_sharp_and_still_centres_are_the_nearest_centre() -> None:
    """P -> infinity, e2 = 0, lam = 0: f(Q~) is f of the nearest centres, and its gradient leaves the weights alone."""
    module, plain = Module(), Module()
    quantize = QuantizationAware(2, sharpness=1e7, lam=0.0, center_lr=0.0, **NEVER)
    spy = Steps(quantize)
    trainer = fit(module, [quantize, spy], served(list(loader())[:1]))
    c = quantize.centers[HIDDEN]
    w = plain.net[2].weight.detach()
    assert torch.equal(c, torch.linspace(float(w.min()), float(w.max()), 4))
    x, y = next(iter(loader()))
    hard = F.cross_entropy(torch.func.functional_call(plain.net, {"2.weight": c[nearest(w, c)]}, (x,)), y)
    assert float(trainer.callback_metrics["quantization/loss"]) == pytest.approx(float(hard.detach()), abs=1e-6)
    own, other = (
        torch.autograd.grad(F.cross_entropy(plain.net(x), y), plain.net[2].weight)[0],
        torch.autograd.grad(hard, plain.net[4].weight)[0],
    )
    torch.testing.assert_close(spy.weights[0][HIDDEN], w - 0.1 * own, rtol=0, atol=1e-7)
    first = torch.autograd.grad(F.cross_entropy(plain.net(x), y), plain.net[4].weight)[0]
    torch.testing.assert_close(
        spy.weights[0]["net.4.weight"], plain.net[4].weight - 0.1 * (first + other), rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("bits", [None, {"*.2.*": None}, lambda name, p: None])
def test_without_layers_it_is_the_modules_own_training(bits: Any) -> None:
    kwargs: dict[str, Any] = {"norm": True, "dropout": 0.3, "optimizer": lambda p: torch.optim.Adam(p, 0.01)}
    found = []
    for callbacks in ([], [QuantizationAware(bits)]):
        torch.manual_seed(5)
        module = Module(**kwargs)
        trainer = fit(module, callbacks, epochs=3, gradient_clip_val=0.5)
        found.append((state(module), {k: float(v) for k, v in trainer.callback_metrics.items()}))
    assert_same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


# ------------------------------------------------------------------------------------ what a user sees of it


@pytest.mark.parametrize("alternate", [True, False])
def test_random_numbers_logs_and_metrics_are_those_of_the_own_step(alternate: bool) -> None:
    """Each pass is silent but the first: the same stream, and an accuracy over every row once."""

    class Counts(L.Callback):
        def __init__(self) -> None:
            self.counted: list[int] = []

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            a = pl_module.accuracy
            self.counted.append(int((a.tp + a.fn).sum()))

    class Logged(L.Callback):
        def __init__(self) -> None:
            self.loss: list[float] = []

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.loss.append(float(trainer.callback_metrics["loss"]))

    draws = []
    for callbacks in ([], [QuantizationAware(2, alternate=alternate, center_lr=0.01, **NEVER)]):
        torch.manual_seed(9)
        module = Module(dropout=0.5)
        counts, logged = Counts(), Logged()
        fit(module, [*callbacks, counts, logged], epochs=2)
        assert counts.counted == [48, 48]
        draws.append(logged.loss)
    assert draws[0][0] == draws[1][0]  # the first step's float loss: same weights, same dropout
    assert draws[0][1] != draws[1][1]  # then the weights differ


def test_numbers_drawn_by_the_module_do_not_depend_on_the_callback() -> None:
    after = []
    for callbacks in ([], [QuantizationAware(2)]):
        torch.manual_seed(9)
        fit(Module(dropout=0.5), callbacks, epochs=5)
        after.append(torch.rand(4))
    assert torch.equal(after[0], after[1])


def test_the_other_passes_have_dropout_masks_of_their_own() -> None:
    masks: list[Tensor] = []

    class Watch(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(torch.ones_like(x))
            masks.append(out != 0)
            return x * out

    module = Module()
    module.net[1][2] = Watch(0.5)
    fit(module, QuantizationAware(2, **NEVER), served(list(loader())[:1]))
    assert len(masks) == 3
    assert not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


def test_running_statistics_are_those_of_the_quantised_weights() -> None:
    """The first layer is quantised too here, so that what the norm sees depends on it; they move once a batch."""
    module = Module(norm=True)
    # The centres hold still, but their gradient is asked for.
    quantize = QuantizationAware(1, ends=True, sharpness=1e6, lam=0.0, center_lr=1e-12, clamp=None, **NEVER)
    batches = list(loader())[:1]
    start = copy.deepcopy(module.net)
    fit(module, quantize, served(batches))
    x = batches[0][0]
    with torch.no_grad():
        w, c = start[0].weight, quantize.centers["net.0.weight"]
        seen = F.linear(x, c[nearest(w, c)], start[0].bias)
        norm = module.net[1][0]
    torch.testing.assert_close(norm.running_mean, 0.1 * seen.mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * seen.var(0), rtol=0, atol=1e-6)
    assert int(norm.num_batches_tracked) == 1
    theirs = quantize.state_dict()["buffers"]
    torch.testing.assert_close(theirs["net.1.0.running_mean"], 0.1 * start[0](x).mean(0).detach(), rtol=0, atol=1e-6)
    assert int(theirs["net.1.0.num_batches_tracked"]) == 1


class Counts(Module):
    """Puts another tensor in a buffer's place instead of changing it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.tensor(0))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.count = self.count + 1
        return super().training_step(batch, batch_idx)


def test_buffers_that_are_replaced_move_once_a_batch_too() -> None:
    module, quantize = Counts(), QuantizationAware(2, center_lr=0.01, finetune=0.5)
    fit(module, quantize, epochs=2)
    assert int(module.count) == 6
    assert int(quantize.state_dict()["buffers"]["count"]) == 3  # no float pass in the last phase


class Evaluations(L.Callback):
    """The weights and buffers that validation saw, and those before and after it."""

    def __init__(self) -> None:
        self.during: list[dict[str, Tensor]] = []
        self.around: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.around = [state(pl_module)]

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.during.append(state(pl_module))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.around.append(state(pl_module))
        assert_same(self.around[0], self.around[1])


def test_validation_runs_with_quantised_weights_or_with_float_ones() -> None:
    for kind in ("quantized", "float"):
        module, spy = Module(norm=True), Evaluations()
        quantize = QuantizationAware(2, validate=kind, finetune=0.4)
        fit(module, [quantize, spy], epochs=5, val=served(list(loader())[:1]))
        values = [len(w[HIDDEN].unique()) for w in spy.during]
        assert len(values) == 5
        assert [v <= 4 for v in values] == [kind == "quantized"] * 3 + [True, True]
        if kind == "float":  # the float pass's own statistics
            assert not torch.equal(spy.during[2]["net.1.0.running_mean"], spy.around[-1]["net.1.0.running_mean"])


def test_schedules_follow_epochs_or_steps() -> None:
    class Engine(L.Callback):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            e = quantize.engine
            self.seen.append((round(e.sharpness, 6), round(e.lam, 8), e.frozen))

    for kwargs, expected in (
        ({"epochs": 3}, [(10.0, 1e-4, False)] * 3 + [(20.0, 2e-4, False)] * 3 + [(30.0, 3e-4, True)] * 3),
        (
            {"epochs": None, "max_steps": 5},
            [(10.0, 1e-4, False), (15.0, 1e-4, False), (20.0, 1e-4, False), (25.0, 2e-4, False), (30.0, 2e-4, True)],
        ),
        ({"epochs": 7, "max_steps": 3}, [(10.0, 1e-4, False), (20.0, 1e-4, False), (30.0, 1e-4, True)]),
        ({"epochs": 1, "max_steps": 50}, [(30.0, 1e-4, False)] * 3),
    ):
        finetune = 0.34 if kwargs.get("max_steps") != 5 else 0.2
        quantize = QuantizationAware(2, sharpness=Linear(10.0, 30.0), lam=1e-4, finetune=finetune)
        spy = Engine()
        fit(Module(), [quantize, spy], **kwargs)
        assert spy.seen == expected, kwargs
        assert quantize.steps == len(expected)


# ----------------------------------------------------------------------------------------------- the optimiser


def test_the_proximal_step_is_at_each_groups_own_rate() -> None:
    """Two groups, a scheduler, and a callback that scales the rate: what the optimiser stepped with counts."""
    seen: list[list[float]] = []

    def optimizer(parameters: Any) -> Any:
        o = torch.optim.SGD(
            [{"params": module.net[2].weight, "lr": 0.3}, {"params": module.net[4].parameters()}], lr=0.1
        )
        return {
            "optimizer": o,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.ExponentialLR(o, 0.5), "interval": "step"},
        }

    for order in (1, -1):
        for scaler in (False, True):
            module = Module(optimizer)
            quantize = QuantizationAware(2, **NEVER)
            inner = quantize.engine.after_weights
            quantize.engine.after_weights = lambda rates, inner=inner: (seen.append(list(rates)), inner(rates))[1]  # type: ignore[method-assign]
            kwargs = {"plugins": [scaled()]} if scaler else {}
            fit(module, [quantize, ScaleLearningRate(0.1)][::order], **kwargs)
            assert seen == [[pytest.approx(0.03)], [pytest.approx(0.015)], [pytest.approx(0.0075)]]
            seen.clear()


def scaled() -> Any:
    class Scaled(MixedPrecision):
        def forward_context(self) -> Any:  # float16 on the CPU is not what is tested here
            return torch.autocast("cpu", enabled=False)

    return Scaled("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize("alternate", [True, False])
@pytest.mark.parametrize("finetune", [0.0, 0.5])
def test_a_gradient_scaler_changes_nothing(alternate: bool, finetune: float) -> None:
    """A scale of 2^16 on float32: powers of two, so the same bits, if everything is unscaled."""
    found = []
    for plugins in ([], [scaled()]):
        module = Module()
        quantize = QuantizationAware(2, alternate=alternate, center_lr=0.01, finetune=finetune)
        fit(module, quantize, epochs=4, plugins=plugins or None, gradient_clip_val=0.5)
        found.append({**state(module), "centres": quantize.centers[HIDDEN]})
    assert_same(found[0], found[1])


@pytest.mark.parametrize("alternate", [True, False])
@pytest.mark.parametrize("finetune", [0.0, 1.0])
def test_a_skipped_step_moves_nothing(alternate: bool, finetune: float) -> None:
    """An overflow in the first batch: training goes on as if it had not been there."""

    class Explodes(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * torch.inf if batch_idx == 0 else loss

    found = []
    for kind, data, plugins in ((Explodes, list(loader()), [scaled()]), (Module, list(loader())[1:], [])):
        module = kind()
        quantize = QuantizationAware(2, alternate=alternate, center_lr=0.01, finetune=finetune)
        fit(module, quantize, served(data), plugins=plugins or None)
        assert quantize.steps == 2
        found.append({**state(module), "centres": quantize.centers[HIDDEN]})
    assert_same(found[0], found[1])


@pytest.mark.parametrize("alternate", [True, False])
@pytest.mark.parametrize("finetune", [0.0, 0.5])
def test_accumulated_batches_are_one_large_one(alternate: bool, finetune: float) -> None:
    found = []
    for size, count in ((8, 2), (16, 1)):
        module = Module()
        quantize = QuantizationAware(2, alternate=alternate, center_lr=0.05, lam=1e-2, finetune=finetune)
        fit(module, quantize, loader(64, size), epochs=2, accumulate_grad_batches=count, gradient_clip_val=0.7)
        found.append({**state(module), "centres": quantize.centers[HIDDEN]})
        assert quantize.steps == 8
    for n in found[0]:
        torch.testing.assert_close(found[0][n], found[1][n], rtol=0, atol=2e-6, msg=n)


@pytest.mark.filterwarnings("ignore:.*returned `None`")  # said once a process
def test_a_skipped_batch_takes_no_step() -> None:
    class Skips(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

    found = []
    for kind, data in ((Skips, list(loader())), (Module, list(loader())[1:])):
        module, quantize = kind(), QuantizationAware(2, lam=0.1, **NEVER)
        fit(module, quantize, served(data))
        found.append({**state(module), "centres": quantize.centers[HIDDEN]})
    assert_same(found[0], found[1])


# ------------------------------------------------------------------------------------------------- the last phase


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop", "Adagrad", "NAdam"])
def test_neither_momentum_nor_decay_moves_frozen_weights(name: str) -> None:
    kwargs = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    module = Module(lambda p: getattr(torch.optim, name)(p, lr=0.01, weight_decay=0.5, **kwargs))
    quantize = QuantizationAware(2, finetune=0.5, center_lr=0.0)
    spy = Steps(quantize)
    fit(module, [quantize, spy], epochs=4)
    frozen = [w[HIDDEN] for w in spy.weights[6:]]
    assert len(frozen) == 6 and all(torch.equal(w, frozen[0]) for w in frozen)
    assert not torch.equal(spy.weights[6]["net.0.weight"], spy.weights[-1]["net.0.weight"])  # the others are trained on


def test_the_last_phase_by_hand() -> None:
    """finetune=1: the centres' gradient is the sum of their members', the other tensors' SGD."""
    module = Module()
    quantize = QuantizationAware(2, finetune=1.0, center_lr=0.02)
    start = copy.deepcopy(module.net)
    trainer, losses = fit(module, quantize), []
    w = start[2].weight.detach()
    c = torch.linspace(float(w.min()), float(w.max()), 4)
    index = nearest(w, c)
    for x, y in loader():
        with torch.no_grad():
            start[2].weight.copy_(c[index])
        loss = F.cross_entropy(start(x), y)
        losses.append(loss.detach())
        grads = torch.autograd.grad(loss, list(start.parameters()))
        with torch.no_grad():
            for (n, p), g in zip(start.named_parameters(), grads, strict=True):
                if n != "2.weight":
                    p -= 0.1 * g
            c = c - 0.02 * torch.stack([grads[2][index == j].sum() for j in range(4)])
    torch.testing.assert_close(quantize.centers[HIDDEN], c, rtol=0, atol=1e-6)
    torch.testing.assert_close(module.net[2].weight.detach(), c[index], rtol=0, atol=1e-6)
    torch.testing.assert_close(module.net[4].weight.detach(), start[4].weight.detach(), rtol=0, atol=1e-6)
    assert torch.equal(module.net[2].weight.detach(), quantize.centers[HIDDEN][index])
    assert float(trainer.callback_metrics["quantization/loss"]) == pytest.approx(float(sum(losses)) / 3, abs=1e-6)


@pytest.mark.parametrize("how", ["stopping", "asked to stop", "no last phase"])
def test_weights_are_their_centres_however_it_ends(how: str, caplog: Any) -> None:
    quantize = QuantizationAware(2, finetune=0.0 if how == "no last phase" else 0.2)
    module, callbacks = Module(norm=True), list[L.Callback]()
    if how == "stopping":
        callbacks = [EarlyStopping("accuracy", mode="min", patience=1, check_on_train_epoch_end=True)]
    if how == "asked to stop":  # as `max_time` does
        callbacks = [LambdaCallback(on_train_batch_end=lambda trainer, *_: setattr(trainer, "should_stop", True))]
    trainer = fit(module, [quantize, *callbacks], epochs=10)
    assert trainer.current_epoch < 8 or how == "no last phase"
    assert ("ended before its last phase" in caplog.text) == (how != "no last phase")
    assert quantize.frozen
    assert set(module.net[2].weight.detach().unique().tolist()) <= set(quantize.centers[HIDDEN].tolist())
    assert "training_step" not in vars(module)


def test_an_exception_leaves_the_module_as_it_was_trained() -> None:
    class Fails(Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise RuntimeError("by the user's own code")

    module, spy = Fails(), Evaluations()
    quantize = QuantizationAware(2)
    with pytest.raises(RuntimeError, match="own code"):
        fit(module, [quantize, spy], val=served(list(loader())[:1]))
    assert "training_step" not in vars(module) and "log" not in vars(module)
    assert_same(state(module), spy.around[0])
    assert len(module.net[2].weight.unique()) > 4
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    optimizer.step()
    assert not optimizer._optimizer_step_post_hooks
    fit(Module(), quantize)  # and the callback is of use again
    assert quantize.frozen


# ------------------------------------------------------------------------------------------ modules of all kinds


def test_a_users_module() -> None:
    """Dict batches, a step that returns a dict, Adam, an epoch-wise scheduler, a monitor of the rate."""
    x, y = blobs(48)
    rows = [{"x": a, "label": b} for a, b in zip(x, y, strict=True)]
    module, quantize = DictModule(), QuantizationAware({"net.0.*": 3, "net.2.*": None}, ends=True)
    trainer = fit(module, quantize, DataLoader(rows, 16), epochs=5)  # type: ignore[arg-type]
    assert list(quantize.centers) == ["net.0.weight"]
    assert 1 < len(module.net[0].weight.unique()) <= 8 < len(module.net[2].weight.unique())
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
    assert metrics.keys() >= {"my_loss", "quantization/distance", "quantization/sharpness", "quantization/lam"}
    assert metrics["quantization/distance"] == 0.0 and metrics["quantization/sharpness"] == 100.0
    assert "net.0.weight" in str(quantize.report()) and len(quantize.report()) == 1


class Recurrent(L.LightningModule):
    """An LSTM, whose weights torch holds twice, and an embedding that is the output layer too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.out = nn.Linear(8, 10, bias=False)
        self.out.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, std=0.3)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        z = self.out(self.lstm(self.embed(batch[:, :-1]))[0])
        return F.cross_entropy(z.flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("alternate", [True, False])
def test_recurrent_and_shared_weights(alternate: bool) -> None:
    """A step by hand: the quantised weights are used wherever the module uses them."""
    tokens = torch.randint(10, (8, 6), generator=torch.Generator().manual_seed(1))
    module, start = Recurrent(), Recurrent()
    quantize = QuantizationAware(2, ends=True, sharpness=30.0, lam=0.0, center_lr=0.1, alternate=alternate, **NEVER)
    spy = Steps(quantize)
    fit(module, [quantize, spy], DataLoader(tokens, 8))  # type: ignore[arg-type]
    assert list(quantize.centers) == ["embed.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0"]
    live = dict(start.named_parameters())
    ends = {n: [float(v) for v in live[n].detach().aminmax()] for n in quantize.centers}
    c = {n: torch.linspace(*ends[n], 4).requires_grad_() for n in ends}

    def f(own: dict[str, Tensor]) -> Tensor:
        """Plain formulas: no module is called."""
        e, w, v = own["embed.weight"], own["lstm.weight_ih_l0"], own["lstm.weight_hh_l0"]
        h = s = torch.zeros(8, 8)
        out = []
        for t in range(5):
            i, g, u, o = (
                F.linear(e[tokens[:, t]], w, own["lstm.bias_ih_l0"]) + F.linear(h, v, own["lstm.bias_hh_l0"])
            ).chunk(4, 1)
            s = g.sigmoid() * s + i.sigmoid() * u.tanh()
            h = o.sigmoid() * s.tanh()
            out.append(h @ e.T)
        return F.cross_entropy(torch.stack(out, 1).flatten(0, 1), tokens[:, 1:].flatten())

    total = f(live) + f({**live, **{n: soft(live[n], c[n], 30.0) for n in c}})
    grads = torch.autograd.grad(total, [*live.values(), *c.values()])
    moved = {n: (p - 0.1 * g).detach() for (n, p), g in zip(live.items(), grads, strict=False)}
    h = grads[len(live) :]
    if alternate:
        h = torch.autograd.grad(f({**moved, **{n: soft(moved[n], c[n], 30.0) for n in c}}), list(c.values()))
    for n in moved:
        torch.testing.assert_close(spy.weights[0][n], moved[n], rtol=0, atol=1e-6, msg=n)
    for (n, v), d in zip(c.items(), h, strict=True):
        torch.testing.assert_close(spy.centers[0][n], (v - 0.1 * d).detach(), rtol=0, atol=1e-6, msg=n)


def test_convolutions_in_channels_last() -> None:
    """Weights that are not contiguous train to the same values."""

    class Conv(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.Flatten()
            )

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    x = torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    data = served([(x, torch.arange(16) % 3)] * 3)
    found = []
    for form in (torch.contiguous_format, torch.channels_last):
        module = Conv().to(memory_format=form)  # type: ignore[call-overload]
        fit(module, QuantizationAware(2, lam=0.1, finetune=0.5), data, epochs=2)
        found.append(state(module))
    assert not found[1]["net.2.weight"].is_contiguous()
    for n in found[0]:
        torch.testing.assert_close(found[0][n], found[1][n], rtol=0, atol=1e-5, msg=n)


def test_both_executors_of_a_federation_give_the_same() -> None:
    """Its hooks are those that the bare loop calls."""
    data = data_module(2)
    data.setup("fit")
    found = []
    for executor in (LoopLocal(max_epochs=3, lr_decay=0.5), TrainerLocal(max_epochs=3, lr_decay=0.5)):
        module = ClientModule(net(), lr=0.1)
        quantize = QuantizationAware(2, finetune=0.4)
        executor.callbacks = [quantize]
        executor.check(module)
        result = executor.fit(module, data.client(0), round=1, seed=3)
        assert len(module.model[2].weight.unique()) <= 4
        assert result.metrics["quantization/distance"] == 0.0
        found.append(state(module))
    assert_same(found[0], found[1])
