"""Folds events, and agents' answers about their status, into a `RunModel`. Pure.

No event or answer can make it raise an error: a field of another form counts as missing. Logs are long: only an agent's
newest event of each kind is parsed, on request (`AgentModel.view`), and this module reads only the fields that
accumulate over a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice

from dimat import events
from dimat.events.parse import KINDS, parse_event
from dimat.ui.dashboard.field_values import count, items, mapping, name, number, text
from dimat.ui.dashboard.health import health_of
from dimat.ui.dashboard.model import AgentModel, Plain, RunModel

MOST_LINKS = 1_000
"""Links of one agent that are taken from its status."""
AGENT_KINDS = frozenset(kind for kind, each in KINDS.items() if issubclass(each, events.AgentEvent))
PHASES = {
    "AgentStarted": "starting",
    "Joined": "joined",
    "Resumed": "resumed",
    "RoundStarted": "training",
    "Trained": "trained",
    "Published": "waiting for peers",
    "Merged": "merged",
    "RoundFinished": "round done",
    "AgentCrashed": "crashed",
    "AgentLeft": "left",
}
"""The phase of an agent after an event."""
QUIET = frozenset({"RoundStarted", "Checkpointed", "Published", "SnapshotFetched"})
"""Kinds without a line in `dimat.ui.terminal.lines`."""


class RunState(RunModel):
    """The state of a run, from its events so far."""

    def __init__(self) -> None:
        super().__init__()
        self._effects: Mapping[str, Callable[[AgentModel, Plain], None]] = {
            "AgentStarted": self._agent_started,
            "Joined": self._back,
            "Resumed": self._back,
            "Trained": self._trained,
            "SnapshotFetched": self._fetched,
            "PeerLate": self._missing,
            "PeerRefused": self._missing,
            "BasisAdopted": self._adopted,
            "RoundFinished": self._round_finished,
        }

    # ── taking in ────────────────────────────────────────────────────────────────────────────────────────────
    def take(self, plain: Plain) -> None:
        """Add an event, as `Event.to_dict` returns it."""
        kind = plain.get("event")
        if not isinstance(kind, str):
            return
        self.version += 1
        at = number(plain.get("time_s")) or 0.0
        self.newest_s = max(self.newest_s, at)
        if not self.run.get("name") and (run := text(plain.get("run"))):
            self._tell_run(name=run)
        if kind in AGENT_KINDS:
            agent = self._agent(plain.get("agent"))
            if agent is None:
                return
            agent.own = True
            agent.event_s = max(agent.event_s, at)
            agent.version = self.version
            agent.note(kind, plain)
            agent.phase = PHASES.get(kind, agent.phase)
            if (effect := self._effects.get(kind)) is not None:
                effect(agent, plain)
            if kind in QUIET:
                return
        elif kind == "RunStarted":
            self._run_started(plain)
            return
        elif kind == "RunFinished":
            self.finished = text(plain.get("reason")) or "done"
            self._tell_run(wall_s=number(plain.get("wall_s")))
        elif kind == "RoundSummary":
            self._tell_run(consensus=number(plain.get("consensus_distance")), bases=count(plain.get("bases")))
            return
        elif kind == "Warned" and (agent := self._agent(plain.get("agent"))) is not None:
            agent.warnings += 1
            agent.version = self.version
        self._log(at, plain)

    def take_all(self, plain: Iterable[Plain]) -> None:
        """Add several events."""
        for event in plain:
            self.take(event)

    def take_status(self, agent: str, status: Plain | None, now: float) -> None:
        """Add an agent's answer to a request for its status; None: it did not answer. Its reports about peers count as
        its view of them."""
        found = self._agent(agent)
        if found is None:
            return
        self.version += 1
        found.version = self.version
        found.alive = status is not None
        if status is None:
            return
        view = found.view
        view.left, view.crashed = text(status.get("left")), False
        view.round = max(view.round, count(status.get("round")))
        found.phase = text(status.get("phase"), 40)
        found.address = text(status.get("address"), 100) or found.address
        found.sent = max(found.sent, count(status.get("sent_bytes")))
        found.received = max(found.received, count(status.get("received_bytes")))
        if not found.own:
            self._own_status(found, status)
        # a peer tells of its links too, as many as it likes, and to whomever it likes: members of the map alone count
        members = {member for known in self.agents.values() if known.own for member in known.view.members}
        for peer, link in islice(mapping(status.get("peers")).items(), MOST_LINKS):
            if not members or peer in members:
                self._link(found, peer, mapping(link))

    def refresh(self, now: float) -> None:
        """Update the health of each agent. `now`: wall clock; a simulated run has its own time."""
        at = self.newest_s if self.simulated else now
        running = sorted(a.view.round for a in self.agents.values() if a.own and not (a.view.left or a.view.crashed))
        middle = running[len(running) // 2] if running else 0
        for agent in self.agents.values():
            found = health_of(self, agent, at, middle)
            if found != (agent.state, agent.why):
                agent.state, agent.why = found
                self.version += 1
                agent.version = self.version

    # ── events ───────────────────────────────────────────────────────────────────────────────────────────────
    def _run_started(self, plain: Plain) -> None:
        event = parse_event(plain)
        assert isinstance(event, events.RunStarted)
        self.simulated = True
        self.finished = ""
        self._tell_run(
            name=text(event.run),
            method=text(event.method),
            seed=event.seed,
            rounds=event.rounds,
            parameters=event.parameters,
            snapshot_bytes=event.snapshot_bytes,
            metric=text(event.metric, 60),
        )
        for who in event.agents:
            if (agent := self._agent(who)) is not None:
                agent.own = True
                agent.version = self.version
        for one, other in event.edges:
            self._edge(one, other)
            self._edge(other, one)
        for who, counts in event.histogram.items():
            if (agent := self._agent(who)) is not None:
                agent.histogram, agent.samples = counts, sum(counts)

    def _agent_started(self, agent: AgentModel, plain: Plain) -> None:
        self._back(agent, plain)
        event = parse_event(plain)
        assert isinstance(event, events.AgentStarted)
        agent.address, agent.samples = text(event.address, 100), event.samples
        agent.histogram = event.histogram or agent.histogram
        if "parameters" not in self.run:
            self._tell_run(parameters=event.parameters)
        for peer in event.peers:
            self._edge(peer, agent.name)

    def _back(self, agent: AgentModel, plain: Plain) -> None:
        agent.alive, agent.finished_s = None, None

    def _trained(self, agent: AgentModel, plain: Plain) -> None:
        # live, before the round's end; a round that ends in another life than it was trained in tells no loss
        self._point(agent, count(plain.get("round"))).loss = number(plain.get("loss"))

    def _fetched(self, agent: AgentModel, plain: Plain) -> None:
        size = count(plain.get("bytes"))
        if (edge := self._edge(plain.get("peer"), agent.name)) is not None:
            edge.bytes += size
            edge.version = self.version
        agent.received += size

    def _missing(self, agent: AgentModel, plain: Plain) -> None:
        if (edge := self._edge(plain.get("peer"), agent.name)) is not None:
            reason = text(plain.get("reason"), 120)
            edge.late = count(plain.get("round"))
            edge.fault = late_text(reason) if plain["event"] == "PeerLate" else refused_text(reason)
            edge.version = self.version

    def _adopted(self, agent: AgentModel, plain: Plain) -> None:
        self._adoption(agent, count(plain.get("round")), name(plain.get("peer")), plain)

    def _round_finished(self, agent: AgentModel, plain: Plain) -> None:
        at = number(plain.get("time_s"))
        if at is not None and agent.finished_s is not None and at > agent.finished_s:
            took = at - agent.finished_s
            agent.round_s = took if agent.round_s is None else 0.7 * agent.round_s + 0.3 * took
        agent.finished_s = at
        agent.sent += count(plain.get("bytes_sent"))
        number_ = count(plain.get("round"))
        point = self._point(agent, number_)
        point.before, point.after = mapping(plain.get("before")), mapping(plain.get("after"))
        if (loss := number(plain.get("loss"))) is not None:
            point.loss = loss
        self._find_metric(point.after)
        if parts := items(plain.get("contributions")):
            self._merge(agent, number_, plain)
        for part in map(mapping, parts):
            if (edge := self._edge(part.get("agent"), agent.name)) is not None:
                edge.used = count(part.get("round"))
                edge.version = self.version

    def _find_metric(self, after: Plain) -> None:
        if after and not self.metric:
            others = (metric for metric in after if metric not in ("loss", "nll"))
            self._tell_run(found_metric="accuracy" if "accuracy" in after else str(next(others, next(iter(after)))))

    # ── answers ──────────────────────────────────────────────────────────────────────────────────────────────
    def _own_status(self, agent: AgentModel, status: Plain) -> None:
        """Add the status of a peer whose log is not here: its newest training and merge, which may be of two rounds
        (its status has no `RoundFinished`)."""
        trained, merged = mapping(status.get("trained")), mapping(status.get("merged"))
        if trained:
            agent.note("Trained", {**trained, "event": "Trained"})
            self._trained(agent, trained)
        if merged:
            agent.note("RoundFinished", {**merged, "event": "RoundFinished"})
            point = self._point(agent, count(merged.get("round")))
            point.before, point.after = mapping(merged.get("before")), mapping(merged.get("after"))

    def _link(self, reader: AgentModel, peer: object, link: Plain) -> None:
        edge = self._edge(peer, reader.name)
        if edge is None:
            return
        source = self.agents[edge.source]
        trouble = "" if link.get("connected") is True else text(link.get("trouble"), 160) or "not connected"
        edge.bytes = max(edge.bytes, count(link.get("received_bytes")))
        edge.version = self.version
        rounds = [count(offered) for offered in items(link.get("rounds"))]
        if not source.own:
            source.view.round = max([source.view.round, *rounds])
            source.address = text(link.get("address"), 100) or source.address
        source.link_faults[reader.name] = trouble
        source.version = self.version


def late_text(reason: str) -> str:
    """Return in words why a peer was missing."""
    return "late" if reason in ("", "deadline") else f"not heard: {text(reason, 120)}"


def refused_text(reason: str) -> str:
    """Return in words why a peer was refused."""
    return f"refused: {text(reason, 120)}"
