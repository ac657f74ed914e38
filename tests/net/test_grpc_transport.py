"""Real transports on loopback, insecure and under mTLS; the reference is what the publisher has on its disk."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import torch
from grpc import aio

from dimat.errors import NetworkError, SecurityError
from dimat.net.pki.identity import Identity
from dimat.net.transfer.cache import SnapshotCache
from dimat.net.transport import Neighbours
from dimat.wire.v1 import peer_pb2 as pb
from tests.net.agents import QUICK, WIDTH, call, join, make, pair, started, update_neighbours, weights
from tests.net.keys import Authority

pytestmark = [pytest.mark.anyio, pytest.mark.live]


@pytest.fixture(params=["insecure", "mtls"])
def identity(request: pytest.FixtureRequest) -> Callable[[str], Identity | None]:
    """Gives an agent's keys, or None on an insecure network."""
    return (lambda name: None) if request.param == "insecure" else Authority().issue


async def test_what_is_offered_is_heard_and_fetched_whole(
    tmp_path: Path, identity: Callable[[str], Identity | None]
) -> None:
    a, b, c = (make(tmp_path / name, name, identity=identity(name)) for name in "abc")
    signed = identity("a") is not None
    async with started(a, b, c):
        join(a, b, c)
        published = {agent.name: agent.publish(1, weights(number)) for number, agent in enumerate((a, b, c))}
        for reader in (a, b, c):
            for name in set("abc") - {reader.name}:
                assert await reader.ears.offer(name, 1) == published[name]
        both = await asyncio.gather(*(c.transport.fetch(name, 1, published[name].payload.root) for name in "ab"))
        for agent, fetched in zip((a, b), both):
            payload = published[agent.name].payload
            assert fetched.manifest == published[agent.name]
            assert fetched.path.read_bytes() == agent.store.path(payload.root).read_bytes()
            assert fetched.bytes == payload.bytes
            assert agent.transport.sent_bytes == {"c": payload.bytes}
            assert c.transport.received_bytes[agent.name] == payload.bytes
            assert bool(fetched.signed[1]) == signed
        assert not any(agent.ears.refusals or agent.ears.losses for agent in (a, b, c))


async def test_peers_tell_when_they_were_heard_and_what_went_over(tmp_path: Path) -> None:
    """The bytes of what was fetched at both ends; a peer that was never reached was never heard, and one that went
    away was heard when it was there."""
    a, b = (make(tmp_path / name, name) for name in "ab")
    async with started(b):
        async with started(a):
            update_neighbours([a, b], {"a": a.address, "b": b.address, "gone": "127.0.0.1:9"})
            manifest = a.publish(1, weights(1))
            await b.ears.offer("a", 1)
            await a.ears.until(lambda: a.transport.peers["b"]["connected"])
            await b.transport.fetch("a", 1, manifest.payload.root)
            size = manifest.payload.bytes
            at_a, at_b, gone = a.transport.peers["b"], b.transport.peers["a"], b.transport.peers["gone"]
            assert (at_a["sent_bytes"], at_a["received_bytes"]) == (size, 0)
            assert (at_b["sent_bytes"], at_b["received_bytes"]) == (0, size)
            assert a.transport.traffic == [("sent", "b", "fp32", size)]
            assert b.transport.traffic == [("received", "a", "fp32", size)]
            assert not b.transport.retries
            assert gone == gone | {"heard_s": None, "sent_bytes": 0, "received_bytes": 0}
            heard = at_b["heard_s"]
            assert isinstance(heard, float)
            assert 0 <= heard < 600  # seconds ago, and not the clock's own count
        await b.ears.until(lambda: any(peer == "a" for peer, _, _ in b.ears.losses))
        later = b.transport.peers["a"]
        assert not later["connected"]
        assert isinstance(later["heard_s"], float)
        assert heard <= later["heard_s"] < 600


async def test_an_unchanged_snapshot_costs_nothing(tmp_path: Path) -> None:
    async with pair(tmp_path) as (a, b):
        first = a.publish(1, weights(1))
        await b.ears.offer("a", 1)
        await b.transport.fetch("a", 1, first.payload.root)
        second = a.publish(2, weights(1))
        assert second.payload.root == first.payload.root
        await b.ears.offer("a", 2)
        again = await b.transport.fetch("a", 2, second.payload.root)
        assert again.bytes == 0
        assert again.manifest.round == 2
        assert a.transport.sent_bytes == {"b": first.payload.bytes}
        # it is needed as long as one of both rounds is
        b.transport.release("a", 1, first.payload.root)
        assert again.path.exists()


