"""The round machine beyond the plain round: asynchronous, joining, catching up, resuming, push-sum, stop rules.

Reference: the promises of `dimat.agent.round` and the fields of `dimat.agent.plan.Rules`. `tests/faults` checks the
same under thousands of hostile schedules; here each rule is seen by itself.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from dimat import events as facts
from dimat.agent import messages as r
from dimat.agent.basis import BasisId
from dimat.agent.plan import Plan, PushShares, RoundPlan, Rules
from dimat.agent.round import Phase, RoundMachine
from dimat.agent.state import MachineState

MINE = BasisId(0, "me", "0")
ROW = {"me": 0.5, "b": 0.25, "c": 0.25}


def machine(state: MachineState | None = None, published: int = 0, base: str = "", **rules: Any) -> RoundMachine:
    plan = Plan(frozenset({"b", "c"}), lambda _: RoundPlan(ROW))
    settings: dict[str, Any] = {"rounds": 100, "deadline_s": 10.0, **rules}
    return RoundMachine("me", "run", plan, Rules(**settings), basis=MINE, base=base, state=state, published=published)


def offer(peer: str, number: int, oldest: int | None = None, **fields: Any) -> r.PeerPublished:
    basis = fields.pop("basis", BasisId(0, "z" + peer, "0"))
    return r.PeerPublished(peer, number, f"{peer}{number}", basis, "run", oldest or number, **fields)


def of(actions: list[r.Action], kind: type[Any]) -> list[Any]:
    return [action for action in actions if isinstance(action, kind)]


def told(actions: list[r.Action], kind: type[facts.Event]) -> list[Any]:
    return [action.fact for action in of(actions, r.Report) if isinstance(action.fact, kind)]


def have(m: RoundMachine, peer: str, number: int, **fields: Any) -> list[r.Action]:
    """Offer a snapshot, and bring it if it is asked for."""
    actions = m.handle(offer(peer, number, **fields))
    for fetch in of(actions, r.Fetch):
        actions += m.handle(r.SnapshotReady(fetch.peer, fetch.round, fetch.root))
    return actions


def go_to(m: RoundMachine, number: int, *, peers: bool = True) -> list[r.Action]:
    """Take a synchronous machine to the beginning of a round, with everybody's snapshots or with nobody's."""
    actions = m.handle(r.Started())
    for current in range(1, number):
        m.handle(r.TrainingDone(current, f"own{current}"))
        for peer in ("b", "c") if peers else ():
            have(m, peer, current)
        m.handle(r.Deadline(current))
        actions = m.handle(r.MergeDone(current, {}))
    assert m.round == number
    return actions


# ── asynchronous ─────────────────────────────────────────────────────────────────────────────────────────────────
def test_asynchronous_merges_take_the_newest_within_reach_with_decayed_weight() -> None:
    """Weight W_ij · decay^staleness, the rest to self; what is staler does not count; nobody is waited for."""
    m = machine(mode="async", max_staleness=2, staleness_decay=0.5)
    m.handle(r.Started())
    (merge,) = of(m.handle(r.TrainingDone(1, "own1")), r.Merge)
    assert merge.parts == ()
    m.handle(r.MergeDone(1, {}))
    have(m, "b", 1)
    have(m, "c", 1)
    have(m, "c", 2)
    (merge,) = of(m.handle(r.TrainingDone(2, "own2")), r.Merge)
    assert [(p.peer, p.round, p.weight) for p in merge.parts] == [("b", 1, 0.125), ("c", 2, 0.25)]
    assert merge.own_weight == 0.625
    for number in (3, 4):
        m.handle(r.MergeDone(number - 1, {}))
        (merge,) = of(m.handle(r.TrainingDone(number, f"own{number}")), r.Merge)
    assert [(p.peer, p.weight) for p in merge.parts] == [("c", 0.0625)], "b is three rounds behind"


def test_asynchronous_machines_let_go_of_what_is_replaced() -> None:
    """A newer snapshot of a peer replaces the older one; one that a merge reads is released when that is over."""
    m = machine(mode="async")
    m.handle(r.Started())
    have(m, "b", 1)
    assert of(have(m, "b", 2), r.Release) == [r.Release("b", "b1")]
    assert m.handle(offer("b", 1)) == [], "older than what is here"
    fetch = m.handle(offer("b", 3))
    assert of(fetch, r.Fetch)
    m.handle(r.TrainingDone(1, "own1"))
    assert m.phase is Phase.MERGING
    assert m.handle(r.SnapshotReady("b", 3, "b3")) == []
    assert of(m.handle(r.MergeDone(1, {})), r.Release) == [r.Release("b", "b2")]


def test_a_slow_asynchronous_agent_takes_the_networks_round() -> None:
    """More than max_staleness behind the lower median of its peers, an agent goes on with their round."""
    m = machine(mode="async", max_staleness=3)
    m.handle(r.Started())
    have(m, "b", 40)
    have(m, "c", 9)
    m.handle(r.TrainingDone(1, "own1"))
    actions = m.handle(r.MergeDone(1, {}))
    assert m.round == 9, "the lower median: one peer alone cannot drag it to 40"
    assert told(actions, facts.RoundsSkipped)[0].first == 2


# ── waiting ──────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_min_peers_are_waited_for_and_without_them_own_weights_stay(mode: str) -> None:
    """Fewer than min_peers at the deadline: no merge, said so; peers that are lost may come back until then."""
    m = machine(mode=mode, min_peers=2, max_staleness=0)
    m.handle(r.Started())
    assert of(m.handle(r.TrainingDone(1, "own1")), r.Merge) == []
    m.handle(r.PeerLost("c"))
    assert of(have(m, "b", 1), r.Merge) == []
    actions = m.handle(r.Deadline(1))
    (merge,) = of(actions, r.Merge)
    assert (merge.own_weight, merge.parts) == (1.0, ())
    if mode == "sync":
        assert "1 of at least 2 peers" in told(actions, facts.Warned)[0].message


def test_a_peer_that_is_past_this_round_is_not_waited_for() -> None:
    """A peer whose oldest snapshot is of a later round cannot deliver this one any more."""
    m = machine()
    m.handle(r.Started())
    m.handle(r.TrainingDone(1, "own1"))
    have(m, "b", 1)
    actions = m.handle(offer("c", 3, oldest=2))
    (merge,) = of(actions, r.Merge)
    assert [p.peer for p in merge.parts] == ["b"]
    assert told(actions, facts.PeerLate)[0].reason == "it is ahead and offers this round no more"


def test_a_peer_that_leaves_is_waited_for_up_to_its_last_round() -> None:
    """The goodbye may overtake the last snapshot; after that round nobody waits."""
    m = machine()
    m.handle(r.Started())
    m.handle(r.TrainingDone(1, "own1"))
    have(m, "b", 1)
    assert of(m.handle(r.PeerLost("c", "it has left", last=1)), r.Merge) == []
    (merge,) = of(have(m, "c", 1), r.Merge)
    assert len(merge.parts) == 2
    m.handle(r.MergeDone(1, {}))
    m.handle(r.TrainingDone(2, "own2"))
    assert of(have(m, "b", 2), r.Merge), "c is gone"


def test_an_agent_that_is_behind_skips_to_the_networks_round() -> None:
    """Where nobody offers the next round any more; while somebody does, it takes part in that one."""
    m = machine()
    go_to(m, 3, peers=False)
    m.handle(offer("b", 9, oldest=8))
    m.handle(offer("c", 8, oldest=7))
    m.handle(r.TrainingDone(3, "own3"))
    actions = m.handle(r.MergeDone(3, {}))
    assert m.round == 8
    (skipped,) = told(actions, facts.RoundsSkipped)
    assert (skipped.first, skipped.round) == (4, 8)


# ── joining ──────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_newcomer_adopts_weights_round_and_basis() -> None:
    """`join = "adopt"`: the network's round, a peer's weights, its basis and base, and the record."""
    m = machine(join="adopt", basis_gossip=True)
    assert of(m.handle(r.Started(join=True)), r.SetTimer) == [r.SetTimer(0, 10.0)]
    old = BasisId(0, "a", "0")
    assert m.handle(offer("b", 6, basis=old, base="base")) == []
    (fetch,) = m.handle(offer("c", 7, basis=old, base="base"))
    assert (fetch.peer, fetch.round) == ("c", 7)
    assert m.handle(r.SnapshotReady("c", 7, "c7")) == [r.AdoptWeights("c", 7, "c7", "base")]
    actions = m.handle(r.WeightsAdopted("c7"))
    (checkpoint,) = of(actions, r.Checkpoint)
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
    assert m.basis == BasisId(6, "me", "0") > BasisId(0, "zzz", "0")


def test_a_newcomer_tries_the_next_peer_and_at_last_keeps_its_own() -> None:
    """Weights that cannot be used (not finite, say) are passed over, with a warning."""
    m = machine(join="adopt")
    m.handle(r.Started(join=True))
    m.handle(offer("b", 6))
    (fetch,) = of(m.handle(offer("c", 6)), r.Fetch)
    m.handle(r.SnapshotReady(fetch.peer, 6, fetch.root))
    actions = m.handle(r.WeightsAdopted(fetch.root, "not finite"))
    assert "not finite" in told(actions, facts.Warned)[0].message
    (second,) = of(actions, r.Fetch)
    assert second.peer != fetch.peer
    actions = m.handle(r.FetchFailed(second.peer, 6, second.root, "gone"))
    assert told(actions, facts.Joined)[0].how == "align"
    assert m.round == 7


def test_a_newcomer_that_hears_nobody_founds_a_network() -> None:
    """After join_wait_s without an offer."""
    m = machine()
    m.handle(r.Started(join=True))
    actions = m.handle(r.Deadline(0))
    assert told(actions, facts.Joined)[0].how == "found"
    assert m.round == 1


def test_peers_with_another_base_are_refused() -> None:
    """Task vectors of different bases cannot be merged: said once per peer."""
    m = machine(base="ours")
    m.handle(r.Started())
    (refused,) = told(m.handle(offer("b", 1, base="theirs")), facts.PeerRefused)
    assert "theirs" in refused.reason
    assert m.handle(offer("b", 2, base="theirs")) == []
    assert of(m.handle(offer("c", 1, base="ours")), r.Fetch)


# ── resuming ─────────────────────────────────────────────────────────────────────────────────────────────────────
def again(checkpoint: r.Checkpoint, published: int) -> RoundMachine:
    """Make a machine from a checkpoint's state, by way of JSON."""
    state = MachineState.from_dict(json.loads(json.dumps(checkpoint.state.to_dict())))
    return machine(state=state, published=published)


