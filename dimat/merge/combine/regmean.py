"""RegMean: the linear layers whose outputs are closest to those of all models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dimat.merge.growth import segment, share_within
from dimat.merge.models.gram import gram_of_examples, pays
from dimat.merge.models.patches import solve_semidefinite
from dimat.merge.registry import combine_registry
from dimat.merge.shared_statistics import GRAM, needs_aux, statistic
from dimat.merge.stages import Weights
from dimat.merge.tensors.pieces import Pieces, accumulator
from dimat.merge.tensors.streaming import MergedWeights, taking_part
from dimat.merge.tensors.task_vectors import copy_of, mean_of


@combine_registry.register("regmean", statistics=gram_of_examples, pays=pays, then="average")
def regmean(
    own: Weights,
    peers: Sequence[Weights],
    weights: Sequence[float],
    *,
    aux: Sequence[Weights] | None,
    off_diagonal: Annotated[float, Field(ge=0, le=1)] = 0.9,
    most: Annotated[float, Field(ge=1)] = 10.0,
) -> Weights:
    """Return Wᵀ = (Σ_k w_k G̃_k)⁻¹ Σ_k w_k G̃_k W_kᵀ for weights (out, in) of linear layers.

    G_k = X_kᵀ X_k, `gram.<tensor>` of `aux` (own first), of shape (in, in), is the Gram matrix of the layer's inputs
    on model k's data; `dimat.merge.models.gram.gram_matrices` computes it as a mean over samples, so that the number of
    samples does not weigh. G̃ is G with all but its diagonal scaled by `off_diagonal`. W minimises
    Σ_k w_k ‖X_k (Wᵀ − W_kᵀ)‖² (with `off_diagonal` 1); inputs that no model ever sees keep the average weight.
    Solved for the difference from the average, in float64, scaled to a unit diagonal, and taken only as far as ‖W‖² ≤
    (2 − w_own)² Σ_k w_k ‖W_k‖² (Frobenius norms): where inputs all but depend on each other W may be out of proportion.
    On skewed digits layers grow by up to a half, and are the better for it. All other tensors (biases,
    norms, convolutions) are averaged; integer and boolean ones are own's. A Gram matrix whose trace is over
    `most` times the median of all models' is scaled to that.
    `weights` (own first, sum 1): weight of a model's errors. Breakdown point: 0, and a peer also chooses its own
    G, within `most`: between labs that do not trust each other take a robust method.
    Of several exchanges after one training the first is merged so, and the others are averages.
    Raises MergeError where own or a peer has no Gram matrices.

    Paper: Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR 2023,
    arXiv 2212.09849.
    """
    if not any(weights[1:]):
        return copy_of(own)
    statistics = needs_aux(aux, GRAM, "regmean", "dimat.merge.models.gram.gram_matrices")

    taken, shares = taking_part(peers, weights)

    def one(name: str, start: Tensor, others: list[Tensor]) -> Tensor:
        grams = statistic(statistics, GRAM + name, start.device) if start.ndim == 2 else None
        if grams is None:
            return Pieces([start, *others], start).merged(lambda values: mean_of(values, shares))
        kind = accumulator(start)
        average = mean_of([tensor.to(start.device, kind) for tensor in (start, *others)], shares)
        wide = average.cpu().double() if average.device.type == "mps" else average.double()
        left = torch.zeros_like(grams[0], dtype=wide.dtype, device=wide.device)
        right = torch.zeros_like(wide.mT)
        heard = [gram for k, gram in enumerate(grams) if not k or weights[k]]
        traces = torch.stack([gram.to(wide).trace() for gram in heard])
        counts = (most * traces.median() / traces.clamp(min=torch.finfo(traces.dtype).tiny)).clamp(max=1)
        for model, gram, count, weight in zip([start, *others], heard, counts, shares):
            if weight:
                gram = gram.to(wide).mul(off_diagonal).fill_diagonal_(0).add_(gram.to(wide).diagonal().diag())
                gram *= count
                left.add_(gram, alpha=weight)
                right.add_(gram @ (model.to(wide) - wide).mT, alpha=weight)
        squares = [weight * model.to(wide).square().sum() for model, weight in zip((start, *others), shares) if weight]
        bound = (2 - weights[0]) * float(torch.stack(squares).sum().sqrt())
        step = solve_semidefinite(left, right).mT
        return (wide + share_within(segment(wide, wide + step), bound) * step).to(start)

    return MergedWeights(own, taken, one)
