"""Maps, `build_topology` and the maps in the root folder `topology/`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from dimat.config import TopologyConfig
from dimat.errors import ConfigError, TopologyError
from dimat.net.limits import MAX_NAME_BYTES
from dimat.topology import build_topology, check, load_map, rounds_to_consensus, summarise
from dimat.topology.network_map import MOST_NAME_BYTES, check_alone

FOLDER = Path(__file__).parents[2] / "topology"
MAPS = {
    "ring5.toml": {"map": "ring5.toml"},
    "torus16.toml": {"map": "torus16.toml"},
    "three-labs.toml": {"map": "three-labs.toml"},
    "two_clusters.py": {"python": "two_clusters.py:graph"},
}


def config(**keys: object) -> TopologyConfig:
    return TopologyConfig.model_validate(keys)


def test_default_is_a_ring_of_five() -> None:
    """Reference: the brief."""
    made = build_topology(config())
    assert made.names == tuple(f"agent-{i}" for i in range(5))
    assert made.schedule.row(3, "agent-0") == {"agent-0": pytest.approx(1 / 3), "agent-1": 1 / 3, "agent-4": 1 / 3}
    assert len(build_topology(config(agents=7)).graph.edges()) == 7
    assert build_topology(config(agents=1)).schedule.row(1, "agent-0") == {"agent-0": 1.0}


@pytest.mark.parametrize("name", sorted(MAPS))
def test_maps_in_the_folder(name: str) -> None:
    """Reference: every map is loadable, checked, and the README's row about it is true."""
    made = build_topology(config(**MAPS[name]), 0, FOLDER)
    check(made)
    facts = summarise(made.schedule, made.graph)
    line = next(
        x for x in (FOLDER / "README.md").read_text(encoding="utf-8").splitlines() if x.startswith(f"| [{name}]")
    )
    cells = [cell.strip() for cell in line.strip("|").split("|")][1:]
    peers = f"{facts.min_peers}–{facts.max_peers}".removeprefix(f"{facts.max_peers}–")
    gap = f"{facts.spectral_gap:.3f}".removesuffix(".000")
    assert cells[:5] == [str(facts.agents), str(facts.links), peers, str(facts.diameter), gap]
    assert cells[5:] == [str(rounds_to_consensus(made.schedule)), f"{facts.models_sent:g}"]


def test_pictures_are_small_and_shown() -> None:
    """Reference: the brief, SVGs below 30 kB; the README shows each."""
    pictures = sorted(FOLDER.glob("*.svg"))
    assert len(pictures) == len(MAPS)
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    for picture in pictures:
        assert picture.stat().st_size < 30_000
        assert f"({picture.name})" in text


def test_three_labs_average_by_samples() -> None:
    """Reference: FedAvg's weights on a complete graph."""
    network = load_map(FOLDER / "three-labs.toml")
    assert network.addresses["lab-c"] == ("lab-c.example.org:7300", "10.8.0.3:7300")
    made = build_topology(config(map="three-labs.toml"), 0, FOLDER)
    assert made.schedule.row(1, "lab-b") == {"lab-b": pytest.approx(0.2), "lab-a": 0.3, "lab-c": 0.5}
    known = build_topology(config(map="three-labs.toml"), 0, FOLDER, samples={"lab-a": 1, "lab-b": 1, "lab-c": 2})
    assert known.schedule.row(1, "lab-b")["lab-c"] == 0.5
    assert known.samples["lab-c"] == 2


def test_what_is_set_beside_a_map_wins() -> None:
    """Reference: flag > file; schedule and mixing of the experiment stand over the map's."""
    made = build_topology(config(map="three-labs.toml", mixing="metropolis"), 0, FOLDER)
    assert made.schedule.row(1, "lab-b")["lab-c"] == pytest.approx(1 / 3)
    made = build_topology(config(map="torus16.toml", schedule="random-matching"), 0, FOLDER)
    assert made.schedule.period is None
    assert made.schedule.peers("agent-0") == ("agent-1", "agent-3", "agent-4", "agent-12")
    with pytest.raises(TopologyError, match=r"the map has 16 agents, agents = 9"):
        build_topology(config(map="torus16.toml", agents=9), 0, FOLDER)


