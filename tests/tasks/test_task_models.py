"""Bundled networks. References: parameter counts of He et al. (2015, table 6), and torch's own layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dimat.tasks import DigitsCNN, ImageCNN, mlp, resnet20, seeded


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("factory", "shape"),
    [
        (DigitsCNN, (1, 8, 8)),
        (ImageCNN, (3, 16, 16)),
        (lambda: mlp((64, 32, 10)), (1, 8, 8)),
        (lambda: resnet20(), (3, 32, 32)),
        (lambda: resnet20(shortcut="B"), (3, 32, 32)),
    ],
)
def test_models_give_logits_and_are_seeded(factory: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    before = torch.get_rng_state()
    one, same, other = (seeded(factory)(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    states = one.state_dict(), same.state_dict(), other.state_dict()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not all(torch.equal(value, states[2][name]) for name, value in states[0].items())
    assert one(torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))).shape == (2, 10)


def test_one_generator_gives_a_new_model_each_time() -> None:
    generator = torch.Generator().manual_seed(0)
    build = seeded(lambda: mlp((4, 3)))
    assert not torch.equal(build(generator)[1].weight, build(generator)[1].weight)


def test_resnet20_has_the_published_size() -> None:
    """0.27 M parameters at width 1 with shortcut A; B adds two 1×1 convolutions and their norms."""
    assert count(resnet20()) == 269_722
    extra = 16 * 32 + 32 * 64 + 2 * (32 + 64)
    assert count(resnet20(shortcut="B")) == count(resnet20()) + extra
    assert resnet20(width=2).conv1.weight.shape == (32, 3, 3, 3)


def test_shortcut_a_is_subsampling_and_zero_channels() -> None:
    """With its convolutions at zero a block returns its shortcut: every second pixel, new channels empty."""
    block = resnet20().layer2[0]
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    y = block.eval()(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()
