"""Agents that do not fit: each side says which of run, schema, base and protocol differs, and nothing is served."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from dimat.errors import NetworkError
from dimat.net.compatibility import Profile
from dimat.wire.v1 import peer_pb2 as pb
from tests.net.agents import RUN, SCHEMA, call, hello, join, make, started, update_neighbours, weights

pytestmark = pytest.mark.anyio
SETTINGS = {
    "classes": '["cat", "dog"]',
    "tokenizer": "257 tokens",
    "probe": "a",
    "train.optimizer_state": "merged",
}
OWN = Profile(SCHEMA, "b" * 64, ("fp32",), groups="d" * 64, settings=SETTINGS)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"run": "another"}, "run 'another'"),
        ({"profile": replace(OWN, schema="c" * 64)}, "names, shapes or types"),
        ({"profile": replace(OWN, groups="e" * 64)}, "find the difference with `dimat symmetry diff`"),
        ({"profile": replace(OWN, base="")}, "its base is"),
        ({"profile": replace(OWN, protocol=2)}, "protocol"),
        ({"profile": replace(OWN, settings={"classes": '["dog", "cat"]'})}, "(the same classes in"),
        ({"profile": replace(OWN, settings={"tokenizer": "258 tokens"})}, "its tokenizer is "),
        ({"profile": replace(OWN, settings={"train.optimizer_state": "own"})}, "sends its optimizer's moments"),
    ],
)
async def test_one_that_does_not_fit_is_refused_by_both_and_others_go_on(
    tmp_path: Path, other: dict[str, Any], says: str
) -> None:
    a, c = make(tmp_path / "a", "a", profile=OWN), make(tmp_path / "c", "c", profile=OWN)
    own: dict[str, Any] = {"profile": OWN}
    b = make(tmp_path / "b", "b", **(own | other))
    async with started(a, b, c):
        join(a, b, c)
        a.publish(1, weights(1))
        await c.ears.offer("a", 1)
        await a.ears.until(lambda: a.ears.refusals)
        await b.ears.until(lambda: len(b.ears.refusals) == 2)
        assert {peer for peer, _ in a.ears.refusals} == {"b"}
        assert {peer for peer, _ in b.ears.refusals} == {"a", "c"}
        assert says.replace("another", RUN) in b.ears.refusals[0][1]
        assert says in a.ears.refusals[0][1]
        assert not b.ears.offers
        with pytest.raises(NetworkError, match=r"^a: "):
            await b.transport.fetch("a", 1, "00" * 32)
        # tried again, and not said again
        await asyncio.sleep(1.5)
        assert len(a.ears.refusals) == 1
        assert len(b.ears.refusals) == 2


async def test_one_that_says_no_groups_is_not_told_apart_by_them(tmp_path: Path) -> None:
    """As an agent that aligns nothing does, or one of a version before groups were said."""
    a = make(tmp_path / "a", "a", profile=OWN)
    b = make(tmp_path / "b", "b", profile=replace(OWN, groups=""))
    async with started(a, b):
        join(a, b)
        for one, other in ((a, b), (b, a)):
            one.publish(1, weights(1))
            await other.ears.offer(one.name, 1)
        assert not a.ears.refusals
        assert not b.ears.refusals


async def test_a_server_serves_nobody_that_has_not_said_a_hello_that_fits(tmp_path: Path) -> None:
    a = make(tmp_path / "a", "a")
    async with started(a):
        update_neighbours([a], {"a": a.address, "b": "127.0.0.1:1"})
        a.publish(1, weights(1))
        async with aio.insecure_channel(a.address) as channel:
            ask = pb.ManifestsRequest()
            with pytest.raises(aio.AioRpcError, match="say hello first") as caught:
                await call(channel, "Manifests", ask, pb.ManifestsReply, "b")
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            reply = await call(channel, "Hello", hello("b", schema="other"), pb.HelloReply, "b")
            assert (reply.run, reply.agent, reply.schema, reply.protocol) == (RUN, "a", SCHEMA, 1)
            with pytest.raises(aio.AioRpcError, match="b does not fit a: its model has other names") as caught:
                await call(channel, "Manifests", ask, pb.ManifestsReply, "b")
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            await call(channel, "Hello", hello("b"), pb.HelloReply, "b")
            assert len((await call(channel, "Manifests", ask, pb.ManifestsReply, "b")).offered) == 1
            with pytest.raises(aio.AioRpcError, match="says hello as") as caught:
                await call(channel, "Hello", hello("c"), pb.HelloReply, "b")
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_one_that_answers_under_another_name_is_not_taken_for_it(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", "a"), make(tmp_path / "b", "b")
    async with started(a, b):
        update_neighbours([a, b], {"a": a.address, "b": b.address, "c": a.address})
        await b.ears.until(lambda: any(peer == "c" for peer, _, _ in b.ears.losses))
        assert "'a' answers there, not c" in next(reason for peer, reason, _ in b.ears.losses if peer == "c")


async def test_a_probe_set_that_differs_is_said_and_costs_nothing(tmp_path: Path) -> None:
    a = make(tmp_path / "a", "a", profile=OWN)
    b = make(tmp_path / "b", "b", profile=replace(OWN, settings={**SETTINGS, "probe": "b"}))
    async with started(a, b):
        join(a, b)
        for one, other in ((a, b), (b, a)):
            one.publish(1, weights(1))
            await other.ears.offer(one.name, 1)
            await other.ears.until(lambda other=other: other.ears.notices)
        assert a.ears.notices == [
            "b: it fits, but its probe is 'b', here 'a'; give both the same, unless that is meant"
        ]
        assert not a.ears.refusals


async def test_clocks_that_differ_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = make(tmp_path / "a", "a"), make(tmp_path / "b", "b")
    # both run on one clock: that of the servers is put forward
    monkeypatch.setattr("dimat.net.grpc_server.clock", lambda: time.time() + 120.0)
    async with started(a, b):
        join(a, b)
        await b.ears.until(lambda: b.ears.notices)
        assert "clocks of a and this machine differ by 120 s" in b.ears.notices[0]
        await a.ears.until(lambda: a.ears.notices)
