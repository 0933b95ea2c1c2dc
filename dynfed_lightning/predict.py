"""Predictions of many models with one module: the M stochastic passes of DynFed's eq. 5.

``pbar_k(x) = 1/M sum_m softmax(f(x; w_k^m))``: where the module has dropout, the m-th pass draws its own dropout masks
(MC-dropout); where it has none, each weight is dithered uniformly by half its own quantiser step on each side, which is
what the server does not know about it after decoding (this package's own choice). One pass is deterministic.

Reference:
    DynFed: He et al., ACM MM 2025, doi 10.1145/3746027.3755451, eq. 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from dynfed_lightning.batches import Inputs, call_model, logits_of, num_rows, take, to_device
from dynfed_lightning.quiet import device_of, isolated_rng
from dynfed_lightning.tensors import Tensors, load_weights, travelling

Forward = Callable[[nn.Module, Any], Tensor]


def has_dropout(module: nn.Module) -> bool:
    """Whether `module` holds a dropout layer (or attention, or a recurrent layer, with dropout) of p > 0.

    ``torch.nn.functional.dropout`` inside a ``forward`` cannot be seen and counts as none.
    """
    return any(_drops(m) for m in module.modules())


@contextmanager
def preserved(module: nn.Module) -> Iterator[None]:
    """On leaving, also by an exception, put back every parameter, buffer and training flag of `module`, bit for bit."""
    tensors = [*module.parameters(), *module.buffers()]
    copies = [t.detach().clone() for t in tensors]
    flags = [(m, m.training) for m in module.modules()]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, copy in zip(tensors, copies, strict=True):
                tensor.copy_(copy)
        for m, training in flags:
            m.training = training


@torch.no_grad()
def predict_probs(
    module: nn.Module,
    inputs: Inputs,
    passes: int = 4,
    steps: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 512,
    forward: Forward | None = None,
    num_classes: int | None = None,
) -> Tensor:
    """The mean softmax of `module` over `passes` stochastic passes (DynFed eq. 5).

    With dropout layers in `module`, only these are active, everything else is in eval mode. Without, every travelling
    weight named in `steps` becomes ``w + step * U(-1/2, 1/2)``, drawn anew for each pass; without `steps` too, all
    passes would be the same and one is made. The module comes back exactly as it was, the global random state too.

    Args:
        module: maps a batch of inputs to logits [B, C] or an output that has them.
        inputs: [N, ...], or a mapping of such tensors; batches are moved to the module's device.
        passes: M, at least 1; 1 is one deterministic pass.
        steps: the quantiser's step of each weight, in the weight's shape or broadcasting to it.
        generator: the source of the draws, on the CPU; ``None``: a new one seeded 0.
        batch_size: samples in a forward pass.
        forward: ``forward(module, batch) -> logits``; ``None``: `batches.call_model`.
        num_classes: C, checked if given.

    Returns:
        float32 [N, C] (float64 for a float64 module) on the module's device.

    Raises:
        ValueError: `passes` or `batch_size` below 1, no inputs, `steps` that do not fit, or outputs that are not logits
            [B, C].
    """
    if passes < 1 or batch_size < 1:
        raise ValueError(f"Expected `passes` and `batch_size` to be at least 1, but got {passes} and {batch_size}.")
    if (isinstance(inputs, Tensor) and inputs.ndim < 1) or num_rows(inputs) == 0:
        shape = list(inputs.shape) if isinstance(inputs, Tensor) else {k: list(v.shape) for k, v in inputs.items()}
        raise ValueError(f"Expected `inputs` to hold at least one sample, but got shape {shape}.")
    draw = generator if generator is not None else torch.Generator().manual_seed(0)
    live = travelling(module)[0]
    dropout = passes > 1 and has_dropout(module)
    dithered = {} if passes == 1 or dropout else _fitting(steps or {}, live)
    if not dropout and not dithered:
        passes = 1
    with preserved(module):
        module.eval()
        for m in module.modules() if dropout else ():
            if _drops(m):
                m.training = True
        base = {name: live[name].clone() for name in dithered}
        # Dropout draws from the global generators and takes no other.
        with isolated_rng(int(torch.randint(2**62, (), generator=draw)) if dropout else None):
            total = None
            for _ in range(passes):
                for name, step in dithered.items():
                    noise = torch.rand(base[name].shape, generator=draw, dtype=torch.float32).sub_(0.5)
                    live[name].copy_(base[name] + step.to(base[name]) * noise.to(base[name]))
                probs = _one_pass(module, inputs, batch_size, forward, num_classes)
                total = probs if total is None else total + probs
    assert total is not None
    return total / passes


@torch.no_grad()
def client_probs(
    module: nn.Module,
    weights: Sequence[Tensors],
    inputs: Inputs,
    passes: int = 4,
    steps: Sequence[Mapping[str, Tensor] | None] | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 512,
    forward: Forward | None = None,
    num_classes: int | None = None,
) -> Tensor:
    """`predict_probs` of every client: `weights` [k] is loaded into `module`, which comes back as it was.

    Args:
        weights: what each of the K clients' models consists of (see ``tensors.travelling``).
        steps: one mapping (or ``None``) a client.

    Returns:
        [K, N, C], as `predict_probs`.

    Raises:
        ValueError: no clients, `steps` of another length, or as `predict_probs`.
        KeyError: a client's weights lack a tensor of the module.
    """
    if not weights:
        raise ValueError("Expected `weights` of at least one client, but got none.")
    if steps is not None and len(steps) != len(weights):
        raise ValueError(
            f"Expected `steps` to hold one entry for each of {len(weights)} clients, but got {len(steps)}."
        )
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    rows = []
    with preserved(module):
        for k, tensors in enumerate(weights):
            load_weights(module, tensors)
            own = None if steps is None else steps[k]
            rows.append(predict_probs(module, inputs, passes, own, generator, batch_size, forward, num_classes))
    return torch.stack(rows)


def check_logits(logits: object, batch: int, num_classes: int | None) -> Tensor:
    """`logits` if they are a float tensor [batch, C], C as expected; else a ``ValueError`` that says what they are."""
    c = "C" if num_classes is None else str(num_classes)
    expected = f"Expected the model to return logits of shape [{batch}, {c}]"
    if not isinstance(logits, Tensor):
        raise ValueError(f"{expected}, but it returned a {type(logits).__name__}.")
    fits = logits.ndim == 2 and logits.shape[0] == batch and logits.shape[1] == (num_classes or logits.shape[1])
    if not fits or not logits.is_floating_point():
        raise ValueError(f"{expected}, but it returned {logits.dtype} {list(logits.shape)}.")
    return logits


def logits_or_output(module: nn.Module, inputs: Inputs) -> Any:
    """The logits in the module's output, or the output itself where it has none, for `check_logits` to name."""
    output = call_model(module, inputs)
    try:
        return logits_of(output)
    except ValueError:
        return output


def _drops(m: nn.Module) -> bool:
    if isinstance(m, _DropoutNd):
        return m.p > 0
    return isinstance(m, nn.MultiheadAttention | nn.RNNBase) and m.dropout > 0


def _fitting(steps: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`steps` of tensors the module has, in the module's order; others are ignored as in ``load_weights``."""
    for name in steps:
        if name in live and torch.broadcast_shapes(steps[name].shape, live[name].shape) != live[name].shape:
            got = f"{list(steps[name].shape)} for {name!r} of shape {list(live[name].shape)}"
            raise ValueError(f"Expected `steps` to broadcast to the weights they belong to, but got {got}.")
    return {name: steps[name] for name in live if name in steps}


def _one_pass(module: nn.Module, inputs: Inputs, size: int, forward: Forward | None, num_classes: int | None) -> Tensor:
    device = device_of(module)
    rows = []
    for start in range(0, num_rows(inputs), size):
        batch = to_device(take(inputs, slice(start, start + size)), device)
        logits = logits_or_output(module, batch) if forward is None else forward(module, batch)
        logits = check_logits(logits, num_rows(batch), num_classes)
        rows.append(logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1))
    return torch.cat(rows)
