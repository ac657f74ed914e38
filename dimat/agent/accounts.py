"""Exact accounting: what a merge consists of."""

from __future__ import annotations

import math

from dimat.agent.messages import Merge, MergeDone
from dimat.events import Contribution


def contributions(agent: str, root: str, merge: Merge, done: MergeDone) -> tuple[Contribution, ...]:
    """Return what a merge consists of, self first; what refused peers and an accept rule left out belongs to self."""
    kept = [(part, part.weight * done.accepted) for part in merge.parts if part.peer not in done.refused]
    own = 1.0 - math.fsum(weight for _, weight in kept)
    return (
        Contribution(agent=agent, snapshot=root, round=merge.round, weight=own, verdict="own"),
        *(
            Contribution(
                agent=part.peer,
                snapshot=part.root,
                round=part.round,
                weight=weight,
                verdict="same basis" if part.same_basis else "other basis",
            )
            for part, weight in kept
            if weight > 0
        ),
    )
