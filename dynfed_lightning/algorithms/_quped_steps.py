"""QuPeD's three steps on one batch (Ozkara et al., NeurIPS 2021, algorithm 2, lines 6 to 10)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from dynfed_lightning.algorithms._peer import Peer, Seen
from dynfed_lightning.callbacks import ExtraLoss
from dynfed_lightning.capture import Capture
from dynfed_lightning.centers import LearnedCenters
from dynfed_lightning.errors import ClientFailure
from dynfed_lightning.losses import taught_kl


class PersonalSteps(ExtraLoss):
    """Algorithm 2's steps of x and c inside every training step of w, and w's part of the distillation.

    Args:
        peer: the personal model.
        centers: attached to its model.
        lp: lambda_p in this round.
        round: which, of how many.
        global_loss: see `QuPeD`, as the next.
        alternate: see `QuPeD`.
        memory: of the personal model's optimiser, its ``state_dict`` or its ``state``.

    Attributes:
        lr_factor: multiplies the personal model's learning rates; an executor sets it, as it scales the module's.
    """

    def __init__(
        self,
        peer: Peer,
        centers: LearnedCenters,
        lp: float,
        *,
        round: tuple[int, int] = (0, 1),
        global_loss: bool = True,
        alternate: bool = True,
        memory: Mapping[str, Any] | None = None,
    ) -> None:
        self.peer, self.centers, self.lp, self.round = peer, centers, lp, round
        self.global_loss, self.alternate = global_loss, alternate
        self.lr_factor = 1.0
        self._memory = memory
        self._capture: Capture | None = None
        self._sums: dict[str, Tensor] = {}
        self._batches = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Bring the personal model to the module's device, make its optimiser, harden if it is time, listen to w."""
        self.peer.start(trainer, pl_module, self._memory)
        self._follow()
        self.centers.at(*self.round)
        if self.lp:
            self._capture = Capture(pl_module, "module")
        self._sums, self._batches = {}, 0
        super().on_train_start(trainer, pl_module)

    def _unwrap(self) -> None:
        super()._unwrap()
        if self._capture is not None:
            self._capture.remove()
            self._capture = None
        self.peer.stop()
        self._follow()

    def _follow(self) -> None:
        """The centres go where the personal model went."""
        self.centers.attach(self.peer.model, self.centers.state_dict())

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The personal model's schedulers."""
        self.peer.end_epoch()

    def before_step(self, pl_module: L.LightningModule, batch: Any) -> None:
        """Listen to w."""
        if self._capture is not None:
            self._capture.start()

    def extra(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor, batch: Any, batch_idx: int
    ) -> Tensor:
        """Step x and c; what w's step is to lower."""
        w = None if self._capture is None else self._capture.take().logits
        told = self._steps(pl_module, batch, batch_idx, None if w is None else w.detach())
        if told is None:  # the personal model skips this batch: nobody learns from it, and w from its labels alone
            return loss if self.global_loss else 0 * loss
        self._note("loss", loss)
        self._batches += 1
        total = loss if self.global_loss else 0 * loss
        for x in told:
            assert w is not None
            total = total + self.lp * taught_kl(x, w)
        return total

    def _steps(self, pl_module: L.LightningModule, batch: Any, batch_idx: int, w: Tensor | None) -> list[Tensor] | None:
        """The steps of x and c on one batch.

        Returns:
            the logits that w learns from; None if the personal model skips the batch.
        """
        q, peer = self.centers, self.peer
        soft = bool(q.names) and not q.frozen

        def run(weights: Mapping[str, Tensor] | None = None, main: bool = False) -> Seen | None:
            return peer.run(pl_module, batch, batch_idx, weights, main)

        # g = grad_x [F(x) + F(Q~_c(x))]. The running statistics of normalisation layers are those of the quantised model,
        # which is what the client uses.
        passes = [run(), run(q.soft(centers=not self.alternate), True)] if soft else [run(main=True)]
        seen = [s for s in passes if s is not None]
        if len(seen) < len(passes):
            return None
        self._note("personal_loss", seen[-1].loss)
        peer.backward(sum((self._objective(s, w) for s in seen[1:]), self._objective(seen[0], w)))
        h: list[Tensor] = []
        if q.frozen:
            h = peer.unscaled(q.frozen_gradients())
        elif soft and not self.alternate:
            h = peer.unscaled([torch.zeros_like(c) if c.grad is None else c.grad for c in q.centers])
        rates = peer.rates(q.parameters, self.lr_factor)  # of this step: schedulers that count steps follow it
        if peer.step(self.lr_factor):
            if q.frozen:
                q.after_frozen(h)
            elif soft:
                q.after_weights(rates)
                if self.alternate:  # h = grad_c F(Q~_c(x+))
                    again = run(q.soft(weights=False, centers=True))
                    h = [] if again is None else peer.gradients(self._objective(again, w), q.centers)
                try:
                    q.after_centers(h)
                except ValueError as error:  # a centre that is no number any more
                    raise ClientFailure("nan_model", str(error)) from error
        if w is None:
            return []
        if self.alternate:
            with torch.no_grad():
                seen = [s for s in ([run(), run(q.soft())] if soft else [run()]) if s is not None]
        return [s.logits.detach() for s in seen if s.logits is not None]

    def _objective(self, seen: Seen, w: Tensor | None) -> Tensor:
        """``F = (1 - lp) f + lp f_KD``."""
        if w is None:
            return seen.loss
        assert seen.logits is not None
        return (1 - self.lp) * seen.loss + self.lp * taught_kl(seen.logits, w)

    def _note(self, name: str, value: Tensor) -> None:
        value = value.detach().float()  # kept on the device: reading it every step would stall a GPU
        self._sums[name] = value if name not in self._sums else self._sums[name] + value

    def mean(self, name: str) -> float:
        """Mean over the batches of the last fit: ``loss`` (w's own) or ``personal_loss``; 0 if there was none."""
        return float(self._sums.get(name, 0.0)) / max(self._batches, 1)
