"""What a transport takes upon itself at most: sizes, counts, times; and what keeps to it: slots, a rate."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Limits:
    """All bounds of a transport; seconds and bytes.

    Serving: `streams` and `streams_per_peer`, transfers at a time, of which each holds at most 8 MiB in memory;
    `polls_per_peer`, calls of one peer that wait for news; `rate_mb_s`, what is sent a second in 10^6 bytes, None for
    all that goes; `connections`, open at a time.
    Fetching: `fetches` and `fetches_per_peer`, streams at a time, of which each holds at most three blocks in memory;
    `disk_bytes`, what received snapshots may take, of which those go first that nobody needs now;
    `disk_reserve_bytes`, that stay free on the disk.
    Times: `idle_s`, a stream without a byte is broken off; `connect_s`, an address answers or the next one is tried;
    `call_s`, any short call; `poll_s`, a call that waits for news; `quiet_s`, beyond that without an answer to it or a
    byte of a transfer, and the connection is taken for dead; `lost_after_s`, a peer out of reach is given up;
    `refused_retry_s`, between attempts at a peer that does not fit; `backoff_first_s` to `backoff_last_s`, between
    attempts at one that does not answer; after `breaker_failures` of these in a row none for `breaker_open_s`.
    """

    streams: int = 16
    streams_per_peer: int = 2
    polls_per_peer: int = 2
    rate_mb_s: float | None = None
    connections: int = 512
    fetches: int = 4
    fetches_per_peer: int = 2
    disk_bytes: int = 64 * 1024 * MIB
    disk_reserve_bytes: int = 256 * MIB
    idle_s: float = 15.0
    connect_s: float = 5.0
    call_s: float = 10.0
    poll_s: float = 10.0
    quiet_s: float = 5.0
    lost_after_s: float = 10.0
    refused_retry_s: float = 60.0
    backoff_first_s: float = 0.2
    backoff_last_s: float = 15.0
    breaker_failures: int = 10
    breaker_open_s: float = 30.0


class FullError(Exception):
    """No slot is free; the text says whose limit it is."""


class Slots:
    """Counts what goes on at a time: `most` in all, `most_each` for one name."""

    def __init__(self, what: str, most: int, most_each: int) -> None:
        self._what = what
        self._most = most
        self._most_each = most_each
        self._taken: Counter[str] = Counter()

    @contextmanager
    def take(self, name: str) -> Generator[None]:
        """Hold a slot; FullError where none is free."""
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
    """At most so many bytes a second, shared by all who ask: each waits until what was sent before it is paid for."""

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
