"""No alignment: peers are taken to be in this agent's basis."""

from __future__ import annotations

from collections.abc import Sequence

from dimat.merge.registry import align_registry
from dimat.merge.stages import Aligned, Weights


@align_registry.register("none", idle=True)
def none(own: Weights, peers: Sequence[Weights]) -> Aligned:
    """Return no permutations."""
    return Aligned([{} for _ in peers])
