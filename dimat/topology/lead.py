"""How far rounds may drift apart where agents wait for each other: how many snapshots a publisher has to keep."""

from __future__ import annotations

from dimat.topology.rounds import Schedule

LOOKED_AT = 64
"""Readers, and starting rounds of a long schedule, that are gone through; of more an even sample."""
DRAWN = 8
"""Starting rounds of a drawn schedule, which has no end, that are gone through."""


def longest_lead(schedule: Schedule, most: int) -> int:
    """Return by how many rounds an agent may be ahead of one that reads it, up to `most`, in synchronous rounds.

    A reader that has not ended round r publishes no round r + 1; whoever reads it then ends no round r + 1, and so on:
    the lead is as long as it takes until this comes round to the publisher. 1 on undirected graphs that do not change;
    on a ring with links one way n − 1.
    """
    rounds = range(1, min(schedule.period or DRAWN, LOOKED_AT) + 1)
    if schedule.period is None and len(schedule.names) > LOOKED_AT:
        return most  # drawing its rounds over and over would take longer than snapshots cost
    if schedule.period == 1 and not schedule.links(1).directed:
        return 1
    step = max(len(schedule.names) // LOOKED_AT, 1)
    longest = 1
    for first in rounds:
        sources = schedule.links(first).sources
        for reader in range(0, len(schedule.names), step):
            waiting = set(sources[reader])
            held_up = {reader}
            for lead in range(most):
                waiting -= held_up
                if not waiting:
                    break
                longest = max(longest, lead + 1)
                targets = schedule.links(first + lead + 1).targets
                held_up |= {later for agent in held_up for later in targets[agent]}
        if longest >= most:
            return most
    return longest
