"""A trace: each round machine's events and actions, one JSON object a line.

Round machines draw nothing and read no clock, so the events alone decide what they do: `replay` hands them to fresh
machines and compares. So a trace shows whether other code behaves the same, and serves as a bug report that runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, get_args

from dimat.agent.protocol import messages as m
from dimat.agent.protocol.basis import BasisId
from dimat.agent.protocol.messages import MERGE_RECORDED, metrics_of
from dimat.agent.protocol.round import RoundMachine
from dimat.agent.protocol.state import MachineState
from dimat.errors import DataError
from dimat.events import MERGE_LOGGED, Merged, MergeResult
from dimat.json_text import to_json
from dimat.reading import as_type, parse_json

KINDS: Mapping[type[Any], str] = {
    m.MergeAction: "Merge",
    m.CheckpointAction: "Checkpoint",
    m.FetchFailure: "FetchFailed",
    m.Emit: "Report",
    m.MergePart: "Part",
}
"""Names in traces that differ from those of the classes: a trace outlives a renaming."""


def _name_of(kind: type[Any]) -> str:
    return KINDS.get(kind) or kind.__name__


EVENTS: Mapping[str, type[Any]] = {_name_of(kind): kind for kind in get_args(m.Event) if kind is not m.MapChanged}
IN_PLACE: Mapping[type[Any], Sequence[str]] = {
    m.MergeDone: tuple(dict.fromkeys((*MERGE_RECORDED, *MERGE_LOGGED))),
    Merged: MERGE_LOGGED,
    m.MergeRecord: MERGE_RECORDED,
}
"""The part of a merge's result that stands among a message's own values: there was no record of its own at first."""
NOTHING = "nothing"
SHOWN = 100
"""Characters of a value that a difference shows."""


class TraceWriter:
    """Writes a trace file; a context manager. Raises DataError if it cannot be written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def __enter__(self) -> TraceWriter:
        try:
            self._file = self._path.open("w", encoding="utf-8")
        except OSError as error:
            raise DataError(f"cannot write {self._path}: {error.strerror or error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def begin(self, time_s: float, agent: str, state: MachineState | None, published: int) -> None:
        """Write that an agent's machine is made, from a checkpoint's state or without one."""
        kept = None if state is None else state.to_dict()
        self._write({"time_s": time_s, "agent": agent, "begin": {"state": kept, "published": published}})

    def step(self, time_s: float, agent: str, event: m.Event, actions: Sequence[m.Action]) -> None:
        """Write an event that a machine received and the actions that it asked for."""
        self._write({"time_s": time_s, "agent": agent, "event": plain(event), "actions": [plain(a) for a in actions]})

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(to_json(line, separators=(",", ":")) + "\n")


@dataclass(frozen=True, slots=True)
class Replay:
    """The outcome of a replay.

    `steps`: events that were handed in; `difference`: the first step that came out otherwise, empty where all are the
    same.
    """

    steps: int
    actions: int
    difference: str = ""


@dataclass(frozen=True, slots=True)
class _Line:
    """One line of a trace: a machine that is made, or (`event` given) a step of one."""

    agent: str
    time_s: float
    state: MachineState | None = None
    published: int = 0
    event: m.Event | None = None
    actions: Sequence[Any] = ()


def replay(path: Path, make: Callable[[str, MachineState | None, int], RoundMachine]) -> Replay:
    """Hand a trace's events to fresh machines, and compare the actions they ask for.

    `make(agent, state, published)` gives a machine. A last line that a killed run left unfinished is passed over.
    Raises DataError for a file that is no trace.
    """
    machines: dict[str, RoundMachine] = {}
    steps = asked = 0
    for number, line in _lines(path):
        if line.event is None:
            try:
                machines[line.agent] = make(line.agent, line.state, line.published)
            except KeyError:
                raise DataError(f"{path}, line {number}: no agent {line.agent!r} in the experiment") from None
            continue
        if line.agent not in machines:
            raise DataError(f"{path}, line {number}: {line.agent} gets an event before it begins")
        try:
            actions = [plain(action) for action in machines[line.agent].handle(line.event)]
        except Exception as error:  # that is a difference too: the machine that was recorded went on
            difference = f"raises {type(error).__name__}: {error}"
        else:
            asked += len(actions)
            difference = _difference(line.actions, json.loads(to_json(actions)), "actions")
        steps += 1
        if difference:
            told = type(line.event).__name__
            where = f"line {number}, {line.agent} at {line.time_s:g} s, told {told}"
            return Replay(steps, asked, f"{where}: {difference}")
    return Replay(steps, asked)


def _lines(path: Path) -> Iterator[tuple[int, _Line]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                try:
                    yield number, _parsed(parse_json(text))
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    if not text.endswith("\n"):
                        return
                    raise DataError(f"{path}, line {number}: no step of a trace ({error!r})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read trace {path}: {error}") from error


def _parsed(values: Mapping[str, Any]) -> _Line:
    agent, time_s = as_type(str, values["agent"]), as_type(float, values["time_s"])
    if "begin" in values:
        kept = values["begin"]["state"]
        state = None if kept is None else MachineState.from_dict(kept)
        return _Line(agent, time_s, state, as_type(int, values["begin"]["published"]))
    return _Line(agent, time_s, event=event_of(values["event"]), actions=list(values["actions"]))


def _difference(was: Any, now: Any, where: str) -> str:
    """Return the first place at which two plain values differ, and how; an empty string where they are equal."""
    if isinstance(was, dict) and isinstance(now, dict) and was.get("kind") == now.get("kind"):
        # a field that came after the trace was written is empty unless it is used
        keys = [key for key in {**was, **now} if key in was or now[key]]
        parts = [(f"{where}.{key}", was.get(key, NOTHING), now.get(key, NOTHING)) for key in keys]
    elif isinstance(was, list) and isinstance(now, list):
        longest = range(max(len(was), len(now)))
        parts = [(f"{where}[{i}]", *(x[i] if i < len(x) else NOTHING for x in (was, now))) for i in longest]
    else:
        # as text: not a number is equal to itself here
        texts = [value if value is NOTHING else json.dumps(value) for value in (was, now)]
        return "" if texts[0] == texts[1] else f"{where} was {_short(texts[0])}, is {_short(texts[1])}"
    return next((found for at, a, b in parts if (found := _difference(a, b, at))), "")


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def plain(value: Any) -> Any:
    """Return a message as plain values, its class under `kind`."""
    if isinstance(value, BasisId):
        return str(value)
    if isinstance(value, MachineState):
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        values = {f.name: getattr(value, f.name) for f in fields(value)}
        if (names := IN_PLACE.get(type(value))) is not None:
            result = values.pop("result")
            values |= {name: getattr(result, name) for name in names}
        return {"kind": _name_of(type(value)), **{name: plain(item) for name, item in values.items()}}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def event_of(values: Mapping[str, Any]) -> m.Event:
    """Return the event that `plain` gave.

    KeyError, TypeError or ValueError where it is something else.
    """
    given = {key: value for key, value in values.items() if key != "kind"}
    if "basis" in given:
        given["basis"] = BasisId.parse(given["basis"])
    kind = EVENTS[values["kind"]]
    return _merge_done(**given) if kind is m.MergeDone else kind(**given)


def _merge_done(
    round: int, before: Any = None, after: Any = None, merge_s: float = 0.0, notes: Any = (), **more: Any
) -> m.MergeDone:
    metrics = {"before": metrics_of(before), "after": metrics_of(after)}
    result = MergeResult(**metrics, cpu_s={"merge": merge_s}, notes=tuple(notes), **more)
    return m.MergeDone(round, result)
