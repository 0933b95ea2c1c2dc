"""pFedMe: algorithm 1 by hand over two rounds, what it reduces to, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from toys import DictModule, NormNet, assert_same, blobs, client_module, data_module, network, run, skewed, weights

from dynfed_lightning import (
    IID,
    ClientModule,
    FedAvg,
    FederatedDataModule,
    Federation,
    Local,
    LoopLocal,
    PFedMe,
    TrainerLocal,
)
from dynfed_lightning.seeds import derive_seed


def trained(algorithm: Any, local: Any = "loop", rounds: int = 2, module: Any = None, **data: Any) -> Federation:
    federation = Federation(module or client_module(), algorithm, local=local)
    run(federation, data_module(4, **{"partitioner": IID(4), **data}), rounds=rounds)
    assert federation.last_round is not None and federation.last_round.failures == {}
    return federation


@pytest.mark.parametrize("local", ["loop", "trainer"])
def test_two_rounds_by_hand(local: str) -> None:
    """Clients with different numbers of rows: K steps on each batch, w after them, the plain mean, beta."""
    lam, eta, K, beta, lr = 3.0, 0.2, 3, 1.5, 0.1
    federation = Federation(client_module(lr=lr), PFedMe(lam, eta, K, beta), local=local)
    data = data_module(3, skewed(3, 1.0))
    run(federation, data, rounds=2)
    assert len({data.client(k).num_examples for k in range(3)}) > 1

    names = [n for n, _ in client_module().named_parameters()]
    server = [p.detach().double() for p in network().parameters()]
    theta: dict[int, list[torch.Tensor]] = {}
    model = network().double()
    for t in range(2):
        ends = []
        for k in range(3):
            theta[k], w = [p.clone() for p in server], [p.clone() for p in server]
            for x, y in data.client(k).train_loader(derive_seed(0, "client", t, k)):
                for _ in range(K):
                    leaves = [p.requires_grad_() for p in theta[k]]
                    named = dict(zip((n.removeprefix("model.") for n in names), leaves, strict=True))
                    loss = F.cross_entropy(torch.func.functional_call(model, named, (x.double(),)), y)
                    g = torch.autograd.grad(loss, leaves)
                    theta[k] = [(p - lr * (d + lam * (p - v))).detach() for p, d, v in zip(leaves, g, w, strict=True)]
                w = [v - eta * lam * (v - p) for v, p in zip(w, theta[k], strict=True)]
            ends.append(w)
        mean = [sum(e) / 3 for e in zip(*ends, strict=True)]
        server = [(1 - beta) * a + beta * b for a, b in zip(server, mean, strict=True)]
    for a, b in zip(weights(federation).values(), server, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-6)
    for k in range(3):
        for a, b in zip(federation.store.read(k)["theta"].values(), theta[k], strict=True):
            torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-6)


def test_clients_are_judged_by_theta() -> None:
    federation = Federation(client_module(), PFedMe(1.0, 0.1), local="loop")
    trainer = run(federation, data_module(4), rounds=3)
    x, y = blobs(90, seed=1)
    each = []
    for k in range(4):
        model = client_module()
        model.load_state_dict(federation.store.read(k)["theta"])
        each.append(float((model(x).argmax(1) == y).float().mean()))
    assert float(trainer.callback_metrics["accuracy"]) == pytest.approx(sum(each) / 4, abs=1e-6)
    assert trainer.callback_metrics["global_accuracy"] != trainer.callback_metrics["accuracy"]


@pytest.mark.parametrize("local", ["loop", "trainer"])
def test_without_lam_theta_is_a_fedavg_client_and_w_stays(local: str) -> None:
    module = ClientModule(NormNet(), lr=0.1)
    federation = trained(PFedMe(lam=0.0, K=1), local, rounds=1, module=module)
    alone = trained(Local(), local, rounds=1, module=ClientModule(NormNet(), lr=0.1))
    for k in range(4):
        assert_same(federation.store.read(k)["theta"], alone.store.read(k)["weights"])
    start = ClientModule(NormNet()).state_dict()
    for name, tensor in weights(federation).items():
        if "running" not in name:
            assert torch.equal(tensor, start[name]), name


def test_where_w_follows_at_once_it_is_fedavg() -> None:
    """K = 1 and eta = 1/lam: w is theta after every step, and nothing draws theta back; clients of one size."""
    federation = trained(PFedMe(lam=4.0, eta=0.25, K=1), rounds=4)
    for a, b in zip(weights(federation).values(), weights(trained(FedAvg(), rounds=4)).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_strong_pull_keeps_theta_near() -> None:
    def distance(lam: float) -> float:
        federation = trained(PFedMe(lam=lam, eta=0.0, K=5), rounds=1)
        start = client_module().state_dict()
        return float(sum((t - start[n]).square().sum() for n, t in federation.store.read(0)["theta"].items()))

    assert distance(9.0) < 0.3 * distance(1.0) < 0.3 * distance(0.0)


def test_how_many_steps() -> None:
    """K on each batch; ``max_steps`` counts them all, and w's last step may come after fewer."""
    seen: list[tuple[int, float]] = []

    class Watch(ClientModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append((self.global_step, float(batch[0].sum())))
            return super().training_step(batch, batch_idx)

    for local in (LoopLocal(max_steps=7), TrainerLocal(max_steps=7)):
        seen.clear()
        federation = Federation(Watch(network(), lr=0.1), PFedMe(1.0, 1.0, K=3), local=local)
        run(federation, data_module(1), rounds=1)
        assert [s for s, _ in seen] == list(range(7))
        sums = [v for _, v in seen]
        assert sums[0] == sums[2] != sums[3] == sums[5] != sums[6]
        # eta * lam = 1: w ends where theta is, only if the last, seventh step counts.
        for name, t in federation.store.read(0)["theta"].items():
            torch.testing.assert_close(weights(federation)[name], t, rtol=0, atol=1e-6)


def test_accumulated_gradients_are_refused() -> None:
    local = TrainerLocal(trainer_kwargs={"accumulate_grad_batches": 2})
    with pytest.raises(ValueError, match="Expected `accumulate_grad_batches` to be 1 under PFedMe, .* but got 2"):
        run(Federation(client_module(), PFedMe(), local=local))


def test_layers_that_a_callback_thaws_are_drawn_to_what_was_sent() -> None:
    class Thaws(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.model[0])

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.model[0], optimizer, lr=0.1, initial_denom_lr=1.0)

    found = {}
    for lam in (0.0, 9.0):
        f = trained(PFedMe(lam, 0.05, K=5), TrainerLocal(max_epochs=2, callbacks=[Thaws()]), rounds=1)
        start, theta = client_module().state_dict(), f.store.read(0)["theta"]
        found[lam] = float((theta["model.0.weight"] - start["model.0.weight"]).norm())
        assert torch.equal(weights(f)["model.0.weight"], start["model.0.weight"]) == (lam == 0)
    assert 0 < found[9.0] < 0.5 * found[0.0]


