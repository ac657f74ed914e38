"""Addresses and TCP ports: the process that listens, loopback hosts, test dials."""

from __future__ import annotations

import asyncio
import ipaddress
import os

import psutil


def owner_of(port: int) -> str:
    """Return `process 1234 (its command)` for the process that listens on a TCP port of this machine.

    "" if none does, or if the system does not say: only root sees the processes of other users.
    """
    try:
        for connection in psutil.net_connections(kind="tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr[1] == port
            if listens and connection.pid is not None:
                command = " ".join(psutil.Process(connection.pid).cmdline())
                return f"process {connection.pid} ({command[:80]})"
    except (psutil.Error, OSError):
        return ""  # it has ended meanwhile, or this system tells root only
    return ""


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of `host:port`, where an IPv6 address is in brackets. ValueError for an invalid port."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Return whether a host is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def dial(host: str, port: int, timeout_s: float) -> OSError | None:
    """Open a TCP connection and close it; return the error on failure (TimeoutError included), None otherwise."""
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host, port)
    except OSError as error:
        return error
    writer.close()
    return None


def dial_error_text(error: OSError, timeout_s: float) -> str:
    """Return an error of `dial` in words."""
    if isinstance(error, TimeoutError) and not error.errno:
        return f"no answer within {timeout_s:g} s"
    return os.strerror(error.errno) if error.errno is not None and error.errno > 0 else str(error)
