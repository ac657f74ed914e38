"""Shows a run: a live table on a terminal, a plain line per round elsewhere.

Importing this is cheap: rich is imported when something is shown on a terminal, and never for plain output.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO

from dimat.events import AgentEvent, Event, RoundFinished, RoundSummary, RunFinished, RunStarted
from dimat.events.view import AgentView
from dimat.ui import tables, text, verdict
from dimat.ui.terminal.lines import RepeatFilter, lines_of
from dimat.ui.text import Table, clean

if TYPE_CHECKING:
    import rich.table
    from rich.console import Console
    from rich.live import Live

    from dimat.results import Comparison, Results

REFRESH_S = 0.1
ROWS_BESIDE_TABLE = 8
"""Lines of the terminal that the live table leaves free, so that it never scrolls."""


@dataclass
class _RunDisplay:
    """One run as the console shows it. `views`: the view of each agent; `through`: agents by the round that they have
    ended, until it is summarised."""

    name: str
    started: RunStarted | None = None
    finished: RunFinished | None = None
    summaries: list[RoundSummary] = field(default_factory=list[RoundSummary])
    rows: list[tuple[str, ...]] = field(default_factory=list[tuple[str, ...]])
    views: defaultdict[str, AgentView] = field(default_factory=lambda: defaultdict(AgentView))
    through: Counter[int] = field(default_factory=Counter[int])
    repeats: RepeatFilter = field(default_factory=RepeatFilter)

    @property
    def metric(self) -> str:
        return clean(self.started.metric) if self.started else "accuracy"

    @property
    def agents(self) -> tuple[str, ...]:
        return self.started.agents if self.started else ()

    @property
    def title(self) -> str:
        return clean(f"{self.name}: {self.started.method}" if self.started and self.name else self.name)

    @property
    def doing(self) -> str:
        """The current activity in words, in the round after the last summary."""
        if self.finished:
            return f"{clean(self.finished.reason)}, {text.seconds_text(self.finished.wall_s)}"
        number = max((summary.round for summary in self.summaries), default=0) + 1
        rounds = self.started.rounds if self.started else 0
        if rounds and number > rounds:
            return "finishing"
        total = len(self.agents) or len(self.views)
        merged = sum(view.merged is not None and view.merged.round >= number for view in self.views.values())
        trained = sum(view.trained is not None and view.trained.round >= number for view in self.views.values())
        verb, count = ("merged", merged) if merged else ("trained", trained)
        return f"round {number}: {verb} {count}/{total}"


class ConsoleListener:
    """Shows events to a person; a listener that any thread may call.

    On a terminal: a live table (the rounds of one run, or a row per active run), warnings above it, and a static table
    on `close`. Elsewhere: plain lines. `stream` is stderr if not given; `terminal` is determined from it. `verbosity`:
    -1 warnings only; 0 rounds, agents that come and go, partitions; 1 also late and refused peers, basis adoptions and
    notes of merges; 2 also every agent's own steps. Repeated messages are shown a few times and then counted, with a
    total at the end. A stream that breaks ends the display, never the run.
    """

    def __init__(self, stream: TextIO | None = None, terminal: bool | None = None, verbosity: int = 0) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._verbosity = verbosity
        self._terminal = is_terminal(self._stream) if terminal is None else terminal
        self._console: Console | None = open_screen(self._stream) if self._terminal else None
        self._live: Live | None = None
        self._drawn_at = 0.0
        self._lock = threading.RLock()
        self._runs: dict[str, _RunDisplay] = {}
        self._histograms: set[str] = set()
        self._broken = False
        self._closed = False

    def __enter__(self) -> ConsoleListener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, event: Event) -> None:
        """Show one event, if the verbosity asks for it."""
        with self._lock:
            if self._broken or self._closed:
                return
            try:
                self._show(event)
            except OSError:
                self._broken = True  # the reader went away (`| head`, a hung-up line): the training goes on

    def close(self) -> None:
        """End the live display and leave a static table in its place; closing twice is allowed."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            try:
                self._stop_live()
                for run in () if self._broken else self._runs.values():
                    self._sum_up(run)
                if self._console is not None and not self._broken and self._verbosity >= 0 and self._any_rounds():
                    table = self._table(final=True)
                    self._console.print(_rich(table), highlight=False)
            except OSError:
                self._broken = True  # as above: nobody is left to read it

    def _show(self, event: Event) -> None:
        run = self._runs.setdefault(event.run, _RunDisplay(event.run))
        if isinstance(event, RunStarted):
            run = self._runs[event.run] = _RunDisplay(event.run, started=event)
            self._introduce(event)
        elif isinstance(event, RoundSummary):
            agents = tables.some_of(run.through.pop(event.round, 0), len(run.agents))
            run.summaries.append(event)
            run.rows.append(tables.round_cells(event, agents))
            if self._console is None and self._verbosity >= 0:
                self._line(event.run, tables.round_line(event, run.metric, agents))
        elif isinstance(event, RunFinished):
            run.finished = event
            self._sum_up(run)
            if self._console is None and self._verbosity >= 0:
                done = text.count_text(event.rounds_done, "round")
                clock = tables.clock_text(event.time_s, event.rounds_done)
                virtual = f", {clock} of virtual time" if clock else ""
                self._line(event.run, f"{event.reason}: {done} in {text.seconds_text(event.wall_s)}{virtual}")
        else:
            self._tell(run, event)
        self._draw(soon=isinstance(event, RoundSummary | RunStarted | RunFinished))

    def _introduce(self, event: RunStarted) -> None:
        if self._verbosity < 0:
            return
        what = tables.run_line(
            event.method, event.seed, len(event.agents), len(event.edges), event.parameters, event.snapshot_bytes
        )
        if event.estimated_memory_mb:
            needs = [f"{text.mb_text(event.estimated_memory_mb)} MB of memory"]
            needs.append(f"{text.mb_text(event.estimated_disk_mb)} MB on disk")
            sent = "in all" if event.rounds else "a round"
            needs.append(f"{text.mb_text(event.estimated_mb_sent)} MB sent {sent}")
            what += f"; about {', '.join(needs)}, {text.count_text(event.workers, 'worker')}"
        histogram = "\n".join(f"  {line}" for line in text.as_text(tables.histogram_table(event.histogram)))
        known = not event.histogram or histogram in self._histograms
        self._histograms.add(histogram)
        # a comparison starts dozens of runs on the same data: on a terminal its live rows say enough
        if self._console is None or not known or self._verbosity > 0 or len(self._runs) == 1:
            self._line(event.run, what)
        if not known:
            self._line(event.run, "samples per class of each agent:")
            self._print(histogram)

    def _tell(self, run: _RunDisplay, event: Event) -> None:
        if isinstance(event, AgentEvent):
            run.views[event.agent].take(event)
        if isinstance(event, RoundFinished):
            run.through[event.round] += 1
        # of a comparison's runs, each one's faults are more than the lines above its live rows should hold
        many = self._console is not None and len(self._runs) > 1
        for line in lines_of(event, run.agents):
            heard = self._verbosity >= line.level + (many and line.level == 0)
            # who is told of rounds is told too how often what was not loud enough has happened
            if line.what and self._verbosity >= min(line.level, 0) and not run.repeats.first(line, heard):
                continue
            if heard:
                self._line(run.name, line.timed, style=_style(line.text))

    def _sum_up(self, run: _RunDisplay) -> None:
        for message in run.repeats.rest():
            self._line(run.name, message, style=_style(message))

    def _line(self, run: str, message: str, *, style: str = "") -> None:
        self._print(clean(f"[{run}] {message}" if run else message), style)

    def _print(self, message: str, style: str = "") -> None:
        if self._console is None:
            _write(self._stream, message)
        else:
            self._console.print(message, style=style, markup=False, highlight=False, emoji=False, soft_wrap=True)

    # ---- the live table

    def _any_rounds(self) -> bool:
        return any(run.summaries for run in self._runs.values())

    def _draw(self, soon: bool) -> None:
        """Update the live table: at once after important events, else at most every `REFRESH_S`.

        No thread refreshes it, so all drawing happens under this listener's lock and cannot deadlock.
        """
        if self._console is None or self._verbosity < 0:
            return
        runs = [run for run in self._runs.values() if run.started]
        if not any(run.finished is None for run in runs):
            self._stop_live()  # also shows the cursor again, should nobody call close
            return
        now = time.monotonic()
        if not soon and now - self._drawn_at < REFRESH_S:
            return
        self._drawn_at = now
        if self._live is None:
            self._live = _live(self._console, own_stderr=self._stream is sys.stderr)
            self._live.start()
        self._live.update(_rich(self._table(final=False)), refresh=True)

    def _stop_live(self) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()

    def _table(self, final: bool) -> Table:
        """Return one run's rounds, or a row per run (the active ones, while it is live) once there are several."""
        assert self._console is not None
        runs = [run for run in self._runs.values() if run.started or run.summaries]
        room = max(self._console.height - ROWS_BESIDE_TABLE, 1)
        if len(runs) == 1:
            run = runs[0]
            rows = run.rows if final else run.rows[-room:]
            table = Table(run.title, tables.ROUND_HEADERS, tuple(rows), left=frozenset(), note=run.doing)
        else:
            shown = runs if final else [run for run in runs if run.finished is None][:room]
            empty = ("",) * len(tables.ROUND_HEADERS)
            rows = [(clean(run.name), *(run.rows[-1] if run.rows else empty), run.doing) for run in shown]
            done = sum(1 for run in runs if run.finished)
            note = f"{text.count_text(len(runs), 'run')}, {done} done"
            headers = ("run", *tables.ROUND_HEADERS, "state")
            table = Table("", headers, tuple(rows), left=frozenset({0, len(headers) - 1}), note=note)
        return text.narrowed(text.trimmed(table, tables.ROUND_OPTIONAL), self._console.width, tables.ROUND_DROP)


