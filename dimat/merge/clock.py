"""Where a merge's time goes."""

from __future__ import annotations

from time import process_time


class Clock:
    """CPU seconds of this process (all its threads), by part of the work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = process_time()

    def lap(self, part: str) -> None:
        """Count the time since the last lap as spent on `part`."""
        now = process_time()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now
