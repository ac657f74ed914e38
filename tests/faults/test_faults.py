"""The round machine on thousands of seeded hostile schedules (reference: the promises in `agent.protocol.round`)."""

from __future__ import annotations

import pytest

from tests.faults.hunt import explain, run_seeds

SCHEDULES = 5000
CHUNK = 100


@pytest.mark.parametrize("first", range(0, SCHEDULES, CHUNK))
def test_promises_hold(first: int) -> None:
    """Promises of the round machine, each checked by a reference of its own in `invariants` and `finals`."""
    totals, broken = run_seeds(range(first, first + CHUNK))
    assert not broken, f"{len(broken)} of {CHUNK} schedules break a promise; the first:\n{explain(broken[0])}"
    assert totals["merges"] > CHUNK, "the schedules must not be empty"
