"""Named graphs: generators by name, and the checks that every graph must pass.

A generator takes the number of agents and keyword options and returns a networkx graph on 0 … n-1; `build_graph`
names the agents. An edge u -> v of a directed graph means that u sends to v. Random graphs are drawn from a derived
seed and redrawn until they are connected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dimat.errors import TopologyError
from dimat.registry import Entry, Registry
from dimat.seeds import derive_seed

if TYPE_CHECKING:
    import networkx as nx

    IntGraph = nx.Graph[int]

MAX_DRAWS = 100
"""Draws of a random graph before giving up on a connected one; fewer where each looks at very many pairs."""
MAX_PAIRS = 500_000_000
"""Pairs of agents that these draws may look at."""
FEW = 30
"""Agents up to which a dense random regular graph is soon drawn."""
MAX_LOOKS = 20_000_000
"""Looks for a free place, of the links of a small world that are rewired, that one draw may take."""
HOPELESS = 14.0
"""Agents without any link that a random graph is expected to have, from which on no draw is worth it: about
exp(-14) of all have none."""

GRAPHS: Registry[IntGraph] = Registry("graph", traits={"links": None}, error=TopologyError)
"""Generators. Trait `links`: function of the number of agents and the options that returns about how many links the
graph has, for generators by which these may be many more than the agents."""


def list_graphs() -> list[Entry]:
    """Return the generators: name, one line on what they make, options with defaults."""
    return GRAPHS.entries()


def agent_names(n: int) -> tuple[str, ...]:
    """Return the default names `agent-0` … `agent-(n-1)`."""
    return tuple(f"agent-{i}" for i in range(n))


def build_graph(
    name: str,
    agents: int | Sequence[str],
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    most_links: int | None = None,
) -> nx.Graph[str]:
    """Return the graph `name` on `agents` (a number, or names in order), checked.

    `seed` is the experiment's; random graphs draw from their own stream under it, unless `options` holds a
    `seed`. The graph attribute `generator` holds the name. Raises TopologyError for a graph that cannot exist, and,
    before it is made, for one of more links than `most_links`.
    """
    names = agent_names(agents) if isinstance(agents, int) else tuple(agents)
    if not names:
        raise TopologyError("a topology needs at least one agent")
    bound = GRAPHS.bind(name, options or {})
    links: Callable[..., float] | None = bound.traits["links"]
    if links is not None and most_links is not None:
        check_links(links(len(names), **bound.settings), most_links, f"graph {name!r}")
    drawn = bound(len(names), seed=derive_seed(seed, "topology", name))
    graph = rename(drawn, names)
    graph.graph["generator"] = name
    check_graph(graph)
    return graph


def check_links(count: float, most: int, where: str) -> None:
    """Raise TopologyError for a graph of more links than `topology.most_links`."""
    if count > most:
        raise TopologyError(f"{where}: {count:,.0f} links are above most_links = {most:,}; raise that for more")


def rename(graph: nx.Graph[int], names: Sequence[str]) -> nx.Graph[str]:
    """Return a copy with node i called names[i], nodes in that order."""
    import networkx as nx

    named: nx.Graph[str] = nx.DiGraph() if graph.is_directed() else nx.Graph()
    named.add_nodes_from(names)
    edges: list[tuple[int, int]] = sorted(graph.edges())
    named.add_edges_from([(names[u], names[v]) for u, v in edges])
    return named


def check_graph(graph: nx.Graph[Any]) -> None:
    """Raise TopologyError unless the graph is simple, without self-loops, not empty and connected.

    A directed graph has to be strongly connected: otherwise some agent's weights never reach some other.
    """
    import networkx as nx

    if graph.is_multigraph():
        raise TopologyError("the graph has parallel edges (a multigraph); give each link once")
    if graph.number_of_nodes() == 0:
        raise TopologyError("a topology needs at least one agent")
    loop = next((u for u, v in graph.edges() if u == v), None)
    if loop is not None:
        raise TopologyError(f"agent {loop!r} is linked to itself; an agent always keeps a share of its own weights")
    parts: Iterable[set[Any]]
    if isinstance(graph, nx.DiGraph):
        parts, tie = nx.strongly_connected_components(graph), "strongly connected "
    else:
        parts, tie = nx.connected_components(graph), ""
    groups = list(parts)
    if len(groups) > 1:
        order = {node: i for i, node in enumerate(graph)}
        shown = sorted((sorted(group, key=order.__getitem__) for group in groups), key=lambda g: order[g[0]])
        raise TopologyError(f"the graph falls into {len(groups)} {tie}components: {_show(shown)}; link them")


def _show(groups: list[list[Any]], limit: int = 4) -> str:
    texts: list[str] = []
    for group in groups[:limit]:
        names = ", ".join(map(str, group[:limit]))
        texts.append(f"{{{names}{', …' if len(group) > limit else ''}}}")
    return ", ".join(texts) + (", …" if len(groups) > limit else "")


def _graph(n: int, edges: Iterable[tuple[int, int]], directed: bool = False) -> nx.Graph[int]:
    import networkx as nx

    graph: nx.Graph[int] = nx.DiGraph() if directed else nx.Graph()
    graph.add_nodes_from(range(n))
    graph.add_edges_from(edges)
    return graph


def _connected(draw: Callable[[int], nx.Graph[int]], seed: int, what: str, draws: int = MAX_DRAWS) -> nx.Graph[int]:
    import networkx as nx

    for attempt in range(draws):
        graph = draw(derive_seed(seed, "draw", attempt))
        if nx.is_connected(graph):
            return graph
    raise TopologyError(f"{what}: none of {draws} draws is connected; ask for more edges")


def _every_pair(n: int, **_: Any) -> float:
    return n * (n - 1) / 2


def _by_degree(n: int, *, degree: int = 0, k: int = 0, **_: Any) -> float:
    return n * (degree or k) / 2


def _by_chance(n: int, *, p: float | None, **_: Any) -> float:
    return (p or 0) * n * n / 2


def _across(n: int, *, left: int | None, **_: Any) -> float:
    size = n // 2 if left is None else left
    return size * (n - size)


def _inside(n: int, *, left: int | None, **_: Any) -> float:
    size = n // 2 if left is None else left
    return _every_pair(size) + _every_pair(n - size)


@GRAPHS.register("complete", links=_every_pair)
def complete(n: int) -> nx.Graph[int]:
    """Everyone is linked to everyone: n(n-1)/2 edges, one merge is the exact average."""
    return _graph(n, ((i, j) for i in range(n) for j in range(i + 1, n)))


@GRAPHS.register("ring")
def ring(n: int) -> nx.Graph[int]:
    """Agents in a circle, two neighbours each: n edges, diameter floor(n/2)."""
    return _graph(n, ((i, (i + 1) % n) for i in range(n) if n > 1))


@GRAPHS.register("path")
def path(n: int) -> nx.Graph[int]:
    """Agents in a line: n-1 edges, diameter n-1."""
    return _graph(n, ((i, i + 1) for i in range(n - 1)))


@GRAPHS.register("star")
def star(n: int) -> nx.Graph[int]:
    """The first agent is linked to all others: n-1 edges, diameter 2."""
    return _graph(n, ((0, i) for i in range(1, n)))


@GRAPHS.register("torus")
def torus(n: int, *, rows: int | None = None, cols: int | None = None) -> nx.Graph[int]:
    """Two-dimensional grid that wraps around, up to four neighbours each; as square as n allows, or rows × cols.

    Agent r·cols + c sits in row r, column c. TopologyError where rows × cols is not n, or n is prime.
    """
    if n == 1:
        return _graph(1, ())
    for given in (rows, cols):
        if given is not None and (given < 1 or n % given):
            raise TopologyError(f"a torus of {n} agents cannot have {given} rows or columns: it does not divide {n}")
    if rows is None and cols is None:
        rows = max(r for r in range(1, math.isqrt(n) + 1) if n % r == 0)
    height = rows if rows is not None else n // (cols or 1)
    width = cols if cols is not None else n // height
    if height * width != n:
        raise TopologyError(f"a torus of {height} × {width} has {height * width} agents, not {n}")
    if min(height, width) < 2:
        raise TopologyError(f"a torus needs two rows and two columns, {n} agents do not fill them; use graph 'ring'")
    right = ((r * width + c, r * width + (c + 1) % width) for r in range(height) for c in range(width))
    down = ((r * width + c, (r + 1) % height * width + c) for r in range(height) for c in range(width))
    return _graph(n, (*right, *down))


@GRAPHS.register("hypercube")
def hypercube(n: int) -> nx.Graph[int]:
    """Agents whose numbers differ in one binary digit are linked: log2 n neighbours each; n a power of two."""
    if n & (n - 1):
        below = 1 << (n.bit_length() - 1)
        raise TopologyError(f"a hypercube needs a power of two agents, not {n}; use {below} or {2 * below}")
    return _graph(n, ((i, i ^ 1 << k) for i in range(n) for k in range(n.bit_length() - 1) if not i >> k & 1))


@GRAPHS.register("exponential")
def exponential(n: int) -> nx.Graph[int]:
    """Directed: i sends to i + 2^k mod n for all 2^k < n; ceil(log2 n) neighbours (Ying et al. 2021)."""
    hops = [1 << k for k in range((n - 1).bit_length())]
    return _graph(n, ((i, (i + hop) % n) for i in range(n) for hop in hops), directed=n > 1)


@GRAPHS.register("random-regular", links=_by_degree)
def random_regular(n: int, *, degree: int = 4, seed: int = 0) -> nx.Graph[int]:
    """A random graph in which every agent has `degree` neighbours; n·degree even."""
    import networkx as nx

    if n == 1:
        return _graph(1, ())
    if not 1 <= degree < n:
        raise TopologyError(f"degree {degree} is impossible with {n} agents; use 1 to {n - 1}")
    if n * degree % 2:
        raise TopologyError(f"no graph of {n} agents is {degree}-regular: {n} × {degree} is odd; use an even degree")
    if degree == 1 and n > 2:
        raise TopologyError(f"a 1-regular graph of {n} agents is not connected; use degree 2 or more")

    # of dense graphs the links that are not there are drawn: a draw's last pairs hardly ever fit there, and it would
    # begin anew without end. The complement of such a graph is as random. Small ones are drawn as they ever were
    absent = n - 1 - degree

    def draw(s: int) -> nx.Graph[int]:
        if absent >= degree or n <= FEW:
            return nx.random_regular_graph(degree, n, seed=s)
        drawn: nx.Graph[int] = nx.random_regular_graph(absent, n, seed=s)
        return nx.complement(drawn)

    return _connected(draw, seed, f"random-regular, degree {degree}")


@GRAPHS.register("erdos-renyi", links=_by_chance)
def erdos_renyi(n: int, *, p: float | None = None, seed: int = 0) -> nx.Graph[int]:
    """Every pair is linked with probability p (default min(1, 2 ln n / n)); redrawn until connected."""
    import networkx as nx

    if n == 1:
        return _graph(1, ())
    chance = min(1.0, 2 * math.log(n) / n) if p is None else p
    if not 0 < chance <= 1:
        raise TopologyError(f"option 'p' of graph 'erdos-renyi' must be in (0, 1], not {p}")

    alone = n * math.exp((n - 1) * math.log1p(-chance)) if chance < 1 else 0.0
    if alone > HOPELESS:
        raise TopologyError(
            f"erdos-renyi, p = {chance:.3g}: about {alone:,.0f} of {n:,} agents would have no link at all, so that no "
            f"draw is connected; ask for p of {2 * math.log(n) / n:.2g} or more"
        )

    def draw(s: int) -> nx.Graph[int]:
        return nx.gnp_random_graph(n, chance, seed=s)

    draws = max(2, min(MAX_DRAWS, 2 * MAX_PAIRS // (n * n)))
    return _connected(draw, seed, f"erdos-renyi, p = {chance:.3g}", draws)


@GRAPHS.register("watts-strogatz", links=_by_degree)
def watts_strogatz(n: int, *, k: int = 4, p: float = 0.2, seed: int = 0) -> nx.Graph[int]:
    """Small world: a ring with k nearest neighbours, each edge rewired with probability p; redrawn until connected."""
    import networkx as nx

    if n == 1:
        return _graph(1, ())
    if not 2 <= k < n or k % 2:
        raise TopologyError(f"option 'k' of graph 'watts-strogatz' must be even, from 2 to {n - 1}, not {k}")
    if not 0 <= p <= 1:
        raise TopologyError(f"option 'p' of graph 'watts-strogatz' must be in [0, 1], not {p}")

    if (looked_at := p * n * k / 2 * n / max(1, n - 1 - k)) > MAX_LOOKS:
        raise TopologyError(
            f"watts-strogatz, k = {k} of {n} agents: each link that is rewired has to find one of few free places, "
            f"about {looked_at:.1g} looks in all; take a smaller k, or graph 'complete'"
        )

    def draw(s: int) -> nx.Graph[int]:
        return nx.watts_strogatz_graph(n, k, p, seed=s)

    return _connected(draw, seed, f"watts-strogatz, k = {k}, p = {p}")


@GRAPHS.register("bipartite", links=_across)
def bipartite(n: int, *, left: int | None = None) -> nx.Graph[int]:
    """Two sides, everyone linked to everyone of the other side; `left` agents on the first (default half)."""
    if n == 1:
        return _graph(1, ())
    size = n // 2 if left is None else left
    if not 1 <= size < n:
        raise TopologyError(f"option 'left' of graph 'bipartite' must be from 1 to {n - 1}, not {left}")
    return _graph(n, ((i, j) for i in range(size) for j in range(size, n)))


@GRAPHS.register("two-clusters", links=_inside)
def two_clusters(n: int, *, left: int | None = None, bridges: int = 1) -> nx.Graph[int]:
    """Two complete clusters, joined by `bridges` links; `left` agents in the first (default half, rounded up)."""
    if n == 1:
        return _graph(1, ())
    size = (n + 1) // 2 if left is None else left
    if not 1 <= size < n:
        raise TopologyError(f"option 'left' of graph 'two-clusters' must be from 1 to {n - 1}, not {left}")
    if not 1 <= bridges <= min(size, n - size):
        most = min(size, n - size)
        raise TopologyError(f"option 'bridges' of graph 'two-clusters' must be from 1 to {most}, not {bridges}")
    inside = ((i, j) for i in range(n) for j in range(i + 1, n) if (i < size) == (j < size))
    across = ((size - 1 - b, size + b) for b in range(bridges))
    return _graph(n, (*inside, *across))
