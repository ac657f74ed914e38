"""Garbage, floods and dawdlers at the port of an agent, with and without TLS: it stays up, and serves an honest peer
meanwhile or right after."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import struct
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dimat.net.pki.certificates import tls_name
from dimat.net.pki.identity import Identity
from dimat.wire import AGENT_HEADER
from dimat.wire.v1 import peer_pb2 as pb
from tests.net.agents import QUICK, Agent, call, ends_with, hello, make, started, update_neighbours, weights
from tests.net.keys import Authority, save
from tests.net.lone import WIDE, WIDTH

pytestmark = [pytest.mark.anyio, pytest.mark.live]
Code = grpc.StatusCode
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\0\0\0\4\0\0\0\0\0"
CLIENT_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"  # as one begins
FLOOD_S = 20.0


@pytest.fixture(params=["TLS", "plain"])
def authority(request: pytest.FixtureRequest) -> Authority | None:
    """The CA, and None for a network without keys."""
    return Authority() if request.param == "TLS" else None


def identity(authority: Authority | None, name: str) -> Identity | None:
    return None if authority is None else authority.issue(name)


@asynccontextmanager
async def besieged(tmp_path: Path, authority: Authority | None, **more: Any) -> AsyncGenerator[Agent]:
    """Agent a, which offers a snapshot of round 1 to b and c."""
    a = make(tmp_path / "a", "a", identity=identity(authority, "a"), **more)
    async with started(a):
        update_neighbours([a], {"a": a.address, "b": "127.0.0.1:1", "c": "127.0.0.1:1"})
        a.transport.update_neighbours(replace(a.transport._neighbours, peers=[]))
        a.publish(1, weights(1, WIDTH if more.get("profile") is WIDE else 512))
        yield a


async def serves(a: Agent, authority: Authority | None, folder: Path, **more: Any) -> None:
    """An honest agent c that comes new is served."""
    c = make(folder / "c", "c", identity=identity(authority, "c"), **more)
    async with started(c):
        update_neighbours([c], {"a": a.address, "c": c.address})
        manifest = await c.ears.offer("a", 1)
        fetched = await asyncio.wait_for(c.transport.fetch("a", 1, manifest.payload.root), 60)
        assert fetched.path.read_bytes() == a.store.path(manifest.payload.root).read_bytes()


@asynccontextmanager
async def member(a: Agent, authority: Authority | None) -> AsyncGenerator[aio.Channel]:
    """A channel of the reader b, which says what a test lets it say."""
    options = [("grpc.ssl_target_name_override", tls_name("a")), ("grpc.use_local_subchannel_pool", 1)]
    keys = identity(authority, "b")
    channel = (
        aio.insecure_channel(a.address)
        if keys is None
        else aio.secure_channel(a.address, keys.channel_credentials(), options=options)
    )
    async with channel:
        await call(channel, "Hello", hello("b", schema=a.transport._profile.schema), pb.HelloReply, "b")
        yield channel


async def thrown(port: int, data: bytes, context: ssl.SSLContext | None = None) -> bytes:
    """Connect, throw bytes, and return what comes until it is silent or closed."""
    came = b""
    with suppress(OSError):
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=context, server_hostname=tls_name("a") if context else None
        )
        try:
            writer.write(data)
            await writer.drain()
            async with asyncio.timeout(0.05):
                while data := await reader.read(65536):
                    came += data
        except TimeoutError:
            pass  # it waits for more
        finally:
            writer.transport.abort()  # without TLS's goodbye, which would be waited for
    return came


def drawn(strategy: st.SearchStrategy[Any], count: int) -> list[Any]:
    """Draw examples, the same in each run."""
    examples: list[Any] = []

    @settings(max_examples=count, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def draw(example: Any) -> None:
        examples.append(example)

    draw()
    return examples


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    """Draw HTTP/2 frames: known and unknown kinds, with lengths that are right, or not."""
    data = b""
    for _ in range(draw(st.integers(1, 6))):
        payload = draw(st.binary(max_size=64))
        length = draw(st.one_of(st.just(len(payload)), st.integers(0, 2**24 - 1)))
        kind, flags = draw(st.integers(0, 12)), draw(st.integers(0, 255))
        stream = draw(st.sampled_from([0, 1, 2, 3, 2**31 - 1]))
        data += struct.pack(">I", length)[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload
    return data


# ── garbage ──────────────────────────────────────────────────────────────────────────────────────────────────────
async def test_random_bytes_and_frames_at_the_port(tmp_path: Path, authority: Authority | None) -> None:
    async with besieged(tmp_path, authority) as a:
        garbage = [
            *drawn(st.binary(min_size=1, max_size=500), 40),
            *(PREFACE + data for data in drawn(st.binary(max_size=200), 40)),
            *(PREFACE + SETTINGS + data for data in drawn(frames(), 60)),
            *(CLIENT_HELLO + data for data in drawn(st.binary(max_size=600), 40)),
        ]
        for start in range(0, len(garbage), 20):
            await asyncio.gather(*(thrown(a.transport.port, data) for data in garbage[start : start + 20]))
        await serves(a, authority, tmp_path)
        assert set(a.transport.sent_bytes) == {"c"}


async def test_frames_of_a_member_within_tls(tmp_path: Path) -> None:
    authority = Authority()
    async with besieged(tmp_path, authority) as a:
        keys = authority.issue("b")
        save(keys, tmp_path / "keys")
        context = ssl.create_default_context(cadata=keys.ca.decode())
        context.load_cert_chain(tmp_path / "keys" / "b.crt", tmp_path / "keys" / "b.key")
        context.set_alpn_protocols(["h2"])
        answers = [await thrown(a.transport.port, PREFACE + SETTINGS + data, context) for data in drawn(frames(), 60)]
        assert sum(answer[3:4] == b"\4" for answer in answers) > 30  # settings: TLS let the frames through
        await serves(a, authority, tmp_path)


def messages(root: str) -> dict[str, bytes]:
    """Return a good message for each method."""
    return {
        "Peer/Hello": hello("b").SerializeToString(),
        "Peer/Manifests": pb.ManifestsRequest(seen=1, session="s", wait_ms=10).SerializeToString(),
        "Peer/Status": pb.StatusRequest().SerializeToString() or b"\x08\x01",
        "Peer/DialBack": pb.DialBackRequest(port=1).SerializeToString(),
        "Data/Fetch": pb.FetchRequest(root=bytes.fromhex(root), first_block=1, blocks=2).SerializeToString(),
    }


@st.composite
def bends(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Draw a change: bytes that are changed, left out, put in, or said twice."""
    kind = draw(st.sampled_from(["change", "cut", "insert", "twice"]))
    places = draw(st.lists(st.integers(0, 2**16), min_size=1, max_size=4))
    more = draw(st.binary(min_size=1, max_size=20))

    def bend(data: bytes) -> bytes:
        bent = bytearray(data)
        for place in places:
            at = place % max(len(bent), 1)
            if kind == "change" and bent:
                bent[at] = more[0]
            elif kind == "cut":
                del bent[at:]
            elif kind == "insert":
                bent[at:at] = more
            else:
                bent += bent[:at]
        return bytes(bent)

    return bend


