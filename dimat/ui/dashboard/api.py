"""Answers to the page: the state, or its changes since a version, as JSON values."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from dimat import events
from dimat.events.parse import parse_event
from dimat.ui.dashboard.field_values import name, number, shares, text
from dimat.ui.dashboard.model import AgentModel, LogEntry, Plain, RunModel
from dimat.ui.dashboard.reducer import late_text, refused_text
from dimat.ui.terminal.lines import lines_of

CURVES_MOST = 60
"""Up to this many agents, each one's curve is sent at once; with more, mean and range, and single curves on request."""
PAGE = 50
PAGE_MOST = 500
MOST_NOTES = 20


class StateApi:
    """Answers a page's requests from a state. Means over the agents are cached here, as they are computed from all
    curves."""

    def __init__(self, state: RunModel) -> None:
        self._state = state
        self._means: dict[int, tuple[int, list[float | None]]] = {}

    def since(self, version: int) -> dict[str, Any]:
        """Return all changes after `version` (0: everything), and the `version` that the reader then has."""
        state = self._state
        metric = state.metric
        agents = [agent for agent in state.agents.values() if agent.version > version]
        few = len(state.agents) <= CURVES_MOST
        merges = max((merge.version for merge in state.merges.values()), default=0)
        return {
            "version": state.version,
            "since": version,
            "run": {
                **{key: value for key, value in state.run.items() if key != "found_metric"},
                "metric": metric,
                "simulated": state.simulated,
                "finished": state.finished,
                "now_s": state.newest_s,
                "left_out": state.left_out,
                "merges": merges,
                "few": few,
            },
            "agents": [agent_row(agent, metric) for agent in agents],
            "edges": [
                [edge.source, edge.reader, edge.bytes, edge.used, edge.late, edge.fault]
                for edge in state.edges.values()
                if edge.version > version
            ],
            "curves": {a.name: curve(a, metric, version) for a in agents if few and a.points},
            "means": self._changed_means(metric, version),
            "log": [log_row(entry) for entry in sorted(state.log) if entry.key[1] > version],
        }

    def _changed_means(self, metric: str, version: int) -> list[list[float | None]]:
        """Return [round, mean, lowest, highest metric after the merge, mean loss] of each round that has changed."""
        state = self._state
        for number_ in state.rounds_changed:
            points = [found for agent in state.agents.values() if (found := agent.points.get(number_)) is not None]
            if not points:
                continue
            values = [value for point in points if (value := number(point.after.get(metric))) is not None]
            losses = [point.loss for point in points if point.loss is not None]
            row: list[float | None] = [number_, _mean(values), min(values, default=None), max(values, default=None)]
            self._means[number_] = (max(point.version for point in points), [*row, _mean(losses)])
        state.rounds_changed.clear()
        return [row for _, (changed, row) in sorted(self._means.items()) if changed > version]

    def merges(
        self, agent: str = "", round_: int | None = None, offset: int = 0, limit: int = PAGE
    ) -> dict[str, object]:
        """Return merges, those of the highest rounds first: of one agent, of one round, or of all."""
        metric = self._state.metric
        found = [
            (-number_, who, merge.finished)
            for (who, number_), merge in self._state.merges.items()
            if agent in ("", who) and round_ in (None, number_)
        ]
        found.sort(key=lambda row: row[:2])
        limit = max(1, min(limit, PAGE_MOST))
        rows = [merge_row(finished, metric) for *_, finished in found[offset : offset + limit]]
        return {"metric": metric, "total": len(found), "offset": offset, "merges": rows}

    def curves(self, agents: Iterable[str]) -> dict[str, object]:
        """Return the full curves of some agents."""
        metric = self._state.metric
        found = (self._state.agents.get(who) for who in agents)
        return {"metric": metric, "curves": {agent.name: curve(agent, metric, 0) for agent in found if agent}}

    def adoptions(self, agents: Collection[str]) -> list[dict[str, object]]:
        """Return the adoptions of peers' bases."""
        return [
            {
                "agent": who,
                "round": number_,
                "peer": peer,
                "moved": number(a.event.get("moved")),
                "groups": shares(a.event.get("groups")),
            }
            for (who, number_, peer), a in self._state.adoptions.items()
            if not agents or who in agents
        ]


