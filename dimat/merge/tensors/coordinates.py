"""Robust statistics of each coordinate over models: sorted values with their weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dimat.merge.stages import Weights
from dimat.merge.tensors.pieces import alike
from dimat.merge.tensors.streaming import combine_elements, taking_part

Rule = Callable[[Tensor, Tensor], Tensor]
"""(values, shares), both (models, coordinates) and sorted by value -> (coordinates,). `shares` are running sums of
mixing weights: shares[i] is the weight of values 0 … i."""


def by_coordinate(own: Weights, peers: Sequence[Weights], weights: Sequence[float], rule: Rule) -> Weights:
    """Return the rule's value at each coordinate, over all models whose weight is not 0.

    Complex numbers are taken as two reals each. Own weights come back where no peer takes part.
    """
    peers, weights = taking_part(peers, weights)

    def merge(values: list[Tensor]) -> Tensor:
        if len(values) == 1:
            return values[0]
        ordered, order = torch.stack(values).sort(0)
        mass = torch.tensor(weights, dtype=ordered.dtype, device=ordered.device)
        return rule(ordered, mass[order].cumsum(0))

    return combine_elements(own, peers, alike(merge))


def at_share(values: Tensor, shares: Tensor, share: float) -> Tensor:
    """Return the smallest value up to which the weight is at least `share`: (coordinates,)."""
    return values.gather(0, (shares < share).sum(0, keepdim=True).clamp_max(len(values) - 1))[0]
