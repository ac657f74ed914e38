"""What `torch.func.vmap` maps over: an axis is set aside, and every operation is done for each of its indices alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimat.symmetry import SymmetrySpec, derive_symmetry, verify_symmetry


def built(model: nn.Module, *inputs: Tensor) -> tuple[nn.Module, tuple[Tensor, ...], SymmetrySpec]:
    return model.eval(), inputs, derive_symmetry(model, inputs)


def error(model: nn.Module, inputs: tuple[Tensor, ...], spec: SymmetrySpec) -> float:
    return verify_symmetry(model, spec, inputs, torch.Generator().manual_seed(0))


class Ensemble(nn.Module):
    """Four perceptrons, mapped over: each has units of its own, and their mean does not depend on their order."""

    def __init__(self, mean: bool) -> None:
        super().__init__()
        self.mean = mean
        self.up, self.bias = nn.Parameter(torch.randn(4, 8, 3)), nn.Parameter(torch.randn(4, 8))
        self.down = nn.Parameter(torch.randn(4, 2, 8))

    def forward(self, x: Tensor) -> Tensor:
        def one(up: Tensor, bias: Tensor, down: Tensor, x: Tensor) -> Tensor:
            return torch.func.vmap(lambda row: F.linear(torch.relu(F.linear(row, up, bias)), down))(x)

        made = torch.func.vmap(one, in_dims=(0, 0, 0, None))(self.up, self.bias, self.down, x)
        return made.mean(0) if self.mean else made


@pytest.mark.parametrize(("mean", "sizes"), [(True, [4, 8]), (False, [8])])
def test_what_is_mapped_over_keeps_units_of_its_own(mean: bool, sizes: list[int]) -> None:
    """Reference: by hand; members of an ensemble are units themselves where only their mean is used."""
    model, inputs, spec = built(Ensemble(mean), torch.randn(5, 3))
    assert sorted(group.size for group in spec.groups) == sizes
    (inside,) = (group for group in spec.groups if group.parents)
    assert spec.sizes[inside.parents[0]] == 4
    assert len(spec.numbered) == (not mean)
    assert error(model, inputs, spec) < 1e-12
