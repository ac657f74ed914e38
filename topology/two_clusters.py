"""A graph made in Python: two sites of four agents each, fully linked inside, two links between the sites.

Use it with `python = "two_clusters.py:graph"` in a map or experiment. Any function that returns a networkx Graph (or
DiGraph, where an edge u -> v means that u sends to v) will do; its nodes become the agents, in their order.
"""

from __future__ import annotations

from itertools import combinations

import networkx as nx


def graph() -> nx.Graph:
    """Return the graph: nodes `east-0` … `east-3`, `west-0` … `west-3`."""
    sites = [[f"{site}-{i}" for i in range(4)] for site in ("east", "west")]
    network = nx.Graph()
    for site in sites:
        network.add_nodes_from(site)
        network.add_edges_from(combinations(site, 2))
    network.add_edges_from(zip(sites[0][:2], sites[1][:2], strict=True))
    return network
