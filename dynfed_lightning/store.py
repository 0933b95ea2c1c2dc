"""What clients remember between rounds: nested dicts and lists of tensors, numbers and strings; in memory, or on disk."""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning.fabric.plugins import CheckpointIO
from torch import Tensor

from dynfed_lightning.disk_store import DiskStore, Reference, signature
from dynfed_lightning.state_file import State, StateError, check_state

__all__ = ["AutoStore", "DiskStore", "MemoryStore", "State", "StateError", "Store", "TrackedCheckpoints", "make_store"]

FOLDER = "client_state"  # in the Trainer's default_root_dir


@runtime_checkable
class Store(Protocol):
    """What a federation asks of a store of client state.

    A client works on a copy (`read`) that replaces the stored state only when its round is over (`write`), so a round that
    fails half-way leaves nothing behind. A store that puts state where a checkpoint refers to it may have
    ``checkpoint_saved(file, state_dict)`` and ``checkpoint_removed(file)``, which are called for Lightning's checkpoints.
    One whose ``write`` can fail may have ``write_all(states: Mapping[int, State])``, which replaces all of a round's clients'
    states or, when it raises, none; without it a checkpoint saved on such an exception is refused.
    """

    def read(self, client_id: int) -> State:
        """A working copy of a client's state, empty if it has none."""

    def write(self, client_id: int, state: State) -> None:
        """Replace a client's state; an empty one removes it."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[int]: ...

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint that ``torch.load(weights_only=True)`` can read."""

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Replace everything by what `state_dict` gave, this store's or another kind's; ``{}``: by nothing."""


def copy_tree(value: Any) -> Any:
    """Copy the containers of a state, not its leaves: replacing a leaf in the copy leaves the original whole."""
    if isinstance(value, dict):
        return {k: copy_tree(v) for k, v in value.items()}
    if isinstance(value, list):
        return [copy_tree(v) for v in value]
    return value


class MemoryStore:
    """Client state in memory; only clients that have any take room. A checkpoint holds it all."""

    def __init__(self) -> None:
        self._states: dict[int, State] = {}

    def read(self, client_id: int) -> State:
        """A working copy of a client's state, empty if it has none."""
        return copy_tree(self._states.get(client_id, {}))

    def write(self, client_id: int, state: State) -> None:
        """Replace a client's state."""
        if state:
            self._states[client_id] = state
        else:
            self._states.pop(client_id, None)

    def write_all(self, states: Mapping[int, State]) -> None:
        """Replace several clients' states."""
        for k, state in states.items():
            self.write(k, state)

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._states))

    def state_dict(self) -> dict[str, Any]:
        """Everything, for a checkpoint that ``torch.load(weights_only=True)`` can read."""
        return {str(k): copy_tree(self._states[k]) for k in self}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Replace everything by what `state_dict` gave, or by what a `DiskStore`'s refers to.

        Raises:
            StateError: a file it refers to is missing or damaged; nothing has been replaced then.
        """
        if "disk" in states:
            self._states = dict(Reference(states["disk"]).states())
        else:
            self._states = {int(k): copy_tree(v) for k, v in states.items()}


class AutoStore:
    """Client state in memory as long as it is small; all of it on disk once it is larger than `limit`.

    Memory that several clients' states share (the weights that all of a round's clients were sent) counts once.

    Args:
        folder: of the `DiskStore`, which is temporary: its files go with the run unless a checkpoint refers to them.
        limit: bytes of tensors.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._forget()

    def _forget(self) -> None:
        self._store: MemoryStore | DiskStore = MemoryStore()
        self._storages: dict[int, dict[int, int]] = {}  # client -> address of memory -> its bytes
        self._users: Counter[int] = Counter()  # address of memory -> clients that hold it
        self.num_bytes = 0  # in memory

    @property
    def on_disk(self) -> bool:
        """Whether the state has moved to disk."""
        return isinstance(self._store, DiskStore)

    @property
    def path(self) -> Path | None:
        """The folder of the client's files; None in memory."""
        return self._store.path if isinstance(self._store, DiskStore) else None

    def read(self, client_id: int) -> State:
        """A working copy of a client's state, empty if it has none."""
        return self._store.read(client_id)

    def write(self, client_id: int, state: State) -> None:
        """Replace a client's state; the one that makes the limit pass takes all others to the disk with it."""
        self.write_all({client_id: state})

    def write_all(self, states: Mapping[int, State]) -> None:
        """Replace several clients' states, or none if that fails; see `write`.

        Raises:
            TypeError: one holds something that could not lie on disk, wherever it lies now.
            OSError: a file cannot be written.
        """
        if isinstance(self._store, MemoryStore):
            for state in states.values():
                check_state(state)
            for k, state in states.items():
                self._count(k, state)
            if self.num_bytes > self.limit:
                try:
                    self._move()
                except BaseException:
                    for k in states:
                        self._count(k, self._store.read(k))
                    raise
        self._store.write_all(states)

    def _count(self, client_id: int, state: State) -> None:
        for address, size in self._storages.pop(client_id, {}).items():
            self._users[address] -= 1
            if not self._users[address]:
                del self._users[address]
                self.num_bytes -= size
        found = dict(_storages(state))
        if found:
            self._storages[client_id] = found
        for address, size in found.items():
            self.num_bytes += 0 if self._users[address] else size
            self._users[address] += 1

    def _move(self) -> None:
        memory, disk = self._store, DiskStore(self.folder, temporary=True)
        for k in memory:
            disk.write(k, memory.read(k))
        self._forget()
        self._store = disk

    def __len__(self) -> int:
        return len(self._store)

    def __iter__(self) -> Iterator[int]:
        return iter(self._store)

    def state_dict(self) -> dict[str, Any]:
        """See `MemoryStore.state_dict` and `DiskStore.state_dict`."""
        return self._store.state_dict()

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Replace everything by what a store's `state_dict` gave; on disk if it is larger than the limit.

        Raises:
            StateError: a file it refers to is missing, damaged, or of another run; nothing has been replaced then.
        """
        if "disk" in states:
            found = Reference(states["disk"], Path(self.folder).absolute())
            found.check()
            if sum(file.stat().st_size for file, _ in found.files.values()) > self.limit:
                store = self._store if isinstance(self._store, DiskStore) else DiskStore(self.folder, temporary=True)
                store.load_state_dict(states)
                self._forget()
                self._store = store
                return
            states = {str(k): state for k, state in found.states()}
        made = AutoStore(self.folder, self.limit)
        for k, state in states.items():
            made.write(int(k), copy_tree(state))
        self.__dict__ = made.__dict__

    def checkpoint_saved(self, file: str, reference: Mapping[str, Any]) -> None:
        """See `DiskStore.checkpoint_saved`."""
        if isinstance(self._store, DiskStore):
            self._store.checkpoint_saved(file, reference)

    def checkpoint_removed(self, file: str) -> None:
        """See `DiskStore.checkpoint_removed`."""
        if isinstance(self._store, DiskStore):
            self._store.checkpoint_removed(file)


def _storages(value: Any) -> Iterator[tuple[int, int]]:
    """Address and bytes of the memory of every tensor in a state."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        if storage.nbytes():
            yield storage.data_ptr(), storage.nbytes()
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _storages(item)


