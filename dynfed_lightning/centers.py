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
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynfed_lightning import ops
from dynfed_lightning.schedules import Linear, Schedule, as_schedule

Bits = int | Mapping[str, int | None] | Callable[[str, nn.Parameter], int | None] | None
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


class Falling:
    """``start * (end / start) ** (t / (T - 1))``: from `start` to `end`, by the same factor every epoch."""

    def __init__(self, start: float, end: float) -> None:
        if not (start > 0 and end > 0):
            raise ValueError(f"Expected `start` and `end` to be positive, but got {start} and {end}.")
        self.start, self.end = start, end

    def __call__(self, t: int, T: int | None = None) -> float:
        return self.start * (self.end / self.start) ** (min(t / (T - 1), 1.0) if T and T > 1 else 1.0)


def candidates(module: nn.Module) -> dict[str, nn.Parameter]:
    """What could be quantised: trainable floating-point parameters of two or more dimensions outside of normalisation layers."""
    norms = {id(p) for m in module.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}
    return {
        n: p
        for n, p in module.named_parameters()
        if p.requires_grad and p.is_floating_point() and p.ndim >= 2 and id(p) not in norms
    }


def choose_layers(module: nn.Module, bits: Bits, ends: bool = False) -> dict[str, int]:
    """Which parameters are quantised, and to how many bits.

    Args:
        module: whose parameters.
        bits: 1 to 8 for all; a mapping from patterns of names (`fnmatch`, the first that matches counts) to bits or None; a
            function of name and parameter; None: none is quantised.
        ends: quantise the first and the last layer too.

    Raises:
        ValueError: bits out of range, or a pattern that matches no layer.
    """
    found = candidates(module)
    names = list(found) if ends else list(found)[1:-1]
    if bits is None:
        return {}
    chosen: dict[str, int | None] = {}
    if isinstance(bits, Mapping):
        for pattern in bits:
            if not fnmatch.filter(names, pattern):
                raise ValueError(f"Expected the pattern {pattern!r} of `bits` to match a layer, but there are {names}.")
        for name in names:
            chosen[name] = next((b for p, b in bits.items() if fnmatch.fnmatch(name, p)), None)
    else:
        chosen = {n: bits(n, found[n]) if callable(bits) else bits for n in names}
    for name, value in chosen.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 8):
            raise ValueError(f"Expected `bits` of {name} to be an integer from 1 to 8, but got {value!r}.")
    return {n: b for n, b in chosen.items() if b is not None}


@torch.no_grad()
def first_centers(x: Tensor, bits: int) -> Tensor:
    """As the authors start: evenly from the least to the largest weight; one bit: the means of the negative and the positive."""
    x = x.detach().float().flatten()
    low, high = float(x.min()), float(x.max())
    if bits == 1 and low < 0 < high:
        return torch.stack([x[x < 0].mean(), x[x > 0].mean()])
    if not low < high:
        low, high = low - 1e-3, high + 1e-3
    return ascending(torch.linspace(low, high, 2**bits, device=x.device))


def ascending(centers: Tensor) -> Tensor:
    """The same centres, sorted, equal ones moved apart by the least step there is."""
    c = centers.sort().values
    if bool((c[1:] > c[:-1]).all()):
        return c
    values = c.tolist()
    up = torch.tensor(math.inf)
    for j in range(1, len(values)):
        if not values[j] > values[j - 1]:
            values[j] = float(torch.nextafter(torch.tensor(values[j - 1]), up))
    return torch.tensor(values, device=c.device)


