"""Per-FedAvg: the global model is one from which a gradient step on a client's own rows leads to a good model of its own.

Reference:
    Fallah, Mokhtari, Ozdaglar. Personalized Federated Learning with Theoretical Guarantees: A Model-Agnostic Meta-Learning
    Approach. NeurIPS 2020, arXiv 2002.07948, algorithm 1; section 5 for FO and HF.

==================  ==========================================================================================
paper               here
==================  ==========================================================================================
w_t                 `module`: what travels
alpha               `alpha`, the inner step
beta                the learning rate of the module's own optimiser, which takes the outer step
tau                 local steps: the executor's ``max_epochs`` or ``max_steps``
D, D', D''          two (HF: three) parts of a batch
w~ = w - alpha g    `MetaSteps`: g the gradient at w on D
FO                  ``grad f(w~; D')``: the Hessian is taken to be 0
HF                  ``(I - alpha H(w; D'')) grad f(w~; D')``, H's product by a central difference of gradients (eq. 14)
personal model      `PerFedAvg.adapt`: w after `steps` inner steps on the client's rows, made when it is judged
==================  ==========================================================================================
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.apply_func import apply_to_collection
from torch import Tensor
from torch.optim import SGD, Optimizer

from dynfed_lightning.algorithm import Client, CodecLike, Received
from dynfed_lightning.algorithms._local_models import check_finite, kept
from dynfed_lightning.algorithms.fedavg import FedAvg
from dynfed_lightning.callbacks import ExtraLoss
from dynfed_lightning.co_training import RandomStream, StepAgain
from dynfed_lightning.errors import ClientFailure
from dynfed_lightning.local import TrainerLocal
from dynfed_lightning.schedules import Constant
from dynfed_lightning.seeds import derive_seed
from dynfed_lightning.tensors import load_weights, weights_of

log = logging.getLogger(__name__)
VARIANTS = {"FO": 2, "HF": 3}  # and how many independent batches a step takes
# Of a client's Trainer: what would make of a plain gradient step another, stop before it, or tell of it.
_NOT_PLAIN = (
    "accumulate_grad_batches",
    "enable_checkpointing",
    "gradient_clip_algorithm",
    "gradient_clip_val",
    "logger",
    "max_time",
)


class PerFedAvg(FedAvg):
    """Personalised FedAvg by model-agnostic meta-learning.

    Clients are judged by the global model after `steps` plain gradient steps at `alpha` on their own training rows
    (``accuracy``), and the global model beside them (``global_accuracy``).

    A batch is dealt out: its first half is D, its second D' (thirds for HF), so a step costs what FedAvg's does (HF: a third
    more), at half (a third of) the rows a gradient. A batch with fewer than two rows a part is used whole each time.

    Args:
        alpha: the inner learning rate, >= 0; 0 is FedAvg on the rows of D'.
        variant: ``"FO"`` (first-order) or ``"HF"`` (Hessian-free).
        delta: of HF's central difference, > 0.
        steps: inner steps that make a client's own model when it is judged.
        whole: D, D' and D'' are each the whole batch: not independent any more, but of full size, at twice (HF: four times)
            the cost.
        uplink: see `FedAvg`.
        downlink: see `FedAvg`.

    Raises:
        ValueError: an argument out of range.
    """

    personalised = True
    reports_global = True
    adapts = True

    def __init__(
        self,
        alpha: float = 0.01,
        variant: str = "FO",
        *,
        delta: float = 1e-3,
        steps: int = 1,
        whole: bool = False,
        uplink: CodecLike = None,
        downlink: CodecLike = None,
    ) -> None:
        super().__init__(uplink=uplink, downlink=downlink)
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"Expected `steps` to be a positive integer, but got {steps!r}.")
        MetaSteps(alpha, variant, delta, whole)  # says now what is wrong with these
        self.alpha, self.variant, self.delta, self.steps, self.whole = alpha, variant, delta, steps, whole

    @property
    def name(self) -> str:
        return "Per-FedAvg"

    def client_callbacks(self, client: Client, received: Received) -> list[L.Callback]:
        """The meta-gradient instead of the gradient."""
        return [MetaSteps(self.alpha, self.variant, self.delta, self.whole)]

    def adapt(self, client: Client, module: L.LightningModule) -> None:
        """`steps` steps of plain SGD at `alpha`, on the client's batches, without clipping or accumulating whatever the client
        trains with; a module that does not survive them (a loss or weights that are not finite) stays as it was."""
        before, finite = weights_of(module), kept(module)
        tensors = [*module.parameters(), *module.buffers()]
        dtypes = [t.dtype for t in tensors]

        def configure_optimizers() -> Optimizer:
            return SGD([p for p in module.parameters() if p.requires_grad], lr=self.alpha)

        executor = copy.copy(client.executor)  # as the client trains, but for the steps and what is told of them
        executor.max_steps, executor.callbacks, executor.lr_decay = self.steps, [], Constant(1.0)
        if isinstance(executor, TrainerLocal):
            executor.validate = False
            executor.trainer_kwargs = {k: v for k, v in executor.trainer_kwargs.items() if k not in _NOT_PLAIN}
        object.__setattr__(module, "configure_optimizers", configure_optimizers)
        try:
            executor.fit(module, client.data, round=client.round, num_rounds=client.num_rounds, seed=client.seed)
            every: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            check_finite({n: every[n] for n, was in finite.items() if was}, client.id, "adapted model")
            before = {}
        except ClientFailure as error:
            log.warning("Client %d is judged by the global model: %s", client.id, error)
        finally:
            object.__delattr__(module, "configure_optimizers")
            for t, dtype in zip(tensors, dtypes, strict=True):  # true half precision leaves them so
                t.data = t.data.to(dtype)
        if before:
            load_weights(module, before)


class MetaSteps(ExtraLoss):
    """Makes every step of a module's optimiser one of Per-FedAvg, under any ``L.Trainer``.

    The loss becomes ``f(w - alpha g; D')``, whose gradient to w, g a constant, is FO's; HF's correction is added to the
    gradients before they are clipped. Logged values, running statistics and the random numbers that the module draws are
    those of the pass on D'.

    Args:
        alpha: see `PerFedAvg`.
        variant: see `PerFedAvg`.
        delta: see `PerFedAvg`.
        whole: see `PerFedAvg`.
    """

    def __init__(self, alpha: float, variant: str = "FO", delta: float = 1e-3, whole: bool = False) -> None:
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha < float("inf"):
            raise ValueError(f"Expected `alpha` to be a number >= 0, but got {alpha!r}.")
        if variant not in VARIANTS:
            raise ValueError(f"Expected `variant` to be 'FO' or 'HF', but got {variant!r}.")
        if not delta > 0:
            raise ValueError(f"Expected `delta` to be a positive number, but got {delta!r}.")
        self.alpha, self.variant, self.delta, self.whole = alpha, variant, delta, whole
        self._again: StepAgain | None = None
        self._trainer: Any = None
        self._thirds: list[tuple[tuple[Any, ...], dict[str, Any]]] = []  # D'' of the batches of this optimiser step

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wrap the module's ``training_step``; see `ExtraLoss`."""
        stream = RandomStream(derive_seed(torch.initial_seed(), "inner"), pl_module.device)
        self._again = StepAgain(pl_module, pl_module.training_step, stream)
        self._trainer, self._thirds = trainer, []
        super().on_train_start(trainer, pl_module)

    def _unwrap(self) -> None:
        super()._unwrap()
        self._again = self._trainer = None
        self._thirds = []

    def extra(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor, batch: Any, batch_idx: int
    ) -> Tensor:
        """The loss as it is: the step was already taken at w~."""
        return loss

    def own_step(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``f(w~; D')``."""
        assert self._again is not None
        batch = args[0] if args else kwargs["batch"]
        first, second, *third = [_with(args, kwargs, b) for b in _deal(batch, VARIANTS[self.variant], self.whole)]
        if self.alpha == 0:
            return step(*second[0], **second[1])
        g = self._gradient(first, dict(self._trained()))
        if g is None:  # the module skips this batch
            return step(*second[0], **second[1])
        self._thirds += third
        inner = {n: p - self.alpha * g[n] for n, p in self._trained()}
        return self._again.run(*second, inner)[0]

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """HF: ``v - alpha (grad f(w + delta v; D'') - grad f(w - delta v; D'')) / (2 delta)``, v the gradient that there is."""
        thirds, self._thirds = self._thirds, []
        trained = [(n, p) for n, p in self._trained() if p.grad is not None]
        if not thirds or not trained:
            return
        v = {n: p.grad.clone() for n, p in trained if p.grad is not None}
        assert self._again is not None
        drawn = dict(self._again.random.state)
        sides = []
        for sign in (1.0, -1.0):
            self._again.random.state = dict(
                drawn
            )  # the same dropout on both sides, or its noise would be over 2 delta too
            at = {n: (p + sign * self.delta * v[n]).detach() for n, p in trained}
            sides.append([self._gradient(third, at) for third in thirds])
        scale = self.alpha / (2 * self.delta * len(thirds))
        for plus, minus in zip(*sides, strict=True):
            for n, p in trained if plus is not None and minus is not None else ():
                assert p.grad is not None and plus is not None and minus is not None
                p.grad.sub_(plus[n] - minus[n], alpha=scale)

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        assert self._again is not None
        return [(n, p) for n, p in self._again.module.named_parameters() if p.requires_grad]

    def _gradient(
        self, call: tuple[tuple[Any, ...], dict[str, Any]], at: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | None:
        """The gradient of the module's loss at other weights, its buffers left as they are; None if it skips the batch."""
        assert self._again is not None
        scaler = getattr(getattr(self._trainer, "precision_plugin", None), "scaler", None)
        buffers = {n: b.clone() for n, b in self._again.module.named_buffers()}
        weights = {n: t if t.requires_grad else t.requires_grad_() for n, t in at.items()}
        with torch.enable_grad():
            loss = self._again.silently(*call, {**buffers, **weights})
            if loss is None:
                return None
            scaled = loss if scaler is None else scaler.scale(loss)
            with torch.autocast(loss.device.type, enabled=False):
                found = torch.autograd.grad(scaled, list(weights.values()), allow_unused=True)
        g = {n: torch.zeros_like(t) if d is None else d for (n, t), d in zip(weights.items(), found, strict=True)}
        if scaler is None:
            return g
        # What overflows in half precision counts as 0, as the scaler skips such a step.
        return {n: torch.nan_to_num(d / scaler.get_scale(), 0.0, 0.0, 0.0) for n, d in g.items()}


def _with(args: tuple[Any, ...], kwargs: dict[str, Any], batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a ``training_step``, of another batch."""
    return ((batch, *args[1:]), kwargs) if args else (args, {**kwargs, "batch": batch})


def _deal(batch: Any, parts: int, whole: bool) -> list[Any]:
    """A batch in so many parts, its rows in order; the whole batch each time if it has fewer than two rows a part.

    Raises:
        ValueError: there are no tensors with a row dimension.
    """
    tensors: list[Tensor] = []
    apply_to_collection(batch, Tensor, lambda t: tensors.append(t) if t.ndim else None)
    if not tensors:
        raise ValueError(
            f"Expected batches that hold tensors of rows under PerFedAvg, which deals them out, but got {type(batch).__name__}."
        )
    rows = len(tensors[0])
    if whole or rows < 2 * parts:
        return [batch] * parts
    cuts = [i * rows // parts for i in range(parts + 1)]
    return [
        apply_to_collection(batch, Tensor, lambda t, a=a, b=b: t[a:b] if t.ndim and len(t) == rows else t)
        for a, b in pairwise(cuts)
    ]
