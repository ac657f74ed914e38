"""Planted permutations: a permuted copy of a network is found out, and merging with it changes nothing.

Equality of outputs decides (units may tie, indices may differ): to 1e-4 of the outputs' size in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dimat import align_weights, derive_symmetry, permute_weights
from dimat.merge.combine.average import average
from dimat.symmetry import random_permutations
from tests.merge.networks import LeNet, ResNet, UNet, Vgg, mlp, randomise, torchvision_model


def resnet18() -> nn.Module:
    return torchvision_model("resnet18")


def resnet50() -> nn.Module:
    return torchvision_model("resnet50")


def densenet121() -> nn.Module:
    return torchvision_model("densenet121")


def mobilenet_v2() -> nn.Module:
    return torchvision_model("mobilenet_v2")


def settle(model: nn.Module, data: list[Tensor]) -> None:
    """Make running statistics those of the data, so that activations of deep random networks stay alive."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
            layer.reset_running_stats()
    model.train()
    with torch.no_grad():
        for x in data:
            model(x)
    model.eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.1


@pytest.mark.parametrize(
    ("build", "shape", "images"),
    [
        (mlp, (3, 4, 4), 128),
        (LeNet, (3, 16, 16), 64),
        (lambda: Vgg([16, "M", 32, 32, "M", 64]), (3, 16, 16), 64),
        (lambda: ResNet(3, (16, 32, 64)), (3, 16, 16), 64),
        (UNet, (3, 16, 16), 32),
        pytest.param(resnet18, (3, 32, 32), 32, marks=pytest.mark.zoo),
        pytest.param(mobilenet_v2, (3, 32, 32), 32, marks=pytest.mark.zoo),
        pytest.param(resnet50, (3, 32, 32), 32, marks=[pytest.mark.zoo, pytest.mark.more]),
        pytest.param(densenet121, (3, 32, 32), 32, marks=[pytest.mark.zoo, pytest.mark.more]),
    ],
    ids=["mlp", "lenet", "vgg", "resnet20", "unet", "resnet18", "mobilenet_v2", "resnet50", "densenet121"],
)
def test_planted_permutations_are_recovered(
    build: Callable[[], nn.Module], shape: tuple[int, int, int], images: int
) -> None:
    """Reference: the network before it was permuted."""
    g = torch.Generator().manual_seed(0)
    data = list(torch.randn(images, *shape, generator=g).split(32))
    model = randomise(build(), 1)
    settle(model, data)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    spec = derive_symmetry(model, (data[0][:2],))
    planted = random_permutations(spec, g)
    peer = permute_weights(own, spec, planted)
    assert any(not torch.equal(peer[name], tensor) for name, tensor in own.items())

    found = align_weights(model, own, peer, spec, data=data)
    back = permute_weights(peer, spec, found)
    wrong = sum(int((planted[group.id][found[group.id]] != torch.arange(group.size)).sum()) for group in spec.groups)
    merged = dict(average(own, [back], [0.5, 0.5]))

    with torch.no_grad():
        expected = torch.func.functional_call(model, own, (data[0],))
        scale = float(expected.abs().max())
        for name, weights in (("aligned", back), ("merged", merged)):
            got = torch.func.functional_call(model, weights, (data[0],))
            error = float((got - expected).abs().max()) / scale
            assert error < 1e-4, f"{name}: outputs are {error:.2g} apart, {wrong} units misplaced"
