"""Quantised models as files: the same bits back, their size, and what is refused without harm."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import assert_same

from dynfed_lightning import describe_quantized, load_quantized, ops, quantized_state_dict, save_quantized
from dynfed_lightning._quantized_format import CRC
from dynfed_lightning.errors import (
    ChecksumError,
    MalformedPayloadError,
    NonFiniteError,
    PayloadError,
    SchemaMismatchError,
    TruncatedPayloadError,
)


class Net(nn.Module):
    """Layers to quantise, a norm with an integer buffer, buffers of other dtypes, and a layer that is float."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.two = nn.Linear(width, 31, bias=False)  # 31 * 8 codes of 3 bits: no whole byte
        self.out = nn.Linear(31, 4)
        self.register_buffer("mask", torch.tensor([[True, False, True]]))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("odd", torch.tensor([1.5, -math.inf, math.nan], dtype=torch.bfloat16))
        self.register_buffer("wide", torch.tensor(2**63, dtype=torch.uint64))
        self.register_buffer("unsaved", torch.ones(2), persistent=False)


def quantized(
    seed: int = 0, bits: tuple[int, int] = (2, 3), dtype: torch.dtype = torch.float32
) -> tuple[Net, dict[str, Tensor]]:
    """A model whose first two layers hold their centres."""
    torch.manual_seed(seed)
    net, centers = Net(), {}
    for name, b in zip(("one.weight", "two.weight"), bits, strict=True):
        c = torch.randn(2**b).sort().values
        p = net.get_parameter(name)
        p.data.copy_(c[torch.randint(2**b, p.shape)])
        p.data.flatten()[: len(c)] = c  # each is used
        centers[name] = c
    for part in (net.one, net.two):
        part.to(dtype)
    return net, centers


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    for n in a:
        assert a[n].dtype == b[n].dtype and a[n].shape == b[n].shape, n
        assert torch.equal(a[n].reshape(-1).view(torch.uint8), b[n].reshape(-1).view(torch.uint8)), n


# ---------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("given_centers", [True, False])
@pytest.mark.parametrize("bits", [(1, 1), (2, 3), (4, 5), (6, 7)])
def test_a_model_comes_back_to_the_bit(dtype: torch.dtype, given_centers: bool, bits: Any, tmp_path: Path) -> None:
    net, centers = quantized(bits=bits, dtype=dtype)
    file = tmp_path / "m.safetensors"
    written = save_quantized(net, file, centers if given_centers else None)
    if given_centers or max(bits) < 6:  # above, packing them is not always smaller
        assert [r.name for r in written.layers] == list(centers)
    other, _ = quantized(seed=1, dtype=dtype)
    read = load_quantized(other, file)
    same_bits(net.state_dict(), other.state_dict())
    assert str(read) == str(describe_quantized(file)) == str(written)
    assert read == describe_quantized(file)
    assert torch.equal(other.unsaved, torch.ones(2))
    state = quantized_state_dict(file)
    same_bits(dict(sorted(net.state_dict().items())), dict(sorted(state.items())))


@given(st.integers(1, 256), st.integers(1, 40), st.integers(0, 2**31))
def test_any_number_of_centres_and_weights(m: int, n: int, seed: int) -> None:
    """Centres that no weight has, one centre, codes that end within a byte."""
    g = torch.Generator().manual_seed(seed)
    c = torch.randn(m, generator=g).unique()
    module = nn.Module()
    module.w = nn.Parameter(c[torch.randint(len(c), (n,), generator=g)])
    file = Path(os.environ.get("TMPDIR", "/tmp")) / f"quantized-{os.getpid()}.safetensors"
    try:
        written = save_quantized(module, file, {"w": c})
        assert torch.equal(quantized_state_dict(file)["w"], module.w.detach())
        assert written.layers[0].bits == max(math.ceil(math.log2(len(c))), 1)
        assert written.num_bytes == file.stat().st_size
    finally:
        file.unlink(missing_ok=True)


