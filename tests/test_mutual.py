"""Mutual distillation as a callback of an ordinary ``L.Trainer`` and of both executors."""

from __future__ import annotations

import copy
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from mutual_support import Sentences, TinyTransformer, sentences, text_module
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from toys import CLASSES, WIDTH, NormNet, assert_same, blobs, client_module, data_module, network, outer

from dynfed_lightning import ClientModule, LoopLocal, MutualDistillation, TrainerLocal
from dynfed_lightning.capture import match_layers
from dynfed_lightning.optimizers import same_kind


def loader(n: int = 48, batch_size: int = 16) -> DataLoader:
    return DataLoader(TensorDataset(*blobs(n)), batch_size)


def fit(module: L.LightningModule, callback: L.Callback, data: Any = None, epochs: int = 1, **kwargs: Any) -> L.Trainer:
    trainer = outer(epochs, callbacks=[callback], **kwargs)
    trainer.fit(module, loader() if data is None else data)
    return trainer


def state(module: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in module.state_dict().items()}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.2)


# ---------------------------------------------------------------------------------------------------- what it computes


def by_hand(
    student: nn.Module, teacher: nn.Module, batches: Any, lrs: tuple[float, float], adaptive: bool = True
) -> None:
    """SGD on eq. 6-7 without hidden states, each side differentiated by itself."""
    for x, y in batches:
        zs, zt = student(x), teacher(x)
        ces, cet = F.cross_entropy(zs, y), F.cross_entropy(zt, y)
        d = float((ces + cet).detach()) if adaptive else 1.0
        ps, pt = zs.softmax(1), zt.softmax(1)
        ls = ces + (pt.detach() * (pt.detach() / ps).log()).sum() / len(y) / d
        lt = cet + (ps.detach() * (ps.detach() / pt).log()).sum() / len(y) / d
        for model, loss, lr in ((student, ls, lrs[0]), (teacher, lt, lrs[1])):
            grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            with torch.no_grad():
                for p, g in zip(model.parameters(), grads, strict=True):
                    p -= lr * g


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_steps_by_hand(adaptive: bool, role: str) -> None:
    module, peer = client_module(lr=0.1), network(seed=1, hidden=16)
    fit(module, MutualDistillation(peer, role=role, peer_optimizer=sgd, adaptive=adaptive), epochs=2)
    own, other = network(), network(seed=1, hidden=16)
    by_hand(own, other, [*loader(), *loader()], (0.1, 0.2), adaptive)  # without L_h the formulas are symmetric
    for got, expected in ((module.model, own), (peer, other)):
        for a, b in zip(got.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def test_hidden_loss_step_by_hand() -> None:
    """One step: attention maps, padding, sizes that differ, W_h; finite results against autograd on the formula."""
    module, peer = text_module(2, 4, lr=0.1), TinyTransformer(4, 6, heads=2, seed=1)
    s, t = copy.deepcopy(module.model), copy.deepcopy(peer)
    callback = MutualDistillation(peer, peer_optimizer=sgd, attentions=True, seed=5)
    data = sentences(8)
    batch = next(iter(data))
    fit(module, callback, data)
    wh = []
    g = torch.Generator().manual_seed(5)
    for _ in range(2):
        wh.append((torch.empty(6, 4).uniform_(-0.5, 0.5, generator=g)).requires_grad_())
    a = s(batch["input_ids"], batch["attention_mask"])
    b = t(batch["input_ids"], batch["attention_mask"])
    y, keep = batch["labels"], batch["attention_mask"].bool()
    ces, cet = F.cross_entropy(a.logits, y), F.cross_entropy(b.logits, y)
    d = float((ces + cet).detach())

    def hidden(own: Any, other: Any, maps: Any) -> Tensor:
        """Student's layers 2, 1 with the teacher's 4, 2."""
        total = torch.zeros(())
        for (i, j), w in zip([(2, 4), (1, 2)], maps, strict=True):
            total = total + ((own.hidden_states[i] @ w.T - other.hidden_states[j])[keep] ** 2).mean() / 2
            pairs = keep[:, None, :, None] & keep[:, None, None, :]
            square = (own.attentions[i - 1] - other.attentions[j - 1]) ** 2
            total = total + square[pairs.expand_as(square)].mean() / 2
        return total

    def constant(out: Any) -> Any:
        return type(out)(
            **{k: tuple(x.detach() for x in v) if isinstance(v, tuple) else v.detach() for k, v in vars(out).items()}
        )

    kl_s = F.kl_div(a.logits.log_softmax(1), b.logits.detach().softmax(1), reduction="batchmean")
    kl_t = F.kl_div(b.logits.log_softmax(1), a.logits.detach().softmax(1), reduction="batchmean")
    ls = ces + (kl_s + hidden(a, constant(b), wh)) / d
    lt = cet + (kl_t + hidden(constant(a), b, [w.detach() for w in wh])) / d
    for got, model, loss, lr in ((module.model, s, ls, 0.1), (peer, t, lt, 0.2)):
        grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        for p, q, grad in zip(got.parameters(), model.parameters(), grads, strict=True):
            torch.testing.assert_close(p.detach(), (q - lr * grad).detach(), rtol=0, atol=1e-6)
    for i, grad in enumerate(torch.autograd.grad(ls, wh)):
        torch.testing.assert_close(callback.hidden.maps[i].detach(), (wh[i] - 0.2 * grad).detach(), rtol=0, atol=1e-6)
    assert callback.means["hidden_loss"] == pytest.approx(float(hidden(a, b, wh).detach()), rel=1e-5)
    assert callback.means["divisor"] == pytest.approx(d, rel=1e-6)


def test_without_weight_the_module_trains_as_if_alone() -> None:
    """To the bit, although both sides draw dropout masks: the peer has random numbers of its own."""
    alone, beside = (ClientModule(NormNet(), lr=0.1) for _ in range(2))
    L.seed_everything(3, verbose=False)
    fit(alone, L.Callback(), epochs=2)
    L.seed_everything(3, verbose=False)
    peer = NormNet()
    start = state(peer)
    fit(beside, MutualDistillation(peer, weight=0), epochs=2)
    assert_same(state(alone), state(beside))
    assert not torch.equal(start["body.0.weight"], peer.body[0].weight)
    assert torch.equal(start["frozen.weight"], peer.frozen.weight)


def test_the_modules_own_loss_counts() -> None:
    """Class weights in the user's training step: the callback adds to that loss and takes nothing away."""

    class Weighted(ClientModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = F.cross_entropy(self(batch[0]), batch[1], weight=torch.tensor([5.0, 1.0, 1.0]))
            return {"loss": loss, "mine": loss.detach()}

    alone, beside = Weighted(network(), lr=0.1), Weighted(network(), lr=0.1)
    fit(alone, L.Callback())
    fit(beside, MutualDistillation(network(1), weight=0))
    assert_same(state(alone), state(beside))


def test_a_skipped_batch_is_skipped_by_both() -> None:
    class Skips(ClientModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx != 1 else super().training_step(batch, batch_idx)

    peer, expected = network(1), network(1)
    with pytest.warns(UserWarning, match="returned `None`"):
        fit(Skips(network(), lr=0.1), MutualDistillation(peer, weight=0, peer_optimizer=sgd))
    x, y = list(loader())[1]
    F.cross_entropy(expected(x), y).backward()
    for a, b in zip(peer.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a.detach(), (b - 0.2 * b.grad).detach(), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------- the peer's own recipe


def test_a_peer_that_is_a_lightning_module_keeps_its_own() -> None:
    """Its training step, its optimiser and scheduler, what it logs, the Trainer it asks for the epoch."""
    seen = []

    class Peer(ClientModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = 3 * super().training_step(batch, batch_idx)
            seen.append((self.current_epoch, self.trainer.global_step))
            self.log("tripled", loss)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            step = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": step, "interval": "step"}}

    peer, module = Peer(network(1)), client_module()
    trainer = fit(module, MutualDistillation(peer, weight=0), epochs=2)
    expected = network(1)
    for i, (x, y) in enumerate([*loader(), *loader()]):
        grads = torch.autograd.grad(3 * F.cross_entropy(expected(x), y), list(expected.parameters()))
        with torch.no_grad():
            for p, g in zip(expected.parameters(), grads, strict=True):
                p -= 0.1 * 0.5**i * g
    for a, b in zip(peer.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert seen == [(0, 0), (0, 1), (0, 2), (1, 3), (1, 4), (1, 5)]
    assert trainer.callback_metrics["peer/tripled"] > 0
    assert peer._trainer is None


def test_a_bare_peer_learns_with_adamw() -> None:
    peer = network(1)
    callback = MutualDistillation(peer)
    fit(client_module(), callback)
    assert isinstance(callback._optimizer, torch.optim.AdamW) and callback._optimizer.param_groups[0]["lr"] == 1e-3


def test_modes_come_back_and_an_evaluating_peer_is_trained() -> None:
    """`from_pretrained` leaves a model in eval mode, and then its dropout would never act."""
    during = []

    class Watch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(1)
            self.fixed = nn.BatchNorm1d(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            during.append((self.training, self.fixed.training))
            return self.net(self.fixed(x))

    asleep, partly = Watch().eval(), Watch()
    partly.fixed.eval()
    for peer in (asleep, partly):
        fit(client_module(), MutualDistillation(peer))
    assert set(during[:3]) == {(True, True)} and set(during[3:]) == {(True, False)}
    assert not asleep.training and partly.training and not partly.fixed.training


# -------------------------------------------------------------------------------------- Trainer features it honours


def test_accumulated_batches_step_the_peer_once() -> None:
    """Three batches of 16 accumulated are one of 48 (the mean of equal means; nothing adaptive)."""
    for weight in (0.0, 1.0):
        got = []
        for batch_size, accumulate in ((16, 3), (48, 1)):
            module, peer = client_module(), network(1)
            callback = MutualDistillation(peer, peer_optimizer=sgd, adaptive=False, weight=weight)
            fit(module, callback, loader(batch_size=batch_size), epochs=2, accumulate_grad_batches=accumulate)
            assert callback._steps == 2
            got.append((module.model, peer))
        for a, b in zip(*got, strict=True):
            for p, q in zip(a.parameters(), b.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_the_peer_is_clipped_by_the_same_rule(algorithm: str) -> None:
    module, peer = client_module(lr=1.0), network(1)
    start = [p.detach().clone() for p in peer.parameters()]
    callback = MutualDistillation(peer, peer_optimizer=lambda p: torch.optim.SGD(p, lr=1.0), weight=0)
    fit(module, callback, loader(48, 48), gradient_clip_val=0.01, gradient_clip_algorithm=algorithm)
    moved = torch.cat([(p - s).flatten() for p, s in zip(peer.parameters(), start, strict=True)]).detach()
    if algorithm == "norm":
        assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3)
    else:
        assert float(moved.abs().max()) == pytest.approx(0.01, rel=1e-3)


def test_a_gradient_scaler_changes_nothing() -> None:
    """A scale of 2^16 on float32: powers of two, so the same bits, if both sides are unscaled."""

    class Scaled(MixedPrecision):
        def forward_context(self) -> Any:  # float16 on the CPU is not what is tested here
            return torch.autocast("cpu", enabled=False)

    plain, scaled = [], []
    for kept, plugins in ((plain, []), (scaled, [Scaled("16-mixed", "cpu", torch.amp.GradScaler("cpu"))])):
        module, peer = client_module(), network(1)
        fit(
            module,
            MutualDistillation(peer, peer_optimizer=sgd),
            epochs=2,
            plugins=plugins or None,
            gradient_clip_val=0.5,
        )
        kept += [state(module), state(peer)]
    for a, b in zip(plain, scaled, strict=True):
        assert_same(a, b)


def test_a_scaler_skips_the_peers_step_when_its_gradient_overflows() -> None:
    class Explodes(ClientModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * (torch.inf if batch_idx == 0 else 1.0)

    class Scaled(MixedPrecision):
        def forward_context(self) -> Any:
            return torch.autocast("cpu", enabled=False)

    peer, module = Explodes(network(1), lr=0.2), client_module()
    plugin = Scaled("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    fit(module, MutualDistillation(peer, weight=0), plugins=[plugin])
    assert plugin.scaler is not None and plugin.scaler.get_scale() == 2**15  # halved once
    assert all(bool(torch.isfinite(p).all()) for p in (*peer.parameters(), *module.parameters()))
    expected = network(1)
    for x, y in list(loader())[1:]:
        grads = torch.autograd.grad(F.cross_entropy(expected(x), y), list(expected.parameters()))
        with torch.no_grad():
            for p, g in zip(expected.parameters(), grads, strict=True):
                p -= 0.2 * g
    for a, b in zip(peer.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
def test_other_precisions(precision: Any) -> None:
    module, peer = text_module(2, 4), TinyTransformer(4, 6, seed=1)
    callback = MutualDistillation(peer, peer_optimizer=sgd)
    fit(module, callback, sentences(), epochs=2, precision=precision)
    assert {p.dtype for p in peer.parameters()} == {p.dtype for p in module.parameters()}
    assert all(torch.isfinite(torch.tensor(v)) for v in callback.means.values())
    assert callback.hidden.maps[0].dtype == torch.float32


class Interrupted(Exception):
    pass


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
@pytest.mark.parametrize("stop", [1, 2])
def test_resume_goes_on_as_if_nothing_had_happened(stop: int, tmp_path: Path) -> None:
    """AdamW, dropout on both sides, W_h, a scheduler of the peer's: the same bits as without the interruption."""

    class Peer(ClientModule):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)]

    class SeedSteps(L.Callback):
        """The module's own random numbers are no matter of the callback's: the same in every step, whoever resumes."""

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            torch.manual_seed(100 + trainer.global_step)

    def build() -> tuple[ClientModule, Peer, MutualDistillation]:
        torch.manual_seed(7)
        module = text_module(2, 4, dropout=0.2, optimizer="adamw", lr=0.01)
        peer = Peer(TinyTransformer(4, 6, seed=1, dropout=0.2))
        return module, peer, MutualDistillation(peer, attentions=True)

    def train(epochs: int, parts: Any, **kwargs: Any) -> None:
        folder = tmp_path / ("a" if parts is whole else "b")
        callbacks = [SeedSteps(), parts[2], ModelCheckpoint(folder, save_last=True)]
        outer(epochs, callbacks=callbacks, enable_checkpointing=True).fit(parts[0], sentences(), **kwargs)

    whole = build()
    train(4, whole)
    first = build()
    train(stop, first)
    file = tmp_path / "b" / "last.ckpt"
    saved = torch.load(file, weights_only=True)["callbacks"]
    assert any("projections" in v for v in saved.values())
    second = build()
    with torch.no_grad():
        for p in (*second[0].parameters(), *second[1].parameters()):
            p.zero_()  # everything must come out of the file
    train(4, second, ckpt_path=file)
    assert_same(state(whole[0]), state(second[0]))
    assert_same(state(whole[1]), state(second[1]))
    assert_same(state(whole[2].hidden), state(second[2].hidden))
    assert not torch.equal(state(first[1])["model.head.weight"], state(second[1])["model.head.weight"])


class Disturb(L.Callback):
    """Ranks whose peers start apart, as an unseeded script's do."""

    def __init__(self, peer: nn.Module) -> None:
        self.peer = peer

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_rank == 1:
            for p in self.peer.parameters():
                p.data = p.data + 1.0  # in memory of its own: spawned ranks share what they were passed


class Halves(L.LightningDataModule):
    """The same 48 rows in the same order, every batch of 16 dealt to the ranks."""

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        ranks, data = self.trainer.world_size, TensorDataset(*blobs(48))
        sampler = DistributedSampler(data, ranks, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, 16 // ranks, sampler=sampler)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Lightning's advice on spawning and data loaders
def test_two_ranks_are_one_with_twice_the_batch(tmp_path: Path) -> None:
    """The mean over ranks of means over half a batch each: module, peer and W_h, by what rank 0 saved."""

    def train(folder: str, **kwargs: Any) -> tuple[Any, Any]:
        peer = network(1, hidden=16)
        features = [("model.0", "0")]
        callback = MutualDistillation(peer, peer_optimizer=sgd, adaptive=False, features=features)
        callbacks = [Disturb(peer), callback, ModelCheckpoint(tmp_path / folder, save_last=True)]
        kwargs.update(enable_checkpointing=True, gradient_clip_val=0.5, use_distributed_sampler=False)
        outer(2, callbacks=callbacks, **kwargs).fit(client_module(), datamodule=Halves())
        saved = torch.load(tmp_path / folder / "last.ckpt", weights_only=True)
        return saved["state_dict"], next(v for v in saved["callbacks"].values() if "projections" in v)

    strategy = DDPStrategy(process_group_backend="gloo", start_method="spawn", timeout=timedelta(seconds=90))
    one, two = train("one"), train("two", devices=2, strategy=strategy)
    for a, b in ((one[0], two[0]), (one[1]["peer"], two[1]["peer"]), (one[1]["projections"], two[1]["projections"])):
        assert a.keys() == b.keys()
        for n in a:
            torch.testing.assert_close(a[n], b[n], rtol=0, atol=1e-6)
    assert not torch.equal(one[1]["peer"]["0.weight"], network(1, hidden=16)[0].weight)


def test_strategies_that_shard_are_refused() -> None:
    trainer = SimpleNamespace(strategy=FSDPStrategy(), precision_plugin=None)
    with pytest.raises(
        ValueError, match="Expected a single device or DDP under MutualDistillation, but got FSDPStrategy"
    ):
        MutualDistillation(network(1)).on_train_start(trainer, client_module())  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ the two executors


def test_both_executors_train_both_sides_to_the_same_bits() -> None:
    got = []
    for executor in (TrainerLocal, LoopLocal):
        data = data_module()
        data.setup()
        module, peer = ClientModule(NormNet(), lr=0.1), NormNet()
        callback = MutualDistillation(peer)
        result = executor(max_epochs=2).fit(module, data.client(0), callbacks=[callback], seed=5)
        got.append((state(module), state(peer), result.loss, callback.means))
    assert_same(got[0][0], got[1][0])
    assert_same(got[0][1], got[1][1])
    assert got[0][2:] == got[1][2:]


@pytest.mark.parametrize("executor", [TrainerLocal, LoopLocal])
def test_a_decayed_learning_rate_is_the_peers_too(executor: Any) -> None:
    data = data_module()
    data.setup()
    moved = []
    for decay, round in ((1.0, 0), (0.25, 1)):
        peer = network(1)
        start = [p.detach().clone() for p in peer.parameters()]
        callback = MutualDistillation(peer, peer_optimizer=lambda p: torch.optim.SGD(p, lr=0.5), weight=0)
        executor(max_steps=1, lr_decay=decay).fit(
            client_module(), data.client(0), callbacks=[callback], round=round, seed=1
        )
        moved.append(torch.cat([(p - s).flatten() for p, s in zip(peer.parameters(), start, strict=True)]).detach())
        assert callback._optimizer is not None and callback._optimizer.param_groups[0]["lr"] == 0.5
    torch.testing.assert_close(moved[1], 0.25 * moved[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("executor", [TrainerLocal, LoopLocal])
def test_a_crash_leaves_the_module_as_it_was(executor: Any) -> None:
    class Crashes(ClientModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 1:
                raise Interrupted
            return super().training_step(batch, batch_idx)

    data = data_module()
    data.setup()
    module, peer = Crashes(network()), ClientModule(network(1))
    with pytest.raises(Interrupted):
        executor().fit(module, data.client(0), callbacks=[MutualDistillation(peer)], seed=1)
    assert "training_step" not in vars(module) and peer._trainer is None
    assert not module._forward_hooks and not module.model._forward_hooks and not peer._forward_hooks


def test_a_users_own_callback_in_the_bare_loop() -> None:
    LoopLocal(callbacks=[MutualDistillation(network(1))]).check(client_module())


def test_fitted_twice_it_goes_on() -> None:
    module, peer = client_module(), network(1)
    callback = MutualDistillation(peer, peer_optimizer=sgd)
    fit(module, callback)
    fit(module, callback)
    own, other = network(), network(1)
    by_hand(own, other, [*loader(), *loader()], (0.1, 0.2))
    for a, b in zip(peer.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


# ------------------------------------------------------------------------------------------- finding what is compared


class CallsItsPart(L.LightningModule):
    """A training step that never calls the module itself, with a criterion and a second part around the network."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.top, self.criterion = network(hidden=5)[:2], network(hidden=5)[2], nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.backbone(x))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.criterion(self.top(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_logits_are_found_in_parts_and_by_name() -> None:
    means = []
    for logits in ((None, None), ("top", "2")):
        callback = MutualDistillation(network(1), logits=logits)
        fit(CallsItsPart(), callback)
        means.append(callback.means)
    assert means[0] == means[1] and means[0]["student_kl"] > 0


def test_named_layers_give_the_hidden_loss() -> None:
    """Feature maps of convolutions, 3 and 5 channels: W_h maps channels."""

    def conv(channels: int, seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return nn.Sequential(
                nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, channels, 1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(CLASSES)
            )

    module, peer = ClientModule(conv(3, 0), lr=0.1), conv(5, 1)
    x = blobs(2)[0]
    module(x), peer(x)
    # "1" is short for "model.1" within a ClientModule.
    callback = MutualDistillation(peer, features=[("1", "1"), ("model.3", "3")], layer_map=None)
    start = copy.deepcopy(module.model)
    with pytest.raises(ValueError, match=r"same shape but for the last dimension"):
        fit(module, MutualDistillation(copy.deepcopy(peer), features=[("1", "3")]))
    fit(module, callback, loader(16, 16))
    assert [list(w.shape) for w in callback.hidden.maps] == [[5, 3], [30, 18]]
    g = torch.Generator().manual_seed(0)
    first = torch.empty(5, 3).uniform_(-(3**-0.5), 3**-0.5, generator=g)
    second = torch.empty(30, 18).uniform_(-(18**-0.5), 18**-0.5, generator=g)
    torch.testing.assert_close(callback.hidden.maps[0].detach(), first, rtol=0, atol=0.02)
    a = start[:2](blobs(16)[0]).movedim(1, -1) @ first.T
    fresh = conv(5, 1)
    fresh(x)
    b = fresh[:2](blobs(16)[0]).movedim(1, -1)
    c = start[:4](blobs(16)[0]) @ second.T - fresh[:4](blobs(16)[0])
    expected = (((a - b) ** 2).mean() + (c**2).mean()) / 2
    assert callback.means["hidden_loss"] == pytest.approx(float(expected.detach()), rel=1e-5)


def test_equal_sizes_start_from_the_identity_or_do_without() -> None:
    for projection in (True, False):
        module, peer = text_module(2, 4), TinyTransformer(2, 4, seed=0)
        callback = MutualDistillation(peer, projection=projection, attentions=False)
        callback.check(module, next(iter(sentences())))
        assert [w.tolist() for w in callback.hidden.maps] == [torch.eye(4).tolist()] * (2 if projection else 0)
        fit(module, callback, sentences(8))
        assert callback.means["hidden_loss"] == pytest.approx(0, abs=1e-9)  # the two are the same model


def test_layer_maps() -> None:
    for layer_map, layers, heads in [
        (None, [(2, 6), (1, 3)], [(1, 5), (0, 2)]),
        (1, [(2, 6)], [(1, 5)]),
        ([(1, 2), (0, 0), (-1, -2)], [(1, 2), (0, 0), (2, 5)], [(0, 1), (1, 4)]),
    ]:
        callback = MutualDistillation(TinyTransformer(6), layer_map=layer_map, attentions=True)
        callback.check(text_module(2), next(iter(sentences())))
        assert callback.hidden._layers == layers and callback.hidden._heads == heads


def test_only_attentions() -> None:
    callback = MutualDistillation(TinyTransformer(4), hidden=False, attentions=True)
    fit(text_module(2), callback, sentences())
    assert callback.hidden._layers == [] and len(callback.hidden._heads) == 2 and len(callback.hidden.maps) == 0
    assert callback.means["hidden_loss"] > 0


def test_what_the_trainers_logger_gets() -> None:
    class Keep(L.pytorch.loggers.logger.Logger):
        name, version, rows = "keep", 0, []

        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            self.rows.append(metrics)

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            pass

    logger = Keep()
    fit(text_module(2), MutualDistillation(TinyTransformer(4)), sentences(), logger=logger, log_every_n_steps=1)
    names = {"student_loss", "teacher_loss", "student_kl", "teacher_kl", "hidden_loss", "divisor"}
    assert {f"mutual/{n}" for n in names} <= {k for row in logger.rows for k in row}


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"role": "both"}, "Expected `role` to be 'student' or 'teacher', but got 'both'"),
        ({"weight": -1}, "Expected `weight` to be a number >= 0 or a pair"),
        ({"task_weight": (1, 2, 3)}, "Expected `task_weight` to be a number >= 0 or a pair"),
        ({"floor": 0}, "Expected `floor` to be a positive number, but got 0"),
        ({"hidden": "yes"}, "Expected `hidden` to be True, False or 'auto', but got 'yes'"),
        ({"attentions": None}, "Expected `attentions` to be True, False or 'auto', but got None"),
        ({"layer_map": 0}, "Expected `layer_map` to be None, a positive number of layers, or pairs"),
        ({"layer_map": [(1,)]}, "Expected `layer_map` to be None, a positive number of layers, or pairs"),
        ({"layer_map": [(1.5, 2)]}, "Expected `layer_map` to be None, a positive number of layers, or pairs"),
        ({"layer_map": [(True, 1)]}, "Expected `layer_map` to be None, a positive number of layers, or pairs"),
        ({"layer_map": [("1", "2")]}, "Expected `layer_map` to be None, a positive number of layers, or pairs"),
        ({"layer_map": "12"}, "Expected `layer_map` to be None, a positive number of layers, or pairs"),
        ({"layer_map": []}, "Expected `layer_map` to be None, a positive number of layers, or pairs"),
        ({"features": [("a", "nowhere")]}, "Expected a layer of the peer, but it has no 'nowhere': there are "),
        ({"features": [("0", "0")], "hidden": False}, "Expected `hidden` not to be False where `features`"),
        ({"features": [("0", "0")], "layer_map": 1}, "Expected `layer_map` or `features`, but got both"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MutualDistillation(network(1), **kwargs)


def test_bad_peers() -> None:
    with pytest.raises(TypeError, match="Expected `peer` to be a torch module, but got str"):
        MutualDistillation("bert")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Expected `peer` to have trainable parameters"):
        MutualDistillation(network().requires_grad_(False))
    manual = client_module()
    manual.automatic_optimization = False
    with pytest.raises(ValueError, match="Expected a peer with automatic optimisation"):
        MutualDistillation(manual)


class NoLogits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = TinyTransformer()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return {"scores": self.net.embedding(input_ids)}


@pytest.mark.parametrize(
    ("module", "peer", "kwargs", "message"),
    [
        (text_module(2), NoLogits(), {}, r"Expected the peer \(ClientModule\) to return logits"),
        (text_module(4), TinyTransformer(2), {}, "multiple of the student's, but got 2 and 4: give `layer_map` as pairs"),
        (text_module(2), TinyTransformer(5), {}, "multiple of the student's, but got 5 and 2"),
        (text_module(2), TinyTransformer(4), {"layer_map": 3}, "at most the student's 2 layers, not 3"),
        (text_module(2), TinyTransformer(4), {"layer_map": [(3, 1)]}, r"layers of the student from 0 .* to 2, but got 3"),
        (text_module(2), TinyTransformer(4), {"layer_map": [(1, -6)]}, r"layers of the teacher from 0 .* to 4, but got -6"),
        (text_module(2), TinyTransformer(4, 6), {"projection": False}, "equal size without a projection, but got 4 and 6"),
        (text_module(2), TinyTransformer(4), {"logits": ("nope", None)}, "Expected a layer of the module, .* 'nope'"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit_are_found_before_training(
    module: ClientModule, peer: nn.Module, kwargs: Any, message: str
) -> None:
    before = state(module)
    with pytest.raises(ValueError, match=message):
        MutualDistillation(peer, **kwargs).check(module, next(iter(sentences())))
    if not isinstance(peer, NoLogits):  # whose task loss fails first
        with pytest.raises(ValueError, match=message):
            fit(module, MutualDistillation(peer, **kwargs), sentences())
    assert_same(before, state(module))
    assert not module._forward_hooks


def test_other_mismatches() -> None:
    x = next(iter(loader()))
    with pytest.raises(ValueError, match=r"logits of the same shape, but got \[2, 3\] and \[2, 4\]"):
        MutualDistillation(nn.Linear(WIDTH, 4)).check(client_module(), x)
    with pytest.raises(ValueError, match=r"logits of the same shape, but got \[16, 3\] and \[16, 4\]"):
        fit(client_module(), MutualDistillation(nn.Linear(WIDTH, 4)))
    with pytest.raises(ValueError, match="under hidden=True, but the student returns none: name layers in `features`"):
        MutualDistillation(network(1), hidden=True).check(client_module(), x)
    with pytest.raises(ValueError, match="under attentions=True, but the student returns none"):
        MutualDistillation(network(1), attentions=True).check(client_module(), x)
    MutualDistillation(network(1)).check(client_module(), x)
    shared = client_module()
    with pytest.raises(ValueError, match="shares no parameters with the module"):
        fit(shared, MutualDistillation(shared.model))


@pytest.mark.parametrize(("student", "teacher"), [(0, 4), (2, 0), (0, 0), (-1, 3)])
def test_models_without_layers(student: int, teacher: int) -> None:
    with pytest.raises(
        ValueError, match=f"at least one layer, but the student has {student} and the teacher {teacher}"
    ):
        match_layers(student, teacher)


def test_a_peer_that_cannot_be_listened_to_leaves_nothing_behind() -> None:
    """Neither hooks on the module nor a configuration that makes it return its hidden states from now on."""
    module, peer = text_module(2), TinyTransformer(2)
    module.model.config = SimpleNamespace(output_hidden_states=False, output_attentions=False)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"Expected a layer of the peer, but it has no 'nope'"):
        MutualDistillation(peer, logits=(None, "nope")).check(module, next(iter(sentences())))
    assert not any(m._forward_hooks for m in module.modules())
    config = module.model.config  # type: ignore[union-attr]
    assert config.output_hidden_states is False and config.output_attentions is False


def test_w_h_has_the_optimiser_of_the_peer() -> None:
    """AdamW's own defaults hold more than its constructor takes; every setting must be the peer's all the same."""
    callback = MutualDistillation(
        network(1, hidden=24),
        features=[("1", "1")],
        peer_optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.5, 0.7), weight_decay=0.25, amsgrad=True),
    )
    fit(client_module(), callback)
    made = callback._projection_optimizer
    assert type(made) is torch.optim.AdamW
    group = made.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"], group["amsgrad"]) == (1e-3, (0.5, 0.7), 0.25, True)


class PassesOn(torch.optim.AdamW):
    def __init__(self, params: Any, **kwargs: Any) -> None:
        super().__init__(params, **kwargs)


class Inherits(PassesOn):
    pass


@pytest.mark.parametrize(
    "kind",
    [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adagrad,
     torch.optim.RMSprop, torch.optim.Adamax, torch.optim.Adadelta, torch.optim.LBFGS, torch.optim.ASGD, torch.optim.Rprop,
     PassesOn, Inherits],
)  # fmt: skip
def test_every_optimiser_is_made_again(kind: Any) -> None:
    a, b = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    like = kind([a], lr=0.03)
    made = same_kind(like, [b])
    assert type(made) is kind and made.defaults == like.defaults
    assert made.param_groups[0]["params"] == [b] and {**made.param_groups[0], "params": 0} == {
        **like.param_groups[0], "params": 0
    }  # fmt: skip


def test_trainers_it_refuses() -> None:
    manual = client_module()
    manual.automatic_optimization = False
    with pytest.raises(ValueError, match="optimises manually"):
        fit(manual, MutualDistillation(network(1)))
    two = client_module()
    two.configure_optimizers = lambda: [torch.optim.SGD(two.parameters(), lr=0.1)] * 2  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="The peer of MutualDistillation expects one optimizer"):
        fit(client_module(), MutualDistillation(two))
    with pytest.raises(TypeError, match="Expected `peer_optimizer` to make an Optimizer, but it made int"):
        fit(client_module(), MutualDistillation(network(1), peer_optimizer=lambda p: 3))  # type: ignore[arg-type, return-value]


def test_sentences_have_padding() -> None:
    """The tests of padding say nothing without."""
    assert 0 < int((Sentences().mask == 0).sum()) < Sentences().mask.numel() / 2
