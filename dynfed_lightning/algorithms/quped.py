"""QuPeD: every client learns its own quantised model, centres and all, and learns from the others through a shared one.

Reference:
    Ozkara, Singh, Data, Diggavi. QuPeD: Quantized Personalization via Distillation with Applications to Federated Learning.
    NeurIPS 2021, arXiv 2107.13892, algorithm 2.

=================  ==========================================================================================
paper              here
=================  ==========================================================================================
w_k                `module`: the federation's module, full precision; what travels
x_k                ``client.state["personal"]``, `personal`: the client's own model and architecture, never sent
c_k                ``client.state["centers"]``: per quantised layer ``2**bits`` learned values, never sent
Q~_c, R, prox      `dynfed_lightning.centers.LearnedCenters`, `dynfed_lightning.ops`
f_i                a model's own ``training_step``
lines 6 to 10      `_quped_steps.PersonalSteps`, a callback around w's training
f_KD(x, w)         `dynfed_lightning.losses.taught_kl`: ``KL(softmax(w) || softmax(x))``
lambda_p           `lp`
lambda, P, e2      `lam`, `sharpness`, `center_lr`, over rounds (the paper: over epochs)
e1, e3             the learning rates of the personal model's and of the module's own optimiser
tau                local steps a round: the executor's ``max_epochs`` or ``max_steps``
=================  ==========================================================================================

Per batch, with t the logits of w before its step (one pass, shared with w's own loss), and ``F(z) = (1-lp) f(z) + lp KL(t||z)``::

    x <- prox_{e1 lam R_c}( x - e1 grad_x [F(x) + F(Q~_c(x))] )              2 passes forth, 2 back
    c <- prox_{e2 lam R_x}( c - e2 grad_c F(Q~_c(x)) )                       1 forth, 1 back
    w <- w - e3 grad_w [ CE(w) + lp (KL(w || x) + KL(w || Q~_c(x))) ]        1 forth, 1 back; of x 2 forth

each line with what the lines above it made, that is 6 passes forth and 4 back (4 and 4 with ``lp=0``), of which FedAvg takes
1 and 1. With ``alternate=False`` all three steps start from the same x and c: 3 and 3. Once assignments are frozen, and in full
precision, x is Q(x), and both terms are one: 3 and 2. ``CE(w)`` is ours (deep mutual learning), off with
``global_loss=False``: without it w learns from the clients' models alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import nn

from dynfed_lightning.algorithm import Client, CodecLike, Received, Reply, Server, Update
from dynfed_lightning.algorithms._local_models import (
    MOST_CHECKED,
    LocalModels,
    MakeOptimizer,
    check_finite,
    copy_model,
    kept,
    mean_scalar,
    on_cpu,
    recall,
    remembered,
)
from dynfed_lightning.algorithms._peer import Peer, check_accumulation
from dynfed_lightning.algorithms._per_client import dealt, entries, numbered
from dynfed_lightning.algorithms._quped_steps import PersonalSteps
from dynfed_lightning.algorithms.fedavg import FedAvg
from dynfed_lightning.batches import call_model, logits_of, split_batch, take
from dynfed_lightning.centers import LearnedCenters, choose_layers
from dynfed_lightning.errors import ClientFailure
from dynfed_lightning.local import LocalExecutor
from dynfed_lightning.quantized_file import QuantizedFile, save_quantized
from dynfed_lightning.quantized_layers import check_stepped
from dynfed_lightning.schedules import Schedule, as_schedule
from dynfed_lightning.tensors import Tensors, difference, load_weights, weights_of

if TYPE_CHECKING:
    from dynfed_lightning.federation import Federation

_SAID = ("personal_loss", "distance", "personal_bits", "personal_mb")  # what a client says of its own model


class QuPeD(FedAvg):
    """Quantised personalisation by distillation; the federation's module is the global model.

    Clients are judged by their own models, quantised to the nearest centres (``accuracy``), and the global model beside them
    (``global_accuracy``). A client keeps its model, centres and optimiser from round to round. In the last `finetune` share of
    the rounds weights are their centres, and centres and unquantised tensors alone are trained; a client whose turn comes only
    then hardens then. A client whose model does not stay finite is left out of the round (``failed/nan_model``), one whose
    memory is not that of its last round too (``failed/lost_state``), and keeps what it had.

    Logged per round: ``personal_loss`` (mean training loss of the quantised models), ``distance`` (mean ``|x - Q_c(x)|`` of
    quantised weights), ``personal_bits`` (a weight of a personal model, what stays float counted in), ``personal_mb`` (10^6
    bytes of one), ``lam`` and ``sharpness``. ``train_loss`` is the module's own.

    Args:
        personal: a network or LightningModule that every client starts from; a mapping from client id to such a model; a list
            of them, dealt out in turn; or a function of the client id. A network trains with the module's recipe, a
            LightningModule with its own. None: the module's own architecture, from the weights the client is first sent.
        bits: 1 to 8 for all layers but the first, the last and what is normalisation or bias; patterns of layer names to bits
            (see `dynfed_lightning.centers.choose_layers`); None: full precision (the paper's QuPeL-FP). A mapping from client
            id, a list, dealt out in turn, or a function of the client id gives each client one of these.
        lp: the share of distillation in a client's loss, in [0, 1], or a schedule over rounds; per client as `bits`, by mapping
            or list. 0: clients learn alone.
        global_loss: the module learns from the labels too.
        ends: quantise the first and the last layer as well.
        sharpness: P > 0, or a schedule over rounds; None: 10 to 100, linearly.
        relative_sharpness: divide P by the mean distance of a layer's centres.
        lam: the pull towards the centres, ``lam * (round + 1)``, or a schedule that is taken as it is.
        center_lr: e2, or a schedule over rounds; None: 1e-4 to 1e-6, geometrically.
        clamp: keeps quantised layers' weights in ``[-clamp, clamp]``; None: does not. Models given as `personal` must begin
            within it.
        finetune: share of the rounds, at the end, with frozen assignments, in [0, 1]: rounded down, at least one of several.
        alternate: False: all three steps start from the same x and c, at half the cost; see above.
        keep_optimizer: False: the personal model's optimiser starts anew every round like the module's. Learning rates and
            schedulers do so anyway.
        personal_optimizer: makes the personal models' optimiser from their parameters, instead of the above.
        uplink: see `FedAvg`.
        downlink: see `FedAvg`.

    Raises:
        TypeError: `personal` is none of these.
        ValueError: an argument out of range.
    """

    personalised = True
    reports_global = True
    reply_scalars = ("loss", *_SAID)

    def __init__(
        self,
        personal: nn.Module | Mapping[int, nn.Module] | list[nn.Module] | Callable[[int], nn.Module] | None = None,
        bits: int | Mapping[Any, Any] | list[Any] | Callable[[int], Any] | None = 2,
        lp: float | Schedule | Mapping[int, float | Schedule] | list[float | Schedule] = 0.5,
        *,
        global_loss: bool = True,
        ends: bool = False,
        sharpness: float | Schedule | None = None,
        relative_sharpness: bool = False,
        lam: float | Schedule = 1e-4,
        center_lr: float | Schedule | None = None,
        clamp: float | None = 1.0,
        finetune: float = 0.2,
        alternate: bool = True,
        keep_optimizer: bool = True,
        personal_optimizer: MakeOptimizer | None = None,
        uplink: CodecLike = None,
        downlink: CodecLike = None,
    ) -> None:
        super().__init__(uplink=uplink, downlink=downlink)
        self.models = None if personal is None else LocalModels(personal, "personal")
        self.bits, self.lp = numbered(bits), numbered(lp)
        for value in entries(self.lp):
            if isinstance(value, (int, float)) and not 0 <= value <= 1:
                raise ValueError(f"Expected `lp` to be in [0, 1], but got {value}.")
            as_schedule(value)
        self.global_loss, self.alternate, self.keep_optimizer = global_loss, alternate, keep_optimizer
        self.personal_optimizer = personal_optimizer
        self._settings: dict[str, Any] = {
            "ends": ends,
            "sharpness": sharpness,
            "relative_sharpness": relative_sharpness,
            "lam": lam,
            "center_lr": center_lr,
            "clamp": clamp,
            "finetune": finetune,
        }
        for value in [None] if callable(self.bits) else entries(self.bits):
            LearnedCenters(value, **self._settings)  # says now what is wrong with these
        self._seed, self._num_clients = 0, 0

    # ------------------------------------------------------------------ set-up

    def setup(self, server: Server, executor: LocalExecutor) -> None:
        """Check that the models fit together, on a batch if there is one, and that there is something to quantise.

        Raises:
            ValueError: no logits, other classes, a client without a model or bits, a pattern that matches no layer, no layer to
                quantise, an optimiser that cannot be made again.
        """
        super().setup(server, executor)
        check_accumulation(getattr(executor, "trainer_kwargs", {}).get("accumulate_grad_batches", 1), "personal")
        self._seed, self._num_clients = server.seed, server.num_clients
        clients = [0]
        if self.models is not None:
            self.models.check_clients(server.num_clients)
            clients = self.models.kinds(server.num_clients)
        kinds = {repr(self._bits(k)): k for k in reversed(range(server.num_clients))}
        lps = {self._lp(k) for k in range(server.num_clients)}
        module = server.new_module().to("cpu")
        batch = None if server.probe is None else server.probe()
        for k in sorted({*clients, *sorted(kinds.values())[:MOST_CHECKED]}):
            personal = self._start(k, module)
            optimizer, _ = Peer(personal, "personal", self.personal_optimizer).optimizers()
            centers = self._attach(k, personal, None)
            check_stepped(centers.names, centers.parameters, [optimizer])
            if batch is not None and any(v != 0 for v in lps):
                _check_logits(module, personal, batch)

    def identity(self) -> dict[str, Any]:
        """The personal models as they start, and everybody's bits: what a client remembers is of these."""
        start = {} if self.models is None else self.models.identity(self._seed)
        every = [self._bits(k) for k in range(self._num_clients)]
        return {**start, "bits": [b if isinstance(b, int) else "function" if callable(b) else repr(b) for b in every]}

    def _bits(self, client_id: int | None) -> Any:
        """What `LearnedCenters` takes, for one client."""
        return self.bits(client_id) if callable(self.bits) else dealt(self.bits, client_id, "bits")  # type: ignore[arg-type]

    def _lp(self, client_id: int) -> float | Schedule:
        value: float | Schedule = dealt(self.lp, client_id, "lp")
        return value

    def _attach(
        self, client_id: int | None, personal: L.LightningModule, memory: Mapping[str, Any] | None
    ) -> LearnedCenters:
        """The centres of a client's model, as they start or as they were."""
        centers = LearnedCenters(self._bits(client_id), **self._settings)
        if memory is None and self.models is None and centers.clamp is not None:
            live = dict(personal.named_parameters())
            for name in choose_layers(personal, centers.bits, centers.ends):  # w may have grown beyond it
                live[name].data.clamp_(-centers.clamp, centers.clamp)
        centers.attach(personal, memory)
        return centers

    def _start(self, client_id: int | None, module: L.LightningModule) -> L.LightningModule:
        """A client's model before its first round; `module` holds what it is first sent."""
        if self.models is not None:
            return self.models.fresh(client_id, module, self._seed)
        own = copy_model(module)
        assert isinstance(own, L.LightningModule)
        return own

    def _restore(
        self, client_id: int | None, state: Mapping[str, Any], module: L.LightningModule
    ) -> tuple[L.LightningModule, Mapping[str, Any] | None]:
        """A client's model as it was after its last round, and what `LearnedCenters` goes on from.

        Raises:
            ValueError: the memory is another client's or of another model.
        """
        owner = state.get("client", client_id)
        if client_id is not None and owner != client_id:
            raise ValueError(f"Expected the memory of client {client_id}, but got that of client {owner}.")
        personal = self._start(owner, module)
        if "personal" not in state:
            return personal, None
        recall(personal, state["personal"], "personal")
        return personal, {n: state[n] for n in ("centers", "index") if n in state}

    # ------------------------------------------------------------------ client

    def broadcast(self, server: Server) -> Tensors:
        """The global model.

        Raises:
            ValueError: nobody knows how many rounds there will be.
        """
        if server.num_rounds is None:
            raise ValueError("Expected a number of rounds (`max_epochs`), since QuPeD's schedules reckon with it.")
        return super().broadcast(server)

    def instruct(self, server: Server, client_id: int) -> dict[str, Any]:
        """How many rounds the client has taken part in, so that it sees whether its memory is that of the last one."""
        return {"rounds": server.state.get("rounds", {}).get(str(client_id), 0)}

    def client_step(self, client: Client, module: L.LightningModule, received: Received) -> Update:
        """Train the personal model, its centres and a copy of the global model on the same batches; upload the last's update."""
        rounds, known = int(client.state.get("rounds", 0)), int(received.scalars.get("rounds", 0))
        if rounds != known:
            raise ClientFailure(
                "lost_state",
                f"Expected client {client.id} to remember the {known} rounds it took part in, but it remembers {rounds}.",
            )
        names = load_weights(module, received.tensors)
        personal, memory = self._restore(client.id, client.state, module)
        own = kept(personal)
        lp = as_schedule(self._lp(client.id))(client.round, client.num_rounds)
        if not 0 <= lp <= 1:
            raise ValueError(f"Expected `lp` to be in [0, 1], but got {lp} in round {client.round}.")
        centers = self._attach(client.id, personal, memory)
        steps = PersonalSteps(
            Peer(personal, "personal", self.personal_optimizer, listen=lp > 0),
            centers,
            lp,
            round=(client.round, client.num_rounds or 1),
            global_loss=self.global_loss,
            alternate=self.alternate,
            memory=client.state.get("optimizer"),
        )
        client.fit(module, callbacks=[steps])
        after: dict[str, Any] = {
            "client": client.id,
            "rounds": rounds + 1,
            "personal": remembered(personal, own, client.id, "personal model"),
            **on_cpu(centers.state_dict()),
        }
        if self.keep_optimizer:  # not its groups: they hold learning rates that a scheduler has lowered
            assert steps.peer.optimizer is not None
            optimizer = steps.peer.optimizer
            # Once their weights are centres, the optimiser steps quantised layers no more.
            done = {id(p) for p in centers.parameters} if centers.frozen else set()
            order = [id(p) for g in optimizer.param_groups for p in g["params"]]
            moments = {i: s for i, s in optimizer.state_dict()["state"].items() if order[i] not in done}
            after["optimizer"] = {"state": on_cpu(moments)}
        check_finite({n: after[n] for n in ("centers", "optimizer") if n in after}, client.id, "personal model")
        loss = steps.mean("personal_loss")
        if not math.isfinite(loss):
            raise ClientFailure("nan_loss", f"The training loss of client {client.id}'s own model became {loss}.")
        client.state.update(after)
        size, number = _size(personal, centers)
        said = dict(
            zip(
                _SAID,
                (loss, float(centers.distance()), 8 * size / number, size / 1e6),
                strict=True,
            )
        )
        scalars = {"loss": steps.mean("loss"), **said}
        return Update(difference(weights_of(module, names), received.tensors), scalars=scalars)

    def personal_model(
        self,
        client_state: Mapping[str, Any],
        module: L.LightningModule,
        global_weights: Tensors,
        client_id: int | None = None,
    ) -> L.LightningModule:
        """The client's own model, its weights the nearest of its centres; as it starts, before its first round."""
        return self.quantised_model(client_state, module, global_weights, client_id)[0]

    def quantised_model(
        self,
        client_state: Mapping[str, Any],
        module: L.LightningModule,
        global_weights: Tensors,
        client_id: int | None = None,
    ) -> tuple[L.LightningModule, LearnedCenters]:
        """`personal_model`, and the centres that its weights now are."""
        if self.models is None:
            load_weights(module, global_weights)
        personal, memory = self._restore(client_id, client_state, module)
        centers = self._attach(client_state.get("client", client_id), personal, memory)
        centers.harden()
        return personal, centers

    def save(self, federation: Federation, client_id: int, path: str | Path) -> QuantizedFile:
        """Write a client's own model as a file of packed indices and centres, as `personal_model` gives it.

        ``load_quantized(path, module)`` reads it back, to the bit, into any module of its architecture.

        Args:
            federation: that this algorithm ran in, in this process or restored from a checkpoint.
            client_id: whose.
            path: of the file, by convention ``.safetensors``.

        Returns:
            what was written, with its size against float32.

        Raises:
            RuntimeError: the federation is not set up.
        """
        if federation.server is None:
            raise RuntimeError("Expected a federation that is set up: call `trainer.fit` or `trainer.test` first.")
        server = federation.server
        state = federation.store.read(client_id)
        personal, centers = self.quantised_model(state, server.new_module(), server.weights(), client_id)
        return save_quantized(personal.to("cpu"), path, centers.state_dict()["centers"])

    # ------------------------------------------------------------------ server

    def server_step(self, server: Server, replies: Sequence[Reply]) -> None:
        """``w_t+1``: the sample-weighted mean of the w_k."""
        super().server_step(server, replies)
        rounds = dict(server.state.get("rounds", {}))
        for r in replies:
            rounds[str(r.client_id)] = rounds.get(str(r.client_id), 0) + 1
            server.client_metrics[r.client_id] = {n: r.scalars[n] for n in _SAID}
        server.state["rounds"] = rounds
        for name in _SAID:
            server.metrics[name] = mean_scalar(replies, name)
        schedules = LearnedCenters(None, **self._settings)
        schedules.at(server.round, server.num_rounds or 1)
        server.metrics["lam"] = schedules.lam
        server.metrics["sharpness"] = schedules.sharpness_at(server.round, server.num_rounds)


@torch.no_grad()
def _check_logits(module: L.LightningModule, personal: L.LightningModule, batch: Any) -> None:
    """Two rows of `batch` through both models: they must tell the same classes apart."""
    rows = take(split_batch(batch)[0], 2)
    shapes = [list(logits_of(call_model(m.eval(), rows)).shape) for m in (module, personal)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"Expected `personal` and the module to give logits of the same shape, but got {shapes[1]} and {shapes[0]}."
        )


def _size(model: nn.Module, centers: LearnedCenters) -> tuple[int, int]:
    """Bytes of a quantised model, indices packed and centres in float32, and how many numbers it stands for."""
    quantised = {id(p): len(c) for p, c in zip(centers.parameters, centers.centers, strict=True)}
    persistent = model.state_dict(keep_vars=True)
    tensors = [*model.parameters(), *(b for n, b in model.named_buffers() if n in persistent and b.is_floating_point())]
    size = 0
    for t in tensors:
        m = quantised.get(id(t))
        size += 4 * t.numel() if m is None else (t.numel() * (m - 1).bit_length() + 7) // 8 + 4 * m
    return size, sum(t.numel() for t in tensors)