def test_modules_of_every_kind() -> None:
    x, y = blobs()
    rows = [{"x": a, "label": b} for a, b in zip(x, y, strict=True)]
    federation = Federation(DictModule(), PFedMe(0.5, 0.5, K=2, uplink=8))
    trainer = run(federation, FederatedDataModule(rows, IID(3), test=rows[:60], batch_size=16), rounds=3)
    assert trainer.callback_metrics["accuracy"] > 0.4 and trainer.callback_metrics["failed"] == 0
    for precision in ("bf16-mixed", "bf16-true"):
        local = TrainerLocal(trainer_kwargs={"precision": precision, "gradient_clip_val": 1.0})
        assert trained(PFedMe(0.5, 0.5), local).last_round is not None


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_resume_gives_the_same_bits(tmp_path: Any) -> None:
    def build() -> Federation:
        return Federation(ClientModule(NormNet(), lr=0.1), PFedMe(1.0, 0.3, 2), local="loop")

    whole, first, second = build(), build(), build()
    run(whole, data_module(3, clients_per_round=2), rounds=4)
    kept = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    run(first, data_module(3, clients_per_round=2), rounds=2, callbacks=[kept], enable_checkpointing=True)
    run(second, data_module(3, clients_per_round=2), rounds=4, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert_same(weights(whole), weights(second))
    for k in range(3):
        assert_same(whole.store.read(k)["theta"], second.store.read(k)["theta"])


def test_a_theta_that_is_no_number_is_left_out() -> None:
    class Breaks(ClientModule):
        def on_train_end(self) -> None:
            with torch.no_grad():
                next(self.parameters())[0] = torch.nan

    federation = Federation(Breaks(network(), lr=0.1), PFedMe(), local="loop", min_clients=1)
    with pytest.raises(RuntimeError, match="nan_model: 2"):
        run(federation, data_module(2), rounds=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lam": -1.0}, "Expected `lam` to be a number >= 0, but got -1.0"),
        ({"eta": float("nan")}, "Expected `eta` to be a number >= 0, but got nan"),
        ({"K": 0}, "Expected `K` to be a positive integer, but got 0"),
        ({"K": 2.0}, "Expected `K` to be a positive integer, but got 2.0"),
        ({"beta": 0.0}, "Expected `beta` to be a positive number, but got 0.0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PFedMe(**arguments)
