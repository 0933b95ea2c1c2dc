"""Client state in memory and on disk: to the bit, whole after a crash, and clear errors where it is not."""

from __future__ import annotations

import gc
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from torch import Tensor

from dynfed_lightning import disk_store, state_file
from dynfed_lightning.disk_store import DiskStore
from dynfed_lightning.state_file import StateError, from_bytes, to_bytes
from dynfed_lightning.store import AutoStore, MemoryStore, Store, check_store, make_store, parse_bytes


def same(a: Any, b: Any) -> bool:
    """Types, structure, and tensors to the bit."""
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or a.dtype != b.dtype or a.shape != b.shape:
            return False
        raw = [t.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return bool(torch.equal(*raw))
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return [(type(k), k) for k in a] == [(type(k), k) for k in b] and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float):
        return math.copysign(1, a) == math.copysign(1, b) and (a == b or (math.isnan(a) and math.isnan(b)))
    return bool(a == b)


def state(seed: int = 0, size: int = 5) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    return {"weights": {"a": torch.randn(size, 3, generator=g)}, "round": seed, "downlink": [1.5, "x"]}


# ------------------------------------------------------------------- one file

DTYPES = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)
WHOLE = [
    d
    for d in DTYPES
    if not any(w in str(d) for w in ("qint", "quint", "bits", "int1", "int2", "int3", "int5", "int7", "x2"))
]


@pytest.mark.parametrize("dtype", [d for d in WHOLE if "torch.int4" not in str(d) and "uint4" not in str(d)], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 4)], ids=str)
def test_every_dtype_to_the_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=torch.Generator().manual_seed(1))
    raw = raw % 2 if dtype == torch.bool else raw  # any other byte is no bool
    tensor = raw.to(torch.uint8).view(dtype).reshape(shape)
    data, crc = to_bytes(7, {"t": tensor})
    assert same(from_bytes(7, data, "f", crc)["t"], tensor)


def test_everything_a_state_may_hold() -> None:
    base = torch.randn(8, 6)
    held = {
        "nested": {"deep": {"er": [{"x": torch.ones(2)}, [], {}, ()]}},
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": base[0]}},
            "groups": [{"betas": (0.9, 0.999)}],
        },
        "keys": {0: "zero", "0": "text", True: "yes", None: "nothing", 2.5: "float"},
        "numbers": [0, -1, 10**30, 0.1, -0.0, math.inf, -math.inf, math.nan, 5e-324, True, False, None],
        "text": ["", "ä\u2028\U0001f600", 'quote " \\ crc32":"', '"crc32":"00000000"', "\x00\xff"],
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "overlapping": [base, base[2:4], base.view(-1)[3:9]],
        "conjugated": torch.randn(3, dtype=torch.complex64).conj(),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "": {},
    }
    data, _ = to_bytes(0, held)
    assert same(from_bytes(0, data, "f"), {**held, "parameter": held["parameter"].detach()})  # type: ignore[attr-defined]


def test_what_is_shared_is_stored_once() -> None:
    big = torch.randn(1000)
    data, _ = to_bytes(0, {"a": big, "b": [big, {"c": big}], "other": big.clone()})
    assert 8000 < len(data) < 9000
    read = from_bytes(0, data, "f")
    assert read["a"] is read["b"][0] is read["b"][1]["c"] and read["other"] is not read["a"]


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ({"a": {"b": [1, {2}]}}, "`a.b.1` is a set"),
        ({"a": object()}, "`a` is a object"),
        ({"a": torch.eye(2).to_sparse()}, "`a` is a Tensor"),
        ({"a": {(1, 2): 3}}, "`a.<key>` is a tuple"),
        ({"a": b"bytes"}, "`a` is a bytes"),
    ],
)
def test_what_a_state_may_not_hold(wrong: dict[str, Any], where: str) -> None:
    with pytest.raises(TypeError, match=f"Expected a client's state to hold dense tensors.*but {where}"):
        to_bytes(0, wrong)


