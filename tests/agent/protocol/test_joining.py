"""Joining a network that lives: with whose weights, at which round, and what if they do not come.

Reference: the promises of `dimat.agent.protocol.round` and DESIGN.md ("a joiner takes the network's round before it
founds").
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from dimat import events
from dimat.agent.protocol import messages as r
from dimat.agent.protocol.basis import BasisId
from dimat.agent.protocol.offers import ROUNDS_KEPT
from dimat.agent.protocol.plan import LAST_ROUND
from tests.agent.machines import MINE, machine, of, offer, told


def test_a_newcomer_adopts_weights_round_and_basis() -> None:
    """`join = "adopt"`: the network's round, a peer's weights, its basis and base, and the record."""
    m = machine(join="adopt", basis_gossip=True)
    assert of(m.handle(r.Started(join=True)), r.SetTimer) == [r.SetTimer(0, 10.0)]
    old = BasisId(0, "a", "0")
    assert m.handle(offer("b", 6, basis=old, base="base")) == []
    timer, fetch = m.handle(offer("c", 7, basis=old, base="base"))
    assert timer == r.SetTimer(0, 10.0), "the weights may take a deadline, not for ever"
    assert (fetch.peer, fetch.round) == ("c", 7)
    assert m.handle(r.SnapshotReady("c", 7, "c7")) == [r.AdoptWeights("c", 7, "c7", "base")]
    actions = m.handle(r.WeightsAdopted("c7"))
    (checkpoint,) = of(actions, r.CheckpointAction)
    assert checkpoint.record is not None
    assert [(p.agent, p.round, p.weight) for p in checkpoint.record.contributions] == [("c", 7, 1.0)]
    assert of(actions, r.Train) == [r.Train(8, learn=True)]
    assert (m.basis, m.base) == (old, "base")
    (publish,) = of(m.handle(r.TrainingDone(8, "own8")), r.Publish)
    assert publish.parents == checkpoint.record.contributions


def test_a_newcomer_that_aligns_founds_a_basis_too_young_to_win() -> None:
    """`join = "align"`: own weights; its basis is of the network's round, so the network never moves."""
    m = machine(join="align", basis_gossip=True)
    m.handle(r.Started(join=True))
    m.handle(offer("b", 6, basis=BasisId(0, "zzz", "0")))
    actions = m.handle(offer("c", 7))
    assert of(actions, r.Train) == [r.Train(7, learn=True)], "the lower median is round 6"
    assert m.basis == BasisId(7, "me", "0") > BasisId(0, "zzz", "0")


def test_a_newcomer_tries_the_next_peer_and_at_last_keeps_its_own() -> None:
    """Weights that cannot be used (not finite, say) are ignored, with a warning."""
    m = machine(join="adopt")
    m.handle(r.Started(join=True))
    m.handle(offer("b", 6))
    (fetch,) = of(m.handle(offer("c", 6)), r.Fetch)
    m.handle(r.SnapshotReady(fetch.peer, 6, fetch.root))
    actions = m.handle(r.WeightsAdopted(fetch.root, "not finite"))
    assert "not finite" in told(actions, events.Warned)[0].message
    (second,) = of(actions, r.Fetch)
    assert second.peer != fetch.peer
    actions = m.handle(r.FetchFailure(second.peer, 6, second.root, "gone"))
    assert told(actions, events.Joined)[0].how == "align"
    assert "own weights" in told(actions, events.Warned)[-1].message
    assert m.round == 7


def test_a_newcomer_that_stays_behind_founds_no_older_basis_than_it_has_heard() -> None:
    """One peer's word takes it to round 16 at most, which its network may have been founded after."""
    m = machine(join="align", basis_gossip=True)
    m.handle(r.Started(join=True))
    old = BasisId(80, "zzz", "0")
    m.handle(offer("b", 80, basis=old))
    m.handle(r.Deadline(0))
    assert m.round == ROUNDS_KEPT + 1
    assert m.basis == BasisId(81, "me", "0") > old


