"""What `torch.func.vmap` maps over: an axis is set aside, and every operation is done for each of its indices alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch._functorch.vmap as functorch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap
from torch.utils.checkpoint import checkpoint

from dimat.symmetry import SymmetrySpec, derive_symmetry, verify_symmetry
from dimat.symmetry.batched import traceable_vmap


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
            return vmap(lambda row: F.linear(torch.relu(F.linear(row, up, bias)), down))(x)

        made = vmap(one, in_dims=(0, 0, 0, None))(self.up, self.bias, self.down, x)
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


class Mapped(nn.Module):
    """A stream of eight units, of which some function is mapped over rows, over units, or over both."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.into, self.out = nn.Linear(3, 8), nn.Linear(8, 2)
        self.scale, self.centres, self.shares = (nn.Parameter(torch.randn(n)) for n in ((8,), (6, 8), (6, 8)))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.into(x))
        return self.out(MAPPED[self.how][0](self, x))


def _each(row: Tensor) -> Tensor:
    return (row * 2 + 1).sin()


MAPPED: dict[str, tuple[Callable[[Mapped, Tensor], Tensor], list[int]]] = {
    "rows": (lambda m, x: vmap(_each)(x), [8]),
    "units": (lambda m, x: vmap(_each, 1, 1)(x), [8]),
    "units, from the end": (lambda m, x: vmap(_each, -1, -1)(x), [8]),
    "units, brought to the front": (lambda m, x: vmap(_each, 1, 0)(x).mT, [8]),
    "along rows": (lambda m, x: vmap(lambda unit: unit.cumsum(0), 1, 1)(x), [8]),
    "along units": (lambda m, x: vmap(lambda row: row.cumsum(0))(x), []),
    "shares of units": (lambda m, x: vmap(lambda row: row.softmax(0) * m.scale)(x), [8]),
    "both": (lambda m, x: vmap(vmap(torch.mul), (0, None))(x, m.scale), [8]),
    "pairs": (lambda m, x: vmap(lambda row: vmap(lambda c: (c - row).norm())(m.centres))(x) @ m.shares, [6, 8, 8]),
    "the same for all": (lambda m, x: x + vmap(lambda row: m.scale * 2)(x), [8]),
    "another place for each": (lambda m, x: x + vmap(lambda unit, n: unit.roll(1) * n, (1, None), 1)(x, x[0, 0]), [7]),
    "kept by a checkpoint": (lambda m, x: vmap(lambda u: checkpoint(_each, u, use_reentrant=False), 1, 1)(x), [8]),
}


@pytest.mark.parametrize("how", MAPPED)
def test_mapped_over_units(how: str) -> None:
    """Reference: groups by hand; the network itself under random permutations."""
    model, inputs, spec = built(Mapped(how), torch.randn(5, 3))
    assert sorted(group.size for group in spec.groups) == MAPPED[how][1]
    assert spec.trace_kind == "export"
    assert error(model, inputs, spec) < 1e-12


def test_vmap_is_left_as_it_was() -> None:
    """Reference: torch's own results, outside of a trace and inside."""
    x, before = torch.randn(4, 5, 3), vars(functorch)["_remove_batch_dim"]
    places = [(to, out) for to in (0, 1, 2, -1) for out in (0, 1, 2, -1)]
    made = [vmap(_each, to, out)(x) for to, out in places]
    with traceable_vmap():
        assert all(torch.equal(vmap(_each, *place)(x), value) for place, value in zip(places, made, strict=True))
    assert vars(functorch)["_remove_batch_dim"] is before
