"""Mixing rules: their laws over random graphs, their limits, the checker, renormalisation."""

from __future__ import annotations

import math

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimat.errors import TopologyError
from dimat.topology import (
    CycleSchedule,
    Mixer,
    Setting,
    build_graph,
    check_matrix,
    make_schedule,
    mixing_matrix,
    push_sum_matrix,
    renormalise,
)
from dimat.topology.mixing import links_of, push_sum_mass


@st.composite
def graphs(draw: st.DrawFn, directed: bool = False) -> nx.Graph:
    """Connected random graphs: a random tree (or a cycle, if directed) and more edges."""
    n = draw(st.integers(1, 9))
    names = [f"agent-{i}" for i in range(n)]
    graph = nx.DiGraph() if directed else nx.Graph()
    graph.add_nodes_from(names)
    for i in range(1, n):
        graph.add_edge(names[i - 1 if directed else draw(st.integers(0, i - 1))], names[i])
    if directed and n > 1:
        graph.add_edge(names[-1], names[0])
    pairs = st.tuples(st.sampled_from(names), st.sampled_from(names))
    graph.add_edges_from(pair for pair in draw(st.lists(pairs, max_size=12)) if pair[0] != pair[1])
    return graph


@settings(max_examples=60, deadline=None)
@given(graphs(), st.sampled_from(["metropolis", "max-degree"]), st.floats(0, 0.99))
def test_symmetric_rules_are_doubly_stochastic(graph: nx.Graph, name: str, lazy: float) -> None:
    """Law: symmetric, rows and columns sum to 1, support = links and self, also lazily (Xiao, Boyd & Lall 2005)."""
    weights = mixing_matrix(graph, Mixer(name, {"lazy": lazy}))
    check_matrix(weights, graph, doubly=True)
    assert np.allclose(weights, weights.T, atol=1e-15)


