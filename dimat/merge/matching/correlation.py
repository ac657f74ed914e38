"""Matching by activations: correlations of units on data, and their assignments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import inf
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from dimat.errors import SymmetryError, nearest
from dimat.merge.matching.activation_statistics import CrossStatistics, PositionSampler, average_correlation
from dimat.merge.matching.nested import assign_nested, nested_margin, nested_value, trees
from dimat.merge.models.batches import GeometricChecks, count, device_of, first_inputs, on_device, take
from dimat.merge.stages import Data, Inputs, Permutations, Points, StageTimer, Weights
from dimat.merge.weight_views import WeightsOn
from dimat.registry import SharedOptions
from dimat.symmetry import Observer
from dimat.symmetry.spec import Group, ObservationPoint, SymmetrySpec

PIECE = 32
"""Images per forward pass: bounds memory, and is no slower than more."""

Shown = list[dict[str, list[Tensor]]]
"""For each network, by group, a matrix (samples, units) per point; the same samples for all."""

FIRST_LOOK = 64
"""Images after which assignments are first made, to see whether they are stable."""

NEGLIGIBLE = 1e-9
"""Assignments worth less than this are worth nothing (constant units)."""


@dataclass(frozen=True)
class Sampling(SharedOptions):
    """How much of the data is used to match units."""

    max_images: Annotated[int, Field(ge=1)] | None = None
    """Images, at most; None: all."""
    positions: Annotated[int, Field(ge=1)] | None = 64
    """Positions of each image, drawn anew for each batch; None: all."""
    points_per_group: Annotated[int, Field(ge=1)] = 2
    """Points at which a group is observed, at most, where they are not pinned."""


@dataclass(frozen=True)
class UntilStable(Sampling):
    """The same, and when to stop."""

    stable_within: Annotated[float, Field(ge=0)] | None = 0.02
    """Stop once assignments are worth at most this share less than the next ones; None: never."""


UNTIL_STABLE = UntilStable()
"""The default of alignment."""


@dataclass
class Compared:
    """The result of matching by activations. By peer: permutations, margins of the groups, and `unmoved`, the share of
    the assignments' worth that units have as they stand. `unseen`: groups that cannot be observed and have no children
    that can; they have no permutation."""

    permutations: list[Permutations]
    margins: list[dict[str, float]]
    unseen: list[str]
    unmoved: list[float] = field(default_factory=list[float])
    images: int = 0
    clock: StageTimer = field(default_factory=StageTimer)

    def by_weights(self, least_margin: float = -inf) -> list[set[str]]:
        """Return, for each peer, the groups that are to be matched by weights: those that cannot be observed, and those
        that activations leave vague, with a margin below `least_margin`."""
        return [
            {*self.unseen, *(group for group, margin in margins.items() if margin < least_margin)}
            for margins in self.margins
        ]


def compare(
    own: Weights,
    peers: Sequence[Weights],
    *,
    spec: SymmetrySpec,
    data: Data,
    model: nn.Module | None,
    observer: Callable[[Inputs], Observer],
    generator: torch.Generator,
    points: Points | None,
    sampling: UntilStable,
) -> Compared:
    """Return the assignments by activations; the arguments are those of align = "activations"."""
    chosen, _ = choose_points(spec, points, sampling.points_per_group)
    pairs = GroupMatches(spec, chosen, len(peers))
    result = Compared(pairs.permutations, [{} for _ in peers], pairs.unseen)
    if not chosen:
        return result
    watch = observer(first_inputs(data))
    sampler = PositionSampler(sampling.positions, generator)
    checks = GeometricChecks(FIRST_LOOK)
    clock = result.clock
    device = device_of(model)
    networks = [WeightsOn(weights, device) for weights in (own, *peers)]
    steady = 0
    shown = activity(
        watch, networks, data, chosen, device=device, sampler=sampler, max_images=sampling.max_images, clock=clock
    )
    for examples, seen in shown:
        result.images += examples
        pairs.update(seen)
        clock.lap("statistics")
        if sampling.stable_within is not None and checks.due(result.images):
            steady = steady + 1 if pairs.match() <= sampling.stable_within else 0
            clock.lap("matching")
            if steady == 2:
                break
    result.margins, result.unmoved = pairs.settle()
    clock.lap("matching")
    return result


class GroupMatches:
    """Statistics and current assignments of every group, own against each peer."""

    def __init__(self, spec: SymmetrySpec, chosen: Mapping[str, Sequence[ObservationPoint]], peers: int) -> None:
        self.permutations: list[Permutations] = [{} for _ in range(peers)]
        self._statistics = {group: [CrossStatistics(peers) for _ in at] for group, at in chosen.items()}
        self._trees = [tree for tree in trees(spec) if not chosen.keys().isdisjoint(tree.ids())]
        seen = {
            node.group.id for tree in self._trees for node in tree.nodes() if not chosen.keys().isdisjoint(node.ids())
        }
        self.unseen = [group.id for group in spec.groups if group.id not in seen]

    def update(self, seen: Sequence[Mapping[str, Sequence[Tensor]]]) -> None:
        """Add what own (first) and the peers showed on one batch."""
        for group, points in self._statistics.items():
            for i, point in enumerate(points):
                own, *others = [tensors[group][i] for tensors in seen]
                point.update(own, others)

    def match(self) -> float:
        """Assign anew; return the largest share of value that an assignment of before falls short of the new one."""
        return max((self._assign(*each)[0] for each in self._pairs()), default=0.0)

    def settle(self) -> tuple[list[dict[str, float]], list[float]]:
        """Assign for the last time; return, by peer, the margins of the groups, and the share of the assignments' worth
        that units have as they stand."""
        found: list[dict[str, float]] = [{} for _ in self.permutations]
        worth, standing = [0.0 for _ in found], [0.0 for _ in found]
        for number, peer in self._pairs():
            _, scores = self._assign(number, peer)
            tree = self._trees[number]
            margin = nested_margin(tree, scores, self.permutations[peer])
            found[peer].update(dict.fromkeys(tree.ids(), margin))
            worth[peer] += nested_value(tree, scores, self.permutations[peer])
            standing[peer] += nested_value(tree, scores, {})
        return found, [stays / max(best, NEGLIGIBLE) for stays, best in zip(standing, worth)]

    def _pairs(self) -> Iterator[tuple[int, int]]:
        """Return the number of each tree of groups with each peer."""
        return product(range(len(self._trees)), range(len(self.permutations)))

    def _assign(self, number: int, peer: int) -> tuple[float, dict[str, Tensor]]:
        """Assign a tree's groups anew; return the share of value by which those of before fall short, and scores."""
        tree, permutations, scores = self._trees[number], self.permutations[peer], self._scores(number, peer)
        before = {g: permutations[g] for g in tree.ids() if g in permutations}
        found, value = assign_nested(tree, scores, self.unseen)
        known = nested_value(tree, scores, before) if before else float("-inf")
        permutations.update(found)
        return (value - known) / max(value, NEGLIGIBLE), scores

    def _scores(self, tree: int, peer: int) -> dict[str, Tensor]:
        groups = [group for group in self._trees[tree].ids() if group in self._statistics]
        return {group: average_correlation(self._statistics[group], peer) for group in groups}


def activity(
    watch: Observer,
    networks: Sequence[Weights],
    data: Data,
    chosen: Mapping[str, Sequence[ObservationPoint]],
    *,
    device: torch.device,
    sampler: PositionSampler,
    max_images: int | None,
    clock: StageTimer,
) -> Iterator[tuple[int, Shown]]:
    """Yield, for pieces of up to 32 examples of `data`, their number and what each network shows at the points."""
    for batch in take(data, max_images, PIECE):
        sampler.next_batch()
        seen: Shown = []
        inputs = on_device(batch, device)
        images = count(inputs)
        for weights in networks:
            outputs = watch.run(weights, inputs, chosen)
            clock.lap("forward")
            # popped, so that no more than one model's activations are held whole
            seen.append({group: [sampler(t, images) for t in outputs.pop(group)] for group in chosen})
            clock.lap("statistics")
        yield images, seen


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
