"""Slots, rate, back-off, breaker and the length of messages: what they promise, by definition."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from random import Random

import pytest

from dimat.net.backoff import Backoff, Breaker
from dimat.net.limits import CHUNK_BYTES, MIN_CHUNK_BYTES
from dimat.net.throttle import FullError, Rate, Slots, Turns
from dimat.net.transfer import upload
from dimat.weights.snapshot import Payload

pytestmark = pytest.mark.anyio


def test_slots_are_bounded_in_all_and_for_each() -> None:
    slots = Slots("transfers", 3, 2)
    with slots.take("a"), slots.take("a"), pytest.raises(FullError, match="2 transfers of a"), slots.take("a"):
        pass
    with slots.take("a"), slots.take("b"), slots.take("c"):
        with pytest.raises(FullError, match="3 transfers are"), slots.take("d"):
            pass
    with slots.take("d"):  # all were given back
        pass


async def test_a_rate_is_kept_over_all_who_share_it() -> None:
    rate = Rate(2.0)
    loop = asyncio.get_running_loop()
    began = loop.time()

    async def send() -> None:
        for _ in range(10):
            await rate.pay(100_000)

    await asyncio.gather(send(), send())
    assert loop.time() - began >= 2e6 / 2e6 - 0.25 - 0.05  # all but the quarter of a second that may go out at once


async def test_no_rate_waits_for_nothing() -> None:
    for _ in range(1000):
        await Rate(None).pay(2**40)


def test_waits_double_with_jitter_up_to_the_last() -> None:
    backoff = Backoff(0.2, 15.0, Random(0))
    waits = [backoff.next() for _ in range(100)]
    for number, wait_s in enumerate(waits):
        most_s = min(0.2 * 2**number, 15.0)
        assert most_s / 2 <= wait_s <= most_s
    assert len(set(waits)) > 90
    backoff.reset()
    assert backoff.next() <= 0.2


def test_a_breaker_opens_after_failures_in_a_row_and_closes_with_one_success() -> None:
    breaker = Breaker(3, 30.0)
    for _ in range(2):
        breaker.failed()
    assert breaker.wait_s(1.0) == 1.0
    breaker.failed()
    assert breaker.is_open
    assert breaker.wait_s(1.0) == 30.0
    assert breaker.wait_s(40.0) == 40.0
    breaker.succeeded()
    assert breaker.wait_s(1.0) == 1.0


@pytest.mark.parametrize(("block", "size"), [(2**16, 2**20 + 88), (4 * 2**20, 9 * 2**20 + 1), (3 * 2**20 + 5, 2**24)])
def test_blocks_are_cut_into_chunks_none_of_which_crosses_a_block(block: int, size: int) -> None:
    count = -(-size // block)
    payload = Payload("", size, ("",) * count, block)
    for first, blocks in ((0, count), (1, 1), (count - 1, 1)):
        spans = [span for group in upload.spans(payload, first, blocks) for span in group]
        place = first * block
        for offset, length in spans:
            assert offset == place
            assert length == min(CHUNK_BYTES, min((offset // block + 1) * block, size) - offset)
            place += length
        assert place == min((first + blocks) * block, size)
    for group in upload.spans(payload, 0, count):
        assert sum(length for _, length in group) < upload.READ_AHEAD_BYTES + CHUNK_BYTES


def test_messages_grow_while_they_go_fast_and_shrink_where_they_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(upload, "monotonic", lambda: now)
    pace = upload.ChunkSizer()
    chunk = bytes(range(256)) * (CHUNK_BYTES // 256)
    lengths: list[int] = []
    for took_s in (0.1, 0.1, 0.1, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0):
        parts: list[bytes] = []
        for part in pace.cut(chunk):
            parts.append(part)
            now += took_s
        assert b"".join(parts) == chunk
        assert all(len(part) >= MIN_CHUNK_BYTES for part in parts)
        lengths.append(max(map(len, parts)))
    assert lengths[2] == CHUNK_BYTES
    assert lengths[-1] == MIN_CHUNK_BYTES


def test_a_peer_that_has_no_slot_is_let_in_where_another_has_two() -> None:
    """Four readers that hold four slots each do not keep a fifth one out."""
    slots = Slots("transfers", 16, 4)
    with ExitStack() as held:
        for _ in range(4):
            for name in "abcd":
                held.enter_context(slots.take(name))
        with slots.take("e"), pytest.raises(FullError, match="16 transfers are"), slots.take("e"):
            pass


async def test_turns_go_to_the_peer_that_has_none() -> None:
    """Four that do not move hold all places: a fifth waits `slow_s` for one, and not for ever; those that move are not
    driven out."""
    turns = Turns(4, 0.2)
    release = asyncio.Event()
    begun: list[str] = []

    async def hold(name: str, moves: bool = False) -> None:
        async with turns.take(name) as turn:
            begun.append(name)
            while not release.is_set():
                if moves:
                    turn.moved()
                await asyncio.sleep(0.01)

    async with asyncio.TaskGroup() as group:
        for name in ("slow", "slow", "fast", "fast"):
            group.create_task(hold(name, name == "fast"))
        await asyncio.sleep(0.05)
        group.create_task(hold("slow"))
        for name in ("new", "newer", "newest"):
            group.create_task(hold(name))
        await asyncio.sleep(0.1)
        assert len(begun) == 4
        async with asyncio.timeout(20):
            while len(begun) < 6:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert begun[4:6] == ["new", "newer"]
        release.set()
    assert sorted(begun[6:]) == ["newest", "slow"]
    async with turns.take("after"):
        assert len(turns._held) == 1


async def test_a_place_that_is_waited_for_no_more_is_not_given_away() -> None:
    turns = Turns(1, 60.0)

    async def hold() -> None:
        async with turns.take("b"):
            raise AssertionError

    async with turns.take("a"):
        waiting = asyncio.create_task(hold())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
    async with asyncio.timeout(5), turns.take("c"):
        pass
    assert not turns._held
