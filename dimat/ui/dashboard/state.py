"""Events folded into what the dashboard shows: agents, links, merges, adoptions, log. Pure: no clock, no file.

Each thing carries the version at which it last changed, so that `dimat.ui.dashboard.shown` can tell a reader exactly
what is new since a version that it has. Whatever an event holds, taking it in raises nothing: a field of another form
counts as missing. All memory is bounded, by the constants below.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

from dimat.ui.dashboard.facts import Adoption, Agent, Edge, Merge, Point, State
from dimat.ui.dashboard.values import count, items, mapping, name, number, shares, text
from dimat.ui.text import seconds_text

MOST_AGENTS = 10_000
MOST_EDGES = 20_000
MOST_MERGES = 50_000
MOST_ADOPTIONS = 5_000
MOST_LOG = 400
MOST_POINTS = 400_000
"""Points of all curves together; an agent's has at least `LEAST_POINTS`."""
LEAST_POINTS = 100
SILENT_S = 60.0
"""A real agent that cannot be asked is taken for lost after so long without an event, or five of its rounds."""
MOST_TOLD = 1_000
"""Links of one agent that its status may tell of."""
BEHIND = 2
"""An agent so many rounds behind the middle one is shown as late."""

Values = Mapping[str, Any]


class LogEntry:
    """One event of the log's tail; ordered by time, then arrival."""

    __slots__ = ("event", "key", "said")

    def __init__(self, time_s: float, version: int, event: Values) -> None:
        self.key = (time_s, version)
        self.event = event
        self.said: tuple[int, str] | None = None  # level and text, once somebody wants to see it

    def __lt__(self, other: LogEntry) -> bool:
        return self.key < other.key


