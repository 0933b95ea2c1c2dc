"""Client state on disk: a file per client and version, and checkpoints that refer to versions instead of holding them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import time
import weakref
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from dynfed_lightning.state_file import State, StateError, check_bytes, flush_folder, from_bytes, to_bytes, write_whole

try:
    import fcntl
except ImportError:  # Windows: no run can tell whether another one is alive, so none removes another's files
    fcntl = None  # type: ignore[assignment]

SHARD = 1000  # clients in a folder
_BOOK = "store.json"
_NAME = re.compile(r"client-\d+\.v(\d+)\.safetensors")


class DiskStore:
    """Client state in files; in memory only which version of each client is the current one.

    ``folder/<run>/000012/client-000012345.v000003.safetensors`` is client 12345 as it was written after the checkpoint
    numbered 2. Files are written whole (a temporary file, flushed, renamed), never changed, and checked when
    they are read: after a crash at any moment a client has its old or its new state. Any safetensors reader opens them;
    `state_file` says how they are laid out. Tensors come back contiguous and on the CPU.

    A checkpoint (`state_dict`) holds three numbers for each client: id, version, checksum. So it is small, and consistent: the
    versions it names stay until no checkpoint that Lightning keeps names them. What Lightning's ``ModelCheckpoint`` deletes
    (``save_top_k``) or overwrites (``last.ckpt``) is forgotten here too (`TrackedCheckpoints`), and the versions that were
    only kept for it are deleted. So a copy made by hand of a checkpoint that Lightning later overwrites or deletes loses its
    clients' state, and so does one that is moved while the run goes on: to keep a checkpoint, save it under a name of its own
    (``save_top_k=-1``, or a `filename` that tells rounds apart), or use ``store="memory"``, whose checkpoints hold everything.
    Checkpoints and this folder belong together: to move one to another machine, move both.

    A run that resumes makes a folder of its own, with hard links to the files it starts from (copies where the file system
    has none), so that two runs from one checkpoint do not disturb each other, and the older run's checkpoints stay whole. The
    older run's folder goes when Lightning, in runs that go on from it, has deleted or overwritten the last of its checkpoints,
    unless one of them had been moved away by then. No run removes the folder of a run that it does not go on from while that
    has checkpoints; once they are gone, it is the user's to remove.

    Args:
        folder: where the run's own folder is made, by the first write.
        temporary: remove the run's folder with the last reference to the store, or when the interpreter exits, unless a
            checkpoint refers to it. What a killed process left is removed when another run begins in the same `folder`.

    Attributes:
        run: the name of the run's own folder.
    """

    def __init__(self, folder: str | os.PathLike[str], *, temporary: bool = False) -> None:
        self.folder = Path(folder).absolute()
        self.temporary = temporary
        self._finalizer: weakref.finalize[Any, Any] | None = None
        self._begin()

    def _begin(self) -> None:
        """A run of no clients and no checkpoints, in a folder that is yet to be made."""
        if self._finalizer is not None:
            self._finalizer()
        self._finalizer = None
        self.run = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
        self._current: dict[int, tuple[int, int]] = {}  # client -> version, checksum
        self._version = 1  # of what is written now, and the number of the next checkpoint
        self._old: list[tuple[int, int, int]] = []  # client, version, the last checkpoint that may name it
        self._alive: set[int] = set()  # numbers of the checkpoints that may still be read
        self._saved: dict[str, int] = {}  # a checkpoint's file -> its number
        self._marks: dict[str, list[int] | None] = {}  # and its `signature` then
        self._from: list[str] = []  # the runs that this one goes on from, the nearest first
        self._taken: set[str] = set()  # their checkpoints' files that were there when this run began

    @property
    def path(self) -> Path:
        """The run's own folder."""
        return self.folder / self.run

    def file(self, client_id: int) -> Path:
        """The file of a client's current state.

        Raises:
            KeyError: the client has none.
        """
        return _file(self.path, client_id, self._current[client_id][0])

    @property
    def num_bytes(self) -> int:
        """The size of all clients' current files."""
        return sum(self.file(k).stat().st_size for k in self._current)

    def __deepcopy__(self, memo: dict[int, Any]) -> DiskStore:
        """Itself: the files have one owner, whatever callback copies the federation around it."""
        return self

    # ------------------------------------------------------- reading and writing

    def read(self, client_id: int) -> State:
        """A working copy of a client's state, empty if it has none.

        Raises:
            StateError: its file is missing or damaged; the message names the client and the file.
        """
        if client_id not in self._current:
            return {}
        file, crc = self.file(client_id), self._current[client_id][1]
        return from_bytes(client_id, _bytes(client_id, file), file, crc)

    def write(self, client_id: int, state: State) -> None:
        """Replace a client's state; the old one stays where a checkpoint names it.

        Raises:
            TypeError: it holds something that is no tensor, number, string, list or dict.
            OSError: the file cannot be written; the client then has its old state.
        """
        self.write_all({client_id: state})

    def write_all(self, states: Mapping[int, State]) -> None:
        """Replace several clients' states, or none if that fails.

        Raises:
            TypeError: one holds something that is no tensor, number, string, list or dict.
            OSError: a file cannot be written; every client then has its old state.
        """
        for k in states:
            if k < 0:
                raise ValueError(f"Expected a client's id to be at least 0, but got {k}.")
        if len(states) > 1 and any(self._current.get(k, (0, 0))[0] == self._version for k in states):
            self._version += 1  # files beside those of now, which stay until all are written
        before, now = self._current, dict(self._current)
        written = []
        try:
            for k, state in states.items():
                now.pop(k, None)
                if state:
                    data, crc = to_bytes(k, state)
                    self._open()
                    file = self._place(k, self._version)
                    write_whole(file, data)
                    written.append(file)
                    now[k] = (self._version, crc)
        except BaseException:
            if len(states) > 1:
                for file in written:
                    file.unlink(missing_ok=True)
            raise
        self._current = now
        for k in states:
            if k in before and before[k][0] != now.get(k, (-1, 0))[0]:
                self._drop(k, before[k][0])

    def __len__(self) -> int:
        return len(self._current)

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._current))

    def _place(self, client_id: int, version: int) -> Path:
        file = _file(self.path, client_id, version)
        if not file.parent.is_dir():
            file.parent.mkdir(exist_ok=True)
            flush_folder(self.path)
        return file

    def _drop(self, client_id: int, version: int) -> None:
        """A version is current no more: it goes, unless one of the checkpoints names it that were made while it was."""
        last = self._version - 1
        if any(version <= number <= last for number in self._alive):
            self._old.append((client_id, version, last))
        else:
            with contextlib.suppress(OSError):
                _file(self.path, client_id, version).unlink(missing_ok=True)

    # --------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to find every client's state as it is now: numbers, not the state."""
        if not self._current:
            return {}
        clients = torch.tensor(list(self), dtype=torch.int64)
        versions, sums = (torch.tensor([self._current[k][i] for k in self], dtype=torch.int64) for i in (0, 1))
        number = self._version
        self._open()
        self._alive.add(number)
        self._version += 1
        self._write_book()
        disk = {"folder": str(self.folder), "run": self.run, "checkpoint": number}
        return {"disk": {**disk, "clients": clients, "versions": versions, "checksums": sums}}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Replace everything by what `state_dict` gave, this store's, another disk's or a `MemoryStore`'s.

        Raises:
            StateError: a client's file is missing, damaged, or of another run, or cannot be made here; the message names the
                client, and nothing has been replaced.
        """
        found = Reference(states["disk"], self.folder) if "disk" in states else None
        if found is not None:
            found.check()
            if found.path == self.path:
                self._go_back(found)
                return
        made, client = DiskStore(self.folder, temporary=self.temporary), -1
        try:
            if found is None:
                for name, state in states.items():
                    client = int(name)
                    made.write(client, state)
            else:
                made._take_over(found.path)
                made._open()
                for client, (file, crc) in found.files.items():
                    _link(file, made._place(client, 0))
                    made._current[client] = (0, crc)
                for folder in {_file(made.path, k, 0).parent for k in found.files}:
                    flush_folder(folder)
        except BaseException as error:
            if made._finalizer is not None:
                made._finalizer()
                shutil.rmtree(made.path, ignore_errors=True)
            if not isinstance(error, TypeError | OSError):
                raise
            raise StateError(
                f"Expected to take up the state of client {client} in {self.folder}, but: {error}"
            ) from error
        self._become(made)

    def _become(self, other: DiskStore) -> None:
        """Take the place of a store that nobody else knows."""
        if self._finalizer is not None:
            self._finalizer()
        end = None if other._finalizer is None else other._finalizer.detach()
        self.__dict__.update(other.__dict__)
        self._finalizer = None if end is None else weakref.finalize(self, end[1], *end[2])

    def _take_over(self, older: Path) -> None:
        """Go on from a run in the same folder: what Lightning does to its checkpoints from now on is told to its book."""
        if older.parent != self.folder:
            return
        book = _read_book(older)
        self._from = [older.name, *(book["from"] if book else [])]
        for run in self._from:
            marks = (_read_book(self.folder / run) or {"marks": {}})["marks"]
            # One that is not there any more was moved away, and still needs its state wherever it lies.
            self._taken |= {file for file, mark in marks.items() if mark is not None and mark == signature(file)}

    def _go_back(self, found: Reference) -> None:
        """To one of this run's own checkpoints."""
        before = {(k, version) for k, (version, _) in self._current.items()}
        self._current = {k: (found.versions[k], crc) for k, (_, crc) in found.files.items()}
        now = {(k, version) for k, (version, _) in self._current.items()}
        self._old = [entry for entry in self._old if entry[:2] not in now]
        for k, version in before - now:
            self._drop(k, version)

    def checkpoint_saved(self, file: str, reference: Mapping[str, Any]) -> None:
        """A checkpoint that holds `reference` (of `state_dict`) lies in `file` now."""
        number = int(reference["disk"]["checkpoint"])
        if reference["disk"]["run"] != self.run or number not in self._alive:
            return
        before = self._saved.get(file)
        self._saved[file], self._marks[file] = number, signature(file)
        self._write_book()
        self._release(before)
        self._forget_elsewhere(file)

    def checkpoint_removed(self, file: str) -> None:
        """No checkpoint of this kind lies in `file` any more."""
        before = self._saved.pop(file, None)
        self._marks.pop(file, None)
        if before is not None:
            self._release(before)
        else:
            self._forget_elsewhere(file)

    def _release(self, number: int | None) -> None:
        """Delete the versions that were only kept for a checkpoint, if no file holds it."""
        if number is None or number in self._saved.values():
            return
        self._alive.discard(number)
        self._write_book()
        kept = []
        for k, version, last in self._old:
            if any(version <= number <= last for number in self._alive):
                kept.append((k, version, last))
            else:
                _file(self.path, k, version).unlink(missing_ok=True)
        self._old = kept

    def _forget_elsewhere(self, file: str) -> None:
        """A checkpoint of a run that this one goes on from is gone; with its last one its folder goes.

        Never another run's: that this run overwrote the file does not tell that no copy of it lies elsewhere.
        """
        if file not in self._taken:
            return
        self._taken.discard(file)
        for folder in (self.folder / run for run in self._from):
            book = _read_book(folder)
            number = book["saved"].pop(file, None) if book else None
            if book is None or number is None:
                continue
            if number not in book["saved"].values():
                book["alive"] = [n for n in book["alive"] if n != number]
            if book["alive"] or _in_use(folder):
                with contextlib.suppress(OSError):  # a folder that is read-only, say: it stays
                    write_whole(folder / _BOOK, json.dumps(book).encode())
            else:
                shutil.rmtree(folder, ignore_errors=True)

    # -------------------------------------------------------------- the folder

    def _open(self) -> None:
        """Make the run's folder, and tidy up after runs that were killed."""
        if self._finalizer is not None:
            return
        self.path.mkdir(parents=True)
        lock = _take_lock(self.path)
        keep = self._alive if self.temporary else None
        self._finalizer = weakref.finalize(self, _close, self.path, keep, lock, os.getpid())
        self._write_book()
        for folder in self._others():
            book = _read_book(folder)
            if book is not None and not _in_use(folder):
                _tidy(folder, book["alive"] if book["temporary"] else None)

    def _others(self) -> list[Path]:
        return [f.parent for f in self.folder.glob(f"*/{_BOOK}") if f.parent != self.path]

    def _write_book(self) -> None:
        book = {
            "run": self.run,
            "temporary": self.temporary,
            "alive": sorted(self._alive),
            "saved": self._saved,
            "marks": self._marks,
            "from": self._from,
        }
        write_whole(self.path / _BOOK, json.dumps(book).encode())


