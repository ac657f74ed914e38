"""`python -m tests.cli.hung_up MODULE WORDS…` is `dimat WORDS…`, which gets one SIGHUP, in the moment that it begins to
load MODULE."""

from __future__ import annotations

import importlib.abc
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class HangUp(importlib.abc.MetaPathFinder):
    """Finds nothing, and hangs up once when it is asked for a module."""

    def __init__(self, module: str) -> None:
        self._module = module

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == self._module:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGHUP)
        return None


if __name__ == "__main__":
    sys.meta_path.insert(0, HangUp(sys.argv[1]))
    sys.argv[:2] = ["dimat"]
    runpy.run_module("dimat.cli", run_name="__main__")
