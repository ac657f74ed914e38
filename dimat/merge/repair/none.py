"""No repair."""

from __future__ import annotations

from dimat.merge.registry import repair_registry
from dimat.merge.stages import Repaired, Weights


@repair_registry.register("none", idle=True)
def none(weights: Weights) -> Repaired:
    """Return the weights as they are."""
    return Repaired(dict(weights))
