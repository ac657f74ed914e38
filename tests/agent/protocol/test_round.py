"""The round machine against its promises (module docstring of `dimat.agent.protocol.round`), driven without I/O."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field, replace
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimat import events
from dimat.agent.protocol import messages as r
from dimat.agent.protocol.basis import BasisId
from dimat.agent.protocol.offers import ROUNDS_KEPT
from dimat.agent.protocol.plan import Plan, RoundPlan, Rules
from dimat.agent.protocol.round import Phase, RoundMachine
from dimat.config import ScheduleConfig
from dimat.events import MergeResult


def metropolis_row(graph: nx.Graph, agent: str) -> dict[str, float]:
    row = {b: 1 / (1 + max(graph.degree[agent], graph.degree[b])) for b in sorted(graph[agent])}
    return {agent: 1 - sum(row.values()), **row}


@dataclass
class Network:
    """A driver for tests: agents hold one number each; messages take random time; the dead neither send nor answer."""

    graph: nx.Graph
    rounds: int
    seed: int = 0
    delay_s: float = 1.0
    deadline_s: float = 1000.0
    dead: frozenset[str] = frozenset()
    refuse: frozenset[tuple[str, str]] = frozenset()  # (agent, peer)
    facts: list[events.Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.queue: list = []
        self.count = 0
        self.now = 0.0
        self.values = {a: float(i) for i, a in enumerate(sorted(self.graph))}
        self.published: dict[str, float] = {}
        self.done: dict[str, str] = {}
        self.merges: dict[tuple[str, int], r.MergeAction] = {}
        self.machines = {
            a: RoundMachine(
                a,
                "run",
                Plan(frozenset(self.graph[a]), lambda _, a=a: RoundPlan(metropolis_row(self.graph, a))),
                Rules.of(ScheduleConfig(), rounds=self.rounds, deadline_s=self.deadline_s, basis_gossip=True),
                basis=BasisId(0, a, "0"),
            )
            for a in self.graph
        }

    def put(self, delay_s: float, agent: str, event: r.Event) -> None:
        self.count += 1
        heapq.heappush(self.queue, (self.now + delay_s, self.count, agent, event))

    def run(self) -> None:
        for a in self.graph:
            if a not in self.dead:
                self.put(0, a, r.Started())
        while self.queue:
            self.now, _, agent, event = heapq.heappop(self.queue)
            for action in self.machines[agent].handle(event):
                self.perform(agent, action)

    def perform(self, a: str, action: r.Action) -> None:
        def soon() -> float:
            return self.random.random() * self.delay_s

        match action:
            case r.Train(round=n):
                self.put(1 + soon(), a, r.TrainingDone(n, f"{a}@{n}"))
            case r.Publish(round=n, root=root, basis=basis):
                self.published[root] = self.values[a]
                for b in self.graph[a]:
                    if b not in self.dead:
                        self.put(soon(), b, r.PeerPublished(a, n, root, basis, run="run", oldest=max(1, n - 1)))
            case r.Fetch(peer=peer, round=n, root=root):
                self.put(soon(), a, r.SnapshotReady(peer, n, root))
            case r.AdoptBasis(round=n, basis=basis):
                self.put(0, a, r.BasisChanged(n, basis, 0.5))
            case r.MergeAction(round=n):
                self.merges[a, n] = action
                refused = {p.peer: "not finite" for p in action.parts if (a, p.peer) in self.refuse}
                kept = [p for p in action.parts if p.peer not in refused]
                own = 1 - sum(p.weight for p in kept)
                self.values[a] = own * self.values[a] + sum(p.weight * self.published[p.root] for p in kept)
                self.put(0, a, r.MergeDone(n, MergeResult(refused=refused)))
            case r.SetTimer(round=n, seconds=s):
                self.put(s, a, r.Deadline(n))
            case r.Emit(fact=fact):
                self.facts.append(fact)
            case r.Exit(reason=reason):
                self.done[a] = reason
            case r.CheckpointAction():
                pass


def named(graph: nx.Graph) -> nx.Graph:
    return nx.relabel_nodes(graph, {n: f"a{i}" for i, n in enumerate(graph)})


@pytest.mark.parametrize("graph", [nx.cycle_graph(5), nx.path_graph(4), nx.star_graph(5), nx.complete_graph(4)])
def test_trajectory_is_the_matrix_product(graph: nx.Graph) -> None:
    """Without faults, however messages are delayed, values are W…W x (the definition of gossip averaging)."""
    network = Network(named(graph), rounds=6, seed=3)
    names = sorted(network.graph)
    rows = [metropolis_row(network.graph, a) for a in names]
    matrix = np.array([[row.get(b, 0.0) for b in names] for row in rows])
    start = np.array([network.values[a] for a in names])
    network.run()
    expected = np.linalg.matrix_power(matrix, 6) @ start
    np.testing.assert_allclose([network.values[a] for a in names], expected, rtol=1e-12)
    assert set(network.done.values()) == {"done"}


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.integers(0, 10_000))
def test_one_basis_within_diameter_rounds(n: int, seed: int) -> None:
    """Basis gossip: all agents agree after at most diameter rounds, on the smallest id (design page, the round)."""
    tree = nx.random_labeled_tree(n, seed=seed)
    extra = random.Random(seed)
    tree.add_edges_from((extra.randrange(n), extra.randrange(n)) for _ in range(n // 3))
    tree.remove_edges_from(list(nx.selfloop_edges(tree)))
    graph = named(tree)
    network = Network(graph, rounds=max(nx.diameter(graph), 1), seed=seed)
    network.run()
    assert {m.basis for m in network.machines.values()} == {BasisId(0, min(graph), "0")}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sets(st.integers(0, 5), max_size=6))
def test_every_round_ends_with_any_set_of_dead_peers(seed: int, dead: set[int]) -> None:
    """Promise: a round never waits past its deadline, counted from the end of training (here of 1 to 2 s); the missing
    mass goes to self and weights still sum to 1."""
    graph = named(nx.circular_ladder_graph(3))
    gone = frozenset(f"a{i}" for i in dead)
    network = Network(graph, rounds=3, seed=seed, dead=gone, deadline_s=20)
    network.run()
    assert set(network.done) == set(graph) - gone
    assert network.now <= 3 * (20 + 2) + 3
    for (agent, _), merge in network.merges.items():
        heard = {p.peer for p in merge.parts}
        assert heard <= set(graph[agent]) - gone
        row = metropolis_row(graph, agent)
        assert {p.peer: p.weight for p in merge.parts} == {peer: row[peer] for peer in heard}
        missing = sum(weight for peer, weight in row.items() if peer not in heard)
        assert merge.own_weight == pytest.approx(missing, abs=1e-12)
    late = {(f.agent, f.round, f.peer) for f in network.facts if isinstance(f, events.PeerLate)}
    assert late >= {(a, n, p) for a in set(graph) - gone for p in set(graph[a]) & gone for n in (1, 2, 3)}
    alone = {a for a in set(graph) - gone if set(graph[a]) <= gone}
    said = {f.agent for f in network.facts if isinstance(f, events.Warned)}
    assert said >= alone, "an agent that hears nobody says so and keeps its weights"


def test_a_dead_peer_costs_one_deadline() -> None:
    """A peer that missed a deadline is not waited for again until it is heard; then it is merged again."""
    m = machine(basis_gossip=False)
    m.handle(r.Started())
    m.handle(r.TrainingDone(1, "own1"))
    m.handle(offer("b", 1))
    m.handle(r.SnapshotReady("b", 1, "b1"))
    assert kinds(m.handle(r.Deadline(1))) == ["Emit", "MergeAction"]
    m.handle(r.MergeDone(1))
    m.handle(offer("b", 2))
    m.handle(r.TrainingDone(2, "own2"))
    assert kinds(m.handle(r.SnapshotReady("b", 2, "b2"))) == ["Emit", "MergeAction"], "c is silent: no waiting"
    m.handle(r.MergeDone(2))
    m.handle(offer("b", 3))
    m.handle(offer("c", 2))  # late, but alive
    m.handle(r.TrainingDone(3, "own3"))
    assert m.handle(r.SnapshotReady("b", 3, "b3")) == [], "c is waited for again"
    m.handle(offer("c", 3))
    (merge,) = m.handle(r.SnapshotReady("c", 3, "c3"))
    assert isinstance(merge, r.MergeAction)
    assert [p.peer for p in merge.parts] == ["b", "c"]


def test_contributions_list_what_was_merged() -> None:
    """Each `Merged` lists (peer, snapshot, round, weight), self first, and a refused peer's mass is self's."""
    graph = named(nx.cycle_graph(3))
    network = Network(graph, rounds=2, refuse=frozenset({("a0", "a1")}))
    network.run()
    for fact in network.facts:
        if not isinstance(fact, events.Merged):
            continue
        assert fact.contributions[0].agent == fact.agent
        assert sum(c.weight for c in fact.contributions) == pytest.approx(1, abs=1e-12)
        assert all(c.snapshot == f"{c.agent}@{fact.round}" and c.round == fact.round for c in fact.contributions)
        others = {c.agent for c in fact.contributions[1:]}
        assert others == ({"a2"} if fact.agent == "a0" else set(graph[fact.agent]))
    refused = {(f.agent, f.peer, f.reason) for f in network.facts if isinstance(f, events.PeerRefused)}
    assert refused == {("a0", "a1", "not finite")}


# ── single machine, event by event ───────────────────────────────────────────────────────────────────────────────
ROW = {"me": 0.5, "b": 0.25, "c": 0.25}
MINE = BasisId(0, "me", "0")


def machine(**changes: object) -> RoundMachine:
    rules: dict[str, Any] = {"rounds": 3, "basis_gossip": True, "deadline_s": 10.0, **changes}
    plan = Plan(frozenset(ROW) - {"me"}, lambda _: RoundPlan(ROW))
    return RoundMachine("me", "run", plan, Rules.of(ScheduleConfig(), **rules), basis=MINE)


def offer(peer: str, number: int, root: str | None = None, basis: BasisId | None = None) -> r.PeerPublished:
    return r.PeerPublished(peer, number, root or f"{peer}{number}", basis or BasisId(0, "z" + peer, "0"), "run", number)


def kinds(actions: list[r.Action]) -> list[str]:
    return [type(a).__name__ for a in actions]


def test_order_of_actions_in_a_round() -> None:
    """Design: train → record → publish → gather → merge → checkpoint; durable before published."""
    m = machine(basis_gossip=False)
    assert kinds(m.handle(r.Started())) == ["CheckpointAction", "Emit", "Train"]
    assert kinds(m.handle(offer("b", 1))) == ["Fetch"], "fetching begins during training"
    assert kinds(m.handle(r.TrainingDone(1, "own1"))) == ["CheckpointAction", "SetTimer", "Publish"]
    assert m.handle(r.SnapshotReady("b", 1, "b1")) == []
    assert kinds(m.handle(offer("c", 1))) == ["Fetch"]
    assert kinds(m.handle(r.SnapshotReady("c", 1, "c1"))) == ["MergeAction"]
    after = m.handle(r.MergeDone(1))
    assert kinds(after) == ["Emit", "CheckpointAction", "Release", "Release", "Emit", "Train"]


def test_messages_of_no_concern_change_nothing() -> None:
    """Promise: late, repeated, foreign and unknown messages are ignored, in every phase."""
    m = machine()
    noise = [
        offer("stranger", 1),
        offer("me", 1),
        offer("b", 99),
        r.SnapshotReady("b", 1, "never asked for"),
        r.FetchFailure("c", 1, "c1", "gone"),
        r.Deadline(7),
        r.MergeDone(1),
        r.BasisChanged(1, BasisId(0, "b", "0")),
        r.TrainingDone(5, "x"),
    ]
    assert all(m.handle(event) == [] for event in noise)
    m.handle(r.Started())
    assert m.handle(r.Started()) == []
    assert all(m.handle(event) == [] for event in noise)
    m.handle(offer("b", 1))
    assert m.handle(offer("b", 1)) == [], "the same offer again"
    other = m.handle(offer("b", 1, root="other content"))
    assert kinds(other) == ["Emit"], "other content under an old (agent, round) is told, not taken"
    m.handle(r.TrainingDone(1, "own"))
    m.handle(r.SnapshotReady("b", 1, "b1"))
    assert m.handle(r.SnapshotReady("b", 1, "b1")) == []
    m.handle(r.PeerLost("c"))
    assert m.phase is Phase.MERGING
    assert all(m.handle(event) == [] for event in noise if not isinstance(event, r.MergeDone))


def test_the_deadline_counts_from_the_end_of_training() -> None:
    """Promise: however long an agent trains, no timer runs and nothing is given up; afterwards it waits for a deadline
    and no longer, and says for how long where it has heard nobody."""
    m = machine()
    assert "SetTimer" not in kinds(m.handle(r.Started()))
    assert m.handle(r.Deadline(1)) == [], "a stray timer ends nothing while it trains"
    assert kinds(m.handle(offer("b", 1))) == ["Fetch"]
    assert m.handle(r.SnapshotReady("b", 1, "b1")) == []
    actions = m.handle(r.TrainingDone(1, "own"))
    assert kinds(actions) == ["CheckpointAction", "SetTimer", "Publish"]
    assert actions[1] == r.SetTimer(1, 10.0)
    late, merge = m.handle(r.Deadline(1))
    assert isinstance(late, r.Emit)
    assert isinstance(merge, r.MergeAction)
    assert [p.peer for p in merge.parts] == ["b"]
    assert merge.own_weight == pytest.approx(0.75)

    m = machine()
    m.handle(r.Started())
    m.handle(r.TrainingDone(1, "own"))
    told = [action.fact for action in m.handle(r.Deadline(1)) if isinstance(action, r.Emit)]
    assert [fact.message for fact in told if isinstance(fact, events.Warned)] == [
        "no peer was heard in round 1 within 10 s of its training; own weights are kept"
    ]


def test_failed_fetch_and_lost_peer_end_the_wait() -> None:
    """A peer that cannot be had does not hold the round until its deadline; one that comes back is taken."""
    m = machine()
    m.handle(r.Started())
    m.handle(r.TrainingDone(1, "own"))
    m.handle(r.PeerLost("b"))
    assert kinds(m.handle(offer("b", 1))) == ["Fetch"]
    m.handle(offer("c", 1))
    assert m.handle(r.FetchFailure("c", 1, "c1", "damaged: block 3")) == []
    actions = m.handle(r.SnapshotReady("b", 1, "b1"))
    assert kinds(actions) == ["Emit", "MergeAction"]
    report = actions[0]
    assert isinstance(report, r.Emit)
    assert isinstance(report.fact, events.PeerLate)
    assert report.fact.reason == "damaged: block 3"


def test_early_offers_wait_for_their_round_and_are_bounded() -> None:
    """A peer ahead of us is remembered; one that floods us with rounds is not (no unbounded queue)."""
    m = machine(rounds=100)
    m.handle(r.Started())
    for number in range(2, 60):
        assert m.handle(replace(offer("b", number), oldest=2)) == []
    assert len(list(m._inbox.offers)) <= ROUNDS_KEPT
    m.handle(r.TrainingDone(1, "own"))
    m.handle(r.Deadline(1))
    actions = m.handle(r.MergeDone(1))
    assert any(isinstance(a, r.Fetch) and a.round == 2 for a in actions)


def test_smallest_basis_is_adopted_and_only_a_smaller_one() -> None:
    """Basis gossip: the smallest id among self and heard peers wins; peers in it need no alignment then."""
    m = machine()
    m.handle(r.Started())
    m.handle(r.TrainingDone(1, "own"))
    old = BasisId(0, "a", "0")
    for event in (offer("b", 1, basis=BasisId(0, "z", "0")), offer("c", 1, basis=old)):
        m.handle(event)
    m.handle(r.SnapshotReady("b", 1, "b1"))
    (adopt,) = m.handle(r.SnapshotReady("c", 1, "c1"))
    assert adopt == r.AdoptBasis(1, "c", "c1", old)
    report, merge = m.handle(r.BasisChanged(1, old, 0.9))
    assert isinstance(report, r.Emit)
    assert isinstance(merge, r.MergeAction)
    assert m.basis == old
    assert [(p.peer, p.same_basis) for p in merge.parts] == [("b", False), ("c", True)]


def test_a_peer_that_cannot_be_aligned_to_does_not_block_the_next_best() -> None:
    """A snapshot that is unfit (not finite, say) is skipped for adoption; the next smallest basis is tried."""
    m = machine()
    m.handle(r.Started())
    m.handle(r.TrainingDone(1, "own"))
    first, second = BasisId(0, "a", "0"), BasisId(0, "b", "0")
    m.handle(offer("b", 1, basis=first))
    m.handle(offer("c", 1, basis=second))
    m.handle(r.SnapshotReady("b", 1, "b1"))
    (adopt,) = m.handle(r.SnapshotReady("c", 1, "c1"))
    assert adopt == r.AdoptBasis(1, "b", "b1", first)
    (adopt,) = m.handle(r.BasisChanged(1, MINE))
    assert adopt == r.AdoptBasis(1, "c", "c1", second)
    (merge,) = m.handle(r.BasisChanged(1, MINE))
    assert isinstance(merge, r.MergeAction)
    assert m.basis == MINE
    assert not any(part.same_basis for part in merge.parts)


def test_a_peer_that_was_lost_and_is_back_is_tried_again() -> None:
    """After a failed fetch, the same offer again (a new connection) is fetched again, within the same deadline."""
    m = machine()
    m.handle(r.Started())
    m.handle(r.TrainingDone(1, "own"))
    m.handle(offer("b", 1))
    m.handle(r.FetchFailure("b", 1, "b1", "connection reset"))
    assert kinds(m.handle(offer("b", 1))) == ["Fetch"]
    assert m.handle(offer("b", 1)) == [], "not twice at once"
    m.handle(r.PeerLost("c"))
    actions = m.handle(r.SnapshotReady("b", 1, "b1"))
    merge = actions[-1]
    assert isinstance(merge, r.MergeAction)
    assert [part.peer for part in merge.parts] == ["b"]


def test_stop_ends_at_once() -> None:
    """Stop leaves in any phase, and nothing is done after it."""
    m = machine()
    m.handle(r.Started())
    assert m.handle(r.Stop("signal")) == [r.Exit("signal")]
    assert m.handle(r.TrainingDone(1, "own")) == []


def test_basis_ids_order_and_parse() -> None:
    """Order is (founding round, founder, nonce); text form reads back, founders with colons included."""
    assert BasisId(0, "z", "9") < BasisId(1, "a", "0") < BasisId(1, "b", "0") < BasisId(1, "b", "1")
    odd = BasisId(3, "lab:a:1", "ff")
    assert BasisId.parse(str(odd)) == odd
    with pytest.raises(ValueError, match="not a basis id"):
        BasisId.parse("nonsense")