def print_results(results: Results, stream: TextIO | None = None, terminal: bool | None = None) -> None:
    """Print the verdict on a run, and each agent's final results. `stream`: stdout if not given; `terminal` is
    determined from it."""
    _print_lines([verdict.of_run(results).line], stream, terminal)
    _print_tables([tables.final_table(results)], stream, terminal, tables.FINAL_DROP)


def print_comparison(comparison: Comparison, stream: TextIO | None = None, terminal: bool | None = None) -> None:
    """Print the verdict on each split, and a table of its methods side by side. `stream` and `terminal`: as for
    `print_results`."""
    _print_lines(verdict.headlines(comparison), stream, terminal)
    _print_tables(tables.comparison_tables(comparison), stream, terminal, tables.COMPARISON_DROP)


def is_terminal(stream: TextIO) -> bool:
    """Return whether `stream` is a terminal that can move its cursor and show all characters of a table."""
    unicode = (getattr(stream, "encoding", None) or "").lower().startswith("utf")
    return unicode and stream.isatty() and os.environ.get("TERM") != "dumb"


def _print_lines(lines: list[str], stream: TextIO | None, terminal: bool | None) -> None:
    out = stream or sys.stdout
    console = open_screen(out) if (is_terminal(out) if terminal is None else terminal) else None
    for line in lines:
        if console is None:
            _write(out, line)
        else:
            console.print(line, style="bold", markup=False, highlight=False, emoji=False)
    if lines:
        _write(out, "")


