"""Methods by name: each stage of the merge has a registry, filled by scanning the stage's folder.

A method is one function in one file, registered by a decorator; adding one touches no other file:

    @combine_registry.register("average")
    def average(own, peers, weights, *, alpha: float = 0.5): ...

A keyword-only argument of the function is either **context** (a name of `CONTEXT`, handed in by the pipeline
where the function asks for it) or an **option** (settable in the configuration, checked against its annotation,
which may be any type that pydantic knows: `Annotated[int, Field(ge=1)] | None`, `Literal["a", "b"]`, …).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Generic, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from dimat.config import NamedConfig
from dimat.errors import ConfigError, nearest, unknown_name
from dimat.merge.stages import Accepted, Aligned, Repaired

Result = TypeVar("Result")
Method = TypeVar("Method", bound=Callable[..., Any])

CONTEXT = frozenset(
    {"base", "aux", "generator", "state", "model", "spec", "data", "score", "points", "observer", "repair"}
)
"""Keyword arguments that the pipeline fills; they can never be options."""


class Registry(Generic[Result]):
    """The methods of one stage. `kind` names the stage in messages, `package` is the folder that is scanned."""

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._methods: dict[str, Callable[..., Result]] = {}
        self._scanned = False

    def register(self, name: str) -> Callable[[Method], Method]:
        """Return a decorator that makes a function known as `name`. Raises ConfigError where the name is taken."""

        def decorate(method: Method) -> Method:
            if self._methods.get(name, method) is not method:
                raise ConfigError(f"{self.kind} {name!r} is registered twice; choose another name")
            self._methods[name] = method
            return method

        return decorate

    def names(self) -> list[str]:
        """Return the names of all methods, sorted."""
        self._scan()
        return sorted(self._methods)

    def get(self, name: str) -> Callable[..., Result]:
        """Return the function registered as `name`, or raise ConfigError with the nearest known name."""
        self._scan()
        try:
            return self._methods[name]
        except KeyError:
            raise ConfigError(unknown_name(self.kind, name, self._methods)) from None

    def options(self, name: str) -> dict[str, Any]:
        """Return the options of a method and their defaults."""
        return {key: parameter.default for key, parameter in self._keywords(name).items() if key not in CONTEXT}

    def check(self, config: NamedConfig) -> None:
        """Check the name and all options of a stage's configuration; the first fault raises ConfigError."""
        check_options(self.get(config.name), config.options, f"{self.kind} {config.name!r}")

    def call(self, config: NamedConfig, *args: Any, **context: Any) -> Result:
        """Call the configured method with `args`, its options, and those of `context` that it asks for."""
        self.check(config)
        wanted = self._keywords(config.name).keys() & CONTEXT
        return self.get(config.name)(*args, **{k: v for k, v in context.items() if k in wanted}, **config.options)

    def _keywords(self, name: str) -> dict[str, inspect.Parameter]:
        parameters = inspect.signature(self.get(name)).parameters
        return {k: p for k, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}

    def _scan(self) -> None:
        if self._scanned:
            return
        for module in iter_modules(import_module(self.package).__path__):
            import_module(f"{self.package}.{module.name}")
        self._scanned = True


def check_options(method: Callable[..., Any], options: Mapping[str, Any], where: str) -> None:
    """Check options against the keyword-only arguments of a function: names, then types.

    Raises ConfigError that names `where`, the option, and the nearest known one or what its type asks for.
    """
    parameters = inspect.signature(method).parameters.items()
    known = [k for k, p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY and k not in CONTEXT]
    hints = get_type_hints(method, include_extras=True)
    for key, value in options.items():
        if key not in known:
            raise ConfigError(_unknown_option(where, key, known))
        try:
            TypeAdapter(hints[key]).validate_python(value, strict=True)
        except ValidationError as error:
            message = error.errors(include_url=False)[0]["msg"]
            raise ConfigError(f"{where}: option {key!r}: {message} (got {value!r})") from None


def _unknown_option(where: str, key: str, known: Iterable[str]) -> str:
    names = sorted(known)
    listed = f"its options: {', '.join(names)}" if names else "it has none"
    return f"{where} has no option {key!r}{nearest(key, names)} ({listed})"


align_registry: Registry[Aligned] = Registry("align method", "dimat.merge.align")
combine_registry: Registry[dict[str, Any]] = Registry("combine method", "dimat.merge.combine")
repair_registry: Registry[Repaired] = Registry("repair method", "dimat.merge.repair")
accept_registry: Registry[Accepted] = Registry("accept rule", "dimat.merge.accept")
