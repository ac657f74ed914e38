"""What the page is told: the state, or what of it is new since a version, as plain values for JSON."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from typing import Any, cast

from dimat import events
from dimat.ui.dashboard.field_values import count, items, mapping, name, number, text
from dimat.ui.dashboard.model import Agent, LogEntry, Merge, RunModel
from dimat.ui.terminal.lines import lines_of

CURVES_MOST = 60
"""Up to so many agents each one's curve is told at once; beyond, the mean and range, and a curve when it is asked."""
PAGE = 50
PAGE_MOST = 500


class Shown:
    """Tells a state's readers what is new. Means over the agents are kept here, since they are made from all curves."""

    def __init__(self, state: RunModel) -> None:
        self._state = state
        self._means: dict[int, tuple[int, list[float | None]]] = {}

    def since(self, version: int) -> dict[str, Any]:
        """Return all that changed after `version` (0: everything), and the `version` that the reader then has."""
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
            merge
            for merge in self._state.merges.values()
            if merge.done and agent in ("", merge.agent) and round_ in (None, merge.round)
        ]
        found.sort(key=lambda merge: (-merge.round, merge.agent))
        limit = max(1, min(limit, PAGE_MOST))
        rows = [merge_row(merge, metric) for merge in found[offset : offset + limit]]
        return {"metric": metric, "total": len(found), "offset": offset, "merges": rows}

    def curves(self, agents: Iterable[str]) -> dict[str, object]:
        """Return the whole curves of some agents."""
        metric = self._state.metric
        found = (self._state.agents.get(who) for who in agents)
        return {"metric": metric, "curves": {agent.name: curve(agent, metric, 0) for agent in found if agent}}

    def adoptions(self, agents: Collection[str]) -> list[dict[str, object]]:
        """Return which agents took over a peer's basis."""
        return [
            {"agent": a.agent, "round": a.round, "peer": a.peer, "moved": a.moved, "groups": a.groups}
            for a in self._state.adoptions.values()
            if not agents or a.agent in agents
        ]


def agent_row(agent: Agent, metric: str) -> dict[str, object]:
    """Return what the page shows of an agent."""
    return {
        "name": agent.name,
        "own": agent.own,
        "state": agent.state,
        "why": agent.why,
        "round": agent.round,
        "phase": agent.phase,
        "merged": agent.merged,
        "metric": number(agent.after.get(metric)),
        "before": number(agent.before.get(metric)),
        "loss": agent.loss,
        "heard": agent.heard,
        "expected": agent.expected,
        "accepted": agent.accepted,
        "basis": agent.basis,
        "sent": agent.sent,
        "received": agent.received,
        "address": agent.address,
        "samples": agent.samples,
        "secure": agent.secure,
        "checkpoint": agent.checkpoint,
        "warnings": agent.warnings,
        "event_s": agent.event_s,
        "round_s": agent.round_s,
        "histogram": agent.histogram,
    }


def curve(agent: Agent, metric: str, version: int) -> list[list[float | None]]:
    """Return [round, loss, metric before, metric after] of each round of an agent that changed after a version."""
    rows: list[list[float | None]] = []
    for number_, point in reversed(agent.points.items()):
        if point.version <= version:
            break
        before, after = number(point.before.get(metric)), number(point.after.get(metric))
        rows.append([number_, point.loss, before, after])
    rows.sort(key=lambda row: row[0] or 0)
    return rows


def merge_row(merge: Merge, metric: str) -> dict[str, object]:
    """Return what the page shows of a merge."""
    return {
        "agent": merge.agent,
        "round": merge.round,
        "time_s": merge.time_s,
        "heard": merge.heard,
        "expected": merge.expected,
        "parts": [
            (
                name(part.get("agent")),
                count(part.get("round")),
                number(part.get("weight")),
                text(part.get("verdict"), 40),
            )
            for part in map(mapping, merge.parts)
        ],
        "before": number(merge.before.get(metric)),
        "after": number(merge.after.get(metric)),
        "verdict": verdict(merge.accepted),
        "merge_s": merge.merge_s,
        "notes": merge.notes,
        "missing": merge.missing,
    }


def verdict(accepted: float | None) -> str:
    """Return in words what share of a merge was kept."""
    if accepted is None:
        return ""
    return "accepted" if accepted >= 1 else f"{accepted:.0%} accepted" if accepted > 0 else "turned down"


def log_row(entry: LogEntry) -> list[object]:
    """Return [version, time in s, level, agent, text] of an event; levels as `dimat.ui.terminal.lines` has them."""
    if entry.said is None:
        entry.said = messages_of(entry.event)
    level, words = entry.said
    return [entry.key[1], entry.key[0], level, name(entry.event.get("agent")), words]


def messages_of(event: Mapping[str, Any]) -> tuple[int, str]:
    """Return how loud an event is, and what there is to say of it."""
    try:
        lines = lines_of(event_of(event))
    except (TypeError, ValueError, AttributeError, KeyError):  # a field of another form than ours
        lines = []
    if lines:
        return min(line.level for line in lines), text("; ".join(line.text for line in lines), 600)
    kind = text(event.get("event"), 60)
    match kind:
        case "RoundFinished":
            return 2, f"{text(event.get('agent'), 100)}: round {text(event.get('round'), 20)} done"
        case "AgentStarted":
            return 0, f"{text(event.get('agent'), 100)} is up at {text(event.get('address'), 100)}"
        case "RunFinished":
            return 0, f"the run ended: {text(event.get('reason'), 60)}"
        case _:
            return 1, kind


def event_of(values: Mapping[str, Any]) -> events.Event:
    """Return the event that `Event.to_dict` told; TypeError, KeyError or AttributeError where it is another thing."""
    kind = getattr(events, str(values["event"]))
    if not (isinstance(kind, type) and issubclass(kind, events.Event)):
        raise TypeError(f"{values['event']} is no event")
    known = {field.name for field in fields(kind)}
    given = {key: value for key, value in values.items() if key in known}
    if "contributions" in given:
        parts = (cast("dict[str, Any]", mapping(part)) for part in items(given["contributions"]))
        given["contributions"] = tuple(events.Contribution(**part) for part in parts)
    return kind(**given)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
