"""Tasks by name, bundled ones and hooks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dimat.config import TaskConfig
from dimat.errors import ConfigError, HookError, nearest
from dimat.hooks import load_hook, user_code
from dimat.registry import Registry
from dimat.tasks.base import Task

MEMBERS = ("name", "metric", "classes", "build_model", "example_inputs", "data", "loss", "metrics")
FOLDER = "folder"

TASKS: Registry[Task] = Registry("task", "dimat.tasks", context=frozenset({FOLDER}))
"""The bundled tasks. A function's keyword arguments are the task's options; one named `folder` receives the folder to
which paths are relative."""


def list_tasks() -> dict[str, str]:
    """Return the bundled tasks: name → first line of the documentation."""
    return {entry.name: entry.summary for entry in TASKS.entries()}


def load_task(config: TaskConfig, folder: Path = Path()) -> Task:
    """Return the task that the configuration names: bundled, or a hook's.

    `folder`: where relative paths and hook files are looked up. Raises ConfigError for an unknown name or option,
    HookError if a hook cannot be loaded, fails, or returns something that is not a Task.
    """
    if config.hook is not None:
        return _hooked(config.hook, config.options, folder)
    return TASKS.call(config.name or "digits", config.options, folder=folder)


def _with_folder(function: Callable[..., Any], options: Mapping[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """Check option names against the function's keyword arguments and add the folder if it accepts one."""
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
    with user_code(f"{where} failed"):
        made: Any = function(**arguments)
    missing = [member for member in MEMBERS if not hasattr(made, member)]
    if missing:
        kind = type(made).__name__
        raise HookError(f"{where} returned a {kind}, which is not a Task: it has no {', '.join(missing)}")
    return made
