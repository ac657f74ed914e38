"""TIES: trim, elect signs, merge what agrees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from dimat.merge.registry import combine_registry
from dimat.merge.stages import Weights
from dimat.merge.tensors.pieces import MergePieces, Pieces
from dimat.merge.tensors.sparsify import magnitudes, order_statistics, smallest_kept, trimmed
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
    read_deltas,
)


@combine_registry.register("ties", holds="pieces")
def ties(
    own: Weights,
    peers: Sequence[Weights],
    mixing: Sequence[float],
    *,
    base: Weights | None = None,
    density: Densities = 0.2,
    trim: Literal["tensor", "vector"] = "tensor",
    merge_func: Literal["mean", "sum", "max"] = "mean",
    scaling: Number = 1.0,
    weights: Coefficients | None = None,
) -> Weights:
    """Return θ = θ_base + scaling · M(τ̂), where each τ̂_k keeps its largest magnitudes and M merges agreeing signs.

    Trim: τ̂_k = τ_k where |τ_k| reaches a threshold, else 0. `trim` = "tensor": in each tensor of n elements the
    ⌊density·n⌋ largest stay, at least one (as mergekit has it); "vector": over the whole model of d elements,
    |τ| ≥ the (d − ⌊density·d⌋)-th smallest stays (as the authors' program has it; it includes the threshold
    itself). Equal magnitudes at a threshold all stay. All floating-point tensors count, running statistics too.
    Elect: γ = sign(Σ_k w_k τ̂_k), a tie is +. Merge, over the k whose τ̂_k has the sign γ, `merge_func`:
    "mean": Σ w_k τ̂_k / Σ w_k, "sum": Σ w_k τ̂_k, "max": the τ̂_k of the largest w_k |τ̂_k|.

    `mixing`: own first, sum 1; with equal weights these are the published formulas, except that the published
    sum over n models is `scaling` = n. mergekit's `normalize` is "mean" where true, "sum" where false. Equal models
    merge to themselves at density 1; below, small deltas fall back to the base. `weights`: coefficients instead of
    the mixing weights; `density` may be a list too, one for each model, own first. "vector" reads the models three
    times. Raises MergeError as task-arithmetic does.

    Paper: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023, arXiv 2306.01708.
    """
    base = needs_base(base, "ties")
    cast = participants_of(own, peers, mixing, weights)
    if cast is None:
        return copy_of(own)
    kept = densities_of(density, cast, weights or mixing)
    whole: list[float] = []
    if trim == "vector" and min(kept) < 1:
        found = order_statistics(
            lambda: (
                [magnitudes(delta) for delta in deltas] for pieces in read_deltas(cast, base) for deltas in pieces
            ),
            lambda d: [max(0, d - int(share * d) - 1) for share in kept],
        )
        whole = [values[k] if share < 1 else 0.0 for k, (values, share) in enumerate(zip(found, kept))]

    def plan(_: str, pieces: Pieces) -> MergePieces:
        thresholds = whole or smallest_kept(pieces, kept)

        def merge(deltas: list[Tensor]) -> Tensor:
            return elect([trimmed(delta, t) for delta, t in zip(deltas, thresholds)], cast.coefficients, merge_func)

        return merge

    return merge_elements(cast, base, plan, scaling)