async def test_bent_messages_of_a_member_are_answered_or_refused(
    tmp_path: Path, authority: Authority | None, caplog: pytest.LogCaptureFixture
) -> None:
    proper = {
        Code.OK,
        Code.INVALID_ARGUMENT,
        Code.PERMISSION_DENIED,
        Code.FAILED_PRECONDITION,
        Code.NOT_FOUND,
        Code.OUT_OF_RANGE,
    }
    async with besieged(tmp_path, authority) as a, member(a, authority) as channel:
        root = a.store.offered("a")[0].payload.root
        ends: dict[str, set[grpc.StatusCode]] = {}
        for method, good in messages(root).items():
            for bend in drawn(bends(), 50):
                stream = channel.unary_stream(f"/dimat.wire.v1.{method}")(
                    bend(good), timeout=5, metadata=((AGENT_HEADER, "b"),)
                )
                ends.setdefault(method, set()).add(await ends_with(stream))
        # a bent hello or wait_ms may be one that has to wait
        assert set.union(*ends.values()) <= proper | {Code.DEADLINE_EXCEEDED}
        assert Code.INVALID_ARGUMENT in ends["Peer/Hello"]
        assert Code.NOT_FOUND in ends["Data/Fetch"]
        assert not caplog.records
        await serves(a, authority, tmp_path)


