"""Attacks under mTLS that are refused: by strangers, by members where they have no right, and by a neighbour that lies.
After each, an honest agent is served, or an honest peer's snapshot comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from dimat.errors import NetworkError
from dimat.net.manifest import seal
from dimat.net.pki.certificates import tls_name
from dimat.net.pki.identity import Identity
from dimat.wire.v1 import peer_pb2 as pb
from tests.net.agents import (
    RUN,
    SCHEMA,
    Agent,
    call,
    code_of,
    ends_with,
    hello,
    make,
    record,
    started,
    update_neighbours,
    weights,
)
from tests.net.keys import Authority
from tests.net.test_hostile_peer import Liar, against

pytestmark = [pytest.mark.anyio, pytest.mark.live]
Code = grpc.StatusCode
MIB = 2**20
TERABYTE = 10**12
REQUESTS: dict[str, tuple[Any, Any]] = {
    "Hello": (hello("b"), pb.HelloReply),
    "Manifests": (pb.ManifestsRequest(), pb.ManifestsReply),
    "Status": (pb.StatusRequest(), pb.StatusReply),
    "DialBack": (pb.DialBackRequest(port=1), pb.DialBackReply),
}


@dataclass
class Besieged:
    """Agent a, which offers `root`; b and c are its readers, d is a member and no reader."""

    a: Agent
    authority: Authority
    root: str
    folder: Path

    def channel(self, credentials: grpc.ChannelCredentials | None) -> aio.Channel:
        if credentials is None:
            return aio.insecure_channel(self.a.address)
        options = [("grpc.ssl_target_name_override", tls_name("a")), ("grpc.use_local_subchannel_pool", 1)]
        return aio.secure_channel(self.a.address, credentials, options=options)

    async def codes(self, credentials: grpc.ChannelCredentials | None, header: str = "b") -> dict[str, grpc.StatusCode]:
        """Call every method and give the codes that they end with."""
        found: dict[str, grpc.StatusCode] = {}
        async with self.channel(credentials) as channel:
            for method, (request, reply) in REQUESTS.items():
                found[method] = await code_of(call(channel, method, request, reply, header))
            found["Fetch"] = await self.fetch(channel)
        return found

    async def fetch(self, channel: aio.Channel) -> grpc.StatusCode:
        method = channel.unary_stream("/dimat.wire.v1.Data/Fetch")
        request = pb.FetchRequest(root=bytes.fromhex(self.root), first_block=0, blocks=1)
        return await ends_with(method(request.SerializeToString(), timeout=30, metadata=(("dimat-agent", "b"),)))

    async def still_serves(self) -> None:
        """A new agent c is served."""
        c = make(self.folder / "c", "c", identity=self.authority.issue("c"))
        async with started(c):
            update_neighbours([c], {"a": self.a.address, "c": c.address})
            await c.ears.offer("a", 1)
            fetched = await asyncio.wait_for(c.transport.fetch("a", 1, self.root), 60)
            assert fetched.path.read_bytes() == self.a.store.path(self.root).read_bytes()


@asynccontextmanager
async def besieged(tmp_path: Path, **more: Any) -> AsyncGenerator[Besieged]:
    authority = Authority()
    a = make(tmp_path / "a", "a", identity=authority.issue("a"), **more)
    async with started(a):
        update_neighbours([a], {"a": a.address} | dict.fromkeys("bcd", "127.0.0.1:1"), readers=["b", "c"])
        a.transport.update_neighbours(replace(a.transport._neighbours, peers=[]))
        yield Besieged(a, authority, a.publish(1, weights(1)).payload.root, tmp_path)


def resident() -> int:
    """Bytes of this process's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


# ── strangers and members without the right ──────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("who", ["no TLS", "no certificate", "another CA", "a CA of the same name"])
async def test_without_a_certificate_of_the_ca_there_is_no_connection(tmp_path: Path, who: str) -> None:
    async with besieged(tmp_path) as siege:
        other = Authority("tests" if "name" in who else "others").issue("b")
        credentials = {
            "no TLS": None,
            "no certificate": grpc.ssl_channel_credentials(siege.authority.pem),
        }.get(who, Identity("b", other.certificate, siege.authority.pem, other.key).channel_credentials())
        codes = await siege.codes(credentials)
        assert set(codes.values()) == {Code.UNAVAILABLE}
        assert not siege.a.transport.sent_bytes
        await siege.still_serves()