def test_any_damage_is_found() -> None:
    """Every byte of the file, one after the other; every length."""
    data, crc = to_bytes(12, {"w": torch.arange(4), "note": "a"})
    for i in range(len(data)):
        with pytest.raises(StateError, match="Expected here to hold the state of client 12, but"):
            from_bytes(12, data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :], "here", crc)
    for i in range(len(data)):
        with pytest.raises(StateError, match="it is damaged"):
            from_bytes(12, data[:i], "here")
    for junk in (b"", b"x" * 100, (2**63).to_bytes(8, "little") + b"{}", b"\x02\0\0\0\0\0\0\0[]", data + b"\0"):
        with pytest.raises(StateError, match="it is damaged"):
            from_bytes(12, junk, "here")
    with pytest.raises(StateError, match="but it holds that of client 12"):
        from_bytes(13, data, "here")
    other, _ = to_bytes(12, {"w": torch.arange(1, 5), "note": "a"})
    with pytest.raises(StateError, match="of another run or another round"):
        from_bytes(12, other, "here", crc)


def test_any_safetensors_reader_opens_it(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    store.write(3, {"w": torch.arange(6.0)})
    with safetensors.safe_open(store.file(3), "pt") as file:
        assert torch.equal(file.get_tensor("0"), torch.arange(6.0))
        assert file.metadata()["client"] == "3" and json.loads(file.metadata()["tree"]) == {"d": [["w", {"x": "0"}]]}


# ---------------------------------------------------------------- every store


@pytest.fixture(params=["memory", "disk", "auto", "auto on disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    made: dict[str, Any] = {
        "memory": MemoryStore,
        "disk": lambda: DiskStore(tmp_path),
        "auto": lambda: AutoStore(tmp_path, 1 << 20),
        "auto on disk": lambda: AutoStore(tmp_path, 0),
    }
    return made[request.param]()


def test_every_store_remembers(store: Store) -> None:
    assert isinstance(store, Store)
    assert store.read(4) == {} and len(store) == 0 and store.state_dict() == {}
    for k in (30, 4, 1_000_000, 0):
        store.write(k, state(k))
    assert list(store) == [0, 4, 30, 1_000_000] and len(store) == 4
    assert all(same(store.read(k), state(k)) for k in store)
    working = store.read(4)
    working["weights"]["a"] = None  # a round that fails
    working["new"] = 1
    assert same(store.read(4), state(4))
    store.write(4, {**store.read(4), "round": 9})
    assert store.read(4)["round"] == 9
    store.write(4, {})
    store.write(5, {})
    assert list(store) == [0, 30, 1_000_000] and store.read(4) == {}
    store.load_state_dict({})
    assert len(store) == 0 and store.read(0) == {}


@pytest.mark.parametrize("other", ["memory", "disk", "auto", "auto on disk"])
def test_a_checkpoint_of_one_loads_into_every_other(store: Store, other: str, tmp_path: Path) -> None:
    for k in (0, 7, 2000):
        store.write(k, state(k))
    torch.save(store.state_dict(), tmp_path / "c.ckpt")
    for k in (0, 8):
        store.write(k, state(100 + k))  # after the checkpoint
    store.write(7, {})
    targets: dict[str, Any] = {
        "memory": MemoryStore(),
        "disk": DiskStore(tmp_path / "b"),
        "auto": AutoStore(tmp_path / "b", 1 << 20),
        "auto on disk": AutoStore(tmp_path / "b", 0),
    }
    for target in (targets[other], store):  # itself too
        target.write(9, state(1))
        target.load_state_dict(torch.load(tmp_path / "c.ckpt", weights_only=True))
        assert list(target) == [0, 7, 2000]
        assert all(same(target.read(k), state(k)) for k in target)
        target.write(7, state(3))
        assert same(target.read(7), state(3)) and same(target.read(0), state(0))


# -------------------------------------------------------------- on disk


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("client-*"))


def test_clients_lie_in_folders_of_a_thousand(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    for k in (0, 999, 1000, 123_456_789):
        store.write(k, {"k": k})
    found = sorted(p.relative_to(store.path).as_posix() for p in store.path.rglob("client-*"))
    assert found == [
        "000000/client-000000.v000001.safetensors",
        "000000/client-000999.v000001.safetensors",
        "000001/client-001000.v000001.safetensors",
        "123456/client-123456789.v000001.safetensors",
    ]
    with pytest.raises(ValueError, match="Expected a client's id to be at least 0, but got -1"):
        store.write(-1, {"a": 1})


def test_without_checkpoints_there_is_one_file_a_client(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    for t in range(5):
        store.write(1, state(t))
        store.write(2, state(t))
    assert files(tmp_path) == ["client-000001.v000001.safetensors", "client-000002.v000001.safetensors"]
    store.write(2, {})
    assert files(tmp_path) == ["client-000001.v000001.safetensors"]


def test_a_checkpoint_is_numbers(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    for k in range(50):
        store.write(k, state(k, size=500))
    torch.save(store.state_dict(), tmp_path / "c")
    assert (tmp_path / "c").stat().st_size < 6000 < store.num_bytes / 50


def test_versions_stay_as_long_as_a_checkpoint_names_them(tmp_path: Path) -> None:
    """Two files of checkpoints that overwrite each other, one that stays, and one that was taken but never saved."""
    store = DiskStore(tmp_path / "s")
    kept: dict[str, Any] = {}

    def save(file: str) -> None:
        kept[file] = store.state_dict(), {k: store.read(k) for k in store}
        store.checkpoint_saved(file, kept[file][0])

    rng = random.Random(0)
    most = 0
    for t in range(60):
        for k in rng.sample(range(6), 2):
            store.write(k, {} if rng.random() < 0.1 else state(1000 * t + k))
        action = rng.random()
        if action < 0.4:
            save(rng.choice("abc"))
        elif action < 0.5 and kept:
            file = rng.choice(sorted(kept))
            del kept[file]
            store.checkpoint_removed(file)
        for reference, states in kept.values():
            for target in (MemoryStore(), DiskStore(tmp_path / "t")):
                target.load_state_dict(reference)
                assert list(target) == list(states) and all(same(target.read(k), states[k]) for k in states)
        most = max(most, len(files(tmp_path / "s")))
    assert most <= 6 * 4  # three checkpoints and the current state
    for file in list(kept):
        store.checkpoint_removed(file)
    assert len(files(tmp_path / "s")) == len(store)


def test_going_back_to_a_checkpoint_of_the_same_run(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    store.write(0, state(1))
    first = store.state_dict()
    store.checkpoint_saved("first", first)
    store.write(0, state(2))
    second = store.state_dict()
    store.checkpoint_saved("second", second)
    store.write(0, state(3))
    store.load_state_dict(first)
    assert same(store.read(0), state(1)) and len(files(tmp_path)) == 2  # what came after the second is gone
    store.checkpoint_removed("first")
    assert same(store.read(0), state(1))  # still the current one
    store.load_state_dict(second)
    store.checkpoint_removed("second")
    store.write(0, state(4))
    assert same(store.read(0), state(4)) and len(files(tmp_path)) == 1


def test_a_write_that_fails_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DiskStore(tmp_path)
    store.write(0, state(1))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(state_file.os, name, lambda *_: full(0))
            with pytest.raises(OSError, match="No space left"):
                store.write(0, state(2))
        assert same(store.read(0), state(1))
        assert not list(tmp_path.rglob(".*.part"))
    with pytest.raises(TypeError):
        store.write(0, {"a": {1}})
    assert same(store.read(0), state(1))


_KILLED = """
import os, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from dynfed_lightning import disk_store, state_file
from dynfed_lightning.disk_store import DiskStore

def run(folder, moment):
    store = DiskStore(folder)
    store.write(0, {"w": torch.full((1000,), 1.0)})
    reference = store.state_dict()
    torch.save(reference, folder / "c.ckpt")
    store.checkpoint_saved("c.ckpt", reference)
    count = 0
    def dying(real):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == moment:
                os._exit(9)
            return real(*args, **kwargs)
        return call
    for name in ("fsync", "replace", "open"):
        setattr(state_file.os, name, dying(getattr(state_file.os, name)))
    Path.unlink = dying(Path.unlink)
    store.write(0, {"w": torch.full((1000,), 2.0)})
    store.write(0, {"w": torch.full((1000,), 3.0)})
    os._exit(0)

for moment in range(1, 20):
    child = os.fork()
    if not child:
        run(Path(sys.argv[1]) / str(moment), moment)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_every_moment_of_a_write(tmp_path: Path) -> None:
    """Whatever survives is a whole state, and the checkpoint's is always there."""
    root = str(Path(__file__).resolve().parent.parent)
    subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path), root], check=True)
    seen, parts = [], 0
    folders = sorted(tmp_path.iterdir(), key=lambda f: int(f.name))
    assert len(folders) > 8  # twice: flush, rename, open and flush the folder
    for folder in folders:
        found = set()
        for file in folder.rglob("client-*.safetensors"):
            values = from_bytes(0, file.read_bytes(), file)["w"]
            assert len(values) == 1000 and len(set(values.tolist())) == 1
            found.add(float(values[0]))
        parts += len(list(folder.rglob(".*.part")))
        seen.append(max(found))
        assert 1.0 in found and len(found) <= 2
        store = DiskStore(folder)
        store.load_state_dict(torch.load(folder / "c.ckpt", weights_only=True))
        assert torch.equal(store.read(0)["w"], torch.full((1000,), 1.0))
        assert not list(folder.rglob(".*.part"))  # cleaned when the next run starts
    assert seen == sorted(seen) and set(seen) == {1.0, 2.0, 3.0} and parts >= 3


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "a")
    for k in (3, 1005, 2007):
        store.write(k, state(k))
    reference = store.state_dict()
    file = store.file(1005)
    whole = file.read_bytes()
    for target in (
        DiskStore(tmp_path / "b"),
        MemoryStore(),
        AutoStore(tmp_path / "c", 0),
        AutoStore(tmp_path / "c", 1 << 30),
    ):
        target.write(5, state(5))
        file.write_bytes(whole[:-1])
        with pytest.raises(
            StateError, match=r"client-001005\.v000001\.safetensors to hold the state of client 1005, but it is dam"
        ):
            target.load_state_dict(reference)
        file.write_bytes(to_bytes(1005, state(1))[0])
        with pytest.raises(
            StateError, match="state of client 1005, but its checksum is .* of another run or another round"
        ):
            target.load_state_dict(reference)
        file.unlink()
        match = (
            r"state of client 1005"
            if isinstance(target, MemoryStore)
            else r"client 1005 in .*of 3 clients, 1 lack theirs"
        )
        with pytest.raises(StateError, match=match):
            target.load_state_dict(reference)
        assert list(target) == [5] and same(target.read(5), state(5))  # nothing lost
        file.write_bytes(whole)
    file.unlink()
    with pytest.raises(
        StateError, match="client-001005.* to hold the state of client 1005, but it cannot be read: No such file"
    ):
        store.read(1005)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "a")
    store.write(3, state(3))
    reference = store.state_dict()
    (tmp_path / "a").rename(tmp_path / "moved")
    for target in (DiskStore(tmp_path / "b"), MemoryStore(), AutoStore(tmp_path / "b", 0)):
        with pytest.raises(
            StateError, match="Expected the state of 1 clients .the first is client 3. in .*: a checkpoint does not"
        ):
            target.load_state_dict(reference)
    found = DiskStore(tmp_path / "moved")
    found.load_state_dict(reference)  # moved together with its checkpoint
    assert same(found.read(3), state(3))
    book = tmp_path / "moved" / store.run / "store.json"
    book.write_text(book.read_text().replace(store.run, "another"))
    with pytest.raises(StateError, match="client 3"):
        DiskStore(tmp_path / "moved").load_state_dict(reference)


