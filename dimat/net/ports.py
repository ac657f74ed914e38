"""Who listens on a port: read from /proc, where there is one and it may be read."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

_LISTENS = "0A"


def owner_of(port: int) -> str:
    """Return `process 1234 (its command)` of whoever listens on a TCP port of this machine, "" where it is not told.

    Other users' processes are told to root only.
    """
    sockets = _listening(port)
    if not sockets:
        return ""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            held = {os.readlink(entry) for entry in (process / "fd").iterdir()}
            if held & sockets:
                return f"process {process.name} ({_command(process)})"
        except OSError:
            continue  # it is over, or another user's
    return ""


def _listening(port: int) -> set[str]:
    """Return the sockets that listen on a port, as links of /proc/PID/fd name them."""
    found: set[str] = set()
    for family in ("tcp", "tcp6"):
        try:
            rows = Path(f"/proc/net/{family}").read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            words = row.split()
            if int(words[1].rpartition(":")[2], 16) == port and words[3] == _LISTENS:
                found.add(f"socket:[{words[9]}]")
    return found


def _command(process: Path) -> str:
    words = (process / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    return " ".join(word.decode(errors="replace") for word in words)[:80]


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
