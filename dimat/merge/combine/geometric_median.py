"""Geometric median of whole models (RFA)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field

from dimat.merge.combine.average import average
from dimat.merge.registry import combine_registry
from dimat.merge.stages import Weights
from dimat.merge.tensors.distances import distances_from, inner_products
from dimat.merge.tensors.streaming import taking_part

SETTLED = 1e-12
"""The search ends where no coefficient moves by more than this."""


@combine_registry.register("geometric-median", holds="pieces")
def geometric_median(
    own: Weights,
    peers: Sequence[Weights],
    weights: Sequence[float],
    *,
    smoothing: Annotated[float, Field(gt=0)] = 1e-6,
    iterations: Annotated[int, Field(ge=1)] = 1000,
) -> Weights:
    """Return the point nearest to all models: θ = argmin_z Σ_k w_k ‖z − θ_k‖, norms over the whole model.

    Smoothed Weiszfeld: from the average, z ← Σ_k β_k θ_k / Σ_k β_k with β_k = w_k / max(ν, ‖z − θ_k‖), until it
    settles or after `iterations` steps (the paper takes 3 to 5). ν = `smoothing` is a length in weight space.
    z stays a mix Σ_k c_k θ_k, so the steps are taken on coefficients c of shape (models,) with the inner products
    of the models' differences, and models of any shape are read twice, tensor by tensor. Norms are over all
    floating-point tensors, running statistics too; integer and boolean ones are own's.
    `weights` (own first, sum 1): how strongly a model pulls, however far away it is.
    Breakdown point: 1/2 of the weight. With attackers of weight q < 1/2 the error is at most
    2 (1 − q)/(1 − 2q) times the honest models' largest distance from their centre.
    Raises MergeError for values that are not finite.

    Paper: Pillutla, Kakade, Harchaoui, "Robust Aggregation for Federated Learning", IEEE TSP 2022,
    arXiv 1912.13445.
    """
    peers, weights = taking_part(peers, weights)
    products = inner_products(own, peers)
    votes = torch.tensor(weights, dtype=torch.float64)
    mix = votes / votes.sum()
    for _ in range(iterations):
        before = mix
        pull = votes / distances_from(mix, products).clamp_min_(smoothing)
        mix = pull / pull.sum()
        if float((mix - before).abs().max()) <= SETTLED:
            break
    return average(own, peers, mix.tolist())
