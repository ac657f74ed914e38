"""Events, and what agents say when they are asked, folded into what is known of a run. Pure: no clock, no file.

Whatever an event or an answer holds, taking it in raises nothing: a field of another form counts as missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice

from dimat.ui.dashboard.field_values import count, items, mapping, name, number, shares, text
from dimat.ui.dashboard.health import judged
from dimat.ui.dashboard.model import Adoption, Agent, RunModel, Values

MOST_TOLD = 1_000
"""Links of one agent that its status may tell of."""


class RunState(RunModel):
    """All that the events so far tell."""

    def __init__(self) -> None:
        super().__init__()
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
        self._log(at, event)

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
            found = judged(self, agent, at, middle)
            if found != (agent.state, agent.why):
                agent.state, agent.why = found
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
        groups = shares(event.get("groups"))
        self._adoption(Adoption(agent.name, number_, peer, number(event.get("moved")), groups, self.version))

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


_QUIET = frozenset({"RoundStarted", "Checkpointed", "Published", "SnapshotFetched"})
"""Kinds of which `dimat.ui.terminal.lines` has nothing to say."""


def _likely(metrics: list[str]) -> str:
    if "accuracy" in metrics:
        return "accuracy"
    return next((metric for metric in metrics if metric not in ("loss", "nll")), metrics[0])
