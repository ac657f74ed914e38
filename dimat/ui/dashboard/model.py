"""A run as the dashboard shows it: agents, links, merges, adoptions, log. Pure.

Each item carries the version at which it last changed, so that `dimat.ui.dashboard.api` can send a reader exactly the
changes since its version. All memory is bounded, by the constants below.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dimat.events.parse import parse_event
from dimat.events.view import AgentView
from dimat.ui.dashboard.field_values import name

MOST_AGENTS = 10_000
MOST_EDGES = 20_000
MOST_MERGES = 50_000
MOST_ADOPTIONS = 5_000
MOST_LOG = 400
MOST_POINTS = 400_000
"""Points of all curves together; each agent's curve has at least `LEAST_POINTS`."""
LEAST_POINTS = 100

Plain = Mapping[str, Any]
"""An event as `Event.to_dict` returns it, or other data from outside."""


class LogEntry:
    """One event of the log's tail; ordered by time, then arrival."""

    __slots__ = ("event", "key", "message")

    def __init__(self, time_s: float, version: int, event: Plain) -> None:
        self.key = (time_s, version)
        self.event = event
        self.message: tuple[int, str] | None = None  # level and text, once somebody wants to see it

    def __lt__(self, other: LogEntry) -> bool:
        return self.key < other.key


class RunModel:
    """The state of a run so far. `version` grows with each change."""

    def __init__(self) -> None:
        self.version = 0
        self.run: dict[str, Any] = {}
        self.simulated = False
        self.finished = ""
        self.newest_s = 0.0
        self.agents: dict[str, AgentModel] = {}
        self.edges: dict[tuple[str, str], Edge] = {}
        self.merges: dict[tuple[str, int], Merge] = {}
        self.adoptions: dict[tuple[str, int, str], Adoption] = {}
        self.log: list[LogEntry] = []
        self.left_out = 0
        """Number of agents and links that are not kept, since there are too many."""
        self.rounds_changed: set[int] = set()
        """Rounds whose means must be computed again."""
        self.readers: defaultdict[str, list[Edge]] = defaultdict(list)
        """Links by their source."""

    def _tell_run(self, **values: Any) -> None:
        self.run.update(values)

    @property
    def metric(self) -> str:
        """The metric that is shown: the run's own, else accuracy if there is one."""
        return self.run.get("metric") or self.run.get("found_metric") or ""

    def _agent(self, given: object) -> AgentModel | None:
        if isinstance(given, str) and (found := self.agents.get(given)) is not None:
            return found  # nearly always
        who = name(given)
        found = self.agents.get(who)
        if found is not None or not who:
            return found
        if len(self.agents) >= MOST_AGENTS:
            self.left_out += 1
            return None
        found = self.agents[who] = AgentModel(who, version=self.version)
        return found

    def _edge(self, source: object, reader: object) -> Edge | None:
        if isinstance(source, str) and isinstance(reader, str) and (found := self.edges.get((source, reader))):
            return found  # nearly always
        key = (name(source), name(reader))
        found = self.edges.get(key)
        if found is not None or key[0] == key[1] or self._agent(key[0]) is None or self._agent(key[1]) is None:
            return found
        if len(self.edges) >= MOST_EDGES:
            self.left_out += 1
            return None
        found = self.edges[key] = Edge(*key, version=self.version)
        self.readers[key[0]].append(found)
        return found

    def _point(self, agent: AgentModel, round_: int) -> Point:
        # the newest last, so that what is new is found from the end
        point = agent.points.pop(round_, None) or Point()
        agent.points[round_] = point
        point.version = self.version
        self.rounds_changed.add(round_)
        most = max(LEAST_POINTS, MOST_POINTS // len(self.agents))
        if len(agent.points) > most:
            for old in sorted(agent.points)[1 : -LEAST_POINTS // 2 : 2]:
                del agent.points[old]
        return point

    def _merge(self, agent: AgentModel, round_: int, finished: Plain) -> None:
        self.merges[agent.name, round_] = Merge(finished, self.version)
        while len(self.merges) > MOST_MERGES:
            del self.merges[next(iter(self.merges))]

    def _adoption(self, agent: AgentModel, round_: int, peer: str, event: Plain) -> None:
        self.adoptions[agent.name, round_, peer] = Adoption(event, self.version)
        while len(self.adoptions) > MOST_ADOPTIONS:
            del self.adoptions[next(iter(self.adoptions))]

    def _log(self, time_s: float, event: Plain) -> None:
        entry = LogEntry(time_s, self.version, event)
        if len(self.log) < MOST_LOG:
            heapq.heappush(self.log, entry)
        else:
            heapq.heappushpop(self.log, entry)


State = Literal["running", "late", "lost", "left", "unknown"]


@dataclass(slots=True)
class Point:
    """One round of one agent: mean training loss, and test metrics before and after the merge."""

    loss: float | None = None
    before: Mapping[str, Any] = field(default_factory=dict[str, Any])
    after: Mapping[str, Any] = field(default_factory=dict[str, Any])
    version: int = 0


@dataclass(slots=True)
class AgentModel:
    """One agent. `own`: whether its own events are read, not only others' reports about it; `alive`: whether it
    answered the last request, None if there was none; `link_faults`: by agent that listens to it, the fault of the
    link, "" for none; times in seconds of the run's clock; `round_s`: duration of its recent rounds; bytes since the
    log began.
    """

    name: str
    own: bool = False
    phase: str = ""
    event_s: float = 0.0
    finished_s: float | None = None
    round_s: float | None = None
    address: str = ""
    samples: int = 0
    sent: int = 0
    received: int = 0
    warnings: int = 0
    alive: bool | None = None
    link_faults: dict[str, str] = field(default_factory=dict[str, str])
    histogram: tuple[int, ...] = ()
    points: dict[int, Point] = field(default_factory=dict[int, Point])
    state: State = "unknown"
    why: str = ""
    version: int = 0

    _view: AgentView = field(default_factory=AgentView)
    _newest: dict[str, Plain] = field(default_factory=dict[str, Plain])

    def note(self, kind: str, event: Plain) -> None:
        """Keep an event of this agent for `view`."""
        self._newest.pop(kind, None)  # to the end: they are folded in the order in which they came
        self._newest[kind] = event

    @property
    def view(self) -> AgentView:
        """The newest event of each kind, or else the status, as a view."""
        while self._newest:
            event = parse_event(self._newest.pop(next(iter(self._newest))))
            if event is not None:
                self._view.take(event)
        return self._view

    @property
    def merged(self) -> int:
        """Round of its last merge, 0 for none."""
        return 0 if self.view.finished is None else self.view.finished.round


@dataclass(slots=True)
class Edge:
    """A link: `reader` listens to `source`. `used`: round of the snapshot in the reader's last merge that had one;
    `late`: the reader's last round without it; `fault`: why."""

    source: str
    reader: str
    bytes: int = 0
    used: int | None = None
    late: int = 0
    fault: str = ""
    version: int = 0


@dataclass(slots=True)
class Merge:
    """One merge, from the `RoundFinished` of its round."""

    finished: Plain
    version: int = 0


@dataclass(slots=True)
class Adoption:
    """An agent's change into a peer's basis, from `BasisAdopted`."""

    event: Plain
    version: int = 0
