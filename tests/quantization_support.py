"""Modules, data and a reference for the tests of quantisation-aware training."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from toys import CLASSES, WIDTH, blobs, outer

HIDDEN = "net.2.weight"  # the one layer of `net` that is quantised by default


def net(seed: int = 0, width: int = 12, dropout: float = 0.0, norm: bool = False) -> nn.Sequential:
    """Three linear layers; the middle one (index 2) is what is quantised."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(WIDTH, width),
            nn.Sequential(nn.BatchNorm1d(width) if norm else nn.Identity(), nn.ReLU(), nn.Dropout(dropout)),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, CLASSES),
        )


class Module(L.LightningModule):
    """A user's module: logs its loss and an accuracy that torchmetrics keeps; SGD unless told otherwise."""

    def __init__(self, optimizer: Callable[[Any], Any] | None = None, **kwargs: Any) -> None:
        super().__init__()
        self.net = net(**kwargs)
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.seen: list[float] = []
        self.optimizer = optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        z = self.net(x)
        loss = F.cross_entropy(z, y)
        self.accuracy(z, y)
        self.log("loss", loss, on_step=True, on_epoch=False)
        self.log_dict({"accuracy": self.accuracy}, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(float(F.cross_entropy(self.net(batch[0]), batch[1])))
        self.log("val_loss", self.seen[-1])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        make = self.optimizer or functools.partial(torch.optim.SGD, lr=0.1)
        return make(self.parameters())


def loader(n: int = 48, batch_size: int = 16, dtype: torch.dtype = torch.float32) -> DataLoader:
    x, y = blobs(n)
    return DataLoader(TensorDataset(x.to(dtype), y), batch_size)


def served(batches: Any) -> DataLoader:
    """These batches, as they are."""
    return DataLoader(list(batches), batch_size=None)


def fit(
    module: L.LightningModule, callbacks: Any, data: Any = None, epochs: int = 1, val: Any = None, **kwargs: Any
) -> L.Trainer:
    listed = list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks]
    trainer = outer(epochs, callbacks=listed, **{"num_sanity_val_steps": 0, **kwargs})
    trainer.fit(module, loader() if data is None else data, val)
    return trainer


def state(module: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in module.state_dict().items()}


# ------------------------------------------------------------------------------------------ algorithm 1, in plain torch


def soft(x: Tensor, c: Tensor, sharpness: float) -> Tensor:
    """Equation 3: the sum of sigmoids."""
    out = c[0] + torch.zeros_like(x)
    for j in range(1, len(c)):
        out = out + (c[j] - c[j - 1]) * torch.sigmoid(sharpness * (x - (c[j] + c[j - 1]) / 2))
    return out


def nearest(x: Tensor, c: Tensor) -> Tensor:
    return (x.unsqueeze(-1) - c).abs().argmin(-1)


def prox_x(y: Tensor, c: Tensor, threshold: float) -> Tensor:
    """argmin_z (z - y)^2 / 2 + threshold |z - Q(y)|."""
    d = y - c[nearest(y, c)]
    return c[nearest(y, c)] + d.sign() * (d.abs() - threshold).clamp(min=0)


def prox_c(proposal: Tensor, x: Tensor, c: Tensor, strength: float) -> Tensor:
    """argmin_c (c - proposal_j)^2 / 2 + strength / 2 sum |x_i - c|, among all places where it can be: members, and the
    stationary points of every number of members to the left."""
    out = []
    for j in range(len(c)):
        s = x[nearest(x, c) == j]
        left = torch.arange(len(s) + 1, dtype=x.dtype)
        tries = torch.cat([s, proposal[j] - strength / 2 * (2 * left - len(s))])
        cost = (tries - proposal[j]).square() / 2 + strength / 2 * (s - tries.unsqueeze(1)).abs().sum(1)
        out.append(tries[cost.argmin()])
    return torch.stack(out).sort().values


def algorithm_1(
    model: nn.Module,
    batches: Sequence[Any],
    centers: Mapping[str, Tensor],
    *,
    lr: float,
    sharpness: Sequence[float],
    lam: Sequence[float],
    center_lr: Sequence[float],
    alternate: bool = True,
    loss: Any = F.cross_entropy,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy of `model`, trained by SGD on eq. 4 one batch a step, without any code of the package; and the centres."""
    model, c = copy.deepcopy(model), {n: t.clone() for n, t in centers.items()}
    for t, (x, y) in enumerate(batches):
        live = dict(model.named_parameters())

        def f(weights: dict[str, Tensor], x: Tensor = x, y: Tensor = y) -> Tensor:
            return loss(torch.func.functional_call(model, weights, (x,)), y)

        for v in c.values():
            v.requires_grad_()
        total = f({}) + f({n: soft(live[n], c[n], sharpness[t]) for n in c})
        g = torch.autograd.grad(total, [*live.values(), *c.values()])
        h = list(g[len(live) :])
        with torch.no_grad():
            for (n, p), d in zip(live.items(), g, strict=False):
                p -= lr * d
                if n in c:
                    p.copy_(prox_x(p, c[n], lr * lam[t] / 2))
        if alternate:
            moved = {n: soft(live[n].detach(), c[n], sharpness[t]) for n in c}
            h = list(torch.autograd.grad(f(moved), list(c.values())))
        e2 = center_lr[t]
        c = {
            n: prox_c(v.detach() - e2 * d, live[n].detach(), v.detach(), e2 * lam[t])
            for (n, v), d in zip(c.items(), h, strict=True)
        }
    return model, c
