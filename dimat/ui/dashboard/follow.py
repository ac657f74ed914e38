"""A log that is read while somebody writes it: new whole lines each time, damaged ones passed over and counted."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from dimat.errors import DataError
from dimat.ui.jsonl import HEADER

CHUNK = 4 << 20
"""Bytes that are read and parsed at a time."""


class Follower:
    """Reads an event log from its begin on, and later what was added. `damaged`: lines that are no JSON object so far.

    A log that was replaced or cut (another file under the name, or a shorter one) is read anew from its begin. A last
    line without its newline is left for the next time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged = 0
        self._at = 0
        self._file: tuple[int, int] | None = None

    def read(self) -> Iterator[list[dict[str, Any]]]:
        """Yield what is new, in lists; DataError where the log cannot be read. A log that is gone has nothing new."""
        try:
            with self.path.open("rb") as file:
                found = os.fstat(file.fileno())
                if self._file != (found.st_dev, found.st_ino) or found.st_size < self._at:
                    self._file, self._at = (found.st_dev, found.st_ino), 0
                file.seek(self._at)
                while True:
                    data = file.read(CHUNK)
                    end = data.rfind(b"\n") + 1
                    if not end and len(data) < CHUNK:
                        return
                    if not end:  # a line beyond all reason: its rest counts as another one
                        self.damaged += 1
                        end = len(data)
                        self._at += end
                        continue
                    file.seek(self._at + end)
                    self._at += end
                    yield self._parsed(data[: end - 1])
        except FileNotFoundError:
            return
        except OSError as error:
            raise DataError(f"cannot read events from {self.path}: {error.strerror or error}") from error

    def _parsed(self, data: bytes) -> list[dict[str, Any]]:
        lines = data.decode("utf-8", errors="replace").split("\n")
        try:
            # all in one go: several times as fast as one by one
            values = cast("list[Any]", json.loads(f"[{','.join(lines)}]"))
            if len(values) != len(lines):
                raise ValueError
        except (ValueError, RecursionError):
            values = [_value(line) for line in lines]
        found = [cast("dict[str, Any]", value) for value in values if isinstance(value, dict)]
        self.damaged += len(lines) - len(found)
        return [value for value in found if value != HEADER]


def _value(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
