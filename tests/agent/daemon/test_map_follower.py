"""Agents that follow the network map which the organiser publishes in the DHT. References: the map files, and what real
agents tell of whom they merge with."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from dimat.agent.daemon.map_follower import MapFollower
from dimat.agent.setup.experiment import resolve
from dimat.agent.setup.followed_map import with_newest_map
from dimat.agent.setup.loaded_task import load_for
from dimat.agent.setup.prepare import PreparedAgent
from dimat.config import ExperimentConfig, build, load_experiment
from dimat.errors import ConfigError, SecurityError, TopologyError
from dimat.net.discovery.map_records import MapRecord, seal_map
from dimat.net.discovery.publish_map import publish_map
from dimat.net.pki.keyring import authority_of, init_authority, issue
from tests.agent.daemon.test_daemon import ABC, SLOW
from tests.agent.daemon.test_daemon_dht import bootstrap, nothing_left
from tests.agent.daemon.test_mid_round import stepwise
from tests.agent.processes import ROOT, Network, check_ledgers, network, write_config
from tests.forks import dimat
from tests.net.keys import Authority
from tests.net.nodes import make_node, needs_hivemind, token_of, until_there, up
from tests.simulate.helpers import TINY_TASK

pytestmark = pytest.mark.live

ADDRESS = "/ip4/127.0.0.1/tcp/7301/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"


def write(file: Path, version: int, names: tuple[str, ...] = ABC, more: str = 'graph = "ring"') -> Path:
    """Write a network map without addresses."""
    head = f"version = {version}\n" if version else ""
    file.write_text(f"{head}{more}\nagents = {json.dumps(names)}\n")
    return file


def publish(net: Network, file: Path, address: str) -> str:
    """Publish a map as an organiser does; return what is said."""
    words = ["keys", "publish-map", str(file), "--keys", str(net.folder / "keys"), "--run", "tiny"]
    words += ["--bootstrap", address, "--listen", "127.0.0.1:0"]
    done = subprocess.run([dimat(), *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


@needs_hivemind
@pytest.mark.slow
@pytest.mark.timeout(900)  # eight processes, most of which import torch
def test_a_third_agent_is_let_in_by_a_published_map(tmp_path: Path, free_ports: list[int]) -> None:
    """Two agents follow; a map with a third one is published, and all merge all. One without lab-a leaves it out, also
    in the others' next lives, whose own file is the first map."""
    schedule = "rounds = 0\nround_deadline_s = 30\njoin_wait_s = 3"
    with network(tmp_path, ABC, free_ports) as net, bootstrap(net, "tiny") as (_, address):
        dht = f"bootstraps = [{json.dumps(address)}]\nlisten = '127.0.0.1:0'\nfollow_map = true"
        write_config(tmp_path / "agents.toml", schedule=schedule, train=SLOW, dht=dht)
        stepwise(net, 0.01)  # while a map is looked for, agents rest
        write(tmp_path / "map.toml", 0, ABC[:2])
        own = (tmp_path / "map.toml").read_bytes()
        lives = [net.start(name) for name in ABC[:2]]
        net.until(lambda: all(net.partners(name) == set(ABC[:2]) for name in ABC[:2]), "two merge")

        assert "version 2 of the network map, 3 agents" in publish(net, write(tmp_path / "new.toml", 2), address)
        for name in ABC[:2]:
            net.until(
                lambda name=name: any("as published" in event["message"] for event in net.events(name, "Warned")),
                f"{name} takes the map over",
            )
        write(tmp_path / "map-c.toml", 2)
        lives.append(net.start("lab-c", "topology.map=map-c.toml", "agent.founder=false"))
        net.until(lambda: all(net.partners(name) == set(ABC) for name in ABC), "all merge all")
        publish(net, write(tmp_path / "third.toml", 3, ABC[1:]), address)
        net.until(lambda: all(net.partners(name) == set(ABC[1:]) for name in ABC[1:]), "lab-a is left out")
        tokens = [token_of(tmp_path / name / "dht") for name in ABC]
        for life in lives:
            life.signal(signal.SIGTERM)
        assert [life.wait() for life in lives] == [143] * 3, "\n".join(life.text() for life in lives)
        assert (tmp_path / "map.toml").read_bytes() == own, "the operator's file is the operator's"
        again = net.start("lab-b")
        started = net.wait_for("lab-b", "AgentStarted", 2)[-1]
        assert started["peers"] == ["lab-c"]
        again.signal(signal.SIGTERM)
        assert again.wait() == 143, again.text()
        check_ledgers(net)
        nothing_left(net, tokens)


