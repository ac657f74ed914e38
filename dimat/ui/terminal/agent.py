"""Shows a real agent's events as lines: one per round, and one for each problem."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

from dimat import events
from dimat.ui.terminal.lines import RepeatFilter, lines_of
from dimat.ui.text import bytes_text, clean, listed, metric_text


class AgentListener:
    """Shows one agent's events as plain lines; a listener that any thread may call.

    `metric`: of the task; `verbosity`: -1 warnings only; 0 rounds, agents that come and go; 1 also late and refused
    peers, basis adoptions and notes of merges; 2 every step. Repeated messages are shown a few times and then counted,
    with a total at the end. A stream that breaks ends the display, never the agent.
    """

    def __init__(self, metric: str, stream: TextIO | None = None, verbosity: int = 0) -> None:
        self._metric = metric
        self._stream = sys.stderr if stream is None else stream
        self._verbosity = verbosity
        self._lock = threading.RLock()
        self._repeats = RepeatFilter()
        self._broken = False

    def __call__(self, event: events.Event) -> None:
        """Show one event, if the verbosity asks for it."""
        with self._lock:
            if self._verbosity >= 0 and isinstance(event, events.AgentStarted):
                self._say(event.time_s, _started(event))
            if isinstance(event, events.RoundFinished):
                if self._verbosity >= 0:
                    self._say(event.time_s, self._finished(event))
                return
            for line in lines_of(event):
                heard = self._verbosity >= line.level
                if line.what and self._verbosity >= min(line.level, 0) and not self._repeats.first(line, heard):
                    continue
                if heard:
                    self._say(event.time_s, line.text)

    def close(self) -> None:
        """Show the totals of counted messages; closing twice is allowed."""
        with self._lock:
            for message in self._repeats.rest():
                self._say(time.time(), message)

    def _finished(self, event: events.RoundFinished) -> str:
        parts = [f"heard {event.heard}/{event.expected}"]
        if event.loss is not None:
            parts.insert(0, f"loss {metric_text(event.loss)}")
        before, after = event.before.get(self._metric), event.after.get(self._metric)
        if after is not None:
            came = "" if before is None else f"{metric_text(before)} -> "
            parts.append(f"{self._metric} {came}{metric_text(after)}")
        if event.accepted < 1:
            parts.append(f"{event.accepted:.0%} of the merge kept")
        moved = f"sent {bytes_text(event.bytes_sent)}, received {bytes_text(event.bytes_received)}"
        return f"round {event.round}: {', '.join(parts)}, {moved}"

    def _say(self, at: float, message: str) -> None:
        line = clean(f"{time.strftime('%H:%M:%S', time.localtime(at))} {message}")
        self._guarded(lambda: self._write(line))

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()

    def _guarded(self, show: Callable[[], object]) -> None:
        if self._broken:
            return
        try:
            show()
        except OSError:
            self._broken = True  # the reader went away: the training goes on


def _started(event: events.AgentStarted) -> str:
    how = "" if event.secure else ", insecure"
    peers = f"peers {listed(event.peers, 4)}" if event.peers else "no peers"
    what = f"{event.samples:,} samples, {event.parameters:,} parameters"
    return f"{event.agent} of run {event.run} listens on {event.address}{how}; {peers}; {what}"
