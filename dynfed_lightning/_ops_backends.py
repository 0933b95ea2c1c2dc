"""Which implementation of the low-bit operations runs: choosing a backend, and loading the compiled kernels.

A backend is a module with the functions of `OPERATIONS`, as `dynfed_lightning._reference` has them: on contiguous tensors of
one device, flat but for those in lists, filling what they are given. To add one, write such a module, name it in `BACKENDS` and
`OWNERS`, and let its ``available()`` say why it cannot run.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

from . import _reference

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
OPERATIONS = (
    "pack",
    "unpack",
    "quantize_pack",
    "unpack_dequantize",
    "accumulate",
    "quantize_pack_table",
    "unpack_dequantize_table",
    "accumulate_table",
    "rotate",
    "symmetric_eigh",
    "squared_norm",
    "soft_quantize",
    "soft_quantize_backward",
    "nearest_center",
    "prox_weights",
    "prox_centers",
    "center_sums",
)
# What a backend may lack, and then torch's own operations do: those on small matrices and on learned centres.
OPTIONAL = OPERATIONS[OPERATIONS.index("symmetric_eigh") :]
# Per device and operation the backends that `auto` takes, the first that can run here. CUDA C++ owns all of them on a GPU until
# a measurement there says otherwise.
OWNERS: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": dict.fromkeys(OPERATIONS, ("cpu",)),
    "cuda": dict.fromkeys(OPERATIONS, ("cuda", "triton")),
}
INSTRUCTION_SETS = {"auto": 0, "scalar": 1, "avx2": 2, "avx512": 3, "avx512vbmi": 4}


def requested() -> str:
    """The value of ``DYNFED_BACKEND``: ``auto`` unless set.

    Raises:
        ValueError: it names no backend.
    """
    name = os.environ.get("DYNFED_BACKEND") or "auto"
    if name not in BACKENDS:
        raise ValueError(f"Expected `DYNFED_BACKEND` to be one of {', '.join(BACKENDS)}, but got {name!r}.")
    return name


def choose(operation: str, device: torch.device) -> ModuleType:
    """The backend of an operation for tensors on `device`. An explicit choice fails loudly; ``auto`` falls back and says so.

    Raises:
        ValueError: ``DYNFED_BACKEND`` names no backend, or one that cannot work on `device`.
        RuntimeError: ``DYNFED_BACKEND`` names a backend that this build or machine does not have.
    """
    name = requested()
    if name == "reference" or device.type == "meta":
        return _reference
    if name != "auto":
        if device.type not in _devices(name):
            raise ValueError(
                f"Expected tensors on {' or '.join(_devices(name))} with DYNFED_BACKEND={name}, but got {device}."
            )
        reason = missing(name)
        if reason:
            raise RuntimeError(
                f"Expected `DYNFED_BACKEND` to be a backend that can run here, but got {name!r}: {reason}."
            )
        return _load(name) if operation not in OPTIONAL or hasattr(_load(name), operation) else _reference
    able = [owner for owner in OWNERS.get(device.type, {}).get(operation, ()) if missing(owner) is None]
    for owner in able:
        if hasattr(_load(owner), operation):
            return _load(owner)
    if able and operation in OPTIONAL:
        return _reference
    _say_once(device.type)
    return _reference


def _devices(name: str) -> tuple[str, ...]:
    """The device types that a backend takes tensors of; Triton's interpreter takes those on the CPU."""
    if name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return ("cuda", "cpu")
    return ("cpu",) if name == "cpu" else ("cuda",)


def missing(name: str) -> str | None:
    """Why a backend cannot run on this machine; None if it can."""
    return load_error() if name == "cpu" else _unavailable(name)


@cache
def _unavailable(name: str) -> str | None:
    return _load(name).available()


@cache
def _load(name: str) -> ModuleType:
    return import_module(f"{__package__}._ops_{name}")


@cache
def _say_once(device_type: str) -> None:
    if device_type in OWNERS:
        names = dict.fromkeys(name for owners in OWNERS[device_type].values() for name in owners)
        reasons = "; ".join(f"{name}: {missing(name)}" for name in names)
        why = f"The kernels of dynfed_lightning for {device_type!r} tensors are missing ({reasons})"
    else:
        why = f"dynfed_lightning has no kernels for {device_type!r} tensors"
    text = f"{why}; the PyTorch reference is used: same results, many times slower."
    warnings.warn(text, RuntimeWarning, stacklevel=2)


@cache
def load_error() -> str | None:
    """Load the C++ kernels; None if they are there, else a sentence that says why not."""
    library = Path(__file__).with_name("_C.abi3.so")
    if not library.exists():
        return f"{library.name} is not built; reinstall with a C++ compiler, DYNFED_BUILD=1 shows why a build fails"
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:
        return f"{library.name} does not load with torch {torch.__version__}: {str(error).splitlines()[0]}"
    return None


@cache
def best_instruction_set() -> int:
    """The number of the best instruction set that this CPU and this build have."""
    return torch.ops.dynfed_lightning_cpu.best_isa()


def instruction_set() -> int:
    """The instruction set of ``DYNFED_CPU_ISA`` as the number the C++ kernels take; 0 is the best this CPU has.

    Raises:
        ValueError: ``DYNFED_CPU_ISA`` names no instruction set.
        RuntimeError: it names one that this CPU, or this build, does not have.
    """
    name = os.environ.get("DYNFED_CPU_ISA") or "auto"
    if name not in INSTRUCTION_SETS:
        raise ValueError(f"Expected `DYNFED_CPU_ISA` to be one of {', '.join(INSTRUCTION_SETS)}, but got {name!r}.")
    wanted, best = INSTRUCTION_SETS[name], best_instruction_set()
    if wanted > best:
        has = [n for n, level in INSTRUCTION_SETS.items() if 0 < level <= best]
        raise RuntimeError(
            f"Expected `DYNFED_CPU_ISA` to be one this machine has ({', '.join(has)}), but got {name!r}."
        )
    return wanted


def describe(device: torch.device | str = "cpu", operation: str = "quantize_pack") -> str:
    """What would run for tensors on `device`, for a report: ``"cpu (avx512)"``, ``"cuda"`` or ``"reference"``."""
    name = choose(operation, torch.device(device)).__name__.rpartition("._")[2].removeprefix("ops_")
    if name != "cpu":
        return name
    level = instruction_set() or best_instruction_set()
    return f"cpu ({next(n for n, v in INSTRUCTION_SETS.items() if v == level)})"
