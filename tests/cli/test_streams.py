"""Streams that are closed or end in a full disk, and a folder that is gone, as a shell or a supervisor starts dimat.

Reference: what POSIX says of closed descriptors, and the exit codes of `dimat/errors.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def _run(shell: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", shell, "x", sys.executable, "-m", "dimat.cli", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("shell", "words", "code", "said"),
    [
        ('"$@" >&-', ["topology", "list"], 0, ""),
        ('"$@" <&- >&- 2>&-', ["topology", "list"], 0, ""),
        ('"$@" 2>&-', ["nothing"], 2, ""),
        ('"$@" 2>/dev/full', ["nothing"], 2, ""),
        ('"$@" >/dev/full', ["topology", "list"], 5, "cannot write the result to stdout: No space left on device"),
        ('"$@" >/dev/full', ["--help"], 5, "dimat: cannot write the output: No space left on device; free some space"),
        ('cd "$(mktemp -d)"; rmdir "$PWD"; "$@"', ["topology", "list"], 5, "folder that this runs in has been removed"),
        ('cd "$(mktemp -d)"; rmdir "$PWD"; "$@"', ["--help"], 0, ""),
    ],
)
def test_streams_and_folders_that_are_gone(shell: str, words: list[str], code: int, said: str) -> None:
    done = _run(shell, *words)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1 if said else 0)
    assert said in done.stderr


def test_a_closed_stream_is_not_a_files(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    assert _run('"$@" <&- >&- 2>&-', "init", str(file)).returncode == 0
    assert file.read_text().startswith("#")
    assert "wrote" not in file.read_text()
