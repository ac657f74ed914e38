"""SCE: select by variance, calculate coefficients, erase minority signs."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor

from dimat.merge.registry import combine_registry
from dimat.merge.stages import Weights
from dimat.merge.tensors.pieces import MergePieces, Pieces
from dimat.merge.tensors.sparsify import kept_of, ranked_among
from dimat.merge.tensors.streaming import needs_base
from dimat.merge.tensors.task_vectors import (
    Coefficients,
    Density,
    Number,
    copy_of,
    elected_sign,
    merge_elements,
    participants_of,
)


@combine_registry.register("sce", holds="pieces")
def sce(
    own: Weights,
    peers: Sequence[Weights],
    mixing: Sequence[float],
    *,
    base: Weights | None = None,
    select_topk: Density = 1.0,
    scaling: Number = 1.0,
    weights: Coefficients | None = None,
) -> Weights:
    """Return θ = θ_base + scaling · Σ_k η_k τ̂_k / Σ_k η_k, over those k whose sign is the elected one.

    Tensor by tensor, of n elements each. Select: τ̂ keeps the ⌊select_topk·n⌋ elements (at least one) where the
    variance over models is largest; equal variances at the threshold all stay. Calculate: η_k = w_k · mean(τ̂_k²).
    Erase: at each element the sign of Σ_k w_k τ̂_k is elected, a tie is +, and other signs are left out.

    `mixing`: own first, sum 1; equal weights give the published coefficients. Equal models merge to themselves.
    `weights`: coefficients instead of the mixing weights. Raises MergeError as task-arithmetic does.

    Paper: Wan et al., "FuseChat: Knowledge Fusion of Chat Models", 2024, arXiv 2408.07990.
    """
    base = needs_base(base, "sce")
    cast = participants_of(own, peers, mixing, weights)
    if cast is None:
        return copy_of(own)

    def plan(_: str, pieces: Pieces) -> MergePieces:
        count, kept = pieces.elements, kept_of(select_topk, pieces.elements)
        least = -inf
        if kept < count and len(pieces) > 1:
            least = ranked_among(lambda: map(_spread, pieces), _spread(pieces.sample()), count, count - kept)

        def selected(deltas: list[Tensor]) -> list[Tensor]:
            return deltas if least == -inf else [delta * (_spread(deltas) >= least) for delta in deltas]

        energies = [0.0] * len(pieces)
        for deltas in pieces:
            for k, delta in enumerate(selected(deltas)):
                energies[k] += float(delta.square().sum())
        total = sum(energies) or 1.0

        def merge(deltas: list[Tensor]) -> Tensor:
            deltas = selected(deltas)
            sign = elected_sign(deltas, cast.coefficients)
            merged, share = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
            for delta, c, r, energy in zip(deltas, cast.coefficients, cast.relative, energies):
                agrees = (delta * c).mul_(sign) > 0
                merged.add_(delta * agrees, alpha=r * energy / total)
                share.add_(agrees, alpha=r * energy / total)
            return merged.div_(torch.where(share == 0, 1.0, share))

        return merge

    return merge_elements(cast, base, plan, scaling)


def _spread(deltas: Sequence[Tensor]) -> Tensor:
    """Variance over the models, element by element, in float32, without holding them stacked."""
    mean = torch.zeros_like(deltas[0])
    for delta in deltas:
        mean.add_(delta, alpha=1 / len(deltas))
    spread = torch.zeros_like(mean)
    for delta in deltas:
        spread.add_((delta - mean).square_(), alpha=1 / len(deltas))
    return spread.to(torch.float32)
