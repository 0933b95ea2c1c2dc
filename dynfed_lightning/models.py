"""The small networks the papers use: plain modules from inputs to logits ``[B, C]`` (`TextEncoder`: to an output with them).

Each has ``features`` (inputs to a latent vector, ``[B, D]``) and ``head`` (the last linear layer, D -> C), so that a method
can split them. Initial weights come from torch's global generator only: ``torch.manual_seed(0)`` before building fixes them.
"""

from __future__ import annotations

import difflib
import inspect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from dynfed_lightning.encoder import TextEncoder
from dynfed_lightning.partition import check_int

_NORMS = ("batch", "group", "none")


def _norm(kind: str, channels: int) -> list[nn.Module]:
    if kind == "batch":
        return [nn.BatchNorm2d(channels)]
    if kind == "group":
        # Groups of about 8 channels, at least 2 groups; a divisor of the channels.
        groups = next(g for g in range(max(2, channels // 8), 0, -1) if channels % g == 0)
        return [nn.GroupNorm(groups, channels)]
    return []


def _check_norm(kind: Any) -> str:
    if kind not in _NORMS:
        raise ValueError(f"Expected `norm` to be one of {list(_NORMS)}, but got {kind!r}.")
    return kind


class FeaturesHead(nn.Module):
    """``head(features(x))``.

    Args:
        features: ``[B, ...]`` to ``[B, D]``.
        latent: D.
        num_classes: C.
    """

    def __init__(self, features: nn.Module, latent: int, num_classes: int) -> None:
        super().__init__()
        self.features = features
        self.head = nn.Linear(latent, check_int("num_classes", num_classes, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, C]`` of a batch of inputs."""
        return self.head(self.features(x))


class MLP(FeaturesHead):
    """Linear layers with ReLU between them, over the flattened input.

    Args:
        in_features: values per sample, at least 1.
        hidden: widths of the hidden layers; empty: softmax regression.
        num_classes: C.
    """

    def __init__(self, in_features: int, hidden: Sequence[int] = (64,), num_classes: int = 10) -> None:
        widths = [check_int("in_features", in_features, 1), *(check_int("hidden", h, 1) for h in hidden)]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        super().__init__(nn.Sequential(*layers), widths[-1], num_classes)


class PaperCNN(FeaturesHead):
    """FedGen's network for MNIST (Zhu et al., arXiv 2105.10056, appendix): two strided convolutions and a latent layer.

    conv3x3/2 to 6, conv3x3/2 to 16 (padding 1, each with normalisation and ReLU), linear to 32, then the head. At 28x28 the
    linear layer is 784 -> 32; the latent vector has no ReLU, as in the public code.

    Args:
        num_classes: C.
        in_channels: channels of the images.
        image_size: pixels a side, at least 4.
        norm: ``"batch"``, ``"group"`` or ``"none"``.
        channels: output channels of the two convolutions.
        latent: width of the latent vector.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int = 28,
        norm: str = "batch",
        channels: Sequence[int] = (6, 16),
        latent: int = 32,
    ) -> None:
        _check_norm(norm)
        size, before = check_int("image_size", image_size, 4), check_int("in_channels", in_channels, 1)
        layers: list[nn.Module] = []
        for after in channels:
            layers += [nn.Conv2d(before, after, 3, 2, 1), *_norm(norm, after), nn.ReLU()]
            size, before = (size + 1) // 2, after
        layers += [nn.Flatten(), nn.Linear(before * size * size, latent)]
        super().__init__(nn.Sequential(*layers), latent, num_classes)


class CifarCNN(FeaturesHead):
    """The usual small network for 32x32 (McMahan et al., AISTATS 2017; TensorFlow's tutorial): two conv5x5 with pooling, two fc.

    Args:
        num_classes: C.
        in_channels: channels of the images.
        image_size: pixels a side, a multiple of 4.
        norm: ``"batch"``, ``"group"`` or ``"none"`` after each convolution.
        channels: output channels of the two convolutions.
        latent: width of the fully connected layer.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        norm: str = "none",
        channels: Sequence[int] = (32, 64),
        latent: int = 128,
    ) -> None:
        _check_norm(norm)
        size, before = check_int("image_size", image_size, 4), check_int("in_channels", in_channels, 1)
        layers: list[nn.Module] = []
        for after in channels:
            layers += [nn.Conv2d(before, after, 5, padding=2), *_norm(norm, after), nn.ReLU(), nn.MaxPool2d(2)]
            size, before = size // 2, after
        layers += [nn.Flatten(), nn.Linear(before * size * size, latent), nn.ReLU()]
        super().__init__(nn.Sequential(*layers), latent, num_classes)


class _BasicBlock(nn.Module):
    """Two conv3x3 and a shortcut, which is a strided conv1x1 where the shape changes."""

    def __init__(self, before: int, after: int, stride: int, norm: str) -> None:
        super().__init__()
        bias = norm == "none"
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=bias),
            *_norm(norm, after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=bias),
            *_norm(norm, after),
        )
        same = before == after and stride == 1
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=bias), *_norm(norm, after))
        )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


class ResNet(FeaturesHead):
    """Residual networks of He et al. (CVPR 2016) for small images: no stem pooling, global average pooling at the end.

    Depth 8, 14 or 20 is the CIFAR form (section 4.2): three stages of (depth - 2) / 6 basic blocks, widths 16, 32, 64.
    Depth 10 is the ImageNet form with a 3x3 stem: four stages of one block, widths 64, 128, 256, 512. A shortcut that changes
    shape is a 1x1 convolution. The last normalisation of a block starts at 1.

    Args:
        depth: 8, 10, 14 or 20.
        num_classes: C.
        in_channels: channels of the images.
        norm: ``"batch"``, ``"group"`` or ``"none"``.
        width: channels of the first stage; doubled at every further one. ``None``: 16, and 64 at depth 10.
    """

    def __init__(
        self,
        depth: int = 8,
        num_classes: int = 10,
        in_channels: int = 3,
        norm: str = "batch",
        width: int | None = None,
    ) -> None:
        _check_norm(norm)
        if depth not in (8, 10, 14, 20):
            raise ValueError(f"Expected `depth` to be 8, 10, 14 or 20, but got {depth!r}.")
        stages, blocks, first = (4, 1, 64) if depth == 10 else (3, (depth - 2) // 6, 16)
        first = first if width is None else check_int("width", width, 1)
        check_int("in_channels", in_channels, 1)
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            stem=nn.Sequential(
                nn.Conv2d(in_channels, first, 3, 1, 1, bias=norm == "none"), *_norm(norm, first), nn.ReLU()
            )
        )
        before = first
        for stage in range(stages):
            after = first * 2**stage
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layers[f"stage{stage + 1}_{block + 1}"] = _BasicBlock(before, after, stride, norm)
                before = after
        layers["pool"] = nn.AdaptiveAvgPool2d(1)
        layers["flat"] = nn.Flatten()
        super().__init__(nn.Sequential(layers), before, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _resnet(depth: int) -> Callable[..., ResNet]:
    def build(num_classes: int = 10, in_channels: int = 3, norm: str = "batch", width: int | None = None) -> ResNet:
        return ResNet(depth, num_classes, in_channels, norm, width)

    return build


MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "cnn": PaperCNN,
    "cifar_cnn": CifarCNN,
    "resnet8": _resnet(8),
    "resnet10": _resnet(10),
    "resnet14": _resnet(14),
    "resnet20": _resnet(20),
    "text_encoder": TextEncoder,
}


def build_model(name: str, **arguments: Any) -> nn.Module:
    """A network by name.

    Args:
        name: a key of `MODELS`, such as ``"resnet8"``.
        arguments: its class's, such as ``num_classes=10, in_channels=3``.

    Returns:
        a fresh network; its weights depend on torch's global seed only.

    Raises:
        ValueError: an unknown name or argument (the nearest is suggested).
    """
    if name not in MODELS:
        near = difflib.get_close_matches(str(name), MODELS, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Expected `name` to be one of {list(MODELS)}, but got {name!r}.{hint}")
    known = list(inspect.signature(MODELS[name]).parameters)
    for argument in arguments:
        if argument not in known:
            near = difflib.get_close_matches(argument, known, 1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise ValueError(f"Expected arguments of {name!r} among {known}, but got `{argument}`.{hint}")
    return MODELS[name](**arguments)