def test_a_run_that_resumes_has_its_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for linking in (True, False):
        base = tmp_path / str(linking)
        first = DiskStore(base)
        for k in range(3):
            first.write(k, state(k))
        reference = first.state_dict()
        first.checkpoint_saved("x.ckpt", reference)
        if not linking:
            monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
        second, third = DiskStore(base), DiskStore(base)
        for store in (second, third):
            store.load_state_dict(reference)
        assert second.file(0).samefile(first.file(0)) == linking
        second.write(0, state(50))
        third.write(1, {})
        first.write(2, state(51))
        assert same(first.read(0), state(0)) and same(second.read(0), state(50)) and same(third.read(0), state(0))
        assert same(second.read(1), state(1)) and same(second.read(2), state(2)) and third.read(1) == {}
        again = MemoryStore()
        again.load_state_dict(reference)
        assert [same(again.read(k), state(k)) for k in range(3)] == [True] * 3


def test_an_older_runs_folder_goes_with_its_last_checkpoint(tmp_path: Path) -> None:
    first = DiskStore(tmp_path)
    first.write(0, state(0))
    references = [first.state_dict(), first.state_dict()]
    a, b = (str(tmp_path / name) for name in ("a.ckpt", "b.ckpt"))
    for file, reference in zip((a, b), references, strict=True):
        Path(file).touch()
        first.checkpoint_saved(file, reference)
    old = first.path
    second = DiskStore(tmp_path)
    second.load_state_dict(references[1])
    second.checkpoint_removed(a)
    assert old.is_dir()  # b is still there
    second.checkpoint_removed(b)
    assert old.is_dir() and same(first.read(0), state(0))  # the first store is still open
    book = json.loads((old / "store.json").read_text())
    assert book["saved"] == {} and book["alive"] == []
    del first
    gc.collect()
    other = DiskStore(tmp_path)
    other.write(0, state(1))
    reference = other.state_dict()
    Path(a).touch()
    other.checkpoint_saved(a, reference)
    folder = other.path
    del other
    gc.collect()
    second.checkpoint_saved(a, second.state_dict())  # overwrites that of a run it does not go on from
    assert folder.is_dir()
    third, fourth = DiskStore(tmp_path), DiskStore(tmp_path)
    third.load_state_dict(reference)
    between = third.state_dict()
    third.checkpoint_saved(b, between)
    fourth.load_state_dict(between)
    fourth.checkpoint_removed(a)  # of the run that the one before it went on from
    assert not folder.is_dir() and same(fourth.read(0), state(1))


