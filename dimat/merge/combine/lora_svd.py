"""LoRA adapters averaged as products, and compressed to a rank by SVD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field

from dimat.merge.lora.factors import Factors, compressed, concatenated, merge_products, merged_rank, nothing_to_merge
from dimat.merge.registry import combine_registry
from dimat.merge.stages import Weights
from dimat.merge.tensors.task_vectors import Number


@combine_registry.register("lora-svd", lora_products=True)
def lora_svd(
    own: Weights,
    peers: Sequence[Weights],
    weights: Sequence[float],
    *,
    rank: Annotated[int, Field(ge=1)] | None = None,
    scaling: Number = 1.0,
) -> Weights:
    """Return the LoRA factors of own's rank whose product is closest to ΔW = α Σ_k w_k B_k A_k in Frobenius norm.

    With U σ Vᵀ the first r terms of ΔW's SVD, B = U √σ (out, r) and A = √σ Vᵀ (r, in). The SVD is that of a matrix of
    Σ_k r_k rows, found by QR of the factors side by side; ΔW itself (out, in) is never formed. Whatever basis a
    model's factors are written in, (B R, R⁻¹ A), the product is the same. The merged factors have a basis of their
    own, so an optimizer's moments of the old ones say nothing about them.

    `weights` (own first, sum 1) multiply each model's ΔW = s·B·A; a model of weight 0 takes no part; α = `scaling`.
    Where all models' factors are equal, and where one model is alone, they are the result as they are. Where nothing
    is left (ΔW = 0), own's A stays, with B = 0, so that training can go on. Tensors that are no LoRA factors are
    averaged. `rank`: another rank, at most Σ_k r_k; it changes shapes, which only adapters on disk can (`dimat merge`).
    See `dimat.merge.lora.factors` for names, shapes and scales. Raises MergeError as "lora-concat" does.

    Eckart and Young, "The approximation of one matrix by another of lower rank", Psychometrika 1936.
    """

    def merge(mine: Factors, parts: list[Factors], mixing: list[float]) -> Factors:
        size = merged_rank(rank, mine.rank, [part.rank for part in parts])
        if nothing_to_merge(parts, size, scaling):
            return parts[0]
        if len(parts) > 1:
            mixing = [scaling * weight for weight in mixing]
        merged = compressed(concatenated(parts, mixing), size)
        return merged if merged.b.any() or size != mine.rank else Factors(mine.a, torch.zeros_like(mine.b))

    return merge_products(own, peers, weights, merge)
