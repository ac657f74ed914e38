"""Reads event logs (docs/events.md): strictly as evidence, or tolerantly while they grow."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from dimat import events
from dimat.errors import DataError
from dimat.events.parse import parse_event
from dimat.events.view import AgentView
from dimat.json_text import finite

try:  # several times as fast; of the extra `dashboard`
    from orjson import loads
except ImportError:
    from json import loads

HEADER = {"format": 2, "kind": "dimat.events"}
"""The first line. `format` changes only if a reader of the previous one would misread the log; new events and new
fields do not change it, so readers must skip those that they do not know."""
OLD_HEADER = {**HEADER, "format": 1}
"""Format of logs in which `RoundFinished` has neither training nor merge; readers complete it."""
READ_BYTES = 4 << 20
"""Bytes read and parsed at once when a log is followed; a longer line is not an event."""


def rotated(path: str | Path) -> list[Path]:
    """Return the files of a log that were put aside as it grew, oldest first: events.000001.jsonl, …"""
    path = Path(path)
    name = re.compile(rf"{re.escape(path.stem)}\.(\d{{6,}}){re.escape(path.suffix)}")
    try:
        found = [file for file in path.parent.iterdir() if name.fullmatch(file.name)]
    except FileNotFoundError:
        return []
    return sorted(found, key=number_of)


def number_of(file: Path) -> int:
    """Return the number of a file that was put aside."""
    return int(file.stem.rpartition(".")[2])


def read_events(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the events of a log as dictionaries, without the headers, first those in files that were put aside. An
    incomplete last line, as kill -9 leaves it, is skipped; any other damage is a DataError that names the line."""
    try:
        with open(path, "rb") as file:
            own = _identity(file)
            for older in rotated(path):
                try:
                    with older.open("rb") as aside:
                        if _identity(aside) != own:  # else it was put aside after it was opened
                            yield from _strictly(aside, older)
                except FileNotFoundError:
                    continue  # there were too many
            yield from _strictly(file, path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _strictly(file: BinaryIO, path: str | Path) -> Iterator[dict[str, Any]]:
    complete = Completion(file.readline(), path)
    for number, line in enumerate(file, 2):
        event = parsed(line)
        if event is not None:
            yield complete(event)
        elif line.endswith(b"\n"):
            raise DataError(f"{path}, line {number}: not a JSON object; the file is damaged")


def _identity(file: BinaryIO) -> tuple[int, int]:
    """Return the identity of an open file, independent of its name."""
    now = os.fstat(file.fileno())
    return now.st_dev, now.st_ino


class EventReader:
    """Reads a log that may still grow, each time from where it last stopped.

    `skipped`: number of lines so far that are not events; they are ignored. A log that was put aside is read to its end
    under its new name, then the later ones. One that was replaced or cut (another file under the name, or a shorter
    one) is read again from its beginning. A last line without its newline is left for the next time.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.skipped = 0
        self._at = 0
        self._within = False  # a line that is too long, of which the end is still to come
        self._file: tuple[int, int] | None = None
        self._number = 0  # of the newest file put aside that was read to its end
        self._complete: Completion | None = None  # once the header is read

    def read(self) -> Iterator[list[dict[str, Any]]]:
        """Yield the new events, in lists of about `READ_BYTES`. A missing log has none; DataError if it cannot be read
        or is not an event log of this format."""
        try:
            with self.path.open("rb") as file:
                own = _identity(file)
                if self._file != own:
                    yield from self._put_aside(own)
                yield from self._read(file)
        except FileNotFoundError:
            return
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def _put_aside(self, own: tuple[int, int]) -> Iterator[list[dict[str, Any]]]:
        """Read the rest of the file that was read last, and the files after it, except `own`, which comes next."""
        for older in rotated(self.path):
            try:
                with older.open("rb") as aside:
                    identity = _identity(aside)
                    if identity == own or (number_of(older) <= self._number and identity != self._file):
                        continue
                    yield from self._read(aside)
                    self._number = number_of(older)
            except FileNotFoundError:
                continue

    def _read(self, file: BinaryIO) -> Iterator[list[dict[str, Any]]]:
        """Read a file's events, from the last position if it is the same file as before."""
        now = os.fstat(file.fileno())
        if self._file != (now.st_dev, now.st_ino) or now.st_size < self._at:
            self._file, self._at, self._within = (now.st_dev, now.st_ino), 0, False
        file.seek(self._at)
        if self._at == 0 and not self._begin(file):
            return
        while True:
            data = file.read(READ_BYTES)
            end = data.rfind(b"\n") + 1
            if not end and len(data) < READ_BYTES:
                return
            self._at += end or len(data)
            file.seek(self._at)
            if not end:
                self.skipped += not self._within
                self._within = True
                continue
            start = data.index(b"\n") + 1 if self._within else 0
            self._within = False
            if found := self._events(data[start:end]):
                yield found

    def _begin(self, file: BinaryIO) -> bool:
        """Return whether the header is there, and skip it."""
        line = file.readline(READ_BYTES)
        if not line.endswith(b"\n") and len(line) < READ_BYTES:
            return False
        self._complete = Completion(line, self.path)
        self._at = len(line)
        return True

    def _events(self, data: bytes) -> list[dict[str, Any]]:
        lines = data.count(b"\n")
        try:
            # all in one go: several times as fast as one by one
            values = cast("list[Any]", loads(b"[" + data[:-1].replace(b"\n", b",") + b"]"))
            if len(values) != lines:
                raise ValueError
        except (ValueError, RecursionError):
            values = [parsed(line) for line in data[:-1].split(b"\n")]
        found = [
            cast("dict[str, Any]", value)
            for value in values
            if isinstance(value, dict) and isinstance(cast("dict[str, Any]", value).get("event"), str)
        ]
        self.skipped += lines - len(found)
        assert self._complete is not None
        return [self._complete(event) for event in found] if self._complete.old else found


class Completion:
    """Completes the ends of rounds in a log of format 1 from the events before them. `header`: first line of the log;
    DataError if it is not one."""

    def __init__(self, header: bytes, path: str | Path) -> None:
        found = parsed(header)
        if found not in (HEADER, OLD_HEADER):
            raise DataError(f"{path} is not a dimat event log: its first line is not {json.dumps(HEADER)}")
        self.old = found == OLD_HEADER
        self._views: dict[str, AgentView] = {}

    def __call__(self, plain: dict[str, Any]) -> dict[str, Any]:
        """Return an event, completed if it is the end of a round without its training and merge."""
        event = parse_event(plain) if self.old else None
        if not isinstance(event, events.AgentEvent):
            return plain
        view = self._views.setdefault(event.agent, AgentView(event.agent))
        view.take(event)
        if not isinstance(event, events.RoundFinished) or "contributions" in plain:
            return plain
        whole = view.round_finished(event.round, event.bytes_sent, event.bytes_received)
        return {**finite(whole.to_dict()), **plain}


def parsed(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object in a line; None if there is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # covers bytes that are not UTF-8
        return None
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def _unreadable(path: str | Path, error: OSError) -> DataError:
    return DataError(f"cannot read events from {path}: {error.strerror or error}")
