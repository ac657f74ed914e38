"""`dimat status` of an agent that does not answer says why: stopped, paused by a signal, no agent at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from dimat.agent.daemon.folder import AgentFolder
from dimat.agent.daemon.status_socket import ask
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
