"""Graphs from files and from Python: round trips, foreign files, and one clear line for each fault."""

# pyright: basic
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dimat.config import TopologyConfig
from dimat.errors import DataError, HookError, TopologyError
from dimat.topology import Topology, build_graph, build_topology, draw_graph, export, mixing_matrix, read_graph

SUFFIXES = ["graphml", "gml", "json", "edges", "toml"]


def same(one: nx.Graph, two: nx.Graph) -> None:
    """Same names in the same order, same links, same direction."""
    assert list(one) == list(two)
    assert one.is_directed() == two.is_directed()
    assert {frozenset(e) for e in one.edges()} == {frozenset(e) for e in two.edges()}
    if one.is_directed():
        assert set(one.edges()) == set(two.edges())


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["erdos-renyi", "exponential", "star"]), st.integers(1, 9), st.integers(0, 50))
def test_round_trip(tmp_path: Path, name: str, n: int, seed: int) -> None:
    """Law: read(export(graph)) == graph, in every format that can hold it, in names' order whatever it is."""
    names = [f"lab.{i}" for i in range(n)][::-1]
    graph = build_graph(name, names, seed)
    for suffix in SUFFIXES:
        if suffix == "toml" and graph.is_directed():
            continue
        same(read_graph(export(graph, tmp_path / f"graph.{suffix}")), graph)
    export(graph, tmp_path / "pi.json", "dimat")
    back = read_graph(tmp_path / "pi.json", agents=names)
    assert list(back) == names
    assert set(back.to_directed().edges()) == set(graph.to_directed().edges())  # all links two-way: read as undirected
    assert np.allclose(back.graph["pi"], mixing_matrix(graph))


def test_topology_round_trip_through_a_map(tmp_path: Path) -> None:
    """Law: addresses, samples, schedule and mixing survive a TOML map."""
    (tmp_path / "map.toml").write_text(
        'edges = [["b", "a"], ["b", "c"]]\nmixing = { name = "samples", options = { lazy = 0.25 } }\n'
        '[[agents]]\nname = "a"\nsamples = 3\n[[agents]]\nname = "b"\naddresses = ["h:1", "[::1]:2"]\nsamples = 2\n'
        '[[agents]]\nname = "c"\nsamples = 9\n'
    )
    first = build_topology(TopologyConfig(map="map.toml"), 0, tmp_path)
    export(first, tmp_path / "copy.toml")
    second = build_topology(TopologyConfig(map="copy.toml"), 0, tmp_path)
    assert first.names == second.names == ("a", "b", "c")
    assert first.addresses == second.addresses == {"b": ("h:1", "[::1]:2")}
    assert first.samples == second.samples == {"a": 3, "b": 2, "c": 9}
    assert np.array_equal(first.schedule.mixing(1), second.schedule.mixing(1))
    for schedule in ({"name": "base-k", "options": {"k": 2}}, {"name": "cycle", "options": {"graphs": ["star"] * 2}}):
        made = build_topology(TopologyConfig.model_validate({"agents": 6, "schedule": schedule}))
        copy = build_topology(TopologyConfig(map=str(export(made, tmp_path / "varying.toml"))))
        assert copy.schedule.period == made.schedule.period
        assert all(np.array_equal(copy.schedule.mixing(r), made.schedule.mixing(r)) for r in range(1, 5))


def test_matrix_survives_export(tmp_path: Path) -> None:
    """Law: an explicit mixing matrix is written into dimat JSON and TOML, lazy part included."""
    values = [[0.5, 0.5, 0.0], [0.25, 0.5, 0.25], [0.0, 0.5, 0.5]]
    mixing = {"name": "matrix", "options": {"values": values, "lazy": 0.5}}
    made = build_topology(TopologyConfig.model_validate({"graph": "path", "agents": 3, "mixing": mixing}))
    for file in (export(made, tmp_path / "m.toml"), export(made, tmp_path / "m.json", "dimat")):
        key = "map" if file.suffix == ".toml" else "file"
        again = build_topology(TopologyConfig.model_validate({key: str(file)}))
        assert np.allclose(again.schedule.mixing(1), 0.5 * np.eye(3) + 0.5 * np.array(values))


DIMAT = [
    # 0/1 rows with and without the diagonal, neighbour lists with and without self, aligned or dense weights
    ([[1, 1, 0], [1, 1, 1], [0, 1, 1]], [[0.5, 0.5, 0], [0.3, 0.4, 0.3], [0, 0.5, 0.5]]),
    ([[0, 1, 0], [1, 0, 1], [0, 1, 0]], [[0.5, 0.5, 0], [0.3, 0.4, 0.3], [0, 0.5, 0.5]]),
    ([[0, 1], [0, 1, 2], [2, 1]], [[0.5, 0.5], [0.3, 0.4, 0.3], [0.5, 0.5]]),
    ([[1], [0, 2], [1]], [[0.5, 0.5, 0], [0.3, 0.4, 0.3], [0, 0.5, 0.5]]),
]


