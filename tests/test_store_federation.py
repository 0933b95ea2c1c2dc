"""Federations whose clients remember on disk: the same numbers, checkpoints that resume, clear errors where they cannot."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from test_store import files, same
from toys import NormNet, assert_same, client_module, data_module, outer, run, skewed, weights

from dynfed_lightning import ClientModule, FedAvg, FederatedDataModule, Federation, Local, Scaffold, disk_store
from dynfed_lightning.state_file import StateError
from dynfed_lightning.store import AutoStore, DiskStore, MemoryStore, TrackedCheckpoints

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def fresh(algorithm: Any = None, **kwargs: Any) -> tuple[Federation, FederatedDataModule]:
    data = data_module(6, skewed(6), clients_per_round=3, seed=3)
    kwargs = {"local": "loop", "seed": 7, **kwargs}
    return Federation(ClientModule(NormNet(), lr=0.05), algorithm or Scaffold(), **kwargs), data


def states(federation: Federation) -> dict[int, Any]:
    return {k: federation.store.read(k) for k in federation.store}


@pytest.mark.parametrize(
    "make", [Scaffold, Local, lambda: FedAvg(uplink=4, downlink=4)], ids=["scaffold", "local", "downlink"]
)
def test_where_state_lies_changes_nothing(tmp_path: Path, make: Any) -> None:
    runs = {}
    for name, options in {
        "memory": {"store": "memory"},
        "folder": {"store": tmp_path / "here"},
        "moves": {"store_limit": 500},
        "object": {"store": DiskStore(tmp_path / "mine")},
        "default": {},
    }.items():
        federation, data = fresh(make(), **options)
        trainer = run(federation, data, rounds=4, default_root_dir=tmp_path / name)
        runs[name] = federation, trainer
    truth, trainer = runs["memory"]
    for name, (federation, other) in runs.items():
        assert_same(weights(federation), weights(truth))
        assert same(states(federation), states(truth)) and len(federation.store) > 3, name
        for key in ("accuracy", "own_accuracy", "test_loss"):
            assert other.callback_metrics[key] == trainer.callback_metrics[key]
    kinds = {name: type(federation.store) for name, (federation, _) in runs.items()}
    assert kinds == {
        "memory": MemoryStore,
        "folder": DiskStore,
        "moves": AutoStore,
        "object": DiskStore,
        "default": AutoStore,
    }
    assert runs["moves"][0].store.on_disk and not runs["default"][0].store.on_disk  # type: ignore[attr-defined]
    assert len(files(tmp_path / "moves" / "client_state")) == len(truth.store)
    assert not files(tmp_path / "default") and files(tmp_path / "here") and files(tmp_path / "mine")
    runs.clear()
    del federation, truth
    gc.collect()
    assert not files(tmp_path / "moves") and files(tmp_path / "here")  # temporary, and to stay


@pytest.mark.parametrize("options", [{"store_limit": 0}, {"store": "folder"}, {"store": "memory"}], ids=str)
@pytest.mark.parametrize("then", [{"store_limit": 0}, {"store": "folder"}, {"store": "memory"}, {}], ids=str)
def test_resume_from_the_best_and_the_last(tmp_path: Path, options: dict[str, Any], then: dict[str, Any]) -> None:
    """Lightning keeps two checkpoints of five; both resume bit for bit, into a store of any kind."""
    options, then = (
        {k: str(tmp_path / v) if k == "store" and v == "folder" else v for k, v in o.items()} for o in (options, then)
    )

    class Score(L.Callback):
        def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            pl_module.log("score", -abs(trainer.current_epoch - 1.0))  # the second round is the best

    straight, data = fresh()
    run(straight, data, rounds=7)
    first, data = fresh(**options)
    best = ModelCheckpoint(tmp_path / "c", "best", monitor="score", mode="max", save_top_k=1)
    newest = ModelCheckpoint(tmp_path / "c", "newest", save_top_k=1, enable_version_counter=False)
    root = {"default_root_dir": tmp_path / "root", "enable_checkpointing": True}
    run(first, data, rounds=5, callbacks=[Score(), best, newest], **root)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["best.ckpt", "newest.ckpt"]
    old, new = (torch.load(tmp_path / "c" / f"{n}.ckpt", weights_only=True) for n in ("best", "newest"))
    assert (old["federation"]["last_round"]["round"], new["federation"]["last_round"]["round"]) == (2, 5)
    if options != {"store": "memory"}:
        held = new["federation"]["clients"]
        assert list(held) == ["disk"] and held["disk"]["clients"].tolist() == list(first.store)
        assert len(files(tmp_path)) <= 2 * 6
    for file in (best.best_model_path, newest.best_model_path):
        resumed, data = fresh(**then)
        run(resumed, data, rounds=7, ckpt_path=file, default_root_dir=tmp_path / "root")
        assert_same(weights(resumed), weights(straight))
        assert same(states(resumed), states(straight))
    before = states(first)
    again = outer(1, default_root_dir=tmp_path / "root").validate(first, datamodule=data, ckpt_path=file, verbose=False)
    assert same(states(first), before) and again


def test_checkpoints_that_lightning_deletes_release_their_versions(tmp_path: Path) -> None:
    federation, data = fresh(store=tmp_path / "s")
    most: list[int] = []

    class Count(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            most.append(len(files(tmp_path / "s")))

    keep = ModelCheckpoint(tmp_path / "c", save_top_k=1)  # the newest alone
    run(federation, data, rounds=12, callbacks=[keep, Count()], enable_checkpointing=True)
    assert max(most) <= 6 + 3 and len(federation.store) == 6 == len(files(tmp_path / "s"))
    every, data = fresh(store=tmp_path / "t")
    run(every, data, rounds=4, callbacks=[ModelCheckpoint(tmp_path / "d", save_top_k=-1)], enable_checkpointing=True)
    assert len(files(tmp_path / "t")) == 4 * 3  # a round's three clients each


def test_a_resumed_run_takes_over(tmp_path: Path) -> None:
    """Interrupted and resumed twice into the default folder: in the end there are the files of the last checkpoint alone."""
    for rounds in (2, 4, 6):
        federation, data = fresh(store_limit=0)
        keep = ModelCheckpoint(tmp_path / "c", filename="only", enable_version_counter=False)
        path = tmp_path / "c" / "only.ckpt"
        ckpt = {"ckpt_path": path} if path.exists() else {}
        run(federation, data, rounds, callbacks=[keep], enable_checkpointing=True, default_root_dir=tmp_path, **ckpt)
        del federation, data, keep
        gc.collect()
    assert len(list((tmp_path / "client_state").iterdir())) == 1
    assert len(files(tmp_path / "client_state")) == 6
    straight, data = fresh()
    run(straight, data, rounds=8)
    last, data = fresh()
    run(last, data, rounds=8, ckpt_path=path)
    assert_same(weights(last), weights(straight))


def test_missing_state_on_resume_is_found_before_training(tmp_path: Path) -> None:
    first, data = fresh(store=tmp_path / "s")
    run(first, data, rounds=3).save_checkpoint(tmp_path / "a.ckpt")
    assert isinstance(first.store, DiskStore)
    client = list(first.store)[2]
    file = first.store.file(client)
    whole = file.read_bytes()
    rounds: list[int] = []

    class Seen(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            rounds.append(trainer.current_epoch)

    for options in ({"store": tmp_path / "s"}, {"store": "memory"}, {"store_limit": 0}, {}):
        for damage in ("missing", "cut", "another"):
            file.unlink()
            if damage == "cut":
                file.write_bytes(whole[: len(whole) // 2])
            if damage == "another":
                shutil.copy(first.store.file(next(iter(first.store))), file)
            resumed, data = fresh(**options)
            with pytest.raises(StateError, match=f"state of client {client}"):
                run(
                    resumed,
                    data,
                    rounds=5,
                    ckpt_path=tmp_path / "a.ckpt",
                    callbacks=[Seen()],
                    default_root_dir=tmp_path,
                )
            file.write_bytes(whole)
    assert not rounds
    resumed, data = fresh(store=tmp_path / "s")
    run(resumed, data, rounds=5, ckpt_path=tmp_path / "a.ckpt", callbacks=[Seen()])
    assert rounds == [3, 4]
    shutil.rmtree(tmp_path / "s")
    resumed, data = fresh(store=tmp_path / "s")
    with pytest.raises(StateError, match="a checkpoint does not hold the clients' state itself"):
        run(resumed, data, rounds=5, ckpt_path=tmp_path / "a.ckpt")


def test_a_fit_that_starts_anew_starts_with_nobody(tmp_path: Path) -> None:
    mine = DiskStore(tmp_path)
    federation, data = fresh(store=mine)
    run(federation, data, rounds=1)
    path, once = mine.path, weights(federation)
    torch.manual_seed(0)
    federation.module.load_state_dict(fresh()[0].module.state_dict())
    federation._template[0].load_state_dict(federation.module.state_dict())
    run(federation, data, rounds=1)
    assert_same(weights(federation), once)
    assert federation.store is mine and mine.path != path and len(mine) == 3 and path.is_dir()


def test_other_ways_to_save_checkpoints_still_work(tmp_path: Path) -> None:
    """A plugin of the user's, Lightning's asynchronous one, and a Trainer that is used twice."""
    io = AsyncCheckpointIO()
    federation, data = fresh(store_limit=0)
    keep = ModelCheckpoint(tmp_path / "c", save_last=True)
    trainer = outer(3, plugins=[io], callbacks=[keep], enable_checkpointing=True, default_root_dir=tmp_path)
    trainer.fit(federation, datamodule=data)
    assert isinstance(trainer.strategy.checkpoint_io, TrackedCheckpoints) and trainer.strategy.checkpoint_io.inner is io
    trainer.validate(federation, datamodule=data, verbose=False)
    assert trainer.strategy.checkpoint_io.inner is io
    resumed, data = fresh()
    run(resumed, data, rounds=5, ckpt_path=tmp_path / "c" / "last.ckpt")
    straight, data = fresh()
    run(straight, data, rounds=5)
    assert_same(weights(resumed), weights(straight))


def test_a_custom_store(tmp_path: Path) -> None:
    class Mine(MemoryStore):
        reads = 0

        def read(self, client_id: int) -> Any:
            self.reads += 1
            return super().read(client_id)

    store = Mine()
    federation, data = fresh(store=store)
    trainer = run(federation, data, rounds=2)
    assert (
        federation.store is store
        and store.reads >= 6
        and not isinstance(trainer.strategy.checkpoint_io, TrackedCheckpoints)
    )


def test_a_round_that_fails_leaves_nothing(tmp_path: Path) -> None:
    class Refused(Scaffold):
        def check_reply(self, server: Any, reply: Any) -> None:
            if reply.client_id == 2:
                from dynfed_lightning import ClientFailure

                raise ClientFailure("malformed", "no")
            super().check_reply(server, reply)

    federation = Federation(client_module(), Refused(), local="loop", store=tmp_path)
    run(federation, data_module(4), rounds=2)
    assert list(federation.store) == [0, 1, 3] and not [f for f in files(tmp_path) if "client-000002" in f]


def test_from_a_configuration(tmp_path: Path, tiny: Any) -> None:
    pytest.importorskip("sklearn")
    from dynfed_lightning.cli import main
    from dynfed_lightning.compare import _common
    from dynfed_lightning.config import load

    options: Mapping[str, Any] = {
        "store": str(tmp_path / "state"),
        "store_limit": "1MiB",
        "evaluate_on": "own",
        "evaluate_clients": 2,
    }
    file = tiny("Local", algorithm="Local", federation=dict(options))
    assert main(["fit", "--config", str(file), "--out", str(tmp_path / "run")]) == 0
    assert files(tmp_path / "state")
    assert len((tmp_path / "run" / "own_accuracy.csv").read_text().splitlines()) == 3
    assert "accuracy" in (tmp_path / "run" / "rounds.csv").read_text()
    left = _common({**load([file]), "trainer": {}})["federation"]
    assert left == {"evaluate_on": "own", "evaluate_clients": 2}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"store": 3}, "Expected `store` to be 'memory', a folder, a Store or None, but got int: 3"),
        ({"store_limit": "lots"}, "Expected `store_limit` to be a number of bytes"),
    ],
)
def test_wrong_arguments(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Federation(client_module(), **wrong)


@pytest.mark.parametrize("options", [{"store_limit": 0}, {"store": "folder"}], ids=str)
def test_a_checkpoint_moved_away_keeps_its_state(tmp_path: Path, options: dict[str, Any]) -> None:
    """A finished run's, when the same script runs again, and when a run goes on from it under the old names."""
    options = {k: tmp_path / str(v) if k == "store" else v for k, v in options.items()}

    def script(rounds: int, **kwargs: Any) -> Federation:
        federation, data = fresh(**options)
        keep = ModelCheckpoint(tmp_path / "c", "last", enable_version_counter=False)
        root = {"default_root_dir": tmp_path, "enable_checkpointing": True}
        run(federation, data, rounds, callbacks=[keep], **root, **kwargs)
        return federation

    truth = weights(script(4))
    script(3)
    gc.collect()
    shutil.move(tmp_path / "c" / "last.ckpt", tmp_path / "moved.ckpt")
    script(3)
    for _ in range(2):
        gc.collect()
        assert_same(weights(script(4, ckpt_path=tmp_path / "moved.ckpt")), truth)


