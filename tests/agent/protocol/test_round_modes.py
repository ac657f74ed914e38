"""The round machine beyond the plain round: asynchronous, joining, catching up, resuming, push-sum, stop rules.

Reference: the promises of `dimat.agent.protocol.round` and the fields of `dimat.agent.protocol.plan.Rules`.
`tests/faults` checks the same under thousands of hostile schedules; here each rule is seen by itself.
"""

from __future__ import annotations

import json

import pytest

from dimat import events
from dimat.agent.protocol import messages as r
from dimat.agent.protocol.basis import BasisId
from dimat.agent.protocol.messages import MergeRecord
from dimat.agent.protocol.plan import Plan, PushShares, RoundPlan, Rules
from dimat.agent.protocol.round import Phase, RoundMachine
from dimat.agent.protocol.state import MachineState
from dimat.config import ScheduleConfig
from dimat.events import MergeResult
from tests.agent.machines import MINE, go_to, have, machine, of, offer, told


# ── asynchronous ─────────────────────────────────────────────────────────────────────────────────────────────────
def test_asynchronous_merges_take_the_newest_within_reach_with_decayed_weight() -> None:
    """Weight W_ij · decay^staleness, the rest to self; what is staler does not count; nobody is waited for."""
    m = machine(mode="async", max_staleness=2, staleness_decay=0.5)
    m.handle(r.Started())
    (merge,) = of(m.handle(r.TrainingDone(1, "own1")), r.MergeAction)
    assert merge.parts == ()
    m.handle(r.MergeDone(1))
    have(m, "b", 1)
    have(m, "c", 1)
    have(m, "c", 2)
    (merge,) = of(m.handle(r.TrainingDone(2, "own2")), r.MergeAction)
    assert [(p.peer, p.round, p.weight) for p in merge.parts] == [("b", 1, 0.125), ("c", 2, 0.25)]
    assert merge.own_weight == 0.625
    for number in (3, 4):
        m.handle(r.MergeDone(number - 1))
        (merge,) = of(m.handle(r.TrainingDone(number, f"own{number}")), r.MergeAction)
    assert [(p.peer, p.weight) for p in merge.parts] == [("c", 0.0625)], "b is three rounds behind"


def test_asynchronous_machines_let_go_of_what_is_replaced() -> None:
    """A newer snapshot of a peer replaces the older one; one that a merge reads is released when that is over."""
    m = machine(mode="async")
    m.handle(r.Started())
    have(m, "b", 1)
    assert of(have(m, "b", 2), r.Release) == [r.Release("b", 1, "b1")]
    assert m.handle(offer("b", 1)) == [], "older than what is here"
    fetch = m.handle(offer("b", 3))
    assert of(fetch, r.Fetch)
    m.handle(r.TrainingDone(1, "own1"))
    assert m.phase is Phase.MERGING
    assert m.handle(r.SnapshotReady("b", 3, "b3")) == []
    assert of(m.handle(r.MergeDone(1)), r.Release) == [r.Release("b", 2, "b2")]


def test_a_slow_asynchronous_agent_takes_the_networks_round() -> None:
    """More than max_staleness behind the lower median of its peers, an agent goes on with their round."""
    m = machine(mode="async", max_staleness=3)
    m.handle(r.Started())
    have(m, "b", 40)
    have(m, "c", 9)
    m.handle(r.TrainingDone(1, "own1"))
    actions = m.handle(r.MergeDone(1))
    assert m.round == 9, "the lower median: one peer alone cannot drag it to 40"
    assert told(actions, events.RoundsSkipped)[0].first == 2


# ── waiting ──────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_min_peers_are_waited_for_and_without_them_own_weights_stay(mode: str) -> None:
    """Fewer than min_peers at the deadline: no merge, said so; peers that are lost may come back until then."""
    m = machine(mode=mode, min_peers=2, max_staleness=0)
    m.handle(r.Started())
    assert of(m.handle(r.TrainingDone(1, "own1")), r.MergeAction) == []
    m.handle(r.PeerLost("c"))
    assert of(have(m, "b", 1), r.MergeAction) == []
    actions = m.handle(r.Deadline(1))
    (merge,) = of(actions, r.MergeAction)
    assert (merge.own_weight, merge.parts) == (1.0, ())
    if mode == "sync":
        assert "1 of at least 2 peers" in told(actions, events.Warned)[0].message


def test_a_peer_that_is_past_this_round_is_not_waited_for() -> None:
    """A peer whose oldest snapshot is of a later round cannot deliver this one any more."""
    m = machine()
    m.handle(r.Started())
    m.handle(r.TrainingDone(1, "own1"))
    have(m, "b", 1)
    actions = m.handle(offer("c", 3, oldest=2))
    (merge,) = of(actions, r.MergeAction)
    assert [p.peer for p in merge.parts] == ["b"]
    assert told(actions, events.PeerLate)[0].reason == "it is ahead and no longer offers this round"


