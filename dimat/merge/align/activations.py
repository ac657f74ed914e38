"""Alignment by activations: units that fire together on the same inputs are the same unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from dimat.errors import MergeError
from dimat.merge.matching.coordinate_descent import fill_in
from dimat.merge.matching.correlation import UNTIL_STABLE, UntilStable, compare
from dimat.merge.registry import align_registry
from dimat.merge.stages import Aligned, Data, Inputs, Points, Weights
from dimat.symmetry import Observer
from dimat.symmetry.spec import SymmetrySpec


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
    Raises MergeError if there are no data.

    Paper: Saadati et al., "DIMAT: Decentralized Iterative Merging-And-Training", CVPR 2024, arXiv 2404.08079;
    the matching is Li et al., "Convergent Learning", ICLR 2016, arXiv 1511.07543.
    """
    if data is None:
        raise MergeError('aligning by activations needs data: hand some in, or choose align = "weights" or "none"')
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
    if not seen.unseen:
        return Aligned(seen.permutations, seen.images, cpu_s=seen.clock.seconds)
    free = seen.by_weights()
    permutations = fill_in(own, peers, spec, seen.permutations, free, model=model, generator=generator)
    seen.clock.lap("weights")
    note = f"{len(seen.unseen)} groups cannot be observed and are matched by weights: {', '.join(seen.unseen)}"
    return Aligned(permutations, seen.images, (note,), seen.clock.seconds)
