"""Fisher-weighted average: each coordinate counts by how much its model depends on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dimat.merge.models.fisher_information import empirical_fisher
from dimat.merge.registry import combine_registry
from dimat.merge.shared_statistics import FISHER, needs_aux, statistic
from dimat.merge.stages import Weights
from dimat.merge.tensors.pieces import Pieces, real
from dimat.merge.tensors.streaming import MergedWeights
from dimat.merge.tensors.task_vectors import copy_of


@combine_registry.register("fisher", statistics=empirical_fisher, holds="pieces")
def fisher(
    own: Weights,
    peers: Sequence[Weights],
    weights: Sequence[float],
    *,
    aux: Sequence[Weights] | None,
    normalise: bool = True,
    minimal: Annotated[float, Field(ge=0)] = 1e-6,
) -> Weights:
    """Return θ[i] = Σ_k c_k (F_k[i] + m) θ_k[i] / Σ_k c_k (F_k[i] + m), m = `minimal`.

    F_k, `fisher.<tensor>` of `aux` (own first), is the diagonal of model k's Fisher information, of the tensor's shape;
    `dimat.merge.models.fisher_information.empirical_fisher` computes it. c_k = w_k, or with `normalise` w_k/‖F_k‖,
    norms over the whole model and c scaled to sum to 1, so that a model with larger gradients does not outweigh the
    rest; one whose F is zero everywhere gets the others' mean factor. `minimal` decides where no model has information:
    there the result is Σ_k c_k θ_k. (Some implementations add it after normalising: the same but where F ≲ m.) Tensors
    without a diagonal (running statistics) are averaged; integer and boolean ones are own's. `weights` (own first, sum
    1): prior weight of a model, before its information. Breakdown point: 0, and a peer also chooses its own F: between
    labs that do not trust each other take a robust method. Two passes over the diagonals, one over the weights. Raises
    MergeError where own or a peer has no diagonals.

    Paper: Matena, Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022, arXiv 2111.09832.
    """
    if not any(weights[1:]):
        return copy_of(own)
    statistics = needs_aux(aux, FISHER, "fisher", "dimat.merge.models.fisher_information.empirical_fisher")
    taking = [k for k, weight in enumerate(weights) if weight]
    scales = _scales(statistics, weights, taking) if normalise else [*weights]

    def one(name: str, start: Tensor, others: list[Tensor]) -> Tensor:
        found = statistic(statistics, FISHER + name, start.device) or []
        if start.is_complex():  # two reals each
            found = [torch.stack([f, f], -1) for f in found]
        models, count = [start, *others], len(others) + 1

        def merge(values: list[Tensor]) -> Tensor:
            anchor, moved = values[taking[0]], torch.zeros_like(values[0])
            factors: list[Tensor | float] = [*weights]
            if found:
                factors = [f.add_(minimal).mul_(scale) for scale, f in zip(scales, values[count:])]
            total = moved + factors[taking[0]]
            for k in taking[1:]:
                total += factors[k]
                moved += factors[k] * values[k].sub_(anchor)
            smallest = torch.finfo(total.dtype).tiny
            return anchor + torch.where(total > 0, moved / total.clamp_min(smallest), 0.0)

        merged = Pieces([*map(real, models), *found], real(start)).merged(merge)
        return torch.view_as_complex(merged) if start.is_complex() else merged

    return MergedWeights(own, peers, one)


def _scales(statistics: Sequence[Weights], weights: Sequence[float], taking: Sequence[int]) -> list[float]:
    """Return w_k/‖F_k‖, scaled to sum to 1: one for each model."""
    norms = [_norm(diagonals) for diagonals in statistics]
    known = [norms[k] for k in taking if norms[k] > 0]
    fill = sum(known) / len(known) if known else 1.0
    raw = [weight / (norm or fill) for weight, norm in zip(weights, norms)]
    return [scale / sum(raw) for scale in raw]


def _norm(diagonals: Weights) -> float:
    names = [name for name in diagonals if name.startswith(FISHER)]
    return (
        sum(float(torch.linalg.vector_norm(diagonals[name].cpu(), dtype=torch.float64)) ** 2 for name in names) ** 0.5
    )