def test_a_peer_that_leaves_is_waited_for_up_to_its_last_round() -> None:
    """The goodbye may overtake the last snapshot; after that round nobody waits."""
    m = machine()
    m.handle(r.Started())
    m.handle(r.TrainingDone(1, "own1"))
    have(m, "b", 1)
    assert of(m.handle(r.PeerLost("c", "it has left", last=1)), r.MergeAction) == []
    (merge,) = of(have(m, "c", 1), r.MergeAction)
    assert len(merge.parts) == 2
    m.handle(r.MergeDone(1))
    m.handle(r.TrainingDone(2, "own2"))
    assert of(have(m, "b", 2), r.MergeAction), "c is gone"


def test_an_agent_that_is_behind_skips_to_the_networks_round() -> None:
    """Where nobody offers the next round any more; while somebody does, it takes part in that one."""
    m = machine()
    go_to(m, 3, peers=False)
    m.handle(offer("b", 9, oldest=8))
    m.handle(offer("c", 8, oldest=7))
    m.handle(r.TrainingDone(3, "own3"))
    actions = m.handle(r.MergeDone(3))
    assert m.round == 8
    (skipped,) = told(actions, events.RoundsSkipped)
    assert (skipped.first, skipped.round) == (4, 8)


def test_peers_with_another_base_are_refused() -> None:
    """Task vectors of different bases cannot be merged: said once per peer."""
    m = machine(base="ours")
    m.handle(r.Started())
    (refused,) = told(m.handle(offer("b", 1, base="theirs")), events.PeerRefused)
    assert "theirs" in refused.reason
    assert m.handle(offer("b", 2, base="theirs")) == []
    assert of(m.handle(offer("c", 1, base="ours")), r.Fetch)


# ── resuming ─────────────────────────────────────────────────────────────────────────────────────────────────────
def again(checkpoint: r.CheckpointAction, published: int) -> RoundMachine:
    """Make a machine from a checkpoint's state, by way of JSON."""
    state = MachineState.from_dict(json.loads(json.dumps(checkpoint.state.to_dict())))
    return machine(state=state, published=published)


def test_resuming_after_training_publishes_the_same_again() -> None:
    """The recorded snapshot, the same parents, and what was offered before the crash is fetched again."""
    m = machine()
    go_to(m, 2)
    m.handle(offer("b", 2))
    actions = m.handle(r.TrainingDone(2, "own2"))
    (checkpoint,), (published,) = of(actions, r.CheckpointAction), of(actions, r.Publish)
    resumed = again(checkpoint, published=2)
    actions = resumed.handle(r.Started())
    assert of(actions, r.Publish) == [published]
    assert of(actions, r.Fetch) == [r.Fetch("b", 2, "b2")]
    assert of(actions, r.SetTimer) == [r.SetTimer(2, 10.0)]
    assert of(actions, r.Train) == []


def test_resuming_after_a_merge_begins_the_next_round() -> None:
    """And where that was the last round, there is nothing left to do."""
    m = machine(rounds=2)
    m.handle(r.Started())
    m.handle(r.TrainingDone(1, "own1"))
    m.handle(r.Deadline(1))
    (checkpoint,) = of(m.handle(r.MergeDone(1)), r.CheckpointAction)
    assert of(again(checkpoint, 1).handle(r.Started()), r.Train) == [r.Train(2, learn=True)]
    m.handle(r.TrainingDone(2, "own2"))
    m.handle(r.Deadline(2))
    (checkpoint,) = of(m.handle(r.MergeDone(2)), r.CheckpointAction)
    state = MachineState.from_dict(checkpoint.state.to_dict())
    assert of(machine(state=state, published=2, rounds=2).handle(r.Started()), r.Exit) == [r.Exit("done")]


def test_the_record_of_a_merge_tells_what_moved() -> None:
    """It comes through the ledger's file format, and records of before it was told are still read."""
    m = machine()
    m.handle(r.Started())
    m.handle(r.TrainingDone(1, "own1"))
    m.handle(r.Deadline(1))
    (checkpoint,) = of(
        m.handle(r.MergeDone(1, MergeResult(moved={"b": 0.25}, moved_groups={"b": {"g": 0.5}}))), r.CheckpointAction
    )
    assert checkpoint.record is not None
    values = checkpoint.record.to_dict()
    assert MergeRecord.from_dict(values).result.moved == {"b": 0.25}
    assert MergeRecord.from_dict(values).result.moved_groups == {"b": {"g": 0.5}}
    del values["moved"]
    assert MergeRecord.from_dict(values).result.moved == {}


def test_rounds_published_before_a_checkpoint_was_lost_are_left_out() -> None:
    """Round 2 was published, its checkpoint is damaged: going on from round 1, the next is round 3."""
    m = machine()
    m.handle(r.Started())
    (checkpoint,) = of(m.handle(r.TrainingDone(1, "own1")), r.CheckpointAction)
    resumed = again(checkpoint, published=2)
    resumed.handle(r.Started())
    resumed.handle(r.Deadline(1))
    actions = resumed.handle(r.MergeDone(1))
    assert of(actions, r.Train) == [r.Train(3, learn=True)]


