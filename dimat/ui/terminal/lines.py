"""Events as lines for a person, and a filter for similar lines.

A line's level is the verbosity from which it is shown: -1 always, 0 normal, 1 also deviations from the plan at one
agent, 2 every step.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from dimat import events
from dimat.ui.text import bytes_text, listed, metric_text, seconds_text

FIRSTS = 12
"""Lines of one kind that are shown before the rest are only counted."""
MOST_NAMED = 3


@dataclass(frozen=True, slots=True)
class EventLine:
    """One line about an event. `what`: the kind of line, equal for similar ones, if the event may occur often; `who`
    then says whom it concerns. `at_s`: when, if that matters."""

    text: str
    level: int
    what: str = ""
    who: str = ""
    at_s: float | None = None

    @property
    def timed(self) -> str:
        """The line with the time since the run began."""
        return self.text if self.at_s is None else f"at {seconds_text(self.at_s)}: {self.text}"


def lines_of(event: events.Event, agents: Collection[str] = ()) -> list[EventLine]:
    """Return the lines about an event. `agents`: all of the run."""
    line = _line_of(event, agents)
    notes = event.result.notes if isinstance(event, events.Merged | events.Trained) else ()
    return ([] if line is None else [line]) + [_note(event, note) for note in notes]


def _note(event: events.Event, note: str) -> EventLine:
    if not note.startswith(events.WARNING):
        return EventLine(f"{_where(event)}: {note}", 1)
    message = note.removeprefix(events.WARNING)
    who = event.agent if isinstance(event, events.AgentEvent) else ""
    return EventLine(f"{events.WARNING}{_where(event)}: {message}", -1, f"{events.WARNING}{_alike(message)}", who)


class RepeatFilter:
    """Passes similar lines a few times, and counts the rest. Memory is bounded by the number of agents."""

    def __init__(self) -> None:
        self._shown: dict[str, set[str]] = {}
        self._rest: dict[str, Counter[str]] = {}

    def first(self, line: EventLine, heard: bool = True) -> bool:
        """Return whether to show a line, and otherwise count it. `heard`: whether its level is shown at all."""
        shown = self._shown.setdefault(line.what, set())
        if heard and line.who not in shown and len(shown) < FIRSTS:
            shown.add(line.who)
            return True
        self._rest.setdefault(line.what, Counter())[line.who] += 1
        return False

    def rest(self) -> list[str]:
        """Return a line for each kind that was counted, and reset the counts."""
        lines = [self._line(what, counts) for what, counts in self._rest.items()]
        self._shown, self._rest = {}, {}
        return lines

    def _line(self, what: str, counts: Counter[str]) -> str:
        total = counts.total()
        more = " more" if self._shown.get(what) else ""
        times = f"{what}: {total:,}{more} {'time' if total == 1 else 'times'}"
        named = [f"{who}: {count:,}" for who, count in counts.most_common(MOST_NAMED) if who]
        others = len(counts) - MOST_NAMED
        if others > 0:
            named.append(f"{others:,} {'other' if others == 1 else 'others'}")
        return f"{times} ({'; '.join(named)})" if named else times


def _line_of(event: events.Event, agents: Collection[str]) -> EventLine | None:
    match event:
        case events.Warned(agent=agent, message=message):
            text = f"warning: {f'agent {agent}: ' if agent else ''}{message}"
            return EventLine(text, -1, f"warning: {_alike(message)}", agent)
        case events.LinksCut(groups=groups):
            parts = [listed(group, 4) for group in groups]
            if not {agent for group in groups for agent in group}.issuperset(agents):
                parts.append("the others")
            return _timed(event, f"the network is partitioned: {' | '.join(parts)}")
        case events.LinksHealed():
            return _timed(event, "a partition has ended")
        case events.AgentEvent():
            return _life(event) or _trouble(event) or _step(event)
        case _:
            return None


def told_once(warnings: Sequence[str]) -> list[str]:
    """Return warnings, combining those that differ only in the round."""
    counts = Counter(map(_alike, warnings))
    first = {_alike(warning): warning for warning in reversed(warnings)}
    return [
        first[alike] + (f" (and {count - 1:,} more {'time' if count == 2 else 'times'})" if count > 1 else "")
        for alike, count in counts.items()
    ]


def _alike(message: str) -> str:
    # a round in which nobody was heard is followed by others; only its number differs
    return re.sub(r"\bround \d+", "a round", message)


def _timed(event: events.Event, text: str, level: int = 0, what: str = "", who: str = "") -> EventLine:
    return EventLine(text, level, what, who, event.time_s)


def _life(event: events.AgentEvent) -> EventLine | None:
    """Return the line about an agent that comes or goes."""
    match event:
        case events.AgentCrashed(agent=agent, round=number, back_s=back):
            after = "for good" if back is None else f"back in {seconds_text(back)}"
            return _timed(event, f"{agent} crashed in round {number}, {after}")
        case events.Resumed(agent=agent, round=number, stage=stage):
            since = f"continues from its checkpoint (round {number}, {stage})" if number else "starts from scratch"
            return _timed(event, f"{agent} is back and {since}")
        case events.Joined(agent=agent, round=number, how=how, peer=peer):
            if how == "found":
                return _timed(event, f"{agent} hears nobody and starts a new network")
            weights = f"the weights of {peer}" if how == "adopt" else "its own weights"
            return _timed(event, f"{agent} joins in round {number} with {weights}")
        case events.AgentLeft(agent=agent, round=number, reason=reason):
            why = {"done": "is done", "time": "is out of time", "target": "has reached the target", "left": "leaves"}
            # with the last round, or when time is up, all leave: not worth a line each
            level = {"done": 2, "time": 1}.get(reason, 0)
            return _timed(event, f"{agent} {why.get(reason, f'leaves ({reason})')} in round {number}", level)
        case _:
            return None


def _trouble(event: events.AgentEvent) -> EventLine | None:
    """Return the line about a deviation from the plan, which may occur in every round."""
    agent, where = event.agent, _where(event)
    match event:
        case events.PeerLate(peer=peer, reason=reason):
            late = "late" if reason == "deadline" else f"not heard: {reason}"
            text = f"{where}: peer {peer} {late}; its weight goes to self"
            return EventLine(text, 1, "peers late or not heard", f"{agent} without {peer}, {reason}")
        case events.PeerRefused(peer=peer, reason=reason):
            text = f"{where}: peer {peer} refused: {reason}"
            return EventLine(text, 1, "peers refused", f"{agent} without {peer}")
        case events.RoundsSkipped(round=number, first=first, reason=reason):
            rounds = f"round {first}" if first == number - 1 else f"rounds {first} to {number - 1}"
            text = f"{agent} skips {rounds}: {reason}"
            return _timed(event, text, 0, "rounds skipped", agent)
        case _:
            return None


def _step(event: events.AgentEvent) -> EventLine | None:
    """Return the line about a step of an agent's round that went as planned."""
    where = _where(event)
    match event:
        case events.Trained(result=events.TrainResult(loss=loss), train_s=train_s):
            return EventLine(f"{where}: trained, loss {metric_text(loss)} in {seconds_text(train_s)}", 2)
        case events.BasisAdopted(peer=peer, basis=basis, moved=moved):
            return EventLine(f"{where}: adopted basis {basis[:12]} from {peer}, {100 * moved:.0f} % of units moved", 1)
        case events.Merged(contributions=parts, push_weight=push):
            listed_parts = ", ".join(f"{part.agent} {part.weight:.3f}{_verdict(part)}" for part in parts)
            weight = "" if push is None else f", push-sum weight {push:.3g}"
            return EventLine(f"{where}: merged {listed_parts}{weight}", 2)
        case events.RoundFinished(heard=heard, expected=expected, bytes_sent=sent):
            return EventLine(f"{where}: done, heard {heard}/{expected}, sent {bytes_text(sent)}", 2)
        case _:
            return None


def _where(event: events.Event) -> str:
    return f"round {event.round}, agent {event.agent}" if isinstance(event, events.AgentEvent) else ""


def _verdict(part: events.Contribution) -> str:
    return f" ({part.verdict})" if part.verdict not in ("", "own", "same basis") else ""
