"""Writes topologies as GraphML, GML, JSON, edge list, {connectivity, pi} or TOML map."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dimat.errors import TopologyError
from dimat.toml_text import toml_value
from dimat.topology.files import format_of
from dimat.topology.mixing import Mixer, links_of, mixing_matrix
from dimat.topology.network_map import Topology
from dimat.weights.durable import write_bytes

if TYPE_CHECKING:
    import networkx as nx


def export(target: nx.Graph[str] | Topology, path: str | Path, format: str | None = None) -> Path:
    """Write a graph or topology to a file and return the path.

    `format` is graphml, gml, json, edges, dimat or toml; by default the path's suffix selects it. `dimat` is
    {"connectivity": 0/1 rows, "pi": mixing rows}, where row i gives the agents that agent i receives from; the weights
    are those of round 1 for a topology, Metropolis weights for a graph. `toml` is a network map with the addresses,
    samples, schedule and mixing of the topology, if any; it holds undirected links only. Reading the file returns a
    graph with the same names, order and links. Raises TopologyError for an unknown format, and for a topology that the
    format cannot express; DataError if the file cannot be written, which is then as it was.
    """
    kind = format_of(path, format)
    graph = target.graph if isinstance(target, Topology) else target
    data = _library(graph, kind) if kind in ("graphml", "gml") else _text(target, graph, kind).encode()
    write_bytes(Path(path), data, durable=False)
    return Path(path)


def _library(graph: nx.Graph[str], kind: str) -> bytes:
    import networkx as nx

    bare: nx.Graph[str] = nx.DiGraph() if graph.is_directed() else nx.Graph()
    bare.add_nodes_from(list(graph))  # names and links only: the format may not support dimat's attributes
    bare.add_edges_from(list(graph.edges()))
    buffer = BytesIO()
    if kind == "graphml":
        nx.write_graphml(bare, buffer)
    else:
        nx.write_gml(bare, buffer)
    return buffer.getvalue()


def _text(target: nx.Graph[str] | Topology, graph: nx.Graph[str], kind: str) -> str:
    if kind == "toml":
        return _toml(target, graph)
    if kind == "edges":
        arrow = " -> " if graph.is_directed() else " "
        return "\n".join([*graph, *(f"{u}{arrow}{v}" for u, v in graph.edges())]) + "\n"
    if kind == "dimat":
        return _dimat(target, graph)
    tree = {
        "directed": graph.is_directed(),
        "multigraph": False,
        "graph": {},
        "nodes": [{"id": name} for name in graph],
        "edges": [{"source": u, "target": v} for u, v in graph.edges()],
    }
    return json.dumps(tree, indent=1) + "\n"


def _dimat(target: nx.Graph[str] | Topology, graph: nx.Graph[str]) -> str:
    if isinstance(target, Topology):
        links, pi = target.schedule.links(1), target.schedule.mixing(1)
    else:
        links, pi = links_of(graph), mixing_matrix(graph, Mixer())
    n = len(links.names)
    heard = [set(sources) for sources in links.sources]
    rows = [[int(j in who) for j in range(n)] for who in heard]
    lines = [f' "connectivity": {_rows(rows)}', f' "pi": {_rows(pi.tolist())}']
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _rows(rows: Sequence[Sequence[float]]) -> str:
    return "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n ]"


def _toml(target: nx.Graph[str] | Topology, graph: nx.Graph[str]) -> str:
    lines = ["# Network map of dimat: who is in the network, who exchanges with whom."]
    given = target.base if isinstance(target, Topology) else graph
    if given is not None:
        if given.is_directed():
            raise TopologyError("a network map holds undirected links only; export a directed graph as graphml or json")
        lines += ["edges = [", *(f"  [{toml_value(u)}, {toml_value(v)}]," for u, v in given.edges()), "]"]
    if isinstance(target, Topology):
        mixing: dict[str, Any] = {"name": target.mixing_config.name, "options": dict(target.mixing_config.options)}
        if mixing["name"] == "matrix":
            mixing["options"] = {"values": target.schedule.mixing(1).tolist()}
        schedule = {"name": target.schedule_config.name, "options": dict(target.schedule_config.options)}
        lines += [f"schedule = {toml_value(schedule)}", f"mixing = {toml_value(mixing)}"]
    for name in graph:
        lines += ["", "[[agents]]", f"name = {toml_value(name)}"]
        if isinstance(target, Topology):
            if name in target.addresses:
                lines.append(f"addresses = {toml_value(target.addresses[name])}")
            if name in target.samples:
                lines.append(f"samples = {target.samples[name]}")
    return "\n".join(lines) + "\n"
