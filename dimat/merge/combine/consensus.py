"""Consensus merging: changes only parameters that several tasks need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dimat.merge.registry import combine_registry
from dimat.merge.stages import Weights
from dimat.merge.tensors.pieces import alike
from dimat.merge.tensors.streaming import needs_base
from dimat.merge.tensors.task_vectors import (
    Coefficients,
    Number,
    copy_of,
    merge_elements,
    participants_of,
    weighted_sum,
)


def tall_masks(deltas: Sequence[Tensor], relative: Sequence[float], tall_lambda: float) -> list[Tensor]:
    """Return the masks m_k = |τ_k| ≥ λ |Σ_j r_j τ_j − τ_k|: where the sum of all is near enough to task k."""
    total = weighted_sum(deltas, relative)
    return [delta.abs() >= tall_lambda * (total - delta).abs() for delta in deltas]


@combine_registry.register("consensus", holds="pieces")
def consensus(
    own: Weights,
    peers: Sequence[Weights],
    mixing: Sequence[float],
    *,
    base: Weights | None = None,
    tall_lambda: Annotated[float, Field(ge=0)] = 0.4,
    k: Annotated[int, Field(ge=0)] = 2,
    scaling: Number = 1.0,
    weights: Coefficients | None = None,
) -> Weights:
    """Return θ = θ_base + scaling · [Σ_t m_t ≥ k] · Σ_t w_t τ_t, element by element.

    TALL masks: m_t = |τ_t| ≥ tall_lambda · |Σ_s r_s τ_s − τ_t| with r_s = n·w_s, so that with equal weights the sum
    is the plain one, as in the authors' program (before any scaling). k = 0 is task arithmetic, k = 1 leaves out
    what no task needs, k = 2 (the paper's) also what only one does. A k beyond the number n of models that take
    part counts as n.

    `mixing`: own first, sum 1; the published scaling λ over n models is `scaling` = λ·n with equal weights.
    Equal models merge to themselves while tall_lambda · (n − 1) ≤ 1 (n ≤ 3 at the default); beyond, the
    published mask finds n equal deltas too far from their sum, and the base is returned.
    `weights`: coefficients instead of the mixing weights; masks use only their ratios. Raises MergeError as
    task-arithmetic does.

    Paper: Wang et al., "Localizing Task Information for Improved Model Merging and Compression", ICML 2024,
    arXiv 2405.07813.
    """
    base = needs_base(base, "consensus")
    cast = participants_of(own, peers, mixing, weights)
    if cast is None:
        return copy_of(own)
    needed = min(k, len(cast.coefficients))

    def merge(deltas: list[Tensor]) -> Tensor:
        total = weighted_sum(deltas, cast.coefficients)
        if not needed:
            return total
        count = torch.zeros_like(total, dtype=torch.int32)
        for mask in tall_masks(deltas, cast.relative, tall_lambda):
            count += mask
        return total * (count >= needed)

    return merge_elements(cast, base, alike(merge), scaling)
