"""Functions by name: graphs, schedules, mixing rules, merge methods and tasks are all picked in this way.

    COMBINE = Registry("combine method", "dimat.merge.combine")

    @COMBINE.register("average")
    def average(own, peers, weights, *, alpha: float = 0.5): ...

A keyword-only argument of a registered function is an **option**, settable in the configuration and checked against
its annotation (any type that pydantic knows: `Annotated[int, Field(ge=1)] | None`, `Literal["a", "b"]`, …), or, if
the registry names it so, **context** that the caller hands in where the function asks for it. What callers have to
know before they call a function stands beside its name, `register("fisher", statistics=…)`, and `declared` returns it.
An option may be a **group**, a pydantic model given as a table; `register("hf-causal-lm", moved={"test": "data.test"})`
still reads the flat keys of older files into it.
With a package, a registry fills itself by importing the package's modules, so that a new function touches no other
file.
"""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from dimat.errors import ConfigError, nearest, unknown_name

if TYPE_CHECKING:
    from pydantic import ValidationError

R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Entry:
    """One registered name: what it is, in a line, and its options with their defaults."""

    name: str
    summary: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class OptionNames:
    """The keys of grouped options as the user wrote them. `flat`: key in a group, "data.test" → flat key, "test"."""

    flat: Mapping[str, str] = field(default_factory=dict[str, str])

    def __call__(self, path: str) -> str:
        """Return the user's key for an option or for a key in a group, such as "data.test"."""
        for key, written in self.flat.items():
            if f"{path}.".startswith(f"{key}."):
                return written + path[len(key) :]
        return path


NAMES = "names"
"""The argument by which a function with groups is given its `OptionNames`, for its own errors."""


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
        self.context = context | {NAMES}
        self.error = error
        self._functions: dict[str, Callable[..., R]] = {}
        self._declared: dict[str, dict[str, Any]] = {}
        self._scanned = not package
        self._scanning = False
        self._lock = threading.RLock()

    def register(self, name: str, **declared: Any) -> Callable[[F], F]:
        """Return a decorator that makes a function known as `name`; an error where the name is taken. `declared`: what
        is to be known of it beyond its signature; "moved": flat keys of options that stand in groups now."""

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
        return self._checked(name, options)[0]

    def call(self, name: str, options: Mapping[str, Any], *args: Any, **context: Any) -> R:
        """Call a function with `args`, its options, and those of `context` that it asks for and options do not set."""
        given, names = self._checked(name, options)
        function = self.get(name)
        known = keywords(function)
        context = {**context, NAMES: names}
        extra = {key: value for key, value in context.items() if key in known and key not in given}
        for key, parameter in known.items():
            if parameter.default is parameter.empty and key not in given and key not in extra:
                raise self.error(f"{self.kind} {name!r} needs the option {key!r}")
        return function(*args, **extra, **given)

    def _checked(self, name: str, options: Mapping[str, Any]) -> tuple[dict[str, Any], OptionNames]:
        where = f"{self.kind} {name!r}"
        function = self.get(name)
        grouped, names = regroup(options, self.declared(name, "moved") or {}, where, self.error)
        return check_options(function, grouped, where, context=self.context, error=self.error, names=names), names

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


def regroup(
    options: Mapping[str, Any], moved: Mapping[str, str], where: str, error: type[ConfigError] = ConfigError
) -> tuple[dict[str, Any], OptionNames]:
    """Put flat keys into the groups that they belong to now, and return the options and how their keys were written.

    `moved`: flat key → "group.key". A flat key that is the group's own name is one unless it holds a table. Raises
    `error` where an option is given in both ways.
    """
    grouped = dict(options)
    flat = {key: value for key, value in options.items() if key in moved}
    for key in [key for key, value in flat.items() if isinstance(value, Mapping) and moved[key].startswith(f"{key}.")]:
        del flat[key]
    for key in flat:
        del grouped[key]
    for key, value in flat.items():
        group, _, inner = moved[key].partition(".")
        held: Any = grouped.get(group, {})
        if not isinstance(held, Mapping):
            continue  # its type is refused when options are checked
        table = cast("Mapping[str, Any]", held)
        if inner in table:
            raise error(
                f"{where}: the options {key!r} and {moved[key]!r} are one and the same; give {moved[key]!r} alone"
            )
        grouped[group] = {**table, inner: value}
    return grouped, OptionNames({moved[key]: key for key in flat})


def check_options(
    function: Callable[..., Any],
    options: Mapping[str, Any],
    where: str,
    *,
    context: frozenset[str] = frozenset(),
    error: type[ConfigError] = ConfigError,
    names: OptionNames = OptionNames(),
) -> dict[str, Any]:
    """Check options against the keyword-only arguments of a function: names, then types; return them converted.

    Raises `error` that names `where`, the option as the user wrote it (`names`), and the nearest known one or what its
    type asks for.
    """
    known = {key: p for key, p in keywords(function).items() if key not in context}
    checked: dict[str, Any] = {}
    for key, value in options.items():
        if key not in known:
            listed = f"its options: {', '.join(sorted(known))}" if known else "it has none"
            raise error(f"{where} has no option {key!r}{nearest(key, known)} ({listed})")
        checked[key] = _converted(function, known[key], value, where, error, names)
    return checked


def _converted(
    function: Callable[..., Any],
    parameter: inspect.Parameter,
    value: Any,
    where: str,
    error: type[ConfigError],
    names: OptionNames,
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
        raise error(f"{where}: {_explained(fault, parameter.name, annotation, value, names)}") from None


def _explained(fault: ValidationError, option: str, annotation: Any, value: Any, names: OptionNames) -> str:
    """Say in a line what is wrong with an option, or with which key of a group."""
    faults = fault.errors(include_url=False)
    first = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    path, known = option, fields_of(annotation)
    for part in first["loc"]:
        if not isinstance(value, Mapping) or not known:
            break
        if first["type"] == "extra_forbidden" and part not in known:
            listed = ", ".join(sorted(known))
            return f"option {names(path)!r} has no key {part!r}{nearest(str(part), known)} (its keys: {listed})"
        path, known, value = f"{path}.{part}", fields_of(known.get(str(part))), value.get(part)
    return f"option {names(path)!r}: {first['msg']}" + ("" if first["type"] == "missing" else f" (got {value!r})")


def fields_of(annotation: Any) -> dict[str, Any]:
    """Return the fields of a group, name → annotation, where one is annotated, alone or beside None; else none."""
    from pydantic import BaseModel

    for kind in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return {name: info.annotation for name, info in kind.model_fields.items()}
    return {}
