"""Push-sum weights (Kempe, Dobra & Gehrke 2003) with running sums (Hadjicostis et al. 2016). References: the laws
of conservation, and the exact mean that averaging on a directed graph must tend to."""

from __future__ import annotations

import math
import random

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimat.agent.protocol.plan import PushShares
from dimat.agent.protocol.push_sum import SMALLEST, PushSum


class Net:
    """Agents 0 … n-1 on a directed graph, each with a ledger and one number; a step is a push or a delivery."""

    def __init__(self, graph: nx.DiGraph, values: list[float]) -> None:
        self.graph = graph
        self.ledgers = {a: PushSum() for a in graph}
        self.values = dict(zip(graph, values, strict=True))
        self.published = dict(self.values)

    def push(self, a: int) -> None:
        share = 1 / (self.graph.out_degree(a) + 1)
        readers = {str(b): share for b in self.graph.successors(a)}
        self.ledgers[a].push(PushShares(1 - share * len(readers), readers))
        self.published[a] = self.values[a]

    def offer(self, a: int, b: int) -> float:
        """What `a` says that it has sent `b` in all."""
        return self.ledgers[a].sent.get(str(b), 0.0)

    def deliver(self, b: int, peers: list[int]) -> None:
        """`b` merges what `peers` published last."""
        pushed = {str(a): self.offer(a, b) for a in peers}
        before = self.ledgers[b].weight
        own, mixing = self.ledgers[b].mixing(pushed)
        assert own + math.fsum(mixing.values()) == pytest.approx(1, abs=1e-12)
        assert min([own, *mixing.values()]) >= 0
        self.values[b] = own * self.values[b] + sum(mixing[str(a)] * self.published[a] for a in peers)
        self.ledgers[b].take(pushed)
        # own weight is what one had, as a part of what one has now
        assert own * self.ledgers[b].weight == pytest.approx(before, rel=1e-9)

    def total(self) -> float:
        """All weight there is: held by agents, or sent and not taken in yet."""
        under_way = sum(
            self.ledgers[a].sent.get(str(b), 0.0) - self.ledgers[b].taken.get(str(a), 0.0) for a, b in self.graph.edges
        )
        return sum(ledger.weight for ledger in self.ledgers.values()) + under_way


@st.composite
def digraphs(draw: st.DrawFn) -> nx.DiGraph:
    """A strongly connected directed graph: a cycle and any edges more."""
    n = draw(st.integers(2, 6))
    graph = nx.DiGraph((i, (i + 1) % n) for i in range(n))
    graph.add_edges_from(draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=8)))
    graph.remove_edges_from(list(nx.selfloop_edges(graph)))
    return graph


@given(graph=digraphs(), data=st.data())
def test_weight_is_never_lost_only_late(graph: nx.DiGraph, data: st.DataObject) -> None:
    """Whatever is pushed and whichever deliveries are lost, late or repeated: held weight + weight under way = n,
    sums only rise, and nobody takes in more than was sent."""
    net = Net(graph, [0.0] * len(graph))
    agents = st.sampled_from(sorted(graph))
    for _ in range(data.draw(st.integers(1, 40))):
        a = data.draw(agents)
        before = {i: (dict(x.sent), dict(x.taken)) for i, x in net.ledgers.items()}
        if data.draw(st.booleans()):
            net.push(a)
        else:
            net.deliver(a, [b for b in sorted(graph.predecessors(a)) if data.draw(st.booleans())])
        assert net.total() == pytest.approx(len(graph), rel=1e-12)
        for i, ledger in net.ledgers.items():
            for sums, old in ((ledger.sent, before[i][0]), (ledger.taken, before[i][1])):
                assert all(sums[peer] >= total for peer, total in old.items())
            assert ledger.weight > 0
        for a, b in graph.edges:
            assert net.ledgers[b].taken.get(str(a), 0.0) <= net.offer(a, b)


