"""The client-side callbacks in an ordinary ``L.Trainer``, without any federation."""

from __future__ import annotations

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from toys import blobs, client_module, network, outer

from dynfed_lightning import GradientNorm, GradientShift, ProximalTerm


def _fit(callback: L.Callback, epochs: int = 1, **kwargs: object) -> torch.nn.Module:
    x, y = blobs(30)
    module = client_module(lr=0.1)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 30)
    outer(epochs, callbacks=[callback], **kwargs).fit(module, loader)
    return module.model


def _step(model: torch.nn.Module) -> None:
    x, y = blobs(30)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()


def test_gradient_norm_is_the_mean_over_the_steps() -> None:
    callback = GradientNorm()
    _fit(callback, epochs=2)
    model, norms = network(), []
    for _ in range(2):
        _step(model)
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm())
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    assert callback.value == pytest.approx(float(sum(norms) / 2), rel=1e-5)
    assert GradientNorm().value == 0.0


def test_proximal_term_is_the_gradient_of_the_penalty() -> None:
    """Two steps by hand on ``CE + mu/2 ||w - w_0||^2``, differentiated by autograd."""
    got = _fit(ProximalTerm(0.7), epochs=2)
    model = network()
    anchor = [p.detach().clone() for p in model.parameters()]
    x, y = blobs(30)
    for _ in range(2):
        model.zero_grad()
        penalty = sum(((p - a) ** 2).sum() for p, a in zip(model.parameters(), anchor, strict=True))
        (F.cross_entropy(model(x), y) + 0.35 * penalty).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    for a, b in zip(got.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_gradient_shift_moves_by_the_shift() -> None:
    shift = {f"model.{n}": torch.full_like(p, 2.0) for n, p in network().named_parameters()}
    shifted, plain = _fit(GradientShift(shift)), _fit(L.Callback())
    for a, b in zip(shifted.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b - 0.2, rtol=0, atol=1e-6)


def test_edits_come_before_clipping() -> None:
    shift = {f"model.{n}": torch.full_like(p, 100.0) for n, p in network().named_parameters()}
    start = network()
    clipped = _fit(GradientShift(shift), gradient_clip_val=1.0)
    moved = torch.cat([(a - b).flatten() for a, b in zip(clipped.parameters(), start.parameters(), strict=True)])
    assert float(moved.detach().norm()) == pytest.approx(0.1, rel=1e-4)


def test_bad_mu() -> None:
    for mu in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="Expected `mu` to be a number >= 0"):
            ProximalTerm(mu)
