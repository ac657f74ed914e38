"""Robust statistics of each coordinate over models: sorted values with their weights, a block at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dimat.merge.deltas import combine_tensors
from dimat.merge.participants import taking_part
from dimat.merge.stages import Weights

BLOCK = 1 << 18
"""Coordinates that are sorted at a time, so that sorting needs no copy of whole tensors."""

Rule = Callable[[Tensor, Tensor], Tensor]
"""(values, shares), both (models, coordinates) and sorted by value -> (coordinates,). `shares` are running sums of
mixing weights: shares[i] is the weight of values 0 … i."""


def by_coordinate(own: Weights, peers: Sequence[Weights], weights: Sequence[float], rule: Rule) -> dict[str, Tensor]:
    """Return the rule's value at each coordinate, over all models whose weight is not 0.

    Complex numbers are taken as two reals each. Own weights come back where no peer takes part.
    """
    peers, weights = taking_part(peers, weights)

    def merge(name: str, start: Tensor, others: list[Tensor]) -> Tensor:
        if not others:
            return start
        real = [torch.view_as_real(t) if t.is_complex() else t for t in (start, *others)]
        flat = [t.reshape(-1) for t in real]
        merged = torch.empty_like(flat[0])
        mass = torch.tensor(weights, dtype=merged.dtype, device=merged.device)
        for first in range(0, merged.numel(), BLOCK):
            block = slice(first, first + BLOCK)
            values, order = torch.stack([t[block] for t in flat]).sort(0)
            merged[block] = rule(values, mass[order].cumsum(0))
        merged = merged.view(real[0].shape)
        return torch.view_as_complex(merged) if start.is_complex() else merged

    return combine_tensors(own, peers, merge)


def at_share(values: Tensor, shares: Tensor, share: float) -> Tensor:
    """Return the smallest value up to which the weight is at least `share`: (coordinates,)."""
    return values.gather(0, (shares < share).sum(0, keepdim=True).clamp_max(len(values) - 1))[0]