def test_resuming_after_training_publishes_the_same_again() -> None:
    """The recorded snapshot, the same parents, and what was offered before the crash is fetched again."""
    m = machine()
    go_to(m, 2)
    m.handle(offer("b", 2))
    actions = m.handle(r.TrainingDone(2, "own2"))
    (checkpoint,), (published,) = of(actions, r.Checkpoint), of(actions, r.Publish)
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
    (checkpoint,) = of(m.handle(r.MergeDone(1, {})), r.Checkpoint)
    assert of(again(checkpoint, 1).handle(r.Started()), r.Train) == [r.Train(2, learn=True)]
    m.handle(r.TrainingDone(2, "own2"))
    m.handle(r.Deadline(2))
    (checkpoint,) = of(m.handle(r.MergeDone(2, {})), r.Checkpoint)
    state = MachineState.from_dict(checkpoint.state.to_dict())
    assert of(machine(state=state, published=2, rounds=2).handle(r.Started()), r.Exit) == [r.Exit("done")]


def test_rounds_published_before_a_checkpoint_was_lost_are_left_out() -> None:
    """Round 2 was published, its checkpoint is damaged: going on from round 1, the next is round 3."""
    m = machine()
    m.handle(r.Started())
    (checkpoint,) = of(m.handle(r.TrainingDone(1, "own1")), r.Checkpoint)
    resumed = again(checkpoint, published=2)
    resumed.handle(r.Started())
    resumed.handle(r.Deadline(1))
    actions = resumed.handle(r.MergeDone(1, {}))
    assert of(actions, r.Train) == [r.Train(3, learn=True)]