def test_edges_by_name_and_number() -> None:
    """Reference: config, edges hold names or indices."""
    assert build_topology(config(edges=[(0, 1), (1, 2)])).names == ("agent-0", "agent-1", "agent-2")
    assert build_topology(config(edges=[("b", "a"), ("a", "c")])).names == ("b", "a", "c")
    assert build_topology(config(edges=[("agent-2", "agent-1"), ("agent-1", 0)], agents=3)).names[0] == "agent-0"
    assert build_topology(config(edges=[], agents=1)).graph.number_of_edges() == 0


def test_schedules_without_a_graph() -> None:
    """Reference: the brief; the graph is then the union of all links."""
    assert build_topology(config(schedule="base-k")).names == tuple(f"agent-{i}" for i in range(5))
    made = build_topology(config(schedule="one-peer-exponential", agents=8))
    assert made.base is None
    assert made.graph.number_of_edges() == 8 * 3, "each sends 1, 2 and 4 further on"
    assert build_topology(config(schedule="random-matching", agents=6)).graph.number_of_edges() == 15
    graphs = [
        "ring",
        {"graph": "random-regular", "options": {"degree": 3}},
        {"edges": [[0, 1], [1, 2], [2, 3], [3, 4], [4, 5]]},
    ]
    made = build_topology(config(schedule={"name": "cycle", "options": {"graphs": graphs}}, agents=6))
    assert made.schedule.period == 3
    assert [made.schedule.graph(r).number_of_edges() for r in (1, 2, 3, 4)] == [6, 9, 5, 6]
    check(made)


def test_seeds_reach_graphs_and_schedules() -> None:
    """Law: the same configuration and seed give the same network, another seed another one."""
    drawn = config(graph="random-regular", agents=20)
    matched = config(schedule="random-matching", agents=20)
    for keys in (drawn, matched):
        one, same, other = (build_topology(keys, seed).schedule.mixing(4) for seed in (1, 1, 2))
        assert np.array_equal(one, same)
        assert not np.array_equal(one, other)


