"""Mixing weights: how much of each neighbour's weights an agent takes. Also checks them.

Row i of the mixing matrix W says how agent i merges: theta_i <- sum_j W_ij theta_j. Rows sum to 1, and W_ij is positive
exactly for j = i and for each j that sends to i. Rows are computed one at a time, so a network of ten thousand agents
needs no dense matrix. If W is also doubly stochastic, every merge keeps the network's mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dimat.errors import TopologyError
from dimat.registry import Entry, Registry

if TYPE_CHECKING:
    import networkx as nx
    import numpy as np
    from numpy.typing import NDArray

TOLERANCE = 1e-9
"""How far a row's sum may be from 1."""

Row = dict[int, float]
RowOf = Callable[[int], Row]


@dataclass(frozen=True)
class RoundLinks:
    """The links of one round, by index: agent i receives from `sources[i]` and sends to `targets[i]`."""

    names: tuple[str, ...]
    sources: Sequence[Sequence[int]]
    targets: Sequence[Sequence[int]]

    @property
    def directed(self) -> bool:
        """Whether some link goes one way only (undirected links share one object for both directions)."""
        return self.sources is not self.targets


def links_of(graph: nx.Graph[str]) -> RoundLinks:
    """Return the links of a graph; agents are numbered in the graph's node order."""
    import networkx as nx

    names = tuple(graph)
    index = {name: i for i, name in enumerate(names)}
    if isinstance(graph, nx.DiGraph):
        sources = [sorted(index[u] for u in graph.predecessors(name)) for name in names]
        return RoundLinks(names, sources, [sorted(index[v] for v in graph.successors(name)) for name in names])
    both = [sorted(index[v] for v in graph.neighbors(name)) for name in names]
    return RoundLinks(names, both, both)


MIXINGS: Registry[RowOf] = Registry("mixing", error=TopologyError)
PUSH_SUM = "push-sum"


def list_mixings() -> list[Entry]:
    """Return the mixing rules: name, one-line formula, options with defaults. All also take `lazy` in [0, 1)."""
    return [Entry(e.name, e.summary, {**e.options, "lazy": 0.0}) for e in MIXINGS.entries()]


@dataclass(frozen=True)
class Mixer:
    """A named mixing rule with the options and data that it needs; `rows(links)` applies it to a round's links.

    The option `lazy` in [0, 1), which every rule has, gives W <- lazy·I + (1 - lazy)·W. With "push-sum" it changes the
    shares A instead of W, because the shares keep the mean.
    """

    name: str = "metropolis"
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    samples: Mapping[str, int] | None = None
    """Training samples per agent, for "samples"."""
    pi: Sequence[Sequence[float]] | None = None
    """Mixing matrix from the graph's file, for "matrix"."""

    @property
    def lazy(self) -> float:
        """The share that the agent keeps before the rule is applied."""
        lazy = self.options.get("lazy", 0.0)
        if isinstance(lazy, bool) or not isinstance(lazy, int | float) or not 0 <= lazy < 1:
            raise TopologyError(f"option 'lazy' of mixing {self.name!r} must be in [0, 1), not {lazy!r}")
        return float(lazy)

    def rows(self, links: RoundLinks, mass: Sequence[float] | None = None) -> RowOf:
        """Return the function that returns an agent's row; `mass` is the push-sum mass before this round.

        Raises TopologyError for unknown names or options, and for missing data.
        """
        lazy = self.lazy
        options = {key: value for key, value in self.options.items() if key != "lazy"}
        facts = {"samples": self.samples, "values": self.pi, "mass": mass, "lazy": lazy}
        row_of = MIXINGS.call(self.name, options, links, **facts)
        if lazy == 0 or self.name == PUSH_SUM:
            return row_of

        def lazy_row(i: int) -> Row:
            row = {j: (1 - lazy) * weight for j, weight in row_of(i).items()}
            row[i] += lazy
            return row

        return lazy_row


def _pairwise(links: RoundLinks, weight: Callable[[int, int], float]) -> RowOf:
    """Return rows in which neighbour j has `weight(i, j)`; the agent keeps the rest."""

    def row_of(i: int) -> Row:
        others = {j: weight(i, j) for j in links.sources[i]}
        return {i: 1.0 - math.fsum(others.values()), **others}

    return row_of


@MIXINGS.register("metropolis")
def metropolis(links: RoundLinks) -> RowOf:
    """W_ij = 1 / (1 + max(d_i, d_j)), the rest stays with i: symmetric, exact average (Metropolis–Hastings).

    d counts neighbours (on a directed graph: those heard). Symmetric and doubly stochastic on undirected graphs,
    doubly stochastic on directed ones whose agents all have the same number of in- and out-links; on other directed
    graphs use "push-sum". Xiao, Boyd & Lall 2005.
    """
    degree = [len(sources) for sources in links.sources]
    return _pairwise(links, lambda i, j: 1.0 / (1 + max(degree[i], degree[j])))


