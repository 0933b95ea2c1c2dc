"""QuantizationAware and what a Trainer does around it: precisions, checkpoints, two ranks, and what is refused."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from quantization_support import HIDDEN, Module, fit, loader, served, state
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from toys import assert_same, blobs, client_module, network, outer

from dynfed_lightning import MutualDistillation, QuantizationAware, load_quantized


@pytest.mark.parametrize("alternate", [True, False])
@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
def test_other_precisions(precision: Any, alternate: bool, tmp_path: Path) -> None:
    """It learns, weights become their centres in their own dtype, and the file holds them to the bit."""
    module = Module(lambda p: torch.optim.Adam(p, 0.02), norm=True)
    quantize = QuantizationAware(2, alternate=alternate, finetune=0.25)
    data = loader(dtype=torch.float64) if precision == "64-true" else loader()
    trainer = fit(module, quantize, data, epochs=20, precision=precision)
    w = module.net[2].weight.detach()
    assert w.dtype == {"bf16-mixed": torch.float32, "64-true": torch.float64, "bf16-true": torch.bfloat16}[precision]
    assert set(w.unique().tolist()) <= set(quantize.centers[HIDDEN].to(w.dtype).tolist())
    assert quantize.centers[HIDDEN].dtype == torch.float32
    assert float(trainer.callback_metrics["accuracy"]) > 0.8
    quantize.save(tmp_path / "model.safetensors")
    other = Module(seed=1, norm=True).to(w.dtype)
    load_quantized(other, tmp_path / "model.safetensors")
    assert_same(state(module), state(other))


@pytest.mark.gpu
@pytest.mark.parametrize("alternate", [True, False])
@pytest.mark.parametrize(
    ("precision", "fused"), [("32-true", False), ("bf16-mixed", True), ("16-mixed", False), ("16-mixed", True)]
)
def test_on_a_gpu(precision: Any, fused: bool, alternate: bool, tmp_path: Path) -> None:
    """It learns there, dropout from a stream of its own, and the file is read on the CPU to the bit."""
    module = Module(lambda p: torch.optim.Adam(p, 0.02, fused=fused), norm=True, dropout=0.1)
    quantize = QuantizationAware(2, alternate=alternate, finetune=0.25, relative_sharpness=True, sharpness=5.0)
    trainer = fit(
        module, quantize, loader(), epochs=20, val=loader(), accelerator="gpu", devices=1, precision=precision
    )
    assert float(trainer.callback_metrics["accuracy"]) > 0.8
    assert quantize.engine.centers[0].is_cuda
    quantize.save(tmp_path / "model.safetensors")
    other = Module(seed=1, norm=True)
    load_quantized(other, tmp_path / "model.safetensors")
    assert_same({n: t.cpu() for n, t in state(module).items()}, state(other))
    assert set(other.net[2].weight.unique().tolist()) <= set(quantize.centers[HIDDEN].tolist())


# -------------------------------------------------------------------------------------------------- checkpoints


class Interrupted(Exception):
    pass


class Stop(L.Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        torch.manual_seed(100 + trainer.global_step)  # the module's own random numbers are its own matter
        if trainer.global_step == self.at:
            raise Interrupted


@pytest.mark.filterwarnings(
    "ignore:.*exists and is not empty", "ignore:You're resuming from a checkpoint that ended before"
)
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("stop", [4, 5, 6, 9, 13, 16])
def test_resume_goes_on_as_if_nothing_had_happened(stop: int, relative: bool, tmp_path: Path) -> None:
    """In the middle of an epoch, at its end, and in the last phase: Adam, dropout, running statistics; the same bits."""

    def train(name: str, at: int, **kwargs: Any) -> tuple[Module, QuantizationAware]:
        torch.manual_seed(7)
        module = Module(lambda p: torch.optim.Adam(p, 0.02), dropout=0.3, norm=True)
        quantize = QuantizationAware(2, relative_sharpness=relative, center_lr=1e-2, lam=1e-2, finetune=0.34)
        keep = ModelCheckpoint(tmp_path / name, save_top_k=-1, every_n_train_steps=1, filename="{step}")
        same = served(list(loader())[:1] * 3)  # a plain loader starts anew when an epoch is resumed
        trainer = outer(6, callbacks=[Stop(at), quantize, keep], enable_checkpointing=True, num_sanity_val_steps=2)
        try:
            trainer.fit(module, same, served(list(loader())[:1]), **kwargs)
        except Interrupted:
            assert not quantize.frozen or at > 12
        return module, quantize

    module, quantize = train("whole", -1)
    train("part", stop)
    again, resumed = train("part", -1, ckpt_path=tmp_path / "part" / f"step={stop}.ckpt")
    assert_same(state(module), state(again))
    assert torch.equal(quantize.centers[HIDDEN], resumed.centers[HIDDEN])
    assert torch.equal(quantize.engine.index[0], resumed.engine.index[0])
    assert resumed.steps == quantize.steps == 18
    assert module.seen[-1] == again.seen[-1]


def test_a_checkpoint_of_other_bits_or_layers_is_refused(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, save_last=True)
    fit(Module(), [QuantizationAware(2, finetune=0.0), keep], enable_checkpointing=True)
    file = tmp_path / "last.ckpt"
    saved = torch.load(file, weights_only=True)  # nothing but tensors and plain values
    part = next(v for v in saved["callbacks"].values() if "engine" in v)
    for quantize, message in (
        (QuantizationAware(4), r"Expected 16 centres of 'net.2.weight' at 4 bits, but the state has 4"),
        (QuantizationAware(2, ends=True), r"Expected centres of the quantised layers \['net.0.weight'"),
        (QuantizationAware(None), r"Expected centres of the quantised layers \[\], but the state has .*net.2.weight"),
    ):
        quantize.load_state_dict(part)
        with pytest.raises(ValueError, match=message):
            fit(Module(), quantize)
    quantize = QuantizationAware(2)
    part["engine"]["index"] = {HIDDEN: torch.zeros(3, 3, dtype=torch.uint8)}
    quantize.load_state_dict(part)
    with pytest.raises(
        ValueError, match=r"Expected assignments of shape \(12, 12\) of 'net.2.weight', but .* \(3, 3\)"
    ):
        fit(Module(), quantize)


@pytest.mark.filterwarnings("ignore:.*exists and is not empty", "ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_is_tested_with_quantised_weights(tmp_path: Path) -> None:
    """As validation saw it when it was written, by the same callback, another, or `quantize`."""
    module, data = Module(norm=True), served(list(loader())[:1])
    quantize = QuantizationAware(2, center_lr=0.01)
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    trainer = fit(module, [quantize, keep], epochs=5, val=data, enable_checkpointing=True)
    seen = list(module.seen)
    file = tmp_path / "epoch=1.ckpt"
    assert len(torch.load(file, weights_only=True)["state_dict"][HIDDEN].unique()) > 4
    trainer.test(module, data, ckpt_path=file, verbose=False)
    assert module.seen[-1] == seen[1]
    assert len(module.net[2].weight.unique()) > 4  # put back
    other, callback = Module(norm=True, seed=1), QuantizationAware(2)
    outer(callbacks=[callback]).validate(other, data, ckpt_path=file, verbose=False)
    assert other.seen[-1] == seen[1]
    saved = torch.load(file, weights_only=True)
    third, callback = Module(norm=True, seed=2), QuantizationAware(2)
    third.load_state_dict(saved["state_dict"])
    with pytest.raises(ValueError, match="Expected `load_state_dict`"):
        callback.quantize(third)
    callback.load_state_dict(saved["callbacks"][callback.state_key])
    callback.quantize(third)
    assert len(third.net[2].weight.unique()) <= 4
    outer().validate(third, data, verbose=False)
    assert third.seen[-1] == seen[1]
    assert seen[1] != seen[4]
    trainer.test(module, data, ckpt_path=tmp_path / "epoch=4.ckpt", verbose=False)
    assert module.seen[-1] == seen[4]


class Predicts(Module):
    """Answers with the number of values that the quantised layer has."""

    def predict_step(self, batch: Any, batch_idx: int) -> int:
        return len(self.net[2].weight.unique())


@pytest.mark.filterwarnings("ignore:.*exists and is not empty", "ignore:Be aware that when using `ckpt_path`")
def test_the_best_checkpoint_becomes_a_file(tmp_path: Path) -> None:
    """fit, test the best, quantise it, save: the file is what was tested. Predictions are with quantised weights too."""
    module, data = Predicts(norm=True), served(list(loader())[:1])
    quantize = QuantizationAware(2, center_lr=0.01)
    keep = ModelCheckpoint(tmp_path, monitor="val_loss", mode="max", filename="best")
    trainer = fit(module, [quantize, keep], epochs=5, val=data, enable_checkpointing=True)
    trainer.test(module, data, ckpt_path="best", verbose=False)
    tested = module.seen[-1]
    assert tested == max(module.seen[:5]) != module.seen[4]
    assert len(module.net[2].weight.unique()) > 4
    with pytest.raises(ValueError, match="Expected `save` after training, or of a checkpoint after `quantize`"):
        quantize.save(tmp_path / "x")
    assert trainer.predict(module, data, ckpt_path="best") == [4]
    trainer.test(module, data, verbose=False)  # the same module, without loading it again
    assert module.seen[-1] == tested
    other = Predicts(norm=True)
    assert trainer.predict(other, data)[0] > 4  # type: ignore[index]  # another module is none of its business
    quantize.quantize(module)
    quantize.save(tmp_path / "model.safetensors")
    load_quantized(other, tmp_path / "model.safetensors")
    outer().validate(other, data, verbose=False)
    assert other.seen[-1] == tested
    with pytest.raises(ValueError, match="before `quantize`"):
        quantize.quantize(module)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_fit_after_an_evaluation_starts_anew(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, save_last=True)
    module, data = Module(), served(list(loader())[:1])
    fit(module, [QuantizationAware(2, finetune=0.0), keep], enable_checkpointing=True)
    quantize = QuantizationAware(2, center_lr=0.0)
    outer(callbacks=[quantize]).validate(module, data, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    fit(module, quantize)
    assert quantize.steps == 3


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
def test_checkpoints_of_weights_alone_are_warned_of(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, save_weights_only=True)
    with pytest.warns(UserWarning, match="beside QuantizationAware: its files lack the centres"):
        fit(Module(), [QuantizationAware(2), keep], enable_checkpointing=True)


@pytest.mark.filterwarnings("ignore:.*was called without a model", "ignore:.*no last checkpoint available")
def test_a_checkpoint_of_an_exception_goes_on_with_the_same_random_numbers(tmp_path: Path) -> None:
    quantize = QuantizationAware(2)
    with pytest.raises(Interrupted):
        fit(Module(dropout=0.5), [quantize, Stop(2), OnExceptionCheckpoint(tmp_path)], enable_checkpointing=True)
    (file,) = tmp_path.iterdir()
    saved = torch.load(file, weights_only=True)["callbacks"][quantize.state_key]["random"]["cpu"]
    assert torch.equal(saved, quantize.state_dict()["random"]["cpu"])
    fresh = QuantizationAware(2)
    with pytest.raises(Interrupted):
        fit(Module(dropout=0.5), [fresh, Stop(0)])
    assert not torch.equal(saved, fresh.state_dict()["random"]["cpu"])


def test_ranks_that_resume_draw_numbers_of_their_own(monkeypatch: Any) -> None:
    """A checkpoint holds rank 0's stream; one process goes on with it."""
    monkeypatch.setattr("dynfed_lightning.quantization_aware.start_equal", lambda _: None)
    state: dict[str, Any] = {}
    found = []
    for ranks, rank, steps in ((1, 0, 3), (1, 0, 3), (2, 0, 3), (2, 1, 3), (2, 1, 4)):
        torch.manual_seed(5)
        module = Module()
        trainer: Any = SimpleNamespace(
            strategy=None, optimizers=[module.configure_optimizers()], max_steps=-1, max_epochs=4, current_epoch=0
        )
        trainer.world_size, trainer.global_rank = ranks, rank
        quantize = QuantizationAware(2)
        quantize.load_state_dict({**state, "steps": steps} if state else {})
        quantize.on_train_start(trainer, module)
        assert quantize._again is not None
        with quantize._again.random.used():
            found.append(float(torch.rand(())))
        state = state or quantize.state_dict()
        quantize._unwrap()
    assert len(set(found)) == 5, found


