"""The communication hooks on two processes that speak gloo: under torch's DDP (started once, for all short checks), Lightning."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import comm_workers
import lightning as L
import pytest
import torch
from comm_support import processes
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from dynfed_lightning.comm_hooks import (
    GradientCompression,
    LowRankState,
    QuantizedState,
    low_rank_hook,
    quantized_hook,
)

Results = Callable[[str], list[Any]]


def run(folder: Path, names: list[str]) -> Results:
    """What a check returned, on each rank."""
    processes(comm_workers.work, 2, str(folder), names)

    def of(name: str) -> list[Any]:
        found = []
        for rank in range(2):
            file = folder / f"{name}.{rank}"
            assert file.is_file(), f"{name} was not reached: an earlier check failed"
            verdict, value = torch.load(file, weights_only=True)
            assert verdict == "done", value
            found.append(value)
        return found

    return of


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Of all checks that take a few steps only: two processes for them together."""
    return run(tmp_path_factory.mktemp("ranks"), [name for name in comm_workers.CHECKS if name != "training"])


def test_lossless_settings_are_plain_ddp(results: Results) -> None:
    for found in results("lossless"):
        assert found["full rank"] <= 1e-6
        assert found["no bits"] == found["later"] == 0.0


@pytest.mark.slow
def test_training_reaches_the_loss_of_plain_ddp(tmp_path: Path) -> None:
    found, other = run(tmp_path, ["training"])("training")
    assert all(value[1] for value in [*found.values(), *other.values()]), "ranks differ in their weights"
    loss = {name: value[0] for name, value in found.items()}
    for name in comm_workers.LOSSLESS_ENOUGH:
        assert loss[name] <= loss["plain"] + 0.05, name  # 2.3 untrained, 0.08 with plain DDP
    for name in comm_workers.FORGETFUL:
        worse = {kind: loss[name + kind] - loss["slowly, plain"] for kind in ("", " forgetful")}
        assert worse[" forgetful"] > 0.5, name
        assert worse[""] < 0.65 * worse[" forgetful"], name


def test_counted_bytes_are_those_of_the_collectives(results: Results) -> None:
    for found in results("bytes"):
        for name, (traffic, seen, dense, last, step) in found.items():
            assert (traffic["payload"], traffic["wire"]) == (seen["payload"], seen["wire"]), name
            assert traffic["steps"] == step == 3
            assert traffic["dense_payload"] == 3 * dense
            assert last["steps"] == 1 and last["dense_payload"] == dense
            assert last["payload"] < dense / 4, name


def test_rivals_torchs_own_power_sgd(results: Results) -> None:
    """What has been applied on average comes as close to the true gradient, with the same rank; and a rank whose data differ
    from the others' does not pile up the difference."""
    for found in results("against_torch"):
        (torch_errors, torch_kept), (our_errors, our_kept) = found["torch"], found["ours"]
        assert our_errors[-1] < 0.2
        assert our_errors[-1] <= 1.1 * torch_errors[-1]
        assert sum(our_errors) <= 1.1 * sum(torch_errors)
        assert our_kept < 0.8 * torch_kept


def test_unused_parameters_and_accumulated_gradients(results: Results) -> None:
    for found in results("unused"):
        for name, (loss, same, moved, steps) in found.items():
            assert same and steps == 6, name
            assert moved > 1e-4
            assert loss <= 1.1 * found["plain"][0]


def test_a_saved_state_goes_on(results: Results) -> None:
    for found in results("resume"):
        assert found["rank"][0] <= 1e-5
        assert found["forgotten"][0] > 10 * found["rank"][0] + 1e-4  # so the state matters
        assert found["bits"][1] == found["rank"][1] == 10
        assert all(same for _, _, same in found.values())


def test_other_precisions(results: Results) -> None:
    for found in results("dtypes"):
        assert len(found) == 7
        assert all(finite and same for finite, same in found.values()), found


def test_a_step_that_is_not_finite_leaves_no_trace(results: Results) -> None:
    for found in results("not_finite"):
        for poisoned, finite, difference in found.values():
            assert poisoned and finite
            assert difference < 0.05


def test_sparse_gradients_are_refused(results: Results) -> None:
    """Ranks would drift apart in silence."""
    for found in results("sparse"):
        assert set(found) == {"rank", "bits"}
        assert all(message and "`sparse=False` in the embedding" in message for message in found.values()), found


def fit(
    folder: Path, state: Any, hook: Any, steps: int = 0, ckpt_path: str | None = None, epochs: int = 2, **kwargs: Any
) -> tuple[L.Trainer, comm_workers.LitNet]:
    strategy = DDPStrategy(
        ddp_comm_state=state,
        ddp_comm_hook=hook,
        process_group_backend="gloo",
        start_method="spawn",
        timeout=timedelta(seconds=90),
    )
    callbacks: list[Any] = [ModelCheckpoint(folder, save_last=True), comm_workers.Expect(state, steps, True)]
    callbacks.append(GradientCompression(state))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )
    module = comm_workers.LitNet()
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer, module


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    processes(comm_workers.on_gpu, 2, str(tmp_path))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Lightning's advice on spawning, data loaders and checkpoints
@pytest.mark.parametrize("kind", ["rank", "bits"])
def test_in_a_lightning_trainer(kind: str, tmp_path: Path) -> None:
    """Spawned processes, bfloat16, accumulated gradients, a checkpoint, and training that goes on from it."""
    make = {"rank": lambda: LowRankState(2), "bits": lambda: QuantizedState(4, rotate=1024)}[kind]
    hook = {"rank": low_rank_hook, "bits": quantized_hook}[kind]
    trainer, module = fit(tmp_path, make(), hook, precision="bf16-mixed", accumulate_grad_batches=2)
    weights = comm_workers.flat(module)
    assert weights.isfinite().all() and not torch.equal(weights, comm_workers.flat(comm_workers.LitNet()))
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
    dense = 4 * 4 * sum(p.numel() for p in module.parameters()) / 1e6  # four optimiser steps on two ranks
    assert metrics["comm_dense_megabytes"] == pytest.approx(dense, rel=1e-4)
    assert metrics["comm_ratio"] == pytest.approx(dense / metrics["comm_megabytes"], rel=1e-3)
    assert metrics["comm_ratio"] > 5
    last = str(tmp_path / "last.ckpt")
    saved = torch.load(last, weights_only=True)["dynfed_gradient_compression"]
    assert saved["state"]["step"] == 4 and saved["state"]["traffic"]["steps"] == 4
    later, _ = fit(tmp_path, make(), hook, steps=4, ckpt_path=last, epochs=3, precision="bf16-mixed")
    assert float(later.callback_metrics["comm_megabytes"]) > metrics["comm_megabytes"]
