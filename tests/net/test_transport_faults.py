"""Transfers over links that fail, under mTLS through a proxy: reset, black hole, half-open, a flipped byte, truncation,
a slow and a long link; while the connection is made, while manifests come, and mid-stream. The reference is the
publisher's file, and the bytes counted: what is held does not come again. While one link is down, another peer's
snapshot comes."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from dimat.net.compatibility import Profile
from dimat.weights.snapshot import Manifest
from dimat.weights.tensors import schema_hash
from tests.net.agents import BLOCK, QUICK, Agent, make, started, update_neighbours, weights
from tests.net.keys import Authority, save
from tests.net.lone import WIDE
from tests.net.lone import WIDTH as LONE_WIDTH
from tests.net.proxy import Direction, Fault, FaultProxy
from tests.net.transfer.test_resume import lone, until_received

pytestmark = [pytest.mark.anyio, pytest.mark.live]
MIB = 2**20
WIDTH = 1024  # 4 MiB, 65 blocks
PROFILE = Profile(schema_hash(weights(0, WIDTH)))
# the rate leaves time to see a transfer on its way
LIMITS = replace(QUICK, idle_s=1.0, poll_s=1.0, quiet_s=1.0, connect_s=3.0, rate_mb_s=6.0)
# bytes from the server after which a fault strikes: within its part of the TLS handshake; within its manifest
HANDSHAKE, MANIFEST, STREAM = 700, 700, 3 * MIB // 2
FAULTS: list[tuple[Fault, Direction]] = [
    (Fault.RESET, "down"),
    (Fault.BLACK_HOLE, "down"),
    (Fault.HALF_OPEN, "down"),
    (Fault.HALF_OPEN, "up"),
    (Fault.FLIP, "down"),
    (Fault.TRUNCATE, "down"),
]
each_fault = pytest.mark.parametrize(("fault", "direction"), FAULTS, ids=lambda value: getattr(value, "name", value))
# what the slow and the long link carry: bytes a second, seconds each way
SLOW, LONG = {"bytes_s": 50e3}, {"latency_s": 0.3}


@dataclass
class Three:
    """Publishers a, behind the proxy, and c, in plain reach; b reads from both."""

    a: Agent
    b: Agent
    c: Agent
    link: FaultProxy

    def connect(self, addresses: dict[str, str] | None = None) -> None:
        """Let b follow both."""
        known = {"a": self.link.address, "b": "127.0.0.1:1", "c": self.c.address}
        update_neighbours([self.b], known | (addresses or {}))

    async def until_connected(self) -> None:
        async with asyncio.timeout(60):
            while not self.b.transport.peers["a"]["connected"]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def fetch(self, peer: str) -> tuple[Path, int]:
        """Fetch a peer's round 1 as soon as it is offered; gives the file and the bytes that came for it."""
        manifest = await self.b.ears.offer(peer, 1)
        fetched = await self.b.transport.fetch(peer, 1, manifest.payload.root)
        return fetched.path, fetched.bytes

    async def other_peer_serves(self) -> None:
        path, _ = await asyncio.wait_for(self.fetch("c"), 60)
        assert path.read_bytes() == content(self.c)

    def holds_nothing_of(self, manifest: Manifest) -> bool:
        """Whether there is no file under the snapshot's name."""
        return not (self.b.folder / "received" / f"{manifest.payload.root}.safetensors").exists()


def content(agent: Agent) -> bytes:
    [file] = agent.store.folder.glob("*.safetensors")
    return file.read_bytes()


def publish(agent: Agent, seed: int) -> Manifest:
    return agent.publish(1, weights(seed, WIDTH))


@asynccontextmanager
async def three(tmp_path: Path, limits: Any = LIMITS) -> AsyncGenerator[Three]:
    """Start the three; nothing is published, and b follows nobody yet."""
    authority = Authority()
    a, b, c = (
        make(tmp_path / name, name, identity=authority.issue(name), limits=limits, profile=PROFILE) for name in "abc"
    )
    async with started(a, b, c):
        update_neighbours([a, c], {"a": a.address, "b": "127.0.0.1:1", "c": c.address})
        for agent in (a, c):  # they follow nobody
            agent.transport.update_neighbours(replace(agent.transport._neighbours, peers=[]))
        with FaultProxy(a.transport.port) as link:
            yield Three(a, b, c, link)


