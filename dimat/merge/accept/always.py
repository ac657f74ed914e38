"""Keep every merge."""

from __future__ import annotations

from dimat.merge.registry import accept_registry
from dimat.merge.stages import Accepted, Weights


@accept_registry.register("always")
def always(own: Weights, merged: Weights) -> Accepted:
    """Return the merged weights."""
    return Accepted(dict(merged), 1.0)