async def test_a_certificate_of_the_ca_whose_name_is_not_on_the_map_gets_nothing(tmp_path: Path) -> None:
    async with besieged(tmp_path) as siege:
        credentials = siege.authority.issue("stranger").channel_credentials()
        codes = await siege.codes(credentials, header="b")  # what it calls itself counts for nothing
        assert set(codes.values()) == {Code.PERMISSION_DENIED}
        assert set(codes) == {*REQUESTS, "Fetch"}
        await siege.still_serves()
        assert set(siege.a.transport.sent_bytes) == {"c"}


async def test_a_member_that_is_no_neighbour_cannot_fetch(tmp_path: Path) -> None:
    async with besieged(tmp_path) as siege:
        async with siege.channel(siege.authority.issue("d").channel_credentials()) as channel:
            await call(channel, "Hello", hello("d"), pb.HelloReply)
            assert await siege.fetch(channel) is Code.PERMISSION_DENIED
            answer = call(channel, "Manifests", pb.ManifestsRequest(), pb.ManifestsReply)
            assert await code_of(answer) is Code.PERMISSION_DENIED
            # nor under another's name
            answer = call(channel, "Hello", hello("b"), pb.HelloReply, "b")
            assert await code_of(answer) is Code.PERMISSION_DENIED
        await siege.still_serves()
        assert set(siege.a.transport.sent_bytes) == {"c"}


async def test_a_neighbour_reads_and_no_request_reaches_beyond_what_is_offered(tmp_path: Path) -> None:
    """The same calls by one that may, so that the refusals above are about who asks."""
    async with besieged(tmp_path) as siege:
        codes = await siege.codes(siege.authority.issue("b").channel_credentials())
        assert set(codes.values()) == {Code.OK}
        assert siege.a.transport.sent_bytes == {"b": 65536}


# ── a neighbour that lies ────────────────────────────────────────────────────────────────────────────────────────
@asynccontextmanager
async def lied_to(tmp_path: Path, liar: Liar) -> AsyncGenerator[tuple[Agent, Authority, Identity]]:
    """Agent b, which reads from the liar, with the keys of a, and from the honest c; gives b, the CA and the keys."""
    authority = Authority()
    own = authority.issue("a")
    b, c = (make(tmp_path / name, name, identity=authority.issue(name)) for name in "bc")
    async with started(c), against(liar, b, own, {"c": c.address}):
        update_neighbours([c], {"b": b.address, "c": c.address})
        published = c.publish(1, weights(3))
        yield b, authority, own
        # whatever the liar did
        await b.ears.offer("c", 1)
        fetched = await asyncio.wait_for(b.transport.fetch("c", 1, published.payload.root), 60)
        assert fetched.path.read_bytes() == c.store.path(published.payload.root).read_bytes()
        assert {manifest.agent for manifest, _ in b.ears.offers} <= {"a", "c"}


def honest(folder: Path, agent: str = "a", **more: Any) -> Any:
    (folder / "lies").mkdir(exist_ok=True)
    return record(folder / "lies", agent, 1, weights(1), **more)


def refused(agent: Agent) -> list[str]:
    """Return what b was told that it could not take of the liar."""
    return [notice for notice in agent.ears.notices if notice.startswith("a offers what cannot be taken")]


@pytest.mark.parametrize("fault", ["another key", "none", "flipped", "of another manifest"])
async def test_a_manifest_with_a_wrong_signature_is_refused(tmp_path: Path, fault: str) -> None:
    liar = Liar()
    async with lied_to(tmp_path, liar) as (b, authority, own):
        signed = seal(honest(tmp_path), own.sign)
        signature = {
            "another key": seal(honest(tmp_path), authority.issue("a").sign).signature,  # of the same CA and name
            "none": b"",
            "flipped": signed.signature[:-1] + bytes([signed.signature[-1] ^ 1]),
            "of another manifest": seal(replace(honest(tmp_path), round=2), own.sign).signature,
        }[fault]
        liar.offered = [(signed.data, signature)]
        await b.ears.until(lambda: refused(b))
        assert "signature" in refused(b)[0]
        assert all(manifest.agent == "c" for manifest, _ in b.ears.offers)
        with pytest.raises(NetworkError, match="does not offer snapshot"):
            await b.transport.fetch("a", 1, signed.manifest.payload.root)
        assert not liar.asked


