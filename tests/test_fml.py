"""FML: its two losses by hand over a round of a federation, its ends, and what travels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import assert_same, blobs, client_module, data_module, network, run, skewed, weights

from dynfed_lightning import FML, IID, FedAvg, FederatedDataModule, Federation


def local_model() -> nn.Module:
    return network(1, hidden=24)


def trained(algorithm: Any, rounds: int = 2, **kwargs: Any) -> Federation:
    federation = Federation(client_module(**kwargs), algorithm, local="loop")
    run(federation, data_module(4, skewed(4, 1.0)), rounds=rounds)
    assert federation.last_round is not None and federation.last_round.failures == {}
    return federation


def test_two_rounds_by_hand() -> None:
    """Two clients of 8 and 16 rows, one full-batch step a round: both losses, the merge, the local models' memory."""
    x, y = blobs(24)
    rows = [torch.arange(8), torch.arange(8, 24)]

    class Two(IID):
        def __call__(self, labels: Any, seed: int) -> list[Tensor]:
            return rows

    data = FederatedDataModule((x, y), Two(2), test=(x, y), batch_size=24)
    federation = Federation(client_module(lr=0.3), FML(local_model(), alpha=0.7, beta=0.2), local="loop")
    run(federation, data, rounds=2)

    meme, local = network().double(), [local_model().double(), local_model().double()]
    for _ in range(2):
        steps = []
        for k in (0, 1):
            a, b = x[rows[k]].double(), y[rows[k]]
            zm, zl = meme(a), local[k](a)
            pm, pl = zm.softmax(1), zl.softmax(1)
            kl_l = (pm.detach() * (pm.detach() / pl).log()).sum(1).mean()
            kl_m = (pl.detach() * (pl.detach() / pm).log()).sum(1).mean()
            loss_l = 0.7 * F.cross_entropy(zl, b) + 0.3 * kl_l
            loss_m = 0.2 * F.cross_entropy(zm, b) + 0.8 * kl_m
            steps.append(torch.autograd.grad(loss_m, list(meme.parameters()), retain_graph=True))
            grads = torch.autograd.grad(loss_l, list(local[k].parameters()))
            with torch.no_grad():
                for p, g in zip(local[k].parameters(), grads, strict=True):
                    p -= 0.3 * g
        with torch.no_grad():
            for p, g0, g1 in zip(meme.parameters(), *steps, strict=True):
                p -= 0.3 * (8 * g0 + 16 * g1) / 24
    for (n, t), p in zip(weights(federation).items(), meme.parameters(), strict=True):
        torch.testing.assert_close(t.double(), p.detach(), rtol=0, atol=1e-6, msg=n)
    for k in (0, 1):
        for t, p in zip(federation.store.read(k)["local_model"].values(), local[k].parameters(), strict=True):
            torch.testing.assert_close(t.double(), p.detach(), rtol=0, atol=1e-6)


def test_shares_of_one_are_fedavg_and_local_training() -> None:
    fml, avg = trained(FML(local_model(), alpha=1.0, beta=1.0)), trained(FedAvg())
    assert_same(weights(fml), weights(avg))


def test_only_the_meme_travels_and_the_local_model_is_judged() -> None:
    federation = Federation(client_module(), FML(local_model()), local="loop")
    trainer = run(federation, data_module(4), rounds=4)
    assert list(federation.runtime.uplink_schema.names) == list(weights(federation))
    x, y = blobs(90, seed=1)
    each = []
    for k in range(4):
        model = local_model()
        state = federation.store.read(k)["local_model"]
        model.load_state_dict({n.removeprefix("model."): t for n, t in state.items()})
        each.append(float((model(x).argmax(1) == y).float().mean()))
    assert float(trainer.callback_metrics["accuracy"]) == pytest.approx(sum(each) / 4, abs=1e-6)
    assert trainer.callback_metrics["global_accuracy"] != trainer.callback_metrics["accuracy"]
    assert trainer.callback_metrics["local_loss"] > 0


def test_different_architectures() -> None:
    federation = trained(FML({k: network(k, hidden=4 + k) for k in range(4)}))
    shapes = [federation.store.read(k)["local_model"]["model.0.weight"].shape[0] for k in range(4)]
    assert shapes == [4, 5, 6, 7]


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_bad_shares(name: str) -> None:
    with pytest.raises(ValueError, match=rf"Expected `{name}` to be in \[0, 1\], but got 1.5"):
        FML(local_model(), **{name: 1.5})  # type: ignore[arg-type]


def test_models_that_do_not_fit_are_found_before_training() -> None:
    federation = Federation(client_module(), FML(nn.Linear(6, 5)), local="loop")
    with pytest.raises(ValueError, match=r"logits of the same shape, but got \[2, 3\] and \[2, 5\]"):
        run(federation, data_module(4))
    assert federation.last_round is None
