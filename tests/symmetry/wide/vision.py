"""The zoo's models of torchvision, at the smallest images that leave their structure whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.symmetry.wide.entry import Built, Entry, images
from tests.symmetry.zoo import _torchvision_models as torchvision_models


def _named(name: str, size: int, **options: Any) -> Callable[[], Built]:
    return lambda: (getattr(torchvision_models(), name)(weights=None, **options), (images(size),))


def _maxvit() -> Built:
    """`maxvit_t` with windows of 2 in place of 7, so that images of 64 do for 224."""
    maxvit = torchvision_models().maxvit
    model = maxvit.MaxVit(
        input_size=(64, 64),
        stem_channels=64,
        partition_size=2,
        block_channels=[64, 128, 256, 512],
        block_layers=[2, 2, 5, 2],
        head_dim=32,
        stochastic_depth_prob=0.2,
    )
    return model, (images(64),)


def _cnn(name: str, size: int = 32, groups: int | None = None, unseen: bool = False, **options: Any) -> Entry:
    return Entry(name, "torchvision", "cnn", _named(name, size, **options), groups, unseen=unseen)


# training-only heads of googlenet and inception are left out: eval mode never runs them
ENTRIES = (
    _cnn("resnet18", groups=12),
    _cnn("resnet50", groups=37),
    _cnn("wide_resnet50_2", groups=37),
    _cnn("resnext50_32x4d"),
    _cnn("vgg11_bn", groups=10),
    _cnn("alexnet", 64),
    _cnn("densenet121", groups=120),
    _cnn("googlenet", aux_logits=False, init_weights=False),
    _cnn("inception_v3", 80, aux_logits=False, init_weights=False),
    _cnn("mobilenet_v2", groups=25),
    _cnn("mobilenet_v3_small"),
    _cnn("efficientnet_b0"),
    _cnn("mnasnet1_0"),
    _cnn("convnext_tiny", groups=22),
    _cnn("shufflenet_v2_x1_0"),
    _cnn("squeezenet1_1"),
    _cnn("regnet_x_400mf"),
    _cnn("regnet_y_400mf"),
    Entry("vit_b_16", "torchvision", "other", _named("vit_b_16", 32, image_size=32), 49, 24),
    Entry("swin_t", "torchvision", "other", _named("swin_t", 64), 52, 24),
    Entry("swin_v2_t", "torchvision", "other", _named("swin_v2_t", 64)),
    Entry("maxvit_t", "torchvision", "other", _maxvit),
    _cnn("efficientnet_v2_s", unseen=True),
)
