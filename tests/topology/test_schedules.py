"""Schedules: rows, matrices and neighbours agree; rounds are independent of order; who may meet whom."""

from __future__ import annotations

import time
from itertools import pairwise
from math import ceil, log2

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimat.errors import TopologyError
from dimat.topology import (
    CycleSchedule,
    Mixer,
    Schedule,
    Setting,
    build_graph,
    check_matrix,
    check_schedule,
    make_schedule,
    models_sent,
)

NAMES = ["static", "one-peer-exponential", "random-matching", "epidemic", "base-k"]


def schedule(name: str, n: int, seed: int = 0, graph: str | None = None, **options: object) -> Schedule:
    base = build_graph(graph or "ring", n) if graph or name == "static" else None
    return make_schedule(Setting(tuple(f"agent-{i}" for i in range(n)), base, seed=seed), name, options)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NAMES), st.integers(1, 12), st.integers(1, 40), st.integers(0, 99))
def test_rows_matrix_graph_and_neighbours_agree(name: str, n: int, number: int, seed: int) -> None:
    """Law: row == matrix row == sparse row; support = in-neighbours and self; out-neighbours are their inverse."""
    plan = schedule(name, n, seed)
    weights = plan.mixing(number)
    graph = plan.graph(number)
    check_matrix(weights, graph)
    assert np.array_equal(weights, plan.sparse_mixing(number).toarray())
    for i, agent in enumerate(plan.names):
        row = plan.row(number, agent)
        assert [row.get(peer, 0.0) for peer in plan.names] == weights[i].tolist()
        assert tuple(row) == (agent, *plan.in_neighbours(number, agent))
        assert sum(row.values()) == pytest.approx(1, abs=1e-12)
        assert all(agent in plan.out_neighbours(number, peer) for peer in plan.in_neighbours(number, agent))
        into = graph.predecessors(agent) if graph.is_directed() else graph.neighbors(agent)
        assert set(into) == set(plan.in_neighbours(number, agent))
        assert set(plan.peers(agent)) >= {*plan.in_neighbours(number, agent), *plan.out_neighbours(number, agent)}
    if plan.period:
        assert np.array_equal(weights, plan.mixing(number + plan.period))


@pytest.mark.parametrize("name", NAMES)
def test_rounds_can_be_asked_in_any_order(name: str) -> None:
    """Law: any round is computed on its own, the same under the same seed."""
    forward, backward = schedule(name, 9, seed=4), schedule(name, 9, seed=4)
    there = [forward.mixing(number) for number in range(1, 31)]
    back = [backward.mixing(number) for number in range(30, 0, -1)][::-1]
    assert all(np.array_equal(one, two) for one, two in zip(there, back, strict=True))


@pytest.mark.parametrize("name", ["random-matching", "epidemic"])
def test_seeds_and_rounds_draw_apart(name: str) -> None:
    """Law: other rounds and other seeds give other draws."""
    first, other = schedule(name, 30, seed=1), schedule(name, 30, seed=2)
    assert not np.array_equal(first.mixing(1), other.mixing(1))
    assert all(not np.array_equal(first.mixing(a), first.mixing(b)) for a, b in pairwise(range(1, 9)))


def test_draws_are_pinned() -> None:
    """Golden values: all agents of a network must draw the same round on any platform and version."""
    assert schedule("random-matching", 6, seed=7).row(3, "agent-0") == {"agent-0": 0.5, "agent-2": 0.5}
    assert schedule("epidemic", 8, seed=7, s=2).out_neighbours(3, "agent-0") == ("agent-2", "agent-5")


@pytest.mark.parametrize("n", [2, 3, 5, 8, 10])
def test_one_peer_exponential(n: int) -> None:
    """Reference: Ying et al. 2021; period ceil(log2 n), i sends to i + 2^t, weight 1/2, doubly stochastic."""
    plan = schedule("one-peer-exponential", n)
    assert plan.period == ceil(log2(n))
    for number in range(1, 2 * plan.period + 1):
        hop = 2 ** ((number - 1) % plan.period)
        assert plan.out_neighbours(number, "agent-1") == (f"agent-{(1 + hop) % n}",)
        assert set(plan.row(number, "agent-0").values()) == {0.5}
        check_matrix(plan.mixing(number), plan.graph(number), doubly=True)
    assert models_sent(plan) == 1


@pytest.mark.parametrize("n", [2, 7, 8])
def test_random_matching(n: int) -> None:
    """Law: everyone has one partner (one sits out if n is odd) and takes half; symmetric."""
    plan = schedule("random-matching", n)
    for number in range(1, 10):
        weights = plan.mixing(number)
        assert np.array_equal(weights, weights.T)
        assert np.count_nonzero(np.diag(weights) == 0.5) == n - n % 2
    met = {plan.in_neighbours(number, "agent-0") for number in range(1, 120)}
    assert met - {()} == {(f"agent-{i}",) for i in range(1, n)}


