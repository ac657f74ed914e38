"""Model Breadcrumbs: deltas without their largest and smallest elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor

from dimat.merge.deltas import needs_base
from dimat.merge.fusion import (
    SMALLEST_SHARE,
    Coefficients,
    Densities,
    Number,
    cast_of,
    copy_of,
    densities_of,
    elect,
    merge_deltas,
    weighted_sum,
)
from dimat.merge.registry import combine_registry
from dimat.merge.sparsify import kept_of, magnitudes, ranked
from dimat.merge.stages import Weights


def cut_both_ends(delta: Tensor, density: float, gamma: float) -> Tensor:
    """Return a delta with its ⌊gamma·n⌋ largest magnitudes, and of the rest all but the ⌊density·n⌋ largest,
    set to zero. Where both do not fit, fewer of the largest go; at least one element always stays."""
    elements = delta.numel()
    kept = kept_of(density, elements)
    top = min(int(gamma * elements), elements - kept)
    bottom = elements - kept - top
    if not top and not bottom:
        return delta
    size = magnitudes(delta)
    low, high = ranked(size, bottom), ranked(size, elements - top - 1)
    return delta.masked_fill((size < low) | (size > high), 0.0)


@combine_registry.register("breadcrumbs")
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
) -> dict[str, Tensor]:
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
    cast = cast_of(own, peers, mixing, weights)
    if cast is None:
        return copy_of(own)
    kept = densities_of(density, cast, weights or mixing)
    total = sum(cast.coefficients)
    if normalize and not elect_signs and abs(total) >= SMALLEST_SHARE:
        scaling /= total

    def merge(_: str, deltas: list[Tensor]) -> Tensor:
        cut = [cut_both_ends(delta, share, gamma) for delta, share in zip(deltas, kept)]
        if elect_signs:
            return elect(cut, cast.coefficients, "mean" if normalize else "sum")
        return weighted_sum(cut, cast.coefficients)

    return merge_deltas(cast, base, merge, scaling)
