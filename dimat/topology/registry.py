"""Things chosen by name (graphs, schedules, mixings): a registry whose options are the functions' keyword arguments.

Adding a generator or a rule is one decorated function: its keyword-only arguments are its options, the first line
of its docstring is its description, and `call` checks what an operator wrote against both.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from dimat.errors import TopologyError, nearest, unknown_name

R = TypeVar("R")
_SCALARS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "None": (type(None),)}


@dataclass(frozen=True)
class Entry:
    """One registered name: what it is, in a line, and its options with their defaults."""

    name: str
    summary: str
    options: Mapping[str, Any]


class Registry(Generic[R]):
    """Named functions that return an `R`; `kind` ("graph", "schedule", …) is how messages call them."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._functions: dict[str, Callable[..., R]] = {}

    def register(self, name: str) -> Callable[[Callable[..., R]], Callable[..., R]]:
        """Return a decorator that enters a function under `name`."""

        def enter(function: Callable[..., R]) -> Callable[..., R]:
            self._functions[name] = function
            return function

        return enter

    def call(self, name: str, options: Mapping[str, Any], *args: Any, **injected: Any) -> R:
        """Call the function `name` with `args`, the operator's `options` and those of `injected` that it takes.

        Options win over injected values. Raises TopologyError for an unknown name, an unknown option (with the
        nearest known one) or a value of the wrong type.
        """
        function = self.get(name)
        known = _options(function)
        where = f"{self.kind} {name!r}"
        for key, value in options.items():
            if key not in known:
                shown = f" (known: {', '.join(sorted(known))})" if known else f"; {where} takes no options"
                raise TopologyError(f"unknown option {key!r} of {where}{nearest(key, known)}{shown}")
            _check_type(where, known[key], value)
        extra = {key: value for key, value in injected.items() if key in known and key not in options}
        return function(*args, **extra, **options)

    def get(self, name: str) -> Callable[..., R]:
        """Return the function `name`; TopologyError with the nearest known name otherwise."""
        if name not in self._functions:
            raise TopologyError(unknown_name(self.kind, name, self._functions))
        return self._functions[name]

    def entries(self) -> list[Entry]:
        """Return all entries in the order of registration."""
        return [
            Entry(
                name,
                (inspect.getdoc(function) or "").split("\n", 1)[0],
                {key: parameter.default for key, parameter in _options(function).items()},
            )
            for name, function in self._functions.items()
        ]


def _options(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(function).parameters
    return {key: p for key, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _check_type(where: str, parameter: inspect.Parameter, value: Any) -> None:
    """Check scalar annotations ("int", "float | None", …); others are checked by the function itself."""
    names = [part.strip() for part in str(parameter.annotation).split("|")]
    if not all(part in _SCALARS for part in names):
        return
    accepted = tuple(kind for part in names for kind in _SCALARS[part])
    if isinstance(value, bool) or not isinstance(value, accepted):
        wanted = " or ".join(part for part in names if part != "None")
        raise TopologyError(f"option {parameter.name!r} of {where} must be {wanted}, not {value!r}")
