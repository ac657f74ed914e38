"""Hosts on one machine: network namespaces on one bridge, whose links a test can cut and heal, one by one or in halves.

`with hosts(2) as (a, b)` gives them, as root where the kernel allows it; `why_not()` says what is missing. The names of
all that is made begin with a prefix drawn anew, and all of it is removed at the end, the processes within first.
"""

from __future__ import annotations

import functools
import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

WAIT_S = 30.0
NETWORK = "10.213.77"
BRIDGES = ("bridge0", "bridge1")
"""All hosts begin on the first; nothing joins the two."""


def ip(*arguments: str) -> str:
    """Run `ip`; RuntimeError with its words where it fails."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=WAIT_S)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


@functools.cache
def why_not() -> str:
    """Say why there can be no namespaces here, "" where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need `ip` (Debian's iproute2)"
    try:
        with hosts(2):
            return ""
    except RuntimeError as error:
        return f"the kernel refuses network namespaces: {error}"


def need_namespaces() -> None:
    """Skip a test where there can be no namespaces. Not a mark: nothing is tried while tests are collected."""
    reason = why_not()
    if reason:
        pytest.skip(reason)


@dataclass(eq=False)
class Host:
    """A namespace with one address. `cut` parts it from all others, `heal` mends that; `plug` puts it on the bridge
    with this number, where it reaches those alone that are there too."""

    name: str
    address: str
    _switch: str
    _port: str
    """End of its cable at the bridge, in the namespace of the switch."""
    _running: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, arguments: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Start a command on this host; it is killed when the hosts are removed."""
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True} | options
        process = subprocess.Popen(self.command(arguments), **options)
        self._running.append(process)
        return process

    def command(self, arguments: Sequence[str]) -> list[str]:
        """Return the command that runs another one on this host, in the same process."""
        return ["ip", "netns", "exec", self.name, *arguments]

    def cut(self) -> None:
        """Lose all that is on its way from now on; no end is told."""
        ip("-n", self._switch, "link", "set", self._port, "down")

    def heal(self) -> None:
        ip("-n", self._switch, "link", "set", self._port, "up")

    def plug(self, bridge: int) -> None:
        """Move its cable. What is on its way from hosts of the other bridge is lost, and no end is told."""
        ip("-n", self._switch, "link", "set", self._port, "master", BRIDGES[bridge])

    def stop(self) -> None:
        """Kill what runs here."""
        for pid in ip("netns", "pids", self.name).split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue  # it ended by itself
        for process in self._running:
            process.wait(WAIT_S)
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
        self._running.clear()


@contextmanager
def hosts(count: int) -> Generator[list[Host]]:
    """Make hosts on one bridge, and remove them. RuntimeError where the kernel or `ip` refuses.

    The bridges lie in a namespace of their own: the machine's own network does not see them, nor its firewall's rules.
    """
    prefix = f"dm{secrets.token_hex(3)}"
    switch = f"{prefix}s"
    made: list[Host] = []
    with ExitStack() as stack:  # which goes on where one removal fails
        _add(switch, stack)
        for bridge in BRIDGES:
            ip("-n", switch, "link", "add", bridge, "type", "bridge", "forward_delay", "0", "stp_state", "0")
            ip("-n", switch, "link", "set", bridge, "up")
        for number in range(count):
            host = Host(f"{prefix}h{number}", f"{NETWORK}.{number + 1}", switch, f"port{number}")
            _add(host.name, stack)
            stack.callback(host.stop)
            near = ("type", "veth", "peer", "name", "eth0", "netns", host.name)
            ip("link", "add", host._port, "netns", switch, *near)
            ip("-n", switch, "link", "set", host._port, "master", BRIDGES[0], "up")
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
            ip("-n", host.name, "link", "set", "eth0", "up")
            ip("-n", host.name, "link", "set", "lo", "up")
            made.append(host)
        yield made


def _add(name: str, stack: ExitStack) -> None:
    ip("netns", "add", name)
    stack.callback(ip, "netns", "delete", name)
