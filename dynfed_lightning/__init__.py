"""Communication-efficient federated learning for PyTorch Lightning, on low-bit kernels."""

import importlib
from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

# In a source checkout the Triton kernels live in ../kernels, which an installed package has as `dynfed_lightning.kernels`.
_checkout = _Path(__file__).resolve().parent.parent
if (_checkout / "kernels" / "__init__.py").is_file() and (_checkout / "csrc").is_dir():
    __path__.append(str(_checkout))

__version__ = "0.1.0"

# Where each public name lives. Imported when first used: `import dynfed_lightning` costs nothing, and the operations can be
# used without Lightning.
_HOMES = {
    "algorithm": ["Algorithm", "Client", "Received", "Reply", "Server", "Update"],
    "algorithms": [
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
    ],
    "callbacks": ["GradientNorm", "GradientShift", "ProximalTerm", "ScaleLearningRate"],
    "codec": ["Codec", "CodecContext", "inspect"],
    "comm_hooks": ["GradientCompression", "LowRankState", "QuantizedState", "low_rank_hook", "quantized_hook"],
    "data": ["FederatedDataModule"],
    "distill": ["Distillation", "ServerDistiller"],
    "encoder": ["EncoderOutput", "TextEncoder", "student_of"],
    "disk_store": ["DiskStore"],
    "errors": ["ClientFailure", "PayloadError", "RoundFailure"],
    "federation": ["Federation"],
    "hf": ["load_encoder"],
    "local": ["LoopLocal", "TrainerLocal"],
    "module": ["ClientModule"],
    "mutual": ["MutualDistillation"],
    "partition": ["Dirichlet", "IID", "Natural", "Pathological", "Shards"],
    "quantization_aware": ["QuantizationAware"],
    "quantized_file": ["describe_quantized", "load_quantized", "quantized_state_dict", "save_quantized"],
    "recorder": ["RoundProgress", "RunRecorder"],
    "resources": ["DrawnResources", "GivenResources", "Resources", "TableResources", "UniformResources"],
    "schedules": ["Constant", "Cosine", "Exponential", "Geometric", "Linear"],
    "schema": ["Schema"],
    "split": ["OwnTest"],
    "stages": ["Cast", "ErrorFeedback", "LowRank", "Quantize", "Rotate", "SkipZeros", "TopK"],
    "state_file": ["StateError"],
    "store": ["AutoStore", "MemoryStore", "Store"],
    "text": ["WordTokenizer", "encode_batch", "load_tokenizer"],
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = [*sorted(_HOME_OF), "__version__"]

if TYPE_CHECKING:
    from dynfed_lightning.algorithm import Algorithm, Client, Received, Reply, Server, Update
    from dynfed_lightning.algorithms import (
        FML,
        Centralised,
        DAdaQuant,
        DynFed,
        FedAvg,
        FedDF,
        FedKD,
        FedPAQ,
        FedProto,
        FedProx,
        Local,
        PerFedAvg,
        PFedMe,
        QuPeD,
        Scaffold,
    )
    from dynfed_lightning.callbacks import GradientNorm, GradientShift, ProximalTerm, ScaleLearningRate
    from dynfed_lightning.codec import Codec, CodecContext, inspect
    from dynfed_lightning.comm_hooks import (
        GradientCompression,
        LowRankState,
        QuantizedState,
        low_rank_hook,
        quantized_hook,
    )
    from dynfed_lightning.data import FederatedDataModule
    from dynfed_lightning.disk_store import DiskStore
    from dynfed_lightning.distill import Distillation, ServerDistiller
    from dynfed_lightning.encoder import EncoderOutput, TextEncoder, student_of
    from dynfed_lightning.errors import ClientFailure, PayloadError, RoundFailure
    from dynfed_lightning.federation import Federation
    from dynfed_lightning.hf import load_encoder
    from dynfed_lightning.local import LoopLocal, TrainerLocal
    from dynfed_lightning.module import ClientModule
    from dynfed_lightning.mutual import MutualDistillation
    from dynfed_lightning.partition import IID, Dirichlet, Natural, Pathological, Shards
    from dynfed_lightning.quantization_aware import QuantizationAware
    from dynfed_lightning.quantized_file import (
        describe_quantized,
        load_quantized,
        quantized_state_dict,
        save_quantized,
    )
    from dynfed_lightning.recorder import RoundProgress, RunRecorder
    from dynfed_lightning.resources import DrawnResources, GivenResources, Resources, TableResources, UniformResources
    from dynfed_lightning.schedules import Constant, Cosine, Exponential, Geometric, Linear
    from dynfed_lightning.schema import Schema
    from dynfed_lightning.split import OwnTest
    from dynfed_lightning.stages import Cast, ErrorFeedback, LowRank, Quantize, Rotate, SkipZeros, TopK
    from dynfed_lightning.state_file import StateError
    from dynfed_lightning.store import AutoStore, MemoryStore, Store
    from dynfed_lightning.text import WordTokenizer, encode_batch, load_tokenizer


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
