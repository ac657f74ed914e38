"""Iso-C: the sum of deltas with a flat spectrum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor

from dimat.merge.registry import combine_registry
from dimat.merge.stages import Weights
from dimat.merge.tensors.spectral import merge_matrices, svd


@combine_registry.register("iso-c")
def iso_c(
    own: Weights,
    peers: Sequence[Weights],
    weights: Sequence[float],
    *,
    base: Weights | None,
    scaling: Annotated[float, Field(ge=0)] = 1.0,
) -> Weights:
    """Return θ = θ_base + α σ̄ U Vᵀ per matrix, where U Σ Vᵀ = Σ_k n w_k τ_k and σ̄ is the mean singular value.

    α = `scaling`, τ_k = θ_k − θ_base of shape (rows, columns), n models; σ̄ is over all min(rows, columns) values,
    and directions in which the sum is zero stay zero. Kernels are (out, in · kernel); vectors, one-row matrices and
    depthwise kernels are θ_base + α Σ_k w_k τ_k (mean, not sum); integer and boolean tensors are own's. Computed in
    float64 (half types: float32), one tensor at a time.
    `weights` (own first, sum 1): τ_k counts n w_k times, so equal weights are the paper's sum; weight 0 takes a
    model out of n. Breakdown point: 0, it trusts every peer. A tensor that is equal in all models, or of one
    model alone, stays as it is: a flat spectrum is the cure for a merge, and there is none.
    Raises MergeError where the base is missing or of another architecture.

    Paper: Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific
    Subspaces", ICML 2025, arXiv 2502.04959.
    """
    return merge_matrices(own, peers, weights, base, "iso-c", scaling, _merge)


def _merge(deltas: list[Tensor]) -> Tensor:
    total = deltas[0].clone()
    for delta in deltas[1:]:
        total += delta
    left, values, right = svd(total)
    return (left @ right) * values.mean()
