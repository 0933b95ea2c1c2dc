"""What methods share whose clients keep a model of their own beside the one that travels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynfed_lightning.algorithm import Reply, total_examples
from dynfed_lightning.module import ClientModule
from dynfed_lightning.optimizers import one_optimizer
from dynfed_lightning.quiet import isolated_rng
from dynfed_lightning.seeds import derive_seed
from dynfed_lightning.tensors import Tensors

Given = nn.Module | Mapping[int, nn.Module] | Callable[[int], nn.Module]


class LocalModels:
    """Makes each client's own model, and takes it from and to what the client remembers.

    A network that is no LightningModule trains as the module does: within a `ClientModule` of the same settings if the
    module is one, else with cross-entropy and an optimiser of the same class and defaults (no scheduler).

    Args:
        given: one model that all clients start from; a mapping from client id to model; or a function that makes client
            `k`'s model, called with the random generators seeded from (seed, k).
        what: the argument's name, for messages and for the key in the client's state.

    Raises:
        TypeError: none of these.
    """

    def __init__(self, given: Given, what: str) -> None:
        if isinstance(given, Mapping):
            if not given or not all(isinstance(m, nn.Module) for m in given.values()):
                raise TypeError(f"Expected `{what}` to map client ids to torch modules, but got {given!r}.")
            # YAML and JSON make text of the numbers.
            given = {int(k): m for k, m in given.items()}
        elif isinstance(given, type) or not callable(given):
            raise TypeError(
                f"Expected `{what}` to be a torch module, a mapping of client ids to modules, or a function from a client id "
                f"to a module, but got {given!r}."
            )
        self.given = given
        self.what = what

    def check_clients(self, num_clients: int) -> None:
        """Every client must have a model.

        Raises:
            ValueError: a mapping lacks one.
        """
        if isinstance(self.given, Mapping):
            missing = [k for k in range(num_clients) if k not in self.given]
            if missing:
                raise ValueError(
                    f"Expected `{self.what}` to have a model for each of the {num_clients} clients, but {missing[:5]} have none."
                )

    def kinds(self, num_clients: int) -> list[int]:
        """Clients whose models between them are of every kind there is, as far as can be told without making them all."""
        if isinstance(self.given, nn.Module):
            return [0]
        if isinstance(self.given, Mapping):
            return sorted({id(self.given[k]): k for k in range(num_clients)}.values())
        return [0]

    def fresh(self, client_id: int | None, module: L.LightningModule, seed: int) -> L.LightningModule:
        """Client `client_id`'s model as it starts. `module` is what travels, for a network's recipe.

        Raises:
            ValueError: the models differ from client to client and `client_id` is None, or there is none for it.
            TypeError: the function made something else.
        """
        given: Any = self.given
        if not isinstance(given, nn.Module):
            if client_id is None:
                raise ValueError(f"Expected a client's id, since `{self.what}` differs from client to client.")
            if isinstance(given, Mapping):
                if client_id not in given:
                    raise ValueError(f"Expected `{self.what}` to have a model for client {client_id}, but it has none.")
                given = given[client_id]
            else:
                with isolated_rng(derive_seed(seed, self.what, client_id)):
                    given = given(client_id)
                if not isinstance(given, nn.Module):
                    raise TypeError(
                        f"Expected `{self.what}` to make a torch module for client {client_id}, but got {type(given).__name__}."
                    )
        own = _copy(given)
        if isinstance(own, L.LightningModule):
            return own
        if not isinstance(module, ClientModule):
            return ClientModule(own)
        recipe = ("lr", "optimizer", "momentum", "weight_decay", "label_smoothing")
        return ClientModule(own, **{name: getattr(module, name) for name in recipe})

    def restore(
        self, client_id: int | None, state: Mapping[str, Any], module: L.LightningModule, seed: int
    ) -> L.LightningModule:
        """Client `client_id`'s model as it was after its last round; as it starts, if there was none.

        Raises:
            ValueError: as `fresh`, or the remembered tensors are not this model's.
        """
        own = self.fresh(state.get("client", client_id), module, seed)
        if self.what in state:
            recall(own, state[self.what], self.what)
        return own

    def optimizer(self, own: L.LightningModule, module: L.LightningModule) -> Callable[[Any], Optimizer] | None:
        """How to make the optimiser of a network whose module brings a recipe that is no `ClientModule`'s; else None."""
        if isinstance(module, ClientModule) or isinstance(self._template(), L.LightningModule):
            return None
        if type(own) is not ClientModule:
            return None
        like, _ = one_optimizer(module, f"`{self.what}` without an optimizer of its own")

        def make(parameters: Iterable[nn.Parameter]) -> Optimizer:
            return type(like)(parameters, **like.defaults)

        return make

    def _template(self) -> Any:
        return next(iter(self.given.values())) if isinstance(self.given, Mapping) else self.given


def _copy(model: nn.Module) -> nn.Module:
    """A copy, without the Trainer that a LightningModule may have been trained by."""
    inner = [m for m in model.modules() if isinstance(m, L.LightningModule)]
    trainers = [m._trainer for m in inner]
    for m in inner:
        object.__setattr__(m, "_trainer", None)
    try:
        return copy.deepcopy(model)
    finally:
        for m, trainer in zip(inner, trainers, strict=True):
            object.__setattr__(m, "_trainer", trainer)


def mean_scalar(replies: Sequence[Reply], name: str) -> float:
    """The sample-weighted mean of what the clients say of themselves."""
    weights = total_examples(replies)
    return sum(w * r.scalars[name] for w, r in zip(weights, replies, strict=True)) / sum(weights)


def kept(module: nn.Module) -> list[str]:
    """The names of what a client remembers of its model: what is trained, and what its layers count; never what is frozen."""
    persistent = module.state_dict(keep_vars=True)
    names = [n for n, p in module.named_parameters() if p.requires_grad]
    return [*names, *(n for n, _ in module.named_buffers() if n in persistent)]


def remembered(module: nn.Module, names: Iterable[str]) -> Tensors:
    """Copies of the tensors `names`, taken before training (a callback may freeze or thaw layers), on the CPU."""
    every = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {n: every[n].detach().to("cpu", copy=True) for n in names}


@torch.no_grad()
def recall(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Copy what was `remembered` into `module`.

    Raises:
        ValueError: it is another model's; the message calls this one `what`.
    """
    every: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, tensor in tensors.items():
        if name not in every or every[name].shape != tensor.shape:
            here = list(every[name].shape) if name in every else "nothing"
            raise ValueError(
                f"Expected `{what}` to be the model that was trained before, with {name!r} of shape {list(tensor.shape)}, "
                f"but it has {here}."
            )
        every[name].copy_(tensor)
