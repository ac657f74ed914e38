"""Hosts that are parted and meet again: two plain processes and TCP between them, in real network namespaces."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.net.namespaces import hosts, ip, need_namespaces

pytestmark = pytest.mark.live

# answers each line; says where it listens
ECHO = """
import socket, sys
with socket.create_server((sys.argv[1], 0)) as listener:
    print(listener.getsockname()[1], flush=True)
    while True:
        end, _ = listener.accept()
        with end:
            while data := end.recv(100):
                end.sendall(data)
"""
# for each line on stdin: sends it on one connection, and says what came back within a second, or the fault's name
ASK = """
import socket, sys
end = socket.create_connection((sys.argv[1], int(sys.argv[2])), 20)
end.settimeout(1)
for line in sys.stdin:
    try:
        if line != "again\\n":
            end.sendall(line.encode())
        print(end.recv(100).decode().strip(), flush=True)
    except OSError as error:
        print(type(error).__name__, flush=True)
"""


def test_parted_hosts_do_not_hear_each_other_and_healed_ones_do() -> None:
    need_namespaces()
    with hosts(3) as (a, b, c):
        echo = a.start([sys.executable, "-c", ECHO, a.address])
        assert echo.stdout is not None
        port = echo.stdout.readline().strip()
        ask = b.start([sys.executable, "-c", ASK, a.address, port])
        assert ask.stdin is not None
        assert ask.stdout is not None

        def said(line: str) -> str:
            ask.stdin.write(line + "\n")
            ask.stdin.flush()
            return ask.stdout.readline().strip()

        assert said("one") == "one"
        c.cut()  # another's link
        assert said("two") == "two"
        b.cut()
        assert said("three") == "TimeoutError"
        assert said("again") == "TimeoutError"
        b.heal()
        # TCP sends again what was lost, on the same connection
        for _ in range(60):
            answer = said("again")
            if answer != "TimeoutError":
                break
        assert answer == "three"
        assert said("four") == "four"
        # the machine itself has no part in it
        assert "10.213.77" not in ip("address", "show")


def test_all_is_removed_even_after_a_fault() -> None:
    need_namespaces()
    names: set[str] = set()

    def fail() -> None:
        with hosts(2) as (a, b):
            names.update((a.name, b.name, a.name[:-2] + "s"))
            sleepers.append(a.start(["sleep", "1000"]))
            raise ZeroDivisionError

    sleepers: list[subprocess.Popen[str]] = []
    with pytest.raises(ZeroDivisionError):
        fail()
    assert sleepers[0].returncode is not None
    assert len(names) == 3
    assert not names & {line.split()[0] for line in ip("netns", "list").splitlines()}
