"""Gradient compression for data-parallel training: hooks for Lightning's ``DDPStrategy``, or for torch's DDP. No federation.

::

    L.Trainer(devices=2, strategy="ddp", callbacks=[GradientCompression(LowRankState(rank=4))]).fit(module)

The callback registers the hook of its state. ``DDPStrategy(ddp_comm_state=state, ddp_comm_hook=low_rank_hook)`` does so too, but
on GPUs only: on the CPU Lightning (2.6) passes over hooks in silence. Without Lightning: ``ddp.register_comm_hook(state, hook)``.

`low_rank_hook` is PowerSGD (Vogels et al., NeurIPS 2019); `quantized_hook` sends 1 to 8 bits a value, on this package's kernels.
Both feed back what they lose, work with gloo and NCCL, gradient accumulation, unused parameters, mixed precision and gradients of
any floating dtype, and give every rank the same gradients. A state may be made before there are processes. With one rank nothing
travels, and gradients stay as they are. What a parameter still had outstanding when nobody uses it any longer is never applied.

Under ``precision="16-mixed"`` what is remembered is in units of the loss scale: `GradientCompression` follows its changes. When
the scaler skips a step (an overflow in any parameter), what had been fed back into that step's gradients is lost where they were
finite, since the hooks cannot know that they will not be applied; where they were not, it is kept. A `start_step` past the steps
in which the scale settles avoids most of that; ``"bf16-mixed"`` has no scaler and no such loss.
"""

# No `from __future__ import annotations` here: DDP reads the hooks' annotations and accepts no strings.
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from dynfed_lightning._comm_base import CommState, Traffic
from dynfed_lightning._comm_low_rank import LowRankState
from dynfed_lightning._comm_quantized import QuantizedState

__all__ = ["GradientCompression", "LowRankState", "QuantizedState", "Traffic", "low_rank_hook", "quantized_hook"]

_KEY = "dynfed_gradient_compression"


def low_rank_hook(state: LowRankState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Reduce a bucket of gradients as matrices of low rank (PowerSGD), for ``ddp_comm_hook`` or ``register_comm_hook``.

    Args:
        state: made by the user, one per model.
        bucket: from DDP; its gradients are overwritten.

    Returns:
        A future of the bucket's buffer, the same on every rank.

    Raises:
        TypeError: another state, or gradients that are sparse (``nn.Embedding(sparse=True)``) or not floating point.
    """
    return _checked(state, LowRankState).run(bucket)


def quantized_hook(state: QuantizedState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Reduce a bucket of gradients in 1 to 8 bits a value, for ``ddp_comm_hook`` or ``register_comm_hook``.

    Args:
        state: made by the user, one per model.
        bucket: from DDP; its gradients are overwritten.

    Returns:
        A future of the bucket's buffer, the same on every rank.

    Raises:
        TypeError: another state, or gradients that are sparse (``nn.Embedding(sparse=True)``) or not floating point.
    """
    return _checked(state, QuantizedState).run(bucket)


def _checked(state: Any, kind: type[CommState]) -> Any:
    if not isinstance(state, kind):
        raise TypeError(f"Expected `ddp_comm_state` to be a {kind.__name__}, but got {type(state).__name__}.")
    return state


class GradientCompression(L.Callback):
    """Registers the hook of a state (unless the strategy has), logs what it saves, carries it through checkpoints, and follows
    the loss scale under ``precision="16-mixed"``.

    Logged at the end of every epoch, per rank, since the beginning: ``comm_megabytes`` (10**6 bytes sent, `Traffic.wire`),
    ``comm_dense_megabytes`` (without the hook) and ``comm_ratio``.

    Args:
        state: what the hook needs; the same object as in ``DDPStrategy(ddp_comm_state=...)`` if that has one.

    Raises:
        TypeError: something else than a `LowRankState` or a `QuantizedState`; when training starts on several devices, a strategy
            that is not DDP.
        ValueError: when training starts, a strategy with another hook.
    """

    def __init__(self, state: CommState) -> None:
        if not isinstance(state, CommState):
            raise TypeError(f"Expected `state` to be a LowRankState or QuantizedState, but got {type(state).__name__}.")
        self.comm_state = state
        self._loss_scale: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        model = trainer.strategy.model
        if not isinstance(model, torch.nn.parallel.DistributedDataParallel):
            if trainer.world_size > 1:
                raise TypeError(f"Expected a DDP strategy, but got {type(trainer.strategy).__name__}.")
            return
        registered = [state for _, state in model._comm_hooks]
        if not registered:
            hook = low_rank_hook if isinstance(self.comm_state, LowRankState) else quantized_hook
            model.register_comm_hook(self.comm_state, hook)
        elif self.comm_state not in registered:
            raise ValueError(
                "Expected the strategy to have no other `ddp_comm_state` than this callback's, but it has."
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is None or not self.comm_state.error_feedback:
            return
        now = float(scaler.get_scale())
        if self._loss_scale is not None and now != self._loss_scale:
            self.comm_state.rescale(now / self._loss_scale)
        self._loss_scale = now

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        traffic = self.comm_state.traffic
        pl_module.log("comm_megabytes", traffic.wire / 1e6, sync_dist=True)
        pl_module.log("comm_dense_megabytes", traffic.dense_wire / 1e6, sync_dist=True)
        pl_module.log("comm_ratio", traffic.ratio, sync_dist=True)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # Lightning calls this on every rank, as `state_dict` needs it.
        checkpoint[_KEY] = {"state": self.comm_state.state_dict(pl_module), "loss_scale": self._loss_scale}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if _KEY in checkpoint:
            self.comm_state.load_state_dict(checkpoint[_KEY]["state"], pl_module)
            self._loss_scale = checkpoint[_KEY]["loss_scale"]