def test_a_checkpoint_written_during_validation_holds_the_weights_that_are_trained(tmp_path: Path) -> None:
    class Write(L.Callback):
        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            assert len(pl_module.net[2].weight.unique()) <= 4
            trainer.save_checkpoint(tmp_path / "now.ckpt")

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            assert_same(torch.load(tmp_path / "now.ckpt", weights_only=True)["state_dict"], state(pl_module))

    for validate in ("quantized", "float"):
        quantize = QuantizationAware(2, finetune=0.0, validate=validate)
        if validate == "quantized":
            fit(Module(norm=True), [quantize, Write()], epochs=1, val=served(list(loader())[:1]))


# --------------------------------------------------------------------------------------------------- two ranks


class Disturb(L.Callback):
    """Ranks that would start apart, and whose random numbers are apart."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        torch.manual_seed(trainer.global_rank)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.check(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.check(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.check(trainer, pl_module)

    def check(self, trainer: Any, pl_module: Any) -> None:
        """All ranks hold the same centres, assignments and weights."""
        quantize = next(c for c in trainer.callbacks if isinstance(c, QuantizationAware))
        own = torch.cat([p.detach().flatten() for p in (*pl_module.parameters(), *quantize.engine.centers)])
        own = torch.cat([own, *(i.flatten().float() for i in quantize.engine.index)])
        found = [torch.empty_like(own) for _ in range(trainer.world_size)]
        if trainer.world_size > 1:
            torch.distributed.all_gather(found, own)
            assert all(torch.equal(own, other) for other in found)


class Halves(L.LightningDataModule):
    """The same 48 rows in the same order, every batch of 16 dealt to the ranks."""

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        ranks, data = self.trainer.world_size, TensorDataset(*blobs(48))
        sampler = DistributedSampler(data, ranks, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, 16 // ranks, sampler=sampler)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Lightning's advice on spawning and data loaders
@pytest.mark.parametrize("alternate", [True, False])
def test_two_ranks_are_one_with_twice_the_batch(alternate: bool, tmp_path: Path) -> None:
    """The mean over ranks of means over half a batch each: weights and centres, by what rank 0 saved; into the last phase."""

    def train(folder: str, **kwargs: Any) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
        quantize = QuantizationAware(2, alternate=alternate, center_lr=0.02, lam=1e-2, finetune=0.34)
        module = Module()
        callbacks = [quantize, Disturb(), ModelCheckpoint(tmp_path / folder, save_top_k=-1, filename="{epoch}")]
        kwargs.update(enable_checkpointing=True, gradient_clip_val=0.5, use_distributed_sampler=False)
        outer(3, callbacks=callbacks, **kwargs).fit(module, datamodule=Halves())
        saved = torch.load(tmp_path / folder / "epoch=1.ckpt", weights_only=True)
        part = next(v for v in saved["callbacks"].values() if "engine" in v)
        return saved["state_dict"], part["engine"]["centers"], state(module)[HIDDEN]

    strategy = DDPStrategy(process_group_backend="gloo", start_method="spawn", timeout=timedelta(seconds=90))
    one, two = train("one"), train("two", devices=2, strategy=strategy)
    for a, b in ((one[0], two[0]), (one[1], two[1])):
        assert a.keys() == b.keys()
        for n in a:
            torch.testing.assert_close(a[n], b[n], rtol=0, atol=2e-6, msg=n)
    torch.testing.assert_close(one[2], two[2], rtol=0, atol=2e-6)
    assert len(two[2].unique()) <= 4  # spawned ranks give the module back as it ended
    start = Module().net[2].weight.detach()
    assert float((one[1][HIDDEN] - torch.linspace(float(start.min()), float(start.max()), 4)).abs().max()) > 1e-3


# --------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"bits": 9}, "Expected `bits` to be an integer from 1 to 8, but got 9"),
        ({"bits": 0}, "but got 0"),
        ({"bits": True}, "but got True"),
        ({"bits": "2"}, "but got '2'"),
        ({"bits": {"*": 2.5}}, r"Expected `bits` of '\*' to be an integer from 1 to 8, but got 2.5"),
        ({"sharpness": 0.0}, "Expected `sharpness` to be positive"),
        ({"sharpness": float("nan")}, "Expected `sharpness` to be positive"),
        ({"lam": -1e-4}, "Expected `lam` to be >= 0"),
        ({"center_lr": -1.0}, "Expected `center_lr` to be >= 0"),
        ({"clamp": 0.0}, "Expected `clamp` to be a positive number or None"),
        ({"finetune": 1.1}, "Expected `finetune` to be a number from 0 to 1"),
        ({"validate": "hard"}, "Expected `validate` to be 'quantized' or 'float'"),
        ({"centers": [0.0, 1.0]}, "Expected the first centres as a mapping or a function"),
        ({"relative_sharpness": 2}, "Expected `relative_sharpness` to be True or False"),
    ],
)
def test_arguments_out_of_range(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizationAware(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"bits": {"*.nowhere": 2}},
            r"pattern '\*.nowhere' of `bits` to match a layer, but there are \['net.2.weight'\]",
        ),
        ({"bits": {"net.0.*": 2}}, r"'net.0.weight' is first or last: ends=True"),
        ({"bits": lambda n, p: 12}, "Expected `bits` of 'net.2.weight' to be an integer from 1 to 8, but got 12"),
        (
            {"centers": {"net.2.*": [0.0, -0.1, 0.1, 0.2]}},
            "'net.2.weight' to be finite and strictly ascending, but got",
        ),
        ({"centers": {"net.2.*": [0.0, 0.0, 0.1, 0.2]}}, "strictly ascending"),
        ({"centers": {"net.2.*": [0.0, float("nan"), 0.1]}}, "finite and strictly ascending"),
        ({"centers": {"net.2.*": [0.0, 0.1, 0.2, 0.3, 0.4]}}, "Expected 2 to 4 centres of 'net.2.weight' at 2 bits"),
        ({"centers": {"net.7.*": [0.0, 0.1]}}, "pattern 'net.7.*' of the first centres to match one of"),
        ({"clamp": 0.1}, "Expected the weights of 'net.2.weight' within `clamp` = 0.1, but the largest is 0.28"),
    ],
)
def test_models_that_do_not_fit(kwargs: dict[str, Any], message: str) -> None:
    module = Module()
    before = state(module)
    with pytest.raises(ValueError, match=message):
        fit(module, QuantizationAware(**{"bits": 2, **kwargs}))
    assert_same(before, state(module))
    assert "training_step" not in vars(module)


def test_a_model_without_a_layer_in_between() -> None:
    with pytest.raises(ValueError, match="between the first and the last to quantise, but it has .* ends=True"):
        fit(client_module(), QuantizationAware(2))
    module = client_module()
    fit(module, QuantizationAware(2, ends=True, clamp=None))
    assert len(module.model[0].weight.unique()) <= 4


def test_first_centres_of_a_users_own() -> None:
    for centers in ({"net.2.*": [-0.2, 0.0, 0.2]}, lambda name, x, bits: torch.tensor([-0.2, 0.0, 0.2])):
        quantize = QuantizationAware(2, centers=centers, center_lr=0.0)  # type: ignore[arg-type]
        module = Module()
        fit(module, quantize)
        assert quantize.centers[HIDDEN].tolist() == pytest.approx([-0.2, 0.0, 0.2])
        assert len(module.net[2].weight.unique()) == 3


def test_weights_that_are_not_numbers() -> None:
    module = Module()
    with torch.no_grad():
        module.net[2].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="Expected finite weights of 'net.2.weight', but got NaN or infinity"):
        fit(module, QuantizationAware(2))

    class Diverges(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (torch.nan if batch_idx == 1 else 1.0)

    module = Diverges()
    with pytest.raises(ValueError, match="Expected finite centres of 'net.2.weight'"):
        fit(module, QuantizationAware(2))
    assert "training_step" not in vars(module)


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
def test_setups_that_it_cannot_honour() -> None:
    class Manual(Module):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    class Iterates(Module):
        def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
            return super().training_step(next(dataloader_iter)[0], 0)

    class Checkpointing(Module):
        def __init__(self) -> None:
            super().__init__()
            self.net[1].gradient_checkpointing = True

    for module, others, kwargs, message in (
        (Manual(), [], {}, "Expected a module with automatic optimisation .* but Manual optimises manually"),
        (Iterates(), [], {}, "but it takes `dataloader_iter`"),
        (Checkpointing(), [], {}, "Expected no activation checkpointing under QuantizationAware, but 'net.1' has it"),
        (Module(lambda p: torch.optim.LBFGS(p)), [], {}, "one gradient a step under QuantizationAware, but got LBFGS"),
        (
            Module(),
            [StochasticWeightAveraging(0.1)],
            {},
            "Expected no StochasticWeightAveraging beside QuantizationAware",
        ),
        (Module(), [QuantizationAware(4)], {}, "another callback .* has wrapped it"),
        (
            Module(),
            [],
            {"epochs": -1, "max_time": "00:00:01:00"},
            "Expected `max_epochs` or `max_steps` of the Trainer",
        ),
    ):
        callbacks = [*others, QuantizationAware(2)]
        for c in others:
            if isinstance(c, QuantizationAware):
                c.__class__ = type("Other", (QuantizationAware,), {})  # of another `state_key`
        with pytest.raises(ValueError, match=message):
            fit(module, callbacks, **kwargs)
        assert "training_step" not in vars(module)

    class Part(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([*self.net[0].parameters(), *self.net[4].parameters()], lr=0.1)

    with pytest.raises(ValueError, match="Expected an optimiser to step 'net.2.weight', which is quantised, but none"):
        fit(Part(), QuantizationAware(2))
    peer = MutualDistillation(network(1), weight=0)
    with pytest.raises(ValueError, match="has wrapped it"):
        fit(Module(), [peer, QuantizationAware(2)])
    trainer = SimpleNamespace(strategy=FSDPStrategy(), precision_plugin=None, sanity_checking=False)
    with pytest.raises(
        ValueError, match="Expected a single device or DDP under QuantizationAware, but got FSDPStrategy"
    ):
        QuantizationAware(2).on_train_start(trainer, Module())  # type: ignore[arg-type]


def test_save_before_the_end(tmp_path: Path) -> None:
    quantize = QuantizationAware(2)
    with pytest.raises(ValueError, match="Expected `save` after training"):
        quantize.save(tmp_path / "x")
    assert not list(tmp_path.iterdir())
    assert str(quantize.report()).startswith("layer")


def test_a_sanity_check_does_not_use_up_what_was_loaded() -> None:
    """Without `ckpt_path` Lightning validates before training begins."""
    first = QuantizationAware(2, center_lr=0.5, lam=0.0, finetune=0.0)
    module = Module()
    fit(module, first)
    second = QuantizationAware(2, center_lr=0.0)
    second.load_state_dict(first.state_dict())
    fit(module, second, val=served(list(loader())[:1]), num_sanity_val_steps=1)
    assert torch.equal(second.centers[HIDDEN], first.centers[HIDDEN])
    assert second.steps == 6
