"""A real agent on a terminal: a panel that says how it is now, below the lines that scroll as they would elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO

from dimat import events
from dimat.ui.terminal.agent import AgentListener
from dimat.ui.terminal.run import is_terminal, open_screen
from dimat.ui.text import bytes_text, clean, listed, metric_text, seconds_text

if TYPE_CHECKING:
    from rich.live import Live

TICK_S = 1.0
"""Seconds after which the panel is drawn anew while nothing happens."""
REFRESH_S = 0.5
"""Seconds between two drawings, at least, while events come."""
WARNINGS = 3
"""Newest warnings that the panel shows."""
PHASES = ("train", "wait", "merge")


@dataclass
class AgentState:
    """What the panel says. Times are monotonic seconds; `late`: who was missing in the newest merge; `spent`: seconds
    by phase; `sent`, `received`: bytes of payload since the start."""

    run: str = ""
    agent: str = ""
    metric: str = "accuracy"
    round: int = 0
    rounds: int = 0
    phase: str = ""
    phase_began: float = 0.0
    loss: float | None = None
    before: float | None = None
    after: float | None = None
    listened: int = 0
    connected: int = 0
    heard: int = 0
    expected: int = 0
    late: tuple[str, ...] = ()
    sent: int = 0
    received: int = 0
    left: str = ""
    spent: Counter[str] = field(default_factory=Counter[str])
    warnings: deque[str] = field(default_factory=lambda: deque[str](maxlen=WARNINGS))
    _missing: list[str] = field(default_factory=list[str])

    def note(self, event: events.Event, now: float) -> None:
        """Take an event in."""
        if isinstance(event, events.AgentEvent):
            self.round = event.round
        match event:
            case events.AgentStarted():
                self.run, self.agent, self.metric = event.run, event.agent, event.metric
                self.rounds, self.listened = event.rounds, len(event.peers)
            case events.MapRead(peers=peers):
                self.listened = len(peers)
            case events.PhaseStarted(phase=phase, previous=previous, previous_s=seconds):
                self.spent[previous] += seconds  # pyright: ignore[reportArgumentType]  # seconds are counted like things
                self.phase, self.phase_began = phase, now
            case events.RoundStarted():
                self._missing = []
            case events.Trained(result=events.TrainResult(loss=loss)):
                self.loss = loss
            case events.PeerLate(peer=peer):
                self._missing.append(peer)
            case events.Merged():
                result = event.result
                self.before, self.after = result.before.get(self.metric), result.after.get(self.metric)
                self.heard, self.expected, self.late = event.heard, event.expected, tuple(self._missing)
            case events.NetworkObserved():
                self.connected = len(event.connected)
                self.sent = sum(sum(counts.values()) for counts in event.sent.values())
                self.received = sum(sum(counts.values()) for counts in event.received.values())
            case events.Warned(message=message):
                self.warnings.append(message)
            case events.PeerRefused(peer=peer, reason=reason):
                self.warnings.append(f"{peer} refused: {reason}")
            case events.AgentLeft(reason=reason):
                self.left = reason
            case _:
                pass

    def lines(self, now: float) -> list[tuple[str, str]]:
        """Return what the panel says: a word and what there is to say of it."""
        of = f" of {self.rounds}" if self.rounds else ""
        if self.left:
            doing = f"has left ({self.left}), still serves its weights"
        elif self.phase:
            doing = f"{self.phase} for {seconds_text(max(0.0, now - self.phase_began))}"
        else:
            doing = "begins"
        learned = f"loss {metric_text(self.loss)}"
        if self.after is not None:
            came = "" if self.before is None else f"{metric_text(self.before)} → "
            learned += f", {self.metric} {came}{metric_text(self.after)}"
        peers = f"{self.connected} of {self.listened} connected, heard {self.heard} of {self.expected}"
        if self.late:
            peers += f", late: {listed(self.late, 4)}"
        spent = ", ".join(f"{phase} {seconds_text(self._seconds(phase, now))}" for phase in PHASES)
        return [
            ("round", f"{self.round}{of}, {doing}"),
            ("model", learned),
            ("peers", peers),
            ("bytes", f"{bytes_text(self.sent)} out, {bytes_text(self.received)} in"),
            ("time", spent),
            *(("warning", message) for message in self.warnings),
        ]

    def _seconds(self, phase: str, now: float) -> float:
        running = now - self.phase_began if phase == self.phase and not self.left else 0.0
        return self.spent[phase] + max(0.0, running)


class LiveAgentListener(AgentListener):
    """Shows one agent's events as `AgentListener` does, with the panel below them, until `close`, which leaves the
    panel as it was last. `stream`: a terminal."""

    def __init__(self, metric: str, stream: TextIO | None = None, verbosity: int = 0) -> None:
        super().__init__(metric, stream, verbosity)
        self._state = AgentState(metric=metric)
        self._console = open_screen(self._stream)
        self._live: Live | None = None
        self._drawn_at = float("-inf")
        self._ended = threading.Event()
        # all drawing is under this listener's lock: nothing can wait in a circle with rich's own
        self._ticker = threading.Thread(target=self._tick, name="panel", daemon=True)

    def __call__(self, event: events.Event) -> None:
        """Show one event, and how the agent is after it."""
        with self._lock:
            self._state.note(event, time.monotonic())
            if isinstance(event, events.AgentStarted) and self._live is None and not self._ended.is_set():
                self._open()
            super().__call__(event)
            if time.monotonic() - self._drawn_at >= REFRESH_S:
                self._draw()

    def close(self) -> None:
        """Say what is left to say, and give the terminal back; closing twice is allowed."""
        with self._lock:
            super().close()
            self._ended.set()
            self._draw()
            live, self._live = self._live, None
            if live is not None:
                self._guarded(live.stop)

    def _open(self) -> None:
        from rich.live import Live

        # what others write to stderr goes above the panel; stdout may be read by another program
        own = self._stream is sys.stderr
        live = Live(console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=own)
        self._guarded(live.start)
        self._live = live
        self._ticker.start()

    def _tick(self) -> None:
        while not self._ended.wait(TICK_S):
            with self._lock:
                self._draw()

    def _draw(self) -> None:
        live = self._live
        if live is None or self._broken:
            return
        from rich.panel import Panel
        from rich.text import Text

        self._drawn_at = time.monotonic()
        state = self._state
        text = Text(no_wrap=True, overflow="ellipsis")
        for number, (word, said) in enumerate(state.lines(time.monotonic())):
            text.append("\n" * (number > 0))
            text.append(f"{word:8}", style="yellow" if word == "warning" else "dim")
            text.append(clean(said))
        title = Text(clean(f"{state.agent} of run {state.run}"), style="bold")
        panel = Panel(text, title=title, title_align="left")
        self._guarded(lambda: live.update(panel, refresh=True))

    def _write(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)


def agent_listener(metric: str, stream: TextIO, verbosity: int, plain: bool) -> AgentListener:
    """Return what shows an agent's events on a stream: with a panel on a terminal, unless `plain` lines are wanted or
    only warnings are."""
    live = is_terminal(stream) and not plain and verbosity >= 0
    return (LiveAgentListener if live else AgentListener)(metric, stream, verbosity)
