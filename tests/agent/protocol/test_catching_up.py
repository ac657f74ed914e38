"""Rounds that drift apart: who follows whom, how far, and what a liar can do.

Reference: the promises of `dimat.agent.protocol.round`; docs/what-happens-when.md.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from dimat import events
from dimat.agent.protocol import messages as r
from dimat.agent.protocol.offers import FAR_KEPT, PATIENCE, ROUNDS_KEPT, Known, Offers
from dimat.agent.protocol.plan import LAST_ROUND, Plan, PushShares, RoundPlan
from dimat.agent.protocol.round import Phase
from tests.agent.machines import go_to, have, machine, of, offer, told


def own_round(m, ahead: dict[str, int]) -> list[r.Action]:
    """Go through a round in which peers offer rounds ahead, and what they do offer of this one does not come."""
    number = m.round
    for peer, newest in ahead.items():
        m.handle(offer(peer, newest))
    m.handle(r.TrainingDone(number, f"own{number}"))
    m.handle(r.Deadline(number))
    return m.handle(r.MergeDone(number)) if m.phase is Phase.MERGING else []


def test_withdrawn_offers_are_of_no_use() -> None:
    """A peer says with each offer what it still has: an agent that is behind skips what is not to be had."""
    m = machine()
    m.handle(r.Started())
    for number in range(1, 8):
        m.handle(offer("b", number, oldest=max(number - 1, 1)))
        m.handle(offer("c", number, oldest=max(number - 1, 1)))
    m.handle(r.TrainingDone(1, "own"))
    for peer in ("b", "c"):
        m.handle(r.FetchFailure(peer, 1, f"{peer}1", "gone"))
    actions = m.handle(r.MergeDone(1))
    assert told(actions, events.RoundsSkipped)[0].round == 7
    assert {fetch.round for fetch in of(actions, r.Fetch)} == {7}


def test_near_offers_do_not_drive_out_what_a_newcomer_was_offered_far_ahead() -> None:
    """It asks for that as a proof, so that no second content of those rounds may count once they are near."""
    offers = Offers(newest_only=False)
    first = [offer("b", number) for number in range(100, 100 + ROUNDS_KEPT)]
    for each in first:
        offers.note(each)
    offers.newest_first = False
    offers.approach(10)
    for number in range(10, 10 + ROUNDS_KEPT):
        offers.note(offer("b", number))
    offers.forget_before(100)
    offers.approach(100)
    assert list(offers) == first[-FAR_KEPT:]
    assert offers.note(replace(first[-1], root="another")) is Known.CONFLICT


@pytest.mark.parametrize("newest", [1 + ROUNDS_KEPT, 2 + ROUNDS_KEPT, 500])
def test_what_was_offered_far_ahead_is_there_once_the_agent_follows(newest: int) -> None:
    """An agent comes back after many rounds. Its peers wait for it where they are and repeat nothing: it fetches there
    what it has heard before it followed, and waits for nobody's deadline."""
    m = machine(rounds=None)
    m.handle(r.Started())
    for number in (newest - 1, newest):
        m.handle(offer("b", number, oldest=newest - 1))
        m.handle(offer("c", number, oldest=newest - 1))
    m.handle(offer("c", newest + 1, oldest=newest))
    m.handle(r.TrainingDone(1, "own1"))
    actions = m.handle(r.MergeDone(1))
    assert told(actions, events.RoundsSkipped)[0].round == newest
    assert {(fetch.peer, fetch.round) for fetch in of(actions, r.Fetch)} == {("b", newest), ("c", newest)}
    m.handle(r.TrainingDone(newest, "own"))
    m.handle(r.SnapshotReady("b", newest, f"b{newest}"))
    (merge,) = of(m.handle(r.SnapshotReady("c", newest, f"c{newest}")), r.MergeAction)
    assert [part.peer for part in merge.parts] == ["b", "c"]
    (next_, *_) = told(m.handle(r.MergeDone(newest)), events.RoundStarted)
    assert next_.round == newest + 1


def test_what_was_offered_far_ahead_is_kept_within_bounds() -> None:
    """A peer that offers a thousand rounds, in any order: a few are kept. One that it has withdrawn is not fetched, and
    of two contents of a round the first one counts."""
    m = machine(rounds=None)
    m.handle(r.Started())
    for number in [*range(100, 600), *range(1100, 600, -1)]:
        m.handle(offer("b", number, oldest=1))
    assert sum(map(len, m._inbox.offers._far.values())) == FAR_KEPT
    m.handle(offer("b", 1102, oldest=1102))
    m.handle(replace(offer("b", 1102, oldest=1102), root="other"))
    m.handle(offer("c", 1101))
    m.handle(offer("c", 1102, oldest=1102))
    m.handle(r.TrainingDone(1, "own1"))
    actions = m.handle(r.MergeDone(1))
    assert of(actions, r.Fetch) == [r.Fetch("b", 1102, "b1102"), r.Fetch("c", 1102, "c1102")]


