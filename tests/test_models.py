"""The reference networks: shapes, sizes known from the literature, the split into features and head, the seed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dynfed_lightning.models import MLP, MODELS, CifarCNN, PaperCNN, ResNet, build_model


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# Parameters counted by hand (weights + biases + 2 per normalised channel); ResNet-20 with projection shortcuts is known
# to have 272,474 and without them 269,722.
KNOWN = {
    "mlp": (MLP(64, (32,), 10), (1, 8, 8), 64 * 32 + 32 + 32 * 10 + 10),
    "cnn": (PaperCNN(), (1, 28, 28), 60 + 12 + 880 + 32 + 784 * 32 + 32 + 330),
    "cnn, no norm, digits": (PaperCNN(norm="none", image_size=8), (1, 8, 8), 60 + 880 + 64 * 32 + 32 + 330),
    "cnn, odd size": (PaperCNN(image_size=29), (1, 29, 29), 60 + 12 + 880 + 32 + 16 * 64 * 32 + 32 + 330),
    "cifar_cnn": (CifarCNN(), (3, 32, 32), 75 * 32 + 32 + 800 * 64 + 64 + 4096 * 128 + 128 + 1290),
    "resnet8": (ResNet(8), (3, 32, 32), 78042),
    "resnet10": (ResNet(10), (3, 32, 32), 4903242),
    "resnet20": (ResNet(20), (3, 32, 32), 272474),
    "resnet20, group": (ResNet(20, norm="group"), (3, 32, 32), 272474),
    "resnet14, grey, narrow": (ResNet(14, 7, 1, "none", width=8), (1, 28, 28), None),
}


@pytest.mark.parametrize("name", KNOWN)
def test_shapes_sizes_and_split(name: str) -> None:
    model, shape, parameters = KNOWN[name]
    x = torch.randn(3, *shape)
    model.eval()
    logits, latent = model(x), model.features(x)
    assert isinstance(model.head, nn.Linear)
    assert logits.shape == (3, model.head.out_features)
    assert latent.shape == (3, model.head.in_features)
    assert torch.equal(model.head(latent), logits)
    if parameters is not None:
        assert size(model) == parameters
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_paper_cnn_has_the_papers_layers() -> None:
    convolutions = [m for m in PaperCNN().modules() if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size, c.stride) for c in convolutions] == [
        (1, 6, (3, 3), (2, 2)),
        (6, 16, (3, 3), (2, 2)),
    ]
    linear = [m for m in PaperCNN().modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(784, 32), (32, 10)]


@pytest.mark.parametrize(("depth", "convolutions"), [(8, 6), (14, 12), (20, 18), (10, 8)])
def test_depth_counts_the_layers(depth: int, convolutions: int) -> None:
    # depth = 3x3 convolutions + stem + head; 1x1 shortcuts do not count.
    found = [m for m in ResNet(depth).modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(found) == convolutions + 1


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("make", [PaperCNN, CifarCNN, lambda **k: ResNet(8, **k)])
def test_norm_is_what_was_asked_for(make, norm: str) -> None:
    kinds = {type(m) for m in make(norm=norm).modules()} & {nn.BatchNorm2d, nn.GroupNorm}
    assert kinds == {"batch": {nn.BatchNorm2d}, "group": {nn.GroupNorm}, "none": set()}[norm]


@pytest.mark.parametrize("name", MODELS)
def test_weights_depend_on_the_global_seed_only(name: str) -> None:
    required = {"mlp": {"in_features": 12}, "text_encoder": {"vocab_size": 20, "layers": 1, "hidden": 12, "heads": 2}}
    arguments = required.get(name, {})
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(build_model(name, num_classes=4, **arguments).state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert any(not torch.equal(states[0][k], states[2][k]) for k in states[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build_model("resnet9"), "Did you mean 'resnet"),
        (lambda: build_model("resnet8", num_class=3), "Did you mean `num_classes`"),
        (lambda: ResNet(18), "`depth` to be 8, 10, 14 or 20, but got 18"),
        (lambda: ResNet(8, norm="layer"), "`norm` to be one of"),
        (lambda: PaperCNN(num_classes=1), "`num_classes` to be an integer of at least 2, but got 1"),
        (lambda: PaperCNN(image_size=0), "`image_size`"),
        (lambda: MLP(0), "`in_features`"),
        (lambda: MLP(4, (3, 0)), "`hidden`"),
    ],
)
def test_bad_arguments_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
