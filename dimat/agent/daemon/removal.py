"""Ends an agent that is no longer on a new network map."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

REASON = "removed from the network map"


class Removal:
    """Looks for one agent on each new map.

    `wait_s`: how long the agent may be missing from the map; `go_on`: it then continues to train alone; `notice`
    receives messages for a person; `stop(reason)` makes the agent leave.
    """

    def __init__(
        self, agent: str, wait_s: float, go_on: bool, notice: Callable[[str], None], stop: Callable[[str], None]
    ) -> None:
        self.over = False
        """Whether the agent was told to leave for that."""
        self._agent = agent
        self._wait_s = wait_s
        self._go_on = go_on
        self._notice = notice
        self._stop = stop
        self._timer: asyncio.TimerHandle | None = None
        self._gone = False

    def look(self, members: Collection[str]) -> None:
        """Take in the members of a new map."""
        gone = self._agent not in members
        if gone == self._gone:
            return
        self._gone = gone
        if not gone:
            self.cancel()
            self._notice(f"{self._agent} is on the network map again")
            return
        alone = f"{self._agent} is no longer on the network map: it exchanges weights with nobody"
        if self._go_on:
            self._notice(f"{alone}, and continues to train alone (agent.go_on_alone)")
            return
        self._notice(
            f"{alone}, and stops in {self._wait_s:g} s unless the map has it again; with agent.go_on_alone = true it "
            "trains alone"
        )
        self._timer = asyncio.get_running_loop().call_later(self._wait_s, self._leave)

    def cancel(self) -> None:
        """Cancel the agent's leaving."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _leave(self) -> None:
        self.over = True
        self._stop(REASON)
