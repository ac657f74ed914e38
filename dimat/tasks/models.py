"""Small networks for the bundled tasks.

All are built through `seeded`, so that two agents' initialisations are equal exactly if their generators are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimat.errors import ConfigError
from dimat.tasks.data import draw_seed
from dimat.tasks.heads import Head, make_head


def seeded(factory: Callable[[], nn.Module]) -> Callable[[torch.Generator], nn.Module]:
    """Return `factory` as a function of a generator, which seeds its global draws; the global state is restored."""

    def build(generator: torch.Generator) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: that would reseed every GPU as well.
            torch.default_generator.manual_seed(draw_seed(generator))
            return factory()

    return build


def mlp(sizes: Sequence[int], head: Head = "linear") -> nn.Sequential:
    """Return a multilayer perceptron with ReLU between layers; `sizes` are units from inputs to logits.

    Inputs of any shape (B, …) are flattened to (B, sizes[0]). The last layer is a head of kind `head`.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(sizes[:-1]):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers, make_head(head, *sizes[-2:]))


def _conv(fan_in: int, fan_out: int, stride: int = 1, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(fan_in, fan_out, kernel, stride, kernel // 2, bias=False)


class DigitsCNN(nn.Module):
    """Three 3×3 convolutions with BatchNorm for (B, 1, 8, 8) images: 8×8, 4×4, 2×2, mean, logits."""

    def __init__(self, classes: int = 10, width: int = 16, head: Head = "linear") -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(1, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, 2 * width, stride=2), nn.BatchNorm2d(2 * width)
        self.conv3, self.bn3 = _conv(2 * width, 2 * width, stride=2), nn.BatchNorm2d(2 * width)
        self.fc = make_head(head, 2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return self.fc(x.mean((2, 3)))


class ImageCNN(nn.Module):
    """Four 3×3 convolutions with BatchNorm for images of any size from 8×8: the three after the first halve it."""

    def __init__(self, channels: int = 3, classes: int = 10, width: int = 32, head: Head = "linear") -> None:
        super().__init__()
        sizes = (channels, width, 2 * width, 4 * width, 4 * width)
        self.convs = nn.ModuleList(_conv(sizes[i], sizes[i + 1], stride=1 if i == 0 else 2) for i in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(size) for size in sizes[1:])
        self.fc = make_head(head, sizes[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return self.fc(x.mean((2, 3)))


Shortcut = Literal["A", "B"]


class Block(nn.Module):
    """A basic residual block. Where shape changes, shortcut "A" takes every second pixel and pads channels with
    zeros (no parameters), "B" is a strided 1×1 convolution with BatchNorm."""

    def __init__(self, fan_in: int, fan_out: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(fan_in, fan_out, stride), nn.BatchNorm2d(fan_out)
        self.conv2, self.bn2 = _conv(fan_out, fan_out), nn.BatchNorm2d(fan_out)
        self.stride, self.padding = stride, fan_out - fan_in
        self.shortcut: nn.Module | None = None
        if shortcut == "B" and (stride != 1 or fan_in != fan_out):
            self.shortcut = nn.Sequential(_conv(fan_in, fan_out, stride, kernel=1), nn.BatchNorm2d(fan_out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.shortcut is not None:
            x = self.shortcut(x)
        elif self.stride != 1 or self.padding:
            before = self.padding // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.padding - before))
        return F.relu(y + x)


class ResNet20(nn.Module):
    """He et al.'s CIFAR ResNet-20: three stages of three blocks with 16, 32, 64 channels times `width`."""

    def __init__(
        self, width: int = 1, shortcut: Shortcut = "A", classes: int = 10, channels: int = 3, head: Head = "linear"
    ) -> None:
        super().__init__()
        sizes = (16 * width, 32 * width, 64 * width)
        self.conv1, self.bn1 = _conv(channels, sizes[0]), nn.BatchNorm2d(sizes[0])
        fan_in = sizes[0]
        stages: list[nn.Module] = []
        for size in sizes:
            stride = 1 if size == fan_in else 2
            stages.append(
                nn.Sequential(
                    Block(fan_in, size, stride, shortcut),
                    Block(size, size, 1, shortcut),
                    Block(size, size, 1, shortcut),
                )
            )
            fan_in = size
        self.layer1, self.layer2, self.layer3 = stages
        self.fc = make_head(head, fan_in, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def resnet20(
    width: int = 1, shortcut: Shortcut = "A", classes: int = 10, channels: int = 3, head: Head = "linear"
) -> ResNet20:
    """Return a CIFAR ResNet-20 (0.27 M parameters at width 1); shortcuts as in `Block`, heads as in `heads`."""
    return ResNet20(width, shortcut, classes, channels, head)


class EncoderBlock(nn.Module):
    """A pre-norm transformer block over (B, tokens, width): x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        query, key, value = (
            layer(y).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        x = x + self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ImageViT(nn.Module):
    """A small vision transformer: patches, learned positions, pre-norm blocks, mean over tokens, logits.

    Images are (B, channels, size, size), `size` a multiple of `patch`; `width` is a multiple of `heads`. Dosovitskiy et
    al. 2021, arXiv 2010.11929; the mean in the class token's place as in Beyer et al. 2022, arXiv 2205.01580.
    """

    def __init__(
        self,
        size: int,
        patch: int,
        channels: int = 3,
        classes: int = 10,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        head: Head = "linear",
    ) -> None:
        super().__init__()
        if size % patch or width % heads:
            raise ConfigError(
                f'model = "vit": {size} pixels in patches of {patch}, {width} channels for {heads} heads; give a size '
                "that is a multiple of the patch, and a width that is one of the heads"
            )
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.positions = nn.Parameter(torch.randn(1, (size // patch) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.fc = make_head(head, width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.fc(self.norm(self.blocks(x)).mean(1))
