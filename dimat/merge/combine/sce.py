"""SCE: select by variance, calculate coefficients, erase minority signs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dimat.merge.deltas import needs_base
from dimat.merge.fusion import (
    Coefficients,
    Density,
    Number,
    cast_of,
    copy_of,
    elected_sign,
    merge_deltas,
)
from dimat.merge.registry import combine_registry
from dimat.merge.sparsify import kept_of, ranked
from dimat.merge.stages import Weights


@combine_registry.register("sce")
def sce(
    own: Weights,
    peers: Sequence[Weights],
    mixing: Sequence[float],
    *,
    base: Weights | None = None,
    select_topk: Density = 1.0,
    scaling: Number = 1.0,
    weights: Coefficients | None = None,
) -> dict[str, Tensor]:
    """Return θ = θ_base + scaling · Σ_k η_k τ̂_k / Σ_k η_k, over those k whose sign is the elected one.

    Tensor by tensor, of n elements each. Select: τ̂ keeps the ⌊select_topk·n⌋ elements (at least one) where the
    variance over models is largest; equal variances at the threshold all stay. Calculate: η_k = w_k · mean(τ̂_k²).
    Erase: at each element the sign of Σ_k w_k τ̂_k is elected, a tie is +, and other signs are left out.

    `mixing`: own first, sum 1; equal weights give the published coefficients. Equal models merge to themselves.
    `weights`: coefficients instead of the mixing weights. Raises MergeError as task-arithmetic does.

    Paper: Wan et al., "FuseChat: Knowledge Fusion of Chat Models", 2024, arXiv 2408.07990.
    """
    base = needs_base(base, "sce")
    cast = cast_of(own, peers, mixing, weights)
    if cast is None:
        return copy_of(own)

    def merge(_: str, deltas: list[Tensor]) -> Tensor:
        kept = kept_of(select_topk, deltas[0].numel())
        if kept < deltas[0].numel() and len(deltas) > 1:
            spread = _variance(deltas).to(torch.float32)
            selected = spread >= ranked(spread, spread.numel() - kept)
            deltas = [delta * selected for delta in deltas]
        sign = elected_sign(deltas, cast.coefficients)
        merged, share = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
        energies = [float(delta.square().mean()) for delta in deltas]
        total = sum(energies) or 1.0
        for delta, c, r, energy in zip(deltas, cast.coefficients, cast.relative, energies):
            agrees = (delta * c).mul_(sign) > 0
            merged.add_(delta * agrees, alpha=r * energy / total)
            share.add_(agrees, alpha=r * energy / total)
        return merged.div_(torch.where(share == 0, 1.0, share))

    return merge_deltas(cast, base, merge, scaling)


def _variance(deltas: Sequence[Tensor]) -> Tensor:
    """Variance over the models, element by element, without holding them stacked."""
    mean = torch.zeros_like(deltas[0])
    for delta in deltas:
        mean.add_(delta, alpha=1 / len(deltas))
    spread = torch.zeros_like(mean)
    for delta in deltas:
        spread.add_((delta - mean).square_(), alpha=1 / len(deltas))
    return spread
