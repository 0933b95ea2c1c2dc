"""What methods share whose clients keep a model of their own beside the one that travels."""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynfed_lightning.algorithm import Reply, total_examples
from dynfed_lightning.errors import ClientFailure
from dynfed_lightning.module import ClientModule
from dynfed_lightning.optimizers import one_optimizer, same_kind
from dynfed_lightning.quiet import isolated_rng
from dynfed_lightning.seeds import derive_seed
from dynfed_lightning.tensors import Tensors

Given = nn.Module | Mapping[int, nn.Module] | Sequence[nn.Module] | Callable[[int], nn.Module]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
MOST_CHECKED = 64  # models that a function makes before training, to see whether they fit


class Bare(ClientModule):
    """A network that came without a recipe of its own and trains by another module's.

    Args:
        model: the network.
        module: whose recipe: a `ClientModule`'s settings, or the class and defaults of whatever optimiser it makes.
        what: what messages call the network.

    Raises:
        ValueError: the module has not one optimiser, or one that cannot be made again.
    """

    def __init__(self, model: nn.Module, module: L.LightningModule, what: str) -> None:
        settings = ("lr", "optimizer", "momentum", "weight_decay", "label_smoothing")
        known = isinstance(module, ClientModule)
        super().__init__(model, **{name: getattr(module, name) for name in settings if known})
        self._like: Optimizer | None = None
        if not known or type(module).configure_optimizers is not ClientModule.configure_optimizers:
            found, _ = one_optimizer(module, f"`{what}` without an optimizer of its own")
            self._like = same_kind(found, [nn.Parameter(torch.zeros(1))])  # which keeps none of the module's tensors

    def configure_optimizers(self) -> Optimizer:
        """One of the module's kind, over what is trainable."""
        if self._like is None:
            return super().configure_optimizers()
        return same_kind(self._like, [p for p in self.parameters() if p.requires_grad])