# ── push-sum ─────────────────────────────────────────────────────────────────────────────────────────────────────
def test_push_sum_weights_follow_from_shares_and_late_ones_are_made_up_for() -> None:
    """Two agents push to each other half of what they have; a share that is missed comes with the next snapshot."""
    plan = Plan(frozenset({"b"}), lambda _: RoundPlan({"me": 1.0, "b": 1.0}, push=PushShares(0.5, {"b": 0.5})))
    m = RoundMachine("me", "run", plan, Rules.of(ScheduleConfig(), rounds=10, deadline_s=10.0), basis=MINE)
    m.handle(r.Started())
    (publish,) = of(m.handle(r.TrainingDone(1, "own1")), r.Publish)
    assert publish.pushed == {"b": 0.5}
    assert m.push_weight == 0.5
    m.handle(r.Deadline(1))
    m.handle(r.MergeDone(1))
    have(m, "b", 2, pushed=0.5 + 0.25)
    (merge,) = of(m.handle(r.TrainingDone(2, "own2")), r.MergeAction)
    assert m.push_weight == 0.25
    assert merge.own_weight == pytest.approx(0.25)
    assert merge.parts[0].weight == pytest.approx(0.75)
    (merged,) = told(m.handle(r.MergeDone(2)), events.Merged)
    assert merged.push_weight == pytest.approx(1.0)


# ── stopping, changing ───────────────────────────────────────────────────────────────────────────────────────────
def test_stop_rules() -> None:
    """Target: after the merge that reaches it, a crash before the end included. Time: the round is finished first. No
    end: it goes on."""
    m = machine(target=("accuracy", 0.9))
    m.handle(r.Started())
    m.handle(r.TrainingDone(1, "own1"))
    m.handle(r.Deadline(1))
    actions = m.handle(r.MergeDone(1, MergeResult(after={"accuracy": 0.9})))
    assert of(actions, r.CheckpointAction)
    assert of(actions, r.Exit) == [r.Exit("target")]
    (checkpoint,) = of(actions, r.CheckpointAction)
    resumed = again(checkpoint, published=1)
    assert of(resumed.handle(r.Started()), r.Exit) == [r.Exit("target")]
    m = machine(rounds=None)
    go_to(m, 150)
    assert m.handle(r.TimeUp()) == []
    m.handle(r.TrainingDone(150, "own"))
    m.handle(r.Deadline(150))
    assert of(m.handle(r.MergeDone(150)), r.Exit) == [r.Exit("time")]


def test_a_changed_map_holds_from_the_next_round() -> None:
    """The round in progress keeps its peers; then only the new map's are heard."""
    m = machine()
    m.handle(r.Started())
    m.handle(r.MapChanged(Plan(frozenset({"d"}), lambda _: RoundPlan({"me": 0.5, "d": 0.5}))))
    m.handle(r.TrainingDone(1, "own1"))
    have(m, "b", 1)
    (merge,) = of(have(m, "c", 1), r.MergeAction)
    assert len(merge.parts) == 2
    m.handle(r.MergeDone(1))
    assert have(m, "b", 2) == []
    assert of(have(m, "d", 2), r.Fetch)
    (merge,) = of(m.handle(r.TrainingDone(2, "own2")), r.MergeAction)
    assert [p.peer for p in merge.parts] == ["d"]


def test_messages_of_another_run_are_ignored() -> None:
    """A message counts for its own run alone."""
    m = machine()
    m.handle(r.Started())
    assert m.handle(r.PeerPublished("b", 1, "b1", BasisId(0, "a", "0"), "another run", 1)) == []


# ── taking weights over with a basis ─────────────────────────────────────────────────────────────────────────────
def test_taken_weights_stand_for_own_ones_in_the_record_of_a_merge() -> None:
    """What would be self's is the adopted snapshot's; peers in another basis are not in it. Beyond `adopt_rounds` all
    are."""
    for adopt_rounds, expected in (
        (0, [("me", 0.5, "own"), ("b", 0.25, "same basis"), ("c", 0.25, "other basis")]),
        (1, [("me", 0.0, "own"), ("b", 1.0, "adopted")]),
    ):
        m = machine(basis_gossip=True, adopt_rounds=adopt_rounds)
        m.handle(r.Started())
        smaller = BasisId(0, "a", "0")
        have(m, "b", 1, basis=smaller)
        have(m, "c", 1)
        (adopt,) = of(m.handle(r.TrainingDone(1, "own1")), r.AdoptBasis)
        assert of(m.handle(r.BasisChanged(1, adopt.basis)), r.MergeAction)
        (merged,) = told(m.handle(r.MergeDone(1)), events.Merged)
        assert [(part.agent, part.weight, part.verdict) for part in merged.contributions] == expected
        # in the next round own weights are own again
        have(m, "b", 2, basis=smaller)
        have(m, "c", 2, basis=smaller)
        m.handle(r.TrainingDone(2, "own2"))
        (merged,) = told(m.handle(r.MergeDone(2)), events.Merged)
        assert [(part.agent, part.weight) for part in merged.contributions] == [("me", 0.5), ("b", 0.25), ("c", 0.25)]
