"""The DHT with real nodes on loopback: three under one CA, and one that belongs to an attacker.

References: the records themselves, and what hivemind's nodes say that they took.
"""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from dimat.net.discovery.address_records import AddressRecord, seal_record
from dimat.net.discovery.dht import DhtNode
from dimat.net.discovery.resolver import AddressResolver, Announcement
from tests.net.authority import Authority
from tests.net.nodes import make_node, make_record, needs_hivemind, until, until_there, up

pytestmark = [pytest.mark.anyio, needs_hivemind, pytest.mark.live]


@dataclass(frozen=True)
class Network:
    """`bootstrap` is a plain node that was given the CA; `a` and `b` belong to lab-a and lab-b; `attacker` keeps and
    sends whatever it likes: `forged` holds the bytes that it gives out as a record."""

    authority: Authority
    bootstrap: DhtNode
    a: DhtNode
    b: DhtNode
    attacker: DhtNode
    forged: list[bytes]


@pytest.fixture(scope="module")
async def network(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Network]:
    folder = tmp_path_factory.mktemp("dht")
    authority = Authority()
    forged: list[bytes] = []
    nodes = [make_node(folder / "bootstrap", ca=authority.pem)]
    nodes[0].spawn()
    try:
        await nodes[0].start()
        await nodes[0].ready()
        for name in ("lab-a", "lab-b"):
            seal = authority.issue(name).seal
            nodes.append(make_node(folder / name, ca=authority.pem, bootstraps=nodes[0].addresses, seal=seal))
        nodes.append(make_node(folder / "mallory", run=None, bootstraps=nodes[0].addresses, seal=lambda _: forged[-1]))
        for node in nodes[1:]:
            node.spawn()
            await node.start()
        await up(nodes[0], 3)
        for node in nodes[1:]:
            await up(node, 1)
        yield Network(authority, *nodes, forged)
    finally:
        for node in nodes:
            await node.close()


async def announced(node: DhtNode, record: AddressRecord) -> None:
    async def announce() -> bool:
        return await node.announce(record)

    assert await until_there(announce)


async def test_announced_records_are_found_and_the_newest_wins(network: Network) -> None:
    first = make_record("lab-a", seq=10)
    await announced(network.a, first)
    found = await network.b.lookup("lab-a")
    assert found is not None
    assert replace(found, fingerprint="") == first
    assert len(found.fingerprint) == 64
    second = make_record("lab-a", seq=11, port=7399)
    await announced(network.a, second)
    found = await network.b.lookup("lab-a")
    assert found is not None
    assert found.addresses == ("10.0.0.1:7399",)
    held = await network.a.lookup("lab-a", elsewhere=True)
    assert held is not None, "others hold it, not only the node that announced it"
    assert held.seq == 11
    assert await network.b.lookup("lab-z") is None


async def test_forged_records_are_taken_by_no_node_and_no_reader(network: Network) -> None:
    """The attacker's own node keeps them and is asked for them, so that readers meet them too."""
    member = network.authority.issue("lab-b")
    stranger = Authority("another CA").issue("lab-c")
    right = network.authority.issue("lab-c")
    target = make_record("lab-c", seq=50)
    attempts = {
        "unsigned": seal_record(target, None, b""),
        "of another CA": stranger.seal(target),
        "signed by another member": member.seal(target),
        "of another run": right.seal(replace(target, run="images")),
        "another member's, under this key": member.seal(replace(target, agent="lab-b")),
        "with an end beyond the signed one": right.seal(replace(target, expires_s=target.expires_s - 100)),
        "from the future": right.seal(replace(target, time_s=time.time() + 400)),
        "rubbish": b"rubbish",
        "large": bytes(4097),
    }
    for name, data in attempts.items():
        network.forged.append(data)
        before = network.bootstrap.refused
        assert not await network.attacker.announce(target), f"a node took a record {name}"
        assert await network.b.lookup("lab-c") is None, f"a reader took a record {name}"
        if name != "large":  # which does not leave even the attacker's node
            await until(lambda before=before: network.bootstrap.refused > before)
    network.forged.append(right.seal(target))
    assert await network.attacker.announce(target), "the attacker's node works: it spreads a record that is right"
    assert await network.b.lookup("lab-c") is not None


async def test_a_replayed_record_does_not_come_back(network: Network) -> None:
    keys = network.authority.issue("lab-d")
    now = time.time()
    old = make_record("lab-d", seq=1, time_s=now - 60, expires_s=now + 500)
    new = make_record("lab-d", seq=2, port=7400)
    network.forged.append(keys.seal(old))
    assert await network.attacker.announce(old), "true, and the newest so far"
    network.forged.append(keys.seal(new))
    assert await network.attacker.announce(new)
    network.forged.append(keys.seal(old))
    assert not await network.attacker.announce(old)
    longer = replace(old, expires_s=now + 5000)  # the DHT itself would let it win
    assert not await network.attacker.announce(longer)
    found = await network.b.lookup("lab-d")
    assert found is not None
    assert found.seq == 2


async def test_discovery_over_the_dht(network: Network, tmp_path: Path) -> None:
    """lab-b is not on the map with an address; lab-a finds it, and hears of its next address at once."""
    said: list[str] = []

    def make(agent: str, node: DhtNode) -> AddressResolver:
        (tmp_path / agent).mkdir()
        return AddressResolver(
            run="digits",
            agent=agent,
            static={"lab-a": ["10.0.0.1:1"]},
            members=["lab-a", "lab-b"],
            dht=node,
            folder=tmp_path / agent,
            notice=said.append,
            generator=random.Random(0),
        )

    a, b = make("lab-a", network.a), make("lab-b", network.b)
    try:
        b.announce(Announcement(("10.0.0.2:7300",)))
        await b.start()
        await a.start()
        assert await until_there(lambda: a.addresses("lab-b")) == ("10.0.0.2:7300",)
        first, *_ = await b.addresses("lab-a")  # what an earlier test announced may follow
        assert first == "10.0.0.1:1", "it tells nothing of itself, yet is on the map"
        b.announce(Announcement(("10.0.0.2:7301",), round=4, root="cd" * 32))

        async def moved() -> bool:
            record = await network.a.lookup("lab-b")
            return record is not None and record.round == 4 and record.addresses == ("10.0.0.2:7301",)

        assert await until_there(moved)
        assert not [line for line in said if "not found" in line]
    finally:
        await a.close()
        await b.close()