@settings(max_examples=40)  # each is 400 rounds
@given(graph=digraphs(), data=st.data())
def test_without_losses_all_tend_to_the_mean(graph: nx.DiGraph, data: st.DataObject) -> None:
    """Synchronous rounds on any strongly connected directed graph: Σ yθ is conserved, and θ tends to the mean of the
    first values, though no row and no column of the mixing is doubly stochastic."""
    values = data.draw(st.lists(st.floats(-10, 10), min_size=len(graph), max_size=len(graph)))
    net = Net(graph, values)
    for _ in range(400):
        for a in graph:
            net.push(a)
        held = dict(net.published)
        for b in graph:
            net.published = held
            net.deliver(b, sorted(graph.predecessors(b)))
        mass = sum(net.ledgers[a].weight * net.values[a] for a in graph)
        assert mass == pytest.approx(sum(values), abs=1e-9)
    mean = sum(values) / len(values)
    assert list(net.values.values()) == pytest.approx([mean] * len(graph), abs=1e-6)


@pytest.mark.xfail(strict=True, reason="1 - sum of shares falls to -2e-16 where own weight is tiny")
def test_mixing_sums_to_1_whatever_the_weights() -> None:
    """2,000 random ledgers with own weights down to the smallest, as after a long time of being unheard, and sums that
    have risen or fallen: no weight is negative or over 1, and all sum to 1."""
    chance = random.Random(0)
    for _ in range(2000):
        ledger = PushSum()
        ledger.weight = max(10 ** chance.uniform(-200, 2), SMALLEST)
        names = [str(i) for i in range(chance.randrange(9))]
        ledger.taken = {name: chance.random() for name in names if chance.random() < 0.5}
        pushed = {name: chance.random() for name in names}
        own, mixing = ledger.mixing(pushed)
        assert own + math.fsum(mixing.values()) == pytest.approx(1, abs=1e-12)
        assert all(0 <= share <= 1 for share in (own, *mixing.values()))
        assert all((mixing[name] > 0) == (total > ledger.taken.get(name, 0.0)) for name, total in pushed.items())


def test_what_was_missed_comes_with_the_next_snapshot() -> None:
    """By hand: two pushes of halves, the first one lost. The reader takes 1/2 + 1/4 in at once, and nothing twice."""
    one, two = PushSum(), PushSum()
    for _ in range(2):
        one.push(PushShares(0.5, {"two": 0.5}))
    assert (one.weight, one.sent) == (0.25, {"two": 0.75})
    assert two.mixing({"one": 0.75}) == (1 / 1.75, {"one": 0.75 / 1.75})
    two.take({"one": 0.75})
    two.take({"one": 0.75})
    assert two.weight == 1.75
    assert two.mixing({"one": 0.75}) == (1.0, {"one": 0.0})


def test_a_peer_that_lost_its_disk_counts_from_there() -> None:
    """By hand: a sum that has fallen is a new beginning. What it says then gives nothing, and what comes after it in
    full: no weight is taken twice, none is waited for until the old sum is passed."""
    reader = PushSum()
    reader.take({"peer": 5.0})
    assert reader.weight == 6.0
    assert reader.mixing({"peer": 0.5}) == (1.0, {"peer": 0.0})
    reader.take({"peer": 0.5})
    assert (reader.weight, reader.taken) == (6.0, {"peer": 0.5})
    own, mixing = reader.mixing({"peer": 0.75})
    assert mixing["peer"] == pytest.approx(0.25 / 6.25)
    reader.take({"peer": 0.75})
    assert reader.weight == 6.25
    assert own == pytest.approx(6 / 6.25)


def test_weight_never_runs_out() -> None:
    """A reader that is gone for good takes shares for ever: 10,000 rounds leave a positive weight, and who is heard
    then still counts by the rule; mixing stays finite and sums to 1."""
    ledger = PushSum()
    for _ in range(10_000):
        ledger.push(PushShares(0.5, {"gone": 0.5}))
    assert ledger.weight == SMALLEST
    own, mixing = ledger.mixing({"peer": 1.0})
    assert 0 <= own <= 1
    assert own + mixing["peer"] == 1
    assert ledger.mixing({}) == (1.0, {})
