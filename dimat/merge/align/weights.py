"""Alignment by weights, without data: units with similar weights are the same unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from dimat.merge.matching.coordinate_descent import fill_in
from dimat.merge.registry import align_registry
from dimat.merge.stages import Aligned, StageTimer, Weights
from dimat.symmetry.spec import SymmetrySpec

RESTARTS = 4
"""Random orders that are tried beside the first descent, by default."""


@align_registry.register("weights")
def weights(
    own: Weights,
    peers: Sequence[Weights],
    *,
    spec: SymmetrySpec,
    model: nn.Module | None = None,
    generator: torch.Generator | None = None,
    restarts: Annotated[int, Field(ge=0)] = RESTARTS,
    buffers: bool = False,
) -> Aligned:
    """Return, for each peer, permutations that maximise Σ over tensors of <own, permuted peer>, to a local optimum.

    By coordinate descent: one group after the other is reassigned while the others stay, until none improves the
    sum. Groups with a permutation per head are assigned together with the heads. The first descent assigns groups one
    by one, beginning with those about which frozen axes and assigned groups say most; `restarts` more start from the
    peer's own order and visit groups in random orders, drawn from `generator` (or from a fixed seed); the best sum
    wins. Each peer is matched only to own, with the same draws, so the order of peers does not matter.

    `buffers`: also count moved buffers, which are the running statistics of normalisation layers. They are left out
    unless asked for: the paper counts parameters, and variances of a layer's inputs are of any size, so that a few of
    them could outweigh all weights.
    Raises MergeError, naming the tensor, if products of weights are not finite.

    Paper: Ainsworth, Hayase, Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries", ICLR 2023,
    arXiv 2209.04836, Algorithm 1.
    """
    clock = StageTimer()
    everything = {group.id for group in spec.groups}
    permutations = fill_in(
        own,
        peers,
        spec,
        [{} for _ in peers],
        [everything for _ in peers],
        model=model,
        generator=generator or torch.Generator().manual_seed(0),
        restarts=restarts,
        buffers=buffers,
    )
    clock.lap("matching")
    return Aligned(permutations, cpu_s=clock.seconds)
