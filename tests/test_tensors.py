from __future__ import annotations

import pytest
import torch
from toys import NormNet

from dynfed_lightning.seeds import derive_seed
from dynfed_lightning.store import MemoryStore
from dynfed_lightning.tensors import added, difference, load_weights, travelling, weighted_mean, weights_of


def test_what_travels() -> None:
    net = NormNet()
    live, raw = travelling(net)
    assert [n for n in live if n in raw] == ["body.1.running_mean", "body.1.running_var"]
    assert "frozen.weight" not in live and "body.1.num_batches_tracked" not in live
    assert live["body.0.weight"] is net.body[0].weight


def test_copies_and_loading() -> None:
    net, other = NormNet(), NormNet()
    copies = weights_of(net)
    copies["body.0.weight"].fill_(7)
    assert not torch.equal(net.body[0].weight, copies["body.0.weight"])
    load_weights(other, {**copies, "more": torch.zeros(1)})
    assert torch.equal(other.body[0].weight, copies["body.0.weight"])
    del copies["body.0.bias"]
    with pytest.raises(KeyError, match="body.0.bias"):
        load_weights(other, copies)


def test_arithmetic_by_hand() -> None:
    a, b = {"w": torch.tensor([3.0, 5.0])}, {"w": torch.tensor([1.0, 1.0]), "x": torch.ones(1)}
    assert difference(a, b)["w"].tolist() == [2.0, 4.0]
    assert added(b, a)["w"].tolist() == [4.0, 6.0] and added(b, a)["x"].tolist() == [1.0]
    assert weighted_mean([a, b], [3, 1], names=["w"])["w"].tolist() == [2.5, 4.0]


def test_mean_is_rounded_once() -> None:
    """Float32 sums of 1 and many 2^-25 would lose every one of them."""
    parts = [{"w": torch.tensor([1.0])}] + [{"w": torch.tensor([2.0**-25])}] * 1023
    mean = weighted_mean(parts, [1] * 1024)["w"]
    assert mean.item() == pytest.approx((1 + 1023 * 2**-25) / 1024, rel=6e-8)


def test_bad_weights() -> None:
    with pytest.raises(ValueError, match="at least one update"):
        weighted_mean([], [])
    with pytest.raises(ValueError, match="positive number, but got 0.0"):
        weighted_mean([{"w": torch.ones(1)}], [0])


def test_seeds_are_fixed_for_ever() -> None:
    """A checkpoint of one version must resume under the next."""
    assert derive_seed(0, "client", 3, 7) == derive_seed(0, "client", 3, 7) < 2**63
    assert len({derive_seed(s, p, r, k) for s in range(3) for p in "ab" for r in range(5) for k in range(20)}) == 600
    assert derive_seed(1, "1") != derive_seed("1", 1)
    assert derive_seed(0, "client", 0, 0) == 3394060149678184655


def test_store_keeps_the_old_state_until_the_new_one_is_written() -> None:
    store = MemoryStore()
    store.write(3, {"a": {"t": torch.ones(2)}, "list": [1]})
    copy = store.read(3)
    copy["a"]["t"] = torch.zeros(2)
    copy["list"].append(2)
    assert store.read(3)["a"]["t"].tolist() == [1, 1] and store.read(3)["list"] == [1]
    store.write(3, copy)
    assert store.read(3)["a"]["t"].tolist() == [0, 0]
    other = MemoryStore()
    other.load_state_dict(store.state_dict())
    assert list(other) == [3] and other.read(3)["list"] == [1, 2]
    store.write(3, {})
    assert len(store) == 0 and store.read(3) == {}
