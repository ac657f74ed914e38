"""Functions by name: graphs, schedules, mixing rules, merge methods and tasks are all picked in this way.

    COMBINE = Registry("combine method", "dimat.merge.combine")

    @COMBINE.register("average")
    def average(own, peers, weights, *, alpha: float = 0.5): ...

A keyword-only argument of a registered function is an **option**, settable in the configuration and checked against
its annotation (any type that pydantic knows: `Annotated[int, Field(ge=1)] | None`, `Literal["a", "b"]`, …), or, if
the registry names it so, **context** that the caller hands in where the function asks for it. What callers have to
know before they call a function stands beside its name, `register("fisher", statistics=…)`, and `declared` returns it.
With a package, a registry fills itself by importing the package's modules, so that a new function touches no other
file.
"""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Generic, TypeVar

from dimat.errors import ConfigError, nearest, unknown_name

R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Entry:
    """One registered name: what it is, in a line, and its options with their defaults."""

    name: str
    summary: str
    options: Mapping[str, Any]


class Registry(Generic[R]):
    """Named functions that return an `R`. `kind` ("graph", "task", …) is how messages call them; `package` is scanned
    when a name is first asked for; names in `context` are never options; faults raise `error`."""

    def __init__(
        self,
        kind: str,
        package: str = "",
        *,
        context: frozenset[str] = frozenset(),
        error: type[ConfigError] = ConfigError,
    ) -> None:
        self.kind = kind
        self.package = package
        self.context = context
        self.error = error
        self._functions: dict[str, Callable[..., R]] = {}
        self._declared: dict[str, dict[str, Any]] = {}
        self._scanned = not package
        self._scanning = False
        self._lock = threading.RLock()

    def register(self, name: str, **declared: Any) -> Callable[[F], F]:
        """Return a decorator that makes a function known as `name`; an error where the name is taken. `declared`: what
        is to be known of it beyond its signature."""

        def enter(function: F) -> F:
            if self._functions.get(name, function) is not function:
                raise self.error(f"{self.kind} {name!r} is registered twice; choose another name")
            self._functions[name] = function
            self._declared[name] = declared
            return function

        return enter

    def names(self) -> list[str]:
        """Return all names, sorted."""
        self._scan()
        return sorted(self._functions)

    def get(self, name: str) -> Callable[..., R]:
        """Return the function `name`, or raise with the nearest known name."""
        self._scan()
        if name not in self._functions:
            raise self.error(unknown_name(self.kind, name, self._functions))
        return self._functions[name]

    def declared(self, name: str, key: str) -> Any:
        """Return what the function `name` was registered with under `key`; None where that is nothing."""
        self.get(name)
        return self._declared[name].get(key)

    def options(self, name: str) -> dict[str, Any]:
        """Return the options of a function and their defaults (`inspect.Parameter.empty` where it has none)."""
        return {key: p.default for key, p in keywords(self.get(name)).items() if key not in self.context}

    def entries(self) -> list[Entry]:
        """Return all entries in the order of registration."""
        self._scan()
        return [
            Entry(name, (inspect.getdoc(function) or "").partition("\n")[0], self.options(name))
            for name, function in self._functions.items()
        ]

    def check(self, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Check name and options and return the options as their annotations have them."""
        where = f"{self.kind} {name!r}"
        return check_options(self.get(name), options, where, context=self.context, error=self.error)

    def call(self, name: str, options: Mapping[str, Any], *args: Any, **context: Any) -> R:
        """Call a function with `args`, its options, and those of `context` that it asks for and options do not set."""
        given = self.check(name, options)
        function = self.get(name)
        known = keywords(function)
        extra = {key: value for key, value in context.items() if key in known and key not in given}
        for key, parameter in known.items():
            if parameter.default is parameter.empty and key not in given and key not in extra:
                raise self.error(f"{self.kind} {name!r} needs the option {key!r}")
        return function(*args, **extra, **given)

    def _scan(self) -> None:
        if self._scanned:
            return
        with self._lock:  # who asks meanwhile, in another thread, waits until all names are there
            if not self._scanning:
                self._scanning = True  # first: what is imported may ask for names itself
                for module in iter_modules(import_module(self.package).__path__):
                    import_module(f"{self.package}.{module.name}")
                self._scanned = True


def keywords(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the keyword-only parameters of a function."""
    parameters = inspect.signature(function).parameters
    return {key: p for key, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def check_options(
    function: Callable[..., Any],
    options: Mapping[str, Any],
    where: str,
    *,
    context: frozenset[str] = frozenset(),
    error: type[ConfigError] = ConfigError,
) -> dict[str, Any]:
    """Check options against the keyword-only arguments of a function: names, then types; return them converted.

    Raises `error` that names `where`, the option, and the nearest known one or what its type asks for.
    """
    known = {key: p for key, p in keywords(function).items() if key not in context}
    checked: dict[str, Any] = {}
    for key, value in options.items():
        if key not in known:
            listed = f"its options: {', '.join(sorted(known))}" if known else "it has none"
            raise error(f"{where} has no option {key!r}{nearest(key, known)} ({listed})")
        checked[key] = _converted(function, known[key], value, where, error)
    return checked


def _converted(
    function: Callable[..., Any], parameter: inspect.Parameter, value: Any, where: str, error: type[ConfigError]
) -> Any:
    from pydantic import TypeAdapter, ValidationError  # here, so that names can be listed without loading pydantic

    annotation: Any = parameter.annotation
    if isinstance(annotation, str):
        try:
            annotation = eval(annotation, function.__globals__)  # ours or a plug-in's own source, never input
        except NameError:
            return value  # of a type imported for type checkers only: the function checks it itself
    adapter: TypeAdapter[Any] = TypeAdapter(annotation)
    try:
        text = json.dumps(value)
    except TypeError:
        text = None  # an object handed in from Python
    try:
        # as JSON, whose strict rules are those of a configuration file: a list may be a tuple, a text is no number
        return adapter.validate_python(value, strict=True) if text is None else adapter.validate_json(text, strict=True)
    except ValidationError as fault:
        first = fault.errors(include_url=False)[0]
        raise error(f"{where}: option {parameter.name!r}: {first['msg']} (got {value!r})") from None
