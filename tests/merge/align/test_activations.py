"""Alignment by activations: where groups are observed, and whose units are left in their order."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dimat import align_weights
from dimat.merge.matching.agreement import agreements, half_way
from dimat.merge.models.batches import as_data
from dimat.symmetry import derive_symmetry, permute_weights
from dimat.symmetry.spec import ObservationPoint, SymmetrySpec
from dimat.tasks.base import Task
from dimat.tasks.digits import digits
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


def _trained(task: Task, start: Mapping[str, Tensor], examples: Tensor, seed: int) -> dict[str, Tensor]:
    """Return weights after three epochs of these examples."""
    model = task.build_model(torch.Generator().manual_seed(0))
    model.load_state_dict(start)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        for rows in examples[torch.randperm(len(examples), generator=generator)].split(64):
            batch = task.data("train").batch(rows)
            optimizer.zero_grad()
            F.cross_entropy(model(*batch.inputs), batch.targets).backward()
            optimizer.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def related() -> tuple[Task, SymmetrySpec, dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Two MLPs that learned unlike classes from one start; images to compare them on."""
    task = digits(model="mlp")
    train = task.data("train")
    images = train.batch(torch.arange(256)).inputs[0]
    model = task.build_model(torch.Generator().manual_seed(0))
    labels = torch.as_tensor(train.labels)
    own, peer = (_trained(task, model.state_dict(), (labels % 2 == k).nonzero().flatten(), k) for k in (0, 1))
    return task, derive_symmetry(model, (images[:2],)), own, peer, images


def test_fine_tunes_of_one_model_keep_their_order(
    related: tuple[Task, SymmetrySpec, dict[str, Tensor], dict[str, Tensor], Tensor],
) -> None:
    """Units that learned apart correlate best with other ones; where the average agrees no better for it, they stay.

    Reference: with None, as in the paper, some of them move, and the average is not better."""
    task, spec, own, peer, images = related
    model = task.build_model(torch.Generator().manual_seed(0))
    kept = align_weights(model, own, peer, spec, images)
    moved = align_weights(model, own, peer, spec, images, keep_order_within=None)
    assert all(torch.equal(p, torch.arange(len(p))) for p in kept.values())
    assert any(not torch.equal(p, torch.arange(len(p))) for p in moved.values())
    averages = [half_way(own, permute_weights(peer, spec, found)) for found in (kept, moved)]
    stays, goes = agreements(own, peer, averages, model=model, data=as_data(images))
    assert stays > goes - 0.01


def test_two_units_that_changed_places_are_found_among_units_in_order(
    related: tuple[Task, SymmetrySpec, dict[str, Tensor], dict[str, Tensor], Tensor],
) -> None:
    """Most units of a copy stand where they did; the two that do not are worth moving, as the outputs tell."""
    task, spec, own, _, images = related
    model = task.build_model(torch.Generator().manual_seed(0))
    planted = {group.id: torch.arange(group.size) for group in spec.groups}
    last = planted[spec.groups[-1].id]
    last[[0, 1]] = last[[1, 0]]
    found = align_weights(model, own, permute_weights(own, spec, planted), spec, images)
    assert_same_bits(found, planted)
