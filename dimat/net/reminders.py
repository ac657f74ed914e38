"""Troubles that last are told once, and then again at growing intervals."""

from __future__ import annotations

import time
from collections.abc import Callable


class Reminders:
    """Passes messages on to `notice`; one that has the same topic only after 1, 2, 4, … minutes, at most an hour."""

    def __init__(self, notice: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._notice = notice
        self._clock = clock
        self._topics: dict[str, tuple[float, float]] = {}

    def tell(self, topic: str, message: str) -> None:
        """Say a message, unless its topic was spoken of not long ago."""
        now = self._clock()
        due, interval = self._topics.get(topic, (now, 60.0))
        if now >= due:
            self._topics[topic] = (now + interval, min(2 * interval, 3600.0))
            self._notice(message)

    def over(self, topic: str, message: str = "") -> None:
        """The trouble is over: say so, where it was spoken of, and begin anew should it come back."""
        if self._topics.pop(topic, None) is not None and message:
            self._notice(message)
