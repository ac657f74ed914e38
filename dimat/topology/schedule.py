"""Schedules by name: static, one-peer-exponential, random-matching, epidemic, base-k, cycle.

Each name is beside the schedule that it makes, unless that is in `rounds` (a list of graphs in turn) or
`base_k`. `make_schedule` makes them from an operator's settings, and rejects impossible ones in one line.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dimat.errors import TopologyError
from dimat.registry import Entry, Registry
from dimat.seeds import derive_seed
from dimat.topology.base_k import BaseK
from dimat.topology.mixing import Mixer, RoundLinks, RowOf, links_of
from dimat.topology.rounds import CycleSchedule, Schedule, check_schedule

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True)
class Setting:
    """The agents, graph (if one was given), mixing rule and seed that a schedule is made from."""

    names: tuple[str, ...]
    graph: nx.Graph[str] | None = None
    mixer: Mixer = field(default_factory=Mixer)
    seed: int = 0
    resolve: Callable[[Any], nx.Graph[str]] | None = None
    """Makes a graph from an entry of option `graphs` (a name or a table)."""


SCHEDULES: Registry[Schedule] = Registry("schedule", error=TopologyError)


def list_schedules() -> list[Entry]:
    """Return the schedules: name, one line on what they do, options with defaults."""
    return SCHEDULES.entries()


def make_schedule(setting: Setting, name: str = "static", options: Mapping[str, Any] | None = None) -> Schedule:
    """Return the schedule `name`; its first round is checked.

    Raises TopologyError for unknown names and options, for a mixing rule given to a schedule with weights of its own,
    and for a schedule that needs a link which the given graph does not have.
    """
    schedule = SCHEDULES.call(name, options or {}, setting)
    check_schedule(schedule, rounds=1)
    if setting.graph is not None and name not in ("static", "cycle"):
        _check_inside(name, schedule, setting.graph)
    return schedule


def own_weights(setting: Setting, name: str) -> None:
    """Raise TopologyError if a mixing rule was chosen for a schedule with its own weights."""
    if setting.mixer.name != "metropolis" or setting.mixer.options:
        raise TopologyError(f"schedule {name!r} has mixing weights of its own; leave out mixing {setting.mixer.name!r}")


def _check_inside(name: str, schedule: Schedule, graph: nx.Graph[str]) -> None:
    for agent in schedule.names:
        for peer in schedule.peers(agent):
            if not (graph.has_edge(agent, peer) or graph.has_edge(peer, agent)):
                message = f"schedule {name!r} needs the link {agent}–{peer}, which the graph does not have"
                raise TopologyError(f"{message}; leave the graph out, or use 'complete'")


@SCHEDULES.register("static")
def static(setting: Setting) -> Schedule:
    """The same graph in every round."""
    if setting.graph is None:
        raise TopologyError("schedule 'static' needs a graph")
    return CycleSchedule([setting.graph], setting.mixer)


@SCHEDULES.register("one-peer-exponential")
def one_peer_exponential(setting: Setting) -> Schedule:
    """One peer a round: i sends to i + 1, i + 2, i + 4, … in turn; exact average if n is a power of two."""
    own_weights(setting, "one-peer-exponential")
    return OnePeerExponential(setting.names)


class OnePeerExponential(Schedule):
    """In round t agent i sends to i + 2^((t-1) mod tau) mod n only, tau = ceil(log2 n); receivers weigh it 1/2.

    Doubly stochastic; n = 2^tau: the exact average after tau rounds, else it is approached. Ying et al. 2021.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names, max(1, (len(names) - 1).bit_length()))

    def _round(self, number: int) -> tuple[RoundLinks, RowOf]:
        n = len(self.names)
        if n == 1:
            return _alone(self.names)
        hop = 1 << (number - 1)
        links = RoundLinks(self.names, [((i - hop) % n,) for i in range(n)], [((i + hop) % n,) for i in range(n)])
        return links, Mixer("uniform").rows(links)


def _alone(names: tuple[str, ...]) -> tuple[RoundLinks, RowOf]:
    """Return the links and rows of a round in which nobody sends."""
    nobody: list[tuple[int, ...]] = [()] * len(names)
    links = RoundLinks(names, nobody, nobody)
    return links, Mixer("uniform").rows(links)


@SCHEDULES.register("random-matching")
def random_matching(setting: Setting) -> Schedule:
    """Random pairs average, other pairs each round; on the links of a graph if one is given."""
    return RandomMatching(setting.names, setting.seed, setting.graph, setting.mixer)