def test_a_newcomer_is_not_talked_into_a_basis_that_nobody_can_write() -> None:
    """A basis is as young as a round at most, whatever a peer claims: manifests have no room for more digits."""
    m = machine(join="align", basis_gossip=True)
    m.handle(r.Started(join=True))
    m.handle(offer("b", 5, basis=BasisId(10**16 - 1, "b", "0")))
    m.handle(r.Deadline(0))
    assert m.basis == BasisId(LAST_ROUND + 1, "me", "0")


def test_once_it_has_a_base_a_newcomer_forgets_all_that_was_offered_on_another() -> None:
    """What would be refused now is not fetched, stands in no other offer's way, and takes nobody ahead."""
    m = machine(join="adopt")
    m.handle(r.Started(join=True))
    m.handle(offer("b", 5, base="base"))
    (fetch,) = of(m.handle(offer("c", 5, base="base")), r.Fetch)
    for number in (6, 7, 8):
        m.handle(replace(offer("b", number, oldest=5, base="other"), root=f"other{number}"))
    m.handle(r.SnapshotReady(fetch.peer, 5, fetch.root))
    actions = m.handle(r.WeightsAdopted(fetch.root))
    assert m.base == "base"
    assert of(actions, r.Train) == [r.Train(6, learn=True)]
    assert of(actions, r.Fetch) == []
    assert of(m.handle(offer("b", 6, base="base")), r.Fetch) == [r.Fetch("b", 6, "b6")]


def test_a_newcomer_that_hears_nobody_founds_a_network() -> None:
    """After join_wait_s without an offer."""
    m = machine()
    m.handle(r.Started(join=True))
    actions = m.handle(r.Deadline(0))
    assert told(actions, events.Joined)[0].how == "found"
    assert m.round == 1
    assert m.basis == MINE._replace(round=1), "founders that were there from the beginning are older"


@pytest.mark.parametrize("what", [r.PeerLost("b"), r.Deadline(0)])
def test_a_newcomer_does_not_wait_for_ever_for_the_weights_it_chose(what: r.Event) -> None:
    """Their publisher is lost, or they do not come within a deadline: the next peer's will do, and then own."""
    m = machine(join="adopt")
    m.handle(r.Started(join=True))
    m.handle(offer("b", 5))
    (first,) = of(m.handle(offer("c", 5)), r.Fetch)
    assert first.peer == "b"
    actions = m.handle(what)
    assert of(actions, r.Release) == [r.Release("b", 5, "b5")]
    (second,) = of(actions, r.Fetch)
    assert second.peer == "c"
    assert of(actions, r.SetTimer) == [r.SetTimer(0, 10.0)]
    assert m.handle(r.SnapshotReady("b", 5, "b5")) == [], "what was given up is not taken over"
    actions = m.handle(r.Deadline(0))
    assert told(actions, events.Joined)[0].how == "align"


def test_weights_that_are_being_taken_over_are_not_let_go() -> None:
    """Once they are here, neither their publisher's end nor the time matters."""
    m = machine(join="adopt")
    m.handle(r.Started(join=True))
    m.handle(offer("b", 5))
    m.handle(offer("c", 5))
    m.handle(r.SnapshotReady("b", 5, "b5"))
    assert m.handle(r.PeerLost("b")) == []
    assert m.handle(r.Deadline(0)) == []
    assert told(m.handle(r.WeightsAdopted("b5")), events.Joined)[0].peer == "b"


def test_a_newcomer_keeps_the_newest_offers_however_long_it_listens() -> None:
    """More rounds go by than are kept: it takes the network's newest weights over, not none."""
    m = machine(join="adopt")
    m.handle(r.Started(join=True))
    for number in range(5, 5 + 3 * ROUNDS_KEPT):
        assert m.handle(offer("b", number, oldest=number - 1)) == []
    (fetch,) = of(m.handle(r.Deadline(0)), r.Fetch)
    assert fetch.round == 5 + 3 * ROUNDS_KEPT - 1
