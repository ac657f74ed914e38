"""Retry back-off with jitter, a circuit breaker, and messages at a limited rate."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from dimat.net.limits import MOST_NOTICES, MOST_RETURNS, REMIND_FIRST_S, REMIND_LAST_S


class Backoff:
    """Waits that double from `first_s` to `last_s`, each shortened at random by up to half.

    The jitter keeps agents that lost a peer at the same time from all retrying at the same time.
    """

    def __init__(self, first_s: float, last_s: float, generator: Random) -> None:
        self._first_s = first_s
        self._last_s = last_s
        self._generator = generator
        self._attempts = 0

    def next(self) -> float:
        """Return the wait before the next attempt, in seconds."""
        wait_s = min(self._first_s * 2.0 ** min(self._attempts, 60), self._last_s)
        self._attempts += 1
        return wait_s * self._generator.uniform(0.5, 1.0)

    def reset(self) -> None:
        """Start again from the shortest wait, after a success."""
        self._attempts = 0


class Breaker:
    """A circuit breaker: after `failures` in a row no attempt for `open_s`, then one at a time until one succeeds."""

    def __init__(self, failures: int, open_s: float) -> None:
        self._most = failures
        self._open_s = open_s
        self._failures = 0

    @property
    def is_open(self) -> bool:
        """Whether the last attempts have all failed."""
        return self._failures >= self._most

    def failed(self) -> None:
        """Count a failure."""
        self._failures += 1

    def succeeded(self) -> None:
        """Close it."""
        self._failures = 0

    def wait_s(self, backoff_s: float) -> float:
        """Return the seconds before the next attempt, given that the back-off asks for `backoff_s`."""
        return max(backoff_s, self._open_s) if self.is_open else backoff_s


@dataclass(slots=True)
class _Topic:
    """A topic of `Reminders`. `times`: how often it began; `told`: whether it was reported since it began last."""

    due_s: float
    interval_s: float
    times: int = 0
    told: bool = False


class Reminders:
    """Passes messages to `notice`; repeats a topic only after 1, 2, 4, … minutes, at most an hour.

    Trouble that is over and comes back is reported at once, `MOST_RETURNS` times: what comes and goes all the time,
    as a peer may want, is then reported as rarely as what lasts. A topic that was not told of for an hour begins anew.
    """

    def __init__(self, notice: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._notice = notice
        self._clock = clock
        self._topics: dict[str, _Topic] = {}

    def tell(self, topic: str, message: str) -> None:
        """Pass a message on, unless one of its topic was passed a short time ago."""
        now = self._clock()
        known = self._topics.get(topic)
        if known is None or (not known.told and now > known.due_s + REMIND_LAST_S):
            known = self._topics[topic] = _Topic(now, REMIND_FIRST_S)
        if not known.told and known.times <= MOST_RETURNS:
            known.due_s, known.interval_s = now, REMIND_FIRST_S
        if now >= known.due_s:
            known.times += not known.told
            known.told = True
            known.due_s, known.interval_s = now + known.interval_s, min(2 * known.interval_s, REMIND_LAST_S)
            self._notice(message)

    def over(self, topic: str, message: str = "") -> None:
        """End a topic: pass `message` if the trouble was reported."""
        known = self._topics.get(topic)
        if known is not None and known.told:
            known.told = False
            if message:
                self._notice(message)


class FaultNotices:
    """Passes messages about a peer's faults to `notice`, each once, and at most `MOST_NOTICES` different ones. `count`:
    all faults, reported or not."""

    def __init__(self, peer: str, notice: Callable[[str], None]) -> None:
        self._peer = peer
        self._notice = notice
        self._told: set[str] = set()
        self.count = 0

    def tell(self, message: str) -> None:
        """Count a fault, and pass its message on unless that message, or enough others, were passed before."""
        self.count += 1
        if message in self._told or len(self._told) > MOST_NOTICES:
            return
        self._told.add(message)
        self._notice(message)
        if len(self._told) == MOST_NOTICES:
            self._told.add("")
            self._notice(f"further faults of {self._peer} are counted in the status, and not reported one by one")