@needs_hivemind
@pytest.mark.anyio
async def test_forged_maps_are_taken_by_no_node_and_no_reader(tmp_path: Path) -> None:
    """An attacker's node keeps and spreads what it likes. Nodes and readers that were given the CA refuse a map that a
    member signed, or another CA, of another run, and one that is older than what they have seen."""
    authority, other = Authority(), Authority("another")
    member = authority.issue("lab-a").key
    now = time.time()

    def sealed(
        version: int, key: ec.EllipticCurvePrivateKey = authority.key, run: str = "digits", life_s: float = 600.0
    ) -> bytes:
        return seal_map(run, version, "graph = 'ring'\n", now, now + life_s, key)

    first = make_node(tmp_path / "bootstrap", ca=authority.pem)
    nodes = [first]
    try:
        first.spawn()
        await first.start()
        await first.ready()
        reader = make_node(tmp_path / "lab-b", ca=authority.pem, bootstraps=first.addresses)
        mallory = make_node(tmp_path / "mallory", run=None, bootstraps=first.addresses)
        for node in (reader, mallory):
            nodes.append(node)
            node.spawn()
            await node.start()
        await up(first, 2)
        for node in nodes[1:]:
            await up(node, 1)

        async def spread(data: bytes, life_s: float = 600.0, version: int = 9) -> int:
            return await mallory.announce_map(data, MapRecord("digits", version, "", "", now, now + life_s))

        for name, data in {
            "a member's": sealed(9, member),
            "another CA's": sealed(9, other.key),
            "of another run": sealed(9, run="images"),
            "rubbish": b"dimat-map-1\nrubbish",
        }.items():
            assert await spread(data) == 0, f"a node took a map that is {name}"
            assert await reader.lookup_map() is None, f"a reader took a map that is {name}"
        assert await until_there(lambda: spread(sealed(2)))
        found = await reader.lookup_map()
        assert found is not None
        assert found[0].version == 2
        assert await spread(sealed(3, life_s=700.0), 700.0)
        assert await spread(sealed(2, life_s=800.0), 800.0) == 0, "an older version, which lasts longer"
        found = await reader.lookup_map()
        assert found is not None
        assert found[0].version == 3
    finally:
        for node in nodes:
            await node.close()


@pytest.mark.timeout(900)  # six processes of hivemind, one after the other: a minute, most of it waiting
@needs_hivemind
@pytest.mark.anyio
async def test_what_can_be_published(tmp_path: Path) -> None:
    """A map whose version is above the published one, or that very map again; it states a version, stands alone, and
    the folder has the CA's key."""
    keys = tmp_path / "keys"
    init_authority(keys, "tests", 30)
    issue(keys, {"lab-a": ()}, 10, out=tmp_path / "lab-a")
    node = make_node(tmp_path / "bootstrap", ca=(keys / "ca.crt").read_bytes())

    async def publish_one(file: Path, folder: Path = keys) -> int:
        done = await publish_map(
            file, folder, "digits", node.addresses, days=1, listen="127.0.0.1:0", notice=lambda _: None
        )
        return done.version

    try:
        node.spawn()
        await node.start()
        await node.ready()
        assert await publish_one(write(tmp_path / "map.toml", 2)) == 2
        with pytest.raises(ConfigError, match="state version = 3"):
            await publish_one(write(tmp_path / "map.toml", 1))
        with pytest.raises(ConfigError, match="state version = 3"):
            await publish_one(write(tmp_path / "map.toml", 2, ABC[:2]))
        assert await publish_one(write(tmp_path / "map.toml", 2)) == 2
        assert await publish_one(write(tmp_path / "map.toml", 3, ABC[:2])) == 3
        with pytest.raises(ConfigError, match="states no version"):
            await publish_one(write(tmp_path / "map.toml", 0))
        with pytest.raises(TopologyError, match="stand alone: it may not name python"):
            await publish_one(write(tmp_path / "map.toml", 4, more='python = "graph.py:graph"'))
        with pytest.raises(SecurityError, match=r"no .*ca\.key"):
            await publish_one(write(tmp_path / "map.toml", 4), tmp_path / "lab-a")
    finally:
        await node.close()


class Shelf:
    """A DHT of one node: holds one map, or none."""

    healthy, known, now = True, 1, 1e9

    def __init__(self) -> None:
        self.held: tuple[MapRecord, bytes] | None = None

    async def announce_map(self, sealed: bytes, record: MapRecord) -> int:
        self.held = record, sealed
        return 1

    async def lookup_map(self) -> tuple[MapRecord, bytes] | None:
        return self.held


