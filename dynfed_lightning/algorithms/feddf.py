"""FedDF: the server distils the ensemble of the clients' models into their average.

Reference:
    Lin, Kong, Stich, Jaggi. Ensemble Distillation for Robust Model Fusion in Federated Learning. NeurIPS 2020,
    arXiv 2006.07242, algorithm 1: the student starts at the average (line 6) and follows
    ``KL(softmax(mean_k z_k) || softmax(z))`` on unlabelled data (line 9), Adam 1e-3 with a cosine schedule, batch 128,
    stopped when a held-out part of the public set no longer gains.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dynfed_lightning.algorithm import CodecLike, Reply, Server
from dynfed_lightning.algorithms._distil import average_and_distil
from dynfed_lightning.algorithms.fedavg import FedAvg
from dynfed_lightning.distill import Distillation
from dynfed_lightning.teachers import TeacherContext


class FedDF(FedAvg):
    """FedAvg followed by ensemble distillation on a public set.

    Args:
        distillation: how the student learns; default the paper's recipe, ``Distillation.feddf()``.
        uplink: see `FedAvg`.
        downlink: see `FedAvg`.
    """

    requires_public = True
    reply_scalars = ("loss",)

    def __init__(
        self,
        distillation: Distillation | None = None,
        *,
        uplink: CodecLike = None,
        downlink: CodecLike = None,
    ) -> None:
        super().__init__(uplink=uplink, downlink=downlink)
        self.distillation = distillation if distillation is not None else Distillation.feddf()
        if not isinstance(self.distillation, Distillation):
            raise TypeError(
                f"Expected `distillation` to be a Distillation or None, but got {type(distillation).__name__}."
            )
        if "label_counts" in self.distillation.needs:
            raise ValueError(
                "Expected a teacher policy without label counts, since FedDF's clients upload none: use DynFed."
            )

    def server_step(self, server: Server, replies: Sequence[Reply]) -> None:
        """Average, then distil the ensemble into the average."""
        ctx = TeacherContext(
            num_examples=torch.tensor([r.num_examples for r in replies]),
            losses=torch.tensor([r.scalars["loss"] for r in replies]),
            generator=server.rng(1),
        )
        average_and_distil(server, replies, self.distillation, ctx)