def test_a_peer_that_stays_out_of_reach_ahead_is_followed_a_bounded_way() -> None:
    """b's part of the network is far ahead, c's is here: after PATIENCE rounds it makes up ROUNDS_KEPT at most."""
    m = machine(rounds=None)
    m.handle(r.Started())
    ahead = 100
    for waited in range(1, PATIENCE + 1):
        have(m, "c", m.round)
        before = m.round
        actions = own_round(m, {"b": ahead + waited})
        skipped = told(actions, events.RoundsSkipped)
        if waited < PATIENCE:
            assert (skipped, m.round) == ([], before + 1), "it may yet come within reach"
    assert m.round == before + 1 + ROUNDS_KEPT
    assert skipped[0].reason == "the network is ahead"


def test_one_that_is_not_heard_again_is_not_followed_for_long() -> None:
    """An offer far ahead, once: b is dead since, or lied. It is not followed on and on."""
    m = machine(rounds=None)
    m.handle(r.Started())
    skipped = []
    for turn in range(20):
        have(m, "c", m.round)
        skipped += told(own_round(m, {"b": 10_000} if turn == 0 else {}), events.RoundsSkipped)
    assert len(skipped) <= 2
    assert m.round <= 21 + 2 * ROUNDS_KEPT


def test_offers_that_were_lost_are_waited_for_only_within_reach() -> None:
    """A publisher that keeps all its snapshots, and whose offers got lost, is not waited for over and over: beyond what
    an agent keeps track of it goes on with the network's round."""
    m = machine()
    m.handle(r.Started())
    far = ROUNDS_KEPT + 2
    m.handle(offer("b", far - 1, oldest=1))
    m.handle(offer("c", far - 1, oldest=1))
    assert told(own_round(m, {}), events.RoundsSkipped) == [], "round 2 is within reach of an offer made anew"
    m.handle(offer("b", far + 1, oldest=1))
    m.handle(offer("c", far + 1, oldest=1))
    assert told(own_round(m, {}), events.RoundsSkipped)[0].round == far + 1


def test_nobody_is_waited_for_in_vain_for_the_sake_of_min_peers() -> None:
    """All peers are past this round: waiting for more of them would only cost the deadline."""
    m = machine(min_peers=1)
    m.handle(r.Started())
    m.handle(offer("b", 7, oldest=6))
    m.handle(offer("c", 7, oldest=6))
    actions = m.handle(r.TrainingDone(1, "own"))
    assert [len(merge.parts) for merge in of(actions, r.MergeAction)] == [0]


def test_a_new_peer_is_heard_before_its_map_holds() -> None:
    """Its offer for the next round comes before the agent's own round is over, and is not lost."""
    m = machine()
    go_to(m, 2)
    m.handle(r.TrainingDone(2, "own2"))
    new = Plan(frozenset({"d"}), lambda _: RoundPlan({"me": 0.5, "d": 0.5}))
    m.handle(r.MapChanged(new))
    assert m.handle(offer("d", 3)) == []
    m.handle(r.Deadline(2))
    assert of(m.handle(r.MergeDone(2)), r.Fetch) == [r.Fetch("d", 3, "d3")]


def test_push_sum_shares_survive_a_change_of_the_map() -> None:
    """What was given to a reader whom the agent does not hear is still accounted for under the new map."""
    row = RoundPlan({"me": 1.0, "b": 1.0}, push=PushShares(0.5, {"reader": 0.5}))
    m = machine()
    m.handle(r.MapChanged(Plan(frozenset({"b"}), lambda _: row)))
    m.handle(r.Started())
    (first,) = of(m.handle(r.TrainingDone(1, "own1")), r.Publish)
    m.handle(r.MapChanged(Plan(frozenset({"b"}), lambda _: row)))
    m.handle(r.Deadline(1))
    m.handle(r.MergeDone(1))
    (second,) = of(m.handle(r.TrainingDone(2, "own2")), r.Publish)
    assert (first.pushed["reader"], second.pushed["reader"]) == (0.5, 0.75)


