"""What a service manager is told. Reference: the datagrams on a real socket of the kind that systemd gives."""

from __future__ import annotations

import os
import re
import socket
import threading
from contextlib import closing, suppress
from pathlib import Path

import pytest

from dimat.agent.daemon.service_manager import notify, watchdog_s
from tests.agent.processes import network

pytestmark = pytest.mark.live


def test_an_agent_tells_its_manager(tmp_path: Path, free_ports: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """READY once, then how far it is and that it lives (more than once, as WATCHDOG_USEC asks), and STOPPING at its
    end."""
    told: list[str] = []
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as manager:
        manager.bind(str(tmp_path / "notify"))

        def listen() -> None:
            while (message := manager.recv(4096).decode()) != "over":
                told.append(message)

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        train = "epochs_per_round = 5\nbatch_size = 8"
        with network(tmp_path, ("lab-a", "lab-b"), free_ports, train=train) as net:
            other = net.start("lab-b")
            monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
            monkeypatch.setenv("WATCHDOG_USEC", "200000")
            life = net.start("lab-a")
            assert life.wait() == other.wait() == 0
        notify("over")
        listener.join()
    assert told.count("READY=1") == 1
    assert told.count("WATCHDOG=1") > 1
    assert [message for message in told if message != "WATCHDOG=1"][-1] == "STOPPING=1"  # it lives on while it stops
    lines = [message for message in told if message.startswith("STATUS=")]
    assert all(re.fullmatch(r"STATUS=round \d of 4, [a-z]+; [01] of 1 peers connected", line) for line in lines)
    assert any("1 of 1" in line for line in lines)


def test_how_often_the_watchdog_is_fed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice in its time; not at all where nobody watches, another process is meant, or the value is none."""
    for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    assert watchdog_s() is None
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    assert watchdog_s() == 15
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert watchdog_s() == 15
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid() + 1))
    assert watchdog_s() is None
    monkeypatch.delenv("WATCHDOG_PID")
    for nonsense in ("0", "-1", "soon"):
        monkeypatch.setenv("WATCHDOG_USEC", nonsense)
        assert watchdog_s() is None


def test_a_manager_that_is_stuck_or_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages are lost then, and nothing else; an abstract address works as well."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    notify("READY=1")
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as manager:
        manager.bind(f"\0dimat-test-{os.getpid()}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@dimat-test-{os.getpid()}")
        with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as filler, suppress(BlockingIOError):
            filler.setblocking(False)
            while True:  # until no more goes in
                filler.sendto(b"x", f"\0dimat-test-{os.getpid()}")
        notify("WATCHDOG=1")  # comes back
        assert manager.recv(16) == b"x"
