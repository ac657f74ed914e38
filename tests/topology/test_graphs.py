"""Generators by name: degrees, counts, options and everything that cannot exist."""

from __future__ import annotations

import subprocess
import sys

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimat.errors import TopologyError
from dimat.topology import build_graph, check, diameter, list_graphs, list_mixings, list_schedules

# name, n, options, edges, degrees, diameter: from the definitions of the graphs
COUNTS = [
    ("complete", 6, {}, 15, {5}, 1),
    ("ring", 7, {}, 7, {2}, 3),
    ("ring", 2, {}, 1, {1}, 1),
    ("path", 6, {}, 5, {1, 2}, 5),
    ("star", 6, {}, 5, {1, 5}, 2),
    ("torus", 16, {}, 32, {4}, 4),
    ("torus", 12, {"rows": 2}, 18, {3}, 4),
    ("torus", 12, {"cols": 4}, 24, {4}, 3),
    ("torus", 15, {"rows": 5, "cols": 3}, 30, {4}, 3),
    ("torus", 4, {}, 4, {2}, 2),
    ("hypercube", 16, {}, 32, {4}, 4),
    ("exponential", 10, {}, 40, {8}, 3),
    ("random-regular", 12, {"degree": 3}, 18, {3}, None),
    ("erdos-renyi", 9, {"p": 1}, 36, {8}, 1),
    ("watts-strogatz", 10, {"k": 4, "p": 0.0}, 20, {4}, 3),
    ("bipartite", 7, {}, 12, {3, 4}, 2),
    ("bipartite", 7, {"left": 1}, 6, {1, 6}, 2),
    ("two-clusters", 9, {}, 10 + 6 + 1, {3, 4, 5}, 3),
    ("two-clusters", 8, {"bridges": 2, "left": 5}, 10 + 3 + 2, {2, 3, 4, 5}, 3),
]


@pytest.mark.parametrize(("name", "n", "options", "edges", "degrees", "longest"), COUNTS)
def test_counts(name: str, n: int, options: dict, edges: int, degrees: set, longest: int | None) -> None:
    """Reference: edge counts, degrees and diameters by each graph's definition; networkx for the diameter."""
    graph = build_graph(name, n, 0, options)
    assert list(graph) == [f"agent-{i}" for i in range(n)]
    assert graph.number_of_edges() == edges
    assert {degree for _, degree in graph.degree()} <= degrees
    assert max(degree for _, degree in graph.degree()) == max(degrees)
    assert diameter(graph) == nx.diameter(graph)
    if longest is not None:
        assert diameter(graph) == longest


@pytest.mark.parametrize("name", [entry.name for entry in list_graphs()])
def test_one_agent_has_no_links(name: str) -> None:
    """Reference: the brief, n = 1 is allowed everywhere."""
    graph = build_graph(name, 1)
    assert list(graph) == ["agent-0"]
    assert graph.number_of_edges() == 0
    assert diameter(graph) == 0


def test_exponential_sends_by_powers_of_two() -> None:
    """Reference: Ying et al. 2021, i sends to i + 2^k mod n."""
    graph = build_graph("exponential", 10)
    assert list(graph.successors("agent-7")) == ["agent-1", "agent-5", "agent-8", "agent-9"]
    assert graph.is_directed()


@pytest.mark.parametrize(
    ("name", "n", "options", "message"),
    [
        ("rings", 5, {}, r"unknown graph 'rings'; did you mean 'ring'"),
        ("ring", 5, {"degree": 3}, r"graph 'ring' has no option 'degree' \(it has none\)"),
        ("random-regular", 6, {"degre": 3}, r"graph 'random-regular' has no option 'degre'; did you mean 'degree'\?"),
        ("random-regular", 5, {"degree": 3}, r"5 × 3 is odd"),
        ("random-regular", 5, {"degree": 5}, r"degree 5 is impossible with 5 agents; use 1 to 4"),
        ("random-regular", 6, {"degree": 1}, r"1-regular .* not connected"),
        ("random-regular", 6, {"degree": "3"}, r"option 'degree': Input should be a valid integer \(got '3'\)"),
        ("random-regular", 6, {"degree": True}, r"Input should be a valid integer \(got True\)"),
        ("hypercube", 12, {}, r"power of two agents, not 12; use 8 or 16"),
        ("torus", 7, {}, r"use graph 'ring'"),
        ("torus", 12, {"rows": 5}, r"does not divide 12"),
        ("torus", 12, {"rows": 3, "cols": 3}, r"does not divide|has 9 agents, not 12"),
        ("torus", 12, {"rows": 3, "cols": 2}, r"has 6 agents, not 12"),
        ("watts-strogatz", 1000, {"k": 998, "p": 1.0}, r"few free places, about 5e\+08 looks in all"),
        ("erdos-renyi", 12, {"p": 0.05}, r"none of 100 draws is connected"),
        ("erdos-renyi", 50, {"p": 0.001}, r"about 48 of 50 agents would have no link at all.*p of 0\.16 or more"),
        ("erdos-renyi", 10_000, {"p": 1e-300}, r"about 10,000 of 10,000 agents would have no link at all"),
        ("erdos-renyi", 5, {"p": 1.5}, r"must be in \(0, 1\]"),
        ("watts-strogatz", 10, {"k": 3}, r"must be even"),
        ("watts-strogatz", 10, {"p": -0.1}, r"must be in \[0, 1\]"),
        ("bipartite", 4, {"left": 4}, r"from 1 to 3"),
        ("two-clusters", 4, {"bridges": 3}, r"from 1 to 2"),
        ("two-clusters", 4, {"left": 0}, r"from 1 to 3"),
        ("ring", 0, {}, r"at least one agent"),
    ],
)
def test_what_cannot_exist_is_said_in_one_line(name: str, n: int, options: dict, message: str) -> None:
    """Reference: the brief's list of errors."""
    with pytest.raises(TopologyError, match=message) as caught:
        build_graph(name, n, 0, options)
    assert "\n" not in str(caught.value)


