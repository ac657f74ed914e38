"""Schedules: a graph and mixing weights for every round.

`CycleSchedule` takes a list of graphs in turn.

Rounds count from 1. Every round can be computed on its own, on any machine, with the same result. Rows are
made one agent at a time, so that a network of ten thousand agents needs no dense matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dimat.errors import TopologyError, unknown_name
from dimat.topology.graphs import check_graph
from dimat.topology.mixing import PUSH_SUM, Mixer, RoundLinks, RowOf, check_row, links_of, push_sum_mass

if TYPE_CHECKING:
    import networkx as nx
    import numpy as np
    from numpy.typing import NDArray
    from scipy.sparse import csr_array

KEPT_ROUNDS = 8
"""Rounds whose links are kept in memory, the most recently used ones; of a short period all."""
LONG_PERIOD = 64
"""Rounds of a period that are kept in memory and checked, at most."""
ALL_PAIRS = 4_000_000
"""Links, each way counted, up to which a graph is made of all pairs."""
LOOKED_AT = 64
"""Readers, and starting rounds of a long schedule, from which `longest_lead` looks; of more, an even sample."""
DRAWN = 8
"""Starting rounds from which `longest_lead` looks in a drawn schedule, which has no end."""


class Schedule(ABC):
    """A graph and a mixing matrix for every round.

    `names` are the agents in their stable order; `period` is the number of rounds after which graphs and weights
    repeat, None if they never do. Subclasses give `_round`.
    """

    any_pair = False
    """Whether every two agents may meet in some round: pairs are drawn from all."""

    def __init__(self, names: Sequence[str], period: int | None) -> None:
        self.names = tuple(names)
        self.period = period
        self._keep = max(KEPT_ROUNDS, min(period or 0, LONG_PERIOD))
        self._index = {name: i for i, name in enumerate(self.names)}
        self._kept: OrderedDict[int, tuple[RoundLinks, RowOf]] = OrderedDict()

    @abstractmethod
    def _round(self, number: int) -> tuple[RoundLinks, RowOf]:
        """Return links and rows of round `number`, which is at most `period` where there is one."""

    def links(self, round: int) -> RoundLinks:
        """Return who sends to whom in a round, by index into `names`."""
        return self._at(round)[0]

    def row(self, round: int, agent: str) -> dict[str, float]:
        """Return the weights that `agent` merges with: itself first, then its in-neighbours in agent order.

        Sums to 1. Costs no more than the agent's degree once the round's links are known.
        """
        i = self._number(agent)
        row = self._at(round)[1](i)
        return {self.names[j]: row[j] for j in (i, *sorted(row.keys() - {i}))}

    def in_neighbours(self, round: int, agent: str) -> tuple[str, ...]:
        """Return the agents whose snapshots `agent` merges in a round."""
        return tuple(self.names[j] for j in self.links(round).sources[self._number(agent)])

    def out_neighbours(self, round: int, agent: str) -> tuple[str, ...]:
        """Return the agents that merge `agent`'s snapshot in a round."""
        return tuple(self.names[j] for j in self.links(round).targets[self._number(agent)])

    def graph(self, round: int) -> nx.Graph[str]:
        """Return a round's graph, directed if links go one way; an edge u -> v means that u sends to v."""
        import networkx as nx

        links = self.links(round)
        graph: nx.Graph[str] = nx.DiGraph() if links.directed else nx.Graph()
        graph.add_nodes_from(self.names)
        graph.add_edges_from((self.names[i], self.names[j]) for i, to in enumerate(links.targets) for j in to)
        return graph

    def mixing(self, round: int) -> NDArray[np.float64]:
        """Return a round's mixing matrix W, dense n × n: for small n; see `row` and `sparse_mixing`."""
        import numpy as np

        weights = np.zeros((len(self.names), len(self.names)))
        row_of = self._at(round)[1]
        for i in range(len(self.names)):
            for j, weight in row_of(i).items():
                weights[i, j] = weight
        return weights

    def sparse_mixing(self, round: int) -> csr_array:
        """Return a round's mixing matrix W (n × n) as a scipy sparse array."""
        import numpy as np
        from scipy.sparse import csr_array

        row_of = self._at(round)[1]
        columns: list[int] = []
        weights: list[float] = []
        starts = [0]
        for i in range(len(self.names)):
            row = row_of(i)
            columns.extend(row.keys())
            weights.extend(row.values())
            starts.append(len(columns))
        shape = (len(self.names), len(self.names))
        return csr_array((np.array(weights), np.array(columns), np.array(starts)), shape=shape)

    def peers(self, agent: str) -> tuple[str, ...]:
        """Return all agents that `agent` ever exchanges with, in either direction, in agent order."""
        sources, targets = self._ever(self._number(agent))
        return tuple(self.names[j] for j in sorted(sources | targets))

    def sources(self, agent: str) -> tuple[str, ...]:
        """Return all agents whose snapshots `agent` ever merges, in agent order."""
        return tuple(self.names[j] for j in sorted(self._ever(self._number(agent))[0]))

    def union(self) -> nx.Graph[str]:
        """Return the graph of all links that are ever used (dense for drawn schedules on all pairs); directed if those
        of some round are, with an edge u -> v where u ever sends to v. TopologyError for millions of pairs."""
        import networkx as nx

        n = len(self.names)
        if self.any_pair and n * (n - 1) > ALL_PAIRS:
            raise TopologyError(
                f"any two of {n:,} agents may meet: {n * (n - 1):,} links are too many for one graph; give the "
                "schedule a graph whose links it may use, or draw and write a smaller network"
            )
        directed = any(self.links(number).directed for number in range(1, (self.period or 1) + 1))
        graph: nx.Graph[str] = nx.DiGraph() if directed else nx.Graph()
        graph.add_nodes_from(self.names)
        for i, u in enumerate(self.names):
            graph.add_edges_from((u, self.names[j]) for j in self._ever(i)[1])
        return graph

    def _ever(self, i: int) -> tuple[set[int], set[int]]:
        """Return whom agent `i` ever hears and who ever hears it."""
        return _union([self.links(number) for number in range(1, (self.period or 1) + 1)], i)

    def _number(self, agent: str) -> int:
        if agent not in self._index:
            raise TopologyError(unknown_name("agent", agent, self.names))
        return self._index[agent]

    def _at(self, round: int) -> tuple[RoundLinks, RowOf]:
        if round < 1:
            raise TopologyError(f"rounds count from 1; there is no round {round}")
        number = (round - 1) % self.period + 1 if self.period else round
        kept = self._kept.get(number)
        if kept is None:
            kept = self._kept[number] = self._round(number)
            if len(self._kept) > self._keep:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(number)
        return kept


