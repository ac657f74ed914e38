"""Alignment by activations: units that fire together on the same inputs are the same unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from dimat.errors import MergeError
from dimat.merge.matching.agreement import COMPARED, agreements, half_way
from dimat.merge.matching.assignment import moved_share
from dimat.merge.matching.coordinate_descent import fill_in
from dimat.merge.matching.correlation import UNTIL_STABLE, UntilStable, compare
from dimat.merge.registry import align_registry
from dimat.merge.stages import Aligned, Data, Inputs, Points, Weights
from dimat.merge.weight_views import PermutedWeights
from dimat.symmetry import Observer
from dimat.symmetry.spec import SymmetrySpec

RELATED = 0.5
"""Share of an assignment's worth that units have as they stand from which on two networks may be in one order already,
as fine-tunes of one model are. Networks that were trained apart have .1 and less, so that nothing is asked of them."""


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
    keep_order_within: Annotated[float, Field(ge=0)] | None = 0.1,
    sampling: UntilStable = UNTIL_STABLE,
) -> Aligned:
    """Return, for each peer and group, the permutation p that maximises Σ_j corr[j, p[j]].

    corr[j, i] is the correlation, over images and positions of `data`, of own unit j with the peer's unit i,
    averaged over the group's observation points: all of `points` where the group is named there, else up to
    `points_per_group` of the spec's (the last after a non-linearity first, then the last before one).
    All models see the same images; own's forward pass is shared over the peers (a star around own: no cycle
    consistency). The score of a pair of heads is that of the best assignment of the units inside. Groups that cannot
    be observed are matched by weights (as align = "weights" does) with the others fixed, and a note names them.

    `max_images`: use at most this many images (None: all). `positions`: positions per image, drawn from
    `generator` (or from a fixed seed) for each batch; None: all. `stable_within`: stop once the assignments are
    stable, that is once the score of the last check's assignments, under the newest statistics, is at most this share
    below that of the newest ones, for every group and peer, at two checks in a row, each at twice the images of the
    one before; batches must then come in random order. None: never stop early.

    `keep_order_within`: a peer whose units seem to be in own order already (a fine-tune of the same model) keeps them
    if the average with it as it is agrees about as well in function with both networks: its shortfall from 1, on up to
    256 examples (`dimat.merge.matching.agreement`), is larger by at most this share. Units of such networks that seem
    to have changed places have mostly learnt apart. None: units move as their correlations say, as in the paper.
    Raises MergeError if there are no data.

    Paper: Saadati et al., "DIMAT: Decentralized Iterative Merging-And-Training", CVPR 2024, arXiv 2404.08079;
    the matching is Li et al., "Convergent Learning", ICLR 2016, arXiv 1511.07543.
    """
    if data is None:
        raise MergeError('aligning by activations needs data: pass some, or choose align = "weights" or "none"')
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
    permutations, notes = seen.permutations, tuple[str, ...]()
    if seen.unseen:
        permutations = fill_in(own, peers, spec, permutations, seen.by_weights(), model=model, generator=generator)
        seen.clock.lap("weights")
        notes = (f"{len(seen.unseen)} groups cannot be observed and are matched by weights: {', '.join(seen.unseen)}",)
    if keep_order_within is not None and model is not None:
        for number, (peer, unmoved) in enumerate(zip(peers, seen.unmoved)):
            moved = moved_share(permutations[number])
            if moved == 0 or unmoved < RELATED:
                continue
            view = PermutedWeights(peer, spec, permutations[number])
            most = min(COMPARED, sampling.max_images or COMPARED)
            if _as_good(own, peer, view, keep_order_within, model=model, data=data, spec=spec, max_images=most):
                permutations[number] = {group: _in_order(p) for group, p in permutations[number].items()}
                notes = (*notes, f"units of a peer are left in their order, though {moved:.0%} seem to have moved")
        seen.clock.lap("agreement")
    return Aligned(permutations, seen.images, notes, seen.clock.seconds)


def _as_good(
    own: Weights,
    peer: Weights,
    permuted: Weights,
    within: float,
    *,
    model: nn.Module,
    data: Data,
    spec: SymmetrySpec,
    max_images: int,
) -> bool:
    """Whether the average with a peer as it is agrees about as well as that with its units permuted."""
    averages = [half_way(own, permuted), half_way(own, peer)]
    try:
        best, plain = agreements(
            own, peer, averages, model=model, data=data, outputs=spec.outputs, max_images=max_images
        )
    except MergeError:  # one example, and BatchNorm: correlations are all that is known
        return False
    return best > 0 and 1 - plain <= (1 - best) * (1 + within)


def _in_order(permutation: Tensor) -> Tensor:
    return torch.arange(permutation.shape[-1]).expand_as(permutation).contiguous()
