"""RegMean: the linear layers whose outputs are closest to those of all models on their own inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dimat.merge.auxiliary import GRAM, needs_aux, statistic
from dimat.merge.deltas import combine_tensors
from dimat.merge.gram import gram_of_examples
from dimat.merge.least_squares import solve_semidefinite
from dimat.merge.registry import combine_registry
from dimat.merge.stages import Weights


@combine_registry.register("regmean", statistics=gram_of_examples)
def regmean(
    own: Weights,
    peers: Sequence[Weights],
    weights: Sequence[float],
    *,
    aux: Sequence[Weights] | None,
    off_diagonal: Annotated[float, Field(ge=0, le=1)] = 0.9,
) -> dict[str, Tensor]:
    """Return Wᵀ = (Σ_k w_k G̃_k)⁻¹ Σ_k w_k G̃_k W_kᵀ for weights (out, in) of linear layers.

    G_k = X_kᵀ X_k, `gram.<tensor>` of `aux` (own first), of shape (in, in), is the Gram matrix of the layer's inputs
    on model k's data; `dimat.merge.gram.gram_matrices` computes it as a mean over samples, so that the number of
    samples does not weigh. G̃ is G with all but its diagonal scaled by `off_diagonal`. W minimises
    Σ_k w_k ‖X_k (Wᵀ − W_kᵀ)‖² (with `off_diagonal` 1); inputs that no model ever sees keep the average weight.
    Solved for the difference from the average, in float64, scaled to a unit diagonal. All other tensors (biases,
    norms, convolutions) are averaged; integer and boolean ones are own's.
    `weights` (own first, sum 1): weight of a model's errors. Breakdown point: 0, and a peer also chooses its own
    G: between labs that do not trust each other take a robust method.
    Raises MergeError where own or a peer has no Gram matrices.

    Paper: Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR 2023,
    arXiv 2212.09849.
    """
    if not any(weights[1:]):
        return combine_tensors(own, [], lambda name, start, others: start)
    statistics = needs_aux(aux, GRAM, "regmean", "dimat.merge.gram.gram_matrices")

    def merge(name: str, start: Tensor, others: list[Tensor]) -> Tensor:
        mean = start.clone()
        for other, weight in zip(others, weights[1:]):
            if weight:
                mean.add_(other - start, alpha=weight)
        wide = mean.cpu().double() if mean.device.type == "mps" else mean.double()
        grams = statistic(statistics, GRAM + name, wide) if start.ndim == 2 else None
        if grams is None:
            return mean
        left = torch.zeros_like(grams[0])
        right = torch.zeros_like(wide.mT)
        for model, gram, weight in zip([start, *others], grams, weights):
            if weight:
                gram = gram.mul(off_diagonal).fill_diagonal_(0).add_(gram.diagonal().diag())
                left.add_(gram, alpha=weight)
                right.add_(gram @ (model.to(wide) - wide).mT, alpha=weight)
        return (wide + solve_semidefinite(left, right).mT).to(mean)

    return combine_tensors(own, peers, merge)
