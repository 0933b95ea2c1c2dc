"""FedAvg: clients train, the server averages.

Reference:
    McMahan, Moore, Ramage, Hampson, Aguera y Arcas. Communication-Efficient Learning of Deep Networks from Decentralized
    Data. AISTATS 2017, arXiv 1602.05629, algorithm 1.

==========  ==============================================
paper       here
==========  ==============================================
w_t         ``received.tensors``
w_t+1^k     the module after ``client.fit``
n_k / n     ``reply.num_examples`` over their sum
==========  ==============================================

What travels is the update ``w_k - w_t`` (difference coding, as in FedPAQ), so that a codec may quantise it.
"""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L

from dynfed_lightning.algorithm import Algorithm, Client, Received, Reply, Server, Update, total_examples
from dynfed_lightning.tensors import difference, load_weights, weighted_mean, weights_of


class FedAvg(Algorithm):
    """Sample-weighted averaging of local updates.

    Args:
        uplink: codec of what clients send, or bits; default float32.
        downlink: of what the server sends, likewise; a lossy one sends differences.
    """

    def client_step(self, client: Client, module: L.LightningModule, received: Received) -> Update:
        """Train from the received weights; upload the difference and the mean loss."""
        names = load_weights(module, received.tensors)
        result = client.fit(module, callbacks=self.client_callbacks(client, received))
        return Update(difference(weights_of(module, names), received.tensors), scalars=result.scalars())

    def server_step(self, server: Server, replies: Sequence[Reply]) -> None:
        """``w_t+1 = w_t + sum_k (n_k / n) (w_k - w_t)``, through the server's optimiser."""
        server.apply(weighted_mean([r.tensors for r in replies], total_examples(replies)))
