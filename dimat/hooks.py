"""Loads and calls a user's own function, `package.module:function` or `file.py:function`.

A hook is the user's code and runs with the user's rights; nothing here comes from a peer. Relative files, and
modules that are not installed, are looked up from the folder of the configuration that names them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from blake3 import blake3

from dimat.errors import DimatError, HookError, nearest

LONGEST = 300
"""Longest part of a user's error message that is repeated, in characters."""


def load_hook(spec: str, folder: Path, what: str = "hook", *, anew: bool = False) -> Callable[..., Any]:
    """Return the function that `spec` names; `what` describes it in errors, e.g. "task hook".

    A file is executed once per process and its module is then reused, unless `anew` is set. Raises HookError, in one
    line, if the spec is malformed, the file or module cannot be imported (with the cause), or the function is missing.
    """
    source, colon, name = spec.rpartition(":")
    if not colon or not source or not name.isidentifier():
        raise HookError(f"{what} {spec!r}: expected package.module:function or file.py:function")
    module = (
        _from_file(folder / source, spec, what, anew) if source.endswith(".py") else _imported(source, folder, what)
    )
    function = getattr(module, name, None)
    if function is None:
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise HookError(f"{what} {spec!r}: {source} has no function {name!r}{nearest(name, known)}")
    if not callable(function):
        raise HookError(f"{what} {spec!r}: {name!r} is a {type(function).__name__}, not a function")
    return function


def _from_file(file: Path, spec: str, what: str, anew: bool) -> ModuleType:
    try:
        path = file.resolve()
        there = path.is_file()
    except (OSError, ValueError):  # a name that no file can have: too long, with NUL in it
        path, there = file, False
    if not there:
        raise HookError(f"{what} {spec!r}: there is no file {file}")
    # The name is stable, so that worker processes can unpickle what the file defines once they have loaded it.
    name = f"dimat_hook_{path.stem}_{blake3(os.fsencode(path)).hexdigest(length=4)}"
    if name in sys.modules and not anew:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise HookError(f"{what} {spec!r}: {file} is not a Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses look their module up while it is being executed
    try:
        with user_code(f"{what} {spec!r}: cannot import {file}"), _searched(path.parent):
            found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _imported(source: str, folder: Path, what: str) -> ModuleType:
    with user_code(f"{what}: cannot import {source}"), _searched(folder):
        return importlib.import_module(source)


@contextmanager
def _searched(folder: Path) -> Generator[None]:
    """Let imports find modules in `folder`, after everything that is installed."""
    entry = str(folder.resolve())
    sys.path.append(entry)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(entry)


@contextmanager
def user_code(what: str, advice: str = "") -> Generator[None]:
    """Turn anything that a user's code raises, even its exit, into a HookError.

    Its message begins with `what` ("task hook 'x.py:f' failed") and ends with `advice`. dimat's own errors and Ctrl-C
    pass unchanged.
    """
    try:
        yield
    except (DimatError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        raise HookError(f"{what}: {cause(error)}{f'; {advice}' if advice else ''}") from error


def cause(error: BaseException) -> str:
    """Return an error's class and message, on one line."""
    try:
        text = " ".join(str(error).split())
    except Exception as fault:  # a class of the user's own may fail at that, too
        text = f"which cannot be shown ({type(fault).__name__})"
    if isinstance(error, SystemExit):
        return f"it exits, with {error.code!r}: return or raise an error instead"
    return f"{type(error).__name__}: {text[:LONGEST]}" if text else type(error).__name__
