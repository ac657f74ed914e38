"""Longest shortest paths: exact if that is affordable, else a bound from a sample.

Breadth-first searches from many agents run at once, a bit for each: `reached[i]` holds a bit for each start that
reaches agent i, and a step ors the bits of all that send to i. A network whose agents all see the same network (agent
i + 1's links are agent i's, moved on by one) needs one search only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dimat.errors import TopologyError

if TYPE_CHECKING:
    import networkx as nx
    import numpy as np
    from numpy.typing import NDArray

WORK = 2e10
"""Bytes that searches may read before a sample has to do: some seconds."""
SAMPLE = 16
"""Agents of a sample; as many searches again begin at the agents that are farthest from them."""
BLOCK_WORDS = 16
"""64-bit words of starts that are searched from at once: what a step gathers has to fit into memory."""


@dataclass(frozen=True)
class Distance:
    """The longest shortest path in links; if it is not `exact`, the longest that was found, a lower bound."""

    links: int
    exact: bool
    starts: int
    """Agents from which was searched."""


def diameter(graph: nx.Graph[str]) -> int:
    """Return the longest shortest path in links, along their direction if they have one, however long that takes.

    Raises TopologyError if some agent does not reach some other.
    """
    return longest_distance(graph, work=float("inf")).links


def longest_distance(graph: nx.Graph[str], work: float = WORK) -> Distance:
    """Return the longest shortest path, from all agents or, if that would take more than `work`, from a sample.

    A sample has evenly spaced agents, and the agents farthest from them (double sweeps): exact in trees and rings, a
    lower bound in general (Magnien, Latapy & Habib 2009). Raises TopologyError as in `diameter`.
    """
    import networkx as nx
    from scipy.sparse.csgraph import connected_components, dijkstra

    matrix = nx.to_scipy_sparse_array(graph, weight=None, format="csr")
    n = matrix.shape[0]
    if connected_components(matrix, directed=graph.is_directed(), connection="strong")[0] > 1:
        raise TopologyError("the graph is not connected: it has no diameter")
    if n == 1:
        return Distance(0, True, 1)
    heard = matrix.transpose().tocsr()
    first = _from(matrix, [0])
    if _all_alike(matrix):
        return Distance(first, True, 1)
    # no path is longer than the ways to agent 0 and on from it
    levels = first + _from(heard, [0])
    if heard.nnz * 8.0 * -(-n // 64) * levels <= work:
        return Distance(_search(heard), True, n)
    starts = sorted({round(i * n / SAMPLE) for i in range(min(SAMPLE, n))})
    there = dijkstra(matrix, unweighted=True, indices=starts)
    ends = sorted({int(at) for at in there.argmax(axis=1)} - set(starts))
    back = _from(heard, ends) if ends else 0  # the longest way to those ends, of which one is long
    return Distance(max(int(there.max()), back), False, len(starts) + len(ends))


def _from(matrix: Any, starts: list[int]) -> int:
    """Return the longest of the shortest paths that begin at `starts`."""
    from scipy.sparse.csgraph import dijkstra

    return int(dijkstra(matrix, unweighted=True, indices=starts).max())


def _all_alike(matrix: Any) -> bool:
    """Whether the links of each agent are those of the one before, moved on by one, as in rings and exponential
    graphs."""
    import numpy as np

    n = matrix.shape[0]
    counts = np.diff(matrix.indptr)
    if (counts != counts[0]).any():
        return False
    matrix.sort_indices()
    links = matrix.indices.reshape(n, counts[0])
    moved = np.sort((links[0][None, :] + np.arange(n)[:, None]) % n, axis=1) if links.size <= 1 << 24 else None
    return moved is not None and bool((links == moved).all())


def _search(heard: Any) -> int:
    """Return the longest shortest path, by breadth-first searches from all agents. `heard`: row i has a one for each
    that sends to i, and everybody reaches everybody."""
    import numpy as np

    n = heard.shape[0]
    longest = 0
    for begin in range(0, n, 64 * BLOCK_WORDS):
        starts = np.arange(begin, min(begin + 64 * BLOCK_WORDS, n))
        reached: NDArray[np.uint64] = np.zeros((n, -(-len(starts) // 64)), np.uint64)
        bits = starts - begin
        reached[starts, bits // 64] = np.uint64(1) << (bits % 64).astype(np.uint64)
        whole = np.bitwise_or.reduce(reached, axis=0)
        steps = 0
        while not (reached == whole).all():
            reached = reached | np.bitwise_or.reduceat(reached[heard.indices], heard.indptr[:-1], axis=0)
            steps += 1
        longest = max(longest, steps)
    return longest
