"""Runs a module as `python -m` does, in a process that dies with whoever started it:
`python -m tests.agent.bound PARENT MODULE …`, PARENT being that one's process number.

Tests are killed too, by a time limit or a person; without this their agents would run on for ever.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1


def bound(*words: str) -> list[str]:
    """Return the command that runs a module, the first of `words`, bound to this process. The thread that starts it
    must live as long as it shall: the kernel goes by threads."""
    return [sys.executable, "-m", "tests.agent.bound", str(os.getpid()), *words]


def _bind(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it had died before the kernel was told
            sys.exit(1)


if __name__ == "__main__":
    _bind(int(sys.argv[1]))
    module = sys.argv[2]
    sys.argv[:3] = [module]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
