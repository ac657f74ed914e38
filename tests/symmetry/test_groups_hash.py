"""What machines compare of their models' groups. References: the text that is hashed, written by hand; networks with
equal tensors that are wired in other ways."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from blake3 import blake3
from torch import Tensor, nn

from dimat.symmetry import AxisRef, Factor, Group, Layout, SymmetrySpec, derive_symmetry
from tests.symmetry.zoo import SMALL, derived

Forward = Callable[[Tensor], Tensor]
INPUTS = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


class Wired(nn.Module):
    """Three layers of eight units; `between` is done twice, `inside` is added to what the second gives."""

    def __init__(self, between: Forward = torch.relu, inside: bool = False, follow: bool = True) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.between, self.inside, self.follow = between, inside, follow

    def forward(self, x: Tensor) -> Tensor:
        one = self.between(self.one(x))
        if not self.follow:  # as a module that export cannot follow: it asks for a value
            one = one * (2.0 if float(one.detach().sum()) > 1e9 else 1.0)
        two = self.between(self.two(one))
        return self.three(two + one if self.inside else two)


def renamed(spec: SymmetrySpec) -> SymmetrySpec:
    """Return a spec with other names for its groups, which stand, like its axes, in another order."""
    draws = random.Random(0)
    numbers = list(range(len(spec.groups)))
    draws.shuffle(numbers)
    names = {group.id: f"group {number}" for group, number in zip(spec.groups, numbers, strict=True)}

    def layout(old: Layout) -> Layout:
        return tuple(
            tuple(
                Factor(
                    f.size, None if f.group is None else names[f.group], None if f.parts is None else layout(f.parts)
                )
                for f in segment
            )
            for segment in old
        )

    groups = [
        replace(group, id=names[group.id], parents=tuple(names[parent] for parent in group.parents), points=())
        for group in spec.groups
    ]
    axes = [AxisRef(axis.tensor, axis.dim, layout(axis.layout)) for axis in spec.axes]
    draws.shuffle(groups)
    draws.shuffle(axes)
    return replace(spec, groups=tuple(groups), axes=tuple(axes), arch_hash="", warnings=(), frozen=())


def test_what_is_hashed() -> None:
    """Peers of all versions must come to one hash: it is that of this text."""
    text = "\n".join(
        [
            "'one.bias' 0 g0",
            "'one.weight' 0 g0",
            "'three.weight' 1 g1",
            "'two.bias' 0 g1",
            "'two.weight' 0 g1",
            "'two.weight' 1 g0",
            "0: 8 []",
            "1: 8 []",
        ]
    )
    assert derive_symmetry(Wired(), INPUTS).groups_hash == blake3(text.encode()).hexdigest()


def test_layouts_in_words() -> None:
    """Products, frozen pieces side by side, and layouts within a factor."""
    inner: Layout = ((Factor(2, "d"),), (Factor(1),), (Factor(1),))
    axis = AxisRef(
        "w", 0, ((Factor(2),), (Factor(3),), (Factor(3, "h"), Factor(4, None, inner)), (Factor(2), Factor(2)))
    )
    groups = (Group("h", 3, (("w", 0),)), Group("d", 2, (("w", 0),), ("h",)))
    text = "'w' 0 5+g0*(g1+2)+4\n0: 3 []\n1: 2 [0]"
    assert SymmetrySpec(groups, (axis,)).groups_hash == blake3(text.encode()).hexdigest()


@pytest.mark.parametrize("name", SMALL)
def test_names_and_order_have_no_part(name: str) -> None:
    spec = derived(name)
    assert renamed(spec).groups_hash == spec.groups_hash
    assert SymmetrySpec.from_json(spec.to_json()).groups_hash == spec.groups_hash


@pytest.mark.parametrize("name", SMALL)
def test_every_axis_and_group_counts(name: str) -> None:
    spec = derived(name)
    assert replace(spec, axes=spec.axes[1:]).groups_hash != spec.groups_hash
    first, *others = spec.groups
    assert replace(spec, groups=(replace(first, size=first.size + 1), *others)).groups_hash != spec.groups_hash
    nested = next((group for group in spec.groups if group.parents), None)
    if nested is not None:
        flat = tuple(replace(group, parents=()) if group is nested else group for group in spec.groups)
        assert replace(spec, groups=flat).groups_hash != spec.groups_hash


def test_networks_that_are_wired_in_other_ways() -> None:
    """All have the same tensors. A sum of two layers makes one group of theirs, a weight of its own for each unit
    leaves none; which function is applied to each unit, and how the module was traced, changes nothing."""
    plain = derive_symmetry(Wired(), INPUTS)
    joined = derive_symmetry(Wired(inside=True), INPUTS)
    numbered = derive_symmetry(Wired(lambda x: x * torch.arange(8.0)), INPUTS)
    assert [len(spec.groups) for spec in (plain, joined, numbered)] == [2, 1, 0]
    assert len({spec.groups_hash for spec in (plain, joined, numbered)}) == 3
    smooth = derive_symmetry(Wired(nn.functional.gelu), INPUTS)
    assert smooth.groups_hash == plain.groups_hash
    assert smooth.arch_hash != plain.arch_hash
    ran = derive_symmetry(Wired(follow=False), INPUTS)
    assert (plain.trace_kind, ran.trace_kind) == ("export", "make_fx")
    assert ran.groups_hash == plain.groups_hash