# ── floods ───────────────────────────────────────────────────────────────────────────────────────────────────────
async def test_ten_thousand_connections_opened_and_dropped(tmp_path: Path) -> None:
    """At a port with TLS; as many as go in 20 s on a machine that is busy."""
    authority = Authority()
    async with besieged(tmp_path, authority) as a:
        before = len(os.listdir("/proc/self/fd"))
        loop = asyncio.get_running_loop()

        async def knock(number: int) -> None:
            with socket.socket() as client:
                client.setblocking(False)
                await loop.sock_connect(client, ("127.0.0.1", a.transport.port))
                if number % 3:
                    await loop.sock_sendall(client, (CLIENT_HELLO, PREFACE + SETTINGS)[number % 3 - 1])

        began, knocks, failed = loop.time(), 0, 0
        while knocks < 10_000 and loop.time() - began < FLOOD_S:
            results = await asyncio.gather(*map(knock, range(50)), return_exceptions=True)
            knocks += 50
            failed += sum(isinstance(result, OSError) for result in results)
        assert knocks >= 1000
        assert failed < knocks / 10  # some are cut off while they speak
        await serves(a, authority, tmp_path)
        async with asyncio.timeout(60):
            while len(os.listdir("/proc/self/fd")) > before + 50:  # noqa: ASYNC110
                await asyncio.sleep(0.2)


# ── dawdlers ─────────────────────────────────────────────────────────────────────────────────────────────────────
async def test_those_that_say_a_byte_now_and_then_leave_room(tmp_path: Path, authority: Authority | None) -> None:
    """More of them than there are places: they lose theirs, as they are never through with the handshake."""
    places, dawdlers = 40, 60
    opening = CLIENT_HELLO + bytes(500) if authority else PREFACE + SETTINGS
    async with besieged(tmp_path, authority, limits=replace(QUICK, connections=places)) as a:
        ended = 0

        async def dawdle() -> None:
            nonlocal ended
            with suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", a.transport.port)
                try:
                    for byte in opening[: len(opening) - 1]:
                        writer.write(bytes([byte]))
                        with suppress(TimeoutError):
                            async with asyncio.timeout(1.0):
                                while await reader.read(100):
                                    pass
                                return  # it was closed
                finally:
                    ended += 1
                    writer.close()

        dawdling = [asyncio.create_task(dawdle()) for _ in range(dawdlers)]
        await asyncio.sleep(0.5)
        try:
            # c dials again until a place is free
            await asyncio.wait_for(serves(a, authority, tmp_path), 90)
            assert ended >= dawdlers - places
        finally:
            for task in dawdling:
                task.cancel()
            await asyncio.gather(*dawdling, return_exceptions=True)


async def test_a_reader_that_never_reads_is_cut_off_and_holds_nobody_up(tmp_path: Path) -> None:
    authority = Authority()
    wide: dict[str, Any] = {"profile": WIDE, "bound": 2**28}
    async with besieged(tmp_path, authority, limits=replace(QUICK, idle_s=2.0), **wide) as a:
        payload = a.store.offered("a")[0].payload
        request = pb.FetchRequest(root=bytes.fromhex(payload.root), first_block=0, blocks=len(payload.blocks))
        async with member(a, authority) as channel:
            begin = channel.unary_stream(
                "/dimat.wire.v1.Data/Fetch", request_serializer=pb.FetchRequest.SerializeToString
            )
            idle = [begin(request) for _ in range(2)]  # as many as one peer may
            for stream in idle:
                await stream.read()
            assert await ends_with(begin(request)) is Code.RESOURCE_EXHAUSTED
            await serves(a, authority, tmp_path, **wide)
            async with asyncio.timeout(60):
                while a.transport._uploader.slots._taken["b"]:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
            # they are told so, and have had a part
            assert [await ends_with(stream) for stream in idle] == [Code.ABORTED] * 2
            assert a.transport.sent_bytes["b"] < 2 * payload.bytes
            assert await ends_with(begin(request)) is Code.OK
