"""TensorBoard event files, a folder per agent.

TensorBoard calls a folder a run, so that it shows agents' curves in one chart; a simulated run has one more folder for
the numbers over all agents. The files are written here, in TensorBoard's record format, without its writer's thread and
open file for each of perhaps a thousand agents.
"""

from __future__ import annotations

import io
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from dimat.ui.trackers.tracker import MetricRow, TrackedRun

# made when the module is loaded, where pyright does not see them
Event: Any = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]
SessionLog: Any = event_pb2.SessionLog  # pyright: ignore[reportAttributeAccessIssue]
Summary: Any = summary_pb2.Summary  # pyright: ignore[reportAttributeAccessIssue]

ALL = "all agents"
"""Folder of the numbers over all agents."""


class TensorBoardBackend:
    """Writes below `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Path] = {}
        self._started: TrackedRun | None = None

    def start(self, started: TrackedRun) -> None:
        """Begin event files; a real agent's replaces that of an earlier process from its next round on."""
        self._started = started
        self._files = {}
        if not started.simulated:
            self._file(started.agents[0])

    def log(self, row: MetricRow) -> None:
        """Append a row."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in row.values.items()]
        self._append(self._file(row.agent), Event(wall_time=row.time_s, step=row.round, summary=Summary(value=values)))

    def end(self, reason: str) -> None:
        """Nothing remains to do: everything is on disk."""

    def _file(self, agent: str) -> Path:
        """Return an agent's event file, begun if there is none yet."""
        started = self._started
        assert started is not None
        if agent not in self._files:
            folder = self._folder / (quote(agent, safe=" ") if agent else ALL)
            folder.mkdir(parents=True, exist_ok=True)
            # names as TensorBoard's own, which are read in their order
            stem = f"events.out.tfevents.{int(started.time_s):010d}.{socket.gethostname()}.{os.getpid()}"
            number = 0
            while (file := folder / f"{stem}.{number}").exists():
                number += 1
            self._append(file, Event(wall_time=started.time_s, file_version="brain.Event:2"))
            # rows of rounds that an agent does again, after a crash, are taken back
            session = SessionLog(status=SessionLog.START)
            self._append(file, Event(wall_time=started.time_s, step=started.round + 1, session_log=session))
            self._files[agent] = file
        return self._files[agent]

    @staticmethod
    def _append(file: Path, event: Any) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        with file.open("ab") as stream:
            stream.write(record.getvalue())
