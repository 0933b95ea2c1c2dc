"""A learnable little problem and modules of every kind, for tests that need a federation but not a data set."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynfed_lightning import IID, ClientModule, Dirichlet, FederatedDataModule, Federation
from dynfed_lightning.partition import Partitioner

CLASSES, WIDTH = 3, 6


def blobs(n: int = 240, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`n` points around three corners: float32 [n, 6] and int64 [n]."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % CLASSES
    x = torch.randn(n, WIDTH, generator=g) + 2.0 * F.one_hot(y, WIDTH)
    return x, y


def network(seed: int = 0, hidden: int = 8) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(WIDTH, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES))


def client_module(seed: int = 0, **kwargs: Any) -> ClientModule:
    return ClientModule(network(seed), **{"lr": 0.1, **kwargs})


def data_module(clients: int = 4, partitioner: Partitioner | None = None, **kwargs: Any) -> FederatedDataModule:
    defaults: dict[str, Any] = {"test": blobs(90, seed=1), "batch_size": 16}
    return FederatedDataModule(blobs(), partitioner or IID(clients), **{**defaults, **kwargs})


def skewed(clients: int = 4, alpha: float = 0.5) -> Dirichlet:
    return Dirichlet(num_clients=clients, alpha=alpha)


def outer(rounds: int = 2, **kwargs: Any) -> L.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(max_epochs=rounds, **{**quiet, **kwargs})


def run(federation: Federation, data: FederatedDataModule | None = None, rounds: int = 2, **kwargs: Any) -> L.Trainer:
    ckpt = kwargs.pop("ckpt_path", None)
    trainer = outer(rounds, **kwargs)
    trainer.fit(federation, datamodule=data or data_module(), ckpt_path=ckpt)
    return trainer


def weights(federation: Federation) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in federation.module.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    for n in a:
        assert torch.equal(a[n], b[n]), f"{n} differs by {float((a[n] - b[n]).abs().max())}"


class DictModule(L.LightningModule):
    """A user's own module: dict batches, Adam with a scheduler, its own logging and validation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        loss = F.cross_entropy(self(batch["x"]), batch["label"])
        self.log("my_loss", loss, prog_bar=True)
        return {"loss": loss, "extra": loss.detach()}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = (batch["x"], batch["label"]) if isinstance(batch, dict) else batch
        self.log("my_accuracy", (self(x).argmax(1) == y).float().mean(), on_epoch=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)}


class NormNet(nn.Module):
    """Batch norm (statistics that travel), dropout (randomness), a frozen layer and an integer buffer (which do not)."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.frozen = nn.Linear(WIDTH, WIDTH)
            self.body = nn.Sequential(
                nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, CLASSES)
            )
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.frozen(x))
