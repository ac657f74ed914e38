"""Functions by name: graphs, schedules, mixing rules, merge methods and tasks.

    COMBINE = Registry("combine method", "dimat.merge.combine")

    @COMBINE.register("average")
    def average(own, peers, weights, *, alpha: float = 0.5): ...

A keyword-only argument of a registered function is an **option**, settable in the configuration and checked against
its annotation (any type that pydantic knows: `Annotated[int, Field(ge=1)] | None`, `Literal["a", "b"]`, …), or, if
the registry lists its name, **context** that the caller passes to functions that ask for it. Facts that callers need
before they call a function are **traits**, given at registration: `register("fisher", statistics=…)`. Options that
several functions share form one class (see `SharedOptions`). An option may also be a **group**, a pydantic model given
as a table; with `register("hf-causal-lm", moved={"test": "data.test"})` the flat keys of older files are still read
into it. `bind` checks options once, for any number of calls.

A registry with a package fills itself by importing the package's modules, so that a new function needs no change in
any other file: first the one that is called as the function that is asked for, all others only where it is not there.
"""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, get_type_hints

from dimat.errors import ConfigError, nearest, unknown_name

if TYPE_CHECKING:
    from pydantic import ValidationError

R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Entry:
    """One registered name, with a one-line summary and its options with their defaults."""

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


NAMES = "option_names"
"""The argument that passes `OptionNames` to a function with groups, for its own error messages."""


class SharedOptions:
    """Base of frozen dataclasses whose fields are options that several functions share.

    A keyword-only argument whose default is an instance defines one option per field, with the field's name and the
    instance's value as its default; the function receives an instance.
    """


@dataclass(frozen=True)
class Bound(Generic[R]):
    """A registered function with checked options. `options`: those that were given; `settings`: all of them,
    converted to their declared types; `asks`: its other keyword arguments; `traits`: those of its registration."""

    name: str
    options: Mapping[str, Any]
    settings: Mapping[str, Any] = field(repr=False, compare=False)
    asks: frozenset[str] = field(repr=False, compare=False)
    traits: Mapping[str, Any] = field(repr=False, compare=False)
    _function: Callable[..., R] = field(repr=False, compare=False)
    _arguments: Mapping[str, Any] = field(repr=False, compare=False)
    _needs: tuple[str, ...] = field(repr=False, compare=False)
    _missing: Callable[[str], ConfigError] = field(repr=False, compare=False)

    def __call__(self, *args: Any, **context: Any) -> R:
        """Call the function with `args`, its options, and the parts of `context` that it asks for.

        Raises the registry's error if a required option was not given.
        """
        for key in self._needs:
            if key not in context:
                raise self._missing(key)
        given = {key: value for key, value in context.items() if key in self.asks}
        return self._function(*args, **given, **self._arguments)


