"""Measures how late peers' snapshots are, and says which deadline would suffice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

ROUNDS = 8
"""Rounds for which the end of own training is remembered: a snapshot that is later points to an outage."""


class Lateness:
    """Watches one agent's peers.

    `deadline_s`: `schedule.round_deadline_s`; `planned(peer, round)`: whether a round waits for a peer; `connected`:
    gives the peers in reach; `notice` is called once for each peer that is late. A peer that was out of reach meanwhile
    is late for another reason, and is not reported.
    """

    def __init__(
        self,
        deadline_s: float,
        planned: Callable[[str, int], bool],
        connected: Callable[[], Iterable[str]],
        notice: Callable[[str], None],
    ) -> None:
        self._deadline_s = deadline_s
        self._planned = planned
        self._connected = connected
        self._notice = notice
        self._trained: dict[int, tuple[float, float, set[str]]] = {}
        """By round: when own training ended, how long it took, and the peers in reach ever since."""
        self._told: set[str] = set()

    def trained(self, number: int, took_s: float, now: float) -> None:
        """Note the end of own training of a round."""
        self._trained[number] = (now, took_s, set(self._connected()))
        for old in [known for known in self._trained if known <= number - ROUNDS]:
            del self._trained[old]

    def lost(self, peer: str) -> None:
        """Note that a peer is out of reach."""
        for _, _, reached in self._trained.values():
            reached.discard(peer)

    def offered(self, peer: str, number: int, now: float) -> None:
        """Note that a peer offers its snapshot of a round."""
        ended, took_s, reached = self._trained.get(number, (now, 0.0, set[str]()))
        late_s = now - ended
        if late_s <= self._deadline_s or peer not in reached or peer in self._told or not self._planned(peer, number):
            return
        self._told.add(peer)
        self._notice(
            f"{peer}'s snapshot of round {number} came {late_s:.0f} s after this agent's training, which took "
            f"{took_s:.0f} s; schedule.round_deadline_s is {self._deadline_s:g}, so {peer} is left out of its merges: "
            f"set it to {_round_up(1.5 * late_s)} or more for all agents, let {peer} train less, or use "
            'schedule.mode = "async"'
        )


def _round_up(seconds: float) -> int:
    """Return a number of seconds that people would choose, at least as long: 15, 45, 650."""
    step = 5 * 10 ** max(0, math.floor(math.log10(max(seconds, 1.0))) - 1)
    return math.ceil(seconds / step) * step
