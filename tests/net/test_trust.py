"""Who is let in under mTLS, and whose word counts: real certificates, real handshakes."""

# pyright: basic
from __future__ import annotations

import re
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from dimat.net.pki.certificates import tls_name
from dimat.net.pki.identity import Identity
from dimat.net.transport import Neighbours
from dimat.wire.v1 import peer_pb2 as pb
from tests.net.agents import call, join, make, started, update_neighbours, weights
from tests.net.keys import Authority

pytestmark = [pytest.mark.anyio, pytest.mark.live]
Code = grpc.StatusCode


@pytest.fixture
def authority() -> Authority:
    return Authority()


def channel_to(address: str, credentials: grpc.ChannelCredentials, name: str = "a") -> aio.Channel:
    return aio.secure_channel(
        address,
        credentials,
        options=[("grpc.ssl_target_name_override", tls_name(name)), ("grpc.use_local_subchannel_pool", 1)],
    )


async def status_code(channel: aio.Channel, agent: str = "") -> grpc.StatusCode:
    """Ask for the status and return the code that the call ends with."""
    async with channel:
        try:
            await call(channel, "Status", pb.StatusRequest(), pb.StatusReply, agent)
        except aio.AioRpcError as error:
            return error.code()
        return Code.OK


async def test_only_certificates_of_the_ca_that_are_on_the_map_are_let_in(tmp_path: Path, authority: Authority) -> None:
    a = make(tmp_path / "a", "a", identity=authority.issue("a"))
    async with started(a):
        update_neighbours([a], {"a": a.address, "b": "127.0.0.1:1"})
        b, stranger, other = authority.issue("b"), authority.issue("stranger"), Authority().issue("b")
        assert await status_code(channel_to(a.address, b.channel_credentials())) is Code.OK
        # of the right CA, and not on the map; what it calls itself in a header counts for nothing
        for header in ("", "b"):
            code = await status_code(channel_to(a.address, stranger.channel_credentials()), header)
            assert code is Code.PERMISSION_DENIED
        nobody = grpc.ssl_channel_credentials(authority.pem)
        trusting = Identity("b", other.certificate, authority.pem, other.key)
        for credentials in (nobody, trusting.channel_credentials()):
            assert await status_code(channel_to(a.address, credentials)) is Code.UNAVAILABLE
        assert await status_code(aio.insecure_channel(a.address), "b") is Code.UNAVAILABLE
        assert await status_code(channel_to(a.address, b.channel_credentials())) is Code.OK


async def test_agents_of_two_cas_do_not_hear_each_other(tmp_path: Path, authority: Authority) -> None:
    a, b = (make(tmp_path / name, name, identity=authority.issue(name)) for name in "ab")
    c = make(tmp_path / "c", "c", identity=Authority().issue("c"))
    async with started(a, b, c):
        join(a, b, c)
        a.publish(1, weights(1))
        c.publish(1, weights(3))
        await b.ears.offer("a", 1)
        await b.ears.until(lambda: b.ears.losses)
        await c.ears.until(lambda: len(c.ears.losses) == 2)
        [(peer, reason, _)] = b.ears.losses
        assert peer == "c"
        assert "no TLS connection: is its certificate of the same CA" in reason
        assert [manifest.agent for manifest, _ in b.ears.offers] == ["a"]
        assert not c.ears.offers


async def test_a_clock_that_is_behind_is_named(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a machine whose clock is behind, a peer's certificate begins in the future: here, three days from now."""

    class Later(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.now(tz) + timedelta(days=3)

    a = make(tmp_path / "a", "a", identity=authority.issue("a"))
    with monkeypatch.context() as patched:
        patched.setattr("dimat.net.pki.authority.datetime", Later)
        later = authority.issue("b")
    server = aio.server()
    port = server.add_secure_port("127.0.0.1:0", later.server_credentials())
    await server.start()
    async with started(a):
        update_neighbours([a], {"a": a.address, "b": f"127.0.0.1:{port}"})
        await a.ears.until(lambda: a.ears.losses)
        await server.stop(0)
        [(peer, reason, _)] = a.ears.losses
        assert peer == "b"
        assert re.search(
            r"by this machine's clock, \d{4}-\d\d-\d\d \d\d:\d\d UTC, its certificate is not valid yet", reason
        )


async def test_one_that_is_not_on_the_map_or_no_neighbour_is_told_so(tmp_path: Path, authority: Authority) -> None:
    a, b = (make(tmp_path / name, name, identity=authority.issue(name)) for name in "ab")
    async with started(a, b):
        a.publish(1, weights(1))
        b.transport.update_neighbours(Neighbours(["a"], ["a"], ["a", "b"], {"a": [a.address]}))
        await b.ears.until(lambda: b.ears.refusals)
        assert b.ears.refusals == [("a", "it refuses this agent: 'b' is not on the map of a")]
        # on the map now, and no reader
        a.transport.update_neighbours(Neighbours([], [], ["a", "b"], {}))
        await b.ears.until(lambda: len(b.ears.refusals) == 2)
        assert b.ears.refusals[1][1] == "it refuses this agent: b is not a neighbour that reads from a"
        a.transport.update_neighbours(Neighbours([], ["b"], ["a", "b"], {}))
        await b.ears.offer("a", 1)


async def test_an_address_where_another_member_answers_is_not_taken_for_the_peer(
    tmp_path: Path, authority: Authority
) -> None:
    a, b = (make(tmp_path / name, name, identity=authority.issue(name)) for name in "ab")
    async with started(a, b):
        a.publish(1, weights(1))
        update_neighbours([a, b], {"a": a.address, "b": b.address, "c": a.address})
        await b.ears.until(lambda: b.ears.losses)
        assert b.ears.losses[0][0] == "c"
        assert {manifest.agent for manifest, _ in b.ears.offers} <= {"a"}


async def test_a_manifest_that_another_key_signed_is_refused(tmp_path: Path, authority: Authority) -> None:
    a, b = (make(tmp_path / name, name, identity=authority.issue(name)) for name in "ab")
    another: Any = authority.issue("a").sign  # the same name, another key
    a.transport._outbox._sign = another
    async with started(a, b):
        join(a, b)
        a.publish(1, weights(1))
        await b.ears.until(lambda: b.ears.notices)
        assert "a offers what cannot be taken" in b.ears.notices[0]
        assert "signature" in b.ears.notices[0]
        a.transport._outbox._sign = a.transport._identity.sign  # type: ignore[union-attr]
        a.publish(2, weights(2))
        await b.ears.offer("a", 2)
        assert [manifest.round for manifest, _ in b.ears.offers] == [2]


async def test_anothers_manifest_offered_as_ones_own_is_refused(tmp_path: Path, authority: Authority) -> None:
    a, b, c = (make(tmp_path / name, name, identity=authority.issue(name)) for name in "abc")
    async with started(a, b, c):
        join(a, b, c)
        published = a.publish(1, weights(1))
        await c.ears.offer("a", 1)
        signed = c.transport._links["a"].offer(1, published.payload.root)
        assert signed is not None
        c.transport._outbox._signed[1, published.payload.root] = signed
        c.transport._outbox._change()
        await b.ears.until(lambda: b.ears.notices)
        assert "c offers what cannot be taken" in b.ears.notices[0]
        assert {manifest.agent for manifest, _ in b.ears.offers} <= {"a"}
