"""Tasks by name: a decorator, and the functions that find and call what it registered."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, TypeVar

from pydantic import ConfigDict, ValidationError, validate_call

from dimat.config import TaskConfig
from dimat.errors import ConfigError, DimatError, HookError, nearest, unknown_name
from dimat.hooks import load_hook
from dimat.task import Task

TaskFunction = Callable[..., Task]
F = TypeVar("F", bound=TaskFunction)

_TASKS: dict[str, TaskFunction] = {}
MEMBERS = ("name", "metric", "classes", "build_model", "example_inputs", "data", "loss", "metrics")
FOLDER = "folder"


def task(name: str) -> Callable[[F], F]:
    """Register a function that returns a Task. Its keyword arguments are the task's options; one named `folder`
    is given the folder that relative paths are taken from."""

    def register(function: F) -> F:
        _TASKS[name] = function
        return function

    return register


def list_tasks() -> dict[str, str]:
    """Return the bundled tasks: name → first line of the documentation."""
    return {name: (inspect.getdoc(function) or "").partition("\n")[0] for name, function in sorted(_found().items())}


def load_task(config: TaskConfig, folder: Path = Path()) -> Task:
    """Return the task that the configuration names: bundled, or a hook's.

    `folder`: where relative paths and hook files are looked up. Raises ConfigError for an unknown name or
    option, HookError where a hook cannot be loaded, fails, or returns something that is no Task.
    """
    if config.hook is not None:
        return _hooked(config.hook, config.options, folder)
    name = config.name or "digits"
    known = _found()
    if name not in known:
        raise ConfigError(unknown_name("task", name, known))
    function = known[name]
    where = f"task {name!r}"
    options = _with_folder(function, config.options, folder, where)
    try:
        return validate_call(config=ConfigDict(arbitrary_types_allowed=True))(function)(**options)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        option = ".".join(map(str, fault["loc"]))
        if fault["type"] == "missing_argument":
            raise ConfigError(f"{where} needs the option {option!r}") from None
        raise ConfigError(f"{where}, option {option!r}: {fault['msg']} (got {fault['input']!r})") from None


def _found() -> Mapping[str, TaskFunction]:
    """Import every module of this folder once, so that each task registers itself."""
    for module in iter_modules([str(Path(__file__).parent)]):
        import_module(f"{__package__}.{module.name}")
    return _TASKS


def _with_folder(function: TaskFunction, options: Mapping[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """Check option names against the function's keyword arguments and add the folder where it takes one."""
    parameters = inspect.signature(function).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    known = [name for name in named if name != FOLDER]
    for option in options:
        if option not in known and not (anything and option != FOLDER):
            listed = ", ".join(known) or "it has none"
            raise ConfigError(f"{where} has no option {option!r}{nearest(option, known)} (options: {listed})")
    return {**options, FOLDER: folder} if FOLDER in named else dict(options)


def _hooked(spec: str, options: Mapping[str, Any], folder: Path) -> Task:
    function = load_hook(spec, folder, "task hook")
    where = f"task hook {spec!r}"
    arguments = _with_folder(function, options, folder, where)
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}; give it in task.options") from None
    try:
        made: Any = function(**arguments)
    except DimatError:
        raise  # it says what to do already
    except Exception as error:
        raise HookError(f"{where} failed: {type(error).__name__}: {error}") from error
    missing = [member for member in MEMBERS if not hasattr(made, member)]
    if missing:
        kind = type(made).__name__
        raise HookError(f"{where} returned a {kind}, which is no Task: it has no {', '.join(missing)}")
    return made
