"""The folder of a real agent: where its files are, its owner's mark, and its lock.

`agent.json` marks a folder as that of one agent in one run; a folder of another is never touched. While an agent
runs it holds a lock, so that no second process works on its files.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from dimat.errors import DataError
from dimat.reading import read_table
from dimat.weights.durable import write_bytes

MARK = "agent.json"
LOCK = "lock"


class AgentFolder:
    """Folder of one agent in one run; created if it does not exist.

    Raises DataError if it belongs to another agent, or is in use.
    """

    def __init__(self, path: Path, run: str, agent: str) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.snapshots = path / "snapshots"
        self.received = path / "received"
        self.events = path / "events.jsonl"
        self.lineage = path / "lineage.jsonl"
        self.manifests = path / "manifests.jsonl"
        self.weights = path / "weights.safetensors"
        self.socket = path / "status.sock"
        self.dht = path / "dht"
        try:
            for folder in (self.checkpoints, self.snapshots, self.received):
                folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DataError(f"cannot write to the agent's folder {path}: {error.strerror or error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.pread(self._lock, 32, 0).decode(errors="replace").strip()
            os.close(self._lock)
            raise DataError(
                f"{path} is in use by the agent with process id {owner or 'unknown'}; stop that agent, or give "
                "this one another agent.folder"
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
        try:
            self._check(run, agent)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the folder; closing twice is allowed."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _check(self, run: str, agent: str) -> None:
        mine = {"run": run, "agent": agent}
        found = read_mark(self.path)
        if found is None:
            write_bytes(self.path / MARK, (json.dumps(mine) + "\n").encode())
        elif found != mine:
            raise DataError(
                f"{self.path} is the folder of agent {found.get('agent')!r} in run {found.get('run')!r}, this is agent "
                f"{agent!r} in run {run!r}; choose another agent.folder"
            )


def owner_of_folder(path: Path) -> int | None:
    """Return the id of the process that works in a folder, None if none does, 0 if its id is not known."""
    try:
        lock = os.open(path / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except OSError:
        owner = os.pread(lock, 32, 0).decode(errors="replace").strip()
        return int(owner) if owner.isdecimal() else 0
    finally:
        os.close(lock)


def read_mark(path: Path) -> dict[str, Any] | None:
    """Return the owner of a folder ("run", "agent"), None if it has none.

    Raises DataError if the mark is damaged.
    """
    if not (path / MARK).exists():
        return None
    found = read_table(path / MARK)
    if not all(isinstance(found.get(key), str) for key in ("run", "agent")):
        raise DataError(f"{path / MARK} does not say whose folder this is: it needs the strings run and agent")
    return found