async def healed(net: Three, manifest: Manifest, fetching: asyncio.Task[tuple[Path, int]]) -> int:
    """Heal the link: the fetch completes. Returns the bytes that came."""
    assert net.holds_nothing_of(manifest)
    net.link.heal()
    path, came = await asyncio.wait_for(fetching, 120)
    assert path.read_bytes() == content(net.a)
    return came


@each_fault
async def test_a_fault_while_the_connection_is_made(tmp_path: Path, fault: Fault, direction: Direction) -> None:
    async with three(tmp_path) as net:
        manifest = publish(net.a, 1)
        publish(net.c, 3)
        net.link.inject(fault, direction, HANDSHAKE if direction == "down" else 300)
        net.connect()
        fetching = asyncio.create_task(net.fetch("a"))
        await net.link.until_struck()
        await net.other_peer_serves()
        await net.b.ears.until(lambda: net.b.ears.losses)
        assert [peer for peer, _, _ in net.b.ears.losses] == ["a"]
        assert not fetching.done()
        assert await healed(net, manifest, fetching) == manifest.payload.bytes


@each_fault
async def test_a_fault_while_manifests_come(tmp_path: Path, fault: Fault, direction: Direction) -> None:
    async with three(tmp_path) as net:
        net.connect()
        await net.until_connected()
        publish(net.c, 3)
        net.link.inject(fault, direction, MANIFEST if direction == "down" else 0)
        manifest = publish(net.a, 1)  # of 65 hashes
        fetching = asyncio.create_task(net.fetch("a"))
        await net.link.until_struck()
        await net.other_peer_serves()
        await net.b.ears.until(lambda: net.b.ears.losses)
        if direction == "down":
            assert not fetching.done()
            assert await healed(net, manifest, fetching) == manifest.payload.bytes
        else:  # the manifest may have come, and no request for the rest
            net.link.heal()
            path, came = await asyncio.wait_for(fetching, 120)
            assert path.read_bytes() == content(net.a)
            assert came <= manifest.payload.bytes + BLOCK


@each_fault
async def test_a_fault_mid_stream(tmp_path: Path, fault: Fault, direction: Direction) -> None:
    async with three(tmp_path) as net:
        manifest = publish(net.a, 1)
        net.connect()
        await net.b.ears.offer("a", 1)
        publish(net.c, 3)
        if direction == "down":
            net.link.inject(fault, direction, STREAM)
        fetching = asyncio.create_task(net.fetch("a"))
        if direction == "up":
            await net.link.until(lambda: net.link.bytes["down"] >= STREAM)
            net.link.inject(fault, direction)
            assert not fetching.done()
        await net.link.until_struck()
        await net.other_peer_serves()
        await net.b.ears.until(lambda: net.b.ears.losses)
        if direction == "down":
            assert not fetching.done()
            assert net.b.transport.received_bytes["a"] <= STREAM
            came = await healed(net, manifest, fetching)
        else:  # what a waits for is room in b's windows, which may have been wide enough
            net.link.heal()
            path, came = await asyncio.wait_for(fetching, 120)
            assert path.read_bytes() == content(net.a)
        # what had come in whole blocks did not come again
        assert manifest.payload.bytes <= came <= manifest.payload.bytes + BLOCK


@pytest.mark.parametrize("link", [SLOW, LONG], ids=["50 kB/s", "300 ms"])
@pytest.mark.parametrize("phase", ["handshake", "manifest", "stream"])
async def test_slow_and_long_links_are_none_the_worse(tmp_path: Path, link: dict[str, float], phase: str) -> None:
    """Under the default limits. A slow link is freed after a while: the whole would take 80 s."""
    limits = replace(QUICK, lost_after_s=10.0, rate_mb_s=6.0)
    async with three(tmp_path, limits) as net:
        if phase == "handshake":
            net.link.slow(**link)
            manifest = publish(net.a, 1)
            net.connect()
        else:
            net.connect()
            await net.until_connected()
            if phase == "manifest":
                net.link.slow(**link)
            manifest = publish(net.a, 1)
        publish(net.c, 3)
        fetching = asyncio.create_task(net.fetch("a"))
        if phase == "stream":
            await net.link.until(lambda: net.link.bytes["down"] >= STREAM)
            net.link.slow(**link)
            assert not fetching.done()
        await net.other_peer_serves()
        if link is SLOW:
            before = net.link.bytes["down"]
            await net.link.until(lambda: net.link.bytes["down"] >= before + 100_000)
            assert not fetching.done()
            came = await healed(net, manifest, fetching)
        else:
            path, came = await asyncio.wait_for(fetching, 120)
            assert path.read_bytes() == content(net.a)
        assert came == manifest.payload.bytes
        assert not net.b.ears.losses
        assert net.link.connections == 1


