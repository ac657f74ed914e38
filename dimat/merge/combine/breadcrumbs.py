"""Model Breadcrumbs: deltas without their largest and smallest elements."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Annotated

from pydantic import Field
from torch import Tensor

from dimat.merge.registry import combine_registry
from dimat.merge.stages import Weights
from dimat.merge.tensors.pieces import MergePieces, Pieces
from dimat.merge.tensors.sparsify import kept_of, magnitude_ranks, trimmed
from dimat.merge.tensors.streaming import needs_base
from dimat.merge.tensors.task_vectors import (
    Coefficients,
    Densities,
    Number,
    copy_of,
    densities_of,
    elect,
    merge_elements,
    participants_of,
    weighted_sum,
)


def ends(pieces: Pieces, densities: Sequence[float], gamma: float) -> list[tuple[float, float]]:
    """Return for each model the smallest and the largest magnitude that stay: the ⌊gamma·n⌋ largest go, and of the
    rest all but the ⌊density·n⌋ largest. Where both do not fit, fewer of the largest go; at least one element stays."""
    elements = pieces.elements
    kept = [kept_of(density, elements) for density in densities]
    top = [min(int(gamma * elements), elements - k) for k in kept]
    low = magnitude_ranks(pieces, [elements - k - t or None for k, t in zip(kept, top)])
    high = magnitude_ranks(pieces, [elements - t - 1 if t else None for t in top])
    return [(0.0 if x is None else x, inf if y is None else y) for x, y in zip(low, high)]


@combine_registry.register("breadcrumbs", holds="pieces")
def breadcrumbs(
    own: Weights,
    peers: Sequence[Weights],
    mixing: Sequence[float],
    *,
    base: Weights | None = None,
    density: Densities = 0.9,
    gamma: Annotated[float, Field(ge=0, lt=1)] = 0.01,
    elect_signs: bool = False,
    scaling: Number = 1.0,
    normalize: bool = False,
    weights: Coefficients | None = None,
) -> Weights:
    """Return θ = θ_base + scaling · Σ_k w_k m_k τ_k, where m_k leaves out outliers and small changes, tensor by tensor.

    In a tensor of n elements the ⌊gamma·n⌋ largest magnitudes go, then the smallest until ⌊density·n⌋ are left (at
    least one, so small tensors are not lost, and ⌊gamma·n⌋ = 0 cuts nothing off the top). The paper's β is
    1 − density − gamma. Equal magnitudes at a threshold all stay.

    `mixing`: own first, sum 1; the paper's α Σ_k over n models is `scaling` = α·n with equal weights. Equal models
    merge to themselves at density 1. `elect_signs`: merge only the signs that TIES elects; `normalize`: divide by
    the weights of those that are added; `weights`: coefficients instead of the mixing weights; `density` may be a
    list too, one for each model, own first. Raises MergeError as task-arithmetic does.

    Paper: Davari and Belilovsky, "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks", ECCV 2024,
    arXiv 2312.06795.
    """
    base = needs_base(base, "breadcrumbs")
    cast = participants_of(own, peers, mixing, weights)
    if cast is None:
        return copy_of(own)
    kept = densities_of(density, cast, weights or mixing)
    if normalize and not elect_signs:
        scaling = cast.normalised(scaling)

    def plan(_: str, pieces: Pieces) -> MergePieces:
        bounds = ends(pieces, kept, gamma)

        def merge(deltas: list[Tensor]) -> Tensor:
            cut = [trimmed(delta, *ends) for delta, ends in zip(deltas, bounds)]
            if elect_signs:
                return elect(cut, cast.coefficients, "mean" if normalize else "sum")
            return weighted_sum(cut, cast.coefficients)

        return merge

    return merge_elements(cast, base, plan, scaling)
