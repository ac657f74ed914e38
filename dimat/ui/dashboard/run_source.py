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
    """Feeds a state from the logs under a folder. `several`: the folder holds agents' folders, which may become more.

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
        """Lines that were passed over."""
        return sum(log.skipped for log in self._logs.values())

    @property
    def view(self) -> str:
        """Whose view it is: an agent's name, or "" for all."""
        if self.several or (self.path / RUN_MARK).exists():
            return ""
        return _marked(self.path)

    def read(self) -> bool:
        """Take in what is new; return whether anything was. DataError if a log cannot be read, once the others
        have been."""
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
        """Ask the agents that run in these folders, or did when they were killed, how they are; None: no answer."""
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
        """Names of the classes stand in the results of a finished run only."""
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