@MIXINGS.register("max-degree")
def max_degree(links: RoundLinks) -> RowOf:
    """W_ij = 1 / (1 + d_max) for every link, the rest stays with i: symmetric, slower than metropolis."""
    weight = 1.0 / (1 + max(map(len, links.sources)))
    return _pairwise(links, lambda i, j: weight)


@MIXINGS.register("uniform")
def uniform(links: RoundLinks) -> RowOf:
    """W_ij = 1 / (d_i + 1): the plain mean of all that i holds; keeps the network's mean only on regular graphs.

    On an undirected graph repeated merging tends to the mean weighted by d_i + 1.
    """

    def row_of(i: int) -> Row:
        weight = 1.0 / (len(links.sources[i]) + 1)
        return {i: weight, **dict.fromkeys(links.sources[i], weight)}

    return row_of


@MIXINGS.register("samples")
def by_samples(links: RoundLinks, *, samples: Mapping[str, int] | None = None) -> RowOf:
    """W_ij = s_j / max(S_i, S_j), S_i the samples of i and its neighbours: tends to the sample-weighted average.

    Metropolis–Hastings with the proposal s_j / S_i and the target pi_i ∝ s_i: s_i W_ij is symmetric, so the weighted
    mean sum_i s_i theta_i / sum_i s_i is kept. On a complete graph it is FedAvg in one merge; with equal counts it is
    "metropolis". Undirected graphs only. TopologyError where an agent's count is missing or below 1.
    """
    if links.directed:
        raise TopologyError("mixing 'samples' needs undirected links; use 'uniform' or 'push-sum' on directed graphs")
    if samples is None:
        raise TopologyError("mixing 'samples' needs the samples of each agent; write `samples = …` in the network map")
    for name in links.names:
        count = samples.get(name)
        if isinstance(count, bool) or not isinstance(count, int | float) or count <= 0:
            raise TopologyError(f"mixing 'samples' needs a positive number of samples of agent {name!r}, not {count!r}")
    count = [float(samples[name]) for name in links.names]
    total = [count[i] + math.fsum(count[j] for j in links.sources[i]) for i in range(len(count))]
    return _pairwise(links, lambda i, j: count[j] / max(total[i], total[j]))


@MIXINGS.register("matrix")
def matrix(links: RoundLinks, *, values: Sequence[Sequence[Any]] | None = None) -> RowOf:
    """The matrix in option `values`, or `pi` of the graph's file; row i holds the weights agent i merges with.

    `values` is n lists of n numbers in agent order. TopologyError names the first row that is not one of a mixing
    matrix on these links.
    """
    if values is None:
        raise TopologyError("mixing 'matrix' needs option `values` = [[…], …], or a {connectivity, pi} file")
    n = len(links.names)
    if len(values) != n:
        raise TopologyError(f"the mixing matrix has {len(values)} rows, there are {n} agents")
    rows: list[Row] = []
    for i, numbers in enumerate(values):
        name = links.names[i]
        if len(numbers) != n:
            raise TopologyError(f"the mixing matrix's row {name!r} has {len(numbers)} numbers, not {n}")
        if any(isinstance(x, bool) or not isinstance(x, int | float) for x in numbers):
            raise TopologyError(f"the mixing matrix's row {name!r} holds something that is not a number")
        row = {j: float(x) for j, x in enumerate(numbers) if x != 0}
        check_row(links, i, row)
        rows.append({i: row[i], **row})
    return lambda i: dict(rows[i])


@MIXINGS.register(PUSH_SUM)
def push_sum(links: RoundLinks, *, mass: Sequence[float] | None = None, lazy: float = 0.0) -> RowOf:
    """W_ij = A_ij m_j / sum_k A_ik m_k, A_ij = 1 / (out_j + 1): exact average on any directed graph.

    Push-sum sends shares A of (m·theta, m) and computes theta as their quotient; `lazy` makes A lazy. The rows above
    are the same iteration on theta itself, with the masses m(r) = A m(r-1), m(0) = 1, of a network that loses nothing:
    after r rounds their product is diag(1 / m(r)) A^r, whose rows all tend to 1/n on a strongly connected graph.

    Agents do not assume that everything arrives: with each snapshot they send the running sums of their shares
    (`dimat.agent.protocol.push_sum`). So no mass is lost, but late shares count for the newer network, which biases the
    average. With 10 % of messages lost and no retry, agents that started from unit vectors agreed on values off by
    17 % of the mean (3–54 %), with one retry by 3 % (0–24 %): median and range over the five networks of
    tests/agent/test_consensus.py, six seeds each.

    The schedule sets `mass`. Kempe, Dobra & Gehrke 2003; Assran et al. 2019.
    """
    before = [1.0] * len(links.names) if mass is None else mass

    def row_of(i: int) -> Row:
        shares = _push_sum_shares(links, before, lazy, i)
        total = math.fsum(shares.values())
        return {j: share / total for j, share in shares.items()}

    return row_of


