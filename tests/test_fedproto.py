"""FedProto: prototypes by hand, what travels and what it costs, heterogeneous models."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from toys import CLASSES, WIDTH, assert_same, blobs, data_module, run, skewed, weights

from dynfed_lightning import (
    IID,
    ClientModule,
    Codec,
    FederatedDataModule,
    Federation,
    FedProto,
    Local,
    LoopLocal,
    Quantize,
    TrainerLocal,
)
from dynfed_lightning.algorithms.fedproto import PrototypeTerm
from dynfed_lightning.errors import PayloadError, RoundFailure
from dynfed_lightning.schema import Schema
from dynfed_lightning.stages import SkipZeros

SIZE = 5


class Net(nn.Module):
    """``head(features(x))``, embeddings of 5."""

    def __init__(self, hidden: int = 8, seed: int = 0, size: int = SIZE) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.features = nn.Sequential(nn.Linear(WIDTH, hidden), nn.Tanh(), nn.Linear(hidden, size))
            self.head = nn.Linear(size, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def module(**kwargs: Any) -> ClientModule:
    return ClientModule(Net(), **{"lr": 0.1, **kwargs})


def federation_of(algorithm: Any, local: Any = "loop", rounds: int = 2, data: Any = None, **kwargs: Any) -> Federation:
    federation = Federation(module(), algorithm, local=local)
    run(federation, data or data_module(4, skewed(4, 1.0)), rounds=rounds, **kwargs)
    assert federation.last_round is not None and federation.last_round.failures == {}
    return federation


def by_rows(rows: list[Tensor], x: Tensor, y: Tensor) -> FederatedDataModule:
    class Given(IID):
        def __call__(self, labels: Any, seed: int) -> list[Tensor]:
            return rows

    return FederatedDataModule((x, y), Given(len(rows)), test=(x, y), batch_size=len(x))


def test_two_rounds_by_hand() -> None:
    """Clients with classes {0, 1} and {1, 2}, one full-batch step a round: losses, eq. 3 and eq. 6 in float64."""
    x, y = blobs(24)
    rows = [torch.nonzero(y != 2).flatten()[:10], torch.nonzero(y != 0).flatten()]
    federation = federation_of(FedProto(weight=0.5), data=by_rows(rows, x, y))
    nets = [Net().double(), Net().double()]
    prototypes: dict[int, Tensor] = {}
    for _ in range(2):
        local: list[tuple[Tensor, Tensor]] = []
        for net, r in zip(nets, rows, strict=True):
            a, b = x[r].double(), y[r]
            z = net.features(a)
            distance = sum(((z[i] - prototypes[int(c)]) ** 2).sum() for i, c in enumerate(b) if int(c) in prototypes)
            loss = F.cross_entropy(net.head(z), b) + 0.5 * distance / (len(r) * SIZE)
            grads = torch.autograd.grad(loss, list(net.parameters()))
            with torch.no_grad():
                for p, g in zip(net.parameters(), grads, strict=True):
                    p -= 0.1 * g
            local.append((net.features(a).detach(), b))
        for c in range(CLASSES):
            everyone = [z[b == c] for z, b in local if bool((b == c).any())]
            prototypes[c] = torch.cat(everyone).mean(0)  # weighted by samples: the mean over all rows
    assert federation.server is not None
    for c in range(CLASSES):
        got = federation.server.state["prototypes"][f"prototype/{c}"]
        torch.testing.assert_close(got.double(), prototypes[c], rtol=0, atol=1e-5)
    for k, net in enumerate(nets):
        for t, p in zip(federation.store.read(k)["models"].values(), net.parameters(), strict=True):
            torch.testing.assert_close(t.double(), p.detach(), rtol=0, atol=1e-5)


def test_without_weight_it_is_local_training() -> None:
    proto, local = federation_of(FedProto(weight=0.0), rounds=3), federation_of(Local(), rounds=3)
    for k in range(4):
        assert_same(proto.store.read(k)["models"], local.store.read(k)["weights"])
    assert_same(weights(proto), weights(Federation(module())))  # the global module stays where it was


def test_both_executors_and_a_weight_that_acts() -> None:
    loop, trainer = (federation_of(FedProto(weight=2.0), local=x) for x in (LoopLocal(), TrainerLocal()))
    for k in range(4):
        assert_same(loop.store.read(k)["models"], trainer.store.read(k)["models"])
    free = federation_of(FedProto(weight=0.0))

    def spread(f: Federation) -> float:
        """How far clients' prototypes are from each other after two rounds."""
        x, y = blobs()
        each = []
        for k in range(4):
            m = module()
            m.load_state_dict(f.store.read(k)["models"])
            each.append(torch.stack([m.model.features(x[y == c]).mean(0) for c in range(CLASSES)]))  # type: ignore[operator, union-attr]
        return float(torch.stack(each).detach().var(0).sum())

    assert spread(loop) < 0.8 * spread(free)