def test_temporary_files_go_with_the_run(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, temporary=True)
    store.write(0, state(0))
    assert store.path.is_dir()
    del store
    gc.collect()
    assert not list(tmp_path.iterdir())

    store = DiskStore(tmp_path, temporary=True)
    store.write(0, state(0))
    reference = store.state_dict()
    store.checkpoint_saved("a", reference)
    store.write(0, state(1))
    store.write(1, state(1))
    del store
    gc.collect()
    assert files(tmp_path) == ["client-000000.v000001.safetensors"]  # what the checkpoint needs, and no more
    memory = MemoryStore()
    memory.load_state_dict(reference)
    assert same(memory.read(0), state(0)) and len(memory) == 1


def test_what_a_killed_process_left_is_cleaned_up(tmp_path: Path) -> None:
    root = str(Path(__file__).resolve().parent.parent)
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[2])\n"
        "from dynfed_lightning.disk_store import DiskStore\n"
        "for temporary in (True, False):\n"
        "    store = DiskStore(sys.argv[1], temporary=temporary); store.write(0, {'a': 1})\n"
        "    globals()[str(temporary)] = store\n"
        "os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path), root], check=False)
    assert len(files(tmp_path)) == 2
    living = DiskStore(tmp_path, temporary=True)
    living.write(0, state(0))
    another = DiskStore(tmp_path)
    another.write(0, state(0))
    assert len(files(tmp_path)) == 3  # the temporary one of the dead process is gone; that of the living is not
    assert same(living.read(0), state(0))