class Reference:
    """The files that a checkpoint of a `DiskStore` refers to.

    Args:
        disk: the ``disk`` entry of what `DiskStore.state_dict` gave.
        folder: where to look for the run first; then where it was.

    Attributes:
        path: the run's folder.
        files: client -> its file and its checksum.
        versions: client -> version.

    Raises:
        StateError: the run's folder is in neither place.
    """

    def __init__(self, disk: Mapping[str, Any], folder: Path | None = None) -> None:
        places = list(dict.fromkeys(p for p in (folder, Path(disk["folder"])) if p is not None))
        paths = [p / disk["run"] for p in places]
        self.path = next((p for p in paths if (_read_book(p) or {}).get("run") == disk["run"]), paths[-1])
        clients, versions, sums = (disk[name].tolist() for name in ("clients", "versions", "checksums"))
        if clients and not (self.path / _BOOK).is_file():
            raise StateError(
                f"Expected the state of {len(clients)} clients (the first is client {clients[0]}) in "
                f"{' or '.join(map(str, paths))}, where the checkpoint says it is, but there is no such folder: "
                "a checkpoint does not hold the clients' state itself; move the folder with it."
            )
        self.versions = dict(zip(clients, versions, strict=True))
        self.files = {k: (_file(self.path, k, v), crc) for k, v, crc in zip(clients, versions, sums, strict=True)}

    def check(self) -> None:
        """Read every file once.

        Raises:
            StateError: one is missing, damaged, or of another run; the message names the client and the file.
        """
        missing = [k for k, (file, _) in self.files.items() if not file.is_file()]
        if missing:
            raise StateError(
                f"Expected the state of client {missing[0]} in {self.files[missing[0]][0]}, where the checkpoint says it is, "
                f"but there is no such file (of {len(self.files)} clients, {len(missing)} lack theirs)."
            )
        for k, (file, crc) in self.files.items():
            check_bytes(k, _bytes(k, file), file, crc)

    def states(self) -> Iterator[tuple[int, State]]:
        """Every client's state, one after the other."""
        for k, (file, crc) in self.files.items():
            yield k, from_bytes(k, _bytes(k, file), file, crc)


