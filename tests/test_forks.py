"""Processes that tests fork are as those that Python starts. References: `subprocess`, and the kernel's list of
processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import forks
from tests.agent.processes import PATIENCE_S
from tests.forks import ROOT, python, start

pytestmark = pytest.mark.skipif(not forks.FORKS, reason="only Linux forks")

# says what a process knows of itself, and ends with 7
ITSELF = """
import os, signal, sys
print(os.getcwd(), sys.argv, os.environ.get("MARK"), "OTHER" in os.environ, sys.stdin.read(), __name__)
print(oct(os.umask(0)), signal.getsignal(signal.SIGINT) is signal.default_int_handler)
print("é", file=sys.stderr)
sys.exit(7)
"""
# forks one that sleeps, says its number, and waits
PARENT = """
import os, sys
from tests.forks import start
print(start(["-c", "import time; time.sleep(600)"], env=os.environ, stderr=2).pid, flush=True)
sys.stdin.read()
"""


def gone(pid: int) -> bool:
    """Wait until a process is gone."""
    ends = time.monotonic() + PATIENCE_S
    while time.monotonic() < ends:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("how", ["code", "file", "module"])
def test_as_python_starts_it(tmp_path: Path, how: str) -> None:
    """Folder, words, environment, files, umask, name and exit code, for all three ways to say what is run."""
    (tmp_path / "itself.py").write_text(ITSELF)
    words = {"code": ["-c", ITSELF, "a b"], "file": ["itself.py", "a b"], "module": ["-m", "itself", "a b"]}[how]
    before = os.umask(0o027)
    try:
        done = [
            subprocess.run(
                [program, *words],
                cwd=tmp_path,
                env={"PATH": os.environ["PATH"], "MARK": "1", "LANG": "C.UTF-8"},
                input="said",
                capture_output=True,
                text=True,
                check=False,
            )
            for program in (sys.executable, python())
        ]
    finally:
        os.umask(before)
    assert done[0].returncode == done[1].returncode == 7, done[1].stderr
    assert done[0].stdout == done[1].stdout
    assert done[0].stderr == done[1].stderr == "é\n"


def test_each_draws_numbers_of_its_own() -> None:
    """No generator goes on from the server's state."""
    code = "import random, numpy, torch; print(random.random(), numpy.random.rand(), torch.rand(1).item())"
    drawn = [subprocess.run([python(), "-c", code], capture_output=True, check=True).stdout.split() for _ in range(2)]
    assert not set(drawn[0]) & set(drawn[1])


def test_signals_and_ends() -> None:
    """A signal that ends it is its exit code, also of a stand-in; SIGSTOP stops it; an exception is told and is 1."""
    sleeps = ["-c", "import time; print(1, flush=True); time.sleep(600)"]
    process = start(sleeps, env=os.environ, stderr=2)
    assert process.poll() is None
    process.send_signal(signal.SIGSTOP)
    ends = time.monotonic() + PATIENCE_S
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < ends
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.1)
    process.kill()
    assert process.wait(PATIENCE_S) == -signal.SIGKILL
    with subprocess.Popen([python(), *sleeps], stdout=subprocess.PIPE) as stand_in:
        assert stand_in.stdout is not None
        assert stand_in.stdout.readline() == b"1\n"
        stand_in.send_signal(signal.SIGTERM)
        assert stand_in.wait(PATIENCE_S) == -signal.SIGTERM
    done = subprocess.run([python(), "-c", "1 / 0"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "ZeroDivisionError: division by zero")


def test_a_stand_in_that_is_killed_takes_its_process_along() -> None:
    """Also what that has started in its group."""
    code = "import subprocess, sys; s = subprocess.Popen(['sleep', '600']); print(s.pid, flush=True); s.wait()"
    with subprocess.Popen([python(), "-c", code], stdout=subprocess.PIPE) as stand_in:
        assert stand_in.stdout is not None
        sleeps = int(stand_in.stdout.readline())
        stand_in.kill()
    assert gone(sleeps)


def test_nothing_outlives_killed_tests() -> None:
    """Whoever has forked a process is killed with -9: it is gone nonetheless, and so is the server."""
    with subprocess.Popen(
        [sys.executable, "-u", "-c", PARENT], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        try:
            child = int(parent.stdout.readline())
            server = int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1])
        finally:
            parent.kill()
    assert gone(child)
    assert gone(server)