def test_any_safetensors_reader_reads_it(tmp_path: Path) -> None:
    """And finds indices and centres where the format says they are."""
    net, centers = quantized()
    save_quantized(net, tmp_path / "m", centers)
    found = safetensors.torch.load_file(tmp_path / "m")
    assert torch.equal(found["__centers__"], torch.cat(list(centers.values())))
    packed = ops.packed_size(net.one.weight.numel(), 2)
    index = ops.unpack(found["__index__"][:packed], 2, net.one.weight.numel())
    assert torch.equal(centers["one.weight"][index.long()].view_as(net.one.weight), net.one.weight)
    assert len(found["__index__"]) == packed + ops.packed_size(net.two.weight.numel(), 3)
    assert torch.equal(found["norm.weight"], net.norm.weight)
    assert found["norm.num_batches_tracked"].dtype == torch.int64
    with safetensors.safe_open(tmp_path / "m", "pt") as f:
        meta = f.metadata()
    assert meta["quantized"] == "1"
    assert json.loads(meta["layers"])[0] == ["one.weight", [8, 3, 3, 3], "F32", 2, 4]


def test_the_same_model_gives_the_same_file(tmp_path: Path) -> None:
    net, centers = quantized()
    for name, c in (("a", centers), ("b", None), ("c", dict(reversed(centers.items())))):
        save_quantized(net, tmp_path / name, c)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


def test_a_shared_parameter_is_stored_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self, tied: bool = True) -> None:
            super().__init__()
            self.embed = nn.Embedding(100, 16)
            self.out = nn.Linear(16, 100)
            if tied:
                self.out.weight = self.embed.weight

    net = Tied()
    net.embed.weight.data = net.embed.weight.data.sign()
    written = save_quantized(net, tmp_path / "m")
    assert written.tied == {"out.weight": "embed.weight"}
    assert written.layers[0].num_bytes == 100 * 16 / 8 + 8
    for tied in (True, False):
        other = Tied(tied)
        load_quantized(other, tmp_path / "m")
        same_bits(net.state_dict(), other.state_dict())
        assert (other.out.weight is other.embed.weight) == tied
    apart = Tied(False)
    save_quantized(apart, tmp_path / "apart")
    before = {n: t.clone() for n, t in net.state_dict().items()}
    with pytest.raises(SchemaMismatchError, match=r"same values of 'embed.weight' and 'out.weight', which Tied shares"):
        load_quantized(net, tmp_path / "apart")
    assert_same(before, net.state_dict())


def test_weights_that_are_not_contiguous(tmp_path: Path) -> None:
    net, _ = quantized()
    net.one.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    save_quantized(net, tmp_path / "m")
    other = Net()
    load_quantized(other, tmp_path / "m")
    assert torch.equal(other.one.weight, net.one.weight)
    load_quantized(net, tmp_path / "m")
    assert torch.equal(other.one.weight, net.one.weight)


# ------------------------------------------------------------------------------------------------------- size


@pytest.mark.parametrize(("bits", "ratio"), [(1, 28.0), (2, 14.0), (4, 7.0)])
def test_size_on_the_quantised_layers(bits: int, ratio: float, tmp_path: Path) -> None:
    """Of a small CNN: indices, centres, and the layers' part of the header counted; the file is no larger than it says."""
    net = nn.Sequential(
        nn.Conv2d(3, 16, 5), nn.Conv2d(16, 32, 5), nn.Flatten(), nn.Linear(800, 128), nn.Linear(128, 10)
    )
    for i in (1, 3):
        w = net[i].weight
        w.data.copy_(torch.linspace(-1, 1, 2**bits)[torch.randint(2**bits, w.shape)])
    written = save_quantized(net, tmp_path / "m")
    assert [r.bits for r in written.layers] == [bits, bits]
    dense = 4 * (16 * 32 * 25 + 800 * 128)
    assert written.layers_ratio >= ratio
    rest = 4 * (16 * 75 + 16 + 32 + 128 + 1280 + 10)
    assert written.num_bytes == (tmp_path / "m").stat().st_size
    assert written.layers_bytes == pytest.approx(dense / written.layers_ratio)
    assert 0 <= written.num_bytes - written.layers_bytes - rest < 1200  # the header's other parts
    assert written.float_bytes == dense + rest
    assert written.ratio == pytest.approx((dense + rest) / written.num_bytes)
    assert f"{written.ratio:.1f} times smaller than float32" in str(written)


