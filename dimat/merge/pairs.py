"""How units of own and of peers go together on data: correlations, and the assignments that they give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dimat.merge.activity import activity
from dimat.merge.batches import device_of, first_inputs
from dimat.merge.clock import Clock
from dimat.merge.nested import assign_nested, nested_margin, nested_value, trees
from dimat.merge.points import choose_points
from dimat.merge.stages import Data, Inputs, Permutations, Points, Weights
from dimat.merge.statistics import CrossStatistics, PositionSampler, average_correlation
from dimat.merge.stopping import GeometricChecks
from dimat.merge.weights import WeightsOn
from dimat.symmetry import Observer
from dimat.symmetry.spec import ObservationPoint, SymmetrySpec

FIRST_LOOK = 64
"""Images after which assignments are first made, to see whether they are stable."""

NEGLIGIBLE = 1e-9
"""Assignments worth less than this are worth nothing (constant units)."""


@dataclass
class Compared:
    """What activations tell. By peer: permutations, and margins by the root of each tree of groups. `unseen`: groups
    that cannot be observed and have no children that can; they have no permutation."""

    permutations: list[Permutations]
    margins: list[dict[str, float]]
    unseen: list[str]
    images: int = 0
    clock: Clock = field(default_factory=Clock)


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
    max_images: int | None,
    positions: int | None,
    points_per_group: int,
    stable_within: float | None,
) -> Compared:
    """Return the assignments by activations; arguments are those of align = "activations"."""
    chosen, _ = choose_points(spec, points, points_per_group)
    pairs = Pairs(spec, chosen, len(peers))
    result = Compared(pairs.permutations, [{} for _ in peers], pairs.unseen)
    if not chosen:
        return result
    watch = observer(first_inputs(data))
    sampler = PositionSampler(positions, generator)
    checks = GeometricChecks(FIRST_LOOK)
    clock = result.clock
    device = device_of(model)
    networks = [WeightsOn(weights, device) for weights in (own, *peers)]
    steady = 0
    shown = activity(watch, networks, data, chosen, device=device, sampler=sampler, max_images=max_images, clock=clock)
    for examples, seen in shown:
        result.images += examples
        pairs.update(seen)
        clock.lap("statistics")
        if stable_within is not None and checks.due(result.images):
            steady = steady + 1 if pairs.match() <= stable_within else 0
            clock.lap("matching")
            if steady == 2:
                break
    pairs.match()
    result.margins = pairs.margins()
    clock.lap("matching")
    return result


class Pairs:
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
        worst = 0.0
        for number, tree in enumerate(self._trees):
            for peer, permutations in enumerate(self.permutations):
                scores = self._scores(number, peer)
                before = {g: permutations[g] for g in tree.ids() if g in permutations}
                found, value = assign_nested(tree, scores, self.unseen)
                known = nested_value(tree, scores, before) if before else float("-inf")
                permutations.update(found)
                worst = max(worst, (value - known) / max(value, NEGLIGIBLE))
        return worst

    def margins(self) -> list[dict[str, float]]:
        """Return, by peer, the margin of the assignments of each tree, by its root."""
        return [
            {
                tree.group.id: nested_margin(tree, self._scores(number, peer), permutations)
                for number, tree in enumerate(self._trees)
            }
            for peer, permutations in enumerate(self.permutations)
        ]

    def _scores(self, tree: int, peer: int) -> dict[str, Tensor]:
        groups = [group for group in self._trees[tree].ids() if group in self._statistics]
        return {group: average_correlation(self._statistics[group], peer) for group in groups}
