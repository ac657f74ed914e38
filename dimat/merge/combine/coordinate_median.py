"""Weighted median of each coordinate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dimat.merge.registry import combine_registry
from dimat.merge.stages import Weights
from dimat.merge.tensors.coordinates import at_share, by_coordinate

TIE = 1e-6
"""Sums of mixing weights this close to one half count as one half, whatever rounding made of them."""


@combine_registry.register("coordinate-median", holds="pieces")
def coordinate_median(own: Weights, peers: Sequence[Weights], weights: Sequence[float]) -> Weights:
    """Return the weighted median of each coordinate: θ[i] = argmin_x Σ_k w_k |x − θ_k[i]|.

    The smallest value at which the weight of values up to it passes 1/2; where it is 1/2 exactly, the middle
    between that value and the next (as in the median of an even number). All floating-point tensors of any
    shape, each coordinate on its own; integer and boolean ones are own's.
    `weights` (own first, sum 1) are votes: a model of weight w counts as the share w of all models.
    Breakdown point: 1/2. While attackers hold less than half of the weight, each coordinate lies between honest
    values; it is biased by up to about half a standard deviation where they crowd one side of the median (ALIE).
    Values must be finite, which the screen sees to. Tensor by tensor, one pass.

    Paper: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018,
    arXiv 1803.01498 (there of gradients, each of weight 1/n).
    """
    return by_coordinate(own, peers, weights, _median)


def _median(values: Tensor, shares: Tensor) -> Tensor:
    lower, upper = at_share(values, shares, 0.5 - TIE), at_share(values, shares, 0.5 + TIE)
    return torch.where(lower == upper, lower, lower + (upper - lower) / 2)