class TrackedCheckpoints(CheckpointIO):
    """Lightning's way of saving and deleting checkpoints, which also tells a store what has become of them.

    One that wraps another (``AsyncCheckpointIO``) may return before it has written anything, and fail later. Then the store is
    told of a checkpoint only when its file has been seen to change since, at the next saving to the same name, or when the
    wrapping one was torn down without an error; until then what the file held before stays whole.

    Args:
        inner: what saves and deletes.
        store: whom to tell.
    """

    def __init__(self, inner: CheckpointIO, store: Any) -> None:
        self.inner, self.store = inner, store
        self._late = hasattr(inner, "checkpoint_io")
        self._pending: dict[str, deque[Mapping[str, Any]]] = {}  # file -> what is to be written to it, in this order
        self._marks: dict[str, Any] = {}  # file -> how it looked before the first of these

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save, then tell."""
        file = _absolute(path)
        self._look(file)
        before = signature(file)
        self.inner.save_checkpoint(checkpoint, path, storage_options)
        states = (checkpoint.get("federation") or {}).get("clients") or {}
        if not self._late:
            self._tell(file, states)
            return
        if not self._pending.get(file):
            self._marks[file] = before
        self._pending.setdefault(file, deque()).append(states)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """As the inner one."""
        return self.inner.load_checkpoint(*args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete, then tell."""
        file = _absolute(path)
        self._look(file)
        self.inner.remove_checkpoint(path)
        if not self._pending.get(file):  # else it may yet be written
            self.store.checkpoint_removed(file)

    def teardown(self) -> None:
        """As the inner one, which has written everything then, or raises."""
        try:
            self.inner.teardown()
        except BaseException:
            for file in list(self._pending):
                self._look(file)
            raise
        for file, waiting in self._pending.items():
            while waiting:
                self._tell(file, waiting.popleft())
            if "://" not in file and not os.path.exists(file):
                self.store.checkpoint_removed(file)
        self._pending.clear()

    def _look(self, file: str) -> None:
        """Tell of the first that waits if the file has changed: they are written one after the other."""
        waiting, now = self._pending.get(file), signature(file)
        if waiting and now is not None and now != self._marks[file]:
            self._marks[file] = now
            self._tell(file, waiting.popleft())

    def _tell(self, file: str, states: Mapping[str, Any]) -> None:
        if "disk" in states:
            self.store.checkpoint_saved(file, states)
        else:
            self.store.checkpoint_removed(file)  # overwritten by one that refers to nothing