def test_what_is_found_without_centres(tmp_path: Path) -> None:
    """Few values, and only where packing them is smaller and gives the same bits."""
    module = nn.Module()
    values = torch.randn(300).sort().values
    module.few = nn.Parameter(values[:256][torch.arange(4096) % 256].view(64, 64))
    module.many = nn.Parameter(values[torch.arange(9000) % 300].view(90, 100))
    module.late = nn.Parameter(torch.cat([torch.zeros(4096), values[:256].sort().values]).view(-1, 32))
    module.zeros = nn.Parameter(torch.tensor([0.0, -0.0, 1.0]).repeat(100).view(10, 30))
    module.vector = nn.Parameter(torch.ones(4096))
    module.tiny = nn.Parameter(torch.ones(2, 2))
    module.nan = nn.Parameter(torch.full((64, 64), torch.nan))
    module.codes = nn.Parameter(torch.ones(64, 64, dtype=torch.int64), requires_grad=False)
    written = save_quantized(module, tmp_path / "m")
    assert [(r.name, r.bits) for r in written.layers] == [("few", 8)]
    same_bits(dict(sorted(module.state_dict().items())), dict(sorted(quantized_state_dict(tmp_path / "m").items())))


def test_a_model_without_quantised_layers(tmp_path: Path) -> None:
    written = save_quantized(nn.Linear(5, 3), tmp_path / "m")
    assert written.layers == [] and written.layers_ratio == 1.0
    assert len(quantized_state_dict(tmp_path / "m")) == 2
    none = nn.ParameterDict({"weight": torch.ones(3, 0)})
    nothing = save_quantized(none, tmp_path / "m", {"weight": torch.tensor([0.0, 1.0])})
    assert [r.numel for r in nothing.layers] == [0] and nothing.layers_ratio == 1.0
    assert "quantised layers" in str(nothing)
    empty = save_quantized(nn.ReLU(), tmp_path / "e")
    assert quantized_state_dict(tmp_path / "e") == {} and "0 other tensors" in str(empty)


# ------------------------------------------------------------------------------------------------- not written


def test_what_is_not_written(tmp_path: Path) -> None:
    net, centers = quantized()
    file = tmp_path / "m"
    save_quantized(net, file, centers)
    before = file.read_bytes()

    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"steps": 1}

        def set_extra_state(self, state: Any) -> None: ...

    clash = nn.Module()
    clash.register_buffer("__index__", torch.zeros(1))
    sparse = nn.Module()
    sparse.register_buffer("s", torch.eye(3).to_sparse())
    moved = {**centers, "one.weight": centers["one.weight"] + 1e-7}
    for module, c, message in (
        (net, moved, "Expected the weights of 'one.weight' to be among its 4 centres"),
        (net, {"three.weight": centers["one.weight"]}, "'three.weight' is none of"),
        (net, {"one.weight": torch.randn(300)}, "Expected 1 to 256 finite centres of floating weights of 'one.weight'"),
        (net, {"one.weight": torch.tensor([0.0, math.nan])}, "finite centres"),
        (net, {"mask": torch.tensor([0.0, 1.0])}, "floating weights of 'mask'"),
        (Extra(2, 2), None, "dense tensors of a common dtype, but '_extra_state' is dict"),
        (sparse, None, "dense tensors of a common dtype, but 's' is torch.float32 torch.sparse_coo"),
        (clash, None, "Expected no tensor called '__index__'"),
        (nn.Linear(2, 2, device="meta"), None, "on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            save_quantized(module, file, c)
    with pytest.raises(FileNotFoundError):
        save_quantized(net, tmp_path / "nowhere" / "m")
    assert file.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["m"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, centers = quantized()
    save_quantized(net, tmp_path / "m", centers)
    before = (tmp_path / "m").read_bytes()

    def fails(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(KeyboardInterrupt):
        save_quantized(Net(), tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["m"]


# ---------------------------------------------------------------------------------------------------- not read


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda n: setattr(n, "two", nn.Linear(8, 30, bias=False)),
            r"Expected 'two.weight' of shape \(30, 8\), as in Net, but the file has \(31, 8\)",
        ),
        (lambda n: setattr(n, "two", nn.Linear(8, 31)), "Expected 'two.bias' of Net, but the file has none"),
        (lambda n: delattr(n, "out"), "but the file has 'out.bias' too"),
        (lambda n: n.two.half(), r"Expected 'two.weight' of torch.float16, as in Net, but the file has torch.float32"),
        (
            lambda n: n.norm.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.int32)),
            "of torch.int32, as in Net, but the file has torch.int64",
        ),
        (
            lambda n: setattr(n, "two", nn.Linear(8, 31, bias=False, device="meta")),
            "'two.weight' of Net is on the meta device",
        ),
    ],
)
def test_another_architecture_is_refused(change: Callable[[Net], Any], message: str, tmp_path: Path) -> None:
    net, centers = quantized()
    save_quantized(net, tmp_path / "m", centers)
    other = Net()
    change(other)
    before = {n: t.clone() for n, t in other.state_dict().items() if not t.is_meta}
    with pytest.raises(SchemaMismatchError, match=message):
        load_quantized(other, tmp_path / "m")
    same_bits(before, {n: t for n, t in other.state_dict().items() if not t.is_meta})


