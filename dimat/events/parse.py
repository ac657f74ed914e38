"""Parses events from plain values of a log or a peer; raises nothing, whatever they hold.

A field that is missing, or of another type than its class says, gets its default, or else is empty or 0. So an event
from the log of an older dimat is complete, and one from a stranger has only values of the types in its class.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from itertools import islice
from typing import Any, cast

from dimat import events

MOST_NUMBER = 1e18
MOST_ITEMS = 10_000
"""Most items read of a list or a mapping; the rest are ignored."""

Convert = Callable[[object], Any]
"""Returns a value of a field's type, or `MISSING`."""


def parse_event(plain: Mapping[str, Any]) -> events.Event | None:
    """Return the event whose `to_dict` gave these values; None if its kind is not known."""
    kind = KINDS.get(name) if isinstance(name := plain.get("event"), str) else None
    return None if kind is None else _parse(kind, plain)


KINDS: Mapping[str, type[events.Event]] = {
    name: kind for name, kind in vars(events).items() if isinstance(kind, type) and issubclass(kind, events.Event)
}


def _parse(kind: type[Any], plain: Mapping[str, Any]) -> Any:
    given: dict[str, Any] = {}
    for name, direct, convert, default in _plan(kind):
        if name not in plain:
            value = default
        else:
            value = plain[name]
            # nearly always; the other numbers are looked at more closely
            if value.__class__ is not direct or (direct is not str and not 0 <= value < MOST_NUMBER):
                value = convert(value)
                if value is MISSING:
                    value = default
        if value is not MISSING:
            given[name] = value
    if kind is events.Trained:
        given["result"] = _parse(events.TrainResult, plain)
    elif kind is events.Merged:
        given["result"] = _parse(events.MergeResult, {**plain, "cpu_s": {"merge": plain.get("merge_s")}})
    return kind(**given)


@cache
def _plan(kind: type[Any]) -> list[tuple[str, type | None, Convert, object]]:
    """Return for each field its name, the class of values taken as they are, the conversion of other values, and the
    substitute for a missing value: `MISSING` for the class's own default."""
    hints = typing.get_type_hints(kind)
    plan: list[tuple[str, type | None, Convert, object]] = []
    for field in fields(kind):
        hint = hints[field.name]
        has_default = field.default is not MISSING or field.default_factory is not MISSING
        if not is_dataclass(hint):  # the result of a training or merge is parsed from the same values
            direct = hint if hint in (str, int, float) else None
            plan.append((field.name, direct, _converter(hint), MISSING if has_default else _empty(hint)))
    return plan


def _empty(hint: Any) -> object:
    origin = typing.get_origin(hint)
    return None if origin is types.UnionType else {} if origin is Mapping else (origin or hint)()


@cache
def _converter(hint: Any) -> Convert:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        inner = _converter(next(each for each in arguments if each is not types.NoneType))
        return lambda value: None if value is None else inner(value)
    if origin is tuple and arguments[-1] is ...:
        return _items(_converter(arguments[0]))
    if origin is tuple:
        items, many = _items(_converter(arguments[0])), len(arguments)
        return lambda value: found if (found := items(value)) is not MISSING and len(found) == many else MISSING
    if origin is Mapping:
        return _mapping(_converter(arguments[1]))
    if is_dataclass(hint):
        return lambda value: (
            _parse(cast("type[Any]", hint), cast("Mapping[str, Any]", value)) if isinstance(value, Mapping) else MISSING
        )
    return {str: _text, bool: _flag, int: _whole, float: _number}[hint]


def _items(convert: Convert) -> Convert:
    def items(value: object) -> object:
        if not isinstance(value, list | tuple):
            return MISSING
        found = map(convert, cast("list[object]", value)[:MOST_ITEMS])
        return tuple([each for each in found if each is not MISSING])

    return items


def _mapping(convert: Convert) -> Convert:
    def mapping(value: object) -> object:
        if not isinstance(value, Mapping):
            return MISSING
        known = islice(cast("Mapping[object, object]", value).items(), MOST_ITEMS)
        return {str(key): found for key, each in known if (found := convert(each)) is not MISSING}

    return mapping


def _text(value: object) -> object:
    return value if isinstance(value, str) else MISSING


def _flag(value: object) -> object:
    return value if isinstance(value, bool) else MISSING


def _number(value: object) -> object:
    if value.__class__ is float or value.__class__ is int:
        return value if -MOST_NUMBER < cast("float", value) < MOST_NUMBER else MISSING
    return MISSING


def _whole(value: object) -> object:
    known = _number(value)
    return MISSING if known is MISSING else max(0, int(cast("float", known)))
