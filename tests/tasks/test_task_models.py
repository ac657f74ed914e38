"""Bundled networks. References: parameter counts of He et al. (2015, table 6), and torch's own layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dimat.errors import ConfigError
from dimat.symmetry import verified_symmetry
from dimat.tasks import DigitsCNN, ImageCNN, ImageViT, mlp, resnet20, seeded


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("factory", "shape"),
    [
        (DigitsCNN, (1, 8, 8)),
        (ImageCNN, (3, 16, 16)),
        (lambda: mlp((64, 32, 10)), (1, 8, 8)),
        (lambda: ImageViT(16, 4), (3, 16, 16)),
        (lambda: ImageViT(8, 2, 1, width=8, depth=1, heads=2, head="simplex"), (1, 8, 8)),
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


def test_a_vision_transformer_is_torchs_own_layers() -> None:
    """Reference: nn.TransformerEncoderLayer (pre-norm, GELU) with the same weights, on patches cut by hand."""
    model = seeded(lambda: ImageViT(8, 4, 2, classes=3, width=12, depth=2, heads=3))(torch.Generator().manual_seed(0))
    images = torch.randn(5, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = patches @ model.patches.weight.flatten(1).T + model.patches.bias + model.positions
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(12, 3, 24, 0.0, "gelu", batch_first=True, norm_first=True)
        projections = (block.query, block.key, block.value)
        state = {
            "self_attn.in_proj_weight": torch.cat([each.weight for each in projections]),
            "self_attn.in_proj_bias": torch.cat([each.bias for each in projections]),
        }
        names = {"self_attn.out_proj": "out", "linear1": "up", "linear2": "down", "norm1": "norm1", "norm2": "norm2"}
        state |= {
            f"{a}.{kind}": getattr(getattr(block, b), kind) for a, b in names.items() for kind in ("weight", "bias")
        }
        layer.load_state_dict(state)
        x = layer(x)
    torch.testing.assert_close(model(images), model.fc(model.norm(x).mean(1)), rtol=1e-4, atol=1e-5)


def test_a_vision_transformer_has_units_that_can_be_aligned() -> None:
    """Its heads, the units in them and those of each block's MLP are derived and proved, with nothing given up."""
    model = seeded(lambda: ImageViT(8, 4, 1, width=8, depth=1, heads=2))(torch.Generator().manual_seed(0))
    spec = verified_symmetry(model, (torch.randn(2, 1, 8, 8),), torch.Generator().manual_seed(0))
    assert spec.warnings == ()
    assert {16, 2, 4} <= {group.size for group in spec.groups}


@pytest.mark.parametrize("sizes", [{"size": 10, "patch": 4}, {"size": 8, "patch": 4, "width": 30}], ids=str)
def test_sizes_that_cannot_be_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(
        ConfigError, match=r"a size that is a multiple of the patch, and a width that is one of the heads"
    ):
        ImageViT(**sizes)
