"""Tells an agent's listeners its events; a log that cannot be written holds nothing up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dimat import events
from dimat.errors import DataError


class EventTeller:
    """Tells every event to `listeners`, to which more may be added meanwhile.

    `notice` is told once that one of them fails, and once that all work again.
    """

    def __init__(self, listeners: Sequence[events.Listener], notice: Callable[[str], None]) -> None:
        self._listeners = listeners
        self._notice = notice
        self._fault = ""

    def tell(self, event: events.Event) -> None:
        """Tell an event to all listeners, in their order."""
        fault = ""
        for listener in self._listeners:
            try:
                listener(event)
            except DataError as error:  # a log on a full disk: training goes on, and what waits is written later
                fault = str(error)
        if fault != self._fault:
            self._fault = fault
            self._notice(
                f"{fault}; the agent goes on, and so does the log once it can" if fault else "events are logged again"
            )