class LocalModels:
    """Makes each client's own model, and takes it from and to what the client remembers.

    A network that is no LightningModule trains as the module does: within a `ClientModule` of the same settings if the
    module is one, else with cross-entropy and an optimiser of the same class and defaults (no scheduler). A LightningModule
    keeps its own recipe, whichever way it is given.

    Args:
        given: one model that all clients start from; a mapping from client id to model; a list of models, of which client
            `k` has number ``k % len(list)``; or a function that makes client `k`'s model, called with the random generators
            seeded from (seed, k).
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
        elif isinstance(given, (list, tuple)):
            if not given or not all(isinstance(m, nn.Module) for m in given):
                raise TypeError(f"Expected `{what}` to list torch modules, but got {given!r}.")
            given = tuple(given)
        elif isinstance(given, type) or not callable(given):
            raise TypeError(
                f"Expected `{what}` to be a torch module, a mapping of client ids to modules, a list of modules, or a function "
                f"from a client id to a module, but got {given!r}."
            )
        self.given = given
        self.what = what
        self._hash: str | None = None

    def check_clients(self, num_clients: int) -> None:
        """Every client must have a model.

        Raises:
            ValueError: a mapping lacks one.
        """
        self._hash = None  # a new run: what was given may have been trained in between
        if isinstance(self.given, Mapping):
            missing = [k for k in range(num_clients) if k not in self.given]
            if missing:
                raise ValueError(
                    f"Expected `{self.what}` to have a model for each of the {num_clients} clients, but {missing[:5]} have none."
                )

    def kinds(self, num_clients: int) -> list[int]:
        """Clients whose models between them are of every kind there is.

        Of more than `MOST_CHECKED` clients whose models a function makes: client 0 and others, drawn once and for all.
        """
        if isinstance(self.given, nn.Module):
            return [0]
        if isinstance(self.given, Mapping):
            return sorted({id(self.given[k]): k for k in range(num_clients)}.values())
        if isinstance(self.given, tuple):
            return list(range(min(num_clients, len(self.given))))
        if num_clients <= MOST_CHECKED:
            return list(range(num_clients))
        # At random: an architecture that depends on k modulo something would hide from every n-th client.
        return [0, *sorted(random.Random(0).sample(range(1, num_clients), MOST_CHECKED - 1))]

    def fresh(self, client_id: int | None, module: L.LightningModule, seed: int) -> L.LightningModule:
        """Client `client_id`'s model as it starts. `module` is what travels, for a network's recipe.

        Raises:
            ValueError: the models differ from client to client and `client_id` is None, or there is none for it.
            TypeError: the function made something else.
        """
        own = copy_model(self._first(client_id, seed))
        return own if isinstance(own, L.LightningModule) else Bare(own, module, self.what)

    def _first(self, client_id: int | None, seed: int) -> nn.Module:
        """What was given for this client, not to be trained."""
        given: Any = self.given
        if not isinstance(given, nn.Module):
            if client_id is None:
                raise ValueError(f"Expected a client's id, since `{self.what}` differs from client to client.")
            if isinstance(given, tuple):
                given = given[client_id % len(given)]
            elif isinstance(given, Mapping):
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
        return given

    def identity(self, seed: int) -> dict[str, str]:
        """SHA-256 of the models as they start, of a function's client 0's, for `Algorithm.identity`."""
        if self._hash is None:  # once a run, not with every checkpoint
            if isinstance(self.given, Mapping):
                hashes = {key: _sha256(m) for key, m in {id(m): m for m in self.given.values()}.items()}
                text = ",".join(f"{k}:{hashes[id(self.given[k])]}" for k in sorted(self.given))
                self._hash = hashlib.sha256(text.encode()).hexdigest()
            elif isinstance(self.given, tuple):
                text = ",".join(_sha256(m) for m in self.given)
                self._hash = hashlib.sha256(text.encode()).hexdigest()
            else:
                self._hash = _sha256(self._first(0, seed))
        return {f"initial {self.what}": self._hash}

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


def copy_model(model: nn.Module) -> nn.Module:
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


def _sha256(module: nn.Module) -> str:
    """Of the tensors of a state dict: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def kept(module: nn.Module) -> dict[str, bool]:
    """What a client remembers of its model, by name: what is trained, and what its layers count; never what is frozen.

    Call it before training (a callback may freeze or thaw layers). The value tells whether the tensor is finite: a buffer may
    hold infinities on purpose, such as a mask of attention.
    """
    persistent = module.state_dict(keep_vars=True)
    tensors: dict[str, Tensor] = {n: p for n, p in module.named_parameters() if p.requires_grad}
    tensors.update({n: b for n, b in module.named_buffers() if n in persistent})
    return {n: _finite(t) for n, t in tensors.items()}


def remembered(module: nn.Module, names: Mapping[str, bool], client_id: int, what: str) -> Tensors:
    """Copies on the CPU of the tensors that `kept` told of.

    Raises:
        ClientFailure: ``nan_model``, one that was finite is no more; the message calls the model `what`.
    """
    every: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    check_finite({n: every[n] for n, finite in names.items() if finite}, client_id, what)
    return {n: every[n].detach().to("cpu", copy=True) for n in names}


def check_finite(value: Any, client_id: int, what: str, name: str = "") -> None:
    """Refuse to remember tensors, or nested dicts and lists of them, with which a client could never train again.

    Raises:
        ClientFailure: ``nan_model``; what the client remembered before stays.
    """
    if isinstance(value, Tensor):
        if not _finite(value):
            raise ClientFailure(
                "nan_model", f"Expected client {client_id}'s {what} to stay finite, but {name!r} holds NaN or infinity."
            )
    elif isinstance(value, (Mapping, list, tuple)):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            check_finite(item, client_id, what, f"{name}.{key}" if name else str(key))


def on_cpu(value: Any) -> Any:
    """A copy of nested dicts and lists, tensors and all, on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {k: on_cpu(v) for k, v in value.items()}
    return [on_cpu(v) for v in value] if isinstance(value, list) else value


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.detach()).all())


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