@pytest.fixture(scope="module")
def payload(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    net, centers = quantized()
    file = tmp_path_factory.mktemp("file") / "m"
    save_quantized(net, file, centers)
    return file.read_bytes()


def reads(payload: bytes, tmp_path: Path) -> None:
    file = tmp_path / "changed"
    file.write_bytes(payload)
    other = Net()
    before = {n: t.clone() for n, t in other.state_dict().items()}
    for read in (quantized_state_dict, lambda f: load_quantized(other, f)):
        try:
            read(file)
        except PayloadError:
            same_bits(before, other.state_dict())
            raise


def test_files_that_are_cut_short_or_changed(payload: bytes, tmp_path: Path) -> None:
    reads(payload, tmp_path)
    for end in [0, 1, 7, 8, 40, 100, 1000, len(payload) - 1]:
        with pytest.raises(TruncatedPayloadError):
            reads(payload[:end], tmp_path)
    with pytest.raises((TruncatedPayloadError, ChecksumError)):
        reads(payload + b"\0", tmp_path)
    g = torch.Generator().manual_seed(0)
    for place in [*range(8), *torch.randint(len(payload), (200,), generator=g).tolist(), len(payload) - 1]:
        changed = bytearray(payload)
        changed[place] ^= 1 << (place % 8)
        with pytest.raises(PayloadError):
            reads(bytes(changed), tmp_path)


def resealed(
    payload: bytes,
    header: Callable[[dict[str, Any]], Any] | None = None,
    data: Callable[[bytearray], Any] | None = None,
) -> bytes:
    """The file of somebody who knows the format: another header or other data, and the right checksum."""
    size = int.from_bytes(payload[:8], "little")
    entries, body = json.loads(payload[8 : 8 + size]), bytearray(payload[8 + size :])
    if header is not None:
        header(entries)
    if data is not None:
        data(body)
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out = bytearray(len(text).to_bytes(8, "little") + text + body)
    out[CRC] = b"0" * 8
    out[CRC] = f"{zlib.crc32(out):08x}".encode()
    return bytes(out)


def layers(change: Callable[[list[Any]], Any]) -> Callable[[dict[str, Any]], None]:
    def edit(entries: dict[str, Any]) -> None:
        rows = json.loads(entries["__metadata__"]["layers"])
        change(rows)
        entries["__metadata__"]["layers"] = json.dumps(rows, separators=(",", ":"))

    return edit


def meta(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda entries: entries["__metadata__"].update(values)


HEADERS: dict[str, Any] = {
    "version": (meta(quantized="2"), "Expected format version 1, but got '2'"),
    "metadata": (meta(more="x"), "metadata"),
    "metadata of numbers": (meta(tied=3), "metadata"),
    "layers": (meta(layers="{}"), "table of layers"),
    "layers that are no JSON": (meta(layers="[[]"), "not JSON"),
    "spaces": (lambda e: e["__metadata__"].update(layers=" " + e["__metadata__"]["layers"]), "canonical"),
    "nine bits": (layers(lambda r: r[0].__setitem__(3, 9)), "1 to 8 bits"),
    "no bits": (layers(lambda r: r[0].__setitem__(3, 0)), "1 to 8 bits"),
    "more bits than centres": (layers(lambda r: r[0].__setitem__(3, 3)), "as many centres"),
    "too many centres": (layers(lambda r: r[0].__setitem__(4, 5)), "as many centres"),
    "fewer centres": (layers(lambda r: r[0].__setitem__(4, 3)), "Expected 11 x F32 in __centers__"),
    "another shape": (layers(lambda r: r[0].__setitem__(1, [8, 3, 3, 4])), "x U8 in __index__"),
    "huge": (layers(lambda r: r[0].__setitem__(1, [2**40, 2**10])), "x U8 in __index__"),
    "more than huge": (layers(lambda r: r[0].__setitem__(1, [2**47, 2**47])), "Expected a shape"),
    "negative": (layers(lambda r: r[0].__setitem__(1, [-8, -3, 3, 3])), "Expected a shape"),
    "a float size": (layers(lambda r: r[0].__setitem__(1, [8.0, 3, 3, 3])), "Expected a shape"),
    "integer weights": (layers(lambda r: r[0].__setitem__(2, "I32")), "floating dtype"),
    "a dtype that is a list": (layers(lambda r: r[0].__setitem__(2, ["F32"])), "floating dtype"),
    "a layer twice": (layers(lambda r: r[1].__setitem__(0, "one.weight")), "every tensor once"),
    "a layer that is plain too": (layers(lambda r: r[1].__setitem__(0, "out.weight")), "every tensor once"),
    "a name of the format's": (layers(lambda r: r[1].__setitem__(0, "__index__")), "every tensor once"),
    "a short row": (layers(lambda r: r[0].pop()), "table of layers"),
    "another order": (layers(lambda r: r.reverse()), "by name"),
    "no layers": (layers(lambda r: r.clear()), "only with them"),
    "tied to nothing": (meta(tied='{"a":"b"}'), "tied names"),
    "tied to itself": (meta(tied='{"one.weight":"one.weight"}'), "tied names"),
    "tied lists": (meta(tied='{"a":["one.weight"]}'), "tied names"),
    "dtype": (lambda e: e["out.bias"].update(dtype="F31"), "known dtype"),
    "shape": (lambda e: e["out.bias"].update(shape=[5]), "spans"),
    "huge tensor": (lambda e: e["out.bias"].update(shape=[2**44], data_offsets=[0, 2**46]), "spans|hold"),
    "overlap": (lambda e: e["out.bias"].update(data_offsets=[0, 16]), "spans"),
    "entry": (lambda e: e["out.bias"].pop("shape"), "dtype, shape and data_offsets"),
    "an entry that is a list": (lambda e: e.update({"out.bias": []}), "dtype, shape and data_offsets"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_contradict_themselves(name: str, payload: bytes, tmp_path: Path) -> None:
    change, message = HEADERS[name]
    with pytest.raises(MalformedPayloadError, match=message):
        reads(resealed(payload, change), tmp_path)


def test_the_header_itself(payload: bytes, tmp_path: Path) -> None:
    size = int.from_bytes(payload[:8], "little")
    for claimed, error in (
        (2**63, MalformedPayloadError),
        (2**24 + 8, MalformedPayloadError),
        (2**20, TruncatedPayloadError),
    ):
        with pytest.raises(error):
            reads(claimed.to_bytes(8, "little") + payload[8:], tmp_path)
    for text in (b"[]", b"{}", b'{"__metadata__":1}', b"nothing", b"[" * 5000, b'{"a":1,"a":2}'):
        body = text + b" " * (size - len(text)) if len(text) <= size else text
        with pytest.raises(PayloadError):
            reads(len(body).to_bytes(8, "little") + body + payload[8 + size :], tmp_path)
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(MalformedPayloadError, match="Expected a file of quantised weights, but it starts with"):
        describe_quantized(tmp_path / "other")


def at(payload: bytes, name: str) -> tuple[int, int]:
    size = int.from_bytes(payload[:8], "little")
    return tuple(json.loads(payload[8 : 8 + size])[name]["data_offsets"])  # type: ignore[return-value]


def test_values_that_cannot_be(payload: bytes, tmp_path: Path) -> None:
    start, stop = at(payload, "__centers__")
    first = slice(start, start + 4)
    for bits, error, message in (
        (b"\x00\x00\xc0\x7f", NonFiniteError, "finite centres of 'one.weight'"),
        (b"\x00\x00\x80\xff", NonFiniteError, "finite centres of 'one.weight'"),
        (b"\x00\x00\x80\x7e", MalformedPayloadError, "centres of 'one.weight' to be ascending"),
    ):
        changed = resealed(payload, data=lambda body, bits=bits: body.__setitem__(first, bits))  # type: ignore[misc]
        with pytest.raises(error, match=message):
            reads(changed, tmp_path)
        (tmp_path / "x").write_bytes(changed)
        with pytest.raises(error, match=message):
            describe_quantized(tmp_path / "x")
    equal = resealed(payload, data=lambda body: body.__setitem__(slice(start + 4, start + 8), body[first]))
    with pytest.raises(MalformedPayloadError, match="ascending"):
        reads(equal, tmp_path)
    mask = at(payload, "mask")[0]
    with pytest.raises(MalformedPayloadError, match="0 or 1 in 'mask'"):
        reads(resealed(payload, data=lambda body: body.__setitem__(mask, 2)), tmp_path)
    assert stop - start == 4 * 12


def test_indices_without_a_centre(tmp_path: Path) -> None:
    """Three centres at two bits: the fourth code, and a bit after the last."""
    module = nn.Module()
    module.w = nn.Parameter(torch.tensor([-1.0, 0.0, 1.0]).repeat(11).view(3, 11))
    save_quantized(module, tmp_path / "m", {"w": torch.tensor([-1.0, 0.0, 1.0])})
    payload = (tmp_path / "m").read_bytes()
    start, stop = at(payload, "__index__")
    with pytest.raises(MalformedPayloadError, match="indices of 'w' below its 3 centres, but got 3"):
        (tmp_path / "x").write_bytes(resealed(payload, data=lambda body: body.__setitem__(start, 0xFF)))
        quantized_state_dict(tmp_path / "x")
    with pytest.raises(MalformedPayloadError, match="zeros after the last index of 'w'"):
        (tmp_path / "x").write_bytes(
            resealed(payload, data=lambda body: body.__setitem__(stop - 1, body[stop - 1] | 0x80))
        )
        quantized_state_dict(tmp_path / "x")


@given(st.binary(max_size=300), st.integers(0, 400))
def test_noise(noise: bytes, place: int) -> None:
    """Whatever the bytes: an error of the package's own."""
    from dynfed_lightning._quantized_format import decode, parse

    module = nn.Linear(3, 3)
    file = Path(os.environ.get("TMPDIR", "/tmp")) / f"quantized-noise-{os.getpid()}.safetensors"
    save_quantized(module, file)
    payload = bytearray(file.read_bytes())
    file.unlink()
    payload[place : place + len(noise)] = noise
    payload[CRC] = b"0" * 8
    payload[CRC] = f"{zlib.crc32(payload):08x}".encode()
    try:
        decode(bytes(payload), parse(bytes(payload)))
    except PayloadError:
        pass


def test_centres_that_are_infinite_in_the_dtype_of_the_weights(tmp_path: Path) -> None:
    """Neither written nor read, though float32 holds them."""
    module = nn.Linear(64, 64, bias=False).half()
    c = torch.tensor([0.0, 7e4])
    with torch.no_grad():
        module.weight.copy_(c[torch.arange(64 * 64).view(64, 64) % 2])
    assert module.weight.isinf().any()
    with pytest.raises(ValueError, match="Expected 1 to 256 finite centres of floating weights of 'weight'"):
        save_quantized(module, tmp_path / "m", {"weight": c})
    with torch.no_grad():
        module.weight.copy_(torch.tensor([0.0, 6e4])[torch.arange(64 * 64).view(64, 64) % 2])
    written = save_quantized(module, tmp_path / "m")
    data = (tmp_path / "m").read_bytes()
    place = data.index(torch.tensor([written.layers[0].centers[1]]).numpy().tobytes())
    changed = bytearray(data[:place] + c[1:].numpy().tobytes() + data[place + 4 :])
    changed[CRC] = b"0" * 8
    changed[CRC] = f"{zlib.crc32(bytes(changed)):08x}".encode()
    (tmp_path / "m").write_bytes(bytes(changed))
    with pytest.raises(NonFiniteError, match="Expected finite centres of 'weight'"):
        quantized_state_dict(tmp_path / "m")
