"""Virtual time: a queue of events in order of time, and of arrival within one time."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

FEW = 64
"""Number of cancelled entries that are not worth removing from the queue."""


class Clock:
    """A queue of calls at virtual times. `now` is the time of the call that runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[Any, ...]] = []  # time, number, what to do, its arguments
        self._count = 0
        self._off: set[int] = set()

    def put(self, time_s: float, do: Callable[..., None], *arguments: Any) -> int:
        """Schedule a call, at the earliest now; return the number under which it can be called off."""
        self._count += 1
        heapq.heappush(self._queue, (max(time_s, self.now), self._count, do, *arguments))
        return self._count

    def call_off(self, number: int) -> None:
        """Cancel a call that was scheduled and has not run yet."""
        self._off.add(number)
        # cleared away once they are most of the queue: cheap for each, and the queue holds no more than twice its due
        if len(self._off) > FEW and 2 * len(self._off) > len(self._queue):
            self._queue = [entry for entry in self._queue if entry[1] not in self._off]
            heapq.heapify(self._queue)
            self._off.clear()

    def step(self) -> bool:
        """Run the next call; return False if there is none."""
        while self._queue:
            time_s, number, do, *arguments = heapq.heappop(self._queue)
            if number in self._off:
                self._off.remove(number)
                continue
            self.now = time_s
            do(*arguments)
            return True
        return False
