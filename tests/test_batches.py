"""What batches and models' outputs are made of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynfed_lightning.batches import attentions_of, call_model, hidden_states_of, num_rows, split_batch, take, to_device

TEXT = {
    "input_ids": torch.tensor([[5, 6, 0, 0], [7, 0, 0, 0], [1, 2, 3, 4]]),
    "attention_mask": torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]),
    "labels": torch.tensor([0, 1, 1]),
}


class Named(nn.Module):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return input_ids, attention_mask


class Anything(nn.Module):
    def forward(self, **entries: Tensor) -> Any:
        return entries


class Whole(nn.Module):
    def forward(self, batch: Any, scale: float = 1.0) -> Any:
        return batch


class WholeAndMore(nn.Module):
    def forward(self, batch: Any, **more: Any) -> Any:
        return batch, more


def test_text_is_a_dict_without_its_labels() -> None:
    inputs, targets = split_batch(TEXT)
    assert list(inputs) == ["input_ids", "attention_mask"] and torch.equal(targets, TEXT["labels"])
    assert inputs["input_ids"] is TEXT["input_ids"]
    # `labels` wins over nothing else that is there, and an image beside other columns stays one tensor.
    inputs, targets = split_batch({"image": torch.ones(2, 3), "label": torch.zeros(2), "id": torch.arange(2)})
    assert inputs.shape == (2, 3)
    mapping = {"x": torch.ones(1), "z": torch.zeros(1)}
    assert split_batch((mapping, torch.zeros(1)))[0] is mapping  # a tuple says which part is the inputs


def test_a_dict_goes_to_the_arguments_that_bear_its_names() -> None:
    inputs = {**split_batch(TEXT)[0], "idx": torch.arange(3)}
    ids, mask = call_model(Named(), inputs)
    assert ids is inputs["input_ids"] and mask is inputs["attention_mask"]
    assert call_model(Anything(), inputs) == inputs
    assert call_model(Whole(), inputs) is inputs
    assert call_model(WholeAndMore(), inputs) == (inputs, {})
    x = torch.ones(2)
    assert call_model(Whole(), x) is x


def test_rows_of_either() -> None:
    inputs = split_batch(TEXT)[0]
    assert num_rows(inputs) == num_rows(TEXT["labels"]) == 3
    assert torch.equal(take(TEXT["labels"], 2), torch.tensor([0, 1]))
    assert torch.equal(take(TEXT["labels"], torch.tensor([2, 0])), torch.tensor([1, 0]))
    # Columns that none of the chosen rows attends to are padding, and go.
    assert take(inputs, 2)["input_ids"].tolist() == [[5, 6], [7, 0]]
    assert take(inputs, torch.tensor([2, 1]))["input_ids"].tolist() == [[1, 2, 3, 4], [7, 0, 0, 0]]
    assert take(inputs, slice(1, 2))["attention_mask"].tolist() == [[1]]
    left = {"input_ids": torch.tensor([[0, 0, 9]]), "attention_mask": torch.tensor([[0, 0, 1]])}
    assert take(left, 1)["input_ids"].tolist() == [[0, 0, 9]]  # positions must not shift
    assert take({"input_ids": torch.ones(2, 3)}, 1)["input_ids"].shape == (1, 3)
    moved = to_device(inputs, "meta")
    assert all(t.device.type == "meta" for t in moved.values()) and to_device(torch.ones(1), "meta").is_meta


@pytest.mark.parametrize("part, of", [("hidden_states", hidden_states_of), ("attentions", attentions_of)])
def test_what_models_return_beside_logits(part: str, of: Any) -> None:
    states = (torch.ones(1), torch.zeros(1))
    assert of(SimpleNamespace(**{part: states})) == states
    assert of({part: list(states), "logits": torch.ones(1)}) == states
    for nothing in (torch.ones(2), {"logits": torch.ones(1)}, SimpleNamespace(**{part: None}), SimpleNamespace()):
        assert of(nothing) is None
