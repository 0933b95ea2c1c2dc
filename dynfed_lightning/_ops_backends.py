"""Which implementation of the low-bit operations runs: choosing a backend, and loading the C++ kernels.

A backend is a module with the functions ``pack``, ``unpack``, ``quantize_pack``, ``unpack_dequantize`` and ``accumulate``
of `dynfed_lightning._reference`, on flat contiguous tensors. To add one, write such a module and name it in `choose`.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from . import _reference

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
INSTRUCTION_SETS = {"auto": 0, "scalar": 1, "avx2": 2, "avx512": 3}


def requested() -> str:
    """The value of ``DYNFED_BACKEND``: ``auto`` unless set.

    Raises:
        ValueError: it names no backend.
    """
    name = os.environ.get("DYNFED_BACKEND") or "auto"
    if name not in BACKENDS:
        raise ValueError(f"Expected `DYNFED_BACKEND` to be one of {', '.join(BACKENDS)}, but got {name!r}.")
    return name


def choose(device: torch.device) -> ModuleType:
    """The backend for tensors on `device`. An explicit choice fails loudly; ``auto`` falls back, and says so once.

    Raises:
        ValueError: ``DYNFED_BACKEND`` names no backend, or one that cannot work on `device`.
        RuntimeError: ``DYNFED_BACKEND`` names a backend that this build or machine does not have.
    """
    name = requested()
    if name == "reference":
        return _reference
    if name in ("triton", "cuda"):
        raise RuntimeError(
            f"Expected `DYNFED_BACKEND` to be a backend of this build (auto, reference, cpu), but got {name!r}: "
            f"its kernels are not available."
        )
    if name == "cpu":
        if device.type != "cpu":
            raise ValueError(f"Expected tensors on the CPU with DYNFED_BACKEND=cpu, but got {device}.")
        reason = load_error()
        if reason:
            raise RuntimeError(f"Expected the C++ kernels to be built with DYNFED_BACKEND=cpu, but {reason}.")
        return _cpu()
    if device.type == "cpu" and not load_error():
        return _cpu()
    if device.type != "meta":
        _say_once(device.type)
    return _reference


@cache
def _say_once(device_type: str) -> None:
    if device_type == "cpu":
        why = f"The C++ kernels of dynfed_lightning are missing ({load_error()})"
    else:
        why = f"This build of dynfed_lightning has no kernels for {device_type!r} tensors"
    text = f"{why}; the PyTorch reference is used: same results, many times slower."
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def _cpu() -> ModuleType:
    from . import _ops_cpu

    return _ops_cpu


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


def instruction_set() -> int:
    """The instruction set of ``DYNFED_CPU_ISA`` as the number the C++ kernels take; 0 is the best this CPU has.

    Raises:
        ValueError: ``DYNFED_CPU_ISA`` names no instruction set.
        RuntimeError: it names one that this CPU, or this build, does not have.
    """
    name = os.environ.get("DYNFED_CPU_ISA") or "auto"
    if name not in INSTRUCTION_SETS:
        raise ValueError(f"Expected `DYNFED_CPU_ISA` to be one of {', '.join(INSTRUCTION_SETS)}, but got {name!r}.")
    wanted, best = INSTRUCTION_SETS[name], torch.ops.dynfed_lightning_cpu.best_isa()
    if wanted > best:
        has = [n for n, level in INSTRUCTION_SETS.items() if 0 < level <= best]
        raise RuntimeError(
            f"Expected `DYNFED_CPU_ISA` to be one this machine has ({', '.join(has)}), but got {name!r}."
        )
    return wanted


def describe(device: torch.device | str = "cpu") -> str:
    """What would run for tensors on `device`, for a report: ``"cpu (avx512)"`` or ``"reference"``."""
    backend = choose(torch.device(device))
    if backend is _reference:
        return "reference"
    level = instruction_set() or torch.ops.dynfed_lightning_cpu.best_isa()
    return f"cpu ({next(n for n, v in INSTRUCTION_SETS.items() if v == level)})"
