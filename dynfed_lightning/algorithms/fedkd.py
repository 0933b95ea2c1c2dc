"""FedKD: a large model that stays, a small one that travels, each learning from the other; updates travel as low-rank factors.

Reference:
    Wu, Wu, Lyu, Huang, Xie. Communication-efficient federated learning via knowledge distillation. Nature Communications
    13:2032, 2022, arXiv 2108.13323.

======================  ======================================================================================
paper                   here
======================  ======================================================================================
student (mentee)        `module`: the federation's module, what travels
teacher (mentor)        ``client.state["teacher"]``, `teacher`: the client's own, never sent; it is what is judged
L_t, L_s (eq. 1-7)      `dynfed_lightning.mutual.MutualDistillation`, `dynfed_lightning.losses`
W_h                     ``client.state["projections"]``, one per pair of layers, never sent
g_i = U S V (eq. 8)     `LowRank`, the first stage of `uplink` and `downlink`
T(t) (eq. 9)            `energy`, a schedule over the rounds
T_start, T_end          ``Linear(0.95, 0.98)``
sum_i n_i g_i / n       ``weighted_mean`` of the decoded factors; the server factorises it again for the way down
======================  ======================================================================================

Where the paper is silent: both models are compared layer by layer from the top, over tokens that are not padding; W_h learns
from the student's loss; the teacher's optimiser starts anew every round like the student's (`keep_optimizer` keeps it); D is
at least `floor`. Beyond the paper, off by default: quantised factors (`bits`) and error feedback.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.optim import Optimizer

from dynfed_lightning.algorithm import Client, CodecLike, Received, Reply, Server, Update, total_examples
from dynfed_lightning.algorithms._local_models import LocalModels, check_finite, kept, mean_scalar, on_cpu, remembered
from dynfed_lightning.algorithms.fedavg import FedAvg
from dynfed_lightning.codec import Codec
from dynfed_lightning.hidden import HiddenLoss
from dynfed_lightning.local import LocalExecutor
from dynfed_lightning.mutual import MutualDistillation, check_pair
from dynfed_lightning.schedules import Schedule
from dynfed_lightning.seeds import derive_seed
from dynfed_lightning.stages import ErrorFeedback, LowRank, Quantize, Stage
from dynfed_lightning.stages.low_rank import FEDKD
from dynfed_lightning.tensors import Tensors, difference, load_weights, travelling, weighted_mean, weights_of

_OPTIMIZERS = ("optimizer", "projection_optimizer")  # the teacher's and W_h's, in `MutualDistillation.state_dict`


class FedKD(FedAvg):
    """Federated learning by adaptive mutual distillation; the federation's module is the student.

    A client whose teacher or W_h does not stay finite is left out of the round (``failed/nan_model``) and goes on from what it
    had before. A run resumes only from a checkpoint of the same initial teachers.

    Clients are judged by their teachers (``accuracy``), and the student beside them (``global_accuracy``). Per round
    ``teacher_loss`` and ``student_loss`` are the mean task losses; ``train_loss`` is the student's.

    Args:
        teacher: a network or LightningModule that every client starts from, a mapping from client id to such a model, or a
            function of the client id (clients may have different architectures; before training, those of up to 64 clients
            are made and checked). A network trains with the student's recipe: its optimiser's class, learning rate and
            defaults; a LightningModule with its own.
        energy: T of eq. 9, the share of a matrix's squared norm that its factors keep, in (0, 1], or a schedule over rounds;
            None, the paper's ``Linear(0.95, 0.98)``.
        uplink: codec of the student's update; default ``Codec(LowRank(energy))``.
        downlink: of the mean update, factorised again; default the same.
        bits: also quantise the factors, both ways, to 1 to 8 bits.
        error_feedback: clients add what their last upload lost to their next.
        downlink_feedback: what the last download lost is part of the next. The paper's server forgets it: it goes on from
            what its clients hold.
        distil: False: teacher and student are trained side by side, neither learning from the other.
        hidden: the hidden loss L_h: ``"auto"``, where both models return hidden states; True, insist; False, without.
        attentions: attention maps in L_h, likewise.
        adaptive: False: distillation is not divided by D.
        weight: what multiplies the distillation, or a pair (student's, teacher's). The paper's is 1; a teacher far better than
            the student learns more from the labels alone, with less than that on its side.
        svd: False: updates travel as they are (or quantised, with `bits`).
        layer_map: see `MutualDistillation`, as the next two.
        features: pairs (student's layer, teacher's layer) by name, for models that return only logits.
        projection: have W_h.
        floor: the least D. A client of one class soon has task losses near 0, which would let L_h / D run away.
        keep_optimizer: the state of the teacher's optimiser and of W_h's (moments) stays on the client from round to round.
            Learning rates and schedulers start anew every round like the student's.
        teacher_optimizer: makes the teachers' optimiser from their parameters, instead of the above.

    Raises:
        TypeError: `teacher` is none of these.
        ValueError: an argument out of range.
    """

    personalised = True
    reports_global = True
    reply_scalars = ("loss", "teacher_loss")

    def __init__(
        self,
        teacher: nn.Module | Mapping[int, nn.Module] | Callable[[int], nn.Module],
        energy: float | Schedule | None = None,
        *,
        uplink: CodecLike = None,
        downlink: CodecLike = None,
        bits: int | None = None,
        error_feedback: bool = False,
        downlink_feedback: bool = False,
        distil: bool = True,
        hidden: bool | str = "auto",
        attentions: bool | str = "auto",
        adaptive: bool = True,
        weight: float | tuple[float, float] = 1.0,
        svd: bool = True,
        layer_map: int | Sequence[tuple[int, int]] | None = None,
        features: Sequence[tuple[str, str]] = (),
        projection: bool = True,
        floor: float = 1e-2,
        keep_optimizer: bool = False,
        teacher_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
    ) -> None:
        if (uplink is not None and error_feedback) or (
            uplink is not None and downlink is not None and bits is not None
        ):
            raise ValueError("Expected `bits` and `error_feedback`, or codecs of your own, but got both.")
        energy = FEDKD if energy is None else energy
        chain: list[Stage] = [LowRank(energy)] if svd else []
        chain += [] if bits is None else [Quantize(bits)]
        up = Codec(ErrorFeedback(*chain)) if error_feedback else Codec(*chain)
        super().__init__(
            uplink=up if uplink is None else uplink, downlink=Codec(*chain) if downlink is None else downlink
        )
        self.teachers = LocalModels(teacher, "teacher")
        self.energy = energy
        self.downlink_feedback = downlink_feedback
        self.keep_optimizer = keep_optimizer
        self.teacher_optimizer = teacher_optimizer
        self._distillation: dict[str, Any] = {
            "hidden": hidden,
            "attentions": attentions,
            "layer_map": layer_map,
            "features": features,
            "projection": projection,
            "adaptive": adaptive,
            "weight": check_pair("weight", weight) if distil else 0.0,
            "floor": floor,
        }
        # Says now what is wrong with these; whether they fit the models is seen in `setup`.
        HiddenLoss(hidden, attentions, layer_map=layer_map, features=bool(features), projection=projection)
        MutualDistillation(nn.Linear(1, 1), floor=floor)
        self._seed = 0

    # ------------------------------------------------------------------ set-up

    def setup(self, server: Server, executor: LocalExecutor) -> None:
        """Check that teacher and student fit together, on a batch if there is one, and make their optimisers.

        Raises:
            ValueError: no logits, other classes, layers or sizes that do not match; a client without a teacher; an optimiser
                that cannot be made again for the teacher or W_h.
        """
        super().setup(server, executor)
        self._seed = server.seed
        self.teachers.check_clients(server.num_clients)
        student = server.new_module().to("cpu")
        batch = None if server.probe is None else server.probe()
        for client_id in self.teachers.kinds(server.num_clients):
            teacher = self.teachers.fresh(client_id, student, server.seed)
            self._mutual(client_id, teacher).check(student, batch)

    def identity(self) -> dict[str, Any]:
        """The teachers as they start: what clients do not remember of theirs (what is frozen) must be the same."""
        return self.teachers.identity(self._seed)

    def _mutual(self, client_id: int, teacher: L.LightningModule) -> MutualDistillation:
        return MutualDistillation(
            teacher,
            role="student",
            peer_optimizer=self.teacher_optimizer,
            seed=derive_seed(self._seed, "W_h", client_id),
            **self._distillation,
        )

    # ------------------------------------------------------------------ client

    def client_step(self, client: Client, module: L.LightningModule, received: Received) -> Update:
        """Train student and teacher on the same batches, each learning from the other; upload the student's update."""
        names = load_weights(module, received.tensors)
        teacher = self.teachers.restore(client.id, client.state, module, self._seed)
        own = kept(teacher)
        mutual = self._mutual(client.id, teacher)
        mutual.load_state_dict({n: client.state[n] for n in ("projections", *_OPTIMIZERS) if n in client.state})
        result = client.fit(module, callbacks=[mutual])
        memory: dict[str, Any] = {"client": client.id, "teacher": remembered(teacher, own, client.id, "teacher")}
        after = mutual.state_dict()
        check_finite(after["projections"], client.id, "W_h")
        if after["projections"]:
            memory["projections"] = on_cpu(after["projections"])
        for name in _OPTIMIZERS if self.keep_optimizer else ():
            if name in after:  # not its groups: they hold learning rates that a scheduler has lowered
                memory[name] = {"state": on_cpu(after[name]["state"])}
                check_finite(memory[name], client.id, "optimizer")
        client.state.update(memory)
        losses = mutual.means
        scalars = {
            "loss": losses.get("student_loss", result.loss or 0.0),
            "teacher_loss": losses.get("teacher_loss", 0.0),
        }
        return Update(difference(weights_of(module, names), received.tensors), scalars=scalars)

    def personal_model(
        self,
        client_state: Mapping[str, Any],
        module: L.LightningModule,
        global_weights: Tensors,
        client_id: int | None = None,
    ) -> L.LightningModule:
        """The client's teacher; as it starts, for a client that has not trained yet."""
        return self.teachers.restore(client_id, client_state, module, self._seed)

    # ------------------------------------------------------------------ server

    def server_step(self, server: Server, replies: Sequence[Reply]) -> None:
        """``w_t+1 = w^_t + sum_k (n_k / n) g^_k``, w^_t what the clients hold and g^_k their updates as decoded.

        So it is with the default server optimiser; any other is given the mean update alone, and steps from w^_t.
        """
        update = weighted_mean([r.tensors for r in replies], total_examples(replies))
        if not self.downlink_feedback:
            live, raw = travelling(server.module)
            with torch.no_grad():
                for name in live.keys() - raw:
                    live[name].copy_(server.received[name])
        server.apply(update)
        server.metrics["student_loss"] = mean_scalar(replies, "loss")
        server.metrics["teacher_loss"] = mean_scalar(replies, "teacher_loss")
        for r in replies:
            server.client_metrics[r.client_id] = {"teacher_loss": r.scalars["teacher_loss"]}
