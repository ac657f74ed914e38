"""Shows a real agent on a terminal: a panel with its current state below its lines."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, TextIO

from dimat import events
from dimat.events.view import AgentView
from dimat.ui.terminal.agent import AgentListener
from dimat.ui.terminal.run import is_terminal, open_screen
from dimat.ui.text import bytes_text, clean, listed, metric_text, seconds_text

if TYPE_CHECKING:
    from rich.live import Live

TICK_S = 1.0
"""Seconds after which the panel is redrawn if nothing happens."""
REFRESH_S = 0.5
"""Least seconds between two drawings while events arrive."""
WARNINGS = 3
"""Number of newest warnings in the panel."""
PHASES = ("train", "wait", "merge")


def panel_lines(view: AgentView, now: float) -> list[tuple[str, str]]:
    """Return the lines of the panel: a label and its text. `now`: by the view's clock."""
    of = f" of {view.started.rounds}" if view.started is not None and view.started.rounds else ""
    if view.left:
        doing = f"has left ({view.left}), still serves its weights"
    elif view.phase:
        doing = f"{view.phase} for {seconds_text(max(0.0, now - view.phase_began))}"
    else:
        doing = "begins"
    learned = f"loss {metric_text(view.loss)}"
    before, after = view.before.get(view.metric), view.after.get(view.metric)
    if after is not None:
        came = "" if before is None else f"{metric_text(before)} → "
        learned += f", {view.metric} {came}{metric_text(after)}"
    network = view.network or events.NetworkObserved(agent=view.agent, round=0)
    heard = f"heard {view.finished.heard} of {view.finished.expected}" if view.finished else "heard 0 of 0"
    peers = f"{len(network.connected)} of {len(view.peers)} connected, {heard}"
    if view.finished and view.finished.late:
        peers += f", late: {listed(tuple(view.finished.late), 4)}"
    sent, received = (
        sum(sum(by_encoding.values()) for by_encoding in counts.values()) for counts in (network.sent, network.received)
    )
    spent = ", ".join(f"{phase} {seconds_text(view.seconds(phase, now))}" for phase in PHASES)
    return [
        ("round", f"{view.round}{of}, {doing}"),
        ("model", learned),
        ("peers", peers),
        ("bytes", f"{bytes_text(sent)} out, {bytes_text(received)} in"),
        ("time", spent),
        *(("warning", message) for message in list(view.warnings)[-WARNINGS:]),
    ]


class LiveAgentListener(AgentListener):
    """Shows one agent's events as `AgentListener` does, with the panel below them, until `close`, which leaves the last
    panel. `stream`: a terminal."""

    def __init__(self, metric: str, stream: TextIO | None = None, verbosity: int = 0) -> None:
        super().__init__(metric, stream, verbosity)
        self._view = AgentView(metric=metric)
        self._console = open_screen(self._stream)
        self._live: Live | None = None
        self._drawn_at = float("-inf")
        self._ended = threading.Event()
        # all drawing is under this listener's lock: nothing can wait in a circle with rich's own
        self._ticker = threading.Thread(target=self._tick, name="panel", daemon=True)

    def __call__(self, event: events.Event) -> None:
        """Show one event, and the agent's state after it."""
        with self._lock:
            self._view.take(event, time.monotonic())
            if isinstance(event, events.AgentStarted) and self._live is None and not self._ended.is_set():
                self._open()
            super().__call__(event)
            if time.monotonic() - self._drawn_at >= REFRESH_S:
                self._draw()

    def close(self) -> None:
        """Show the remaining lines, and release the terminal; closing twice is allowed."""
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
        view = self._view
        text = Text(no_wrap=True, overflow="ellipsis")
        for number, (word, message) in enumerate(panel_lines(view, time.monotonic())):
            text.append("\n" * (number > 0))
            text.append(f"{word:8}", style="yellow" if word == "warning" else "dim")
            text.append(clean(message))
        title = Text(clean(f"{view.agent} of run {view.run}"), style="bold")
        panel = Panel(text, title=title, title_align="left")
        self._guarded(lambda: live.update(panel, refresh=True))

    def _write(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)


def agent_listener(metric: str, stream: TextIO, verbosity: int, plain: bool) -> AgentListener:
    """Return a listener that shows an agent's events on a stream: with a panel on a terminal, unless only `plain` lines
    or only warnings are requested."""
    live = is_terminal(stream) and not plain and verbosity >= 0
    return (LiveAgentListener if live else AgentListener)(metric, stream, verbosity)
