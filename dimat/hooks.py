"""Loading a user's own function from `package.module:function` or `file.py:function`.

A hook is the user's code and runs with the user's rights; nothing here comes from a peer. Relative files, and
modules that are not installed, are looked up from the folder of the configuration that names them.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from blake3 import blake3

from dimat.errors import HookError, nearest


def load_hook(spec: str, folder: Path, what: str = "hook") -> Callable[..., Any]:
    """Return the function that `spec` names; `what` says in errors what it is for, e.g. "task hook".

    A file is executed once per process and its module is then reused. Raises HookError with one line: the spec
    is malformed, the file or module cannot be imported (with the cause), or it has no such function.
    """
    source, colon, name = spec.rpartition(":")
    if not colon or not source or not name.isidentifier():
        raise HookError(f"{what} {spec!r}: expected package.module:function or file.py:function")
    module = _from_file(folder / source, spec, what) if source.endswith(".py") else _imported(source, folder, what)
    function = getattr(module, name, None)
    if function is None:
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise HookError(f"{what} {spec!r}: {source} has no function {name!r}{nearest(name, known)}")
    if not callable(function):
        raise HookError(f"{what} {spec!r}: {name!r} is a {type(function).__name__}, not a function")
    return function


def _from_file(file: Path, spec: str, what: str) -> ModuleType:
    path = file.resolve()
    if not path.is_file():
        raise HookError(f"{what} {spec!r}: there is no file {file}")
    # The name is stable, so that worker processes can unpickle what the file defines once they have loaded it.
    name = f"dimat_hook_{path.stem}_{blake3(str(path).encode()).hexdigest(length=4)}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise HookError(f"{what} {spec!r}: {file} is not a Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses look their module up while it is being executed
    try:
        with _searched(path.parent):
            found.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise HookError(f"{what} {spec!r}: cannot import {file} ({_cause(error)})") from error
    return module


def _imported(source: str, folder: Path, what: str) -> ModuleType:
    try:
        with _searched(folder):
            return importlib.import_module(source)
    except Exception as error:
        raise HookError(f"{what}: cannot import {source} ({_cause(error)})") from error


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


def _cause(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