@settings(max_examples=40, deadline=None)
@given(graphs(), st.data())
def test_samples_keep_the_weighted_mean(graph: nx.Graph, data: st.DataObject) -> None:
    """Law: s W = s, so the sample-weighted mean is kept; equal counts give Metropolis; complete graph is FedAvg."""
    counts = data.draw(st.lists(st.integers(1, 10**6), min_size=len(graph), max_size=len(graph)))
    weights = mixing_matrix(graph, Mixer("samples", samples=dict(zip(graph, counts, strict=True))))
    check_matrix(weights, graph)
    s = np.array(counts) / sum(counts)
    assert np.allclose(s @ weights, s, atol=1e-12)
    equal = mixing_matrix(graph, Mixer("samples", samples=dict.fromkeys(graph, 7)))
    assert np.allclose(equal, mixing_matrix(graph), atol=1e-12)
    full = nx.complete_graph(list(graph))
    fedavg = mixing_matrix(full, Mixer("samples", samples=dict(zip(full, counts, strict=True))))
    assert np.allclose(fedavg, s, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(graphs(directed=True), st.sampled_from(["metropolis", "max-degree", "uniform", "push-sum"]))
def test_rules_on_directed_graphs_are_row_stochastic(graph: nx.DiGraph, name: str) -> None:
    """Law: rows sum to 1 and cover in-links and self on any directed graph."""
    check_matrix(mixing_matrix(graph, Mixer(name)), graph)


def test_values_by_hand() -> None:
    """Reference: computed by hand on the path a–b–c (degrees 1, 2, 1)."""
    path = build_graph("path", ["a", "b", "c"])
    third, half = 1 / 3, 1 / 2
    assert np.allclose(mixing_matrix(path), [[2 / 3, third, 0], [third, third, third], [0, third, 2 / 3]])
    assert np.allclose(mixing_matrix(path, Mixer("max-degree")), mixing_matrix(path))
    uniform = mixing_matrix(path, Mixer("uniform"))
    assert np.allclose(uniform, [[half, half, 0], [third, third, third], [0, half, half]])
    lazy = mixing_matrix(path, Mixer("uniform", {"lazy": 0.5}))
    assert np.allclose(lazy, 0.5 * np.eye(3) + 0.5 * uniform)
    samples = mixing_matrix(path, Mixer("samples", samples={"a": 1, "b": 2, "c": 3}))
    assert np.allclose(samples, [[2 / 3, 1 / 3, 0], [1 / 6, 1 / 3, 1 / 2], [0, 1 / 3, 2 / 3]])


@settings(max_examples=25, deadline=None)
@given(graphs(directed=True))
def test_push_sum_reaches_the_exact_average(graph: nx.DiGraph) -> None:
    """Reference: Kempe et al. 2003; the product of the rows is diag(1/m) A^r and tends to 1/n, any strong digraph."""
    n = len(graph)
    columns = push_sum_matrix(graph)
    assert np.allclose(columns.sum(axis=0), 1)
    schedule = CycleSchedule([graph], Mixer("push-sum"))
    assert schedule.period is None
    product = np.eye(n)
    for number in range(1, 6):
        check_matrix(schedule.mixing(number), graph)
        product = schedule.mixing(number) @ product
    power = np.linalg.matrix_power(columns, 5)
    assert np.allclose(product, power / power.sum(axis=1, keepdims=True))
    for number in range(6, 1500):
        product = schedule.mixing(number) @ product
        if number % 50 == 0 and np.allclose(product, 1 / n, atol=1e-9):
            break
    assert np.allclose(product, 1 / n, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(graphs(directed=True), st.sampled_from([0.0, 0.1, 0.5, 0.9]) | st.floats(0, 0.99))
def test_lazy_push_sum_keeps_all_mass(graph: nx.DiGraph, lazy: float) -> None:
    """Law: the shares are lazy, A <- lazy·I + (1 - lazy)·A, so in every round Σ m = n and Σ m_i x_i = Σ x_i(0), the
    masses are A^r 1, and the product of the rows is diag(1/m) A^r."""
    n, links = len(graph), links_of(graph)
    columns = lazy * np.eye(n) + (1 - lazy) * push_sum_matrix(graph)
    schedule = CycleSchedule([graph], Mixer("push-sum", {"lazy": lazy}))
    mass, power, product = [1.0] * n, np.eye(n), np.eye(n)
    for number in range(1, 9):
        weights = schedule.mixing(number)
        check_matrix(weights, graph)
        mass, power, product = push_sum_mass(links, mass, lazy), columns @ power, weights @ product
        assert sum(mass) == pytest.approx(n, abs=1e-12)
        assert np.allclose(mass, power.sum(axis=1), rtol=0, atol=1e-12)
        assert np.allclose(mass @ product, 1, rtol=0, atol=1e-12)
        assert np.allclose(product, power / power.sum(axis=1, keepdims=True), rtol=0, atol=1e-12)


STRONG = {
    "one graph": [[(0, 1), (1, 2), (2, 3), (3, 0), (0, 2)]],
    "strong only together": [[(0, 1), (2, 3), (3, 4)], [(1, 2), (4, 0), (0, 3)]],
}


@pytest.mark.parametrize("lazy", [0.0, 0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("name", STRONG)
def test_lazy_push_sum_reaches_the_exact_average(name: str, lazy: float) -> None:
    """Law: lazy or not, all rows of the product tend to 1/n where out-degrees differ."""
    n = 1 + max(map(max, STRONG[name][0]))
    cycle = [nx.DiGraph() for _ in STRONG[name]]
    for graph, edges in zip(cycle, STRONG[name], strict=True):
        graph.add_nodes_from(f"agent-{i}" for i in range(n))
        graph.add_edges_from((f"agent-{i}", f"agent-{j}") for i, j in edges)
    schedule = CycleSchedule(cycle, Mixer("push-sum", {"lazy": lazy}))
    product = np.eye(n)
    for number in range(1, 1001):
        product = schedule.mixing(number) @ product
    assert np.allclose(product, 1 / n, rtol=0, atol=1e-9)


def test_push_sum_rounds_in_any_order() -> None:
    """Law: a round's row does not depend on which rounds were asked before."""
    graph = nx.DiGraph([("a", "b"), ("b", "c"), ("c", "a"), ("a", "c")])
    forward = CycleSchedule([graph], Mixer("push-sum"))
    rows = [forward.row(number, "c") for number in range(1, 20)]
    backward = CycleSchedule([graph], Mixer("push-sum"))
    assert [backward.row(number, "c") for number in range(19, 0, -1)] == rows[::-1]
    assert rows[0] != rows[5]


MATRIX_ERRORS = [
    ([[0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]], r"row 'b' gives no weight to 'b'"),
    ([[0.5, 0.5, 0], [0.2, 0.2, 0.2], [0, 0.5, 0.5]], r"row 'b' sums to 0.6, not 1"),
    ([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0, 0.5, 0.5]], r"row 'a' weighs 'c', which does not send to it"),
    ([[0.5, 0.5, 0], [-0.2, 0.2, 1.0], [0, 0.5, 0.5]], r"row 'b' gives 'a' the weight -0.2"),
    ([[0.5, 0.5, 0], [0.2, 0.2, math.nan], [0, 0.5, 0.5]], r"row 'b' gives 'c' the weight nan"),
    ([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0.5, 0.5]], r"row 'b' gives no weight to 'c'"),
]


@pytest.mark.parametrize(("values", "message"), [*MATRIX_ERRORS])
def test_checker_names_the_row(values: list, message: str) -> None:
    """Reference: the brief; the same faults are found in an explicit matrix and by `check_matrix`."""
    path = build_graph("path", ["a", "b", "c"])
    with pytest.raises(TopologyError, match=message):
        check_matrix(np.array(values), path)
    with pytest.raises(TopologyError, match=message):
        mixing_matrix(path, Mixer("matrix", {"values": values}))


def test_wrong_shapes_and_columns() -> None:
    """Reference: the brief."""
    path = build_graph("path", ["a", "b", "c"])
    with pytest.raises(TopologyError, match="2 × 2, there are 3 agents"):
        check_matrix(np.eye(2), path)
    with pytest.raises(TopologyError, match="2 rows, there are 3"):
        mixing_matrix(path, Mixer("matrix", {"values": [[1, 0], [0, 1]]}))
    with pytest.raises(TopologyError, match="row 'a' has 1 numbers, not 3"):
        mixing_matrix(path, Mixer("matrix", {"values": [[1], [0, 1], [1]]}))
    with pytest.raises(TopologyError, match="row 'a' holds something that is not a number"):
        mixing_matrix(path, Mixer("matrix", {"values": [["x", 0, 0]] * 3}))
    with pytest.raises(TopologyError, match=r"column 'a' sums to 0\.8"):
        check_matrix(mixing_matrix(path, Mixer("uniform")), path, doubly=True)


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        (Mixer("metropolitan"), "unknown mixing 'metropolitan'; did you mean 'metropolis'"),
        (Mixer("metropolis", {"lazy": 1.0}), r"'lazy' of mixing 'metropolis' must be in \[0, 1\), not 1.0"),
        (Mixer("metropolis", {"lazi": 0.5}), "mixing 'metropolis' has no option 'lazi'"),
        (Mixer("samples"), "needs the samples of each agent"),
        (Mixer("samples", samples={"a": 1, "b": 2}), "samples of agent 'c', not None"),
        (Mixer("samples", samples={"a": 1, "b": 2, "c": 0}), "samples of agent 'c', not 0"),
        (Mixer("matrix"), "needs option `values`"),
    ],
)
def test_errors_of_rules(mixer: Mixer, message: str) -> None:
    """Reference: the brief; also met when a schedule is built, not only in the first round."""
    path = build_graph("path", ["a", "b", "c"])
    with pytest.raises(TopologyError, match=message):
        mixing_matrix(path, mixer)
    with pytest.raises(TopologyError, match=message):
        make_schedule(Setting(tuple(path), path, mixer))


def test_samples_refuse_directed_links() -> None:
    """Law: reversibility needs both directions."""
    with pytest.raises(TopologyError, match="undirected"):
        mixing_matrix(build_graph("exponential", 5), Mixer("samples", samples={}))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=8), st.data())
def test_renormalise(raw: list, data: st.DataObject) -> None:
    """Law (DESIGN): rows sum to 1, peers keep their weight, missing mass goes to self; all present = unchanged."""
    row = {f"a{i}": x / sum(raw) for i, x in enumerate(raw)}
    present = set(data.draw(st.lists(st.sampled_from(sorted(row)))))
    new = renormalise(row, present | {"stranger"}, "a0")
    assert sum(new.values()) == pytest.approx(1, abs=1e-12)
    assert new.keys() == present | {"a0"}
    assert all(new[peer] == row[peer] for peer in present - {"a0"})
    assert renormalise(row, row.keys(), "a0") == row
    assert renormalise(row, (), "a0") == ({"a0": 1.0} if len(row) > 1 else row)


def test_renormalise_needs_self() -> None:
    """Reference: the brief, the row holds the agent itself."""
    with pytest.raises(TopologyError, match="does not contain the agent itself"):
        renormalise({"b": 1.0}, {"b"}, "a")