class Lab:
    """lab-a with its files, and what follows maps for it; `taken` and `said` grow."""

    def __init__(self, folder: Path) -> None:
        (folder / "tiny_task.py").write_text(TINY_TASK)
        if not (folder / "keys").exists():
            init_authority(folder / "keys", "tests", 30)
        write_config(folder / "agents.toml", dht=f'bootstraps = ["{ADDRESS}"]\nfollow_map = true')
        self.folder = folder / "lab-a" / "dht"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config = load_experiment(folder / "agents.toml", ("agent.name=lab-a", f"agent.folder={folder / 'lab-a'}"))
        self.shelf = Shelf()
        self.taken: list[tuple[str, ...]] = []
        self.said: list[str] = []
        self._key = authority_of(folder / "keys")[1]
        loaded = load_for(self.config, symmetry=False)
        self.prepared = PreparedAgent("lab-a", self.config, resolve(with_newest_map(self.config), loaded))

        async def take() -> None:
            self.taken.append(self.agents())

        self.follower = MapFollower(
            self.config,
            self.folder,
            self.shelf,
            (folder / "keys" / "ca.crt").read_bytes,
            check=self.prepared.schedule_on,
            take=take,
            notice=self.said.append,
            generator=random.Random(0),
        )

    def agents(self) -> tuple[str, ...]:
        """Return who is in the network by the map that counts."""
        return self.prepared.schedule_now().agents

    async def sees(self, version: int, text: str) -> None:
        """Look once at a DHT that holds a map of this version."""
        now = time.time()
        sealed = seal_map("tiny", version, text, now, now + 600, self._key)
        self.shelf.held = MapRecord("tiny", version, "", text, now, now + 600), sealed
        await self.follower.look(now)


@pytest.mark.anyio
async def test_which_map_counts(tmp_path: Path) -> None:
    """The highest version, of the operator's file and the followed one; in the next life too; and a DHT that has lost
    the map gets it again."""
    write(tmp_path / "map.toml", 2, ABC[:2])
    lab = Lab(tmp_path)
    ring = 'version = {0}\nagents = ["lab-a", "lab-b", "lab-c"]\n'
    await lab.sees(2, ring.format(2))
    assert (lab.taken, lab.agents()) == ([], ABC[:2]), "not above the operator's"
    await lab.sees(3, ring.format(3))
    await lab.sees(3, ring.format(3))
    assert lab.taken == [ABC], "once"
    await lab.sees(1, ring.format(1))
    assert (lab.taken, lab.agents()) == ([ABC], ABC)
    assert lab.shelf.held is not None
    assert lab.shelf.held[0].version == 3, "the newer one goes to where the older was"
    assert "lab-c" not in (tmp_path / "map.toml").read_text()

    lab = Lab(tmp_path)
    assert lab.agents() == ABC, "after a restart"
    await lab.follower.look(time.time())
    assert lab.shelf.held is not None, "the DHT has it again"
    assert lab.shelf.held[0].version == 3
    lab.shelf.held = None
    await lab.follower.look(time.time() + 3600)
    assert lab.shelf.held is None, "not once it is over"
    write(tmp_path / "map.toml", 4, ABC[:2])
    assert lab.agents() == ABC[:2], "the operator overrules"
    assert not lab.said


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('version = 3\npython = "../../tiny_task.py:task"\n', "stand alone"),
        ('version = 3\n[schedule]\nname = "cycle"\noptions = { graphs = [{ file = "/x.gml" }] }\n', "stand alone"),
        ('version = 4\nagents = ["lab-a", "lab-b"]\n', "states version 4, and was signed as 3"),
        ('agents = ["lab-a", "lab-b"]\n', "states version none"),
        ('version = 3\ngraph = "no-such"\nagents = ["lab-a", "lab-b"]\n', "no-such"),
        ("version = 3\nagents = [", "toml"),
    ],
)
async def test_maps_that_cannot_be_used_are_passed_over_once(tmp_path: Path, text: str, why: str) -> None:
    """With a warning; the one before stands, and a later one that can be used is taken."""
    write(tmp_path / "map.toml", 0, ABC[:2])
    lab = Lab(tmp_path)
    await lab.sees(3, text)
    await lab.sees(3, text)
    (line,) = lab.said
    assert "version 3 from the DHT is not used" in line
    assert why in line
    assert lab.taken == []
    assert lab.agents() == ABC[:2]
    assert not list(lab.folder.iterdir())
    await lab.sees(4, 'version = 4\nagents = ["lab-a", "lab-c"]\n')
    assert lab.taken == [("lab-a", "lab-c")]


def test_following_without_a_map_file(tmp_path: Path) -> None:
    """It needs one to begin with, and a DHT."""
    tree = {"run": "r", "agent": {"name": "lab-a"}, "dht": {"bootstraps": [ADDRESS], "follow_map": True}}
    with pytest.raises(ConfigError, match=r"dht.follow_map needs topology\.map"):
        with_newest_map(build(ExperimentConfig, tree, "the test"))
    with pytest.raises(ConfigError, match="follow_map needs bootstraps"):
        build(ExperimentConfig, {"run": "r", "dht": {"follow_map": True}}, "the test")