async def test_a_fetch_that_waits_can_be_called_off_and_begun_again(tmp_path: Path) -> None:
    async with three(tmp_path) as net:
        manifest = publish(net.a, 1)
        net.connect()
        await net.b.ears.offer("a", 1)
        net.link.inject(Fault.BLACK_HOLE, "down", STREAM)
        fetching = asyncio.create_task(net.fetch("a"))
        await net.link.until_struck()
        await net.b.ears.until(lambda: net.b.ears.losses)
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(fetching, 30)
        assert net.holds_nothing_of(manifest)
        held = net.b.transport.received_bytes["a"]
        assert held > STREAM / 2
        net.link.heal()
        path, came = await asyncio.wait_for(net.fetch("a"), 120)
        assert path.read_bytes() == content(net.a)
        assert held + came <= manifest.payload.bytes + 3 * BLOCK


async def test_a_peer_that_refuses_connections_for_a_while(tmp_path: Path) -> None:
    async with three(tmp_path) as net:
        manifest = publish(net.a, 1)
        publish(net.c, 3)
        net.link.inject(Fault.REFUSE)
        net.connect()
        fetching = asyncio.create_task(net.fetch("a"))
        await net.other_peer_serves()
        await net.b.ears.until(lambda: net.b.ears.losses)
        assert "refused" in net.b.ears.losses[0][1].lower()
        assert await healed(net, manifest, fetching) == manifest.payload.bytes


async def test_a_broken_link_is_told_once_and_a_second_address_used(tmp_path: Path) -> None:
    """A flipped byte breaks TLS, not the agent: the other way to the same peer is taken."""
    async with three(tmp_path) as net:
        manifest = publish(net.a, 1)
        net.link.inject(Fault.FLIP, "down", STREAM)
        net.b.transport.update_neighbours(
            replace(
                net.b.transport._neighbours,
                peers=["a"],
                members=["a", "b", "c"],
                addresses={"a": [net.link.address, net.a.address]},
            )
        )
        path, came = await asyncio.wait_for(net.fetch("a"), 120)
        assert path.read_bytes() == content(net.a)
        assert net.link.struck
        assert manifest.payload.bytes <= came <= manifest.payload.bytes + BLOCK
        assert net.b.transport.peers["a"]["address"] == net.a.address


async def test_a_publisher_that_is_stopped_holds_nobody_else_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process under SIGSTOP keeps its connections; after SIGCONT the rest comes."""
    authority = Authority()
    save(authority.issue("a"), tmp_path / "keys")
    monkeypatch.setenv("LONE_KEYS", str(tmp_path / "keys"))
    b, c = (
        make(
            tmp_path / name,
            name,
            identity=authority.issue(name),
            limits=replace(LIMITS, rate_mb_s=None),
            profile=WIDE,
            bound=2**28,
        )
        for name in "bc"
    )
    async with started(b, c), lone("serve", str(tmp_path / "a"), "0", mb_s="8") as a:
        with FaultProxy(await a.says("port")) as link:
            addresses = {"a": link.address, "b": b.address, "c": c.address}
            update_neighbours([b, c], addresses)
            manifest = await b.ears.offer("a", 1)
            fetching = asyncio.create_task(b.transport.fetch("a", 1, manifest.payload.root))
            await until_received(b, 4 * MIB)
            a.signal(signal.SIGSTOP)
            published = c.publish(1, weights(3, LONE_WIDTH))
            await b.ears.offer("c", 1)
            other = await asyncio.wait_for(b.transport.fetch("c", 1, published.payload.root), 60)
            assert other.path.read_bytes() == content(c)
            await b.ears.until(lambda: "a" in [peer for peer, _, _ in b.ears.losses])
            assert not fetching.done()
            a.signal(signal.SIGCONT)
            fetched = await asyncio.wait_for(fetching, 120)
            assert (
                fetched.path.read_bytes()
                == (tmp_path / "a" / "own" / f"{manifest.payload.root}.safetensors").read_bytes()
            )
            assert fetched.bytes <= manifest.payload.bytes + BLOCK