@pytest.mark.parametrize(("connectivity", "pi"), DIMAT)
def test_connectivity_files(tmp_path: Path, connectivity: list, pi: list) -> None:
    """Reference: the brief; all four spellings are the path with the same weights, used without being asked for."""
    (tmp_path / "net.json").write_text(json.dumps({"connectivity": connectivity, "pi": pi}))
    made = build_topology(TopologyConfig(file="net.json"), 0, tmp_path)
    assert set(made.graph.edges()) == {("agent-0", "agent-1"), ("agent-1", "agent-2")}
    assert made.schedule.row(1, "agent-1") == {"agent-1": 0.4, "agent-0": 0.3, "agent-2": 0.3}
    asked = build_topology(TopologyConfig.model_validate({"file": "net.json", "mixing": "metropolis"}), 0, tmp_path)
    assert asked.schedule.row(1, "agent-1")["agent-0"] == pytest.approx(1 / 3)


def test_one_way_connectivity_is_directed(tmp_path: Path) -> None:
    """Reference: row i says whom i hears."""
    (tmp_path / "net.json").write_text(json.dumps({"connectivity": [[2], [0], [1]]}))
    graph = read_graph(tmp_path / "net.json")
    assert set(graph.edges()) == {("agent-2", "agent-0"), ("agent-0", "agent-1"), ("agent-1", "agent-2")}


def test_foreign_files(tmp_path: Path) -> None:
    """Reference: networkx's own writers, numbered nodes; numbers become agent-0 … or the names of the map."""
    graph = nx.cycle_graph(4)
    nx.write_graphml(graph, tmp_path / "a.graphml")
    nx.write_gml(graph, tmp_path / "a.gml")
    nx.write_edgelist(graph, tmp_path / "a.edges", data=False)
    tree = {"nodes": [{"id": i} for i in graph], "links": [{"source": u, "target": v} for u, v in graph.edges()]}
    (tmp_path / "a.json").write_text(json.dumps(tree))
    (tmp_path / "a.csv").write_text("# who, with whom\n0,1\n1,2\n2, 3\n\n3,0\n")
    for suffix in ("graphml", "gml", "edges", "json", "csv"):
        assert list(read_graph(tmp_path / f"a.{suffix}")) == [f"agent-{i}" for i in range(4)]
        named = read_graph(tmp_path / f"a.{suffix}", agents=["d", "c", "b", "a"])
        assert list(named) == ["d", "c", "b", "a"]
        assert {frozenset(e) for e in named.edges()} == {frozenset(e) for e in ("dc", "cb", "ba", "ad")}
    (tmp_path / "b.edges").write_text("x -> y\ny -> x\n")
    assert read_graph(tmp_path / "b.edges").is_directed()


FAULTS = [
    ("a.edges", "a b\nc d\n", r"a\.edges: the graph falls into 2 components: \{a, b\}, \{c, d\}"),
    ("a.edges", "a b\nb c\na a\n", "agent 'a' is linked to itself"),
    ("a.edges", "a b\nb a\n", "the link b–a is given twice"),
    ("a.edges", "a b c\n", "line 1: expected two agents"),
    ("a.edges", "a ->\n", "line 1: expected two agents"),
    ("a.edges", "a b\nb -> a\n", "mixed"),
    ("a.edges", "", "at least one agent"),
    ("a.json", "[1]", "expected a JSON object"),
    ("a.json", "{", "is not a json graph: JSONDecodeError"),
    ("a.json", '{"nodes": []}', "expected node-link JSON"),
    ("a.json", '{"nodes": [{"id": "a"}, {"id": "a"}], "edges": []}', "agent 'a' is there twice"),
    (
        "a.json",
        '{"nodes": [{"id": "alpha"}], "edges": [{"source": "alpha", "target": "alhpa"}]}',
        "did you mean 'alpha'",
    ),
    ("a.json", '{"nodes": [{"name": "a"}], "edges": []}', "is not a json graph: KeyError: 'id'"),
    ("a.json", '{"multigraph": true, "nodes": [], "edges": []}', "multigraph"),
    ("a.json", '{"connectivity": [[1], [3]]}', "row 1 must hold different agent numbers from 0 to 1"),
    ("a.json", '{"connectivity": [[1, 1, 1], [0]]}', "row 0 must hold different agent numbers"),
    ("a.json", '{"connectivity": [[0, 1], [1, 0]], "pi": [[1, 0]]}', "pi has 1 rows, connectivity has 2"),
    ("a.json", '{"connectivity": [[1], [0]], "pi": [[1, 0, 0], [1]]}', "pi row 0 has 3 weights"),
    ("a.json", '{"connectivity": 3}', "is not a json graph: TypeError"),
    ("a.graphml", "<graphml", "is not a graphml graph"),
    ("a.gml", "graph [", "is not a gml graph"),
    ("a.npz", "", "no graph format has the suffix '.npz'"),
    ("a.toml", 'schedule = "base-k"\nagents = 3', "the map gives no graph"),
]


