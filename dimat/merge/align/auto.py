"""Alignment by activations or weights, whichever average agrees best with both networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dimat.errors import MergeError
from dimat.merge.align.weights import RESTARTS as WEIGHTS_RESTARTS
from dimat.merge.align.weights import weights
from dimat.merge.matching.agreement import COMPARED, agreements, half_way
from dimat.merge.matching.coordinate_descent import fill_in
from dimat.merge.matching.correlation import UNTIL_STABLE, UntilStable, compare
from dimat.merge.registry import align_registry
from dimat.merge.stages import Aligned, Data, Inputs, Permutations, Points, Weights
from dimat.merge.weight_views import PermutedWeights
from dimat.symmetry import Observer
from dimat.symmetry.spec import SymmetrySpec

LEAST_MARGIN = -0.04
"""Measured on nine pairs of networks (MLP, CNN, ResNet) trained apart on scikit-learn's digits, one group at a time
given to weights, on 2 to 1,400 images. Where 2 to 16 images left a margin below this, the average's accuracy rose, by
0.060 on average (27 of 33 times; it fell 3 times); at 64 images and more it stayed (12 times, 0.000 on average). Above
−0.02 weights cost accuracy at 64 images and more, and gained nothing below."""

NEGLIGIBLE = 1e-6
"""Agreement that is better by less than this is not better."""


RESTARTS = {"activations": 0, "both": 0, "weights": WEIGHTS_RESTARTS}
"""As align = "activations" and "weights" have them by default."""


@dataclass(frozen=True)
class Way:
    """One way to align a peer. `by_weights`: the groups matched by weights; None: nothing was moved."""

    name: str
    permutations: Permutations
    by_weights: frozenset[str] | None


@align_registry.register("auto")
def auto(
    own: Weights,
    peers: Sequence[Weights],
    *,
    spec: SymmetrySpec,
    data: Data | None = None,
    model: nn.Module | None = None,
    observer: Callable[[Inputs], Observer] | None = None,
    generator: torch.Generator | None = None,
    points: Points | None = None,
    least_margin: float = LEAST_MARGIN,
    sampling: UntilStable = UNTIL_STABLE,
) -> Aligned:
    """Return, for each peer, the permutations whose average with own agrees best in function with own and the peer.

    Four ways are tried: by activations; by activations where they tell units apart, the vague groups by weights; by
    weights; and no permutation at all, which is best for peers that are in own's basis already. The half-way average is
    run on up to 256 examples (with BatchNorm statistics re-estimated on them), and its outputs are compared with the
    mean of both networks' outputs: see `dimat.merge.matching.agreement`. No labels are needed. A mixture can be worse
    than either alone, in transformers by much, which no figure per group predicts; hence the networks are run.

    A group is vague if its margin is below `least_margin`: the mean over own units of their correlation with the
    assigned unit, minus that with the best other one. Heads and the units in them are matched the same way, by
    the smallest margin among them. Groups that cannot be observed are always matched by weights, with all other groups
    fixed as activations have them. Without data or model, all groups are matched by weights.

    Notes say how many groups went which way and how well each way agreed. Memory: one network for each way and two
    more. The other options are those of align = "activations".
    """
    if data is None or observer is None or model is None:
        found = weights(own, peers, spec=spec, model=model, generator=generator)
        return Aligned(found.permutations, 0, ("no data to run the model on: all groups by weights",), found.cpu_s)
    generator = generator or torch.Generator().manual_seed(0)
    seen = compare(
        own,
        peers,
        spec=spec,
        data=data,
        model=model,
        observer=observer,
        generator=generator,
        points=points,
        sampling=sampling,
    )
    mixed = seen.by_weights(least_margin)
    unseen = set(seen.unseen)
    everything = {group.id for group in spec.groups}
    ways: list[tuple[str, Sequence[Permutations], Sequence[set[str]]]] = [
        ("activations", seen.permutations, seen.by_weights()),
        ("both", [_without(p, groups) for p, groups in zip(seen.permutations, mixed)], mixed),
        ("weights", [{} for _ in peers], [everything for _ in peers]),
    ]
    state = generator.get_state()
    tried: list[list[Way]] = [[] for _ in peers]
    for name, start, free in ways:
        new = [name == "weights" or groups != everything for groups in free]
        if name == "both":
            new = [is_new and groups != unseen for is_new, groups in zip(new, free)]
        generator.set_state(state)
        doing = [groups if is_new else set[str]() for groups, is_new in zip(free, new)]
        found = fill_in(own, peers, spec, start, doing, model=model, generator=generator, restarts=RESTARTS[name])
        for listed, permutations, groups, is_new in zip(tried, found, free, new):
            if is_new:
                listed.append(Way(name, permutations, frozenset(groups)))
    seen.clock.lap("weights")
    chosen: list[Permutations] = []
    notes: list[str] = []
    for peer, listed in zip(peers, tried):
        way, agreed = _best(own, peer, [*listed, Way("none", {}, None)], spec, model, data, sampling.max_images)
        chosen.append(way.permutations)
        notes.append(f"{_split(way, everything, unseen)} ({agreed})")
    seen.clock.lap("agreement")
    return Aligned(chosen, seen.images, tuple(dict.fromkeys(notes)), seen.clock.seconds)


def _without(permutations: Permutations, groups: set[str]) -> Permutations:
    return {group: p for group, p in permutations.items() if group not in groups}


def _best(
    own: Weights,
    peer: Weights,
    ways: Sequence[Way],
    spec: SymmetrySpec,
    model: nn.Module,
    data: Data,
    max_images: int | None,
) -> tuple[Way, str]:
    """Return the way that agrees best, the first of equal ones, and how well each does, in words."""
    averages = [half_way(own, PermutedWeights(peer, spec, way.permutations)) for way in ways]
    most = min(COMPARED, max_images or COMPARED)
    try:
        found = agreements(own, peer, averages, model=model, data=data, outputs=spec.outputs, max_images=most)
    except MergeError as error:  # one example, and BatchNorm: margins are all that is known
        chosen = next((way for way in ways if way.name == "both"), ways[0])
        return chosen, f"not compared: {error}"
    best = 0
    for number, share in enumerate(found):
        if share > found[best] + NEGLIGIBLE:
            best = number
    return ways[best], "agreement: " + ", ".join(f"{way.name} {share:.3f}" for way, share in zip(ways, found))


def _split(way: Way, groups: set[str], unseen: set[str]) -> str:
    """Say how many groups went which way, and which by weights where only some did."""
    if way.by_weights is None:
        return f"{len(groups)} groups left as they are"
    count = len(way.by_weights)
    split = f"{len(groups) - count} groups aligned by activations, {count} by weights"
    if count in (0, len(groups)):
        return split
    blind, names = len(unseen & way.by_weights), ", ".join(sorted(way.by_weights))
    return f"{split}: {blind} cannot be observed, {count - blind} have too small a margin: {names}"
