"""Training inside training: a Trainer that says nothing, and the process-wide state it must not leak.

A federation runs many short fits inside one outer ``Trainer``'s step. Each would print four lines, warn about its
data loaders, draw from the global random generators and leave the module on the CPU. What is here keeps a fit nested
in another one invisible from outside: `quiet_trainer`, `quiet_fit`, `isolated_rng` and `fixed_threads`.
"""

from __future__ import annotations

import logging
import random
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.fabric.utilities.warnings import PossibleUserWarning
from torch import nn

_LOGGERS = ("lightning", "lightning.pytorch", "lightning.fabric")
# Said of every small loader or loop; true, harmless, and repeated for every client of every round.
_HARMLESS = (
    r".*`?Trainer`? (was|already) configured.*",
    r".*has `?shuffle=True`?.*",
    r".*(GPU|CUDA|MPS|TPU).* available but not used.*",
    r".*The number of training batches .* is smaller than the logging interval.*",
    r".*does not have many workers.*",
    r".*You passed in a `val_dataloader` but have no `validation_step`.*",
    r".*You defined a `validation_step` but have no `val_dataloader`.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*Found .* module\(s\) in eval mode at the start of training.*",
    r"Total length of .* across ranks is zero.*",  # quiet_fit raises
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
)
_lock = threading.Lock()
_depth = 0
_levels: dict[str, int] = {}


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's information lines and its harmless warnings; errors and everybody else's output stay.

    May be nested and entered from several threads: the loggers' levels come back when the last one leaves.
    """
    global _depth
    with _lock:
        if _depth == 0:
            _levels.update({name: logging.getLogger(name).level for name in _LOGGERS})
            for name in _LOGGERS:
                logging.getLogger(name).setLevel(logging.ERROR)
        _depth += 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PossibleUserWarning)
            for message in _HARMLESS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                for name, level in _levels.items():
                    logging.getLogger(name).setLevel(level)


def device_of(module: nn.Module) -> torch.device:
    """The device of the first parameter or buffer of `module`; the CPU if it has none."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def quiet_trainer(module: nn.Module | None = None, **kwargs: Any) -> L.Trainer:
    """A new ``L.Trainer`` for one nested fit: one device, no logger, no checkpoints, no bars, no printed lines.

    Build a new one for every fit: a Trainer that has fitted once trains 0 steps the second time.

    Args:
        module: where to train: the device this module is on. ``None``: ``accelerator="auto"``.
        kwargs: anything ``L.Trainer`` takes; what is given here wins over the quiet defaults.

    Raises:
        TypeError: `kwargs` holds a name ``L.Trainer`` does not have.
    """
    defaults: dict[str, Any] = {
        "accelerator": "auto",
        "devices": 1,
        "num_nodes": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,  # whose data this is has been decided: another rank has another client
    }
    if module is not None:
        device = device_of(module)
        # An index keeps the nested fit on its own GPU when several ranks share a machine.
        defaults["accelerator"] = device.type
        defaults["devices"] = [device.index or 0] if device.type == "cuda" else 1
    with quiet_lightning(), _same_rank():
        return L.Trainer(**{**defaults, **kwargs})


def quiet_fit(trainer: L.Trainer, module: L.LightningModule, *args: Any, **kwargs: Any) -> int:
    """``trainer.fit(module, *args, **kwargs)`` without a word, from anywhere: also inside another Trainer's step.

    The module comes back on the device it was on (Lightning leaves it on the CPU), without gradients, and with the
    trainer it had before, it and every LightningModule inside it.

    Returns:
        How many batches were trained on.

    Raises:
        RuntimeError: nothing was trained: an empty loader, or a Trainer that has fitted before.
    """
    device = device_of(module)
    inner = [m for m in module.modules() if isinstance(m, L.LightningModule)]
    trainers = [m._trainer for m in inner]
    before = trainer.fit_loop.epoch_loop.total_batch_idx
    with quiet_lightning(), _same_rank(), torch.enable_grad():
        try:
            trainer.fit(module, *args, **kwargs)
        finally:
            for m, previous in zip(inner, trainers, strict=True):
                m._trainer = previous
            module.to(device)
            module.zero_grad(set_to_none=True)
    steps = trainer.fit_loop.epoch_loop.total_batch_idx - before
    if steps <= 0:
        raise RuntimeError(
            "Expected the nested fit to train at least one batch, but it trained 0: the loader is empty, "
            "or this Trainer has fitted before (build a new one for every fit)."
        )
    return steps


@contextmanager
def _same_rank() -> Iterator[None]:
    """Keep Lightning's idea of this process's rank: a Trainer built inside another one resets it."""
    holder: Any = rank_zero_only  # a function that Lightning hangs the rank on
    rank = holder.rank
    try:
        yield
    finally:
        holder.rank = rank


@contextmanager
def isolated_rng(seed: int | None = None) -> Iterator[None]:
    """Seed ``torch`` (CPU, and CUDA where it is in use), ``numpy`` and ``random``; on leaving, put all of them back.

    Args:
        seed: any integer from 0 to 2**64 - 1; ``None`` leaves the generators as they are and only restores them.

    Raises:
        ValueError: `seed` is out of range.
    """
    if seed is not None and not 0 <= seed < 2**64:
        raise ValueError(f"Expected `seed` to be an integer from 0 to 2**64 - 1, but got {seed}.")
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    cpu_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda_state = torch.cuda.get_rng_state_all() if cuda else []
    try:
        if seed is not None:
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would also queue a seed for a CUDA not in use
            if cuda:
                torch.cuda.manual_seed_all(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
        yield
    finally:
        torch.set_rng_state(cpu_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        if cuda:
            torch.cuda.set_rng_state_all(cuda_state)


@contextmanager
def fixed_threads(n: int | None) -> Iterator[None]:
    """Run torch's CPU operations on `n` threads, then restore the count: sums differ in the last bit with it.

    Args:
        n: at least 1; ``None`` changes nothing.

    Raises:
        ValueError: `n` is less than 1.
    """
    if n is not None and n < 1:
        raise ValueError(f"Expected `n` threads to be at least 1, but got {n}.")
    before = torch.get_num_threads()
    if n is not None:
        torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
