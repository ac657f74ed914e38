"""Cheaper ways to a snapshot: forms and deltas end in the very bytes of the payload; what does not is fetched whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from dimat.net.compatibility import Profile
from dimat.weights.encodings import ENCODINGS, encode_weights
from dimat.weights.snapshot import Manifest
from tests.net.agents import SCHEMA, Agent, form, join, make, pair, record, started, weights

pytestmark = pytest.mark.anyio
ALL = Profile(SCHEMA, "", tuple(ENCODINGS))


def offer(agent: Agent, round_: int, own: dict[str, Tensor], encoding: str, after: Manifest | None = None) -> Manifest:
    """Pass weights through an encoding and offer the result: whole, as a form, and as a delta to an earlier one."""
    folder = agent.store.folder
    base = None if after is None else agent.store.path(after.payload.root)
    encoded = encode_weights(own, encoding, after=base)
    assert encoded.data is not None
    one = form(folder, encoded.data, encoding, "" if after is None else after.payload.root)
    manifest = record(folder, agent.name, round_, encoded.weights, encoding=encoding, forms=(one,))
    agent.transport.publish(manifest)
    return manifest


async def test_a_form_costs_less_and_gives_the_same_bytes(tmp_path: Path) -> None:
    async with pair(tmp_path, profile=ALL) as (a, b):
        published = offer(a, 1, weights(1), "bf16")
        await b.ears.offer("a", 1)
        fetched = await b.transport.fetch("a", 1, published.payload.root)
        assert fetched.path.read_bytes() == a.store.path(published.payload.root).read_bytes()
        assert fetched.bytes == published.forms[0].payload.bytes < 0.51 * published.payload.bytes
        assert b.stored() == [".manifest", ".safetensors"]


async def test_a_delta_is_taken_to_what_is_held_and_else_the_whole(tmp_path: Path) -> None:
    a, b, c = (make(tmp_path / name, name, profile=ALL) for name in "abc")
    async with started(a, b, c):
        join(a, b, c)
        first = offer(a, 1, weights(1), "int8")
        await b.ears.offer("a", 1)
        await b.transport.fetch("a", 1, first.payload.root)
        b.transport.release("a", 1, first.payload.root)  # it stays as the base of the next
        moved = {name: tensor + 0.01 * weights(2)[name] for name, tensor in weights(1).items()}
        second = offer(a, 2, moved, "int8", after=first)
        for reader in (b, c):
            await reader.ears.offer("a", 2)
            fetched = await reader.transport.fetch("a", 2, second.payload.root)
            assert fetched.path.read_bytes() == a.store.path(second.payload.root).read_bytes()
            delta = second.forms[0].payload.bytes
            assert fetched.bytes == (delta if reader is b else second.payload.bytes)
        assert second.forms[0].payload.bytes < 0.3 * second.payload.bytes


async def test_a_delta_to_what_this_agent_has_made_itself(tmp_path: Path) -> None:
    a, b = (make(tmp_path / name, name, profile=ALL) for name in "ab")
    async with started(a, b):
        join(a, b)
        first = offer(a, 1, weights(1), "int8")
        own = record(b.store.folder, "b", 1, encode_weights(weights(1), "int8").weights)
        b.transport.publish(own)
        assert own.payload.root == first.payload.root
        second = offer(a, 2, weights(2), "int8", after=first)
        await b.ears.offer("a", 2)
        fetched = await b.transport.fetch("a", 2, second.payload.root)
        assert fetched.bytes == second.forms[0].payload.bytes


async def test_a_form_that_cannot_be_read_here_is_left_aside(tmp_path: Path) -> None:
    async with pair(tmp_path, profile=replace(ALL, encodings=("fp32", "fp16"))) as (a, b):
        published = offer(a, 1, weights(1), "bf16")
        await b.ears.offer("a", 1)
        assert (await b.transport.fetch("a", 1, published.payload.root)).bytes == published.payload.bytes
        assert not b.ears.notices


@pytest.mark.parametrize("fault", ["garbage", "another", "withdrawn", "tampered"])
async def test_a_form_that_does_not_give_what_was_promised_falls_back_to_the_whole(tmp_path: Path, fault: str) -> None:
    async with pair(tmp_path, profile=ALL) as (a, b):
        folder = a.store.folder
        encoded = encode_weights(weights(2 if fault == "another" else 1), "bf16")
        assert encoded.data is not None
        one = form(folder, b"\xff" * 200_000 if fault == "garbage" else encoded.data, "bf16")
        honest = encode_weights(weights(1), "bf16").weights
        published = record(folder, "a", 1, honest, encoding="bf16", forms=(one,))
        path = folder / f"{one.payload.root}.safetensors"
        if fault == "withdrawn":
            path.unlink()
        if fault == "tampered":
            path.write_bytes(path.read_bytes()[:-1] + b"\x55")
        a.transport.publish(published)
        await b.ears.offer("a", 1)
        fetched = await b.transport.fetch("a", 1, published.payload.root)
        assert fetched.path.read_bytes() == a.store.path(published.payload.root).read_bytes()
        assert fetched.bytes >= published.payload.bytes
        [notice] = b.ears.notices
        assert notice.startswith(f"the bf16 form of snapshot {published.payload.root[:12]}… of a is of no use")
        assert b.stored() == [".manifest", ".safetensors"]
