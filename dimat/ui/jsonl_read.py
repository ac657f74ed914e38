"""Reads event logs (docs/events.md): strictly, where a log is evidence, or forgivingly and piece by piece, where
somebody watches a run that goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from dimat.errors import DataError

try:  # several times as fast; of the extra `dashboard`
    from orjson import loads
except ImportError:
    from json import loads

HEADER = {"format": 1, "kind": "dimat.events"}
"""The first line. `format` changes when a reader of the one before would misunderstand; further events and further
fields do not change it, so readers pass over what they do not know."""
READ_BYTES = 4 << 20
"""Read and parsed at a time where a log is followed; a line that is longer is no event."""


def read_events(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the events of a log as dictionaries, without the header. A torn last line, as kill -9 leaves it, is
    passed over; any other damage is a DataError that names the line."""
    try:
        with open(path, "rb") as file:
            if not is_header(file.readline()):
                raise _foreign(path)
            for number, line in enumerate(file, 2):
                event = parsed(line)
                if event is not None:
                    yield event
                elif line.endswith(b"\n"):
                    raise DataError(f"{path}, line {number}: not a JSON object; the file is damaged")
    except OSError as error:
        raise _unreadable(path, error) from error


class EventReader:
    """Reads a log that may still grow, each time from where it stopped the time before.

    `skipped`: lines so far that are no events; they are passed over. A log that was replaced or cut (another file
    under the name, or a shorter one) is read anew from its begin. A last line without its newline is left for the next
    time.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.skipped = 0
        self._at = 0
        self._within = False  # a line that is too long, of which the end is still to come
        self._file: tuple[int, int] | None = None

    def read(self) -> Iterator[list[dict[str, Any]]]:
        """Yield the events that are new, in lists of about `READ_BYTES`. A log that is not there has none; DataError
        where it cannot be read or is no event log of this format."""
        try:
            with self.path.open("rb") as file:
                found = os.fstat(file.fileno())
                if self._file != (found.st_dev, found.st_ino) or found.st_size < self._at:
                    self._file, self._at, self._within = (found.st_dev, found.st_ino), 0, False
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
                    if events := self._events(data[start:end]):
                        yield events
        except FileNotFoundError:
            return
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def _begin(self, file: BinaryIO) -> bool:
        """Return whether the header is there, and go behind it."""
        line = file.readline(READ_BYTES)
        if not line.endswith(b"\n") and len(line) < READ_BYTES:
            return False
        if not is_header(line):
            raise _foreign(self.path)
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
        events = [
            cast("dict[str, Any]", value)
            for value in values
            if isinstance(value, dict) and isinstance(cast("dict[str, Any]", value).get("event"), str)
        ]
        self.skipped += lines - len(events)
        return events


def is_header(line: bytes) -> bool:
    """Return whether a line is the header of a log of this format."""
    return parsed(line) == HEADER


def parsed(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object in a line; None where there is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # covers bytes that are not UTF-8
        return None
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def _foreign(path: str | Path) -> DataError:
    return DataError(f"{path} is not a dimat event log: its first line is not {json.dumps(HEADER)}")


def _unreadable(path: str | Path, error: OSError) -> DataError:
    return DataError(f"cannot read events from {path}: {error.strerror or error}")