# ------------------------------------------------------------------------------------------------------ what travels


def test_only_prototypes_travel_and_classes_one_has_not_cost_nothing() -> None:
    x, y = blobs(60)
    y = torch.where(y == 2, 1, y)  # nobody has class 2
    y[-1] = 2
    rows = [torch.nonzero(y == 0).flatten(), torch.nonzero(y == 1).flatten(), torch.nonzero(y < 2).flatten()]
    federation = Federation(ClientModule(Net(size=400), lr=0.1), FedProto(), local="loop")
    run(federation, by_rows(rows, x, y), rounds=2)
    assert federation.last_round is not None and federation.last_round.failures == {}
    up = [c.bytes_up for c in federation.last_round.clients]
    assert abs(up[1] - up[0]) < 20 and abs(up[2] - up[0] - 4 * 400) < 20
    down = [c.bytes_down for c in federation.last_round.clients]
    assert all(2 * 4 * 400 < d < 2 * 4 * 400 + 800 for d in down)
    assert federation.server is not None and not federation.server.state["prototypes"]["prototype/2"].any()
    eight = Federation(ClientModule(Net(size=400), lr=0.1), FedProto(uplink=8), local="loop")
    run(eight, by_rows(rows, x, y), rounds=2)
    assert eight.last_round is not None and eight.last_round.clients[2].bytes_up < up[2] - 2 * 3 * 380


def test_a_class_that_the_round_lacks_keeps_its_prototype() -> None:
    x, y = blobs(60)
    rows = [torch.nonzero(y == 0).flatten(), torch.nonzero(y > 0).flatten()]
    data = by_rows(rows, x, y)
    data.clients_per_round = 1
    federation = Federation(module(), FedProto(), local="loop")
    seen: list[tuple[list[int], dict[str, Tensor]]] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            assert federation.server is not None
            seen.append((federation.server.cohort, federation.server.state["prototypes"]))

    run(federation, data, rounds=6, callbacks=[Watch()])
    assert {c[0] for c, _ in seen} == {0, 1}
    for (_, before), (cohort, after) in itertools.pairwise(seen):
        kept, changed = (["prototype/1", "prototype/2"], ["prototype/0"])[:: 1 if cohort == [0] else -1]
        assert all(torch.equal(before[n], after[n]) for n in kept)
        assert all(not torch.equal(before[n], after[n]) for n in changed)


def test_skip_zeros_is_lossless_and_sound() -> None:
    tensors = {"a": torch.zeros(7), "b": torch.tensor([0.0, 2.0]), "c": torch.tensor([-0.0]), "d": torch.zeros(3)}
    codec, schema = Codec(SkipZeros()), Schema.of(tensors)
    payload = codec.encode(tensors)
    back = codec.decode(payload, schema)
    for n, t in tensors.items():
        assert torch.equal(back[n], t) and torch.equal(torch.signbit(back[n]), torch.signbit(t))
    everything = {n: torch.ones_like(t) for n, t in tensors.items()}
    assert len(codec.encode(everything)) - len(payload) >= 4 * 10 - 8
    nothing = codec.decode(codec.encode({"a": torch.zeros(2)}), Schema.of({"a": torch.zeros(2)}))
    assert not nothing["a"].any()
    for meta in ("01", "0120", 3, None, "0101 "):
        with pytest.raises(PayloadError, match="Expected a 0 or 1 for each of 4 tensors"):
            SkipZeros().layout(tuple(range(4)), meta)  # type: ignore[arg-type]
    chained = Codec(SkipZeros(), Quantize(8))
    wide = {"a": torch.zeros(600), "b": torch.linspace(-1, 1, 600)}
    decoded = chained.decode_full(chained.encode(wide), Schema.of(wide))
    assert decoded.bits == {"a": None, "b": 8} and set(decoded.steps()) == {"b"} and not decoded.tensors["a"].any()


# ------------------------------------------------------------------------------------------------- models and resume


