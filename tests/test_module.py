from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dynfed_lightning import ClientModule


def test_loss_of_tuples_and_dicts_by_hand() -> None:
    module = ClientModule(nn.Identity())
    logits, y = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1])
    expected = (0.6931472 + 1.3132617) / 2
    assert float(module.training_step((logits, y), 0)) == pytest.approx(expected)
    assert float(module.training_step({"x": logits, "label": y}, 0)) == pytest.approx(expected)


def test_optimisers() -> None:
    net = nn.Linear(2, 2)
    net.bias.requires_grad_(False)
    sgd = ClientModule(net, lr=0.3, momentum=0.9, weight_decay=0.1).configure_optimizers()
    group = sgd.param_groups[0]
    assert (type(sgd).__name__, group["lr"], group["momentum"], group["weight_decay"]) == ("SGD", 0.3, 0.9, 0.1)
    assert len(group["params"]) == 1  # the frozen bias is left out
    for name, kind in (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)):
        assert type(ClientModule(net, optimizer=name).configure_optimizers()) is kind


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lr": 0}, "Expected `lr` to be a positive number, but got 0"),
        ({"optimizer": "lion"}, "Expected `optimizer` to be one of .* but got 'lion'"),
        ({"momentum": 1.0}, r"Expected `momentum` to be in \[0, 1\), but got 1.0"),
        ({"momentum": 0.9, "optimizer": "adam"}, "only with optimizer 'sgd'"),
        ({"weight_decay": -1}, "Expected `weight_decay` to be a number >= 0, but got -1"),
        ({"label_smoothing": 1}, "Expected `label_smoothing`"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClientModule(nn.Linear(1, 2), **kwargs)
    with pytest.raises(TypeError, match="Expected `model` to be a torch module, but got str"):
        ClientModule("resnet")  # type: ignore[arg-type]