class LearnedCenters:
    """The centres of a module's quantised layers, and algorithm 1's steps.

    Args:
        bits: see `choose_layers`.
        ends: quantise the first and last layer too.
        sharpness: P, over epochs.
        lam: the pull towards the centres: ``lam * (epoch + 1)``, or a schedule taken as it is.
        center_lr: e2, over epochs.
        clamp: weights of quantised layers are kept in [-clamp, clamp]; None: not.
        finetune: the share of the epochs, at the end, in which assignments are frozen.
    """

    def __init__(
        self,
        bits: Bits = 2,
        *,
        ends: bool = False,
        sharpness: float | Schedule = Linear(10.0, 100.0),
        lam: float | Schedule = 1e-4,
        center_lr: float | Schedule = Falling(1e-4, 1e-6),
        clamp: float | None = 1.0,
        finetune: float = 0.2,
    ) -> None:
        self.bits, self.ends, self.clamp, self.finetune = bits, ends, clamp, finetune
        self.sharpness_at, self.center_lr_at = as_schedule(sharpness), as_schedule(center_lr)
        self.lam_at: Any = (lambda t, T=None: lam * (t + 1)) if isinstance(lam, (int, float)) else lam
        self.names: list[str] = []
        self.parameters: list[nn.Parameter] = []
        self.centers: list[Tensor] = []
        self.index: list[Tensor] = []  # the frozen assignments, once there are any
        self.sharpness = self.lam = self.center_lr = 0.0

    @property
    def frozen(self) -> bool:
        """Whether weights are their centres, and the centres alone are trained."""
        return bool(self.index)

    def attach(self, module: nn.Module, state: Mapping[str, Any] | None = None) -> None:
        """Find the layers in `module`; start their centres, or take up `state`."""
        chosen = choose_layers(module, self.bits, self.ends)
        live = dict(module.named_parameters())
        self.names, self.parameters = list(chosen), [live[n] for n in chosen]
        self.centers = [first_centers(live[n], b) for n, b in chosen.items()]
        self.index = []
        if state:
            self.centers = [state["centers"][n].to(live[n].device) for n in self.names]
            if "index" in state:
                self.index = [state["index"][n].to(live[n].device) for n in self.names]

    def state_dict(self) -> dict[str, Any]:
        """Centres, and assignments once frozen."""
        state: dict[str, Any] = {"centers": dict(zip(self.names, self.centers, strict=True))}
        if self.frozen:
            state["index"] = dict(zip(self.names, self.index, strict=True))
        return state

    def at(self, epoch: int, epochs: int) -> None:
        """Set the schedules, and freeze the assignments when the last phase begins."""
        self.sharpness = self.sharpness_at(epoch, epochs)
        self.lam = self.lam_at(epoch, epochs)
        self.center_lr = self.center_lr_at(epoch, epochs)
        if (
            self.names
            and not self.frozen
            and self.finetune > 0
            and epoch >= epochs - math.floor(self.finetune * epochs)
        ):
            self.harden()

    def soft(self, weights: bool = True, centers: bool = False) -> dict[str, Tensor]:
        """``Q~_c(x)`` by name, with a graph to the weights, to the centres, or both; once frozen, the weights as they are."""
        if self.frozen:
            return dict(zip(self.names, self.parameters, strict=True))
        x = [p if weights else p.detach() for p in self.parameters]
        c = [c.requires_grad_(centers) for c in self.centers]
        return dict(zip(self.names, ops.soft_quantize(x, c, self.sharpness), strict=True))

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
            c = [c.detach() for c in self.centers]
            ops.prox_weights(x, c, [r * self.lam / 2 for r in rates], out=x)

    @torch.no_grad()
    def after_centers(self, gradients: Sequence[Tensor]) -> None:
        """``c+ = prox_{e2 lam R}(c - e2 h)``; `gradients`: h per layer."""
        c = [c.detach() for c in self.centers]
        proposal = [c - self.center_lr * h for c, h in zip(c, gradients, strict=True)]
        if self.lam:
            x = [p.data for p in self.parameters]
            proposal = ops.prox_centers(proposal, x, c, self.center_lr * self.lam)
        self.centers = [ascending(p) for p in proposal]

    @torch.no_grad()
    def harden(self) -> None:
        """``x = Q_c(x)``, and freeze who belongs to which centre."""
        c = [c.detach() for c in self.centers]
        self.index, values = ops.nearest_center([p.data for p in self.parameters], c)
        self.centers = c
        for p, v in zip(self.parameters, values, strict=True):
            p.data.copy_(v)

    @torch.no_grad()
    def frozen_gradients(self) -> list[Tensor]:
        """The centres' gradients: the sums of their members'; takes the weights' gradients away from the optimiser."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        sums = ops.center_sums(grads, self.index, [len(c) for c in self.centers])
        for p in self.parameters:
            p.grad = None
        return sums

    @torch.no_grad()
    def after_frozen(self, gradients: Sequence[Tensor]) -> None:
        """Step the centres, and set the weights to them."""
        self.centers = [c - self.center_lr * h for c, h in zip(self.centers, gradients, strict=True)]
        for p, c, i in zip(self.parameters, self.centers, self.index, strict=True):
            p.data.copy_(c[i.long()])