@pytest.mark.parametrize("late", [False, True], ids=["at once", "in a thread"])
@pytest.mark.parametrize("good", [2, 3])
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool, good: int
) -> None:
    """Also where the plugin says that it is written long before it is."""
    saved: list[int] = []

    class Full(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            saved.append(checkpoint["epoch"])
            if late:
                time.sleep(0.3)  # longer than a round: several wait to be written
            if len(saved) > good:
                raise OSError(28, "No space left on device")
            super().save_checkpoint(checkpoint, path, storage_options)

    federation, data = fresh(store=tmp_path / "s")
    keep = ModelCheckpoint(tmp_path / "c", "last", enable_version_counter=False)
    io = AsyncCheckpointIO(Full()) if late else Full()
    with pytest.raises(OSError, match="No space left"):
        run(federation, data, 6, callbacks=[keep], enable_checkpointing=True, plugins=[io])
    path = tmp_path / "c" / "last.ckpt"
    assert torch.load(path, weights_only=True)["epoch"] == good - 1
    straight, data = fresh()
    run(straight, data, rounds=6)
    resumed, data = fresh(store=tmp_path / "s")
    run(resumed, data, rounds=6, ckpt_path=path)
    assert_same(weights(resumed), weights(straight))


def test_a_checkpoint_written_in_a_thread_releases_the_one_before(tmp_path: Path) -> None:
    federation, data = fresh(store=tmp_path / "s")
    keep = ModelCheckpoint(tmp_path / "c", "last", enable_version_counter=False)
    run(federation, data, 8, callbacks=[keep], enable_checkpointing=True, plugins=[AsyncCheckpointIO()])
    assert len(files(tmp_path / "s")) == 6 == len(federation.store)


class Fails(Scaffold):
    """Whose server fails once, in the third round: before its step, after it, or when it is interrupted."""

    def __init__(self, moment: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.moment = moment

    def server_step(self, server: Any, replies: Any) -> None:
        if server.round == 2 and self.moment == "before":
            raise ValueError("server step")
        super().server_step(server, replies)
        if server.round == 2 and self.moment == "after":
            with torch.no_grad():
                next(server.module.parameters()).add_(1)
            raise KeyboardInterrupt


Fails.__name__ = "Scaffold"


@pytest.mark.filterwarnings("ignore:.*Detected KeyboardInterrupt")
@pytest.mark.filterwarnings("ignore:.*was called without a model", "ignore:.*there is no last checkpoint available")
@pytest.mark.parametrize(
    ("moment", "options", "codecs"),
    [
        ("before", {"store": "memory"}, {}),
        ("before", {"store": "s"}, {"downlink": 4}),
        ("after", {"store": "memory"}, {"downlink": 4}),
        ("disk full", {"store": "s"}, {"downlink": 4}),
        ("disk full", {"store_limit": 0}, {}),
        ("failed round", {"store": "memory"}, {"downlink": 4}),
        ("optimizer", {"store": "memory"}, {}),
    ],
    ids=str,
)
def test_a_round_that_fails_has_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], moment: str, codecs: dict[str, Any]
) -> None:
    """A checkpoint saved on the exception resumes to the bits of a run that nothing happened to, or is refused."""
    options = {k: tmp_path / v if v == "s" else v for k, v in options.items()}
    real, count = disk_store.write_whole, 0

    def full(path: Path, data: bytes) -> None:
        nonlocal count
        if "client-" in path.name:
            count += 1
            if moment == "disk full" and count == 3 * 2 + 2:  # the second client of the third round
                raise OSError(28, "No space left on device")
        real(path, data)

    class Stops(torch.optim.SGD):
        steps = 0

        def step(self, closure: Any = None) -> Any:
            Stops.steps += 1
            if moment == "optimizer" and Stops.steps == 3:
                raise ValueError("optimizer")
            return super().step(closure)

    algorithm = Fails(moment, **codecs)
    federation, data = fresh(algorithm, server_optimizer=lambda p: Stops(p, lr=1.0), **options)
    if moment == "failed round":

        class Refuses(L.Callback):
            def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
                if trainer.current_epoch == 2:
                    federation.min_clients = 7

        refuses: list[L.Callback] = [Refuses()]
    else:
        refuses = []
    keep = OnExceptionCheckpoint(tmp_path / "c", "x")
    with monkeypatch.context() as patch:
        patch.setattr(disk_store, "write_whole", full)
        try:
            run(federation, data, 5, callbacks=[keep, *refuses], enable_checkpointing=True, default_root_dir=tmp_path)
        except BaseException as error:
            assert (tmp_path / "c").is_dir(), repr(error)
        else:
            pytest.fail("nothing failed")
    (path,) = (tmp_path / "c").iterdir()
    straight, data = fresh(Scaffold(**codecs))
    run(straight, data, rounds=5)
    resumed, data = fresh(Scaffold(**codecs))
    if moment == "optimizer":
        with pytest.raises(ValueError, match="saved when round 3 failed half-way: its clients are ahead of its server"):
            run(resumed, data, rounds=5, ckpt_path=path, default_root_dir=tmp_path)
        return
    run(resumed, data, rounds=5, ckpt_path=path, default_root_dir=tmp_path)
    assert_same(weights(resumed), weights(straight))
    assert same(states(resumed), states(straight))


def test_state_that_is_lost_in_mid_run_is_no_crash_of_a_client(tmp_path: Path) -> None:
    class Cut(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 2:
                file = pl_module.store.file(1)
                file.write_bytes(file.read_bytes()[:-3])

    federation = Federation(client_module(), Local(), local="loop", store=tmp_path)
    with pytest.raises(StateError, match="hold the state of client 1, but it is damaged"):
        run(federation, data_module(4), rounds=4, callbacks=[Cut()], limit_val_batches=0)


def test_state_read_in_an_evaluation_can_be_trained_with(tmp_path: Path) -> None:
    class Adapts(Local):
        adapts = True
        seen = 0

        def adapt(self, client: Any, module: L.LightningModule) -> None:
            with torch.enable_grad():
                for name, p in module.named_parameters():
                    if name in client.state.get("weights", {}):
                        self.seen += 1
                        (p * client.state["weights"][name]).sum().backward()

    algorithm = Adapts()
    federation, data = fresh(algorithm, store=tmp_path)
    run(federation, data, rounds=2)
    assert algorithm.seen