def test_random_matching_stays_on_a_graph() -> None:
    """Law: on a graph the pairs are a maximal matching of its links."""
    ring = build_graph("ring", 9)
    plan = schedule("random-matching", 9, graph="ring")
    for number in range(1, 20):
        drawn = plan.graph(number)
        assert set(drawn.edges()) <= set(ring.edges())
        assert nx.is_maximal_matching(ring, set(drawn.edges()))
    assert plan.peers("agent-0") == ("agent-1", "agent-8")


def test_epidemic() -> None:
    """Reference: De Vos et al. 2023; everyone sends to s others, receivers take the uniform mean."""
    plan = schedule("epidemic", 12, s=3)
    for number in range(1, 10):
        links = plan.links(number)
        assert all(len(set(sent)) == 3 and i not in sent for i, sent in enumerate(links.targets))
        for agent in plan.names:
            row = plan.row(number, agent)
            assert set(row.values()) == {1 / len(row)}
    counts = np.zeros(12)
    for number in range(1, 401):
        counts[list(plan.links(number).targets[5])] += 1
    assert counts[5] == 0
    assert abs(np.delete(counts, 5) - 400 * 3 / 11).max() < 45  # about 5 standard deviations of a fair draw
    ring = schedule("epidemic", 9, graph="ring", s=1)
    assert all(ring.out_neighbours(number, "agent-0")[0] in ("agent-1", "agent-8") for number in range(1, 9))


def test_cycle_takes_graphs_in_turn() -> None:
    """Law: round t uses graph (t-1) mod length; graphs may be disconnected, their union may not."""
    names = list("abcd")
    one, two = nx.Graph(), nx.Graph()
    for graph, edges in ((one, [("a", "b"), ("c", "d")]), (two, [("b", "c"), ("a", "d")])):
        graph.add_nodes_from(names)
        graph.add_edges_from(edges)
    plan = CycleSchedule([one, two], Mixer())
    assert plan.period == 2
    assert plan.row(1, "a") == plan.row(3, "a") == {"a": 0.5, "b": 0.5}
    assert plan.row(2, "a") == {"a": 0.5, "d": 0.5}
    assert nx.utils.edges_equal(plan.union().edges(), nx.cycle_graph(names).edges())
    with pytest.raises(TopologyError, match=r"2 components: \{a, b\}, \{c, d\}"):
        CycleSchedule([one, one], Mixer())
    with pytest.raises(TopologyError, match="same agents in the same order"):
        CycleSchedule([one, build_graph("ring", 4)], Mixer())


def test_ten_thousand_agents_need_no_matrix() -> None:
    """Reference: the brief; rows of 10,000 agents are cheap (bounds are generous for a slow, busy machine)."""
    n = 10_000
    names = tuple(f"agent-{i}" for i in range(n))
    for name in ("one-peer-exponential", "random-matching", "epidemic", "base-k"):
        plan = make_schedule(Setting(names), name)
        plan.links(5)
        start = time.perf_counter()
        for i in range(0, n, 100):
            assert len(plan.row(5, names[i])) <= 30
        assert time.perf_counter() - start < 0.5, name


@pytest.mark.parametrize(
    ("name", "graph", "options", "mixer", "message"),
    [
        ("statics", "ring", {}, Mixer(), "unknown schedule 'statics'; did you mean 'static'"),
        ("static", "ring", {"k": 2}, Mixer(), "schedule 'static' has no option 'k'"),
        ("static", None, {}, Mixer(), "needs a graph"),
        ("base-k", None, {"k": 0}, Mixer(), "at least 1, not 0"),
        ("base-k", None, {"k": 1.5}, Mixer(), "Input should be a valid integer"),
        ("base-k", None, {}, Mixer("uniform"), "weights of its own; leave out mixing 'uniform'"),
        ("one-peer-exponential", None, {}, Mixer("metropolis", {"lazy": 0.5}), "weights of its own"),
        ("epidemic", None, {"s": 7}, Mixer(), "from 1 to 6, not 7"),
        ("base-k", "star", {}, Mixer(), "needs the link .* which the graph does not have; leave the graph out"),
        ("one-peer-exponential", "ring", {}, Mixer(), "needs the link agent-0–agent-2"),
        ("random-matching", "exponential", {}, Mixer(), "needs undirected links"),
        ("cycle", None, {}, Mixer(), "needs option graphs"),
    ],
)
def test_errors(name: str, graph: str | None, options: dict, mixer: Mixer, message: str) -> None:
    """Reference: the brief, one clear line each."""
    base = build_graph(graph, 7) if graph else None
    names = tuple(f"agent-{i}" for i in range(7))
    with pytest.raises(TopologyError, match=message):
        make_schedule(Setting(names, base, mixer), name, options)


def test_unknown_rounds_and_agents() -> None:
    """Reference: rounds count from 1, agents are those of the topology."""
    plan = schedule("static", 5)
    with pytest.raises(TopologyError, match="no round 0"):
        plan.row(0, "agent-0")
    with pytest.raises(TopologyError, match="unknown agent 'agent-9'"):
        plan.row(1, "agent-9")
    check_schedule(plan)
