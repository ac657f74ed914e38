"""Small networks for the tests of merging."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Vgg(nn.Module):
    """VGG with BatchNorm, as in the golden file: `features` and `classifier`."""

    def __init__(self, layout: list[int | str], classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for entry in layout:
            if isinstance(entry, str):
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(width, entry, 3, padding=1), nn.BatchNorm2d(entry), nn.ReLU(inplace=True)]
                width = entry
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


class Block(nn.Module):
    """Basic residual block; the shortcut is a strided 3×3 convolution where shapes differ, as in the golden file."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """CIFAR ResNet; one block a stage and widths 8, 16, 32 make the golden file's ResNet-8."""

    def __init__(self, blocks: int = 1, widths: tuple[int, int, int] = (8, 16, 32), classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        inputs = widths[0]
        for stage, width in enumerate(widths, 1):
            strides = [1 if stage == 1 else 2] + [1] * (blocks - 1)
            layers = [Block(inputs if i == 0 else width, width, stride) for i, stride in enumerate(strides)]
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
            inputs = width
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.layer3(self.layer2(self.layer1(y)))  # type: ignore[operator]
        return self.linear(F.adaptive_avg_pool2d(y, 1).flatten(1))


class LeNet(nn.Module):
    """LeNet-5 on 3×16×16 images: no normalisation, flattened positions before the first linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 2 * 2, 30)
        self.fc2 = nn.Linear(30, 20)
        self.fc3 = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))


def mlp() -> nn.Module:
    """Two hidden layers."""
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 5))


class UNet(nn.Module):
    """Small U-Net: concatenated skips, transposed convolution, BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.out = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        y = self.up(self.deep(F.max_pool2d(skip, 2)))
        return self.out(torch.cat([skip, y], 1))


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Give every parameter and running statistic a random value that keeps activations alive; eval mode."""
    g = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.copy_(torch.rand(tensor.shape, generator=g) + 0.5)
        elif tensor.ndim == 1:
            tensor.copy_(torch.randn(tensor.shape, generator=g) * 0.2)
        else:
            tensor.copy_(torch.randn(tensor.shape, generator=g) * (2 / tensor[0].numel()) ** 0.5)
    return model.eval()


_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")


def torchvision_model(name: str) -> nn.Module:
    """Return one of torchvision's networks with ten classes; skips where torchvision is not installed.

    torchvision from PyPI beside a CPU build of torch lacks its operators and fails at import; two declarations
    without code, which no network here calls, let it load.
    """
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            _OPERATORS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    models = pytest.importorskip("torchvision.models")
    model: nn.Module = getattr(models, name)(weights=None, num_classes=10)
    return model
