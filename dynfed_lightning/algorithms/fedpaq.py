"""FedPAQ: FedAvg with updates quantised to a fixed number of bits.

Reference:
    Reisizadeh, Mokhtari, Hassani, Jadbabaie, Pedarsani. FedPAQ: A Communication-Efficient Federated Learning Method with
    Periodic Averaging and Quantization. AISTATS 2020, arXiv 1909.13014, algorithm 1 with the quantiser of example 1 (QSGD).

The scale is the largest magnitude of a bucket instead of the whole vector's L2 norm; the quantiser stays unbiased.
"""

from __future__ import annotations

from dynfed_lightning.algorithm import CodecLike
from dynfed_lightning.algorithms.fedavg import FedAvg
from dynfed_lightning.codec import Codec
from dynfed_lightning.stages import Quantize


class FedPAQ(FedAvg):
    """A preset: ``FedAvg(uplink=Codec(Quantize(bits)))``.

    Args:
        bits: bits a value, 1 to 8.
        bucket: values that share a scale.
        downlink: see `FedAvg`.
    """

    def __init__(self, bits: int = 4, *, bucket: int = 512, downlink: CodecLike = None) -> None:
        super().__init__(uplink=Codec(Quantize(bits, bucket=bucket)), downlink=downlink)
        self.bits = bits

    @property
    def name(self) -> str:
        return f"FedPAQ-{self.bits}"
