"""Iso-CTS: a common subspace, a subspace per task, and a flat spectrum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dimat.merge.registry import combine_registry
from dimat.merge.stages import Weights
from dimat.merge.tensors.spectral import merge_matrices, orthogonal_factor, svd


@combine_registry.register("iso-cts")
def iso_cts(
    own: Weights,
    peers: Sequence[Weights],
    weights: Sequence[float],
    *,
    base: Weights | None,
    scaling: Annotated[float, Field(ge=0)] = 1.0,
    common: Annotated[float, Field(ge=0, le=1)] = 0.8,
) -> Weights:
    """Return θ = θ_base + α σ̄ Û V̂ᵀ per matrix, α = `scaling`, from common and task-specific vectors.

    With n models, τ_k = θ_k − θ_base of shape (rows, columns) and r = min(rows, columns): the sum Σ_k n w_k τ_k
    gives its c largest singular triples; each model gives the s largest of (I − U_c U_cᵀ) n w_k τ_k, what it has
    outside the common subspace; s = round((r − ⌊r · `common`⌋)/n), at most ⌊r/n⌋, and c = r − n s. Û, V̂ are the
    orthogonal factors of all left and all right vectors side by side, σ̄ the mean of all r singular values.
    s = 0 is Iso-C. Kernels are (out, in · kernel); vectors, one-row matrices and depthwise kernels are
    θ_base + α Σ_k w_k τ_k; integer and boolean tensors are own's. Computed in float64 (half types: float32), one
    tensor at a time.
    `weights` (own first, sum 1): τ_k counts n w_k times, so equal weights are the paper's; weight 0 takes a model
    out of n. Breakdown point: 0, it trusts every peer. A tensor that is equal in all models, or of one model
    alone, stays as it is. Raises MergeError where the base is missing or of another architecture.

    Paper: Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific
    Subspaces", ICML 2025, arXiv 2502.04959.
    """

    def merge(deltas: list[Tensor]) -> Tensor:
        n, rank = len(deltas), min(deltas[0].shape)
        specific = min(rank // n, round((rank - int(rank * common)) / n))
        total = deltas[0].clone()
        for delta in deltas[1:]:
            total += delta
        shared = rank - n * specific
        left, value, right = svd(total)
        left, value, right = left[:, :shared], value[:shared], right[:shared]
        lefts, values, rights = [left], [value], [right]
        for delta in deltas if specific else []:
            u, sigma, v = svd(delta - left @ (left.mH @ delta))
            lefts.append(u[:, :specific])
            values.append(sigma[:specific])
            rights.append(v[:specific])
        turned = orthogonal_factor(torch.cat(lefts, 1)) @ orthogonal_factor(torch.cat(rights))
        return turned * torch.cat(values).mean()

    return merge_matrices(own, peers, weights, base, "iso-cts", scaling, merge)