class RunState:
    """All that the events so far tell. `version` grows with each that changes something."""

    def __init__(self) -> None:
        self.version = 0
        self.run: dict[str, Any] = {}
        self.run_version = 0
        self.simulated = False
        self.finished = ""
        self.newest_s = 0.0
        self.agents: dict[str, Agent] = {}
        self.edges: dict[tuple[str, str], Edge] = {}
        self.merges: dict[tuple[str, int], Merge] = {}
        self.adoptions: dict[tuple[str, int, str], Adoption] = {}
        self.log: list[LogEntry] = []
        self.left_out = 0
        """Agents and links that are not kept, since there are too many."""
        self.rounds_changed: set[int] = set()
        """Rounds whose means are to be made anew."""
        self._out: defaultdict[str, list[Edge]] = defaultdict(list)
        self._take: dict[str, Callable[[Agent, Values], None]] = {
            "AgentStarted": self._agent_started,
            "RoundStarted": self._round_started,
            "Trained": self._trained,
            "Published": self._published,
            "SnapshotFetched": self._fetched,
            "PeerLate": self._late,
            "PeerRefused": self._refused,
            "BasisAdopted": self._adopted,
            "Merged": self._merged,
            "RoundsSkipped": self._round_only,
            "Joined": self._joined,
            "Resumed": self._resumed,
            "AgentCrashed": self._crashed,
            "AgentLeft": self._agent_left,
            "Checkpointed": self._checkpointed,
            "RoundFinished": self._round_finished,
        }

    # ── taking in ────────────────────────────────────────────────────────────────────────────────────────────
    def take(self, event: Values) -> None:
        """Take an event in, as `Event.to_dict` gives it."""
        kind = event.get("event")
        if not isinstance(kind, str):
            return
        self.version += 1
        at = number(event.get("time_s")) or 0.0
        if at > self.newest_s:
            self.newest_s = at
        if not self.run.get("name") and (run := text(event.get("run"))):
            self._tell_run(name=run)
        handle = self._take.get(kind)
        if handle is not None:
            agent = self._agent(event.get("agent"))
            if agent is None:
                return
            agent.own = True
            agent.event_s = max(agent.event_s, at)
            agent.version = self.version
            handle(agent, event)
            if kind in _QUIET:
                return
        elif kind == "RunStarted":
            self._run_started(event)
            return
        elif kind == "RunFinished":
            self.finished = text(event.get("reason")) or "done"
            self._tell_run(wall_s=number(event.get("wall_s")))
        elif kind == "RoundSummary":
            self._tell_run(consensus=number(event.get("consensus_distance")), bases=count(event.get("bases")))
            return
        elif kind == "Warned" and (agent := self._agent(event.get("agent"))) is not None:
            agent.warnings += 1
            agent.version = self.version
        entry = LogEntry(at, self.version, event)
        if len(self.log) < MOST_LOG:
            heapq.heappush(self.log, entry)
        else:
            heapq.heappushpop(self.log, entry)

    def take_all(self, events: Iterable[Values]) -> None:
        """Take several events in."""
        for event in events:
            self.take(event)

    def take_status(self, agent: str, status: Values | None, now: float) -> None:
        """Take in what an agent says when it is asked how it is; None: it did not answer. What it tells of its peers
        is taken for what it sees of them."""
        found = self._agent(agent)
        if found is None:
            return
        self.version += 1
        found.version = self.version
        found.alive = status is not None
        if status is None:
            return
        found.left = text(status.get("left"))
        found.crashed = False
        found.round = max(found.round, count(status.get("round")))
        found.phase = text(status.get("phase"), 40)
        found.address = text(status.get("address"), 100) or found.address
        found.sent = max(found.sent, count(status.get("sent_bytes")))
        found.received = max(found.received, count(status.get("received_bytes")))
        if not found.own:
            self._told_of_itself(found, status)
        # a peer tells of its links too, as many as it likes
        for peer, link in islice(mapping(status.get("peers")).items(), MOST_TOLD):
            self._told_of_peer(found, peer, mapping(link))

    def refresh(self, now: float) -> None:
        """Judge anew how each agent is. `now`: wall clock; a simulated run has its own time."""
        at = self.newest_s if self.simulated else now
        running = sorted(a.round for a in self.agents.values() if a.own and not (a.left or a.crashed))
        middle = running[len(running) // 2] if running else 0
        for agent in self.agents.values():
            judged = self._judge(agent, at, middle)
            if judged != (agent.state, agent.why):
                agent.state, agent.why = judged
                self.version += 1
                agent.version = self.version

    # ── the run ──────────────────────────────────────────────────────────────────────────────────────────────
    def _run_started(self, event: Values) -> None:
        self.simulated = True
        self.finished = ""
        self._tell_run(
            name=text(event.get("run")),
            method=text(event.get("method")),
            seed=count(event.get("seed")),
            rounds=count(event.get("rounds")),
            parameters=count(event.get("parameters")),
            snapshot_bytes=count(event.get("snapshot_bytes")),
            metric=text(event.get("metric"), 60),
        )
        for who in items(event.get("agents")):
            if (agent := self._agent(who)) is not None:
                agent.own = True
                agent.version = self.version
        for pair in items(event.get("edges")):
            ends = items(pair)
            if len(ends) == 2:
                self._edge(ends[0], ends[1])
                self._edge(ends[1], ends[0])
        for who, counts in mapping(event.get("histogram")).items():
            if (agent := self._agent(who)) is not None:
                agent.histogram = tuple(count(samples) for samples in items(counts))
                agent.samples = sum(agent.histogram)

    def _tell_run(self, **values: Any) -> None:
        self.run.update(values)
        self.run_version = self.version

    @property
    def metric(self) -> str:
        """The metric that is shown: the run's own, else accuracy where there is one."""
        return self.run.get("metric") or self.run.get("found_metric") or ""

    # ── an agent's life ──────────────────────────────────────────────────────────────────────────────────────
    def _agent_started(self, agent: Agent, event: Values) -> None:
        self._lives(agent, event)
        agent.address = text(event.get("address"), 100)
        agent.samples = count(event.get("samples"))
        agent.secure = event.get("secure") is True
        agent.phase = "starting"
        agent.histogram = tuple(count(samples) for samples in items(event.get("histogram"))) or agent.histogram
        if "parameters" not in self.run:
            self._tell_run(parameters=count(event.get("parameters")))
        for peer in items(event.get("peers")):
            self._edge(peer, agent.name)

    def _joined(self, agent: Agent, event: Values) -> None:
        self._lives(agent, event)
        agent.phase = "joined"

    def _resumed(self, agent: Agent, event: Values) -> None:
        self._lives(agent, event)
        agent.phase = "resumed"

    def _crashed(self, agent: Agent, event: Values) -> None:
        agent.crashed = True
        agent.back_s = number(event.get("back_s"))
        agent.phase = "crashed"

    def _agent_left(self, agent: Agent, event: Values) -> None:
        agent.left = text(event.get("reason")) or "left"
        agent.phase = "left"

    def _lives(self, agent: Agent, event: Values) -> None:
        agent.crashed, agent.left, agent.alive, agent.finished_s = False, "", None, None
        agent.round = max(agent.round, count(event.get("round")))

    def _round_only(self, agent: Agent, event: Values) -> None:
        agent.round = count(event.get("round")) or agent.round

    # ── a round ──────────────────────────────────────────────────────────────────────────────────────────────
    def _round_started(self, agent: Agent, event: Values) -> None:
        self._lives_on(agent)
        agent.round = count(event.get("round")) or agent.round
        agent.phase = "training"

    def _lives_on(self, agent: Agent) -> None:
        # an agent that does something has not crashed; whatever the order in which the log was put together
        agent.crashed = False
        agent.left = ""

    def _trained(self, agent: Agent, event: Values) -> None:
        agent.loss = number(event.get("loss"))
        agent.phase = "trained"
        self._point(agent, event).loss = agent.loss

    def _published(self, agent: Agent, event: Values) -> None:
        agent.phase = "waiting for peers"
        agent.basis = text(event.get("basis"), 100)

    def _fetched(self, agent: Agent, event: Values) -> None:
        edge = self._edge(event.get("peer"), agent.name)
        if edge is not None:
            edge.bytes += count(event.get("bytes"))
            edge.version = self.version
        agent.received += count(event.get("bytes"))

    def _late(self, agent: Agent, event: Values) -> None:
        reason = text(event.get("reason"), 120)
        self._missing(agent, event, "late" if reason in ("", "deadline") else f"not heard: {reason}")

    def _refused(self, agent: Agent, event: Values) -> None:
        self._missing(agent, event, f"refused: {text(event.get('reason'), 120)}")

    def _missing(self, agent: Agent, event: Values, fault: str) -> None:
        edge = self._edge(event.get("peer"), agent.name)
        if edge is None:
            return
        edge.late = count(event.get("round"))
        edge.fault = fault
        edge.version = self.version
        self._merge(agent, event).missing[edge.source] = fault

    def _adopted(self, agent: Agent, event: Values) -> None:
        number_, peer = count(event.get("round")), name(event.get("peer"))
        agent.basis = text(event.get("basis"), 100)
        key = (agent.name, number_, peer)
        groups = shares(event.get("groups"))
        self.adoptions[key] = Adoption(agent.name, number_, peer, number(event.get("moved")), groups, self.version)
        while len(self.adoptions) > MOST_ADOPTIONS:
            del self.adoptions[next(iter(self.adoptions))]

    def _merged(self, agent: Agent, event: Values) -> None:
        merge = self._merge(agent, event)
        merge.done = True
        merge.time_s = number(event.get("time_s")) or 0.0
        merge.parts = items(event.get("contributions"))
        merge.heard, merge.expected = count(event.get("heard")), count(event.get("expected"))
        merge.before, merge.after = mapping(event.get("before")), mapping(event.get("after"))
        merge.accepted, merge.merge_s = number(event.get("accepted")), number(event.get("merge_s"))
        merge.notes = tuple(text(note) for note in items(event.get("notes"))[:20])
        agent.phase = "merged"
        agent.merged = merge.round
        agent.before, agent.after = merge.before, merge.after
        agent.heard, agent.expected, agent.accepted = merge.heard, merge.expected, merge.accepted
        point = self._point(agent, event)
        point.before, point.after = merge.before, merge.after
        if merge.after and not self.run.get("metric") and not self.run.get("found_metric"):
            known = [str(key) for key in merge.after]
            self._tell_run(found_metric=_likely(known))
        for part in merge.parts:
            given = mapping(part)
            if (edge := self._edge(given.get("agent"), agent.name)) is not None:
                edge.used = count(given.get("round"))
                edge.version = self.version

    def _checkpointed(self, agent: Agent, event: Values) -> None:
        agent.checkpoint = count(event.get("round"))

    def _round_finished(self, agent: Agent, event: Values) -> None:
        at = number(event.get("time_s"))
        if at is not None and agent.finished_s is not None and at > agent.finished_s:
            took = at - agent.finished_s
            agent.round_s = took if agent.round_s is None else 0.7 * agent.round_s + 0.3 * took
        agent.finished_s = at
        agent.sent += count(event.get("bytes_sent"))
        agent.phase = "round done"

    def _point(self, agent: Agent, event: Values) -> Point:
        number_ = count(event.get("round"))
        # the newest last, so that what is new is found from the end
        point = agent.points.pop(number_, None) or Point()
        agent.points[number_] = point
        point.version = self.version
        self.rounds_changed.add(number_)
        most = max(LEAST_POINTS, MOST_POINTS // len(self.agents))
        if len(agent.points) > most:
            for old in sorted(agent.points)[1 : -LEAST_POINTS // 2 : 2]:
                del agent.points[old]
        return point

    def _merge(self, agent: Agent, event: Values) -> Merge:
        key = (agent.name, count(event.get("round")))
        merge = self.merges.get(key)
        if merge is None:
            merge = self.merges[key] = Merge(*key)
            while len(self.merges) > MOST_MERGES:
                del self.merges[next(iter(self.merges))]
        merge.version = self.version
        return merge

    # ── what is known ────────────────────────────────────────────────────────────────────────────────────────
    def _agent(self, given: object) -> Agent | None:
        if isinstance(given, str) and (found := self.agents.get(given)) is not None:
            return found  # nearly always
        who = name(given)
        found = self.agents.get(who)
        if found is not None or not who:
            return found
        if len(self.agents) >= MOST_AGENTS:
            self.left_out += 1
            return None
        found = self.agents[who] = Agent(who, version=self.version)
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
        self._out[key[0]].append(found)
        return found

    def _told_of_itself(self, agent: Agent, status: Values) -> None:
        """Take what a peer whose log we do not have says of itself."""
        trained, merged = mapping(status.get("trained")), mapping(status.get("merged"))
        if trained:
            agent.loss = number(trained.get("loss"))
            self._point(agent, trained).loss = agent.loss
        if merged:
            agent.merged = count(merged.get("round"))
            agent.before, agent.after = mapping(merged.get("before")), mapping(merged.get("after"))
            agent.heard, agent.expected = count(merged.get("heard")), count(merged.get("expected"))
            point = self._point(agent, merged)
            point.before, point.after = agent.before, agent.after

    def _told_of_peer(self, reader: Agent, peer: object, link: Values) -> None:
        edge = self._edge(peer, reader.name)
        if edge is None:
            return
        source = self.agents[edge.source]
        trouble = "" if link.get("connected") is True else text(link.get("trouble"), 160) or "not connected"
        edge.bytes = max(edge.bytes, count(link.get("received_bytes")))
        edge.version = self.version
        rounds = [count(offered) for offered in items(link.get("rounds"))]
        if not source.own:
            source.round = max([source.round, *rounds])
            source.address = text(link.get("address"), 100) or source.address
        source.told[reader.name] = trouble
        source.version = self.version

    def _judge(self, agent: Agent, at: float, middle: int) -> tuple[State, str]:
        if agent.crashed:
            back = "" if agent.back_s is None else f", back after {seconds_text(agent.back_s)}"
            return "lost", f"crashed in round {agent.round}{back}"
        if agent.left:
            return "left", agent.left
        if self.finished and agent.own:
            return "left", f"the run ended: {self.finished}"
        if agent.alive is False:
            return "lost", "its process does not answer"
        if not agent.own:
            return self._judged_by_others(agent)
        silence = at - agent.event_s
        if not self.simulated and agent.alive is None and silence > max(SILENT_S, 5 * (agent.round_s or 0.0)):
            return "lost", f"no event for {seconds_text(silence // 10 * 10)}"
        for edge in self._out[agent.name]:
            if edge.late and edge.late >= self.agents[edge.reader].merged:
                return "late", f"{edge.reader} did not have its snapshot in round {edge.late} ({edge.fault})"
        if agent.round and agent.round <= middle - BEHIND:
            return "late", f"{middle - agent.round} rounds behind the others"
        return "running", ""

    def _judged_by_others(self, agent: Agent) -> tuple[State, str]:
        if not agent.told:
            return ("running", "it answers") if agent.alive else ("unknown", "known by name only")
        troubles = {reader: trouble for reader, trouble in sorted(agent.told.items()) if trouble}
        if len(troubles) < len(agent.told):
            return "running", f"connected to {next(r for r, trouble in sorted(agent.told.items()) if not trouble)}"
        reader, trouble = next(iter(troubles.items()))
        if "has left" in trouble:
            return "left", trouble
        return "lost", f"{reader} does not reach it: {trouble}"


_QUIET = frozenset({"RoundStarted", "Checkpointed", "Published", "SnapshotFetched"})
"""Kinds of which `dimat.ui.lines` has nothing to say."""


def _likely(metrics: list[str]) -> str:
    if "accuracy" in metrics:
        return "accuracy"
    return next((metric for metric in metrics if metric not in ("loss", "nll")), metrics[0])
