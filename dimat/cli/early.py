"""Keeps an agent's signals that arrive while its command is still being loaded.

A SIGHUP that asks for a new map would end the process then, as would SIGUSR1. The module acts when it is imported,
before anything that takes long; other commands keep what these signals do by default.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

KEPT = (signal.SIGHUP, signal.SIGUSR1)
"""The signals that an agent handles itself, besides those that stop any command."""
arrived: list[int] = []
"""Those that have arrived so far, in order; the agent's own handlers begin with them."""


def _keep(number: int, _: FrameType | None) -> None:
    arrived.append(number)


if sys.argv[1:2] == ["agent"]:
    for each in KEPT:
        signal.signal(each, _keep)
