"""Assignment problems: pairs a peer's units with this agent's, given a score for each pair."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def assign(scores: Tensor) -> Tensor:
    """Return the permutation p that maximises Σ_j scores[j, p[j]].

    scores: (units, units), finite; row = own unit, column = peer's unit. p: (units,) int64. If several
    permutations are best, scipy alone decides which of them is returned (the same input gives the same p).
    """
    from scipy.optimize import linear_sum_assignment  # takes 0.2 CPU-s to import

    _, columns = linear_sum_assignment(scores.numpy(force=True), maximize=True)
    return torch.from_numpy(columns).long()


def assignment_value(scores: Tensor, permutation: Tensor) -> float:
    """Return Σ_j scores[j, p[j]]."""
    return float(scores.gather(1, permutation.to(scores.device).unsqueeze(1)).sum())


def margin(scores: Tensor, permutation: Tensor) -> float:
    """Return the mean over units of the assigned score minus the best other score in the same row.

    Small or negative: many units of the peer fit one of own's about as well, and the match means little.
    A group of one unit has margin 0.
    """
    if scores.shape[0] < 2:
        return 0.0
    index = permutation.to(scores.device).unsqueeze(1)
    others = scores.scatter(1, index, -torch.inf).amax(1)
    return float((scores.gather(1, index).squeeze(1) - others).mean())


def moved_share(permutations: Mapping[str, Tensor]) -> float:
    """Return the share of units whose place changes; 0 if there are none."""
    units = sum(p.numel() for p in permutations.values())
    return sum(map(_moved, permutations.values())) / units if units else 0.0


def moved_by_group(permutations: Mapping[str, Tensor]) -> dict[str, float]:
    """Return for each group the share of units whose place changes."""
    return {group: _moved(p) / p.numel() for group, p in permutations.items() if p.numel()}


def _moved(permutation: Tensor) -> int:
    """Count units that change places; (size,), or (parents…, size) where a parent has an order of its own each."""
    return int((permutation != torch.arange(permutation.shape[-1], device=permutation.device)).sum())
