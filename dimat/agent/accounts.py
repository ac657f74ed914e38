"""Exact accounting: with what weights a merge is made, and what it consists of."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dimat.agent.messages import Merge, MergeDone
from dimat.agent.offers import PeerPublished
from dimat.agent.plan import RoundPlan, Rules
from dimat.agent.push_sum import PushSum
from dimat.events import Contribution
from dimat.topology.mixing import renormalise


def shares(
    rules: Rules, plan: RoundPlan, push: PushSum, agent: str, number: int, usable: Mapping[str, PeerPublished]
) -> tuple[float, dict[str, float]]:
    """Return own mixing weight and that of each peer in `usable`; they sum to 1.

    As planned, what is missing goes to self; in asynchronous mode W_ij · decay^staleness, and what is taken off goes to
    self; with push-sum by the shares that travel with the snapshots.
    """
    if plan.push is not None:
        return push.mixing({peer: offer.pushed for peer, offer in usable.items()})
    mixing = renormalise(plan.mixing, usable, agent)
    if rules.mode == "sync":
        return mixing.pop(agent), mixing
    peers = {p: mixing[p] * rules.staleness_decay ** max(number - offer.round, 0) for p, offer in usable.items()}
    return 1.0 - math.fsum(peers.values()), peers


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
