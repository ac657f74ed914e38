"""Models for the tests of the symmetry package, small where the architecture allows it.

`case(name)` builds a model with seeded weights, its example inputs and the number of groups that it should
have; `derived(name)` adds the spec. Both are remembered within a test process and must not be modified.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimat.symmetry import SymmetrySpec, Trace, derive_symmetry


@dataclass(frozen=True)
class Case:
    model: nn.Module
    inputs: tuple[Tensor, ...]
    groups: int


class MLP(nn.Module):
    def __init__(self, sizes: tuple[int, ...] = (12, 9, 8, 5)) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](x)


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(256, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(x.size(0), -1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class VGG(nn.Module):
    """VGG with BatchNorm for 32 × 32 images; `width` is that of the first layer."""

    def __init__(self, plan: tuple[int | str, ...] = (1, "M", 2, "M", 4, 4, "M"), width: int = 4) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for step in plan:
            if isinstance(step, str):
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(channels, step * width, 3, padding=1), nn.BatchNorm2d(step * width), nn.ReLU(True)]
            channels = step * width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(channels * 16, 20), nn.ReLU(True), nn.Dropout(), nn.Linear(20, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class Block(nn.Module):
    """CIFAR BasicBlock with a shortcut of kind A (strided slice, zero channels) or B (1 × 1 convolution)."""

    def __init__(self, given: int, made: int, stride: int, option: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(given, made, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(made)
        self.conv2 = nn.Conv2d(made, made, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(made)
        self.shortcut = nn.Sequential()
        self.pad = 0
        if stride != 1 and option == "B":
            self.shortcut = nn.Sequential(nn.Conv2d(given, made, 1, stride, bias=False), nn.BatchNorm2d(made))
        elif stride != 1:
            self.pad = (made - given) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        kept = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad)) if self.pad else self.shortcut(x)
        return F.relu(out + kept)


class ResNet20(nn.Module):
    def __init__(self, option: str = "B", width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages: list[nn.Sequential] = []
        given = width
        for number in range(3):
            made = width * 2**number
            blocks = [Block(given if i == 0 else made, made, 2 if number and i == 0 else 1, option) for i in range(3)]
            stages.append(nn.Sequential(*blocks))
            given = made
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(given, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.avg_pool2d(x, x.size()[3])
        return self.linear(x.view(x.size(0), -1))


class UNet(nn.Module):
    """Two levels, GroupNorm, one transposed and one resized way up, skips joined by concatenation."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        w = width
        self.down1 = nn.Sequential(nn.Conv2d(2, w, 3, padding=1), nn.GroupNorm(2, w), nn.SiLU())
        self.down2 = nn.Sequential(nn.Conv2d(w, 2 * w, 3, 2, 1), nn.GroupNorm(4, 2 * w), nn.SiLU())
        self.middle = nn.Sequential(nn.Conv2d(2 * w, 4 * w, 3, 2, 1), nn.GroupNorm(4, 4 * w), nn.SiLU())
        self.up2 = nn.ConvTranspose2d(4 * w, 3 * w, 2, 2)
        self.mix2 = nn.Sequential(nn.Conv2d(5 * w, 2 * w, 3, padding=1), nn.GroupNorm(1, 2 * w), nn.SiLU())
        self.mix1 = nn.Conv2d(3 * w, w, 3, padding=1)
        self.head = nn.Conv2d(w, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(one)
        x = self.mix2(torch.cat([self.up2(self.middle(two)), two], 1))
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return self.head(F.gelu(self.mix1(torch.cat([one, x], 1))))


class TiedText(nn.Module):
    """A bag-of-words language model whose output layer is its embedding."""

    def __init__(self, words: int = 20, width: int = 8, hidden: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.out = nn.Linear(width, words, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.out(x.mean(1))


class Grouped(nn.Module):
    """1-d convolutions: grouped, depthwise, with a channel multiplier; squeeze and excitation; GLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(3, 12, 3)
        self.grouped = nn.Conv1d(12, 18, 3, groups=3)
        self.depthwise = nn.Conv1d(18, 18, 3, groups=18)
        self.multiplied = nn.Conv1d(18, 36, 1, groups=18)
        self.squeeze, self.excite = nn.Conv1d(36, 5, 1), nn.Conv1d(5, 36, 1)
        self.gate = nn.Conv1d(36, 14, 1)
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.multiplied(F.relu(self.depthwise(F.relu(self.grouped(F.relu(self.stem(x))))))))
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean(2, keepdim=True)))))
        return self.head(F.glu(self.gate(x), 1).amax(2))


class Volume(nn.Module):
    """3-d convolution, grouped transposed convolution, InstanceNorm, pixel shuffle, split and stack."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 8, 3, padding=1, bias=False)  # the norm would undo a bias
        self.norm = nn.InstanceNorm3d(8, affine=True)
        self.up = nn.ConvTranspose3d(8, 12, 2, 2, groups=2)
        self.flat = nn.Conv2d(12, 16, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        self.left, self.right = nn.Linear(2, 6), nn.Linear(2, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(F.leaky_relu(self.norm(self.stem(x)))).amax(2)
        x = self.shuffle(F.relu(self.flat(x))).mean((2, 3))
        a, b = x.chunk(2, 1)
        return self.head(torch.stack([torch.tanh(self.left(a)), torch.tanh(self.right(b))], 1).sum(1))


def _vision(name: str, size: int) -> Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]:
    def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
        return getattr(_torchvision_models(), name)(weights=None), (torch.randn(2, 3, size, size),)

    return make


def output_node(traced: Trace, module: str) -> str:
    """Return the name of the last node that runs inside the submodule of this path."""
    inside = [
        node.name
        for node in traced.nodes
        if node.op == "call_function"
        and module in {str(entry[0]).partition("@")[0] for entry in node.meta.get("nn_module_stack", {}).values()}
    ]
    return inside[-1]


@cache
def _torchvision_models() -> Any:
    """Import torchvision. Its wheel from PyPI beside a CPU build of torch lacks its operators, yet describes
    two of them to torch at import and fails; declaring those first lets the (pure Python) models load.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision.models

    return torchvision.models


def _made(make: Callable[[], nn.Module], *shape: int) -> Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]:
    return lambda: (make(), (torch.randn(*shape),))


_MAKERS: dict[str, tuple[Callable[[], tuple[nn.Module, tuple[Tensor, ...]]], int]] = {
    "mlp": (_made(MLP, 3, 12), 2),
    "lenet": (_made(LeNet, 2, 1, 28, 28), 4),
    "vgg": (_made(VGG, 2, 3, 32, 32), 5),
    # inner units of 9 blocks, and the streams: with 1 × 1 convolutions one for each of three stages; with
    # zero channels stage 1 (8) lies inside stage 2 (4 + 8 + 4), and that inside stage 3 (8 + 16 + 8)
    "resnet20-B": (_made(lambda: ResNet20("B"), 2, 3, 32, 32), 12),
    "resnet20-A": (_made(lambda: ResNet20("A"), 2, 3, 32, 32), 14),
    # GroupNorm(g, C) splits a stream in groups and insides: 2 for down1, down2 and middle each
    "unet": (_made(UNet, 2, 2, 16, 16), 9),
    "text": (lambda: (TiedText(), (torch.arange(14).view(2, 7) % 20,)), 2),
    "grouped": (_made(Grouped, 2, 3, 16), 6),
    "volume": (_made(Volume, 2, 1, 4, 6, 6), 6),
    "resnet18": (_vision("resnet18", 32), 12),
    "resnet50": (_vision("resnet50", 32), 37),
    "densenet121": (_vision("densenet121", 32), 120),
    "mobilenet_v2": (_vision("mobilenet_v2", 32), 25),
}
SMALL = ("mlp", "lenet", "vgg", "resnet20-A", "resnet20-B", "unet", "text", "grouped", "volume")
LARGE = ("resnet18", "resnet50", "densenet121", "mobilenet_v2")


@cache
def case(name: str) -> Case:
    make, groups = _MAKERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = make()
    return Case(model.eval(), inputs, groups)


@cache
def derived(name: str) -> SymmetrySpec:
    return derive_symmetry(case(name).model, case(name).inputs)