@pytest.mark.parametrize(
    "book",
    [
        {"saved": []},
        {"alive": ["x"]},
        {"alive": 3},
        {"saved": {"a": "b"}},
        {"from": 1},
        {"marks": []},
        {"run": None},
        {},
    ],
    ids=str,
)
def test_strange_things_beside_disturb_nobody(tmp_path: Path, book: dict[str, Any]) -> None:
    """Another run's folder, with a stray file and a book that is not whole."""
    other = tmp_path / "other" / "000000"
    other.mkdir(parents=True)
    (other / "client-notes.safetensors").write_text("mine")
    whole = {"run": "other", "temporary": True, "alive": [1], "saved": {}}
    (tmp_path / "other" / "store.json").write_text(json.dumps({**whole, **book}))
    store = DiskStore(tmp_path)
    store.write(0, state(0))
    store.checkpoint_saved("x", store.state_dict())
    store.checkpoint_removed("x")
    assert same(store.read(0), state(0)) and (other / "client-notes.safetensors").read_text() == "mine"


# ------------------------------------------------------- memory, then disk


def test_the_store_moves_when_the_limit_is_passed(tmp_path: Path) -> None:
    store = AutoStore(tmp_path, 10 * 400)
    for k in range(10):
        store.write(k, {"w": torch.full((100,), float(k))})
    assert not store.on_disk and store.num_bytes == 4000 and not list(tmp_path.iterdir())
    store.write(3, {"w": torch.full((100,), -1.0)})  # replaced, not added
    assert not store.on_disk and store.num_bytes == 4000
    store.write(10, {"w": torch.zeros(1)})
    assert store.on_disk and store.path is not None and len(files(tmp_path)) == 11 == len(store)
    assert [float(store.read(k)["w"][0]) for k in range(11)] == [0, 1, 2, -1, 4, 5, 6, 7, 8, 9, 0]
    folder = store.path
    del store
    gc.collect()
    assert not folder.exists()


