"""When a message arrives, if it does: one random stream per link, so that a fault of one link shifts no other."""

from __future__ import annotations

import random

from tests.faults.schedule import Schedule


class Links:
    """All links of a network, by sender and reader."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._streams: dict[tuple[int, int], random.Random] = {}
        self._last: dict[tuple[int, int], float] = {}

    def arrivals(self, sender: int, reader: int, now: float, *, last: bool = False) -> list[float]:
        """Return when a message arrives: once, twice, or never. `last`: after all that were sent before, for sure."""
        s, link = self._schedule, (sender, reader)
        stream = self._streams.get(link)
        if stream is None:
            stream = self._streams[link] = random.Random(s.seed * 7919 + sender * 127 + reader)
        noisy, times = now < s.quiet_s, []
        for again in (False, True):
            lot, at = stream.random(), now + stream.uniform(*s.message_s)
            if s.in_order or last:
                at = max(at, self._last.get(link, 0.0))
            lost = noisy and not last and lot < s.drop
            if (noisy and lot < s.duplicate) if again else not lost:
                self._last[link] = max(at, self._last.get(link, 0.0))
                times.append(at)
        return times