def _absolute(path: Any) -> str:
    text = os.fspath(path)
    return text if "://" in text else os.path.abspath(text)


def track_checkpoints(strategy: Any, store: Any) -> None:
    """Make `strategy` tell `store` what becomes of its checkpoints, and no store of a run before."""
    io = strategy.checkpoint_io
    inner = io.inner if isinstance(io, TrackedCheckpoints) else io
    strategy.checkpoint_io = TrackedCheckpoints(inner, store) if hasattr(store, "checkpoint_saved") else inner


_UNITS = {"": 1, "B": 1, **{f"{p}iB": 1 << 10 * i for i, p in enumerate("KMGT", 1)}}
_UNITS |= {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)} | {"kB": 1000}


def parse_bytes(name: str, value: int | str) -> int:
    """A number of bytes: an integer, or text such as ``"512 MiB"`` or ``"2GB"``.

    Raises:
        ValueError: naming the argument.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value) if isinstance(value, str) else None
    if match is None or match[2] not in _UNITS:
        raise ValueError(
            f"Expected `{name}` to be a number of bytes, or text such as '512MiB' or '2GB', but got {value!r}."
        )
    return int(float(match[1]) * _UNITS[match[2]])


def check_store(store: Any, limit: int | str) -> None:
    """Refuse what `make_store` cannot make a store of.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if store is not None and not isinstance(store, str | os.PathLike | Store):
        raise TypeError(
            f"Expected `store` to be 'memory', a folder, a Store or None, but got {type(store).__name__}: {store!r}."
        )
    if store == "":
        raise ValueError("Expected `store` to be 'memory', a folder, a Store or None, but got ''.")
    parse_bytes("store_limit", limit)


def make_store(store: Any, limit: int | str, root: str | os.PathLike[str]) -> Store:
    """The store of a run that begins, empty.

    Args:
        store: None: an `AutoStore`; ``"memory"``; a folder for a `DiskStore`; or a store, which is emptied.
        limit: of the `AutoStore`.
        root: the folder in which its files go to ``client_state``.
    """
    if store is None:
        if "://" in str(root):  # a bucket is no place for files that change every round
            user = os.getuid() if hasattr(os, "getuid") else "user"  # a folder of one's own, where many share it
            root = Path(tempfile.gettempdir()) / f"dynfed-{user}"
        return AutoStore(Path(root) / FOLDER, parse_bytes("store_limit", limit))
    if store == "memory":
        return MemoryStore()
    if isinstance(store, str | os.PathLike):
        return DiskStore(store)
    store.load_state_dict({})
    return store
