"""Messages to the service manager: the agent is ready, its status, it is stopping."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress

SEND_S = 0.5
"""Longest wait for a service manager that takes no message."""


def notify(message: str) -> None:
    """Tell the service manager READY=1, STOPPING=1, WATCHDOG=1, or STATUS=… (`sd_notify`).

    Does nothing if no service manager has asked for it, or if it does not listen.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(SEND_S)  # a manager that is stuck must not hold up the agent
        manager.connect("\0" + address[1:] if address.startswith("@") else address)
        manager.send(message.encode())


def watchdog_s() -> float | None:
    """Return the interval at which to send WATCHDOG=1 to the service manager.

    It is half the time after which the manager takes the agent for hung. None if it does not watch this process.
    """
    try:
        microseconds = int(os.environ.get("WATCHDOG_USEC", ""))
        watched = int(os.environ.get("WATCHDOG_PID", os.getpid()))
    except ValueError:
        return None
    return microseconds / 2e6 if microseconds > 0 and watched == os.getpid() else None


async def feed_watchdog() -> None:
    """Tell the service manager from within the event loop that the loop runs, if it wants to know."""
    every_s = watchdog_s()
    while every_s is not None:
        notify("WATCHDOG=1")
        await asyncio.sleep(every_s)


def status_line(round_: int, rounds: int | None, phase: str, peers: Iterable[Mapping[str, object]]) -> str:
    """Return in a line how an agent is, for `systemctl status`. `rounds`: of its schedule; `peers`: their states."""
    of = f" of {rounds}" if rounds else ""
    connected = [bool(peer["connected"]) for peer in peers]
    return f"round {round_}{of}, {phase}; {sum(connected)} of {len(connected)} peers connected"
