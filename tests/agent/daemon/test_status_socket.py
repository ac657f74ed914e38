"""An agent's status for others tells no paths; one that does not answer: why (stopped, paused, no agent at all)."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import deque
from pathlib import Path

import psutil
import pytest

from dimat.agent.daemon.folder import AgentFolder
from dimat.agent.daemon.status_socket import StatusSocket, ask, without_paths
from dimat.errors import DataError

HOLDER = """
import fcntl, os, sys, time
lock = os.open(sys.argv[1], os.O_RDWR)
fcntl.flock(lock, fcntl.LOCK_EX)
os.pwrite(lock, f"{os.getpid()}\\n".encode(), 0)
print("held", flush=True)
time.sleep(600)
"""


def test_a_folder_of_nobody(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it is not an agent's folder"):
        ask(tmp_path)


def test_a_stopped_agent(tmp_path: Path) -> None:
    AgentFolder(tmp_path, "run", "lab-a").close()
    with pytest.raises(DataError, match="'lab-a' of run 'run' is stopped; start it with: dimat agent FILE"):
        ask(tmp_path)


def test_a_paused_agent(tmp_path: Path) -> None:
    """A process that holds the folder's lock and was stopped by SIGSTOP (reference: psutil's state of it)."""
    AgentFolder(tmp_path, "run", "lab-a").close()
    command = [sys.executable, "-I", "-S", "-c", HOLDER, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(DataError, match=f"process {holder.pid}, is busy, or still starting"):
                ask(tmp_path)
            holder.send_signal(signal.SIGSTOP)
            while psutil.Process(holder.pid).status() != psutil.STATUS_STOPPED:
                os.sched_yield()
            with pytest.raises(DataError, match=f"is stopped by a signal .* continue it with: kill -CONT {holder.pid}"):
                ask(tmp_path)
        finally:
            holder.kill()


def test_a_socket_that_cannot_be_made_or_removed(tmp_path: Path) -> None:
    """A folder in its place: told at the start, and no fault at the end, which would hide why the agent leaves."""

    async def live() -> None:
        one = StatusSocket(tmp_path, dict)
        await one.start()
        (tmp_path / "status.sock").unlink()
        (tmp_path / "status.sock").mkdir()
        await one.close()
        with pytest.raises(DataError, match=r"cannot listen on .*status\.sock: Is a directory"):
            await StatusSocket(tmp_path, dict).start()

    asyncio.run(live())


def test_a_status_for_others_tells_no_paths() -> None:
    """The reference is what was put in: warnings and reasons at any depth, lists of any kind, numbers as they were."""
    status = {
        "warnings": deque(["cannot write /srv/run/lab-a/weights: no room", "fine"]),
        "peers": {"b": {"trouble": "in /srv/run", "rounds": (1, 2)}},
        "round": 3,
    }
    assert without_paths(status, {"/srv/run", "/srv/run/lab-a"}) == {
        "warnings": ["cannot write …/weights: no room", "fine"],
        "peers": {"b": {"trouble": "in …", "rounds": [1, 2]}},
        "round": 3,
    }
