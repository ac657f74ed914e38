"""Workers that are stopped while they start. Reference: what a stopped command may say, which is nothing of workers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
STOPPED = """
import signal

from dimat.simulate.engines.pool import WorkerPool

signal.signal(signal.SIGALRM, signal.default_int_handler)  # as Ctrl-C, or SIGTERM to `dimat`
try:
    import torch  # noqa: F401  which the pool needs
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    with WorkerPool(2):
        print("they have started")
except KeyboardInterrupt:
    print("stopped")
"""


def test_workers_that_are_stopped_while_they_start_say_nothing() -> None:
    """The process that forks them loads torch for a second or more; what it would fork after the end had its own
    traceback on stderr."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", STOPPED], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "stopped\n", "")
