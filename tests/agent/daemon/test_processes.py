"""The harness of real agents itself: what it has started does not outlive it. Reference: the kernel's list of
processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.agent.processes import PATIENCE_S, ROOT

pytestmark = pytest.mark.live

PARENT = """
import subprocess, sys
from tests.agent.bound import bound
child = subprocess.Popen(bound("http.server", "0", "--bind", "127.0.0.1"), stdout=subprocess.PIPE, bufsize=0)
child.stdout.readline()  # it serves
print(child.pid, flush=True)
sys.stdin.read()
"""


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_nothing_outlives_killed_tests() -> None:
    """Its parent is killed with -9, which has no chance to end it: it is gone nonetheless."""
    parent = subprocess.Popen(
        [sys.executable, "-u", "-c", PARENT], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    with parent.stdin, parent.stdout:
        child = int(parent.stdout.readline())
        assert lives(child)
        parent.kill()
        parent.wait()
        ends = time.monotonic() + PATIENCE_S
        try:
            while lives(child):
                assert time.monotonic() < ends, f"process {child} is left behind"
                time.sleep(0.05)
        except AssertionError:
            os.kill(child, signal.SIGKILL)
            raise
