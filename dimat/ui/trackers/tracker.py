"""The common part of experiment trackers: a row of numbers per agent and round.

A thread sends the rows, so that a tracker that is slow, or whose network or disk is gone, delays nothing.
"""

from __future__ import annotations

import importlib.util
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from dimat import events
from dimat.errors import ConfigError

QUEUED = 10_000
"""Rows that may wait for a tracker before it counts as stuck."""
CLOSE_S = 30.0
"""Seconds that a tracker has at the end to send the remaining rows."""
EACH_AT_MOST = 32
"""Most agents of a simulated run whose numbers are sent separately, if each needs a run or columns of its own."""


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """A run begins, or continues after `round`. `agents`: one for a real agent, all for a simulated run; `settings`:
    plain values that describe it; `time_s`: Unix seconds."""

    run: str
    agents: tuple[str, ...]
    round: int
    simulated: bool
    time_s: float
    settings: Mapping[str, str | int | float | bool] = field(default_factory=dict[str, str | int | float | bool])


@dataclass(frozen=True, slots=True)
class MetricRow:
    """Numbers of an agent's round, or ("" for `agent`) over all agents of a simulated one; `time_s`: Unix seconds."""

    agent: str
    round: int
    time_s: float
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class RunEnded:
    """A real agent has left, or a simulated run is over. `reason`: as the event says."""

    reason: str


TrackerItem = TrackedRun | MetricRow | RunEnded


class Backend(Protocol):
    """One tracker. It is used from one thread, after `start`; any error that it raises switches it off."""

    def start(self, started: TrackedRun) -> None:
        """Begin a run."""
        ...

    def log(self, row: MetricRow) -> None:
        """Log a row of a run that has begun."""
        ...

    def end(self, reason: str) -> None:
        """End the run; "" if it is not known how it ended."""
        ...


class Tracker:
    """Passes a run to a backend; a listener. `name`: the tracker's name for people; `backend`: the tracker's; `warn`:
    called once, from any thread, if the tracker fails and is switched off."""

    def __init__(self, name: str, backend: Backend, warn: Callable[[str], None]) -> None:
        self._name = name
        self._backend = backend
        self._warn = warn
        self._reader = RowReader()
        self._queue: queue.Queue[TrackerItem | None] = queue.Queue(QUEUED)
        self._lock = threading.Lock()
        self._off = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def __call__(self, event: events.Event) -> None:
        """Process one event; never waits and never raises."""
        with self._lock:
            if self._off:
                return
            for item in self._reader.read(event):
                try:
                    self._queue.put_nowait(item)
                except queue.Full:
                    self._fail(f"{QUEUED:,} rows wait for it")
                    return

    def close(self) -> None:
        """Send the remaining rows, and end the run; gives up after `CLOSE_S`. Closing twice is allowed."""
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            self._fail(f"{QUEUED:,} rows wait for it")
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            self._fail(f"it has not accepted all rows within {CLOSE_S:.0f} s")

    def _work(self) -> None:
        reason, begun = "", False
        try:
            while not self._off:
                item = self._queue.get()
                match item:
                    case None:
                        break
                    case TrackedRun():
                        if begun:
                            self._backend.end(reason)
                        self._backend.start(item)
                        reason, begun = "", True
                    case MetricRow():
                        if begun:
                            self._backend.log(item)
                    case RunEnded():
                        reason = item.reason
            if begun:
                self._backend.end(reason)
        # whatever a tracker's library raises, and not only Exception: the training must not care
        except BaseException as error:
            self._fail(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def _fail(self, reason: str) -> None:
        first, self._off = not self._off, True
        if first:
            self._warn(f"{self._name} failed and is switched off; the training continues: {reason}")


class RowReader:
    """Makes rows of events. The names of their values are the same for all trackers: loss, samples, <metric>/before,
    <metric>/after, accepted_share, peers/heard, peers/expected, bytes/sent, bytes/received, seconds/train,
    seconds/wait and seconds/merge; over all agents of a simulated run loss, <metric>/before_mean, <metric>/after_mean,
    _min and _max, consensus_distance, bases and bytes/sent_total."""

    def __init__(self) -> None:
        self._metric = "accuracy"
        self._began_s = 0.0

    def read(self, event: events.Event) -> Iterator[TrackerItem]:
        """Yield the rows that an event adds."""
        match event:
            case events.AgentStarted():
                self._metric = event.metric
                settings = {"agent": event.agent, "samples": event.samples, "parameters": event.parameters}
                yield TrackedRun(
                    event.run,
                    (event.agent,),
                    event.round,
                    False,
                    event.time_s,
                    settings | {"peers": ", ".join(event.peers), "rounds": event.rounds, "version": event.version},
                )
            case events.RunStarted():
                self._metric = event.metric
                self._began_s = time.time()
                settings = {"method": event.method, "seed": event.seed, "agents": len(event.agents)}
                yield TrackedRun(
                    event.run,
                    event.agents,
                    0,
                    True,
                    self._began_s,
                    settings | {"rounds": event.rounds, "parameters": event.parameters},
                )
            case events.RoundFinished():
                yield MetricRow(event.agent, event.round, self._began_s + event.time_s, _finite(_values(event)))
            case events.RoundSummary():
                yield MetricRow("", event.round, self._began_s + event.time_s, _finite(self._summary(event)))
            case events.AgentLeft() if not self._began_s:
                yield RunEnded(event.reason)
            case events.RunFinished():
                yield RunEnded(event.reason)
            case _:
                return

    def _summary(self, event: events.RoundSummary) -> dict[str, float | None]:
        metric = self._metric
        return {
            "loss": event.loss,
            f"{metric}/before_mean": event.before_mean,
            f"{metric}/after_mean": event.after_mean,
            f"{metric}/after_min": event.after_min,
            f"{metric}/after_max": event.after_max,
            "consensus_distance": event.consensus_distance,
            "bases": event.bases,
            "bytes/sent_total": 1e6 * event.mb_sent,
        }


def _values(event: events.RoundFinished) -> dict[str, float | None]:
    trained = {} if event.loss is None else {"loss": event.loss, "samples": event.samples}
    merged = {"accepted_share": event.accepted} if event.contributions else {}
    return {
        **trained,
        **{f"{metric}/before": value for metric, value in event.before.items()},
        **{f"{metric}/after": value for metric, value in event.after.items()},
        **merged,
        **{f"seconds/{phase}": seconds for phase, seconds in event.seconds.items()},
        "bytes/sent": event.bytes_sent,
        "bytes/received": event.bytes_received,
        "peers/heard": event.heard,
        "peers/expected": event.expected,
    }


def need(module: str, extra: str) -> None:
    """Raise ConfigError, with the command to run, if a tracker's package is missing."""
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that a module is in
        found = False
    if not found:
        raise ConfigError(f"monitor.{extra} needs the package {module.partition('.')[0]}: pip install 'dimat[{extra}]'")


def _finite(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}
