"""Groups of experts that are chosen by number: they move with the rows of the router.

The order of scores decides which tokens an expert receives, and no rule for a single operation can show that the
resulting numbers follow the rows from which the scores come. So the group is guessed, from names and sizes, and then
tested: it is kept only if the network computes the same with its experts in another order, for several draws of its
weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from math import prod
from typing import Any

import torch
from torch import nn

from dimat.symmetry.atoms import SINGLE
from dimat.symmetry.coverage import by_nature
from dimat.symmetry.spec import AxisRef, Factor, Group, SymmetrySpec
from dimat.symmetry.verify import holds, without_groups

_DRAWS = 3
"""Number of draws of a network's weights for which experts must be exchangeable; each routes tokens differently."""

_MOST_UNITS = 8192
"""Largest number of units of all experts together for which they are exchanged: matching compares each pair of
units."""


def with_experts(
    model: nn.Module, spec: SymmetrySpec, example_inputs: Any, shapes: Mapping[str, tuple[int, ...]]
) -> SymmetrySpec:
    """Return the spec with those of its `numbered` axes as groups that are proven to be exchangeable experts.

    `shapes`: of all parameters and buffers. The spec itself is returned if there are none.
    """
    supposed = [group.id for group in spec.numbered if _router(spec, group, shapes)]
    proven = _proven(model, spec, example_inputs, shapes, supposed)
    return _moving(spec, proven, shapes) if proven else spec


def _proven(
    model: nn.Module, spec: SymmetrySpec, inputs: Any, shapes: Mapping[str, tuple[int, ...]], supposed: Sequence[str]
) -> list[str]:
    """Return those of these axes that may move: all, or recursively those of each half."""
    if not supposed:
        return []
    moving = _moving(spec, supposed, shapes)
    if exchangeable(model, moving, inputs, supposed):
        return list(supposed)
    if len(supposed) == 1:
        return []
    half = len(supposed) // 2
    halves = (supposed[:half], supposed[half:])
    return [group for part in halves for group in _proven(model, spec, inputs, shapes, part)]


def exchangeable(model: nn.Module, spec: SymmetrySpec, inputs: Any, groups: Sequence[str]) -> bool:
    """Tell whether a network computes the same with the units of these groups, and those inside, in another order."""
    wanted = {group.id for group in spec.groups if {group.id, *group.parents} & {*groups}}
    alone = without_groups(spec, {group.id for group in spec.groups} - wanted, "")
    return all(holds(model, alone, inputs, torch.Generator().manual_seed(draw)) for draw in range(_DRAWS))


def _moving(spec: SymmetrySpec, moved: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> SymmetrySpec:
    """Return the spec with some of its numbered axes as groups."""
    axes = {(axis.tensor, axis.dim): axis for axis in spec.axes}
    groups: list[Group] = []
    for group in spec.numbered:
        if group.id in moved:
            places = (*group.axes, *_router(spec, group, shapes))
            groups.append(replace(group, axes=places))
            whole = ((Factor(group.size, group.id),),)
            axes = {(name, dim): AxisRef(name, dim, whole) for name, dim in places} | axes
    return replace(
        spec,
        groups=(*spec.groups, *groups),
        axes=tuple(axes[place] for place in sorted(axes)),
        numbered=tuple(group for group in spec.numbered if group.id not in moved),
        frozen=tuple(f for f in spec.frozen if not any((f.tensor, f.dim) in group.axes for group in groups)),
    )


def _router(spec: SymmetrySpec, group: Group, shapes: Mapping[str, tuple[int, ...]]) -> tuple[tuple[str, int], ...]:
    """Return the axes that choose among the numbers of a group: frozen ones of its size, in the nearest module around
    it that has any. None if the group has too many units inside to be compared."""
    inside = [other.size for other in spec.groups if group.id in other.parents]
    return router(spec, group, shapes, max(inside, default=1))


def router(
    spec: SymmetrySpec, group: Group, shapes: Mapping[str, tuple[int, ...]], inside: int, *, singly: bool = False
) -> tuple[tuple[str, int], ...]:
    """Return the axes that choose among units of a group whose axes are given, `inside` units in each (see module).

    `singly`: their indices may be taken one by one.
    """
    if group.size * inside > _MOST_UNITS:
        return ()
    held = {(axis.tensor, axis.dim) for axis in spec.axes} | {*group.axes}
    fixed = [
        (axis.tensor, axis.dim)
        for axis in spec.frozen
        if (axis.tensor, axis.dim) not in held
        and shapes.get(axis.tensor, ())[axis.dim : axis.dim + 1] == (group.size,)
        and (not by_nature(axis.reason) or (singly and axis.reason == SINGLE))
        and not axis.reason.startswith("model output")
        and prod(shapes[axis.tensor]) > 1
    ]
    paths = [name.split(".")[:-1] for name, _ in group.axes]
    home = [parts[0] for parts in takewhile(lambda parts: len({*parts}) == 1, zip(*paths))]
    for depth in range(len(home), -1, -1):
        near = tuple(dict.fromkeys(place for place in fixed if place[0].split(".")[:depth] == home[:depth]))
        if near:
            return near
    return ()
