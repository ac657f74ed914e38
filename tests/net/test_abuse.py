"""A server under strangers and members that misbehave: it stays up, bounded, and serves the others."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dimat.wire.v1 import peer_pb2 as pb
from tests.net.agents import (
    QUICK,
    Agent,
    call,
    code_of,
    ends_with,
    hello,
    join,
    make,
    started,
    update_neighbours,
    weights,
)
from tests.net.lone import WIDE, WIDTH

pytestmark = [pytest.mark.anyio, pytest.mark.live]
Code = grpc.StatusCode
REFUSALS = (Code.OK, Code.INVALID_ARGUMENT, Code.PERMISSION_DENIED, Code.FAILED_PRECONDITION)
HEADER = (("dimat-agent", "b"),)


def fetch(channel: aio.Channel, root: str, first: int = 0, blocks: int = 1) -> Any:
    """Begin a transfer as a reader would."""
    method = channel.unary_stream(
        "/dimat.wire.v1.Data/Fetch", request_serializer=pb.FetchRequest.SerializeToString, response_deserializer=None
    )
    return method(pb.FetchRequest(root=bytes.fromhex(root), first_block=first, blocks=blocks), metadata=HEADER)


@asynccontextmanager
async def as_reader(agent: Agent) -> AsyncGenerator[aio.Channel]:
    """Open a channel to an agent as its reader b, which says what a test lets it say."""
    update_neighbours([agent], {"a": agent.address, "b": "127.0.0.1:1"})
    profile = agent.transport._profile
    async with aio.insecure_channel(agent.address) as channel:
        await call(channel, "Hello", hello("b", schema=profile.schema), pb.HelloReply, "b")
        yield channel


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


async def still_serves(a: Agent, tmp_path: Path) -> None:
    """A reader that comes new is served."""
    b = make(tmp_path / "still", "b")
    async with started(b):
        join(a, b)
        manifest = await b.ears.offer("a", 1)
        fetched = await b.transport.fetch("a", 1, manifest.payload.root)
        assert fetched.path.stat().st_size == manifest.payload.bytes


async def test_ten_thousand_connections_opened_and_dropped(tmp_path: Path) -> None:
    a = make(tmp_path / "a", "a")
    async with started(a):
        a.publish(1, weights(1))
        before = open_files()

        async def knock(number: int) -> None:
            with socket.socket() as client:
                client.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_connect(client, ("127.0.0.1", a.transport.port))
                if number % 3 == 1:
                    await loop.sock_sendall(client, b"GET / HTTP/1.1\r\n\r\n")
                if number % 3 == 2:
                    await loop.sock_sendall(client, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(40))

        failed = 0
        for start in range(0, 10_000, 50):
            results = await asyncio.gather(*(knock(start + number) for number in range(50)), return_exceptions=True)
            failed += sum(isinstance(result, OSError) for result in results)
        assert failed < 100  # some are cut off while they speak
        await still_serves(a, tmp_path)
        async with asyncio.timeout(60):
            while open_files() > before + 50:  # noqa: ASYNC110
                await asyncio.sleep(0.2)


async def test_connections_that_stay_open_leave_room_for_members(tmp_path: Path) -> None:
    a = make(tmp_path / "a", "a")
    async with started(a):
        a.publish(1, weights(1))
        idle = [await asyncio.open_connection("127.0.0.1", a.transport.port) for _ in range(100)]
        await still_serves(a, tmp_path)
        for _, writer in idle:
            writer.close()


async def test_one_that_takes_no_bytes_is_cut_off(tmp_path: Path) -> None:
    a = make(tmp_path / "a", "a", limits=replace(QUICK, idle_s=1.0), bound=2**28, profile=WIDE)
    async with started(a):
        published = a.publish(1, weights(1, WIDTH))
        async with as_reader(a) as channel:
            blocks = len(published.payload.blocks)
            slow = [fetch(channel, published.payload.root, 0, blocks) for _ in range(2)]
            for stream in slow:
                await stream.read()
            # both slots are taken
            assert await ends_with(fetch(channel, published.payload.root)) is Code.RESOURCE_EXHAUSTED
            async with asyncio.timeout(60):
                while await ends_with(fetch(channel, published.payload.root)) is not Code.OK:  # noqa: ASYNC110
                    await asyncio.sleep(0.2)
            # they took no more, and are told so
            assert a.transport.sent_bytes["b"] < 2 * published.payload.bytes
            assert await ends_with(slow[0]) is Code.ABORTED


async def test_transfers_and_waiting_calls_of_one_peer_are_bounded(tmp_path: Path) -> None:
    limits = replace(QUICK, rate_mb_s=2.0)
    a = make(tmp_path / "a", "a", limits=limits, bound=2**28, profile=WIDE)
    async with started(a):
        published = a.publish(1, weights(1, WIDTH))
        async with as_reader(a) as channel:
            first = await call(channel, "Manifests", pb.ManifestsRequest(), pb.ManifestsReply, "b")
            wait = pb.ManifestsRequest(seen=first.sequence, session=first.session, wait_ms=50_000)
            waiting = [asyncio.create_task(call(channel, "Manifests", wait, pb.ManifestsReply, "b")) for _ in range(3)]
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            [refused] = done
            with pytest.raises(aio.AioRpcError, match="the most for one peer") as caught:
                await refused
            assert caught.value.code() is Code.RESOURCE_EXHAUSTED
            streams = [fetch(channel, published.payload.root, 0, 200) for _ in range(limits.streams_per_peer)]
            for stream in streams:
                await stream.read()
            assert await ends_with(fetch(channel, published.payload.root)) is Code.RESOURCE_EXHAUSTED
            for stream in streams:
                stream.cancel()
            a.publish(2, weights(2, WIDTH))
            for task in waiting:
                if task is not refused:
                    assert len((await task).offered) == 2


async def test_what_is_asked_for_wrongly_is_refused(tmp_path: Path) -> None:
    a = make(tmp_path / "a", "a")
    async with started(a):
        published = a.publish(1, weights(1))
        blocks = len(published.payload.blocks)
        async with as_reader(a) as channel:
            root = published.payload.root
            assert await ends_with(fetch(channel, "ab" * 32)) is Code.NOT_FOUND
            assert await ends_with(fetch(channel, "ab" * 5000)) is Code.NOT_FOUND
            assert await ends_with(fetch(channel, "")) is Code.NOT_FOUND
            for first, count in ((0, 0), (0, blocks + 1), (blocks, 1), (2**63, 2**63)):
                assert await ends_with(fetch(channel, root, first, count)) is Code.OUT_OF_RANGE
            assert await ends_with(fetch(channel, "ab" * 70_000)) is Code.RESOURCE_EXHAUSTED  # over 64 KiB
            assert await ends_with(fetch(channel, root, 0, blocks)) is Code.OK
        assert a.transport.sent_bytes == {"b": published.payload.bytes}


async def test_a_reader_that_is_taken_off_the_map_hears_no_more(tmp_path: Path) -> None:
    a = make(tmp_path / "a", "a")
    async with started(a):
        a.publish(1, weights(1))
        async with as_reader(a) as channel:
            first = await call(channel, "Manifests", pb.ManifestsRequest(), pb.ManifestsReply, "b")
            wait = pb.ManifestsRequest(seen=first.sequence, session=first.session, wait_ms=50_000)
            waiting = asyncio.create_task(call(channel, "Manifests", wait, pb.ManifestsReply, "b"))
            await asyncio.sleep(0.2)
            update_neighbours([a], {"a": a.address})
            a.publish(2, weights(2))
            with pytest.raises(aio.AioRpcError) as caught:
                await waiting
            assert caught.value.code() is Code.PERMISSION_DENIED


async def test_one_that_is_on_the_map_and_no_reader_gets_nothing(tmp_path: Path) -> None:
    a = make(tmp_path / "a", "a")
    async with started(a):
        published = a.publish(1, weights(1))
        async with as_reader(a) as channel:
            update_neighbours([a], {"a": a.address, "b": "127.0.0.1:1"}, readers=())
            assert await ends_with(fetch(channel, published.payload.root)) is Code.PERMISSION_DENIED
            with pytest.raises(aio.AioRpcError) as caught:
                await call(channel, "Manifests", pb.ManifestsRequest(), pb.ManifestsReply, "b")
            assert caught.value.code() is Code.PERMISSION_DENIED
        assert not a.transport.sent_bytes


async def test_bytes_that_are_no_protocol_do_no_harm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    a = make(tmp_path / "a", "a")
    async with started(a):
        a.publish(1, weights(1))
        async with as_reader(a) as channel:
            for method in ("Hello", "Manifests", "Status", "DialBack"):
                garbage = channel.unary_unary(f"/dimat.wire.v1.Peer/{method}")
                for data in garbage_of(60):
                    assert await code_of(garbage(data, timeout=30, metadata=HEADER)) in REFUSALS
            stream = channel.unary_stream("/dimat.wire.v1.Data/Fetch")
            for data in garbage_of(60):
                assert await ends_with(stream(data, timeout=30, metadata=HEADER)) is not Code.OK
        assert not caplog.records  # no stack in the log for each of them
        await still_serves(a, tmp_path)


def garbage_of(count: int) -> list[bytes]:
    """Draw bytes that are no messages, or messages of odd content."""
    drawn: list[bytes] = []

    @settings(max_examples=count, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.binary(min_size=1, max_size=200))
    def draw(data: bytes) -> None:
        drawn.append(data)

    draw()
    return drawn


async def test_one_that_accepts_and_says_nothing_is_lost_and_the_next_address_tried(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", "a"), make(tmp_path / "b", "b", limits=replace(QUICK, connect_s=1.0))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        mute = f"127.0.0.1:{silent.getsockname()[1]}"
        async with started(a, b):
            a.publish(1, weights(1))
            update_neighbours([a], {"a": a.address, "b": b.address})
            update_neighbours([b], {"a": mute, "b": b.address})
            await b.ears.until(lambda: b.ears.losses)
            assert b.ears.losses[0][0] == "a"
            update_neighbours([b], {"a": a.address, "b": b.address})
            await b.ears.offer("a", 1)