def _print_tables(shown: list[Table], stream: TextIO | None, terminal: bool | None, drop: tuple[str, ...]) -> None:
    out = stream or sys.stdout
    console = open_screen(out) if (is_terminal(out) if terminal is None else terminal) else None
    for number, table in enumerate(shown):
        if console is None:
            _write(out, "\n" * (number > 0) + "\n".join(text.as_text(table)))
        else:
            console.print(_rich(text.narrowed(table, console.width, drop)), highlight=False)


def _style(message: str) -> str:
    return "yellow" if message.startswith("warning: ") else ""


def _write(stream: TextIO, message: str) -> None:
    # a log in a narrow encoding shows a question mark, and one on a full disk nothing, rather than stop the run
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(message.encode(encoding, "replace").decode(encoding) + "\n")
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError:
        pass


def open_screen(stream: TextIO) -> Console:
    """Return an object that draws on a terminal; BrokenPipeError if the reader is gone."""
    from rich.console import Console

    class Screen(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would exit the process here; our listener ends the display alone

    return Screen(file=stream, force_terminal=True, markup=False, emoji=False)  # rich itself heeds NO_COLOR


def _live(console: Console, own_stderr: bool) -> Live:
    from rich.live import Live

    # stdout may carry --json for another program: it is never redirected through the console
    return Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=own_stderr)


def _rich(table: Table) -> rich.table.Table:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(
        box=box.SIMPLE_HEAD,
        title=Text(table.title, style="bold") if table.title else None,
        caption=Text(table.note, style="dim") if table.note else None,
        title_justify="left",
        caption_justify="left",
        header_style="bold",
        pad_edge=False,
    )
    for column, header in enumerate(table.headers):
        left = column in table.left
        drawn.add_column(Text(header), justify="left" if left else "right", overflow="fold")
    for number, cells in enumerate(table.rows):
        last = table.foot and number == len(table.rows) - 1
        texts = [Text(cell, style="bold green" if (number, i) in table.best else "") for i, cell in enumerate(cells)]
        if last and number:
            drawn.add_section()
        drawn.add_row(*texts, style="bold" if last else "")
    return drawn