class Registry(Generic[R]):
    """Named functions that return an `R`.

    `kind` ("graph", "task", …): their name in messages; `package`: scanned when a name is first asked for; `context`:
    names of arguments that are never options; `traits`: the traits that functions may have, with their default values;
    `error`: raised for all faults.
    """

    def __init__(
        self,
        kind: str,
        package: str = "",
        *,
        context: frozenset[str] = frozenset(),
        traits: Mapping[str, Any] | None = None,
        error: type[ConfigError] = ConfigError,
    ) -> None:
        self.kind = kind
        self.package = package
        self.context = context | {NAMES}
        self._defaults: dict[str, Any] = {"moved": {}, **(traits or {})}
        self.error = error
        self._functions: dict[str, Callable[..., R]] = {}
        self._traits: dict[str, dict[str, Any]] = {}
        self._scanned = not package
        self._scanning = False
        self._lock = threading.RLock()

    def register(self, name: str, **traits: Any) -> Callable[[F], F]:
        """Return a decorator that registers a function as `name`; raises the registry's error if the name is taken.

        `traits`: facts about it beyond its signature; "moved": flat keys of options that are now in groups.
        """
        for trait in traits:
            if trait not in self._defaults:
                known = ", ".join(sorted(self._defaults))
                raise self.error(f"{self.kind} {name!r} has no trait {trait!r} (known: {known})")

        def enter(function: F) -> F:
            if self._functions.get(name, function) is not function:
                raise self.error(f"{self.kind} {name!r} is registered twice; choose another name")
            self._functions[name] = function
            self._traits[name] = traits
            return function

        return enter

    def names(self) -> list[str]:
        """Return all names, sorted."""
        self._scan()
        return sorted(self._functions)

    def get(self, name: str) -> Callable[..., R]:
        """Return the function `name`, or raise with the nearest known name."""
        if name not in self._functions:
            self._load(name)
        if name not in self._functions:
            raise self.error(unknown_name(self.kind, name, self._functions))
        return self._functions[name]

    def traits(self, name: str) -> dict[str, Any]:
        """Return the traits of the function `name`."""
        self.get(name)
        return {**self._defaults, **self._traits[name]}

    def options(self, name: str) -> dict[str, Any]:
        """Return the options of a function and their defaults (`inspect.Parameter.empty` for none)."""
        return {option.key: option.default for option in _options(self.get(name), self.context).values()}

    def entries(self) -> list[Entry]:
        """Return all entries by module, and in each in the order of registration."""
        self._scan()
        return [
            Entry(name, (inspect.getdoc(function) or "").partition("\n")[0], self.options(name))
            for name, function in sorted(self._functions.items(), key=lambda entry: entry[1].__module__)
        ]

    def check(self, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Check name and options; return the options converted to their annotated types."""
        return self._checked(name, options)[0]

    def bind(self, name: str, options: Mapping[str, Any]) -> Bound[R]:
        """Return the function `name` with its options, checked once for all calls."""
        given, names = self._checked(name, options)
        function, known = self.get(name), _options(self.get(name), self.context)
        settings = {key: given.get(key, option.default) for key, option in known.items()}
        arguments = {NAMES: names} if NAMES in keywords(function) else {}
        arguments |= _arguments(known, given)
        open_to = {key: p.default is p.empty for key, p in keywords(function).items() if key not in arguments}
        needs = tuple(key for key, needed in open_to.items() if needed)

        def missing(key: str) -> ConfigError:
            return self.error(f"{self.kind} {name!r} needs the option {key!r}")

        traits = self.traits(name)
        return Bound(name, dict(options), settings, frozenset(open_to), traits, function, arguments, needs, missing)

    def call(self, name: str, options: Mapping[str, Any], *args: Any, **context: Any) -> R:
        """Call a function with `args`, its options, and those of `context` that it asks for and no option sets."""
        return self.bind(name, options)(*args, **context)

    def _checked(self, name: str, options: Mapping[str, Any]) -> tuple[dict[str, Any], OptionNames]:
        where = f"{self.kind} {name!r}"
        function = self.get(name)
        grouped, names = regroup(options, self.traits(name)["moved"], where, self.error)
        return check_options(function, grouped, where, context=self.context, error=self.error, names=names), names

    def _load(self, name: str) -> None:
        """Import the module that is called as the function is, which spares an agent's start all the others; these
        too where it is not there."""
        path = f"{self.package}.{name.replace('-', '_')}"
        if not self._scanned and name.replace("-", "_").isidentifier() and find_spec(path):
            import_module(path)
        if name not in self._functions:
            self._scan()

    def _scan(self) -> None:
        if self._scanned:
            return
        with self._lock:  # another thread that asks meanwhile waits until all names are there
            if not self._scanning:
                self._scanning = True  # first: an imported module may ask for names itself
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
    """Move flat keys into the groups that they belong to now; return the options, and their keys as written.

    `moved`: flat key → "group.key". A key that is also the group's name counts as flat unless it holds a table. Raises
    `error` if an option is given in both ways.
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
            raise error(f"{where}: the options {key!r} and {moved[key]!r} are the same; give only {moved[key]!r}")
        grouped[group] = {**table, inner: value}
    return grouped, OptionNames({moved[key]: key for key in flat})


@dataclass(frozen=True)
class _Option:
    """An option: its default, its annotation, the function or class that has it, and the argument that it is a field
    of, for those of a class of shared options."""

    key: str
    default: Any
    annotation: Any
    owner: Callable[..., Any]
    shared: inspect.Parameter | None = None


def _options(function: Callable[..., Any], context: frozenset[str]) -> dict[str, _Option]:
    found: dict[str, _Option] = {}
    for key, parameter in keywords(function).items():
        if isinstance(parameter.default, SharedOptions):
            kind = type(parameter.default)
            hints = get_type_hints(kind, include_extras=True)
            for name in (each.name for each in fields(kind)):  # pyright: ignore[reportArgumentType]
                found[name] = _Option(name, getattr(parameter.default, name), hints[name], kind, parameter)
        elif key not in context:
            found[key] = _Option(key, parameter.default, parameter.annotation, function)
    return found


def _arguments(known: Mapping[str, _Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as keyword arguments of their function."""
    arguments: dict[str, Any] = {}
    for key, value in given.items():
        shared = known[key].shared
        if shared is None:
            arguments[key] = value
        else:
            arguments[shared.name] = replace(arguments.get(shared.name, shared.default), **{key: value})
    return arguments


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

    Raises `error` with `where`, the option as the user wrote it (`names`), and the nearest known name or the values
    that its type allows.
    """
    known = _options(function, context)
    checked: dict[str, Any] = {}
    for key, value in options.items():
        if key not in known:
            listed = f"its options: {', '.join(sorted(known))}" if known else "it has none"
            raise error(f"{where} has no option {key!r}{nearest(key, known)} ({listed})")
        checked[key] = _converted(known[key], value, where, error, names)
    return checked


def _converted(
    option: _Option,
    value: Any,
    where: str,
    error: type[ConfigError],
    names: OptionNames,
) -> Any:
    from pydantic import TypeAdapter, ValidationError  # here, so that names can be listed without loading pydantic

    annotation: Any = option.annotation
    if isinstance(annotation, str):
        try:
            annotation = eval(annotation, option.owner.__globals__)  # ours or a plug-in's own source, never input
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
        raise error(f"{where}: {_explained(fault, option.key, annotation, value, names)}") from None


def _explained(fault: ValidationError, option: str, annotation: Any, value: Any, names: OptionNames) -> str:
    """Describe in a line the fault of an option, or of a key of a group."""
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
    """Return the fields of an annotated group (alone or with None), name → annotation; empty for any other type."""
    from pydantic import BaseModel

    for kind in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return {name: info.annotation for name, info in kind.model_fields.items()}
    return {}
