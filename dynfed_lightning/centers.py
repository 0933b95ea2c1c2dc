"""Learned centres: the quantised layers of a module and the proximal steps around its own optimiser.

Reference:
    Ozkara, Singh, Data, Diggavi. QuPeD: Quantized Personalization via Distillation with Applications to Federated Learning.
    NeurIPS 2021, arXiv 2107.13892, section 3 and algorithm 1.

=============  ==========================================================================================
paper          here
=============  ==========================================================================================
x              the module's own parameters `names`
c              `centers`: per layer float32 ``[2**bits]``, ascending
Q~_c, P        `soft`, `sharpness`
prox_eta1      `after_weights`, once the module's optimiser has stepped
prox_eta2      `after_centers`
Q_c            `harden`: weights become their nearest centres, assignments are frozen (`index`)
=============  ==========================================================================================

One step of algorithm 1, around any optimiser::

    engine.at(epoch, epochs)                                          # P, lam and e2 of this epoch
    loss = f(x) + f(engine.soft())                                    # g
    loss.backward(); optimizer.step()
    engine.after_weights(rates)                                       # x+
    h = torch.autograd.grad(f(engine.soft(False, True)), engine.centers)
    engine.after_centers(h)                                           # c+
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from dynfed_lightning import ops
from dynfed_lightning.quantized_layers import Bits, candidates, check_layer_bits, choose_layers
from dynfed_lightning.schedules import Geometric, Linear, Schedule, as_schedule

__all__ = [
    "Bits",
    "LearnedCenters",
    "Start",
    "ascending",
    "candidates",
    "choose_layers",
    "first_centers",
    "given_centers",
]

_BLOCK = 1 << 20  # weights
Start = Mapping[str, Tensor | Sequence[float]] | Callable[[str, Tensor, int], Tensor] | None


@torch.no_grad()
def first_centers(x: Tensor, bits: int) -> Tensor:
    """As the authors start: evenly from the least to the largest weight; one bit: the means of the negative and the positive.

    Args:
        x: floating point, any shape, finite.
        bits: 1 to 8.

    Returns:
        float32 ``[2**bits]``, strictly ascending.
    """
    x = x.detach().float().flatten()
    low, high = float(x.min()), float(x.max())
    if bits == 1 and low < 0 < high:
        return torch.stack([x[x < 0].mean(), x[x > 0].mean()])
    if not low < high:
        low, high = low - 1e-3, high + 1e-3
    return ascending(torch.linspace(low, high, 2**bits, dtype=torch.float32, device=x.device))


def ascending(centers: Tensor) -> Tensor:
    """The same centres, sorted, equal ones moved apart by the least step there is."""
    values = centers.sort().values.tolist()
    up = torch.tensor(math.inf, dtype=torch.float32)
    for j in range(1, len(values)):
        if not values[j] > values[j - 1]:
            values[j] = float(torch.nextafter(torch.tensor(values[j - 1], dtype=torch.float32), up))
    return torch.tensor(values, dtype=torch.float32, device=centers.device)


def given_centers(name: str, value: Tensor | Sequence[float], bits: int) -> Tensor:
    """Centres from a user, float32 ``[m]``, after checking them.

    Raises:
        ValueError: not 2 to ``2**bits`` finite numbers, strictly ascending.
    """
    c = torch.as_tensor(value, dtype=torch.float32).detach().clone()
    if c.ndim != 1 or not 2 <= len(c) <= 2**bits:
        raise ValueError(
            f"Expected 2 to {2**bits} centres of {name!r} at {bits} bits, but got a shape of {tuple(c.shape)}."
        )
    if not bool(torch.isfinite(c).all()) or not bool((c[1:] > c[:-1]).all()):
        raise ValueError(f"Expected the centres of {name!r} to be finite and strictly ascending, but got {c.tolist()}.")
    return c


class LearnedCenters:
    """The centres of a module's quantised layers, and algorithm 1's steps.

    Args:
        bits: see `choose_layers`.
        ends: quantise the first and last layer too.
        sharpness: P, over epochs, positive; None: 10 to 100, linearly.
        relative_sharpness: divide P by the mean distance of a layer's neighbouring centres, at the start of every epoch: the
            same P is then equally sharp for layers of small and of large weights.
        lam: the pull towards the centres, >= 0: a number is multiplied by ``epoch + 1``, a schedule taken as it is.
        center_lr: e2, over epochs, >= 0; None: 1e-4 to 1e-6, geometrically.
        clamp: weights of quantised layers are kept in [-clamp, clamp], as by the authors; None: not. Weights that are
            beyond it before training are an error.
        finetune: the share of the epochs, 0 to 1, at the end, in which assignments are frozen; see `last_epochs`.
        start: the first centres, within `clamp`: a mapping from patterns of names to ascending numbers (the first that matches
            counts; other layers as `first_centers`), or a function of a layer's name, weights and bits.

    Attributes:
        names: of the quantised parameters.
        parameters: those parameters.
        centers: per layer float32 ``[m]``, on the parameter's device.
        index: per layer uint8 in the parameter's shape once frozen; empty before.
        frozen: whether weights are their centres.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        bits: Bits = 2,
        *,
        ends: bool = False,
        sharpness: float | Schedule | None = None,
        relative_sharpness: bool = False,
        lam: float | Schedule = 1e-4,
        center_lr: float | Schedule | None = None,
        clamp: float | None = 1.0,
        finetune: float = 0.2,
        start: Start = None,
    ) -> None:
        check_layer_bits(bits)
        for name, number in (("sharpness", sharpness), ("lam", lam), ("center_lr", center_lr)):
            if isinstance(number, (int, float)) and not (number > 0 if name == "sharpness" else number >= 0):
                least = "positive" if name == "sharpness" else ">= 0"
                raise ValueError(f"Expected `{name}` to be {least}, but got {number!r}.")
        if clamp is not None and not clamp > 0:
            raise ValueError(f"Expected `clamp` to be a positive number or None, but got {clamp!r}.")
        if isinstance(finetune, bool) or not isinstance(finetune, (int, float)) or not 0 <= finetune <= 1:
            raise ValueError(f"Expected `finetune` to be a number from 0 to 1, but got {finetune!r}.")
        if not isinstance(relative_sharpness, bool):
            raise ValueError(f"Expected `relative_sharpness` to be True or False, but got {relative_sharpness!r}.")
        if start is not None and not callable(start) and not isinstance(start, Mapping):
            raise ValueError(f"Expected the first centres as a mapping or a function, but got {type(start).__name__}.")
        self.bits, self.ends, self.clamp, self.finetune, self.start = bits, ends, clamp, finetune, start
        self.relative_sharpness = relative_sharpness
        self.sharpness_at = as_schedule(Linear(10.0, 100.0) if sharpness is None else sharpness)
        self.center_lr_at = as_schedule(Geometric(1e-4, 1e-6) if center_lr is None else center_lr)
        self.lam_at = as_schedule(lam)
        self.lam_grows = isinstance(lam, (int, float))
        self.layer_bits: dict[str, int] = {}
        self.names: list[str] = []
        self.parameters: list[nn.Parameter] = []
        self.centers: list[Tensor] = []
        self.index: list[Tensor] = []
        self.sharpness: float | list[float] = 0.0
        self.lam = self.center_lr = 0.0

    @property
    def frozen(self) -> bool:
        """Whether weights are their centres, and the centres alone are trained."""
        return bool(self.index)

    # ------------------------------------------------------------------ start

    def attach(self, module: nn.Module, state: Mapping[str, Any] | None = None) -> None:
        """Find the layers in `module`; start their centres, or take up `state`.

        Raises:
            ValueError: see `choose_layers`; weights that are not finite or beyond `clamp`; a state of other layers, bits or
                shapes.
        """
        chosen = choose_layers(module, self.bits, self.ends)
        live = dict(module.named_parameters())
        parameters = [live[n] for n in chosen]
        if state:
            centers, index = _taken_up(state, chosen, live, self.start is not None)
        else:
            _check_finite(list(chosen), parameters, "weights")
            self._check_clamp(list(chosen), live)
            self._check_patterns(list(chosen))
            centers, index = [self._first(n, live[n], b) for n, b in chosen.items()], []
        self.layer_bits, self.names, self.parameters = chosen, list(chosen), parameters
        self.centers, self.index = centers, index

    def _check_clamp(self, names: Sequence[str], live: Mapping[str, nn.Parameter]) -> None:
        if self.clamp is None:
            return
        for name in names:
            largest = float(live[name].detach().abs().max())
            if largest > self.clamp:
                raise ValueError(
                    f"Expected the weights of {name!r} within `clamp` = {self.clamp}, but the largest is {largest:.4g}: a "
                    "larger `clamp`, or None, leaves them alone."
                )

    def _check_patterns(self, names: list[str]) -> None:
        for pattern in self.start if isinstance(self.start, Mapping) else ():
            if not any(fnmatchcase(n, pattern) for n in names):
                raise ValueError(f"Expected the pattern {pattern!r} of the first centres to match one of {names}.")

    def _first(self, name: str, x: Tensor, bits: int) -> Tensor:
        given = None
        if isinstance(self.start, Mapping):
            given = next((c for p, c in self.start.items() if fnmatchcase(name, p)), None)
        elif self.start is not None:
            given = self.start(name, x.detach(), bits)
        if given is None:
            return first_centers(x, bits)
        c = given_centers(name, given, bits)
        largest = float(c.abs().max())
        if self.clamp is not None and largest > self.clamp:
            raise ValueError(
                f"Expected the centres of {name!r} within `clamp` = {self.clamp}, as its weights are, but got {c.tolist()}: a "
                "larger `clamp`, or None, lets them be."
            )
        if not bool(torch.isfinite(c.to(x.dtype)).all()):
            raise ValueError(f"Expected centres of {name!r} that are finite in {x.dtype}, but got {c.tolist()}.")
        return c.to(x.device)

    def state_dict(self) -> dict[str, Any]:
        """Centres, and assignments once frozen: ``{"centers": {name: float32 [m]}, "index": {name: uint8}}``."""
        centers = [c.detach() for c in self.centers]
        state: dict[str, Any] = {"centers": dict(zip(self.names, centers, strict=True))}
        if self.frozen:
            state["index"] = dict(zip(self.names, self.index, strict=True))
        return state

    def last_epochs(self, epochs: int) -> int:
        """How many of the epochs have frozen assignments: the share `finetune`, rounded down, and at least one of several."""
        if not self.finetune > 0:
            return 0
        return max(math.floor(self.finetune * epochs + 1e-9), 1 if epochs > 1 else 0)

    def at(self, epoch: int, epochs: int, *, passes: int | None = None) -> None:
        """Set the schedules, and freeze the assignments when the last phase begins.

        Args:
            epoch: from 0; where training is counted in steps, the step.
            epochs: how many there are.
            passes: completed passes over the data, for a `lam` that grows with them, where `epoch` is a step.
        """
        sharpness = self.sharpness_at(epoch, epochs)
        lam = self.lam_at(epoch, epochs)
        if self.lam_grows:
            lam *= (epoch if passes is None else passes) + 1
        center_lr = self.center_lr_at(epoch, epochs)
        if not sharpness > 0 or not lam >= 0 or not center_lr >= 0:
            raise ValueError(
                f"Expected a positive sharpness, and `lam` and `center_lr` >= 0, but in epoch {epoch} of {epochs} the "
                f"schedules give {sharpness}, {lam} and {center_lr}."
            )
        self.lam, self.center_lr = lam, center_lr
        self.sharpness = sharpness
        if self.names and not self.frozen:
            if epoch >= epochs - self.last_epochs(epochs):
                self.harden()
            elif self.relative_sharpness:
                spans = torch.stack([(c[-1] - c[0]).detach() / (len(c) - 1) for c in self.centers])
                self.sharpness = [sharpness / s for s in spans.tolist()]

    # ------------------------------------------------------------- every step

    def soft(self, weights: bool = True, centers: bool = False) -> dict[str, Tensor]:
        """``Q~_c(x)`` by name, with a graph to the weights, to the centres, or both; once frozen, the weights as they are.

        The gradient of `centers` is found in their own ``.grad``, or by ``torch.autograd.grad(loss, engine.centers)``.
        """
        if self.frozen or not self.names:
            return dict(zip(self.names, self.parameters, strict=True))
        x = [p if weights else p.detach() for p in self.parameters]
        c = [c.requires_grad_(centers) for c in self.centers]
        return dict(zip(self.names, ops.soft_quantize(x, c, self.sharpness), strict=True))

    @torch.no_grad()
    def hard(self) -> dict[str, Tensor]:
        """``Q_c(x)`` by name: tensors of their own; the weights stay as they are."""
        if self.frozen or not self.names:
            return {n: p.detach().clone() for n, p in zip(self.names, self.parameters, strict=True)}
        values = ops.nearest_center([p.data for p in self.parameters], self._plain())[1]
        return {n: v.to(p.dtype) for n, p, v in zip(self.names, self.parameters, values, strict=True)}

    @torch.no_grad()
    def distance(self) -> Tensor:
        """Mean ``|x - Q_c(x)|`` over all quantised weights (2 R over their number): a float32 scalar, 0 once frozen."""
        device = self.parameters[0].device if self.parameters else None
        total = torch.zeros((), dtype=torch.float32, device=device)
        if self.frozen or not self.names:
            return total
        hard = self.hard()
        for n, p in zip(self.names, self.parameters, strict=True):
            total += (p - hard[n]).abs().sum(dtype=torch.float32)
        return total / sum(p.numel() for p in self.parameters)

    @torch.no_grad()
    def after_weights(self, rates: Sequence[float]) -> None:
        """prox_{e1 lam R} of the weights that the optimiser has just stepped; `rates`: e1 per layer."""
        if not self.names or self.frozen:
            return
        x = [p.data for p in self.parameters]
        if self.clamp is not None:
            torch._foreach_clamp_min_(x, -self.clamp)
            torch._foreach_clamp_max_(x, self.clamp)
        if self.lam:
            thresholds = [r * self.lam / 2 for r in rates]
            if all(t.is_contiguous() for t in x):
                ops.prox_weights(x, self._plain(), thresholds, out=x)
            else:  # e.g. channels last
                for own, new in zip(x, ops.prox_weights(x, self._plain(), thresholds), strict=True):
                    own.copy_(new)

    @torch.no_grad()
    def after_centers(self, gradients: Sequence[Tensor]) -> None:
        """``c+ = prox_{e2 lam R}(c - e2 h)``; `gradients`: h per layer.

        Raises:
            ValueError: a centre became NaN or infinite (then so are the loss or the weights); names the layer.
        """
        if not self.names or self.frozen:
            return
        c = self._plain()
        new = [a - self.center_lr * h.float() for a, h in zip(c, gradients, strict=True)]
        if self.lam and self.center_lr:
            new = ops.prox_centers(new, [p.data for p in self.parameters], c, self.center_lr * self.lam)
        new = [a.float().sort().values for a in new]
        # One look at all layers: on a GPU, each would be a wait.
        good = torch.stack([torch.isfinite(a).all() & (a[1:] > a[:-1]).all() for a in new])
        if not bool(good.all()):
            _check_finite(self.names, new, "centres")
            new = [a if ok else ascending(a) for a, ok in zip(new, good.tolist(), strict=True)]
        self.centers = new

    # --------------------------------------------------------- the last phase

    @torch.no_grad()
    def harden(self) -> None:
        """``x = Q_c(x)``, and freeze who belongs to which centre.

        Raises:
            ValueError: a weight is NaN or infinite; names the layer.
        """
        if not self.names or self.frozen:
            return
        _check_finite(self.names, self.parameters, "weights")
        c = self._plain()
        index, values = ops.nearest_center([p.data for p in self.parameters], c)
        self.index, self.centers = list(index), c
        for p, v in zip(self.parameters, values, strict=True):
            p.data.copy_(v)
            p.grad = None

    @torch.no_grad()
    def frozen_gradients(self) -> list[Tensor]:
        """The centres' gradients: the sums of their members'; takes the weights' gradients away from the optimiser."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        grads = [g.to_dense() if g.is_sparse else g for g in grads]
        sums = ops.center_sums(grads, self.index, [len(c) for c in self.centers]) if self.names else []
        for p in self.parameters:
            p.grad = None
        return list(sums)

    @torch.no_grad()
    def after_frozen(self, gradients: Sequence[Tensor]) -> None:
        """Step the centres, and set the weights to them (whatever the optimiser has done to those)."""
        self.centers = [c - self.center_lr * h.float() for c, h in zip(self.centers, gradients, strict=True)]
        for p, c, i in zip(self.parameters, self.centers, self.index, strict=True):
            _put_centers(p.data, c, i)

    def to(self, device: torch.device | str) -> LearnedCenters:
        """Move centres and assignments, as ``module.to(device)`` moves the weights."""
        self.centers = [c.detach().to(device) for c in self.centers]
        self.index = [i.to(device) for i in self.index]
        return self

    def _plain(self) -> list[Tensor]:
        return [c.detach() for c in self.centers]


def _put_centers(x: Tensor, c: Tensor, index: Tensor) -> None:
    """``x = c[index]``, in blocks: torch looks up by integers of eight bytes."""
    if not x.is_contiguous() or not index.is_contiguous():  # e.g. channels last
        x.copy_(c[index.long()])
        return
    for part, i in zip(x.view(-1).split(_BLOCK), index.view(-1).split(_BLOCK), strict=True):
        part.copy_(c[i.long()])


def _check_finite(names: Sequence[str], tensors: Sequence[Tensor], what: str) -> None:
    good = (
        [bool(ok) for ok in torch.stack([torch.isfinite(t.detach()).all() for t in tensors]).tolist()] if names else []
    )
    for name, ok in zip(names, good, strict=True):
        if not ok:
            raise ValueError(f"Expected finite {what} of {name!r}, but got NaN or infinity.")


def _taken_up(
    state: Mapping[str, Any], chosen: Mapping[str, int], live: Mapping[str, nn.Parameter], any_number: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Centres and assignments out of a state, checked against the layers there are."""
    centers, index = state["centers"], state.get("index")
    if list(centers) != list(chosen):
        missing, other = [n for n in chosen if n not in centers], [n for n in centers if n not in chosen]
        raise ValueError(
            f"Expected centres of the quantised layers {list(chosen)}, but the state has none of {missing} and some of {other}."
        )
    for name, bits in chosen.items():
        m = len(centers[name])
        if not (2 if any_number else 2**bits) <= m <= 2**bits:
            least = "2 to " if any_number else ""
            raise ValueError(f"Expected {least}{2**bits} centres of {name!r} at {bits} bits, but the state has {m}.")
        if not bool(torch.isfinite(centers[name]).all()):
            raise ValueError(f"Expected finite centres of {name!r}, but the state's are not.")
        ordered = centers[name].sort().values
        if index is None and not (torch.equal(ordered, centers[name]) and bool((ordered[1:] > ordered[:-1]).all())):
            raise ValueError(
                f"Expected the state's centres of {name!r} to be ascending, but got {centers[name].tolist()}."
            )
        if index is not None and (name not in index or index[name].shape != live[name].shape):
            found = tuple(index[name].shape) if name in index else "none"
            raise ValueError(
                f"Expected assignments of shape {tuple(live[name].shape)} of {name!r}, but the state has {found}."
            )
        if index is not None and int(index[name].max()) >= m:
            raise ValueError(
                f"Expected assignments of {name!r} below its {m} centres, but got {int(index[name].max())}."
            )
    taken = [centers[n].detach().to(live[n].device, torch.float32, copy=True) for n in chosen]
    frozen = [] if index is None else [index[n].to(live[n].device, copy=True) for n in chosen]
    return taken, frozen