class RandomMatching(Schedule):
    """Every round pairs the agents at random (one sits out if n is odd); pairs average, weights by the mixing rule.

    With a base graph only its links are used: a random maximal matching of them.
    """

    def __init__(self, names: Sequence[str], seed: int, base: nx.Graph[str] | None, mixer: Mixer) -> None:
        super().__init__(names, None)
        self._seed, self._mixer = seed, mixer
        self._base = links_of(base) if base is not None else None
        self.any_pair = self._base is None
        if self._base is not None and self._base.directed:
            raise TopologyError("schedule 'random-matching' needs undirected links")
        self._at(1)

    def _round(self, number: int) -> tuple[RoundLinks, RowOf]:
        rng = random.Random(derive_seed(self._seed, "random-matching", number))
        n = len(self.names)
        partner: list[tuple[int, ...]] = [()] * n
        if self._base is None:
            order = sorted(range(n), key=lambda _: rng.random())
            pairs = list(zip(order[::2], order[1::2], strict=False))
        else:
            pairs = [(i, j) for i, others in enumerate(self._base.targets) for j in others if i < j]
            pairs.sort(key=lambda _: rng.random())
        for i, j in pairs:
            if not partner[i] and not partner[j]:
                partner[i], partner[j] = (j,), (i,)
        links = RoundLinks(self.names, partner, partner)
        return links, self._mixer.rows(links)

    def _ever(self, i: int) -> tuple[set[int], set[int]]:
        either = set(self._base.targets[i]) if self._base else set(range(len(self.names))) - {i}
        return either, either


@SCHEDULES.register("epidemic")
def epidemic(setting: Setting, *, s: int | None = None) -> Schedule:
    """Each agent sends to s random others (default 4, or all if fewer); receivers take the mean of what they hold."""
    own_weights(setting, "epidemic")
    others = len(setting.names) - 1
    if s is not None and not 1 <= s <= max(others, 1):
        raise TopologyError(f"option 's' of schedule 'epidemic' must be from 1 to {max(others, 1)}, not {s}")
    return Epidemic(setting.names, setting.seed, setting.graph, min(4, others) if s is None else s)


class Epidemic(Schedule):
    """Every round each agent sends to `s` others drawn at random; receivers take the plain mean of what they hold.

    Row-stochastic: agents agree, on a random weighted mean near the average. With a base graph only its links are
    used. De Vos et al., Epidemic Learning, NeurIPS 2023.
    """

    def __init__(self, names: Sequence[str], seed: int, base: nx.Graph[str] | None, s: int) -> None:
        super().__init__(names, None)
        self._seed, self._s = seed, s
        self._base = links_of(base) if base is not None else None
        self.any_pair = self._base is None

    def _round(self, number: int) -> tuple[RoundLinks, RowOf]:
        rng = random.Random(derive_seed(self._seed, "epidemic", number))
        n = len(self.names)
        targets: list[list[int]] = []
        sources: list[list[int]] = [[] for _ in range(n)]
        for i in range(n):
            among = self._base.targets[i] if self._base else None
            count = n - 1 if among is None else len(among)
            picks = _distinct(rng, count, min(self._s, count))
            sent = [p + (p >= i) for p in picks] if among is None else [among[p] for p in picks]
            targets.append(sorted(sent))
            for j in sent:
                sources[j].append(i)
        links = RoundLinks(self.names, sources, targets)
        return links, Mixer("uniform").rows(links)

    def _ever(self, i: int) -> tuple[set[int], set[int]]:
        if self._base is None:
            either = set(range(len(self.names))) - {i}
            return either, either
        return set(self._base.sources[i]), set(self._base.targets[i])


def _distinct(rng: random.Random, count: int, size: int) -> list[int]:
    """Return `size` distinct numbers below `count` (Floyd's algorithm), from `random()` alone: its stream is stable."""
    picks: list[int] = []
    for top in range(count - size, count):
        pick = int(rng.random() * (top + 1))
        picks.append(top if pick in picks else pick)
    return picks


@SCHEDULES.register("base-k")
def base_k(setting: Setting, *, k: int = 1) -> Schedule:
    """Base-(k+1) graph: at most k peers a round, the exact average every few rounds for any number of agents."""
    own_weights(setting, "base-k")
    return BaseK(setting.names, k)


@SCHEDULES.register("cycle")
def cycle(setting: Setting, *, graphs: list[Any] | None = None) -> Schedule:
    """A list of graphs in turn: option graphs = ["ring", { graph = "random-regular", options = { degree = 3 } }]."""
    if not isinstance(graphs, list) or not graphs or setting.resolve is None:
        raise TopologyError("schedule 'cycle' needs option graphs = [\"ring\", …], a list of names or tables")
    return CycleSchedule([setting.resolve(entry) for entry in graphs], setting.mixer)
