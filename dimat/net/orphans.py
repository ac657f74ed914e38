"""A file that says which processes a folder's owner started, so that what a crash left behind can be ended.

The processes are known by a random token in their environment, which what they start inherits; a process number alone
may be somebody else's by now. Where there is no /proc, nothing is looked for.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from dimat.errors import NetworkError

VARIABLE = "DIMAT_HELPER"
"""Environment variable that holds the token."""
_PROC = Path("/proc")


class Pidfile:
    """`claim` takes a file over from whoever left it, ends what was left running, and gives the new token."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def claim(self, scratch: str = "") -> tuple[str, int]:
        """Write the file for a helper that is about to be started; return its token, and how many processes of an
        earlier one were ended. `scratch`: a folder of the helper's that is removed with it.

        Raises NetworkError where the owner of the earlier one is alive and another process.
        """
        ended = self._sweep()
        token = secrets.token_hex(16)
        me = os.getpid()
        entry = {"token": token, "owner": me, "began": _began(me), "scratch": scratch}
        fresh = self._file.with_suffix(".new")
        fresh.write_text(json.dumps(entry) + "\n", encoding="utf-8")
        os.replace(fresh, self._file)
        return token, ended

    def release(self) -> None:
        """Remove the file: nothing is running any more."""
        self._file.unlink(missing_ok=True)

    def _sweep(self) -> int:
        try:
            entry: Any = json.loads(self._file.read_text(encoding="utf-8"))
            token, owner, began = str(entry["token"]), int(entry["owner"]), int(entry["began"])
            scratch = str(entry["scratch"])
        except FileNotFoundError:
            return 0
        except (ValueError, KeyError, TypeError):
            return 0  # torn by a crash: it names nothing that could be looked for
        if owner != os.getpid() and began and _began(owner) == began:
            raise NetworkError(f"{self._file.parent}: process {owner} runs a DHT node from this folder; stop it first")
        ended = end_by_token(token)
        if scratch and Path(scratch).name.startswith("dimat-"):
            shutil.rmtree(scratch, ignore_errors=True)
        return ended


def end_by_token(token: str, limit_s: float = 2.0) -> int:
    """Kill all processes of this user whose environment holds the token, and wait until they are gone, since what they
    hold (a port, say) is wanted next; return how many there were."""
    found = find_by_token(token)
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + limit_s
    while found and find_by_token(token) and time.monotonic() < deadline:
        time.sleep(0.01)
    return len(found)


def find_by_token(token: str) -> list[int]:
    """Return the living processes of this user whose environment holds the token."""
    mark = f"{VARIABLE}={token}".encode()
    found: list[int] = []
    for folder in _PROC.glob("[0-9]*"):
        pid = int(folder.name)
        with suppress(OSError):  # gone meanwhile, or another user's
            # that of a process which has ended and was not waited for yet is empty
            if mark in (folder / "environ").read_bytes().split(b"\0") and pid != os.getpid():
                found.append(pid)
    return found


def _began(pid: int) -> int:
    """Return when a process began, in the kernel's ticks since it booted; 0 where there is none, or no /proc."""
    try:
        stat = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return 0
    fields = stat.rpartition(")")[2].split()
    return 0 if fields[0] in "ZX" else int(fields[19])