async def test_only_changed_blocks_travel(tmp_path: Path) -> None:
    async with pair(tmp_path) as (a, b):
        before, after = weights(1), weights(1)
        first = a.publish(1, before)
        await b.ears.offer("a", 1)
        await b.transport.fetch("a", 1, first.payload.root)
        b.transport.release("a", 1, first.payload.root)
        after["layer.weight"][WIDTH // 2] += 1.0
        second = a.publish(2, after)
        await b.ears.offer("a", 2)
        fetched = await b.transport.fetch("a", 2, second.payload.root)
        changed = [i for i, (x, y) in enumerate(zip(first.payload.blocks, second.payload.blocks)) if x != y]
        assert 1 <= len(changed) <= 2
        assert fetched.bytes == len(changed) * second.payload.block_bytes
        assert fetched.path.read_bytes() == a.store.path(second.payload.root).read_bytes()


async def test_blocks_of_equal_content_travel_once(tmp_path: Path) -> None:
    async with pair(tmp_path) as (a, b):
        tensors = {"layer.weight": torch.zeros(WIDTH, WIDTH)}
        published = a.publish(1, tensors)
        await b.ears.offer("a", 1)
        fetched = await b.transport.fetch("a", 1, published.payload.root)
        assert len(set(published.payload.blocks)) == 3  # with the header, zeros, and the shorter end
        assert fetched.bytes < 3 * published.payload.block_bytes
        assert fetched.path.read_bytes() == a.store.path(published.payload.root).read_bytes()


async def test_what_this_agent_holds_itself_is_not_sent(tmp_path: Path) -> None:
    async with pair(tmp_path) as (a, b):
        own = b.publish(1, weights(1))
        published = a.publish(1, weights(1))
        await b.ears.offer("a", 1)
        fetched = await b.transport.fetch("a", 1, published.payload.root)
        assert fetched.bytes == 0
        assert fetched.manifest.agent == "a"
        # and it stays when the own one goes
        for round_ in (2, 3):
            b.publish(round_, weights(round_))
        assert not b.store.path(own.payload.root).exists()
        assert fetched.path.read_bytes() == a.store.path(published.payload.root).read_bytes()


async def test_news_come_at_once(tmp_path: Path) -> None:
    async with pair(tmp_path, limits=replace(QUICK, poll_s=50.0)) as (a, b):
        a.publish(1, weights(1))
        await b.ears.offer("a", 1)
        # the next answer would come after 50 s if it waited its time
        a.publish(2, weights(2))
        async with asyncio.timeout(25):
            await b.ears.offer("a", 2)
        assert [(m.round, oldest) for m, oldest in b.ears.offers] == [(1, 1), (2, 1)]


async def test_publishing_again_changes_nothing(tmp_path: Path) -> None:
    async with pair(tmp_path) as (a, b):
        manifest = a.publish(1, weights(1))
        await b.ears.offer("a", 1)
        a.transport.publish(manifest)
        a.publish(2, weights(2))
        await b.ears.offer("a", 2)
        assert len(b.ears.offers) == 2


async def test_a_withdrawn_snapshot_cannot_be_had(tmp_path: Path) -> None:
    async with pair(tmp_path) as (a, b):
        for round_ in (1, 2, 3):
            a.publish(round_, weights(round_))
            await b.ears.offer("a", round_)
        gone = b.ears.offers[0][0].payload.root
        assert b.ears.offers[-1][1] == 2
        with pytest.raises(NetworkError, match="does not offer snapshot"):
            await b.transport.fetch("a", 1, gone)
        assert not b.stored()
        with pytest.raises(NetworkError, match="not a neighbour"):
            await b.transport.fetch("c", 1, gone)


async def test_a_snapshot_is_kept_while_it_is_needed_and_the_last_one_beyond(tmp_path: Path) -> None:
    async with pair(tmp_path) as (a, b):
        paths: list[Path] = []
        for round_ in (1, 2, 3):
            published = a.publish(round_, weights(round_))
            await b.ears.offer("a", round_)
            paths.append((await b.transport.fetch("a", round_, published.payload.root)).path)
        b.transport.release("a", 2, paths[1].stem)
        assert [path.exists() for path in paths] == [True, False, True]
        b.transport.release("a", 3, paths[2].stem)
        b.transport.release("a", 1, paths[0].stem)
        assert [path.exists() for path in paths] == [False, False, True]


async def test_what_was_offered_is_offered_again_after_a_restart(
    tmp_path: Path, identity: Callable[[str], Identity | None]
) -> None:
    keys = {name: identity(name) for name in "ab"}
    a = make(tmp_path / "a", "a", identity=keys["a"])
    async with started(a):
        rounds = [a.publish(round_, weights(round_)) for round_ in (1, 2, 3)]
    manifests = sorted((tmp_path / "a" / "own").glob("*.manifest"))
    assert len(manifests) == 2  # as many as the store keeps
    a, b = make(tmp_path / "a", "a", identity=keys["a"]), make(tmp_path / "b", "b", identity=keys["b"])
    async with started(a, b):
        join(a, b)
        assert [await b.ears.offer("a", round_) for round_ in (2, 3)] == rounds[1:]
        fetched = await b.transport.fetch("a", 3, rounds[2].payload.root)
        assert fetched.bytes == rounds[2].payload.bytes
        # the daemon offers its newest again, too
        a.transport.publish(rounds[2])
    # a damaged one is passed over, and said
    manifests[0].write_bytes(manifests[0].read_bytes()[:-1])
    a = make(tmp_path / "a", "a", identity=keys["a"])
    async with started(a):
        assert [m.round for m in a.store.offered("a")] == [3]
        assert len(a.ears.notices) == 1
        assert manifests[0].name in a.ears.notices[0]


async def test_one_that_leaves_says_so_and_can_be_fetched_from_until_it_is_gone(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", "a"), make(tmp_path / "b", "b")
    async with started(b):
        async with started(a, grace_s=5.0):
            join(a, b)
            published = a.publish(7, weights(1))
            await b.ears.offer("a", 7)
            a.transport.leave("time is up")
            await b.ears.until(lambda: b.ears.losses)
            await b.transport.fetch("a", 7, published.payload.root)
        await asyncio.sleep(2 * QUICK.lost_after_s)
        assert b.ears.losses == [("a", "it has left ('time is up')", 7)]


async def test_one_that_is_gone_is_lost_once_and_heard_again_when_it_is_back(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", "a"), make(tmp_path / "b", "b")
    async with started(b):
        async with started(a):
            join(a, b)
            a.publish(1, weights(1))
            await b.ears.offer("a", 1)
            port = a.transport.port
        await b.ears.until(lambda: b.ears.losses)
        [(peer, reason, last)] = b.ears.losses
        assert (peer, last) == ("a", 0)
        assert reason
        await b.ears.until(lambda: b.ears.notices)
        assert "a is out of reach" in b.ears.notices[0]
        a = make(tmp_path / "a", "a", listen=f"127.0.0.1:{port}")
        async with started(a):
            join(a, b)
            await b.ears.until(lambda: len(b.ears.offers) == 2)
            assert b.ears.offers[0] == b.ears.offers[1]
        assert len(b.ears.losses) == 1


async def test_a_fetch_waits_for_a_peer_that_is_out_of_reach(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", "a"), make(tmp_path / "b", "b")
    async with started(b):
        async with started(a):
            join(a, b)
            published = a.publish(1, weights(1))
            await b.ears.offer("a", 1)
            port = a.transport.port
        fetching = asyncio.create_task(b.transport.fetch("a", 1, published.payload.root))
        await b.ears.until(lambda: b.ears.losses)
        assert not fetching.done()
        a = make(tmp_path / "a", "a", listen=f"127.0.0.1:{port}")
        async with started(a):
            join(a, b)
            fetched = await asyncio.wait_for(fetching, 60)
            assert fetched.path.read_bytes() == a.store.path(published.payload.root).read_bytes()


async def test_a_new_map_lets_peers_go_and_follows_others(tmp_path: Path) -> None:
    a, b, c = (make(tmp_path / name, name) for name in "abc")
    async with started(a, b, c):
        join(a, b)
        first = a.publish(1, weights(1))
        await b.ears.offer("a", 1)
        join(b, c)
        update_neighbours([a], {"a": a.address})
        c.publish(1, weights(3))
        await b.ears.offer("c", 1)
        with pytest.raises(NetworkError, match="not a neighbour"):
            await b.transport.fetch("a", 1, first.payload.root)
        assert sorted(b.transport.peers) == ["c"]
        assert b.transport.peers["c"]["connected"]
        assert b.transport.peers["c"]["rounds"] == [1]


async def test_a_fetch_from_a_peer_that_is_taken_off_the_map_ends(tmp_path: Path) -> None:
    b = make(tmp_path / "b", "b")
    async with started(b):
        update_neighbours([b], {"b": b.address, "a": "127.0.0.1:9"})
        fetching = asyncio.create_task(b.transport.fetch("a", 1, "00" * 32))
        await asyncio.sleep(0.1)
        update_neighbours([b], {"b": b.address})
        with pytest.raises(NetworkError, match="not followed any more"):
            await asyncio.wait_for(fetching, 30)


async def test_further_addresses_come_from_a_directory(tmp_path: Path) -> None:
    a = make(tmp_path / "a", "a")

    async def directory(agent: str) -> list[str]:
        return [a.address] if agent == "a" else []

    b = make(tmp_path / "b", "b", address_lookup=directory)
    async with started(a, b):
        a.transport.update_neighbours(Neighbours(["b"], ["b"], ["a", "b"], {}))
        b.transport.update_neighbours(Neighbours(["a"], ["a"], ["a", "b"], {"a": ["127.0.0.1:1"]}))
        a.publish(1, weights(1))
        await b.ears.offer("a", 1)
        # and a hears from b, of which it has no address: not at all
        assert not a.transport.peers["b"]["connected"]


async def test_a_port_that_is_taken_and_an_open_insecure_network_are_refused(tmp_path: Path) -> None:
    a = make(tmp_path / "a", "a")
    async with started(a):
        b = make(tmp_path / "b", "b", listen=a.address)
        with pytest.raises(NetworkError, match=f"cannot listen on {a.address}"):
            async with started(b):
                pass
    for listen in ("0.0.0.0:0", "[::]:0", "example.org:0"):
        c = make(tmp_path / "c", "c", listen=listen)
        with pytest.raises(SecurityError, match="loopback"):
            async with started(c):
                pass


async def test_status_and_dial_back_serve_members_only(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", "a", status=lambda: {"round": 3}), make(tmp_path / "b", "b")
    async with started(a, b):
        join(a, b)
        async with aio.insecure_channel(a.address) as channel:
            reply = await call(channel, "Status", pb.StatusRequest(), pb.StatusReply, "b")
            assert json.loads(reply.json) == {"round": 3}
            ask = pb.DialBackRequest(port=b.transport.port)
            reply = await call(channel, "DialBack", ask, pb.DialBackReply, "b")
            assert reply == pb.DialBackReply(reached=True, address=b.address)
            with pytest.raises(aio.AioRpcError) as caught:
                await call(channel, "Status", pb.StatusRequest(), pb.StatusReply, "stranger")
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
            # of the map's addresses only the caller's own are dialled
            update_neighbours([a], {"a": a.address, "b": "127.0.0.1:1"})
            reply = await call(channel, "DialBack", pb.DialBackRequest(port=2), pb.DialBackReply, "b")
            assert not reply.reached
            assert reply.address == "127.0.0.1:1"
            assert "refused" in reply.reason
            with pytest.raises(aio.AioRpcError) as caught:
                await call(channel, "DialBack", pb.DialBackRequest(port=70000), pb.DialBackReply, "b")
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_fault_of_ours_in_one_fetch_is_that_fetchs_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that nobody foresaw, in the books of one fetch: NetworkError names it, and the next one succeeds."""
    a, b = make(tmp_path / "a", "a"), make(tmp_path / "b", "b")
    async with started(a, b):
        join(a, b)
        root = a.publish(1, weights(1)).payload.root
        await b.ears.offer("a", 1)
        with monkeypatch.context() as patch:
            patch.setattr(SnapshotCache, "make_room", _broken)
            with pytest.raises(NetworkError, match="RuntimeError: dictionary changed size"):
                await b.transport.fetch("a", 1, root)
        assert (await b.transport.fetch("a", 1, root)).path.exists()


def _broken(*_: object) -> None:
    raise RuntimeError("dictionary changed size during iteration")
