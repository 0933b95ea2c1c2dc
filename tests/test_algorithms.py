"""Each method against hand-computed constants, and the reductions between methods."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import pytest
import torch
from toys import assert_same, blobs, client_module, data_module, network, run, skewed, weights

from dynfed_lightning import (
    IID,
    Centralised,
    ClientModule,
    Codec,
    DAdaQuant,
    Distillation,
    DynFed,
    FedAvg,
    FedDF,
    FederatedDataModule,
    Federation,
    FedPAQ,
    FedProx,
    GivenResources,
    Linear,
    Local,
    LoopLocal,
    Quantize,
    Resources,
    Scaffold,
    TopK,
)
from dynfed_lightning.algorithms.dadaquant import client_levels, levels_to_bits
from dynfed_lightning.algorithms.dynfed import adjusted_bits, resource_cap
from dynfed_lightning.bits import InstructedBits


def _trained(algorithm: Any, rounds: int = 3, module: Any = None, **data: Any) -> Federation:
    federation = Federation(module or client_module(), algorithm, local="loop")
    run(federation, data_module(5, skewed(5), **data), rounds=rounds)
    return federation


# ------------------------------------------------------------------------------------------------------ reductions


def test_fedprox_without_mu_is_fedavg() -> None:
    assert_same(weights(_trained(FedProx(mu=0.0))), weights(_trained(FedAvg())))


def test_fedprox_with_mu_is_not() -> None:
    a, b = weights(_trained(FedProx(mu=5.0))), weights(_trained(FedAvg()))
    start = weights(Federation(client_module()))
    moved = [sum(float((w[n] - start[n]).norm()) for n in w) for w in (a, b)]
    assert moved[0] < 0.8 * moved[1]


def test_dynfed_without_quantisation_and_distillation_is_fedavg() -> None:
    assert_same(weights(_trained(DynFed(bits=None, distillation=None))), weights(_trained(FedAvg())))


def test_dynfed_with_fixed_bits_is_fedpaq() -> None:
    a, b = _trained(DynFed(bits=4, distillation=None)), _trained(FedPAQ(4))
    assert_same(weights(a), weights(b))


def test_scaffold_starts_as_fedavg() -> None:
    """All control variates are 0 in the first round."""
    assert_same(weights(_trained(Scaffold(), rounds=1)), weights(_trained(FedAvg(), rounds=1)))


def test_eight_bits_stay_near_float32_and_two_do_not() -> None:
    exact, eight, two = (weights(_trained(a)) for a in (FedAvg(), FedPAQ(8), FedPAQ(2)))
    far = [sum(float((w[n] - exact[n]).norm()) for n in w) for w in (eight, two)]
    assert far[0] < 0.03 < 0.2 < far[1]


# --------------------------------------------------------------------------------------------------------- scaffold


def test_scaffold_second_round_by_hand() -> None:
    """Two clients, one full-batch step a round: every quantity of algorithm 1 in float64 by hand."""
    x, y = blobs(24)
    rows = [torch.arange(8), torch.arange(8, 24)]

    class Two(IID):
        def __call__(self, labels: Any, seed: int) -> list[torch.Tensor]:
            return rows

    data = FederatedDataModule((x, y), Two(2), test=(x, y), batch_size=24)
    federation = Federation(ClientModule(torch.nn.Linear(6, 3), lr=0.3), Scaffold(), local="loop")
    w = {n: t.double() for n, t in weights(federation).items()}
    run(federation, data, rounds=2)

    def gradient(w: dict[str, torch.Tensor], r: torch.Tensor) -> dict[str, torch.Tensor]:
        live = {n: t.clone().requires_grad_() for n, t in w.items()}
        out = torch.nn.functional.linear(x[r].double(), live["model.weight"], live["model.bias"])
        torch.nn.functional.cross_entropy(out, y[r]).backward()
        return {n: t.grad for n, t in live.items()}  # type: ignore[misc]

    zero = {n: torch.zeros_like(t) for n, t in w.items()}
    c, own = dict(zero), [dict(zero), dict(zero)]
    for _ in range(2):
        deltas, changes = [], []
        for k in (0, 1):
            g = gradient(w, rows[k])
            step = {n: -0.3 * (g[n] - own[k][n] + c[n]) for n in w}
            new = {n: own[k][n] - c[n] - step[n] / 0.3 for n in w}
            deltas.append(step)
            changes.append({n: new[n] - own[k][n] for n in w})
            own[k] = new
        w = {n: w[n] + (8 * deltas[0][n] + 16 * deltas[1][n]) / 24 for n in w}
        c = {n: c[n] + (changes[0][n] + changes[1][n]) / 2 for n in w}
    for n, t in weights(federation).items():
        torch.testing.assert_close(t.double(), w[n], rtol=0, atol=1e-6)


def test_scaffold_counts_its_control_variates_and_refuses_momentum() -> None:
    plain, control = _trained(FedAvg(), rounds=1), _trained(Scaffold(), rounds=1)
    values = sum(p.numel() for p in plain.module.parameters())
    assert control.total_bytes_up - plain.total_bytes_up == pytest.approx(5 * 4 * values, abs=5 * 80)
    for module in (client_module(momentum=0.9), client_module(optimizer="adam")):
        with pytest.raises(ValueError, match="plain SGD"):
            _trained(Scaffold(), module=module)


# -------------------------------------------------------------------------------------------------------- dadaquant


def test_dadaquant_levels_by_hand() -> None:
    # v = (1/2, 1/4, 1/4), q = 4: a = 0.62996 + 2 * 0.39685, b = (1/4 + 1/8) / 16
    a, b = 0.5 ** (2 / 3) + 2 * 0.25 ** (2 / 3), 0.375 / 16
    expected = [round(math.sqrt(a / b) * v ** (2 / 3)) for v in (0.5, 0.25, 0.25)]
    assert list(client_levels(4, {3: 20, 5: 10, 9: 10}).values()) == expected == [5, 3, 3]
    # Equal clients get what all would have; a tiny one still has one level.
    assert set(client_levels(6, dict.fromkeys(range(7), 11)).values()) == {6}
    assert client_levels(1, {0: 100_000, 1: 1})[1] == 1


def test_dadaquant_keeps_the_variance_it_promises() -> None:
    """The split minimises ``sum q_k`` at ``sum v_k^2 / q_k^2 = sum v_k^2 / q^2``, up to rounding."""
    n = {k: 10 * (k + 1) for k in range(12)}
    total = sum(n.values())
    levels = client_levels(40, n)
    variance = sum((n[k] / total) ** 2 / levels[k] ** 2 for k in n)
    assert variance == pytest.approx(sum((n[k] / total) ** 2 for k in n) / 40**2, rel=0.05)
    assert sum(levels.values()) < 40 * 12


def test_dadaquant_doubles_when_the_loss_stalls() -> None:
    # Full batches, so that the loss of a model that stands still is the same every round.
    stalled = _trained(DAdaQuant(patience=2, smoothing=0.0), rounds=7, module=client_module(lr=1e-9), batch_size=500)
    assert stalled.server is not None and stalled.server.state["levels"] == 4  # after rounds 3 and 6
    moving = _trained(DAdaQuant(patience=2, smoothing=0.0), rounds=7)
    assert moving.server is not None and moving.server.state["levels"] == 1


def test_dadaquant_bits_reach_the_payload() -> None:
    federation = _trained(DAdaQuant(min_levels=20), rounds=1)
    record = federation.last_round
    assert record is not None
    levels = client_levels(20, {c.client: c.num_examples for c in record.clients})
    # A tensor too small to gain from quantising travels raw and has no bits.
    assert [c.bits for c in record.clients] == [min(8, levels_to_bits(levels[c.client])) for c in record.clients]


# ----------------------------------------------------------------------------------------------------------- dynfed


def test_resource_cap_by_hand() -> None:
    for memory, cap in [(100, 2), (4095, 2), (6144, 3), (16383, 7), (16384, 8), (99999, 8)]:
        assert resource_cap(Resources(memory_mb=memory), (2, 8)) == cap
    assert resource_cap(Resources(), (2, 6)) == 6
    # 1,000,000 values, 1 second at 4.1 Mbit/s: 512,500 B, less 7,816 B of scales leaves 4.037 bits a value.
    link = Resources(memory_mb=99999, bandwidth_mbps=4.1)
    assert resource_cap(link, (2, 8), deadline=1.0, num_values=10**6) == 4
    assert resource_cap(link, (2, 8), deadline=0.1, num_values=10**6) == 2  # late even so
    assert resource_cap(link, (2, 8), num_values=10**6) == 8


def test_eq4_by_hand() -> None:
    assert adjusted_bits(5.0, 0.5, eta=1.0, low=2, high=8, cap=8) == pytest.approx(5.0 + 0.5 - 5 / 8)
    assert adjusted_bits(7.0, 1.0, eta=4.0, low=2, high=8, cap=7) == pytest.approx(7.0)  # +0.5, cut at the cap
    assert adjusted_bits(2.2, 0.0, eta=1.0, low=2, high=8, cap=7) == 2  # cut at b_min


def test_bits_follow_eq4_round_by_round() -> None:
    federation = Federation(client_module(), DynFed(eta=4.0, distillation=None), local="loop")
    resources = GivenResources([Resources(memory_mb=2048.0 * b) for b in (8, 8, 5, 8, 3)])
    data = data_module(5, skewed(5), resources=resources)
    caps = [min(8, max(2, int(data.resources(k).memory_mb // 2048))) for k in range(5)]
    state = {k: float(c) for k, c in enumerate(caps)}
    told, norms = [], []

    class Watch(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            record = federation.last_round
            assert record is not None
            told.append([c.bits for c in record.clients])
            norms.append([c.grad_norm for c in record.clients])

    run(federation, data, rounds=6, callbacks=[Watch()])
    for bits, g in zip(told, norms, strict=True):
        assert bits == [math.floor(state[k] + 0.5) for k in range(5)]
        top = max(g)
        state = {k: min(max(state[k] + 4 * (g[k] / top - state[k] / 8), 2), caps[k]) for k in range(5)}
    assert federation.server is not None
    assert federation.server.state["bits"] == pytest.approx({str(k): b for k, b in state.items()})
    assert told[0] == caps and told[-1] != caps  # it started at the caps and moved


def test_loss_delta_leaves_first_timers_alone() -> None:
    federation = _trained(DynFed(signal="loss_delta", distillation=None), rounds=1)
    assert federation.server is not None and federation.server.state["bits"] == {}
    federation = _trained(DynFed(signal="loss_delta", distillation=None), rounds=3)
    assert federation.server is not None and set(federation.server.state["bits"]) == set("01234")


def test_random_and_constant_bits() -> None:
    resources = GivenResources([Resources(memory_mb=4 * 2048.0)] * 5)
    federation = _trained(DynFed(signal=None, distillation=None), rounds=2, resources=resources)
    assert federation.last_round is not None and federation.last_round.bits == [4.0] * 5
    seen: set[float] = set()
    for seed in range(4):
        f = Federation(client_module(), DynFed(signal="random", distillation=None), local="loop", seed=seed)
        run(f, data_module(5, skewed(5), resources=resources), rounds=1)
        assert f.last_round is not None
        seen |= set(f.last_round.bits)
    assert seen == {2.0, 3.0, 4.0}


def test_bits_given_are_the_bits_of_the_payload() -> None:
    """A payload at b bits is shorter than one at b + 1 by an eighth of a byte a value."""
    size = {b: _trained(DynFed(bits=b, distillation=None), rounds=1, module=_wide()).total_bytes_up for b in (2, 3, 8)}
    values = sum(p.numel() for p in _wide().parameters())
    assert size[3] - size[2] == pytest.approx(5 * values / 8, rel=0.02)
    assert size[8] - size[2] == pytest.approx(5 * values * 6 / 8, rel=0.02)


def _wide() -> ClientModule:
    return ClientModule(network(hidden=2000), lr=0.05)


@pytest.mark.parametrize(
    "policy", ["balanced", "competence", "active", "mean", "variance", "entropy", "random", "top_loss"]
)
def test_every_teacher_policy_runs_end_to_end(policy: str) -> None:
    distillation = Distillation(policy=policy, passes=2, epochs=2)
    federation = Federation(client_module(), DynFed(distillation=distillation), local="loop")
    trainer = run(federation, data_module(5, skewed(5), public=30), rounds=3)
    record = federation.last_round
    assert record is not None and trainer.callback_metrics["failed"] == 0
    assert sum(c.metrics["teacher_share"] for c in record.clients) == pytest.approx(1.0, abs=1e-5)
    assert record.metrics["distill_loss"] < record.metrics["distill_loss_before"]


def test_label_counts_travel_once_and_are_counted() -> None:
    sent: list[int] = []
    federation = Federation(client_module(), DynFed(bits=4), local="loop")

    class Watch(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            assert federation.last_round is not None
            sent.append(federation.last_round.bytes_up)

    data = data_module(4, public=30)
    run(federation, data, rounds=3, callbacks=[Watch()])
    assert federation.server is not None
    assert federation.server.state["labels"] == {str(k): data.client(k).label_counts().tolist() for k in range(4)}
    assert sent[0] - sent[1] > 4 * len('"k":{"labels":[]}') and abs(sent[1] - sent[2]) < 30
    assert "labels" not in _trained(DynFed(bits=4, distillation="active"), rounds=1, public=30).server.state["labels"]  # type: ignore[union-attr]


def test_distillation_helps_where_labels_are_skewed() -> None:
    """Three clients of one class each: averaging forgets, the competence teachers do not."""

    class ByClass(IID):
        def __call__(self, labels: Any, seed: int) -> list[torch.Tensor]:
            return [torch.nonzero(torch.as_tensor(labels) == c).flatten() for c in range(3)]

    got = {}
    recipe = Distillation("competence", epochs=20, lr=0.01)
    for name, algorithm in {"avg": FedAvg(), "dyn": DynFed(bits=(2, 8), distillation=recipe)}.items():
        federation = Federation(client_module(), algorithm, local=LoopLocal(max_epochs=2))
        trainer = run(federation, data_module(partitioner=ByClass(3), public=60), rounds=2)
        got[name] = float(trainer.callback_metrics["accuracy"])
    assert got["dyn"] > got["avg"] + 0.05


@pytest.mark.parametrize("bits", [3, 8])
def test_quantised_downlink_keeps_both_sides_equal_and_is_smaller(bits: int) -> None:
    """Sampled clients, so some miss rounds: every client's reference must equal the server's to the bit."""
    federation = Federation(
        _wide(), DynFed(bits=(2, 6), distillation=None, downlink=Codec(Quantize(bits))), local="loop"
    )
    checked: list[int] = []

    class Compare(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            server = federation.server
            assert server is not None
            for k in server.cohort:
                held = federation.store.read(k)["downlink"]
                assert held["round"] == server.round
                assert_same(held["tensors"], server.received)
                checked.append(k)

    run(federation, data_module(6, skewed(6), clients_per_round=3), rounds=8, callbacks=[Compare()])
    assert len(checked) == 24
    dense = Federation(_wide(), DynFed(bits=(2, 6), distillation=None), local="loop")
    run(dense, data_module(6, skewed(6), clients_per_round=3), rounds=8)
    assert federation.total_bytes_down < (0.55 if bits == 3 else 0.75) * dense.total_bytes_down


# --------------------------------------------------------------------------------------------------- FedDF, the ends


def test_feddf_runs_and_needs_a_public_set() -> None:
    federation = _trained(FedDF(), public=30)
    assert federation.last_round is not None and "distill_loss" in federation.last_round.metrics
    with pytest.raises(ValueError, match="Expected a public set, since FedDF distils"):
        _trained(FedDF())
    with pytest.raises(ValueError, match="without label counts"):
        FedDF(Distillation(policy="competence"))


def test_local_trains_every_client_alone_and_sends_nothing() -> None:
    federation = _trained(Local(), rounds=4)
    assert federation.total_bytes_up == federation.total_bytes_down == 0
    start = Federation(client_module())
    assert_same(weights(federation), weights(start))  # the global model stays where it was
    own = [federation.store.read(k)["weights"] for k in range(5)]
    assert not torch.equal(own[0]["model.0.weight"], own[1]["model.0.weight"])
    # Client 0 alone, four rounds of one epoch from the same start, is what its state holds.
    data = data_module(5, skewed(5))
    data.setup()
    from dynfed_lightning.seeds import derive_seed

    module = client_module()
    for t in range(4):
        LoopLocal().fit(module, data.client(0), seed=derive_seed(0, "client", t, 0))
    assert_same(own[0], dict(module.state_dict()))


def test_centralised_has_all_rows_and_leaves_the_data_module_alone() -> None:
    federation = Federation(client_module(), Centralised(), local="loop")
    data = data_module(5, skewed(5))
    trainer = run(federation, data, rounds=3)
    assert federation.last_round is not None and federation.last_round.clients[0].num_examples == 240
    assert federation.total_bytes_up == 0 and data.num_clients == 5
    assert trainer.callback_metrics["accuracy"] > 0.8


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DynFed(bits=(1, 8)), r"2 <= b_min <= B_max <= 8, but got \(1, 8\)"),
        (lambda: DynFed(bits=(5, 3)), r"but got \(5, 3\)"),
        (lambda: DynFed(bits=(2, 9)), r"but got \(2, 9\)"),
        (lambda: DynFed(bits=9), "Expected `bits` to be an integer from 1 to 8, but got 9"),
        (lambda: DynFed(signal="vibes"), "Expected `signal` to be one of .*, but got 'vibes'"),
        (lambda: DynFed(eta=-1), "Expected `eta` to be a number >= 0, but got -1"),
        (lambda: DynFed(memory_per_bit=0), "Expected `memory_per_bit` to be a positive number of MB, but got 0"),
        (lambda: DynFed(deadline=0), "Expected `deadline` to be a positive number of seconds or None, but got 0"),
        (lambda: DynFed(distillation="competense"), "Did you mean 'competence'"),
        (lambda: FedPAQ(0), "Expected `bits` to be an integer from 1 to 8, but got 0"),
        (lambda: FedProx(-1), "Expected `mu` to be a number >= 0, but got -1"),
        (lambda: DAdaQuant(patience=0), "Expected `patience` to be a positive number of rounds, but got 0"),
        (lambda: DAdaQuant(max_levels=200), "<= 127, but got 1 and 200"),
        (lambda: DAdaQuant(smoothing=1.0), r"Expected `smoothing` to be in \[0, 1\), but got 1.0"),
    ],
)
def test_bad_arguments_are_found_in_the_constructor(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_codecs_are_given_in_any_form() -> None:
    for given in (Codec(Quantize(4)), Quantize(4), [Quantize(4)], 4):
        assert_same(weights(_trained(FedAvg(uplink=given), rounds=1)), weights(_trained(FedPAQ(4), rounds=1)))
    with pytest.raises(TypeError, match="Expected `uplink` to be a Codec, a stage, .* but got str"):
        FedAvg(uplink="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Expected `bits` to be an integer from 1 to 8, but got 9"):
        FedAvg(downlink=9)


def test_downlink_codecs_that_follow_a_schedule() -> None:
    federation = _trained(FedAvg(downlink=[TopK(Linear(0.9, 0.5)), Quantize(8)]), rounds=3)
    assert federation.last_round is not None and federation.last_round.failures == {}


def test_a_downlink_that_cannot_work_is_found_before_training() -> None:
    federation = Federation(client_module(), FedAvg(downlink=Quantize(InstructedBits())), local="loop")
    with pytest.raises(ValueError, match="Expected the server to instruct `bits`"):
        run(federation)
    assert federation.last_round is None


def test_what_the_distillation_is_given() -> None:
    """Start at the sample-weighted mean, teachers w_hat_k, the bits and steps of the payloads, everybody's label counts."""
    seen: list[dict[str, Any]] = []

    class Spy(Distillation):
        def run(self, module: Any, teachers: Any, start: Any, public: Any, ctx: Any, **kwargs: Any) -> Any:
            seen.append({"teachers": teachers, "start": start, "ctx": ctx, **kwargs})
            return super().run(module, teachers, start, public, ctx, **kwargs)

    federation = Federation(client_module(), DynFed(bits=4, distillation=Spy("balanced")), local="loop")
    data = data_module(5, skewed(5), public=30, clients_per_round=2)
    run(federation, data, rounds=4)
    heard: set[int] = set()
    for t, given in enumerate(seen):
        cohort = data.sample_cohort(t)
        heard |= set(cohort)
        n = [data.client(k).num_examples for k in cohort]
        for name, start in given["start"].items():
            mean = sum(w * x[name].double() for w, x in zip(n, given["teachers"], strict=True)) / sum(n)
            torch.testing.assert_close(start.double(), mean, rtol=0, atol=1e-6)
        assert given["ctx"].num_examples.tolist() == n and given["ctx"].bits.tolist() == [4.0, 4.0]
        assert given["ctx"].label_counts.tolist() == [data.client(k).label_counts().tolist() for k in cohort]
        everyone = sum(data.client(k).label_counts() for k in heard)
        assert given["ctx"].class_prior.tolist() == everyone.tolist()
        assert all(float(s["model.0.weight"].max()) > 0 for s in given["steps"])
    assert len(heard) > 2  # more than one cohort, so the two kinds of counts differ
