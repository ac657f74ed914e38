"""Passes an agent's events to its listeners; a log that cannot be written stops nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dimat import events
from dimat.errors import DataError


class EventTeller:
    """Passes every event to `listeners`; more may be added at any time.

    `notice` is called once when a listener fails, and once when all work again.
    """

    def __init__(self, listeners: Sequence[events.Listener], notice: Callable[[str], None]) -> None:
        self._listeners = listeners
        self._notice = notice
        self._fault = ""

    def tell(self, event: events.Event) -> None:
        """Pass an event to all listeners, in their order."""
        fault = ""
        for listener in self._listeners:
            try:
                listener(event)
            except DataError as error:  # a log on a full disk: training goes on, and what waits is written later
                fault = str(error)
        if fault != self._fault:
            self._fault = fault
            self._notice(
                f"{fault}; the agent continues, and logs again once it can" if fault else "events are logged again"
            )
