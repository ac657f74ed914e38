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
from dimat.ui.jsonl_read import HEADER, OLD_HEADER, parsed, read_events

__all__ = ["HEADER", "JsonlListener", "read_events"]

_HEADER_LINE = json.dumps(HEADER).encode() + b"\n"


class JsonlListener:
    """Writes each event as one line, flushed at once; a listener that any thread may call.

    An existing log is continued, whichever format its header has. A last line that was torn by a kill is cut off
    first, so that it cannot run into the next one. Non-finite numbers become null, as JSON has none. Raises DataError
    where the file cannot be written or is not an event log.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        try:
            self._file = open(self.path, "a+b")
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            _mend(self._file, self.path)
        except OSError as error:
            self._file.close()
            raise self._unwritable(error) from error
        except DataError:
            self._file.close()
            raise

    def __call__(self, event: Event) -> None:
        """Append one event."""
        line = to_json(event.to_dict(), separators=(",", ":")).encode() + b"\n"
        with self._lock:
            if self._file.closed:
                raise DataError(f"cannot write to {self.path}: the log is closed")
            try:
                self._file.write(line)
                self._file.flush()
            except OSError as error:
                raise self._unwritable(error) from error

    def close(self) -> None:
        """Close the file; closing twice is allowed."""
        with self._lock:
            try:
                self._file.close()
            except OSError as error:  # what a full disk refused before is tried once more here
                raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(f"cannot write events to {self.path}: {error.strerror or error}")


def _mend(file: BinaryIO, path: Path) -> None:
    """Leave the file, open for appending, with a header and a whole last line."""
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
