"""Transfers that break: the publisher killed or stopped mid-stream, the reader killed, content that is not right. The
reference is the publisher's file, and the count of bytes on the publisher's side: a block that is held comes once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dimat.errors import NetworkError
from dimat.net.transport import Fetched
from dimat.weights.snapshot import Manifest
from tests.forks import Process, start
from tests.net.agents import BLOCK, QUICK, Agent, make, pair, started, update_neighbours, weights
from tests.net.lone import WIDE

pytestmark = [pytest.mark.anyio, pytest.mark.live]
MIB = 2**20


class Lone:
    """An agent in a process of its own, with what it says."""

    def __init__(self, process: Process | subprocess.Popen[bytes], said: asyncio.StreamReader) -> None:
        self.process = process
        self._said = said

    async def says(self, key: str, least: int = 0) -> Any:
        """Wait for a line with a value, of at least that much where it is a number."""
        async with asyncio.timeout(120):
            while line := await self._said.readline():
                value = json.loads(line).get(key)
                if value is not None and (not isinstance(value, int) or value >= least):
                    return value
        raise AssertionError(f"the process ended before it said {key!r}")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    async def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        await asyncio.to_thread(self.process.wait)


@asynccontextmanager
async def lone(*arguments: str, mb_s: str = "") -> AsyncGenerator[Lone]:
    """Start an agent in a process, and kill it at the end."""
    ours, theirs = os.pipe()
    said = asyncio.StreamReader()
    try:
        process = start(
            ["-m", "tests.net.lone", *arguments], env=os.environ | {"LONE_MB_S": mb_s}, stdout=theirs, stderr=2
        )
    finally:
        os.close(theirs)
    loop = asyncio.get_running_loop()
    pipe, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(said), os.fdopen(ours, "rb"))
    agent = Lone(process, said)
    try:
        yield agent
    finally:
        await agent.kill()
        pipe.close()


def reader(tmp_path: Path, **more: Any) -> Agent:
    return make(tmp_path / "b", "b", bound=2**28, profile=WIDE, **more)


def own(tmp_path: Path, root: str) -> Path:
    """Return the publisher's file."""
    return tmp_path / "a" / "own" / f"{root}.safetensors"


def content(path: str) -> bytes:
    return Path(path).read_bytes()


async def until_received(agent: Agent, amount: int) -> None:
    async with asyncio.timeout(120):
        while agent.transport.received_bytes.get("a", 0) < amount:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def begun(b: Agent, port: int) -> tuple[Manifest, asyncio.Task[Fetched]]:
    """Let b fetch the snapshot of the agent at a port; return once 4 MiB of it are here."""
    update_neighbours([b], {"a": f"127.0.0.1:{port}", "b": b.address})
    manifest = await b.ears.offer("a", 1)
    fetching = asyncio.create_task(b.transport.fetch("a", 1, manifest.payload.root))
    await until_received(b, 4 * MIB)
    return manifest, fetching


async def test_a_publisher_killed_mid_stream_is_gone_on_with_from_the_blocks_held(tmp_path: Path) -> None:
    b = reader(tmp_path)
    async with started(b), lone("serve", str(tmp_path / "a"), "0", mb_s="8") as first:
        port = await first.says("port")
        manifest, fetching = await begun(b, port)
        await first.kill()
        async with lone("serve", str(tmp_path / "a"), str(port)) as second:
            fetched = await asyncio.wait_for(fetching, 120)
            assert fetched.path.read_bytes() == own(tmp_path, manifest.payload.root).read_bytes()
            assert b.transport.retries["a"] >= 1
            assert await second.says("sent", 1) <= manifest.payload.bytes - 4 * MIB + 2 * BLOCK
        # of what was on its way when it broke, parts of one block at most came twice
        assert manifest.payload.bytes <= fetched.bytes <= manifest.payload.bytes + BLOCK


