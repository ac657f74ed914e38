"""A link that carries 80 kB/s, with large buffers on its way: nothing is broken off, and nothing sent twice. Pings that
wait behind the data for longer than gRPC waits for their answer would break it before a block is through."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from tests.net.agents import make, started, update_neighbours, weights
from tests.net.keys import Authority

pytestmark = [pytest.mark.anyio, pytest.mark.live]
BYTES_S = 80e3


@asynccontextmanager
async def slow(port: int) -> AsyncGenerator[int]:
    """Carry bytes to a port at `BYTES_S` in each direction; gives the port to dial instead."""
    tasks: set[asyncio.Task[None]] = set()

    async def carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        free_at = loop.time()
        try:
            while data := await source.read(4096):
                free_at = max(free_at, loop.time()) + len(data) / BYTES_S
                await asyncio.sleep(free_at - loop.time())
                sink.write(data)
                await sink.drain()
        except OSError:
            pass  # an end that is gone closes the other
        finally:
            sink.close()

    async def both(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_server, from_server = None, None
        with suppress(OSError):
            to_server, from_server = await asyncio.open_connection("127.0.0.1", port)
        if to_server is None or from_server is None:
            writer.close()
            return
        for pair in ((reader, from_server), (to_server, writer)):
            task = asyncio.create_task(carry(*pair))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(both, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.slow
async def test_a_slow_link_carries_a_snapshot_without_a_break(tmp_path: Path) -> None:
    authority = Authority()
    a, b = (make(tmp_path / name, name, identity=authority.issue(name)) for name in "ab")
    async with started(a), slow(a.transport.port) as port, started(b):
        update_neighbours([a], {"a": a.address, "b": "127.0.0.1:1"})
        update_neighbours([b], {"a": f"127.0.0.1:{port}", "b": b.address})
        published = a.publish(1, weights(1), block=2**19)
        await b.ears.offer("a", 1)
        fetched = await asyncio.wait_for(b.transport.fetch("a", 1, published.payload.root), 200)
        assert fetched.bytes == published.payload.bytes
        assert len(b.ears.offers) == 1  # on one connection
        assert not b.ears.losses
