"""Where groups are observed: the caller's choice, or a few points per group of the spec's."""

from __future__ import annotations

from collections.abc import Sequence

from dimat.errors import SymmetryError, nearest
from dimat.merge.stages import Points
from dimat.symmetry.spec import Group, ObservationPoint, SymmetrySpec


def choose_points(
    spec: SymmetrySpec, pinned: Points | None, per_group: int
) -> tuple[dict[str, list[ObservationPoint]], list[str]]:
    """Return observation points by group id, and the groups that have none.

    `pinned` groups are observed there and nowhere else. Raises SymmetryError for a group or node that the spec
    does not know.
    """
    pinned = pinned or {}
    known = {group.id for group in spec.groups}
    for group_id in pinned:
        if group_id not in known:
            raise SymmetryError(f"the model has no symmetry group {group_id!r}{nearest(group_id, known)}")
    chosen: dict[str, list[ObservationPoint]] = {}
    unseen: list[str] = []
    for group in spec.groups:
        if group.id in pinned:
            chosen[group.id] = [_resolve(group, point) for point in pinned[group.id]]
        elif not group.points:
            unseen.append(group.id)
        else:
            chosen[group.id] = _default(group.points, per_group)
    return chosen, unseen


def _default(points: Sequence[ObservationPoint], per_group: int) -> list[ObservationPoint]:
    """Alternate between the last points after and before the first non-linearity: they see different things
    (dead units are alive before a ReLU), and the last ones of a residual stream have seen the whole stage."""
    after = [p for p in reversed(points) if not p.pre_activation]
    before = [p for p in reversed(points) if p.pre_activation]
    order = [p for i in range(len(points)) for side in (after, before) for p in side[i : i + 1]]
    return order[:per_group]


def _resolve(group: Group, point: ObservationPoint | str) -> ObservationPoint:
    if isinstance(point, ObservationPoint):
        return point
    by_node = {p.node: p for p in group.points}
    if point not in by_node:
        raise SymmetryError(f"group {group.id!r} cannot be observed at node {point!r}{nearest(point, by_node)}")
    return by_node[point]
