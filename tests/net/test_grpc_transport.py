"""Two and three real transports on loopback; the reference is what the publisher has on its disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.net.agents import join, make, started, weights

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_a_snapshot_that_is_offered_is_fetched_whole(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", "a"), make(tmp_path / "b", "b")
    async with started(a, b):
        join(a, b)
        published = a.publish(1, weights(1))
        heard = await b.ears.offer("a", 1)
        assert heard == published
        fetched = await b.transport.fetch("a", 1, published.payload.root)
        assert fetched.path.read_bytes() == a.store.path(published.payload.root).read_bytes()
        assert fetched.bytes == published.payload.bytes
        assert b.transport.received_bytes == {"a": published.payload.bytes}
        assert a.transport.sent_bytes == {"b": published.payload.bytes}


async def test_mtls(tmp_path: Path, keys) -> None:
    a, b = make(tmp_path / "a", "a", identity=keys("a")), make(tmp_path / "b", "b", identity=keys("b"))
    async with started(a, b):
        join(a, b)
        published = a.publish(1, weights(1))
        await b.ears.offer("a", 1)
        fetched = await b.transport.fetch("a", 1, published.payload.root)
        assert fetched.path.read_bytes() == a.store.path(published.payload.root).read_bytes()
        assert fetched.signed[1]