@pytest.mark.parametrize(("name", "text", "message"), FAULTS)
def test_faulty_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    """Reference: the brief; one line that names the file and what is wrong."""
    (tmp_path / name).write_text(text)
    with pytest.raises(TopologyError, match=message) as caught:
        read_graph(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_missing_files_counts_and_formats(tmp_path: Path) -> None:
    """Reference: the brief."""
    with pytest.raises(TopologyError, match=r"cannot read .*none\.gml: No such file"):
        read_graph(tmp_path / "none.gml")
    with pytest.raises(TopologyError, match="unknown graph format 'gmll'; did you mean 'gml'"):
        read_graph(tmp_path / "none", "gmll")
    file = export(build_graph("ring", 4), tmp_path / "ring.gml")
    with pytest.raises(TopologyError, match="the graph has 4 agents, but agents = 5"):
        read_graph(file, agents=5)
    with pytest.raises(TopologyError, match="unknown agent 'agent-0' in the graph"):
        read_graph(file, agents=["a", "b", "c", "d"])
    nx.write_gml(nx.MultiGraph([("a", "b"), ("a", "b")]), tmp_path / "multi.gml")
    with pytest.raises(TopologyError, match="parallel"):
        read_graph(tmp_path / "multi.gml")
    with pytest.raises(TopologyError, match="holds undirected links only"):
        export(build_graph("exponential", 4), tmp_path / "x.toml")


@pytest.mark.parametrize("name", ["x.json", "x.graphml", "x.gml", "x.svg"])
def test_a_file_that_cannot_be_written_is_as_it_was(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk leaves no half of a graph or picture under its name, and no temporary file."""
    if name.endswith("svg"):
        pytest.importorskip("matplotlib")
    graph, write = build_graph("ring", 4), draw_graph if name.endswith("svg") else export
    with pytest.raises(DataError, match="cannot write"):
        write(graph, tmp_path / "no" / name)
    (tmp_path / name).write_text("before")
    opened = Path.open

    def full(path: Path, *args: Any, **options: Any) -> Any:
        return opened(Path("/dev/full") if path.parent == tmp_path else path, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        with pytest.raises(DataError, match=r"cannot write .*: No space left on device"):
            write(graph, tmp_path / name)
    assert (tmp_path / name).read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def hook(tmp_path: Path, text: str, name: str = "net.py:graph", agents: int | None = None) -> Topology:
    (tmp_path / "net.py").write_text(text)
    return build_topology(TopologyConfig(python=name, agents=agents), 0, tmp_path)


def test_python_graphs(tmp_path: Path) -> None:
    """Reference: the brief; nodes may be numbers or names, directed or not."""
    made = hook(tmp_path, "import networkx as nx\ndef graph():\n    return nx.cycle_graph(5)\n", agents=5)
    assert made.names == ("agent-0", "agent-1", "agent-2", "agent-3", "agent-4")
    made = hook(tmp_path, "import networkx as nx\ndef graph():\n    return nx.DiGraph([('b', 'a'), ('a', 'b')])\n")
    assert made.names == ("b", "a")
    assert made.graph.is_directed()


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("import no_such_module_xyz\n", "net.py:graph", "cannot import .*net.py: ModuleNotFoundError: No module named"),
        ("x = (\n", "net.py:graph", "cannot import .*net.py: SyntaxError"),
        ("x = 1\n", "net.py:graph", "has no function 'graph'"),
        ("def graph():\n    return [1]\n", "net.py:graph", "returned list, not a networkx Graph"),
        ("def graph():\n    raise ValueError('no\\nluck')\n", "net.py:graph", "failed: ValueError: no luck"),
        ("", "none.py:graph", "there is no file"),
        ("", "net:graph", "expected file.py:function"),
        ("", "net.py", "expected file.py:function"),
    ],
)
def test_faulty_hooks(tmp_path: Path, text: str, name: str, message: str) -> None:
    """Reference: the brief, HookError with one clear line."""
    with pytest.raises(HookError, match=message) as caught:
        hook(tmp_path, text, name)
    assert "\n" not in str(caught.value)


def test_python_graphs_are_checked(tmp_path: Path) -> None:
    """Reference: the brief; the graph of a function passes the checks of any other."""
    with pytest.raises(TopologyError, match="2 components"):
        hook(tmp_path, "import networkx as nx\ndef graph():\n    return nx.empty_graph(2)\n")
    with pytest.raises(TopologyError, match="agent '1' is there twice"):
        hook(tmp_path, "import networkx as nx\ndef graph():\n    return nx.Graph([(1, '1')])\n")
    with pytest.raises(TopologyError, match="has 3 agents, but agents = 4"):
        hook(tmp_path, "import networkx as nx\ndef graph():\n    return nx.path_graph(3)\n", agents=4)
