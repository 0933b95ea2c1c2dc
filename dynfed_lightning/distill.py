"""The server's learning: distil the clients' soft labels into the averaged model (DynFed eq. 10-11, FedDF).

`Distillation` is the recipe, `Distillation.run` does one round of it: predictions of every client
(`predict.client_probs`), soft labels by a teacher policy (`teachers`), and a short nested fit of `ServerDistiller`, a
plain LightningModule.

References:
    DynFed: He et al., ACM MM 2025, doi 10.1145/3746027.3755451, eq. 5-11.
    FedDF: Lin et al., NeurIPS 2020, arXiv 2006.07242, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynfed_lightning.batches import Inputs, inputs_of, num_rows, take, to_device
from dynfed_lightning.predict import Forward, check_logits, client_probs, logits_or_output, predict_probs, preserved
from dynfed_lightning.quiet import device_of, fixed_threads, isolated_rng, quiet_fit, quiet_trainer
from dynfed_lightning.teachers import as_policy
from dynfed_lightning.teaching import TeacherChoice, TeacherContext, TeacherPolicy, check_choice
from dynfed_lightning.tensors import Tensors, load_weights, travelling, weights_of


class Public(Protocol):
    """What distillation needs of a public set."""

    @property
    def inputs(self) -> Inputs:
        """[n, ...], or a mapping of such tensors."""

    @property
    def labels(self) -> Tensor | None:
        """int64 [n], or ``None``."""


@dataclass(frozen=True)
class DistillResult:
    """One round of distillation.

    Attributes:
        weights: what travels of the student, after it.
        choice: who taught; a client whose predictions were not finite has weight 0.
        loss_before, loss_after: eq. 11 over the whole public set in eval mode, at the start and at the end.
        num_steps: optimiser steps made.
    """

    weights: Tensors
    choice: TeacherChoice
    loss_before: float
    loss_after: float
    num_steps: int


def distillation_loss(logits: Tensor, soft: Tensor, labels: Tensor | None, gamma: float, loss: str = "ce") -> Tensor:
    """``gamma CE(tau, p) + (1 - gamma) CE(y, p)``, the batch mean (DynFed eq. 10-11).

    Args:
        logits: [B, C] of the student.
        soft: [B, C], the soft labels tau.
        labels: int64 [B]; without them gamma counts as 1.
        gamma: the weight of the soft labels, 0 to 1.
        loss: ``"ce"``, or ``"kl_logits"``: KL(tau || p) in place of CE(tau, p), smaller by the entropy of tau and of
            the same gradient (FedDF's form, for which tau is the softmax of the mean logits).
    """
    log_p = logits.log_softmax(-1)
    taught = -(soft * log_p).sum(-1).mean()
    if loss == "kl_logits":
        taught = taught + torch.special.xlogy(soft, soft).sum(-1).mean()
    if labels is None or gamma == 1:
        return taught
    return gamma * taught + (1 - gamma) * F.nll_loss(log_p, labels)


class ServerDistiller(L.LightningModule):
    """Trains `student` on batches ``(inputs, soft labels)`` or ``(inputs, soft labels, labels)``.

    Args:
        student: maps inputs to logits [B, C] or an output that has them; of a LightningModule only ``forward`` is used.
        gamma: see `distillation_loss`.
        lr: of Adam.
        loss: see `distillation_loss`.
        schedule: ``"cosine"``: the rate falls to 0 over the fit, step by step; ``None``: constant.
        forward: ``forward(student, inputs) -> logits``; ``None``: `batches.call_model`.
    """

    def __init__(
        self,
        student: nn.Module,
        gamma: float = 1.0,
        lr: float = 1e-3,
        loss: str = "ce",
        schedule: str | None = None,
        forward: Forward | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.gamma = gamma
        self.lr = lr
        self.loss = loss
        self.schedule = schedule
        self.logits_of = forward

    def forward(self, inputs: Inputs) -> Tensor:
        """The student's logits [B, C]."""
        return (
            logits_or_output(self.student, inputs) if self.logits_of is None else self.logits_of(self.student, inputs)
        )

    def batch_loss(self, batch: Sequence[Any]) -> Tensor:
        """`distillation_loss` of a batch."""
        inputs, soft, *rest = batch
        logits = check_logits(self(inputs), *soft.shape).to(soft.dtype)  # a low-precision Trainer's loss is not low
        return distillation_loss(logits, soft, rest[0] if rest else None, self.gamma, self.loss)

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        """One batch of eq. 11."""
        return self.batch_loss(batch)

    def validation_step(self, batch: Sequence[Any], batch_idx: int) -> None:
        """Log ``distill_val_loss``, the mean over the held-out samples."""
        self.log("distill_val_loss", self.batch_loss(batch), on_epoch=True, batch_size=len(batch[1]))

    def configure_optimizers(self) -> Any:
        """Adam over the student's trainable parameters, with the schedule if there is one."""
        optimizer = torch.optim.Adam([p for p in self.student.parameters() if p.requires_grad], lr=self.lr)
        if self.schedule is None:
            return optimizer
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@dataclass
class Distillation:
    """The recipe of one round's distillation; the defaults go with `Competence` teachers.

    `DynFed` itself runs ``Distillation.named("balanced")`` unless told otherwise.

    Args:
        policy: a name (see ``teachers.POLICIES``) or a `TeacherPolicy`.
        passes: M of eq. 5.
        epochs: over the public set, at most.
        batch_size: of the student's training, and the mini-batch of the policies' diversity term.
        lr: of Adam.
        gamma: weight of the soft labels (eq. 11), 0 to 1; ``None``: 0.5. Without labels it is 1 whatever is given here.
        temperature: of the teachers: tau^(1/temperature), normalised.
        loss: see `distillation_loss`.
        schedule: ``None`` or ``"cosine"``.
        early_stop_patience: stop when the loss on held-out public samples has not fallen for so many epochs, and keep
            the weights of the best epoch; ``None``: train all epochs on all samples.
        val_fraction: the part of the public set held out for that.
        threads: CPU threads while it runs, for the same bits everywhere; ``None``: as they are.
        trainer_kwargs: passed to the nested ``L.Trainer``.

    Raises:
        ValueError: a value out of its range.
    """

    policy: str | TeacherPolicy = "competence"
    passes: int = 4
    epochs: int = 5
    batch_size: int = 64
    lr: float = 1e-3
    gamma: float | None = None
    temperature: float = 1.0
    loss: str = "ce"
    schedule: str | None = None
    early_stop_patience: int | None = None
    val_fraction: float = 0.1
    threads: int | None = 1
    trainer_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.policy = as_policy(self.policy)
        for name in ("passes", "epochs", "batch_size", "early_stop_patience", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Expected `{name}` to be at least 1, but got {value}.")
        for name in ("lr", "temperature"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"Expected `{name}` to be above 0, but got {value}.")
        if self.gamma is not None and not 0 <= self.gamma <= 1:
            raise ValueError(f"Expected `gamma` to be from 0 to 1, but got {self.gamma}.")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"Expected `val_fraction` to be above 0 and below 1, but got {self.val_fraction}.")
        check_choice("loss", self.loss, ("ce", "kl_logits"))
        if self.schedule is not None:
            check_choice("schedule", self.schedule, ("cosine",))

    @property
    def needs(self) -> tuple[str, ...]:
        """The optional fields of `TeacherContext` that the policy cannot do without."""
        return as_policy(self.policy).needs

    @classmethod
    def named(cls, policy: str) -> Distillation:
        """The recipe that goes with a teacher policy: 20 epochs for ``"balanced"``, whose labels gain from being fitted
        closely, else 5 (`Competence` loses with more: its labels fall behind the student's own).

        >>> Distillation.named("balanced").epochs, Distillation.named("active").epochs
        (20, 5)
        """
        return cls(policy=policy, epochs=20 if policy == "balanced" else 5)

    @classmethod
    def feddf(cls, **changes: Any) -> Distillation:
        """FedDF's recipe: KL to the softmax of the mean logits, Adam 1e-3 cosine, batch 128, early stopping.

        >>> Distillation.feddf(epochs=10).policy
        Mean(average='logits', weighted=False)
        """
        recipe: dict[str, Any] = {
            "policy": "mean",
            "passes": 1,
            "epochs": 30,
            "batch_size": 128,
            "loss": "kl_logits",
            "schedule": "cosine",
            "early_stop_patience": 5,
        }
        return cls(**{**recipe, **changes})

    def run(
        self,
        module: nn.Module,
        teachers: Sequence[Tensors],
        start: Tensors,
        public: Public,
        ctx: TeacherContext,
        *,
        steps: Sequence[Mapping[str, Tensor] | None] | None = None,
        seed: int,
        num_classes: int | None = None,
        forward: Forward | None = None,
    ) -> DistillResult:
        """Teach the model `start` what `teachers` know of the public inputs.

        The result depends on the arguments alone (on one machine), bit for bit; `module`, the global random generators
        and the number of threads come back as they were.

        Args:
            module: the network to run everything in; on its device.
            teachers: weights of the K clients, in the order of `ctx`.
            start: weights the student starts from: the clients' mean (FedDF line 6).
            public: ``inputs`` [n, ...] or a mapping of such tensors, and ``labels`` int64 [n] or ``None``.
            ctx: what is known of the clients; ``student_probs`` and ``generator`` are filled in where they are
                ``None``, ``batch_size`` is this recipe's.
            steps: each client's quantiser steps (see `predict_probs`).
            seed: of everything random here, 0 to 2**64 - 1.
            num_classes: C, checked against the network's output if given.
            forward: see `predict_probs`.

        Raises:
            ValueError: a public set of fewer than 2 samples, labels that do not fit, outputs that are not logits
                [B, C], no client with finite predictions, or a context that lacks what the policy needs.
            RuntimeError: the student's weights did not stay finite.
        """
        inputs, labels = inputs_of(public.inputs), public.labels
        n = num_rows(inputs)
        if n < 2:
            raise ValueError(f"Expected `public` to hold at least 2 samples, but it holds {n}.")
        if labels is not None and labels.shape != (n,):
            raise ValueError(f"Expected `public.labels` to have shape [{n}], but got {list(labels.shape)}.")
        with fixed_threads(self.threads), isolated_rng(seed), preserved(module):
            draw = ctx.generator if ctx.generator is not None else torch.Generator().manual_seed(seed)
            own: dict[str, Any] = {"forward": forward, "num_classes": num_classes}
            probs = client_probs(module, teachers, inputs, self.passes, steps, draw, **own)
            load_weights(module, start)
            student = ctx.student_probs
            if student is None:
                student = predict_probs(module, inputs, passes=1, **own)
            ctx = replace(ctx, student_probs=student, generator=draw, batch_size=self.batch_size)
            choice = choose_among_finite(as_policy(self.policy), probs, ctx)
            return self._train(module, inputs, choice, labels, seed, forward)

    def _train(
        self, module: nn.Module, x: Inputs, choice: TeacherChoice, y: Tensor | None, seed: int, forward: Forward | None
    ) -> DistillResult:
        soft = choice.soft_labels
        if self.temperature != 1:
            soft = (soft.clamp_min(torch.finfo(soft.dtype).tiny).log() / self.temperature).softmax(-1)
        gamma = 1.0 if y is None else 0.5 if self.gamma is None else self.gamma
        data = [to_device(t, device_of(module)) for t in (x, soft, y) if t is not None]
        distiller = ServerDistiller(module, gamma, self.lr, self.loss, self.schedule, forward)
        flags = [(m, m.training) for m in module.modules()]
        before = _mean_loss(distiller, data)
        for m, training in flags:  # the student trains as it came: what its owner keeps in eval mode stays there
            m.training = training
        callbacks = list(self.trainer_kwargs.get("callbacks") or [])
        shown, val, best = data, None, None
        if self.early_stop_patience is not None:
            n = len(soft)
            held = min(n - 1, max(1, int(n * self.val_fraction)))
            order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
            val = Batches([take(t, order[:held]) for t in data], self.batch_size, seed=None)
            shown = [take(t, order[held:]) for t in data]
            best = _KeepBest(self.early_stop_patience)
            callbacks.append(best)
        trainer = quiet_trainer(module, **{"max_epochs": self.epochs, **self.trainer_kwargs, "callbacks": callbacks})
        num_steps = quiet_fit(trainer, distiller, Batches(shown, self.batch_size, seed), val)
        if best is not None and best.weights is not None:
            load_weights(module, best.weights)
        after = _mean_loss(distiller, data)
        weights = weights_of(module)
        if not all(bool(torch.isfinite(t).all()) for t in weights.values()):
            raise RuntimeError("Expected the student's weights to stay finite during distillation; lower `lr`.")
        return DistillResult(weights, choice, before, after, num_steps)


def choose_among_finite(policy: TeacherPolicy, probs: Tensor, ctx: TeacherContext) -> TeacherChoice:
    """`policy` over the clients with finite predictions; the others get weight and share 0.

    Finite weights can still overflow inside a network, and one such client must not spoil the round.

    Raises:
        ValueError: no client is left.
    """
    finite = torch.isfinite(probs).flatten(1).all(1)
    if bool(finite.all()):
        return policy(probs, ctx)
    if not bool(finite.any()):
        raise ValueError("Expected finite predictions from at least one client, but all have NaN or infinity.")
    choice = policy(probs[finite], ctx.of_clients(finite))
    weights = probs.new_zeros(probs.shape[:2])
    weights[finite] = choice.weights
    share = probs.new_zeros(len(probs))
    share[finite] = choice.share
    return replace(choice, weights=weights, share=share)


class Batches:
    """Mini-batches of aligned tensors, or mappings of such; the k-th iteration's order is a function of (`seed`, k) only.

    A last batch of one sample joins the one before it: batch normalisation cannot train on a single sample.

    Args:
        tensors: aligned in their first dimension.
        batch_size: samples in a batch.
        seed: of the order; ``None``: as they are.
    """

    def __init__(self, tensors: Sequence[Any], batch_size: int, seed: int | None) -> None:
        self.tensors = tensors
        self.seed = seed
        self.epoch = 0
        n = num_rows(tensors[0])
        self.bounds = [*range(0, n, batch_size), n]
        if len(self.bounds) > 2 and self.bounds[-1] - self.bounds[-2] == 1:
            del self.bounds[-2]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __iter__(self) -> Iterator[list[Any]]:
        n = self.bounds[-1]
        order = torch.arange(n)
        if self.seed is not None:
            # A 64-bit mix, so that (seed, epoch) and (seed + 1, epoch - 1) are not the same order.
            mixed = (self.seed + (self.epoch + 1) * 0x9E3779B97F4A7C15) % 2**64
            order = torch.randperm(n, generator=torch.Generator().manual_seed(mixed))
        self.epoch += 1
        for low, high in zip(self.bounds, self.bounds[1:], strict=False):
            yield [take(t, order[low:high]) for t in self.tensors]


class _KeepBest(L.Callback):
    """Stop after `patience` epochs without a lower held-out loss; remember the best epoch's weights."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.lowest = math.inf
        self.waited = 0
        self.weights: Tensors | None = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loss = float(trainer.callback_metrics["distill_val_loss"])
        if loss < self.lowest:
            self.lowest, self.waited = loss, 0
            assert isinstance(pl_module, ServerDistiller)
            live, _ = travelling(pl_module.student)
            self.weights = {name: t.detach().clone() for name, t in live.items()}
        else:
            self.waited += 1
            trainer.should_stop = trainer.should_stop or self.waited >= self.patience


@torch.no_grad()
def _mean_loss(distiller: ServerDistiller, data: Sequence[Any], size: int = 512) -> float:
    """Eq. 11 over all samples, in eval mode."""
    distiller.student.eval()
    n = num_rows(data[0])
    losses = [
        float(distiller.batch_loss([take(t, slice(i, i + size)) for t in data])) * min(size, n - i)
        for i in range(0, n, size)
    ]
    return sum(losses) / n
