"""Two models that learn from one batch and from each other, under any ``L.Trainer``.

`MutualDistillation` is a callback: the module that the Trainer fits is one side, the callback's peer the other. Beside the
federation (FedKD, FML) it is of use wherever a large and a small model are to be trained at once::

    trainer = L.Trainer(callbacks=[MutualDistillation(peer=large_model)])
    trainer.fit(small_module, loader)                       # both are trained; large_model is in place
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynfed_lightning.batches import call_model, split_batch, take
from dynfed_lightning.callbacks import ExtraLoss
from dynfed_lightning.capture import AskForStates, Capture, LayerMap, find_layer
from dynfed_lightning.co_training import RandomStream, check_trainer, start_equal, step, world_size
from dynfed_lightning.hidden import HiddenLoss, Switch
from dynfed_lightning.losses import Sides, adaptive_divisor, mutual_kl, mutual_losses
from dynfed_lightning.module import ClientModule
from dynfed_lightning.optimizers import one_optimizer, same_kind, take_up
from dynfed_lightning.seeds import derive_seed

Pair = float | tuple[float, float]


class MutualDistillation(ExtraLoss):
    """Trains a peer beside the module, both learning from the labels and from each other (Wu et al., 2022, eq. 1-7).

    The module's own ``training_step`` gives the task loss of its side, so its weighting and label smoothing hold; the peer's
    gives the other. One backward pass over the sum of both sides' losses, which share no parameter, then one step of the
    peer's own optimiser right before every step of the module's. Logits, hidden states and attention maps are read by forward
    hooks. The peer draws its random numbers (dropout) from a stream of its own: the module's are those it has without a peer.

    It honours gradient accumulation, ``gradient_clip_val`` (the peer's gradients are clipped by the same rule, by their own
    norm), mixed precision with and without a gradient scaler, and DDP (the peer's gradients are averaged over the ranks); it
    refuses strategies that shard parameters. `state_dict` holds the peer, its optimiser and W_h, so Lightning's checkpoints
    resume both sides; with ``DDPStrategy(start_method="spawn")``, whose processes end with the fit, they are where the trained
    peer is to be found. The peer's other hooks (``on_train_start``, ...) are not called.

    Args:
        peer: a network that returns logits (then its task loss is cross-entropy), or a LightningModule with a
            ``training_step`` of its own. Trained in place.
        role: which side the module is, ``"student"`` or ``"teacher"``; the peer is the other.
        peer_optimizer: makes the peer's optimiser from its parameters; default: a LightningModule's own
            ``configure_optimizers``, AdamW at 1e-3 for a network.
        hidden: add the hidden loss: True, False, or ``"auto"``, where both models return hidden states.
        attentions: attention maps in it, likewise. Where the sides have different numbers of heads their means are compared.
        layer_map: which layers are matched: None, the student's all; a number of its last ones; or pairs (student's layer,
            teacher's layer), 0 the embeddings. See `dynfed_lightning.capture.match_layers`.
        features: pairs of names of layers, (student's, teacher's), compared instead of the models' hidden states.
        projection: map the student's hidden states by a learnable W_h, one per matched pair. It learns from the student's
            loss, by an optimiser like the peer's.
        adaptive: divide the distillation by D, the sum of both task losses (eq. 3-5).
        weight: what multiplies the distillation, or a pair (student's, teacher's). 0: both are trained, neither learns from
            the other.
        task_weight: what multiplies the task losses, likewise.
        floor: the least D, > 0.
        logits: names of the submodules that return the logits, (module's, peer's), where they are not found.
        seed: of W_h's first values.

    Attributes:
        lr_factor: multiplies the peer's learning rates; an executor sets it, as it scales the module's.

    Raises:
        ValueError: an argument out of range, or models that do not fit together (when training starts, before any step).
        TypeError: `peer` is no module.
    """

    def __init__(
        self,
        peer: nn.Module,
        *,
        role: str = "student",
        peer_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        hidden: Switch = "auto",
        attentions: Switch = "auto",
        layer_map: LayerMap = None,
        features: Sequence[tuple[str, str]] = (),
        projection: bool = True,
        adaptive: bool = True,
        weight: Pair = 1.0,
        task_weight: Pair = 1.0,
        floor: float = 1e-6,
        logits: tuple[str | None, str | None] = (None, None),
        seed: int = 0,
    ) -> None:
        if not isinstance(peer, nn.Module):
            raise TypeError(f"Expected `peer` to be a torch module, but got {type(peer).__name__}.")
        if role not in ("student", "teacher"):
            raise ValueError(f"Expected `role` to be 'student' or 'teacher', but got {role!r}.")
        if not any(p.requires_grad for p in peer.parameters()):
            raise ValueError("Expected `peer` to have trainable parameters, but it has none.")
        if isinstance(peer, L.LightningModule) and not peer.automatic_optimization:
            raise ValueError(f"Expected a peer with automatic optimisation, but {type(peer).__name__} is manual.")
        if not floor > 0:
            raise ValueError(f"Expected `floor` to be a positive number, but got {floor}.")
        self.given = peer
        # A bare network gets a training step and an optimiser; its weights are shared, not copied.
        self.peer: L.LightningModule = (
            peer if isinstance(peer, L.LightningModule) else ClientModule(peer, lr=1e-3, optimizer="adamw")
        )
        self.role = role
        self.peer_optimizer = peer_optimizer
        self.adaptive = adaptive
        self.weight = check_pair("weight", weight)
        self.task_weight = check_pair("task_weight", task_weight)
        self.floor = floor
        self.logits = tuple(logits)
        self.features = [(str(s), str(t)) for s, t in features]
        for pair in self.features:
            find_layer(self.peer, pair[self._other], "peer")
        self.hidden = HiddenLoss(
            hidden, attentions, layer_map=layer_map, features=bool(self.features), projection=projection, seed=seed
        )
        self.lr_factor = 1.0
        self._captures: tuple[Capture, Capture] | None = None
        self._asked: list[AskForStates] = []
        self._optimizer: Optimizer | None = None
        self._schedulers: list[Any] = []
        self._projection_optimizer: Optimizer | None = None
        self._random: RandomStream | None = None
        self._pending = False
        self._steps = 0
        self._loaded: Mapping[str, Any] | None = None
        self._modes: list[tuple[nn.Module, bool]] = []
        self._sums: dict[str, Tensor] = {}
        self._batches = 0

    @property
    def _own(self) -> int:
        """The module's place in a pair (student's, teacher's)."""
        return 0 if self.role == "student" else 1

    @property
    def _other(self) -> int:
        return 1 - self._own

    @property
    def _distils(self) -> bool:
        return any(w != 0 for w in self.weight)

    # ---------------------------------------------------------- start and end

    def check(self, module: L.LightningModule, batch: Any = None) -> None:
        """Make the optimisers, and pass two rows of `batch` through both models, before any training.

        Raises:
            ValueError: an optimiser that cannot be made; no logits, different classes, layers or sizes that do not match.
        """
        optimizer, _ = self._make_optimizer()
        if not self._distils or batch is None:
            return
        inputs = take(split_batch(batch)[0], 2)
        captures = self._listen(module)
        try:
            seen = []
            for model, capture in zip((module, self.peer), captures, strict=True):
                modes = [(m, m.training) for m in model.modules()]
                capture.start()
                with torch.no_grad():
                    call_model(model.eval(), inputs)
                for m, training in modes:
                    m.training = training
                seen.append(capture.take())
            self.hidden.match(seen[self._own], seen[self._other])
            if len(self.hidden.maps):
                self._optimizer_of_maps(optimizer)
        finally:
            self._stop_listening(captures)

    def _listen(self, module: L.LightningModule) -> tuple[Capture, Capture]:
        wanted = self.hidden.hidden is not False and not self.features, self.hidden.attentions is not False
        self._asked = [AskForStates(m, *wanted) for m in (module, self.peer)]
        mine = [pair[self._own] for pair in self.features]
        theirs = [pair[self._other] for pair in self.features]
        captures: list[Capture] = []
        try:
            captures.append(Capture(module, "module", logits=self.logits[0], features=mine))
            captures.append(Capture(self.peer, "peer", logits=self.logits[1], features=theirs))
        except BaseException:  # a name that the second does not have: leave no hook on the first
            self._stop_listening(captures)
            raise
        return captures[0], captures[1]

    def _stop_listening(self, captures: Iterable[Capture]) -> None:
        for capture in captures:
            capture.remove()
        for asked in self._asked:
            asked.undo()
        self._asked = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Bring the peer to the module's device, make its optimiser, take up a checkpoint, start to listen.

        Raises:
            ValueError: a strategy or precision under which the peer cannot be trained rightly.
        """
        if pl_module is self.peer or {id(p) for p in pl_module.parameters()} & {id(p) for p in self.peer.parameters()}:
            raise ValueError("Expected a peer that shares no parameters with the module: copy it first.")
        plugin = check_trainer(trainer)
        loaded, self._loaded = self._loaded or {}, None
        if "peer" in loaded:
            self.given.load_state_dict(loaded["peer"])
        self.peer.to(pl_module.device)
        if plugin is not None:
            plugin.convert_module(self.peer)
        self._modes = [(m, m.training) for m in self.peer.modules()]
        if not self.given.training:  # as `from_pretrained` leaves it; single layers in eval mode stay so
            self.peer.train()
        if "projections" in loaded:
            self.hidden.load_weights(loaded["projections"])
        self.hidden.to(pl_module.device)
        self._projection_optimizer = None
        self._optimizer, self._schedulers = self._make_optimizer()
        if "optimizer" in loaded:
            take_up(self._optimizer, loaded["optimizer"])
            for config, state in zip(self._schedulers, loaded.get("schedulers", ()), strict=False):
                config.scheduler.load_state_dict(state)
        if len(self.hidden.maps):
            self._projection_optimizer = self._optimizer_of_maps(self._optimizer)
            if "projection_optimizer" in loaded:
                take_up(self._projection_optimizer, loaded["projection_optimizer"])
        seed = derive_seed(torch.initial_seed(), "peer")
        self._random = RandomStream(seed, pl_module.device, loaded.get("random"))
        if world_size(trainer) > 1:
            start_equal((*self.peer.parameters(), *self.peer.buffers(), *self.hidden.parameters()))
        self._pending, self._steps = False, int(loaded.get("steps", 0))
        self._sums, self._batches = {}, 0
        self._captures = self._listen(pl_module) if self._distils else None
        self.peer.zero_grad()
        object.__setattr__(self.peer, "_trainer", trainer)  # its step may ask for the epoch
        super().on_train_start(trainer, pl_module)

    def _unwrap(self) -> None:
        super()._unwrap()
        if self._captures is not None:
            self._stop_listening(self._captures)
            self._captures = None
        for m, training in self._modes:
            m.training = training
        self._modes = []
        object.__setattr__(self.peer, "_trainer", None)
        self.peer.zero_grad()
        self.peer.to("cpu")  # as the strategy does with the module

    # -------------------------------------------------------------- every step

    def before_step(self, pl_module: L.LightningModule, batch: Any) -> None:
        """Listen to the module."""
        if self._captures is not None:
            self._captures[0].start()

    def extra(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor, batch: Any, batch_idx: int
    ) -> Tensor:
        """Eq. 6 + eq. 7: the sum of both sides' losses."""
        ours = None if self._captures is None else self._captures[0].take()
        theirs = None
        assert self._random is not None
        with self._random.used():
            if self._captures is not None:
                self._captures[1].start()
            peer_loss = self._peer_step(pl_module, batch, batch_idx)
            if self._captures is not None and peer_loss is not None:
                theirs = self._captures[1].take()
        if peer_loss is None:  # it skips this batch, and nobody learns from it
            return loss
        task = Sides(*self._ordered(loss, peer_loss))
        kl = hidden = None
        if ours is not None and theirs is not None:
            student, teacher = self._ordered(ours, theirs)
            # Outside of autocast: the losses are float32 whatever the models run in.
            with torch.autocast(loss.device.type, enabled=False):
                made = len(self.hidden.maps)
                hidden = self.hidden(student, teacher, split_batch(batch)[0])
                kl = mutual_kl(student.logits, teacher.logits)
            if len(self.hidden.maps) > made:
                assert self._optimizer is not None
                self._projection_optimizer = self._optimizer_of_maps(self._optimizer)
        totals = mutual_losses(
            task,
            kl,
            hidden,
            adaptive=self.adaptive,
            task_weight=self.task_weight,
            weight=self.weight,
            floor=self.floor,
        )
        self._pending = True
        self._note(trainer, pl_module, task, kl, hidden)
        return totals.student + totals.teacher

    def _ordered(self, own: Any, other: Any) -> tuple[Any, Any]:
        """(student's, teacher's)."""
        return (own, other) if self._own == 0 else (other, own)

    def _peer_step(self, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> Tensor | None:
        def log(name: str, value: Any, *_: Any, **__: Any) -> None:
            if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1):
                pl_module.log(f"peer/{name}", value)

        object.__setattr__(self.peer, "log", log)  # logging belongs to the module that the Trainer fits
        try:
            output: Any = self.peer.training_step(batch, batch_idx)
        finally:
            object.__delattr__(self.peer, "log")
        return output.get("loss") if isinstance(output, Mapping) else output

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Step the peer: its gradients are complete when the module's are, accumulated batches and all."""
        if not self._pending:
            return
        self._pending = False
        optimizers = [o for o in (self._optimizer, self._projection_optimizer) if o is not None]
        if self._projection_optimizer is not None:
            for group in self._projection_optimizer.param_groups:  # W_h follows the peer's schedule
                group["lr"] = optimizers[0].param_groups[0]["lr"]
        step(trainer, optimizers, self.lr_factor)
        self._steps += 1
        for s in self._schedulers:
            if s.interval == "step" and self._steps % s.frequency == 0:
                s.scheduler.step()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The peer's schedulers."""
        for s in self._schedulers:
            if s.interval == "epoch" and (trainer.current_epoch + 1) % s.frequency == 0:
                s.scheduler.step()

    # -------------------------------------------------------------- optimisers

    def _make_optimizer(self) -> tuple[Optimizer, list[Any]]:
        if self.peer_optimizer is None:
            return one_optimizer(self.peer, "The peer of MutualDistillation")
        made = self.peer_optimizer([p for p in self.peer.parameters() if p.requires_grad])
        if not isinstance(made, Optimizer):
            raise TypeError(f"Expected `peer_optimizer` to make an Optimizer, but it made {type(made).__name__}.")
        return made, []

    def _optimizer_of_maps(self, like: Optimizer) -> Optimizer:
        try:
            return same_kind(like, list(self.hidden.maps))
        except ValueError as error:
            raise ValueError(
                f"W_h learns by an optimizer like the peer's: {error} Or take projection=False."
            ) from error

    # ----------------------------------------------------------- what it tells

    def _note(self, trainer: L.Trainer, pl_module: L.LightningModule, task: Sides, kl: Any, hidden: Any) -> None:
        values = {"student_loss": task.student, "teacher_loss": task.teacher}
        if kl is not None:
            values.update(student_kl=kl.student, teacher_kl=kl.teacher)
        if hidden is not None:
            values["hidden_loss"] = hidden.student
        if kl is not None and self.adaptive:
            values["divisor"] = adaptive_divisor(task.student, task.teacher, self.floor)
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = value if name not in self._sums else self._sums[name] + value
            if getattr(trainer, "loggers", None):
                pl_module.log(f"mutual/{name}", value)
        self._batches += 1

    @property
    def means(self) -> dict[str, float]:
        """Means over the batches of the last fit: ``student_loss`` and ``teacher_loss`` (the task losses), and where there are
        any ``student_kl``, ``teacher_kl``, ``hidden_loss`` and ``divisor`` (D)."""
        return {name: float(total) / max(self._batches, 1) for name, total in self._sums.items()}

    # -------------------------------------------------------------- checkpoint

    def state_dict(self) -> dict[str, Any]:
        """The peer, its optimiser and schedulers, W_h and its optimiser, the random stream; ``weights_only`` reads it."""
        state: dict[str, Any] = {
            "peer": dict(self.given.state_dict()),
            "projections": self.hidden.weights(),
            "random": {} if self._random is None else dict(self._random.state),
            "steps": self._steps,
        }
        if self._optimizer is not None:
            state["optimizer"] = self._optimizer.state_dict()
            state["schedulers"] = [s.scheduler.state_dict() for s in self._schedulers]
        if self._projection_optimizer is not None:
            state["projection_optimizer"] = self._projection_optimizer.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` gave, or a part of it, when training starts next.

        Of an optimiser's state ``param_groups`` may be missing: then learning rates are those it starts with.
        """
        self._loaded = dict(state_dict)


def check_pair(name: str, value: Any) -> tuple[float, float]:
    """A number for both sides, or a pair (student's, teacher's), as a pair.

    Raises:
        ValueError: neither, or a negative number.
    """
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(isinstance(v, (int, float)) and not isinstance(v, bool) and v >= 0 for v in pair):
        raise ValueError(f"Expected `{name}` to be a number >= 0 or a pair (student's, teacher's), but got {value!r}.")
    return float(pair[0]), float(pair[1])
