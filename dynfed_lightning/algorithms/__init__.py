"""The methods: one paper, one file, in the paper's terms."""

from dynfed_lightning.algorithms.dadaquant import DAdaQuant
from dynfed_lightning.algorithms.dynfed import DynFed
from dynfed_lightning.algorithms.ends import Centralised, Local
from dynfed_lightning.algorithms.fedavg import FedAvg
from dynfed_lightning.algorithms.feddf import FedDF
from dynfed_lightning.algorithms.fedkd import FedKD
from dynfed_lightning.algorithms.fedpaq import FedPAQ
from dynfed_lightning.algorithms.fedproto import FedProto
from dynfed_lightning.algorithms.fedprox import FedProx
from dynfed_lightning.algorithms.fml import FML
from dynfed_lightning.algorithms.perfedavg import PerFedAvg
from dynfed_lightning.algorithms.pfedme import PFedMe
from dynfed_lightning.algorithms.quped import QuPeD
from dynfed_lightning.algorithms.scaffold import Scaffold

__all__ = [
    "FML",
    "Centralised",
    "DAdaQuant",
    "DynFed",
    "FedAvg",
    "FedDF",
    "FedKD",
    "FedPAQ",
    "FedProto",
    "FedProx",
    "Local",
    "PFedMe",
    "PerFedAvg",
    "QuPeD",
    "Scaffold",
]
