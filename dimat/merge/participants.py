"""Who takes part in a merge: models of weight 0 do not, whatever they hold."""

from __future__ import annotations

from collections.abc import Sequence

from dimat.merge.stages import Weights


def taking_part(peers: Sequence[Weights], weights: Sequence[float]) -> tuple[list[Weights], list[float]]:
    """Return the peers whose weight is not 0, and the mixing weights of own (first, even if it is 0) and of them."""
    chosen = [(peer, weight) for peer, weight in zip(peers, weights[1:]) if weight]
    return [peer for peer, _ in chosen], [weights[0], *(weight for _, weight in chosen)]
