"""TSV-M: task singular vectors, compressed and freed of interference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dimat.merge.registry import combine_registry
from dimat.merge.stages import Weights
from dimat.merge.tensors.spectral import merge_matrices, orthogonal_factor, svd


@combine_registry.register("tsv-m")
def tsv_m(
    own: Weights,
    peers: Sequence[Weights],
    weights: Sequence[float],
    *,
    base: Weights | None,
    scaling: Annotated[float, Field(ge=0)] = 1.0,
) -> Weights:
    """Return θ = θ_base + α Û Σ̂ V̂ᵀ per matrix, α = `scaling`, from every delta's strongest singular vectors.

    With n models and τ_k = θ_k − θ_base = U_k Σ_k V_kᵀ of shape (rows, columns), r = min(rows, columns): each
    keeps its ⌊r/n⌋ largest singular values (at least one). U = [U_1 … U_n] and V = [V_1 … V_n] are replaced by
    their orthogonal factors Û, V̂ (the nearest matrices with orthonormal columns); Σ̂ holds all kept values.
    Kernels are (out, in · kernel); vectors, one-row matrices and depthwise kernels are θ_base + α Σ_k w_k τ_k;
    integer and boolean tensors are own's. Computed in float64 (half types: float32), one tensor at a time.
    `weights` (own first, sum 1): τ_k counts n w_k times, so equal weights are the paper's; weight 0 takes a model
    out of n. Breakdown point: 0, it trusts every peer. A tensor that is equal in all models stays as it is.
    Raises MergeError where the base is missing or of another architecture.

    Paper: Gargiulo et al., "Task Singular Vectors: Reducing Task Interference in Model Merging", CVPR 2025,
    arXiv 2412.00081.
    """
    return merge_matrices(own, peers, weights, base, "tsv-m", scaling, _merge)


def _merge(deltas: list[Tensor]) -> Tensor:
    rank = max(1, min(deltas[0].shape) // len(deltas))
    lefts: list[Tensor] = []
    values: list[Tensor] = []
    rights: list[Tensor] = []
    for delta in deltas:
        left, value, right = svd(delta)
        lefts.append(left[:, :rank])
        values.append(value[:rank])
        rights.append(right[:rank])
    left, right = orthogonal_factor(torch.cat(lefts, 1)), orthogonal_factor(torch.cat(rights))
    return (left * torch.cat(values)) @ right
