"""docs/events.md. Reference: the classes of dimat/events, whose events and fields are all there with their types,
and no others."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from dimat import events
from dimat.ui.jsonl_read import HEADER

PAGE = (Path(__file__).parent.parent.parent / "docs" / "events.md").read_text(encoding="utf-8")
NAMES = {str: "string", int: "integer", float: "number", bool: "boolean"}
RESULTS: dict[type[Any], tuple[type[Any], Sequence[str]]] = {
    events.Trained: (events.TrainResult, ("loss", "samples", "notes")),
    events.Merged: (events.MergeResult, events.MERGE_LOGGED),
}
"""Events that carry a result, of which these values stand among the event's own in a log."""


def json_type(annotation: Any) -> str:
    """Return what a field of this type is in JSON, in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        (inner,) = (each for each in arguments if each is not type(None))
        return f"{json_type(inner)} or null"
    if origin is tuple:
        if arguments[-1] is ...:
            return f"array of {json_type(arguments[0])}"
        return f"[{', '.join(map(json_type, arguments))}]"
    if origin is Mapping:
        return f"object of {json_type(arguments[1])}"
    return f"`{annotation.__name__}`" if is_dataclass(annotation) else NAMES[annotation]


def classes() -> list[type[Any]]:
    """Return all events and what they are made of, but for the bases."""
    found = [each for each in vars(events).values() if isinstance(each, type) and is_dataclass(each)]
    results = [result for result, _ in RESULTS.values()]
    return [each for each in found if each not in (events.Event, events.AgentEvent, *results)]


def expected(event: type[Any]) -> dict[str, str]:
    """Return the fields of an event that not all have, and their types."""
    base = events.AgentEvent if issubclass(event, events.AgentEvent) else events.Event
    common = {each.name for each in fields(base)} if issubclass(event, events.Event) else set[str]()
    hints = typing.get_type_hints(event)
    found: dict[str, str] = {}
    for name in [each.name for each in fields(event) if each.name not in common]:
        if name == "result":
            found |= {part: json_type(value_type(RESULTS[event][0], part)) for part in RESULTS[event][1]}
        else:
            found[name] = json_type(hints[name])
    return found


def value_type(of: type[Any], name: str) -> Any:
    """Return the type of a field, or of a property."""
    found = getattr(of, name, None)
    return (
        typing.get_type_hints(found.fget)["return"] if isinstance(found, property) else typing.get_type_hints(of)[name]
    )


def section(name: str) -> str:
    """Return the text under a heading."""
    (found,) = re.findall(rf"^###? {re.escape(name)}\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return found


def rows(text: str) -> list[list[str]]:
    """Return the cells of a section's table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("event", classes(), ids=lambda event: event.__name__)
def test_each_event_is_documented(event: type[Any]) -> None:
    """Its fields are in its table, in their order, with their types, units and meanings; an agent's say whose."""
    text = section(event.__name__)
    table = rows(text)
    assert {row[0].strip("`"): row[1] for row in table} == expected(event)
    assert [row[0].strip("`") for row in table] == list(expected(event))
    assert all(len(row) == 4 and row[3] for row in table)
    for name, kind, unit, _ in table:
        assert unit or "number" not in kind, f"{name} has no unit"
    if issubclass(event, events.Event):
        assert ("Of an agent." in text) == issubclass(event, events.AgentEvent)


@pytest.mark.parametrize(
    "event",
    [
        events.Trained(agent="a", round=1, result=events.TrainResult(), train_s=0.0),
        events.Merged(agent="a", round=1, contributions=()),
    ],
    ids=["Trained", "Merged"],
)
def test_a_result_stands_among_its_events_values(event: events.AgentEvent) -> None:
    """What is documented is what is written."""
    common = {each.name for each in fields(events.AgentEvent)}
    assert event.to_dict().keys() == {"event"} | common | expected(type(event)).keys()


def test_nothing_else_is_documented() -> None:
    """Each heading under events is an event; the header is the one that is written."""
    headings = re.findall(r"^### (\w+)$", PAGE, re.MULTILINE)
    assert sorted(headings) == sorted(each.__name__ for each in classes())
    assert f'{{"format": {HEADER["format"]}, "kind": "{HEADER["kind"]}"}}' in PAGE
    common = {row[0].strip("`"): row[1] for row in rows(section("Fields of all events"))}
    hints = typing.get_type_hints(events.AgentEvent)
    assert common == {"event": "string"} | {
        each.name: json_type(hints[each.name]) for each in fields(events.AgentEvent)
    }