def test_an_asynchronous_agent_fetches_what_replaced_a_snapshot_that_is_gone() -> None:
    """The publisher let go of round 1 meanwhile, and has offered round 2."""
    m = machine(mode="async")
    m.handle(r.Started())
    assert of(m.handle(offer("b", 1)), r.Fetch) == [r.Fetch("b", 1, "b1")]
    assert of(m.handle(offer("b", 2)), r.Fetch) == []
    assert of(m.handle(r.FetchFailure("b", 1, "b1", "gone")), r.Fetch) == [r.Fetch("b", 2, "b2")]
    assert of(m.handle(r.FetchFailure("b", 2, "b2", "gone")), r.Fetch) == []


def refusing(m, actions: list[r.Action]) -> None:
    """Let every fetch fail, as at a peer that has nothing to send."""
    for fetch in of(actions, r.Fetch):
        refusing(m, m.handle(r.FetchFailure(fetch.peer, fetch.round, fetch.root, "gone")))


@pytest.mark.parametrize(("rounds", "claim"), [(100, 100), (None, 10_000), (None, LAST_ROUND), (30, 30), (5, 5)])
@pytest.mark.parametrize("other", ["silent", "in step"])
def test_one_peers_word_moves_nobody_further_than_a_few_rounds(rounds: int | None, claim: int, other: str) -> None:
    """b says in every round that it is far ahead, and sends nothing: ROUNDS_KEPT rounds in all are left out for it, and
    it is no number of b's that takes the agent into its last round."""
    m = machine(rounds=rounds)
    refusing(m, m.handle(r.Started()))
    left_out = counted = 0
    while m.phase is not Phase.DONE and counted < 60:
        if other == "in step":
            have(m, "c", m.round)
        counted += 1
        actions = own_round(m, {"b": claim})
        left_out += sum(event.round - event.first for event in told(actions, events.RoundsSkipped))
        assert all(event.round < (rounds or claim) for event in told(actions, events.RoundsSkipped))
        refusing(m, actions)
    assert left_out <= ROUNDS_KEPT
    assert counted >= min(60, (rounds or 100) - ROUNDS_KEPT, max((rounds or 100) - left_out, 2))


def test_the_only_neighbour_is_followed_at_once_when_its_snapshot_is_in_hand() -> None:
    """Its number alone moves the agent a few rounds; the snapshot that it then sends proves the rest."""
    m = machine(rounds=None)
    m.handle(r.MapChanged(Plan(frozenset({"b"}), lambda _: RoundPlan({"me": 0.5, "b": 0.5}))))
    m.handle(r.Started())
    actions = own_round(m, {"b": 500})
    assert m.round == 2 + ROUNDS_KEPT
    assert of(actions, r.Fetch) == [r.Fetch("b", 500, "b500")]
    assert m.handle(r.SnapshotReady("b", 500, "b500")) == [r.Release("b", 500, "b500")]
    actions = own_round(m, {"b": 501})
    assert m.round == 501
    assert of(actions, r.Fetch) == [r.Fetch("b", 501, "b501")]


def alone_ahead(m, claim: int, away: int) -> list[int]:
    """b and c are in step for three rounds, then b is away for some, then it says that it is at `claim` and proves
    what is asked for; return the agent's rounds since."""
    for _ in range(3 + away):
        have(m, "c", m.round)
        if m.round <= 3:
            have(m, "b", m.round)
        own_round(m, {})
    rounds = []
    for _ in range(PATIENCE + 2):
        have(m, "c", m.round)
        actions = own_round(m, {"b": claim})
        for fetch in of(actions, r.Fetch):
            m.handle(r.SnapshotReady(fetch.peer, fetch.round, fetch.root))
        rounds.append(m.round)
    return rounds


def test_one_that_was_away_is_followed_all_the_way_by_one_snapshot() -> None:
    """In 20 rounds without it, it has made 200: ten in each, which its word could have moved the agent by. Its number
    alone moves nobody further than before."""
    m = machine(rounds=None)
    m.handle(r.Started())
    rounds = alone_ahead(m, 203, away=20)
    assert rounds[:PATIENCE] == [25, 26 + ROUNDS_KEPT]
    assert rounds[PATIENCE] == 203


def test_one_that_was_not_away_or_is_faster_than_can_be_is_not() -> None:
    """A member that was here a round ago proves nothing by a snapshot with a large number, nor does one whose number
    is beyond all that it can have made meanwhile: ROUNDS_KEPT rounds for each of the agent's."""
    for away, claim in ((0, 500), (3, 10_000), (20, 10_000)):
        m = machine(rounds=None)
        m.handle(r.Started())
        before = 4 + away
        rounds = alone_ahead(m, claim, away=away)
        most = before + (len(rounds) + 1) * (ROUNDS_KEPT + 1) + away * ROUNDS_KEPT
        assert all(number <= most for number in rounds), (away, rounds)
    m = machine(rounds=100)
    m.handle(r.Started())
    assert alone_ahead(m, 100, away=20)[PATIENCE] == 99, "nobody's word takes an agent into its last round"