def _file(path: Path, client_id: int, version: int) -> Path:
    return path / f"{client_id // SHARD:06d}" / f"client-{client_id:06d}.v{version:06d}.safetensors"


def _bytes(client_id: int, file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise StateError(
            f"Expected {file} to hold the state of client {client_id}, but it cannot be read: {error.strerror or error}."
        ) from error


def signature(file: str) -> list[int] | None:
    """What changes with every writing of a file; None where there is none, or nobody can tell."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return [found.st_ino, found.st_mtime_ns, found.st_size]


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        write_whole(target, source.read_bytes())


def _read_book(folder: Path) -> dict[str, Any] | None:
    """What a run's folder says of itself; None if it says nothing."""
    try:
        book = json.loads((folder / _BOOK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(book, dict):
        return None
    book = {"from": [], "marks": {}, **book}
    kinds = {"run": str, "temporary": bool, "alive": list, "saved": dict, "from": list, "marks": dict}
    whole = all(isinstance(book.get(name), kind) for name, kind in kinds.items())
    if not whole or not all(isinstance(n, int) for n in (*book["alive"], *book["saved"].values())):
        return None
    return book if all(isinstance(run, str) for run in book["from"]) else None


def _take_lock(folder: Path) -> Any:
    """Show that the folder is in use, as long as the file that is returned is open; the system closes it after a crash."""
    file = open(folder / "lock", "ab")  # noqa: SIM115
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # taken, or a file system without locks
            pass
    return file


def _in_use(folder: Path) -> bool:
    """Whether a living process, or this one, has the folder's lock; True where nobody can tell."""
    if fcntl is None:
        return True
    try:
        with open(folder / "lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def _close(path: Path, alive: set[int] | None, lock: Any, process: int) -> None:
    """The end of a store; of a temporary one `alive` tells which checkpoints it has to stay for."""
    if os.getpid() == process:  # a forked worker's end is not the run's
        _tidy(path, alive)
        lock.close()


def _tidy(path: Path, alive: Collection[int] | None) -> None:
    """Remove of a run that is over what nobody can need: half-written files; of a temporary one (`alive` is not None) all that
    no checkpoint names.
    """
    if alive is not None and not alive:
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        for part in path.glob("*/.client-*.part"):
            part.unlink(missing_ok=True)
        for file in path.glob("*/client-*.safetensors") if alive is not None else ():
            found = _NAME.fullmatch(file.name)
            if found and int(found[1]) > max(alive or ()):  # written after the last checkpoint
                file.unlink(missing_ok=True)
