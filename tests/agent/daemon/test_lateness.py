"""How late peers' snapshots are, and what is said of it."""

from __future__ import annotations

from dimat.agent.daemon.lateness import Lateness


def watched(*peers: str, planned: bool = True) -> tuple[Lateness, list[str]]:
    said: list[str] = []
    return Lateness(60.0, lambda _peer, _number: planned, lambda: peers, said.append), said


def test_a_peer_that_trains_longer_than_the_deadline_allows_is_told_of_once() -> None:
    """By hand: own training took 30 s and ended at 100 s; a snapshot that comes at 195 s is 95 s late, and one and a
    half times that, rounded up, is 150."""
    lateness, said = watched("b", "c")
    lateness.trained(3, 30.0, 100.0)
    lateness.offered("c", 3, 159.0)
    lateness.offered("b", 3, 195.0)
    lateness.trained(4, 30.0, 200.0)
    lateness.offered("b", 4, 295.0)
    (message,) = said
    assert message.startswith(
        "b's snapshot of round 3 came 95 s after this agent's training, which took 30 s; schedule.round_deadline_s is "
        "60, so b is left out of its merges: set it to 150 or more for all agents"
    )


def test_a_peer_that_was_out_of_reach_or_is_not_waited_for_is_not_told_of() -> None:
    """Old snapshots that come with a new connection, of rounds that are long over, or of rounds without that peer."""
    lateness, said = watched("b")
    lateness.trained(3, 30.0, 100.0)
    lateness.offered("c", 3, 195.0)  # came up after this agent's training
    lateness.lost("b")
    lateness.offered("b", 3, 195.0)
    lateness.offered("b", 99, 195.0)
    for number in range(4, 20):
        lateness.trained(number, 1.0, 200.0)
    lateness.offered("b", 3, 500.0)
    assert not said
    lateness, said = watched("b", planned=False)
    lateness.trained(3, 30.0, 100.0)
    lateness.offered("b", 3, 195.0)
    assert not said
