"""Schedules by name: static, cycle, one-peer-exponential, random-matching, epidemic, base-k.

A schedule maps a round (from 1) to a graph and a mixing matrix. The classes are in `rounds`, `varying` and `base_k`;
this module makes them from what an operator writes, and says in one line what cannot be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dimat.errors import TopologyError
from dimat.registry import Entry, Registry
from dimat.topology.base_k import BaseK
from dimat.topology.mixing import Mixer
from dimat.topology.rounds import CycleSchedule, Schedule, check_schedule
from dimat.topology.varying import Epidemic, OnePeerExponential, RandomMatching

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True)
class Setting:
    """What schedules are made from: agents, the graph if one was given, the mixing rule, the seed."""

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
    """Raise TopologyError where a mixing rule was chosen for a schedule that brings its own weights."""
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


@SCHEDULES.register("random-matching")
def random_matching(setting: Setting) -> Schedule:
    """Random pairs average, other pairs each round; on the links of a graph if one is given."""
    return RandomMatching(setting.names, setting.seed, setting.graph, setting.mixer)


@SCHEDULES.register("epidemic")
def epidemic(setting: Setting, *, s: int | None = None) -> Schedule:
    """Each agent sends to s random others (default 4, or all if fewer); receivers take the mean of what they hold."""
    own_weights(setting, "epidemic")
    others = len(setting.names) - 1
    if s is not None and not 1 <= s <= max(others, 1):
        raise TopologyError(f"option 's' of schedule 'epidemic' must be from 1 to {max(others, 1)}, not {s}")
    return Epidemic(setting.names, setting.seed, setting.graph, min(4, others) if s is None else s)


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