def test_shared_memory_counts_once(tmp_path: Path) -> None:
    store = AutoStore(tmp_path, 1000)
    sent = torch.zeros(200)
    for k in range(50):
        store.write(k, {"downlink": {"tensors": {"a": sent[:100], "b": sent[100:]}}, "round": 1})
    assert store.num_bytes == 800 and not store.on_disk
    for k in range(50):
        store.write(k, {})
    assert store.num_bytes == 0 and not store._users


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (0, 0),
        (5, 5),
        ("7", 7),
        ("1KiB", 1024),
        ("1.5 MiB", 3 << 19),
        ("2GB", 2 * 10**9),
        ("1GiB", 1 << 30),
        ("3 kB", 3000),
    ],
)
def test_sizes(text: int | str, number: int) -> None:
    assert parse_bytes("store_limit", text) == number


@pytest.mark.parametrize("wrong", [-1, 1.5, True, "many", "1 XB", "", "-1GiB", None])
def test_wrong_sizes(wrong: Any) -> None:
    with pytest.raises(ValueError, match="Expected `store_limit` to be a number of bytes, or text such as '512MiB'"):
        parse_bytes("store_limit", wrong)


def test_choices(tmp_path: Path) -> None:
    assert isinstance(make_store("memory", 0, tmp_path), MemoryStore)
    assert isinstance(auto := make_store(None, "1KiB", tmp_path), AutoStore) and auto.limit == 1024
    assert auto.folder == tmp_path / "client_state"
    assert isinstance(bucket := make_store(None, 0, "s3://bucket/run"), AutoStore) and "s3:" not in str(bucket.folder)
    for place in (tmp_path / "x", str(tmp_path / "x")):
        assert isinstance(disk := make_store(place, 0, "elsewhere"), DiskStore) and disk.folder == tmp_path / "x"
    mine = MemoryStore()
    mine.write(0, {"a": 1})
    assert make_store(mine, 0, tmp_path) is mine and len(mine) == 0
    for wrong in (3, {}, []):
        with pytest.raises(TypeError, match="Expected `store` to be 'memory', a folder, a Store or None, but got"):
            check_store(wrong, 0)
    with pytest.raises(ValueError, match="Expected `store` to be 'memory'"):
        check_store("", 0)


