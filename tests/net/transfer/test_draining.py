"""Transfers that are under way when an agent stops: they end, as long as it waits for them. The reference is what the
publisher has on its disk."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dimat.errors import NetworkError
from dimat.net.manifest import unseal
from dimat.net.peers import link
from tests.net.agents import QUICK, Agent, join, make, started, weights

pytestmark = [pytest.mark.anyio, pytest.mark.live]

SLOW = replace(QUICK, rate_mb_s=0.25)  # 4 s a snapshot


async def begun(a: Agent) -> None:
    """Wait until an agent has sent its reader something."""
    async with asyncio.timeout(60):
        while not a.transport.sent_bytes.get("b"):  # noqa: ASYNC110  (no event tells)
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("reason", ["time is up", ""], ids=["told", "untold"])
async def test_what_is_under_way_comes_whole(tmp_path: Path, reason: str) -> None:
    """The reader's calls for news end with the publisher's, or fail; the transfer goes on beside them to its end."""
    a, b = make(tmp_path / "a", "a", limits=SLOW), make(tmp_path / "b", "b")
    async with started(b):
        await a.transport.start(a.ears)
        join(a, b)
        payload = a.publish(1, weights(1)).payload
        await b.ears.offer("a", 1)
        fetching = asyncio.create_task(b.transport.fetch("a", 1, payload.root))
        await begun(a)
        if reason:
            a.transport.leave(reason)
        await a.transport.close(60.0)
        async with asyncio.timeout(30):
            fetched = await fetching
        assert fetched.bytes == payload.bytes
        assert fetched.path.read_bytes() == a.store.path(payload.root).read_bytes()


async def test_a_fetch_whose_turn_comes_when_its_connection_is_gone(tmp_path: Path) -> None:
    """b fetches one snapshot at a time. While that of a comes slowly, c, whose turn is next, is started again: b
    fetches from it by a new connection."""
    a, c = make(tmp_path / "a", "a", limits=SLOW), make(tmp_path / "c", "c")
    b = make(tmp_path / "b", "b", limits=replace(QUICK, fetches=1))
    async with started(b, a):
        await c.transport.start(c.ears)
        join(a, b, c)
        one, other = a.publish(1, weights(1)).payload, c.publish(1, weights(2)).payload
        await b.ears.offer("a", 1)
        await b.ears.offer("c", 1)
        first = asyncio.create_task(b.transport.fetch("a", 1, one.root))
        await begun(a)
        second = asyncio.create_task(b.transport.fetch("c", 1, other.root))
        await asyncio.sleep(0.2)  # until it waits for its turn
        port = c.transport.port
        await c.transport.close(0)
        assert not first.done()
        c = make(tmp_path / "c", "c", listen=f"127.0.0.1:{port}")
        async with started(c), asyncio.timeout(60):
            join(a, b, c)
            c.publish(1, weights(2))
            assert (await first).bytes == one.bytes
            assert (await second).bytes == other.bytes


async def test_a_fetch_from_one_that_has_left_is_given_up(tmp_path: Path) -> None:
    """The publisher says that it leaves, and ends in the middle of a transfer: the reader gives up at once, long before
    the peer would count as lost. Once it is there again, what came before is not sent anew."""
    a = make(tmp_path / "a", "a", limits=SLOW)
    b = make(tmp_path / "b", "b", limits=replace(QUICK, lost_after_s=3600.0))
    async with started(b):
        await a.transport.start(a.ears)
        join(a, b)
        payload = a.publish(1, weights(1)).payload
        await b.ears.offer("a", 1)
        fetching = asyncio.create_task(b.transport.fetch("a", 1, payload.root))
        await begun(a)
        await asyncio.sleep(1.0)  # until some blocks have come
        port = a.transport.port
        a.transport.leave("time is up")
        await b.ears.until(lambda: b.ears.losses)
        assert not fetching.done(), "it sends on"
        await a.transport.close(0)
        async with asyncio.timeout(60):
            with pytest.raises(NetworkError, match=r"^a is gone: it has left \('time is up'\)"):
                await fetching
        with pytest.raises(NetworkError, match=r"^a is gone"):
            await b.transport.fetch("a", 1, payload.root)
        again = make(tmp_path / "a", "a", listen=f"127.0.0.1:{port}")
        async with started(again), asyncio.timeout(60):
            join(again, b)
            heard = len(b.ears.offers)
            again.publish(1, weights(1))
            await b.ears.until(lambda: len(b.ears.offers) > heard)
            assert 0 < (await b.transport.fetch("a", 1, payload.root)).bytes < payload.bytes


async def test_a_connection_that_is_given_up_while_news_is_read_stays_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transfer fails, and its connection is dropped, while a thread still reads the manifests that came on it: what
    the peer has said of leaving stands, and the link connects anew."""
    a, b = make(tmp_path / "a", "a"), make(tmp_path / "b", "b")
    async with started(a, b), asyncio.timeout(60):
        join(a, b)
        a.publish(1, weights(1))
        await b.ears.offer("a", 1)
        peer_link = b.transport._links["a"]
        connection = peer_link._connection
        assert connection is not None
        reading, go_on = threading.Event(), threading.Event()

        def slow(*args: Any, **kwargs: Any) -> Any:
            reading.set()
            assert go_on.wait(30)
            return unseal(*args, **kwargs)

        monkeypatch.setattr(link, "unseal", slow)
        a.publish(2, weights(2))
        await asyncio.to_thread(reading.wait, 30)
        peer_link._presence.parting = "time is up"
        peer_link.drop(connection, "a transfer failed")
        reached: list[object] = []
        monkeypatch.setattr(peer_link, "_in_reach", lambda: reached.append(peer_link._connection))
        go_on.set()
        await b.ears.offer("a", 2)
        assert reached
        assert connection not in reached