def push_sum_mass(links: RoundLinks, mass: Sequence[float], lazy: float = 0.0) -> list[float]:
    """Return the push-sum masses after a round, A·mass with A as in "push-sum"; their sum stays n."""
    return [math.fsum(_push_sum_shares(links, mass, lazy, i).values()) for i in range(len(mass))]


def _push_sum_shares(links: RoundLinks, mass: Sequence[float], lazy: float, i: int) -> Row:
    """Return A_ij m_j, the mass that agent i gets from each j: j splits its share that is not lazy with its readers."""
    shares = {j: (1 - lazy) * mass[j] / (len(links.targets[j]) + 1) for j in (i, *links.sources[i])}
    shares[i] += lazy * mass[i]
    return shares


def push_sum_matrix(graph: nx.Graph[str]) -> NDArray[np.float64]:
    """Return the column-stochastic matrix A of push-sum (not lazy), A_ij = 1 / (out_j + 1) where j sends to i or j = i.

    Shape n × n, agents in the graph's order; every column sums to 1.
    """
    import numpy as np

    links = links_of(graph)
    weights = np.zeros((len(links.names), len(links.names)))
    for j, targets in enumerate(links.targets):
        weights[[j, *targets], j] = 1.0 / (len(targets) + 1)
    return weights


def mixing_matrix(graph: nx.Graph[str], mixer: Mixer | None = None) -> NDArray[np.float64]:
    """Return W (n × n, row-stochastic) of a graph under a rule, by default "metropolis"."""
    import numpy as np

    links = links_of(graph)
    row_of = (mixer or Mixer()).rows(links)
    weights = np.zeros((len(links.names), len(links.names)))
    for i in range(len(links.names)):
        for j, weight in row_of(i).items():
            weights[i, j] = weight
    return weights


def renormalise(row: Mapping[str, float], present: Collection[str], agent: str) -> dict[str, float]:
    """Return `row` for the peers that are present; `agent` itself gets the weight of absent peers.

    `row` maps agents to weights that sum to 1 and contains `agent`; `present` need not contain it. The weights of
    present peers do not change: if all are present, the row is returned unchanged, if none is, {agent: 1.0}.
    """
    if agent not in row:
        raise TopologyError(f"the mixing row of agent {agent!r} does not contain the agent itself")
    heard = {peer: weight for peer, weight in row.items() if peer != agent and peer in present}
    if len(heard) == len(row) - 1:
        return dict(row)
    return {agent: 1.0 - math.fsum(heard.values()), **heard}


def check_row(links: RoundLinks, i: int, row: Row) -> None:
    """Raise TopologyError, naming the row, unless the row is valid.

    A valid row is non-negative, sums to 1 (within 1e-9), and is positive exactly for the agent and its sources.
    """
    name = links.names[i]
    wanted = {i, *links.sources[i]}
    for j, weight in row.items():
        if not math.isfinite(weight) or weight < 0:
            raise TopologyError(f"mixing row {name!r} gives {links.names[j]!r} the weight {weight}; it must be >= 0")
        if weight > 0 and j not in wanted:
            raise TopologyError(f"mixing row {name!r} weighs {links.names[j]!r}, which does not send to it")
    for j in sorted(wanted):
        if not row.get(j, 0.0) > 0:
            raise TopologyError(f"mixing row {name!r} gives no weight to {links.names[j]!r}, which it holds")
    total = math.fsum(row.values())
    if abs(total - 1) > TOLERANCE:
        raise TopologyError(f"mixing row {name!r} sums to {total:.12g}, not 1")


def check_matrix(weights: NDArray[np.float64], graph: nx.Graph[str], doubly: bool = False) -> None:
    """Raise TopologyError unless `weights` (n × n) is a mixing matrix on the graph; the message names the row.

    Checks that the shape fits, weights are >= 0, rows sum to 1 within 1e-9, and exactly the links and the diagonal are
    positive; with `doubly`, also that columns sum to 1.
    """
    links = links_of(graph)
    n = len(links.names)
    if weights.shape != (n, n):
        raise TopologyError(f"the mixing matrix is {' × '.join(map(str, weights.shape))}, there are {n} agents")
    for i in range(n):
        check_row(links, i, {j: float(x) for j, x in enumerate(weights[i]) if x != 0})
    if doubly:
        for j, total in enumerate(weights.sum(axis=0)):
            if abs(float(total) - 1) > TOLERANCE:
                raise TopologyError(f"mixing column {links.names[j]!r} sums to {total:.12g}: not doubly stochastic")