@pytest.mark.parametrize("what", ["of another agent", "of another agent, as its own", "of another run"])
async def test_a_manifest_that_is_replayed_is_refused(tmp_path: Path, what: str) -> None:
    liar = Liar()
    async with lied_to(tmp_path, liar) as (b, authority, own):
        if what == "of another run":  # its own words, of last week
            signed = seal(honest(tmp_path, run="last-week"), own.sign)
            liar.offered = [(signed.data, signed.signature)]
        else:
            theirs = seal(honest(tmp_path, "d"), authority.issue("d").sign)
            mine = seal(honest(tmp_path, "a"), own.sign)
            liar.offered = [(theirs.data if what == "of another agent" else mine.data, theirs.signature)]
        await b.ears.until(lambda: refused(b))
        assert all(manifest.agent == "c" for manifest, _ in b.ears.offers)
        assert not liar.asked


async def test_content_that_has_other_hashes_than_were_signed_is_refused(tmp_path: Path) -> None:
    liar = Liar()
    async with lied_to(tmp_path, liar) as (b, _, own):
        manifest = honest(tmp_path)
        signed = seal(manifest, own.sign)
        data = record(tmp_path / "lies", "a", 2, weights(2)).payload.root
        other = (tmp_path / "lies" / f"{data}.safetensors").read_bytes()
        liar.offered = [(signed.data, signed.signature)]
        # well-formed weights, and others than were promised
        liar.chunks = lambda request: [other[start : start + 65536] for start in range(0, len(other), 65536)]
        await b.ears.offer("a", 1)
        with pytest.raises(NetworkError, match="a sends other content than it promised"):
            await asyncio.wait_for(b.transport.fetch("a", 1, manifest.payload.root), 60)
        assert liar.asked <= 2
        assert not b.stored()


@pytest.mark.parametrize("blocks", [17, 59_605])
async def test_a_claim_of_a_terabyte_is_refused_before_anything_is_made(tmp_path: Path, blocks: int) -> None:
    """With too few hashes, and with all of them: 2 MB of manifest."""
    liar = Liar()
    async with lied_to(tmp_path, liar) as (b, _, own):
        from blake3 import blake3

        before = resident()
        digests = [bytes(32)] * blocks
        root = blake3(b"".join(digests) + TERABYTE.to_bytes(8, "big")).digest()
        message = pb.Manifest.FromString(seal(honest(tmp_path), own.sign).data)
        message.payload.CopyFrom(pb.Payload(root=root, bytes=TERABYTE, block_bytes=16 * MIB, blocks=digests))
        data = message.SerializeToString()
        liar.offered = [(data, own.sign(b"dimat manifest v1\0" + data))]
        await b.ears.until(lambda: refused(b))
        assert "claims 1,000,000,000,000 bytes" in refused(b)[0]
        with pytest.raises(NetworkError):
            await asyncio.wait_for(b.transport.fetch("a", 1, root.hex()), 60)
        assert not liar.asked
        assert not list((b.folder / "received").iterdir())
        assert resident() - before < 200 * MIB


async def test_a_peer_that_says_hello_with_anothers_certificate_is_refused(tmp_path: Path) -> None:
    """TLS says a, and the hello brings d's certificate, so that d's manifests would pass for a's."""
    liar = Liar()
    liar.hello = pb.HelloReply(protocol=1, run=RUN, agent="a", schema=SCHEMA, time_s=0.0)
    async with lied_to(tmp_path, liar) as (b, authority, _):
        liar.hello.certificate = authority.issue("d").certificate_der
        await b.ears.until(lambda: any(peer == "a" for peer, _ in b.ears.refusals))
        assert not liar.polled