class CycleSchedule(Schedule):
    """A list of graphs taken in turn, one a round; with one graph it is static. Weights come from a mixing rule.

    Their union must be connected. With "push-sum" the weights change from round to round (`period` is None).
    """

    def __init__(self, graphs: Sequence[nx.Graph[str]], mixer: Mixer) -> None:
        import networkx as nx

        names = tuple(graphs[0])
        for graph in graphs[1:]:
            if tuple(graph) != names:
                raise TopologyError("the graphs of a cycle must have the same agents in the same order")
        directed = any(graph.is_directed() for graph in graphs)
        check_graph(nx.compose_all([graph.to_directed() if directed else graph for graph in graphs]))
        self._push_sum = mixer.name == PUSH_SUM
        super().__init__(names, None if self._push_sum else len(graphs))
        self._links = [links_of(graph) for graph in graphs]
        self.mixer = mixer
        self._masses = {1: [1.0] * len(names)}
        if not self._push_sum:
            for number in range(1, len(graphs) + 1):  # a wrong option or matrix is told now, not in some round
                self._at(number)

    def _round(self, number: int) -> tuple[RoundLinks, RowOf]:
        links = self._links[(number - 1) % len(self._links)]
        return links, self.mixer.rows(links, self._mass(number) if self._push_sum else None)

    def _mass(self, number: int) -> list[float]:
        """Return the push-sum masses before round `number`: a recursion, so a far round costs all before it."""
        at = max(known for known in self._masses if known <= number)
        mass = self._masses[at]
        while at < number:
            mass = push_sum_mass(self._links[(at - 1) % len(self._links)], mass, self.mixer.lazy)
            at += 1
        self._masses = {1: self._masses[1], number: mass}
        return mass

    def _ever(self, i: int) -> tuple[set[int], set[int]]:
        return _union(self._links, i)


def _union(rounds: Sequence[RoundLinks], i: int) -> tuple[set[int], set[int]]:
    """Return whom agent `i` hears in any of the rounds, and who hears it."""
    return {j for links in rounds for j in links.sources[i]}, {j for links in rounds for j in links.targets[i]}


def check_schedule(schedule: Schedule, rounds: int | None = None) -> None:
    """Raise TopologyError unless every row of `rounds` rounds (default: one period, at most 64) is a mixing row."""
    for number in range(1, (rounds or min(schedule.period or KEPT_ROUNDS, LONG_PERIOD)) + 1):
        links = schedule.links(number)
        for i, name in enumerate(schedule.names):
            row = schedule.row(number, name)
            check_row(links, i, dict(zip((i, *sorted(links.sources[i])), row.values(), strict=True)))


def longest_lead(schedule: Schedule, most: int) -> int:
    """Return by how many rounds an agent may be ahead of one that reads it, up to `most`, in synchronous rounds.

    A reader that has not ended round r publishes no round r + 1, so its own readers cannot end round r + 1, and
    so on, until this reaches the publisher. The lead is 1 on undirected graphs that do not change, and
    n − 1 on a ring with links in one direction.
    """
    rounds = range(1, min(schedule.period or DRAWN, LOOKED_AT) + 1)
    if schedule.period is None and len(schedule.names) > LOOKED_AT:
        return most  # drawing its rounds over and over would take longer than snapshots cost
    if schedule.period == 1 and not schedule.links(1).directed:
        return 1
    step = max(len(schedule.names) // LOOKED_AT, 1)
    longest = 1
    for first in rounds:
        sources = schedule.links(first).sources
        for reader in range(0, len(schedule.names), step):
            waiting = set(sources[reader])
            held_up = {reader}
            for lead in range(most):
                waiting -= held_up
                if not waiting:
                    break
                longest = max(longest, lead + 1)
                targets = schedule.links(first + lead + 1).targets
                held_up |= {later for agent in held_up for later in targets[agent]}
        if longest >= most:
            return most
    return longest