# ── push-sum ─────────────────────────────────────────────────────────────────────────────────────────────────────
def test_push_sum_weights_follow_from_shares_and_late_ones_are_made_up_for() -> None:
    """Two agents push to each other half of what they have; a share that is missed comes with the next snapshot."""
    plan = Plan(frozenset({"b"}), lambda _: RoundPlan({"me": 1.0, "b": 1.0}, push=PushShares(0.5, {"b": 0.5})))
    m = RoundMachine("me", "run", plan, Rules(10, 10.0), basis=MINE)
    m.handle(r.Started())
    (publish,) = of(m.handle(r.TrainingDone(1, "own1")), r.Publish)
    assert publish.pushed == {"b": 0.5}
    assert m.push_weight == 0.5
    m.handle(r.Deadline(1))
    m.handle(r.MergeDone(1, {}))
    have(m, "b", 2, pushed=0.5 + 0.25)
    (merge,) = of(m.handle(r.TrainingDone(2, "own2")), r.Merge)
    assert m.push_weight == 0.25
    assert merge.own_weight == pytest.approx(0.25)
    assert merge.parts[0].weight == pytest.approx(0.75)
    (merged,) = told(m.handle(r.MergeDone(2, {})), facts.Merged)
    assert merged.push_weight == pytest.approx(1.0)