def agent_row(agent: AgentModel, metric: str) -> dict[str, object]:
    """Return an agent's row on the page."""
    view = agent.view
    finished = view.finished or events.RoundFinished(
        agent=agent.name, round=0, heard=0, expected=0, bytes_sent=0, bytes_received=0
    )
    return {
        "name": agent.name,
        "own": agent.own,
        "state": agent.state,
        "why": agent.why,
        "round": view.round,
        "phase": agent.phase,
        "merged": finished.round,
        "metric": number(finished.after.get(metric)),
        "before": number(finished.before.get(metric)),
        "loss": number(view.loss),
        "heard": finished.heard,
        "expected": finished.expected,
        "accepted": None if view.finished is None else finished.accepted,
        "basis": text(view.basis, 100),
        "sent": agent.sent,
        "received": agent.received,
        "address": agent.address,
        "samples": agent.samples,
        "secure": None if view.started is None else view.started.secure,
        "checkpoint": None if view.checkpoint is None else view.checkpoint.round,
        "warnings": agent.warnings,
        "event_s": agent.event_s,
        "round_s": agent.round_s,
        "histogram": agent.histogram,
    }


def curve(agent: AgentModel, metric: str, version: int) -> list[list[float | None]]:
    """Return [round, loss, metric before, metric after] of each round of an agent that changed after a version."""
    rows: list[list[float | None]] = []
    for number_, point in reversed(agent.points.items()):
        if point.version <= version:
            break
        before, after = number(point.before.get(metric)), number(point.after.get(metric))
        rows.append([number_, point.loss, before, after])
    rows.sort(key=lambda row: row[0] or 0)
    return rows


def merge_row(plain: Plain, metric: str) -> dict[str, object]:
    """Return a merge's row on the page. `plain`: its `RoundFinished`."""
    finished = parse_event(plain)
    assert isinstance(finished, events.RoundFinished)
    return {
        "agent": name(finished.agent),
        "round": finished.round,
        "time_s": finished.time_s,
        "heard": finished.heard,
        "expected": finished.expected,
        "parts": [
            (name(part.agent), part.round, number(part.weight), text(part.verdict, 40))
            for part in finished.contributions
        ],
        "before": number(finished.before.get(metric)),
        "after": number(finished.after.get(metric)),
        "verdict": verdict(finished.accepted),
        "merge_s": finished.seconds.get("merge"),
        "notes": tuple(text(note) for note in finished.notes[:MOST_NOTES]),
        "missing": {name(peer): late_text(reason) for peer, reason in finished.late.items()}
        | {name(peer): refused_text(reason) for peer, reason in finished.refused.items()},
    }


def verdict(accepted: float) -> str:
    """Return in words the share of a merge that was kept."""
    return "accepted" if accepted >= 1 else f"{accepted:.0%} accepted" if accepted > 0 else "rejected"


def log_row(entry: LogEntry) -> list[object]:
    """Return [version, time in s, level, agent, text] of an event, with the levels of `dimat.ui.terminal.lines`."""
    if entry.message is None:
        entry.message = message_of(entry.event)
    level, words = entry.message
    return [entry.key[1], entry.key[0], level, name(entry.event.get("agent")), words]


def message_of(plain: Plain) -> tuple[int, str]:
    """Return the level of an event, and its text."""
    event = parse_event(plain)
    if event is not None and (lines := lines_of(event)):
        return min(line.level for line in lines), text("; ".join(line.text for line in lines), 600)
    match event:
        case events.AgentStarted():
            return 0, f"{text(event.agent, 100)} is up at {text(event.address, 100)}"
        case events.RunFinished():
            return 0, f"the run ended: {text(event.reason, 60)}"
        case _:
            return 1, text(plain.get("event"), 60)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
