"""A federation of many clients with a ResNet-20 each, in a process of its own, so that its memory can be read off.

Prints JSON: resident bytes when each round begins and at the peak, bytes of state on disk, bytes of a checkpoint.

    python store_worker.py FOLDER CLIENTS STORE
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dynfed_lightning import IID, ClientModule, FederatedDataModule, Federation, Local, LoopLocal
from dynfed_lightning.models import ResNet

COHORT = 20


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))


class InTurn(FederatedDataModule):
    """Every client has its turn, then all again."""

    def sample_cohort(self, round: int) -> list[int]:
        first = round * COHORT % self.num_clients
        return list(range(first, first + COHORT))


class WithMoments(Local):
    """A client keeps its model and Adam's moments: three times the weights."""

    def client_step(self, client: Any, module: L.LightningModule, received: Any) -> Any:
        update = super().client_step(client, module, received)
        weights = client.state["weights"]
        before = client.state.get("moments", {"exp_avg": weights, "exp_avg_sq": weights})
        client.state["moments"] = {m: {n: 0.9 * before[m][n] + t for n, t in weights.items()} for m in before}
        return update


class Watch(L.Callback):
    def __init__(self) -> None:
        self.bytes: list[int] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.bytes.append(resident())


def main(folder: Path, clients: int, store: str) -> None:
    folder.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    g = torch.Generator().manual_seed(0)
    rows = 2 * clients
    x, y = torch.randn(rows, 3, 8, 8, generator=g), torch.arange(rows) % 10
    data = InTurn((x, y), IID(clients), test=(x[:40], y[:40]), batch_size=2, clients_per_round=COHORT)
    federation = Federation(
        ClientModule(ResNet(20), lr=0.01),
        WithMoments(),
        local=LoopLocal(max_steps=1),
        evaluate_on="own",
        evaluate_clients=COHORT,
        store="memory" if store == "memory" else folder / "state",
    )
    watch = Watch()
    trainer = L.Trainer(
        max_epochs=clients // COHORT + 5,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=10,
        callbacks=[watch],
        default_root_dir=folder,
    )
    trainer.fit(federation, datamodule=data)
    before = peak()
    trainer.save_checkpoint(folder / "c.ckpt")
    number = len(federation.store)
    result = {
        "rounds": watch.bytes,
        "peak": before,
        "after the checkpoint": peak(),
        "clients": number,
        "state": sum(f.stat().st_size for f in (folder / "state").rglob("client-*")),
        "checkpoint": (folder / "c.ckpt").stat().st_size,
        "steps": federation.store.read(clients - 1).keys() >= {"weights", "moments"},
    }
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
