from __future__ import annotations

import pytest
import torch

from dynfed_lightning import ClientFailure, Codec, Quantize
from dynfed_lightning.downlink import DownlinkReceiver, DownlinkSender
from dynfed_lightning.schema import Schema
from dynfed_lightning.tensors import Tensors


def _walk(rounds: int) -> list[Tensors]:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(4000, generator=g)
    out = []
    for _ in range(rounds):
        out.append({"w": w.clone(), "b": torch.ones(3)})
        w = w + 0.01 * torch.randn(4000, generator=g)
    return out


def _send(
    sender: DownlinkSender, states: dict[int, dict], receiver: DownlinkReceiver, r: int, w: Tensors, who: list[int]
) -> dict[int, tuple[str, int, int]]:
    schema = Schema.of(w)
    reference = sender.prepare(w, schema, r, seed=r)
    seen = {}
    for k in who:
        d = sender.download(k)
        got = receiver.receive(d.kind, d.base, d.parts, schema, r, states.setdefault(k, {}))
        for n in w:
            assert torch.equal(got[n], reference[n])
        sender.confirm(k, received=True)
        seen[k] = (d.kind, len(d.parts), sum(map(len, d.parts)))
    return seen


def test_missed_rounds_are_caught_up_by_differences_or_dense() -> None:
    codec = Codec(Quantize(4))
    sender, receiver, states = DownlinkSender(codec), DownlinkReceiver(codec), {}
    plan = [[0, 1], [0], [0, 1], [0], [0], [0], [0], [0], [0], [0], [0, 1, 2]]
    seen = [_send(sender, states, receiver, r, w, who) for r, (w, who) in enumerate(zip(_walk(11), plan, strict=True))]
    assert seen[0][0][0] == "full" and seen[1][0][:2] == ("difference", 1)
    assert seen[2][1][:2] == ("difference", 2)  # missed one round: two differences, still cheaper than dense
    assert seen[10][1][:2] == ("full", 1)  # missed seven: eight differences at 4 bits are no cheaper
    assert seen[10][2][0] == "full"  # a newcomer
    assert seen[1][0][2] < 0.15 * seen[0][0][2]


def test_error_does_not_build_up() -> None:
    """Two bits a round for 30 rounds: what one round loses the next one's difference holds."""
    codec = Codec(Quantize(2))
    sender, receiver, states = DownlinkSender(codec), DownlinkReceiver(codec), {}
    errors = []
    for r, w in enumerate(_walk(30)):
        _send(sender, states, receiver, r, w, [0])
        errors.append(float((states[0]["downlink"]["tensors"]["w"] - w["w"]).norm()))
    assert max(errors[20:]) < 3 * max(errors[2:10]) and errors[-1] < 0.1 * float(_walk(1)[0]["w"].norm())


def test_client_that_failed_gets_dense_weights() -> None:
    codec = Codec(Quantize(4))
    sender, receiver, states = DownlinkSender(codec), DownlinkReceiver(codec), {}
    w = _walk(2)
    _send(sender, states, receiver, 0, w[0], [0])
    sender.confirm(0, received=False)
    assert _send(sender, states, receiver, 1, w[1], [0])[0][0] == "full"


def test_stale_base_is_refused() -> None:
    codec = Codec(Quantize(4))
    sender, receiver, states = DownlinkSender(codec), DownlinkReceiver(codec), {}
    w = _walk(2)
    _send(sender, states, receiver, 0, w[0], [0])
    sender.prepare(w[1], Schema.of(w[1]), 1, seed=1)
    d = sender.download(0)
    assert d.kind == "difference"
    for held in ({}, {"downlink": {**states[0]["downlink"], "round": 7}}):
        with pytest.raises(ClientFailure, match="Expected differences to round") as caught:
            receiver.receive(d.kind, d.base, d.parts, Schema.of(w[1]), 1, held)
        assert caught.value.reason == "stale_base"


def test_lossless_downlink_is_dense_and_remembers_nothing() -> None:
    sender, receiver, states = DownlinkSender(Codec()), DownlinkReceiver(Codec()), {}
    for r, w in enumerate(_walk(3)):
        assert _send(sender, states, receiver, r, w, [0])[0][:2] == ("full", 1)
    assert sender.state_dict() == {} and states == {0: {}}


def test_state_survives_a_checkpoint(tmp_path: object) -> None:
    import io

    codec = Codec(Quantize(4))
    a, receiver, states = DownlinkSender(codec), DownlinkReceiver(codec), {}
    w = _walk(4)
    for r in range(3):
        _send(a, states, receiver, r, w[r], [0])
    buffer = io.BytesIO()
    torch.save(a.state_dict(), buffer)
    buffer.seek(0)
    b = DownlinkSender(codec)
    b.load_state_dict(torch.load(buffer, weights_only=True))
    for sender in (a, b):
        sender.prepare(w[3], Schema.of(w[3]), 3, seed=3)
    assert a.download(0) == b.download(0) and a.download(0).kind == "difference"
    assert a.download(9) == b.download(9)
