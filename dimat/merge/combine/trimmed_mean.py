"""Weighted mean of each coordinate without its extremes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dimat.merge.registry import combine_registry
from dimat.merge.stages import Weights
from dimat.merge.tensors.coordinates import at_share, by_coordinate


@combine_registry.register("trimmed-mean", holds="pieces")
def trimmed_mean(
    own: Weights,
    peers: Sequence[Weights],
    weights: Sequence[float],
    *,
    share: Annotated[float, Field(ge=0, lt=0.5)] = 0.34,
) -> Weights:
    """Return the mean of each coordinate with the weight `share` cut off at both ends of its sorted values.

    θ[i] = Σ_k r_k θ_(k)[i] / (1 − 2β), β = `share`, with θ_(k)[i] sorted and r_k what of the weight w_(k) lies
    between β and 1 − β of the running sum. With n models of weight 1/n and β = b/n that is the mean without the
    b largest and b smallest values; a model that lies across a cut counts in part. β = 0 is the average, β → 1/2
    the median. All floating-point tensors of any shape, each coordinate on its own; integer and boolean ones
    are own's. `weights` (own first, sum 1): the share of the sorted axis that a model takes.
    Breakdown point: `share`. While attackers hold no more than that weight, the result lies between honest
    values; the default serves for 1 of 3, 1 of 5 and 3 of 10 alike.
    Values must be finite, which the screen sees to. Tensor by tensor, one pass.

    Paper: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018,
    arXiv 1803.01498 (there of gradients, each of weight 1/n).
    """

    def mean(values: Tensor, shares: Tensor) -> Tensor:
        kept = shares.clamp(share, 1 - share)
        kept[1:] -= kept[:-1].clone()
        kept[0] -= share
        middle = at_share(values, shares, 0.5)  # equal models: all differences from it are 0
        differences = torch.where(kept > 0, values - middle, 0.0)
        return middle + (kept * differences).sum(0) / (1 - 2 * share)

    return by_coordinate(own, peers, weights, mean)
