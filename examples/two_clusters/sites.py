"""Two sites with fast links inside and one link between them, made in Python."""

from __future__ import annotations

from itertools import combinations

import networkx as nx

SITES = {"berlin": 3, "tokyo": 3}


def graph() -> nx.Graph:
    """Return the graph: everybody of a site is linked to everybody there, and each site's first agent, its gateway,
    to the other gateways. Nodes are the agents, in their order."""
    network = nx.Graph()
    for site, size in SITES.items():
        network.add_nodes_from(f"{site}-{i}" for i in range(size))
        network.add_edges_from(combinations([f"{site}-{i}" for i in range(size)], 2))
    network.add_edges_from(combinations([f"{site}-0" for site in SITES], 2))
    return network
