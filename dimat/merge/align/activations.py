"""Alignment by activations: units that fire together on the same inputs are taken to be the same unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from dimat.errors import MergeError
from dimat.merge.activity import activity
from dimat.merge.batches import device_of, first_inputs
from dimat.merge.clock import Clock
from dimat.merge.matching import assign, assignment_value
from dimat.merge.points import choose_points
from dimat.merge.registry import align_registry
from dimat.merge.stages import Aligned, Data, Inputs, Permutations, Points, Weights
from dimat.merge.statistics import CrossStatistics, PositionSampler, average_correlation
from dimat.merge.stopping import GeometricChecks
from dimat.merge.weights import WeightsOn
from dimat.symmetry import Observer
from dimat.symmetry.spec import ObservationPoint, SymmetrySpec

FIRST_LOOK = 64
"""Images after which assignments are first made, to see whether they are stable."""

NEGLIGIBLE = 1e-9
"""Assignments worth less than this are worth nothing (constant units)."""


@align_registry.register("activations")
def activations(
    own: Weights,
    peers: Sequence[Weights],
    *,
    spec: SymmetrySpec,
    data: Data | None,
    model: nn.Module | None,
    observer: Callable[[Inputs], Observer],
    generator: torch.Generator | None = None,
    points: Points | None = None,
    max_images: Annotated[int, Field(ge=1)] | None = None,
    positions: Annotated[int, Field(ge=1)] | None = 64,
    points_per_group: Annotated[int, Field(ge=1)] = 2,
    stable_within: Annotated[float, Field(ge=0)] | None = 0.02,
) -> Aligned:
    """Return, for each peer and group, the permutation p that maximises Σ_j corr[j, p[j]].

    corr[j, i] is the correlation, over images and positions of `data`, of own unit j with the peer's unit i,
    averaged over the group's observation points: all of `points` where the group is named there, else up to
    `points_per_group` of the spec's (the last after a non-linearity first, then the last before one).
    All models see the same images; own's forward pass is shared over the peers (a star around own: no cycle
    consistency). Groups that cannot be observed stay as they are, with a note.

    `max_images`: look at no more images than this (None: all). `positions`: positions per image, drawn from
    `generator` (or from a fixed seed) anew for each batch; None: all. `stable_within`: stop once the assignments are
    stable, that is once those of the last look are worth, under the newest statistics, at most this share less
    than the newest ones, for every group and peer, at two looks in a row, each at twice the images of the one
    before; batches must then come in random order. None: never stop early.
    Raises MergeError where there are no data.

    Paper: Saadati et al., "DIMAT: Decentralized Iterative Merging-And-Training", CVPR 2024, arXiv 2404.08079;
    the matching is Li et al., "Convergent Learning", ICLR 2016, arXiv 1511.07543.
    """
    if data is None:
        raise MergeError('aligning by activations needs data: hand some in, or choose align = "none"')
    chosen, notes = choose_points(spec, points, points_per_group)
    if not chosen:
        return Aligned([{} for _ in peers], 0, notes)
    watch = observer(first_inputs(data))
    pairs = _Pairs(chosen, len(peers))
    sampler = PositionSampler(positions, generator or torch.Generator().manual_seed(0))
    checks = GeometricChecks(FIRST_LOOK)
    clock = Clock()
    device = device_of(model)
    networks = [WeightsOn(weights, device) for weights in (own, *peers)]
    images = steady = 0
    shown = activity(watch, networks, data, chosen, device=device, sampler=sampler, max_images=max_images, clock=clock)
    for examples, seen in shown:
        images += examples
        pairs.update(seen)
        clock.lap("statistics")
        if stable_within is not None and checks.due(images):
            steady = steady + 1 if pairs.match() <= stable_within else 0
            clock.lap("matching")
            if steady == 2:
                break
    pairs.match()
    clock.lap("matching")
    return Aligned(pairs.permutations, images, notes, clock.seconds)


class _Pairs:
    """Statistics and current assignments of every group, own against each peer."""

    def __init__(self, chosen: Mapping[str, Sequence[ObservationPoint]], peers: int) -> None:
        self.permutations: list[Permutations] = [{} for _ in range(peers)]
        self._statistics = {group: [CrossStatistics(peers) for _ in at] for group, at in chosen.items()}

    def update(self, seen: Sequence[Mapping[str, Sequence[Tensor]]]) -> None:
        """Add what own (first) and the peers showed on one batch."""
        for group, points in self._statistics.items():
            for i, point in enumerate(points):
                own, *others = [tensors[group][i] for tensors in seen]
                point.update(own, others)

    def match(self) -> float:
        """Assign anew; return the largest share of value that an assignment of before falls short of the new one."""
        worst = 0.0
        for group, points in self._statistics.items():
            for peer, permutations in enumerate(self.permutations):
                scores = average_correlation(points, peer)
                before, permutations[group] = permutations.get(group), assign(scores)
                value = assignment_value(scores, permutations[group])
                known = float("-inf") if before is None else assignment_value(scores, before)
                worst = max(worst, (value - known) / max(value, NEGLIGIBLE))
        return worst