def test_models_may_differ() -> None:
    for models in ({k: Net(3 + k, seed=k) for k in range(4)}, lambda k: Net(3 + k)):
        federation = federation_of(FedProto(models=models), rounds=1)  # type: ignore[arg-type]
        shapes = [federation.store.read(k)["models"]["model.features.0.weight"].shape[0] for k in range(4)]
        assert shapes == [3, 4, 5, 6]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_resume_gives_the_same_bits(tmp_path: Path) -> None:
    whole = federation_of(FedProto(uplink=8), rounds=4)
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    federation_of(FedProto(uplink=8), rounds=2, callbacks=[checkpoint], enable_checkpointing=True)
    second = federation_of(FedProto(uplink=8), rounds=4, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert whole.server is not None and second.server is not None
    assert_same(whole.server.state["prototypes"], second.server.state["prototypes"])
    for k in range(4):
        assert_same(whole.store.read(k)["models"], second.store.read(k)["models"])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_resume_with_other_models_is_refused(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}")
    models = FedProto(models={k: Net(3 + k, seed=k) for k in range(4)})
    federation_of(models, rounds=1, callbacks=[checkpoint], enable_checkpointing=True)
    for other in (FedProto(models=lambda k: Net(3 + k, seed=k)), FedProto()):
        with pytest.raises(ValueError, match="Expected a checkpoint with initial models"):
            federation_of(other, rounds=2, ckpt_path=tmp_path / "epoch=0.ckpt")


def test_a_model_that_diverged_is_not_remembered() -> None:
    class Diverges(ClientModule):
        def on_train_end(self) -> None:
            self.model.head.bias.data.fill_(torch.nan)  # type: ignore[union-attr]

    models = {k: (Diverges if k == 1 else ClientModule)(Net()) for k in range(4)}
    federation = Federation(module(), FedProto(models=models), local="loop")
    run(federation, data_module(4), rounds=1)
    assert federation.last_round is not None and federation.last_round.failures == {"nan_model": 1}
    assert list(federation.store) == [0, 2, 3]


def test_a_bare_network_trains_by_the_modules_recipe() -> None:
    class Adam(ClientModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.3)

    algorithm = FedProto(models=lambda k: Net())
    federation = Federation(Adam(Net()), algorithm, local="loop")
    run(federation, data_module(2), rounds=1)
    same = Federation(Adam(Net()), FedProto(), local="loop")
    run(same, data_module(2), rounds=1)
    for k in range(2):
        assert_same(federation.store.read(k)["models"], same.store.read(k)["models"])


# ---------------------------------------------------------------------------------------------------------- bad input


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="Expected `weight` to be a number >= 0, but got -1"):
        FedProto(weight=-1)
    with pytest.raises(ValueError, match="Expected a lossless `downlink` under FedProto"):
        FedProto(downlink=8)
    with pytest.raises(TypeError, match="Expected `models` to be a torch module"):
        FedProto(models=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (FedProto(head="top"), "Expected a layer of the module, but it has no 'top'"),
        (FedProto(head="features"), "Expected `head` to name a linear layer, but 'features' is a Sequential"),
        (
            FedProto(models={0: Net(), 1: Net(size=6), 2: Net(), 3: Net()}),
            r"Expected clients' embeddings of one size, but got \[5, 6\]",
        ),
        (FedProto(models={0: Net()}), r"a model for each of the 4 clients, but \[1, 2, 3\] have none"),
    ],
)
def test_what_does_not_fit_is_found_before_training(algorithm: FedProto, message: str) -> None:
    federation = Federation(module(), algorithm, local="loop")
    with pytest.raises(ValueError, match=message):
        run(federation, data_module(4))
    assert federation.last_round is None


def test_lies_about_labels_are_not_believed() -> None:
    class Lies(FedProto):
        def client_step(self, client: Any, module: Any, received: Any) -> Any:
            update = super().client_step(client, module, received)
            if client.id == 1:
                update.counters["labels"] = [10**6, 0, 0]
            if client.id == 2:
                del update.counters["labels"]
            return update

    federation = Federation(module(), Lies(), local="loop")
    run(federation, data_module(4), rounds=1)
    assert federation.last_round is not None and federation.last_round.failures == {"malformed": 2}


def test_a_head_that_never_runs() -> None:
    class Elsewhere(Net):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.features(x), self.head.weight)

    federation = Federation(ClientModule(Elsewhere(), lr=0.1), FedProto(), local="loop")
    with pytest.raises(RoundFailure, match="0 of 4 clients replied"):
        run(federation, data_module(4), rounds=1)
    with pytest.raises(ValueError, match="Expected the layer 'head' to run in the training step"):
        data = data_module()
        data.setup()
        LoopLocal().fit(ClientModule(Elsewhere()), data.client(0), callbacks=[PrototypeTerm(torch.zeros(3, 5))], seed=0)
