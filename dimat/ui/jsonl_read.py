"""Reads event logs (docs/events.md): strictly, where a log is evidence, or forgivingly and piece by piece, where
somebody watches a run that goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from dimat.errors import DataError

HEADER = {"format": 1, "kind": "dimat.events"}
"""The first line. `format` changes when a reader of the one before would misunderstand; further events and further
fields do not change it, so readers pass over what they do not know."""
READ_BYTES = 4 * 2**20
"""Read at a time; a line may be longer."""


def read_events(path: str | Path, strict: bool = True) -> Iterator[dict[str, Any]]:
    """Yield the events of a log as dictionaries, without the header. A torn last line, as kill -9 leaves it, is
    passed over; any other damage is a DataError that names the line, or passed over too where not `strict` (an
    `EventReader` counts such lines)."""
    if not strict:
        reader = EventReader(path)
        while True:
            events = reader.read()
            yield from events
            if reader.at_end:
                yield from reader.rest()
                return
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
    """Reads a log that may still grow, from where it stopped the last time.

    `skipped`: whole lines so far that are no events; they are passed over. `offset`: byte up to which the log is read.
    `begun_anew`: how often the log was found shorter than that (it was replaced), and read from its start again.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.skipped = 0
        self.offset = 0
        self.begun_anew = 0
        self.at_end = False
        """Whether the last `read` came to the end of what is there."""

    def read(self) -> list[dict[str, Any]]:
        """Return the events of the next whole lines, of about `READ_BYTES` at most; none where there is nothing new.
        DataError where the file cannot be read or is no event log of this format."""
        data, start = self._piece()
        if not data:
            return []
        lines = data[: data.rindex(b"\n")].split(b"\n")
        self.offset = start + data.rindex(b"\n") + 1
        if start == 0 and not is_header(lines.pop(0)):
            self.offset = 0
            raise _foreign(self.path)
        events: list[dict[str, Any]] = []
        for line in lines:
            event = parsed(line)
            if event is None or not isinstance(event.get("event"), str):
                self.skipped += 1
            else:
                events.append(event)
        return events

    def rest(self) -> list[dict[str, Any]]:
        """Return the event of a last line that is whole but for its newline, as a kill may leave it."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                event = parsed(file.read()) if self.offset else None
        except OSError as error:
            raise _unreadable(self.path, error) from error
        return [event] if event is not None and isinstance(event.get("event"), str) else []

    def _piece(self) -> tuple[bytes, int]:
        """Return bytes with at least one whole line from where the reader is, or none, and where they begin."""
        try:
            with self.path.open("rb") as file:
                if file.seek(0, 2) < self.offset:
                    self.offset, self.skipped = 0, 0
                    self.begun_anew += 1
                start = file.seek(self.offset)
                data = b""
                while b"\n" not in data:
                    more = file.read(READ_BYTES)
                    data += more
                    if not more:
                        self.at_end = True
                        return b"", start
                self.at_end = not file.read(1)
                return data, start
        except OSError as error:
            raise _unreadable(self.path, error) from error


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