# ── stopping, changing ───────────────────────────────────────────────────────────────────────────────────────────
def test_stop_rules() -> None:
    """Target: after the merge that reaches it. Time: the round is finished first. No end: it goes on."""
    m = machine(target=("accuracy", 0.9))
    m.handle(r.Started())
    m.handle(r.TrainingDone(1, "own1"))
    m.handle(r.Deadline(1))
    actions = m.handle(r.MergeDone(1, {}, after={"accuracy": 0.9}))
    assert of(actions, r.Checkpoint)
    assert of(actions, r.Exit) == [r.Exit("target")]
    m = machine(rounds=None)
    go_to(m, 150)
    assert m.handle(r.TimeUp()) == []
    m.handle(r.TrainingDone(150, "own"))
    m.handle(r.Deadline(150))
    assert of(m.handle(r.MergeDone(150, {})), r.Exit) == [r.Exit("time")]


def test_a_changed_map_holds_from_the_next_round() -> None:
    """The round in progress keeps its peers; then only the new map's are heard."""
    m = machine()
    m.handle(r.Started())
    m.handle(r.MapChanged(Plan(frozenset({"d"}), lambda _: RoundPlan({"me": 0.5, "d": 0.5}))))
    m.handle(r.TrainingDone(1, "own1"))
    have(m, "b", 1)
    (merge,) = of(have(m, "c", 1), r.Merge)
    assert len(merge.parts) == 2
    m.handle(r.MergeDone(1, {}))
    assert have(m, "b", 2) == []
    assert of(have(m, "d", 2), r.Fetch)
    (merge,) = of(m.handle(r.TrainingDone(2, "own2")), r.Merge)
    assert [p.peer for p in merge.parts] == ["d"]


def test_messages_of_another_run_are_ignored() -> None:
    """A message counts for its own run alone."""
    m = machine()
    m.handle(r.Started())
    assert m.handle(r.PeerPublished("b", 1, "b1", BasisId(0, "a", "0"), "another run", 1)) == []
