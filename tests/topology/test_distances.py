"""Longest shortest paths. Reference: networkx, and closed forms of named graphs."""

from __future__ import annotations

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dimat.errors import TopologyError
from dimat.topology import build_graph, diameter
from dimat.topology.distances import SAMPLE, longest_distance


@given(n=st.integers(2, 70), p=st.floats(0, 0.3), seed=st.integers(0, 2**20), directed=st.booleans())
def test_any_graph_has_networkx_s_diameter(n: int, p: float, seed: int, directed: bool) -> None:
    """A drawn graph on top of a ring, so that everybody reaches everybody; of one-way links too."""
    graph = nx.gnp_random_graph(n, p, seed=seed, directed=directed)
    graph.add_edges_from((i, (i + 1) % n) for i in range(n) if n > 2 or i == 0 or directed)
    graph = nx.relabel_nodes(graph, str)
    assert diameter(graph) == nx.diameter(graph)
    sampled = longest_distance(graph, work=0)
    assert sampled.links <= nx.diameter(graph)
    assert sampled.links == nx.diameter(graph) or not sampled.exact


@pytest.mark.parametrize(
    ("name", "n", "links"),
    [("ring", 2001, 1000), ("exponential", 1024, 10), ("complete", 300, 1), ("star", 1500, 2), ("torus", 1600, 40)],
)
def test_named_graphs(name: str, n: int, links: int) -> None:
    """Reference: closed forms (1023 is ten powers of two). More agents than a block of searches has."""
    assert diameter(build_graph(name, n)) == links


def test_a_sample_finds_the_ends_of_a_path_and_says_that_it_is_one() -> None:
    """Double sweeps are exact in trees; the bound holds where no search would end in time."""
    found = longest_distance(build_graph("path", 500), work=0)
    assert (found.links, found.exact) == (499, False)
    assert found.starts <= 2 * SAMPLE


def test_who_does_not_reach_everybody_has_no_diameter() -> None:
    for graph in (nx.empty_graph(2), nx.path_graph(3, create_using=nx.DiGraph)):
        with pytest.raises(TopologyError, match="not connected"):
            diameter(nx.relabel_nodes(graph, str))
    assert diameter(nx.relabel_nodes(nx.empty_graph(1), str)) == 0
