"""What a federation asks of the Trainer around it."""

from __future__ import annotations

from typing import Any

import lightning as L

from dynfed_lightning.data import FederatedDataModule


def federated_data(trainer: L.Trainer, pooled: bool, min_clients: int) -> FederatedDataModule:
    """The Trainer's data module, after refusing what a federation's outer Trainer cannot be.

    Args:
        trainer: the outer Trainer.
        pooled: see `Algorithm.pooled`; a view of the data then, the user's data module stays as it is.
        min_clients: how many clients there must be.

    Raises:
        TypeError: no `FederatedDataModule`.
        ValueError: several processes, another precision than 32, or too few clients.
    """
    data: Any = getattr(trainer, "datamodule", None)
    if not isinstance(data, FederatedDataModule):
        raise TypeError(
            f"Expected `datamodule` to be a FederatedDataModule, but got {type(data).__name__}: "
            "`trainer.fit(federation, datamodule=FederatedDataModule(...))`."
        )
    if trainer.world_size > 1:
        raise ValueError(f"Expected one process in the outer Trainer, but got {trainer.world_size}: pass `devices=1`.")
    if trainer.precision != "32-true":
        raise ValueError(
            f"Expected `precision` of the outer Trainer to be 32, but got {trainer.precision!r}: it is the clients', "
            "`local=TrainerLocal(trainer_kwargs={'precision': ...})`."
        )
    if pooled:
        data = data.pooled()
    if min_clients > data.num_clients:
        raise ValueError(
            f"Expected `min_clients` to be at most the {data.num_clients} clients there are, but got {min_clients}."
        )
    return data
