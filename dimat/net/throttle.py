"""Slots and a byte rate: they keep transfers and calls within `dimat.net.limits`."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager


class FullError(Exception):
    """No slot is free; the message says which limit was reached."""


class Slots:
    """Counts activities under way and refuses more than `most` in all, or `most_each` of one peer."""

    def __init__(self, what: str, most: int, most_each: int) -> None:
        self._what = what
        self._most = most
        self._most_each = most_each
        self._taken: Counter[str] = Counter()

    @contextmanager
    def take(self, name: str) -> Generator[None]:
        """Hold a slot of the peer `name`; FullError where none is free."""
        if self._taken[name] >= self._most_each:
            raise FullError(f"{self._most_each} {self._what} of {name} are on their way, the most for one peer")
        if self._taken.total() >= self._most:
            raise FullError(f"{self._most} {self._what} are on their way, the most at a time")
        self._taken[name] += 1
        try:
            yield
        finally:
            self._taken[name] -= 1
            if not self._taken[name]:
                del self._taken[name]


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
        # a quarter of a second may go out at once, after a pause
        self._free_at = max(self._free_at, now - 0.25) + amount / self._bytes_s
        if self._free_at > now:
            await asyncio.sleep(self._free_at - now)
