"""Writes events as JSON Lines: easy to search and follow, and readable after a kill."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import BinaryIO

from dimat.errors import DataError
from dimat.events import Event
from dimat.json_text import to_json
from dimat.ui.jsonl_read import HEADER, OLD_HEADER, number_of, parsed, read_events, rotated

__all__ = ["HEADER", "JsonlListener", "read_events"]

_HEADER_LINE = json.dumps(HEADER).encode() + b"\n"


class JsonlListener:
    """Writes each event as one line, flushed at once; a listener that any thread may call.

    An existing log is continued, whichever format its header has. A last line that a kill has cut short is removed
    first, so that it cannot run into the next one. Non-finite numbers become null, as JSON has none. Raises DataError
    if the file cannot be written or is not an event log.

    A log that has grown to `most_bytes` is put aside under a number, and a new one is begun; the newest `kept` of those
    put aside are kept.
    """

    def __init__(self, path: str | Path, *, most_bytes: int | None = None, kept: int = 0) -> None:
        self.path = Path(path)
        self._most_bytes = most_bytes
        self._kept = kept
        self._lock = threading.Lock()
        self._closed = False
        try:
            self._file = self._open()
        except OSError as error:
            raise self._unwritable(error) from error

    def __call__(self, event: Event) -> None:
        """Append one event."""
        line = to_json(event.to_dict(), separators=(",", ":")).encode() + b"\n"
        with self._lock:
            if self._closed:
                raise DataError(f"cannot write to {self.path}: the log is closed")
            try:
                if self._file.closed:  # a new one could not be begun
                    self._file = self._open()
                self._file.write(line)
                self._file.flush()
                if self._most_bytes is not None and self._file.tell() >= self._most_bytes:
                    self._rotate()
            except OSError as error:
                raise self._unwritable(error) from error

    def close(self) -> None:
        """Close the file; closing twice is allowed."""
        with self._lock:
            self._closed = True
            try:
                self._file.close()
            except OSError as error:  # what a full disk refused before is tried once more here
                raise self._unwritable(error) from error

    def _open(self) -> BinaryIO:
        file = open(self.path, "a+b")
        try:
            _mend(file, self.path)
        except BaseException:
            file.close()
            raise
        return file

    def _rotate(self) -> None:
        """Put the log aside and begin a new one; readers find the earlier one by its number."""
        self._file.close()
        before = rotated(self.path)
        number = 1 + (number_of(before[-1]) if before else 0)
        self.path.rename(self.path.with_name(f"{self.path.stem}.{number:06d}{self.path.suffix}"))
        for old in before[: max(0, len(before) + 1 - self._kept)]:
            old.unlink(missing_ok=True)
        if not self._kept:
            for own in rotated(self.path):
                own.unlink(missing_ok=True)
        self._file = self._open()

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(f"cannot write events to {self.path}: {error.strerror or error}")


def _mend(file: BinaryIO, path: Path) -> None:
    """Open the file for appending, and make sure that it has a header and a complete last line."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(len(_HEADER_LINE))
    if size < len(_HEADER_LINE) and _HEADER_LINE.startswith(start):  # new, empty, or torn within the header
        file.truncate(0)
        file.write(_HEADER_LINE)
    elif parsed(start) not in (HEADER, OLD_HEADER):
        raise DataError(f"{path} exists and is not a dimat event log: choose another name or remove it")
    else:
        end, tail = size, b""
        while b"\n" not in tail:  # ends at the latest at the header's own newline
            end = max(end - 65536, 0)
            file.seek(end)
            tail = file.read()
        keep = end + tail.rindex(b"\n") + 1
        if keep < size and parsed(tail[keep - end :]) is not None:  # whole but for its newline
            file.write(b"\n")
        elif keep < size:
            file.truncate(keep)
    file.flush()