@pytest.mark.parametrize("wrong", [b"x", {1}, object(), torch.eye(2).to_sparse()], ids=lambda w: type(w).__name__)
def test_what_could_not_move_to_disk_is_refused_at_once(tmp_path: Path, wrong: Any) -> None:
    store = AutoStore(tmp_path, 1 << 30)
    store.write(0, state(0))
    with pytest.raises(TypeError, match="Expected a client's state to hold dense tensors, .*but `a.0` is a"):
        store.write_all({0: state(1), 1: {"a": [wrong]}})
    assert list(store) == [0] and same(store.read(0), state(0))


@pytest.mark.parametrize(
    "make", [DiskStore, lambda folder: AutoStore(folder, 0), lambda folder: AutoStore(folder, 500)]
)
def test_all_of_a_rounds_clients_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    store = make(tmp_path)
    for k in range(3):
        store.write(k, state(k))
    before, size = files(tmp_path), store.num_bytes
    real = disk_store.write_whole

    def full(path: Path, data: bytes) -> None:
        if path.name.startswith("client-000002"):
            raise OSError(28, "No space left on device")
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(disk_store, "write_whole", full)
        with pytest.raises(OSError, match="No space left"):
            store.write_all({0: state(7), 1: {}, 2: state(8, size=100), 3: state(9)})
    assert list(store) == [0, 1, 2] and all(same(store.read(k), state(k)) for k in range(3))
    assert store.num_bytes == size and (not before or files(tmp_path) == before)
    store.write_all({0: state(7), 1: {}, 2: state(8, size=100), 3: state(9)})
    assert list(store) == [0, 2, 3] and same(store.read(0), state(7)) and len(files(tmp_path)) == 3


def test_a_load_that_fails_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = DiskStore(tmp_path / "a")
    for k in range(4):
        source.write(k, state(k))
    reference = source.state_dict()
    for target in (DiskStore(tmp_path / "b"), AutoStore(tmp_path / "c", 0)):
        target.write(9, state(9))
        before = files(tmp_path)

        def full(path: Path, data: bytes, real: Any = disk_store.write_whole) -> None:
            if path.name.startswith("client-000002"):
                raise OSError(28, "No space left on device")
            real(path, data)

        with monkeypatch.context() as patch:
            patch.setattr(disk_store, "write_whole", full)
            patch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
            with pytest.raises(StateError, match="take up the state of client 2 in .*No space left"):
                target.load_state_dict(reference)
        for wrong in ({"1": state(1), "2": {"a": {3}}}, {"1": state(1), "-2": state(2)}):
            with pytest.raises((TypeError, ValueError), match="client"):
                target.load_state_dict(wrong)
        assert list(target) == [9] and same(target.read(9), state(9))
        gc.collect()
        assert files(tmp_path) == before
        target.write(9, state(10))
        target.load_state_dict(reference)
        assert list(target) == [0, 1, 2, 3] and same(target.read(3), state(3))