def test_two_that_are_ahead_of_most_are_followed_once_their_snapshots_are_here() -> None:
    """Two members bear a round out, also where more are elsewhere: their numbers alone are a few rounds' worth."""
    plan = Plan(frozenset("bcdef"), lambda _: RoundPlan({"me": 0.5, **dict.fromkeys("bcdef", 0.1)}))
    m = machine(rounds=None)
    m.handle(r.MapChanged(plan))
    m.handle(r.Started())
    rounds = []
    for _ in range(PATIENCE + 1):
        for peer in "def":
            have(m, peer, m.round)
        actions = own_round(m, {"b": 500, "c": 510})
        for fetch in of(actions, r.Fetch):
            m.handle(r.SnapshotReady(fetch.peer, fetch.round, fetch.root))
        rounds.append(m.round)
    assert rounds == [2, 3 + ROUNDS_KEPT, 500]


def test_a_proof_that_is_on_its_way_is_not_fetched_twice() -> None:
    """It comes while the agent is at its round already: it is merged like any other."""
    m = machine(rounds=None)
    m.handle(r.Started())
    actions = own_round(m, {"b": 500})
    assert of(actions, r.Fetch) == [r.Fetch("b", 500, "b500")]
    m.handle(offer("c", 500))
    actions = own_round(m, {})
    assert m.round == 500
    assert of(actions, r.Fetch) == [r.Fetch("c", 500, "c500")]
    m.handle(r.TrainingDone(500, "own"))
    m.handle(r.SnapshotReady("c", 500, "c500"))
    (merge,) = of(m.handle(r.SnapshotReady("b", 500, "b500")), r.MergeAction)
    assert [part.peer for part in merge.parts] == ["b", "c"]


def test_a_round_that_nobody_could_offer_is_its_peers_fault() -> None:
    """It is refused, which is told once, and moves nobody."""
    m = machine(rounds=None)
    m.handle(r.Started())
    (refused,) = told(m.handle(offer("b", LAST_ROUND + 1)), events.PeerRefused)
    assert (refused.peer, str(LAST_ROUND + 1) in refused.reason) == ("b", True)
    assert m.handle(offer("b", 2**53 - 1)) == []
    own_round(m, {"b": 2**53 - 1})
    assert m.round == 2


def test_an_equivocator_is_told_of_once() -> None:
    """Forty contents of one round: the first counts, one line tells of the others, and none of them is fetched."""
    m = machine(rounds=None)
    m.handle(r.Started())
    assert of(m.handle(offer("b", 1)), r.Fetch) == [r.Fetch("b", 1, "b1")]
    actions = [action for number in range(40) for action in m.handle(replace(offer("b", 1), root=f"{number:02}" * 32))]
    assert [type(action) for action in actions] == [r.Emit]
    (refused,) = told(actions, events.PeerRefused)
    assert "another snapshot for round 1" in refused.reason
    assert m.refusals.counts == {"b": 40}
    assert of(m.handle(r.TrainingDone(1, "own")), r.MergeAction) == []
    m.handle(offer("c", 1))
    m.handle(r.SnapshotReady("c", 1, "c1"))
    (merge,) = of(m.handle(r.SnapshotReady("b", 1, "b1")), r.MergeAction)
    assert [part.root for part in merge.parts] == ["b1", "c1"]


@pytest.mark.parametrize("join", ["adopt", "align"])
@pytest.mark.parametrize(("rounds", "claim"), [(100, 100), (None, LAST_ROUND)])
def test_a_newcomer_that_hears_one_peer_of_several_is_moved_a_few_rounds(
    join: str, rounds: int | None, claim: int
) -> None:
    """b alone answers, and says that the run is over, or that it is at a round past all bounds."""
    m = machine(rounds=rounds, join=join)
    m.handle(r.Started(join=True))
    have(m, "b", claim)
    m.handle(r.Deadline(0))
    m.handle(r.SnapshotReady("b", claim, f"b{claim}"))
    actions = m.handle(r.WeightsAdopted(f"b{claim}", ""))
    assert (m.phase, m.round) == (Phase.TRAINING, ROUNDS_KEPT + 1)
    if join == "adopt":  # its lineage begins at the round that it joined at, with b's weights of another one
        (checkpoint,) = of(actions, r.CheckpointAction)
        assert (checkpoint.state.round, checkpoint.record.round) == (ROUNDS_KEPT, ROUNDS_KEPT)
        assert [(part.agent, part.round) for part in checkpoint.record.contributions] == [("b", claim)]