def test_names_of_agents_are_as_long_as_certificates_hold(tmp_path: Path) -> None:
    """A name that a map allows can have a certificate; the number stands on two floors."""
    assert MOST_NAME_BYTES == MAX_NAME_BYTES
    (tmp_path / "map.toml").write_text(f"agents = ['a', '{'é' * 32}']\nedges = [[0, 1]]")
    assert load_map(tmp_path / "map.toml").names == ("a", "é" * 32)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grpah = 'ring'", "unknown key 'grpah' in .*; did you mean 'graph'"),
        ("graph = 'ring'\nedges = [[0, 1]]", "give one of"),
        ("map = 'x.toml'", "a map cannot point to another map"),
        ("graph = 'ring'", "graph 'ring' needs the number of agents"),
        ("agents = []", "lists no agents"),
        ("agents = 0", "agents: "),
        ("agents = [1]", "agents entry 1 must be a table with a name"),
        ("[[agents]]\nname = 'a'\n[[agents]]\nname = 'a'", "agent 'a' is there twice"),
        ("[[agents]]\nname = 'lab a'", "agent name 'lab a' may only hold"),
        ("[[agents]]\nname = '../x'", "may only hold"),
        (f"[[agents]]\nname = '{'a' * 65}'", "'a{40}…' has 65 bytes of UTF-8; certificates hold at most 64"),
        (f"agents = ['a', '{'é' * 33}']", "has 66 bytes of UTF-8; certificates hold at most 64"),
        (f"edges = [['a', '{'b' * 300}']]", "has 300 bytes of UTF-8; certificates hold at most 64"),
        ("[[agents]]\nname = 'a'\nadress = 'x'", "unknown key 'adress' in .*agents entry 1; did you mean 'addresses'"),
        ("[[agents]]\nname = 'a'\naddresses = ['host']", "address 'host' is not host:port"),
        ("[[agents]]\nname = 'a'\naddresses = ['host:99999']", "is not host:port"),
        ("[[agents]]\nname = 'a'\naddresses = ['http://h:12']", "is not host:port"),
        ("[[agents]]\nname = 'a'\naddresses = ['::1:12']", "is not host:port"),
        ("[[agents]]\nname = 'a'\naddresses = ['h:\uff11']", "is not host:port"),
        (
            "[[agents]]\nname = 'a'\naddresses = ['h:1']\n[[agents]]\nname = 'b'\naddresses = ['H:1']",
            "'a' and 'b' have one address",
        ),
        ("[[agents]]\nname = 'a'\nsamples = 0", "agents entry 1: samples"),
        ("agents = ['a', 'b']\nedges = [['a', 'bb']]", "unknown agent 'bb' in edges"),
        ("agents = ['a', 'b']\nedges = [[0, 2]]", "there is no agent number 2; 2 agents count from 0"),
        ("agents = ['a', 'b', 'c']\nedges = [['a', 'b']]", r"2 components: \{a, b\}, \{c\}"),
        ("agents = ['a', 'b']\nedges = [['a', 'b'], ['b', 'a']]", "the link b–a is given twice"),
        ("agents = ['a', 'b']\nedges = [['a', 'b'], ['b', 'b']]", "linked to itself"),
        ("agents = 3\nedges = [['a', 'b']]", "the graph has 2 agents, but agents = 3"),
        ("agents = 2\nedges = [[0, 1]]\noptions = { degree = 3 }", "options belong to a generator"),
        ("agents = 2\nschedule = 'base-k'\noptions = { k = 3 }", "options belong to a generator"),
        ("agents = 4\nschedule = { name = 'cycle', options = { graphs = [{ grap = 'ring' }] } }", "unknown key 'grap'"),
        ("agents = ['a', 'b']\ngraph = 'ring'\nmixing = 'samples'", "needs the samples"),
        ("version = 0.5\nagents = 2", "version must be a whole number"),
        ("version = true\nagents = 2", "version must be a whole number"),
        ("version = -1\nagents = 2", "version must be a whole number"),
        ("graph = ", "not valid TOML"),
    ],
)
def test_faulty_maps(tmp_path: Path, text: str, message: str) -> None:
    """Reference: the brief; one line each."""
    (tmp_path / "map.toml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        build_topology(config(map="map.toml"), 0, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_map_that_points_to_a_file(tmp_path: Path) -> None:
    """Law: paths in a map count from the map's folder; vertices may be numbers, named in the map's order."""
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "net.edges").write_text("0 1\n1 2\n")
    (tmp_path / "maps" / "map.toml").write_text("file = 'net.edges'\nagents = ['x', 'y', 'z']\n")
    made = build_topology(config(map="maps/map.toml"), 0, tmp_path)
    assert set(made.graph.edges()) == {("x", "y"), ("y", "z")}
    again = build_topology(config(file="maps/map.toml"), 0, tmp_path)
    assert again.names == ("x", "y", "z")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("file = 'net.edges'\nagents = 2", "file"),
        ("python = 'net.py:graph'", "python"),
        ("map = 'other.toml'", "map"),
        ("agents = 4\nschedule = { name = 'cycle', options = { graphs = ['ring', { python = 'x.py:f' }] } }", "python"),
        ("agents = 3\nedges = [[0, 1], [1, 2]]\nversion = 7", ""),
        ("agents = ['file', 'python']", ""),
    ],
)
def test_maps_that_stand_alone(tmp_path: Path, text: str, key: str) -> None:
    """Law: what comes from elsewhere names no file and runs no code, at whatever depth."""
    file = tmp_path / "map.toml"
    file.write_text(text)
    with pytest.raises(TopologyError, match=f"may not name {key} =") if key else nullcontext():
        check_alone(file)


def test_the_version_of_a_map(tmp_path: Path) -> None:
    """It is part of no topology: a map without one is version 0."""
    (tmp_path / "map.toml").write_text("version = 7\nagents = 3\n")
    assert load_map(tmp_path / "map.toml").version == 7
    assert len(build_topology(config(map="map.toml"), 0, tmp_path).names) == 3
    (tmp_path / "map.toml").write_text("agents = 3\n")
    assert load_map(tmp_path / "map.toml").version == 0
