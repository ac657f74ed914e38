"""Finds and follows the logs in a folder: of a simulated run or of real agents."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from dimat.agent.daemon.folder import MARK as AGENT_MARK
from dimat.agent.daemon.status_socket import SOCKET, ask
from dimat.errors import DataError
from dimat.ui.dashboard.field_values import items, name, text
from dimat.ui.dashboard.reducer import RunState
from dimat.ui.jsonl_read import EventReader

EVENTS = "events.jsonl"
RUN_MARK = "experiment.json"


class FolderSource:
    """Feeds a state from the logs under a folder. `several`: the folder holds agents' folders, to which more may be
    added.

    Raises DataError for a folder without events, or with several runs in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = RunState()
        if not path.is_dir():
            raise DataError(
                f"no folder {path}; give the folder of a run, of an agent, or one that holds agents' folders"
            )
        self.several = not (path / EVENTS).exists()
        self._logs: dict[Path, EventReader] = {}
        self._find()
        self._check()
        self._classes()
        gc.disable()  # what is read stays, and looking through it again and again takes a third of the time
        try:
            self.read()
        finally:
            gc.enable()
        if not self.state.version:
            raise DataError(f"{path} has no events yet: {EVENTS} is empty; start the run first")

    @property
    def damaged(self) -> int:
        """Number of skipped lines."""
        return sum(log.skipped for log in self._logs.values())

    @property
    def view(self) -> str:
        """The agent whose view it is, or "" for all."""
        if self.several or (self.path / RUN_MARK).exists():
            return ""
        return _marked(self.path)

    def read(self) -> bool:
        """Read new events; return whether there were any. DataError if a log cannot be read, after the others were
        read."""
        before, errors = self.state.version, list[DataError]()
        if self.several:
            self._find()
        for log in self._logs.values():
            try:
                for events in log.read():
                    self.state.take_all(events)
            except DataError as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return self.state.version != before

    @property
    def ledgers(self) -> list[Path]:
        """All folders with ledgers of merges."""
        return [log.parent for log in self._logs]

    async def statuses(self) -> Mapping[str, Mapping[str, Any] | None]:
        """Ask the agents that run in these folders, or ran when they were killed, for their status; None: no answer."""
        return await asyncio.to_thread(self._ask)

    def _ask(self) -> dict[str, Mapping[str, Any] | None]:
        statuses: dict[str, Mapping[str, Any] | None] = {}
        for log in list(self._logs):
            folder = log.parent
            if not (folder / SOCKET).exists():  # a socket is removed in good order, and left behind by kill -9
                continue
            try:
                status = ask(folder)
                statuses[name(status.get("agent"))] = status
            except DataError:
                if who := _marked(folder):
                    statuses[who] = None
        return statuses

    def folder_of(self, agent: str) -> Path | None:
        """Return the folder that has an agent's ledger of merges."""
        for log in self._logs:
            if (log.parent / RUN_MARK).exists() or _marked(log.parent) == agent:
                return log.parent
        return None

    def _find(self) -> None:
        logs = [self.path / EVENTS] if not self.several else sorted(self.path.glob(f"*/{EVENTS}"))
        for log in logs:
            if log not in self._logs:
                self._logs[log] = EventReader(log)

    def _check(self) -> None:
        if not self._logs:
            raise DataError(
                f"{self.path} has no events: neither {EVENTS} nor folders of agents with one; give the folder of a run"
            )
        runs = [log.parent.name for log in self._logs if (log.parent / RUN_MARK).exists()]
        if self.several and runs:
            raise DataError(f"{self.path} holds several runs; give the folder of one, e.g. {self.path / runs[0]}")

    def _classes(self) -> None:
        """Return the names of the classes, which only the results of a finished run have."""
        try:
            results = json.loads((self.path / "results.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if isinstance(results, dict):
            given = cast("dict[str, Any]", results).get("classes")
            self.state.run["classes"] = [text(label, 40) for label in items(given)]


def _marked(folder: Path) -> str:
    try:
        found = json.loads((folder / AGENT_MARK).read_text(encoding="utf-8"))
        return name(found["agent"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
