"""Neighbours with valid keys that take more than their share, on the real wire: of slots, of logs, of manifests. The
reference is what an honest neighbour still gets."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from dimat.net.limits import MOST_NOTICES
from dimat.net.manifest import seal
from dimat.net.pki.identity import Identity
from dimat.weights.snapshot import Manifest
from tests.net.agents import QUICK, make, started, update_neighbours, weights
from tests.net.keys import Authority
from tests.net.test_hostile_peer import Liar, against, honest

pytestmark = [pytest.mark.anyio, pytest.mark.live]


def signed(manifest: Manifest, identity: Identity) -> tuple[bytes, bytes]:
    made = seal(manifest, identity.sign)
    return made.data, made.signature


async def test_four_slow_neighbours_do_not_hold_all_transfers(tmp_path: Path) -> None:
    """Each sends 10 kB a second, and four downloads go on at a time: the fifth neighbour's snapshot comes all the same,
    while the four go on."""
    authority = Authority()
    slow = [
        make(tmp_path / name, name, identity=authority.issue(name), limits=replace(QUICK, rate_mb_s=0.01))
        for name in "abcd"
    ]
    quick, reader = (make(tmp_path / name, name, identity=authority.issue(name)) for name in "ef")
    everybody = [*slow, quick, reader]
    async with started(*everybody):
        update_neighbours(everybody, {agent.name: agent.address for agent in everybody})
        for number, agent in enumerate([*slow, quick]):
            agent.publish(1, weights(number))
        offers = {agent.name: await reader.ears.offer(agent.name, 1) for agent in [*slow, quick]}
        fetches = {
            name: asyncio.create_task(reader.transport.fetch(name, 1, offers[name].payload.root)) for name in "abcd"
        }
        async with asyncio.timeout(60):
            while len(reader.transport.received_bytes) < 4:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        fetched = await asyncio.wait_for(reader.transport.fetch("e", 1, offers["e"].payload.root), 20)
        assert fetched.path.stat().st_size == offers["e"].payload.bytes
        assert not any(task.done() for task in fetches.values())
        for task in fetches.values():
            task.cancel()
        await asyncio.gather(*fetches.values(), return_exceptions=True)


async def test_a_manifest_with_more_parents_than_the_map_has_members_is_refused(tmp_path: Path) -> None:
    """Thousands of invented parents, signed: refused before anything is written; the honest round after it is taken."""
    authority = Authority()
    identity = authority.issue("a")
    good = honest(tmp_path)
    invented = tuple((f"agent-{number}", "ab" * 32, 1, 0.1) for number in range(9000))
    liar = Liar()
    liar.offered = [
        signed(replace(good, parents=invented[:3]), identity),
        signed(replace(good, round=2, parents=invented), identity),
        signed(replace(good, round=3, pushed={name: 0.1 for name, *_ in invented[:3]}), identity),
        signed(replace(good, round=4, parents=invented[:2]), identity),
        signed(replace(good, round=5, metrics={f"{number:0900}": 1.0 for number in range(200)}), identity),
    ]
    b = make(tmp_path / "b", "b", identity=authority.issue("b"))
    async with against(liar, b, identity):
        await b.ears.offer("a", 4)
        assert [manifest.round for manifest, _ in b.ears.offers] == [4]
        told = [notice for notice in b.ears.notices if "clocks" not in notice]
        assert [notice.split("refused: ")[1] for notice in told[:1]] == ["3 parents, at most 2 are read"]
        assert "9,000 parents" in told[1]
        assert "3 pushed" in told[2]
        assert "bytes beside its blocks" in told[3]


async def test_faults_without_end_are_told_a_few_times_and_counted(tmp_path: Path) -> None:
    """Forty manifests, each with a fault of its own: a few lines, and a number in the status."""
    authority = Authority()
    identity = authority.issue("a")
    good = honest(tmp_path)
    liar = Liar()
    liar.offered = [
        *(signed(replace(good, run=f"another-{number}"), identity) for number in range(40)),
        signed(good, identity),
    ]
    b = make(tmp_path / "b", "b", identity=authority.issue("b"))
    async with against(liar, b, identity):
        await b.ears.offer("a", 1)
        told = [notice for notice in b.ears.notices if "clocks" not in notice]
        assert len(told) == MOST_NOTICES + 1
        assert "counted" in told[-1]
        assert b.transport.peers["a"]["faults"] == 40
