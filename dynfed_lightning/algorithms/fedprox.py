"""FedProx: FedAvg with a proximal term in every client's loss.

Reference:
    Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith. Federated Optimization in Heterogeneous Networks. MLSys 2020,
    arXiv 1812.06127, eq. 2: ``min_w F_k(w) + mu/2 ||w - w_t||^2``.
"""

from __future__ import annotations

import lightning as L

from dynfed_lightning.algorithm import Client, CodecLike, Received
from dynfed_lightning.algorithms.fedavg import FedAvg
from dynfed_lightning.callbacks import ProximalTerm


class FedProx(FedAvg):
    """FedAvg whose clients stay near the weights they were sent.

    Args:
        mu: strength of the proximal term, >= 0; 0 is FedAvg exactly.
        uplink: see `FedAvg`.
        downlink: see `FedAvg`.
    """

    def __init__(self, mu: float = 0.01, *, uplink: CodecLike = None, downlink: CodecLike = None) -> None:
        super().__init__(uplink=uplink, downlink=downlink)
        ProximalTerm(mu)  # says now what is wrong with `mu`
        self.mu = mu

    def client_callbacks(self, client: Client, received: Received) -> list[L.Callback]:
        """The gradient of ``mu/2 ||w - w_t||^2``, added at every step."""
        return [ProximalTerm(self.mu, anchor=received.tensors)]