def test_check_names_components_loops_and_parallel_edges() -> None:
    """Reference: the brief; components are shown in agent order."""
    with pytest.raises(TopologyError, match=r"3 components: \{a, b\}, \{c\}, \{d\}"):
        check(_with(nx.Graph(), ["a", "b", "c", "d"], [("a", "b")]))
    with pytest.raises(TopologyError, match=r"2 strongly connected components: \{a\}, \{b\}"):
        check(_with(nx.DiGraph(), ["a", "b"], [("a", "b")]))
    with pytest.raises(TopologyError, match="linked to itself"):
        check(_with(nx.Graph(), ["a"], [("a", "a")]))
    with pytest.raises(TopologyError, match="parallel"):
        check(_with(nx.MultiGraph(), ["a", "b"], [("a", "b"), ("a", "b")]))
    with pytest.raises(TopologyError, match="at least one agent"):
        check(nx.Graph())


def _with(graph: nx.Graph, nodes: list, edges: list) -> nx.Graph:
    graph.add_nodes_from(nodes)
    graph.add_edges_from(edges)
    return graph


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["random-regular", "erdos-renyi", "watts-strogatz"]), st.integers(6, 24), st.integers(0, 2**40))
def test_random_graphs_repeat_under_their_seed(name: str, n: int, seed: int) -> None:
    """Law: same seed, same graph, always connected; k-regular where it says so."""
    one, two = (build_graph(name, n, seed) for _ in range(2))
    assert list(one.edges()) == list(two.edges())
    assert nx.is_connected(one)
    if name == "random-regular":
        assert {degree for _, degree in one.degree()} == {4}


@pytest.mark.parametrize(("n", "degree"), [(31, 30), (50, 48), (100, 90), (300, 298)])
def test_dense_random_regular_graphs_are_drawn_too(n: int, degree: int) -> None:
    """Law: everybody has as many neighbours. A draw of pairs hardly ever ends well there."""
    graph = build_graph("random-regular", n, 3, {"degree": degree})
    assert {found for _, found in graph.degree()} == {degree}
    assert list(graph) == [f"agent-{i}" for i in range(n)]
    assert degree == n - 1 or list(graph.edges()) != list(
        build_graph("random-regular", n, 4, {"degree": degree}).edges()
    )


def test_seeds_and_names_differ() -> None:
    """Law: other seeds give other graphs; given names are taken in their order."""
    drawn = {tuple(build_graph("random-regular", 20, seed).edges()) for seed in range(5)}
    assert len(drawn) == 5
    assert list(build_graph("star", ["hub", "b", "a"]).edges()) == [("hub", "b"), ("hub", "a")]


def test_lists_describe_everything() -> None:
    """Reference: the brief's list of generators, schedules and mixings."""
    graphs = {entry.name: entry for entry in list_graphs()}
    assert set(graphs) == {name for name, *_ in COUNTS}
    assert graphs["random-regular"].options["degree"] == 4
    schedules = {entry.name for entry in list_schedules()}
    assert schedules == {"static", "cycle", "one-peer-exponential", "random-matching", "epidemic", "base-k"}
    mixings = {entry.name: entry for entry in list_mixings()}
    assert set(mixings) == {"metropolis", "max-degree", "uniform", "samples", "matrix", "push-sum"}
    assert all(entry.options["lazy"] == 0.0 for entry in mixings.values())
    assert all(entry.summary for entry in [*graphs.values(), *mixings.values(), *list_schedules()])


def test_import_is_light() -> None:
    """Reference: DESIGN, `dimat --help` answers in under 0.4 s; the lists need neither networkx nor numpy."""
    code = """
import sys
from dimat.topology import list_graphs, list_mixings, list_schedules
list_graphs(), list_mixings(), list_schedules()
heavy = {"networkx", "numpy", "scipy", "matplotlib", "torch", "pydantic"} & sys.modules.keys()
sys.exit(f"loaded {heavy}" if heavy else 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
