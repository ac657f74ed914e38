"""What processes cost: their CPU time, and the memory that they hold as their own."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EVERY_S = 0.005
"""Time between two looks at a child's memory."""

ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "RAYON", "TOKENIZERS")}


class ChildError(Exception):
    """A child ended with an error; holds the last lines of what it said."""


@dataclass(frozen=True)
class Cost:
    """`cpu_s`: user + system time of the process and of those that it waited for, by wait4; `anonymous_mb`: the most
    anonymous memory seen (RssAnon of /proc: heap and the like, without mapped files, which the kernel may drop)."""

    cpu_s: float
    anonymous_mb: float


def watch(command: Sequence[str | Path], environment: Mapping[str, str] | None = None, **popen: Any) -> Cost:
    """Run a command with one thread to the end and return its cost; ChildError where it fails. Linux only: /proc."""
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(
            [str(part) for part in command],
            env={**os.environ, **ONE_THREAD, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            **popen,
        )
        peak_kb = 0
        try:
            while True:
                pid, code, usage = os.wait4(child.pid, os.WNOHANG)
                if pid:
                    break
                peak_kb = max(peak_kb, anonymous_kb(child.pid))
                time.sleep(EVERY_S)
        except BaseException:
            child.kill()
            child.wait()
            raise
        child.returncode = os.waitstatus_to_exitcode(code)
        if child.returncode:
            said.seek(0)
            tail = "\n".join(said.read().splitlines()[-15:])
            raise ChildError(f"{command[0]} … ended with {child.returncode}:\n{tail}")
    return Cost(usage.ru_utime + usage.ru_stime, peak_kb / 1024)


def anonymous_kb(pid: int) -> int:
    """Return RssAnon of a process, 0 where it is over."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(row.split()[1]) for row in text.splitlines() if row.startswith("RssAnon")), 0)
