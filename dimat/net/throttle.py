"""Slots and a byte rate: they keep transfers and calls within `dimat.net.limits`."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager

from dimat.net.limits import RATE_BURST_S


class FullError(Exception):
    """No slot is free; the message says which limit was reached."""


class Slots:
    """Counts running activities and refuses more than `most` in all, or `most_each` of one peer.

    Fair by peer: one that has none running is admitted if another has more than one.
    """

    def __init__(self, what: str, most: int, most_each: int) -> None:
        self._what = what
        self._most = most
        self._most_each = most_each
        self._taken: Counter[str] = Counter()

    @contextmanager
    def take(self, name: str) -> Generator[None]:
        """Hold a slot of the peer `name`; FullError if none is free."""
        if self._taken[name] >= self._most_each:
            raise FullError(f"{self._most_each} {self._what} of {name} are on their way, the most for one peer")
        unfair = max(self._taken.values(), default=0) > 1
        if self._taken.total() >= self._most and (self._taken[name] or not unfair):
            raise FullError(f"{self._most} {self._what} are on their way, the most at a time")
        self._taken[name] += 1
        try:
            yield
        finally:
            self._taken[name] -= 1
            if not self._taken[name]:
                del self._taken[name]


class Turn:
    """A place that is held for the peer `name`; `moved` records progress."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.moved_s = asyncio.get_running_loop().time()

    def moved(self) -> None:
        """Note progress."""
        self.moved_s = asyncio.get_running_loop().time()


class Turns:
    """`most` places for activities, for which peers wait in turn.

    Fair by peer: of those that wait, the one with the fewest places is first, and a place on which nothing has moved
    for `slow_s` goes to a peer that has none; the slow activity continues beside the others.
    """

    def __init__(self, most: int, slow_s: float) -> None:
        self._most = most
        self._slow_s = slow_s
        self._held: list[Turn] = []
        self._waiting: list[tuple[str, asyncio.Future[Turn]]] = []
        self._timer: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def take(self, name: str) -> AsyncGenerator[Turn]:
        """Wait for a place and hold it."""
        future: asyncio.Future[Turn] = asyncio.get_running_loop().create_future()
        waiting = (name, future)
        self._waiting.append(waiting)
        self._hand_out()
        try:
            turn = await future
            yield turn
        finally:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            if future.done() and not future.cancelled() and future.result() in self._held:
                self._held.remove(future.result())
            self._hand_out()

    def _hand_out(self) -> None:
        """Give free places, and those of slow activities, to the peers that wait."""
        now = asyncio.get_running_loop().time()
        self._waiting = [(name, future) for name, future in self._waiting if not future.done()]
        while self._waiting:
            held = Counter(turn.name for turn in self._held)
            name, future = waiting = min(self._waiting, key=lambda one: held[one[0]])
            if len(self._held) >= self._most:
                slow = [turn for turn in self._held if now - turn.moved_s >= self._slow_s and turn.name != name]
                if held[name] or not slow:
                    break
                self._held.remove(min(slow, key=lambda turn: turn.moved_s))
            self._waiting.remove(waiting)
            turn = Turn(name)
            self._held.append(turn)
            future.set_result(turn)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting:
            self._timer = asyncio.get_running_loop().call_later(self._slow_s / 4, self._hand_out)


class Rate:
    """A rate of at most `mb_s` 10^6 bytes a second, shared by all transfers; None for no bound."""

    def __init__(self, mb_s: float | None) -> None:
        self._bytes_s = None if mb_s is None else mb_s * 1e6
        self._free_at = 0.0

    async def pay(self, amount: int) -> None:
        """Wait until `amount` bytes may be sent."""
        if self._bytes_s is None:
            return
        now = asyncio.get_running_loop().time()
        self._free_at = max(self._free_at, now - RATE_BURST_S) + amount / self._bytes_s
        if self._free_at > now:
            await asyncio.sleep(self._free_at - now)