async def test_a_reader_killed_mid_stream_goes_on_from_its_disk(tmp_path: Path) -> None:
    async with lone("serve", str(tmp_path / "a"), "0", mb_s="8") as a:
        port = await a.says("port")
        root = next((tmp_path / "a" / "own").glob("*.safetensors")).stem
        size = own(tmp_path, root).stat().st_size
        async with lone("fetch", str(tmp_path / "b"), f"127.0.0.1:{port}", root) as first:
            held = await first.says("received", 6 * MIB)
            await first.kill()
        assert len(list((tmp_path / "b" / "received").glob("*.part"))) == 1
        async with lone("fetch", str(tmp_path / "b"), f"127.0.0.1:{port}", root) as second:
            path = await second.says("path")
        assert content(path) == own(tmp_path, root).read_bytes()
        # what was being hashed and written when it was killed comes again: a few blocks
        total = await a.says("sent", size)
        assert total <= size + held / 4
        # and a third life needs nothing of the network
        await a.kill()
        async with lone("fetch", str(tmp_path / "b"), f"127.0.0.1:{port}", root) as third:
            assert await third.says("path") == path


async def test_a_publisher_that_is_stopped_mid_stream_is_given_up_and_taken_up_again(tmp_path: Path) -> None:
    b = reader(tmp_path, limits=replace(QUICK, idle_s=1.0, call_s=1.0, poll_s=1.0))
    async with started(b), lone("serve", str(tmp_path / "a"), "0", mb_s="8") as a:
        manifest, fetching = await begun(b, await a.says("port"))
        a.signal(signal.SIGSTOP)
        await b.ears.until(lambda: b.ears.losses)
        assert not fetching.done()
        a.signal(signal.SIGCONT)
        fetched = await asyncio.wait_for(fetching, 120)
        assert fetched.path.stat().st_size == manifest.payload.bytes


async def test_a_fetch_that_is_called_off_goes_on_where_it_was(tmp_path: Path) -> None:
    b = reader(tmp_path)
    async with started(b), lone("serve", str(tmp_path / "a"), "0", mb_s="8") as a:
        manifest, fetching = await begun(b, await a.says("port"))
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
        held = b.transport.received_bytes["a"]
        fetched = await b.transport.fetch("a", 1, manifest.payload.root)
        assert held + fetched.bytes <= manifest.payload.bytes + 3 * BLOCK
        assert fetched.path.stat().st_size == manifest.payload.bytes


async def test_content_that_is_not_what_was_promised_is_refused_by_name(tmp_path: Path) -> None:
    async with pair(tmp_path) as (a, b):
        published = a.publish(1, weights(1))
        await b.ears.offer("a", 1)
        path = a.store.path(published.payload.root)
        data = bytearray(path.read_bytes())
        data[5 * BLOCK + 7] ^= 1
        path.write_bytes(data)
        with pytest.raises(NetworkError, match=r"^a sends other content .* block 5 of snapshot .* 2 times"):
            await b.transport.fetch("a", 1, published.payload.root)
        # block 5 was sent twice, the rest once at most; and nothing stays
        assert a.transport.sent_bytes["b"] <= published.payload.bytes + 12 * BLOCK
        assert b.transport.retries == {"a": 1}
        assert not b.stored()
        # a file that was cut short is the publisher's fault, which it says
        path.write_bytes(data[:-1])
        with pytest.raises(NetworkError, match=r"a: snapshot .* is damaged at a"):
            await b.transport.fetch("a", 1, published.payload.root)
        assert "b could not be served" in a.ears.notices[0]


async def test_a_damaged_piece_from_an_earlier_life_counts_by_its_hashes(tmp_path: Path) -> None:
    async with pair(tmp_path) as (a, b):
        published = a.publish(1, weights(1))
        await b.ears.offer("a", 1)
        first = await b.transport.fetch("a", 1, published.payload.root)
        whole = bytearray(first.path.read_bytes())
    for block in (0, 3, 4):
        whole[block * BLOCK] ^= 255
    [manifest] = (b.folder / "received").glob("*.manifest")
    first.path.write_bytes(whole)
    # a whole file that rots: found by its hashes in the next life, and fetched anew
    async with pair(tmp_path) as (a, b):
        again = await b.transport.fetch("a", 1, published.payload.root)
        assert again.path.read_bytes() == a.store.path(published.payload.root).read_bytes()
        assert again.bytes == published.payload.bytes
    # a file without its manifest is a stranger
    manifest.unlink()
    a, b = make(tmp_path / "a", "a"), make(tmp_path / "b", "b")
    async with started(a, b):
        assert not b.stored()
