"""Alignment by activations: where groups are observed."""

from __future__ import annotations

import copy

import pytest
import torch

from dimat import align_weights
from dimat.symmetry import derive_symmetry
from dimat.symmetry.spec import ObservationPoint
from tests.merge.methods import assert_same_bits
from tests.merge.networks import Vgg, randomise


@pytest.mark.parametrize("count", [1, 2])
def test_groups_are_observed_at_no_more_points_than_asked(count: int) -> None:
    """`points_per_group`: the last point after a non-linearity first, then the last before one. Naming these as
    `points` gives the same permutations."""
    images = torch.randn(96, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    model = Vgg([8, "M", 16, 12])
    spec = derive_symmetry(model, (images[:2],))
    own, peer = (randomise(copy.deepcopy(model), seed).state_dict() for seed in (0, 1))
    chosen: dict[str, list[ObservationPoint | str]] = {}
    for group in spec.groups:
        after, before = ([p for p in reversed(group.points) if p.pre_activation is side] for side in (False, True))
        order = [p for i in range(len(group.points)) for side in (after, before) for p in side[i : i + 1]]
        chosen[group.id] = [*order[:count]]
    assert any(len(group.points) > count for group in spec.groups)
    found = align_weights(model, own, peer, spec, images, points_per_group=count)
    assert_same_bits(found, align_weights(model, own, peer, spec, images, points=chosen))
