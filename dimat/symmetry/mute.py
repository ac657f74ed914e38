"""Discards the output of one thread; other threads' output is unaffected."""

from __future__ import annotations

import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any


class _Muted:
    """Replaces a stream, and discards its own thread's output while `active`. Other code may keep a reference to it."""

    def __init__(self, stream: Any) -> None:
        self.active = True
        self._stream = stream  # None where a process has none
        self._thread = threading.get_ident()

    def write(self, text: str) -> int:
        """Write, or not; returns the length either way."""
        if self._stream is not None and not (self.active and threading.get_ident() == self._thread):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        if self._stream is not None:
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def muted() -> Generator[None]:
    """Discard what this thread prints on stdout and stderr.

    `sys.stdout` and `sys.stderr` belong to the process: if they were simply replaced, a line that another thread prints
    at that moment would be lost, such as "leaving" of an agent that is stopped while it traces.
    """
    out, err = _Muted(sys.stdout), _Muted(sys.stderr)
    redirects: Any = (redirect_stdout(out), redirect_stderr(err))  # they take whatever can be written to
    with redirects[0], redirects[1]:
        try:
            yield
        finally:
            out.active = err.active = False
