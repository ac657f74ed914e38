"""Model stock: how far to go from the base to the average, by the angle between models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dimat.merge.registry import combine_registry
from dimat.merge.stages import Weights
from dimat.merge.tensors.pieces import MergePieces, Pieces
from dimat.merge.tensors.streaming import needs_base
from dimat.merge.tensors.task_vectors import (
    Coefficients,
    copy_of,
    merge_elements,
    participants_of,
    row_length,
    weighted_sum,
)


def ratio(cosine: Tensor, squares: float, clamp: bool) -> Tensor:
    """Return t = c / (S + (1 − S) c) for the mean cosine c and the sum S of squared weights; 0 where it has no
    finite value. `clamp` keeps it in [0, 1]."""
    below = squares + (1 - squares) * cosine
    t = torch.where(below.abs() > 1e-9, cosine / torch.where(below.abs() > 1e-9, below, 1.0), 0.0)
    return torch.where((cosine > 0), t.clamp(0, 1), 0.0) if clamp else t


@combine_registry.register("model-stock", holds="pieces")
def model_stock(
    own: Weights,
    peers: Sequence[Weights],
    mixing: Sequence[float],
    *,
    base: Weights | None = None,
    filter_wise: bool = False,
    clamp: bool = True,
    weights: Coefficients | None = None,
) -> Weights:
    """Return θ = θ_base + t · Σ_k w_k τ_k with t = N cos Ω / (1 + (N − 1) cos Ω), tensor by tensor.

    cos Ω is the mean cosine between the deltas of pairs of models, weighted with w_i w_j, and N = 1/Σ_k w_k² the number
    of models that weights count for; with equal weights both are the published ones. Orthogonal deltas (noise around a
    common centre) give t = 0, equal ones t = 1, so that equal models merge to themselves. `filter_wise`: one Ω and t
    for each index of the first axis. `clamp` keeps t in [0, 1]; published and in mergekit it is not kept there, and
    deltas that oppose each other (certain for tensors of one element and unequal signs) then give a step away from
    the average, or, at the pole cos Ω = −1/(N − 1), none.

    `mixing`: own first, sum 1; `weights`: coefficients instead of the mixing weights, only their ratios count. With one
    model t is 1. Raises MergeError as task-arithmetic does.

    Paper: Jang et al., "Model Stock: All we need is just a few fine-tuned models", ECCV 2024, arXiv 2403.19522.
    """
    base = needs_base(base, "model-stock")
    cast = participants_of(own, peers, mixing, weights)
    if cast is None:
        return copy_of(own)
    count = len(cast.coefficients)
    shares = [r / count for r in cast.relative]
    squares = sum(w * w for w in shares)

    def cosine_of(products: Tensor) -> Tensor:
        """Mean cosine between pairs of models, from inner products (models, models, rows): (rows,)."""
        norms = products.diagonal().mT.clamp_min(0).sqrt()
        total, pairs = torch.zeros_like(norms[0]), 0.0
        for j in range(count):
            for i in range(j):
                product = norms[i] * norms[j]
                total += shares[i] * shares[j] * products[i, j] / torch.where(product > 0, product, 1.0)
                pairs += shares[i] * shares[j]
        return total / pairs

    def share_of(deltas: Iterable[Sequence[Tensor]], columns: int | None) -> Tensor:
        """Return t of each row, whose inner products are summed over `deltas`."""
        return ratio(cosine_of(torch.stack([_products(part, columns) for part in deltas]).sum(0)), squares, clamp)

    def plan(name: str, pieces: Pieces) -> MergePieces:
        if count == 1:
            return lambda deltas: weighted_sum(deltas, shares)
        if not filter_wise:
            t = share_of(pieces, None)
            return lambda deltas: weighted_sum(deltas, shares) * t
        columns = row_length(own[name])
        return lambda deltas: (
            weighted_sum(deltas, shares).view(-1, columns) * share_of([deltas], columns)[:, None]
        ).flatten()

    return merge_elements(cast, base, plan, rows=filter_wise)


def _products(deltas: Sequence[Tensor], columns: int | None) -> Tensor:
    """Return inner products between models, over rows of `columns` elements or over all: (models, models, rows)."""
    rows = torch.stack([delta.view(-1, columns or delta.numel()) for delta in deltas])
    return torch.einsum("irc,jrc->ijr", rows, rows)
