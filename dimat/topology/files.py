"""Graphs from files and functions: GraphML, GML, JSON, edge lists, {connectivity, pi}.

Whatever a source calls its vertices, the result is a networkx graph whose nodes are agent names in a stable order:
labels that are just the numbers 0 … n-1 become `agent-0` … (or the names of the map that points to the file).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dimat.errors import HookError, TopologyError, unknown_name
from dimat.hooks import load_hook, user_code
from dimat.reading import parse_json, read_text
from dimat.topology.graphs import agent_names, check_graph

if TYPE_CHECKING:
    import networkx as nx

    AnyGraph = nx.Graph[Any]

FORMATS = {
    ".graphml": "graphml",
    ".xml": "graphml",
    ".gml": "gml",
    ".json": "json",
    ".edges": "edges",
    ".edgelist": "edges",
    ".txt": "edges",
    ".csv": "edges",
    ".toml": "toml",
}
"""Formats by file suffix; "dimat" ({connectivity, pi}) is a .json as well and is told by its keys."""


def format_of(path: str | Path, format: str | None = None) -> str:
    """Return the format's name: as given, else by suffix; TopologyError for others."""
    known = {*FORMATS.values(), "dimat"}
    if format is not None:
        if format not in known:
            raise TopologyError(unknown_name("graph format", format, known))
        return format
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise TopologyError(f"{path}: no graph format has the suffix {suffix!r} (known: {', '.join(sorted(FORMATS))})")
    return FORMATS[suffix]


def from_python(hook: str, folder: Path, agents: int | Sequence[str] | None = None) -> nx.Graph[str]:
    """Call `file.py:function` (relative to `folder`) without arguments and return its networkx graph, checked.

    Raises HookError if the file cannot be imported, has no such function, or returns anything but a networkx graph.
    """
    import networkx as nx

    if not hook.rpartition(":")[0].endswith(".py"):
        raise HookError(f"python = {hook!r}: expected file.py:function, e.g. two_clusters.py:graph")
    make = load_hook(hook, folder, "python =", anew=True)
    with user_code(f"python = {hook!r} failed"):
        graph = make()
    if not isinstance(graph, nx.Graph):
        raise HookError(f"{hook} returned {type(graph).__name__}, not a networkx Graph or DiGraph")
    return named(cast("AnyGraph", graph), agents, hook)


def from_edges(
    edges: Iterable[tuple[str | int, str | int]], agents: int | Sequence[str] | None = None
) -> nx.Graph[str]:
    """Return the undirected graph of explicit edges between names or indices, checked.

    Without `agents`, indices run to the largest one, and names count in order of appearance. TopologyError for
    unknown agents, self-loops and edges given twice.
    """
    pairs = [(u, v) for u, v in edges]
    mentioned = list(dict.fromkeys(x for pair in pairs for x in pair))
    numbers = [x for x in mentioned if isinstance(x, int)]
    if agents is not None:
        names = agent_names(agents) if isinstance(agents, int) else tuple(agents)
    elif numbers:
        names = agent_names(max(numbers) + 1)
    else:
        names = tuple(map(str, mentioned)) or agent_names(1)
    if isinstance(agents, int) and not numbers and not set(mentioned) <= set(names):
        names = tuple(map(str, mentioned))
        _check_count("edges", len(names), agents)
    known = set(names)
    ends = [(_agent(u, names, known), _agent(v, names, known)) for u, v in pairs]
    return _checked(_simple(names, ends, directed=False, where="edges"), "edges")


def named(graph: AnyGraph, agents: int | Sequence[str] | None, where: str) -> nx.Graph[str]:
    """Return the graph on agent names, in the order of `agents` (or of its own nodes), checked."""
    labels = [str(node) for node in graph]
    if len(set(labels)) < len(labels):
        twice = next(label for i, label in enumerate(labels) if label in labels[:i])
        raise TopologyError(f"{where}: agent {twice!r} is there twice")
    if graph.is_multigraph():
        raise TopologyError(f"{where}: the graph has parallel edges (a multigraph); give each link once")
    if isinstance(agents, int):
        _check_count(where, len(labels), agents)
    numbered = set(labels) == {str(i) for i in range(len(labels))}
    if agents is not None and not isinstance(agents, int):
        wanted = tuple(agents)
    else:
        wanted = agent_names(len(labels)) if numbered else tuple(labels)
    known = set(wanted)
    by_number = numbered and set(labels) != known
    if not by_number:
        stranger = next((label for label in labels if label not in known), None)
        if stranger is not None:
            raise TopologyError(f"{where}: {unknown_name('agent', stranger, wanted, 'the graph')}")
    _check_count(where, len(labels), len(wanted))
    rename = {node: wanted[int(str(node))] if by_number else str(node) for node in graph}
    ends = [(rename[u], rename[v]) for u, v in graph.edges()]
    result = _simple(wanted, ends, graph.is_directed(), where)
    if "pi" in graph.graph:
        at = {rename[node]: i for i, node in enumerate(graph)}
        pi = graph.graph["pi"]
        result.graph["pi"] = [[pi[at[u]][at[v]] for v in wanted] for u in wanted]
    return _checked(result, where)


def _simple(names: Sequence[str], ends: Sequence[tuple[str, str]], directed: bool, where: str) -> nx.Graph[str]:
    import networkx as nx

    graph: nx.Graph[str] = nx.DiGraph() if directed else nx.Graph()
    graph.add_nodes_from(names)
    for u, v in ends:
        if graph.has_edge(u, v):
            raise TopologyError(f"{where}: the link {u}–{v} is given twice")
        graph.add_edge(u, v)
    return graph


def _checked(graph: nx.Graph[str], where: str) -> nx.Graph[str]:
    try:
        check_graph(graph)
    except TopologyError as error:
        raise TopologyError(f"{where}: {error}") from None
    return graph


def _check_count(where: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise TopologyError(f"{where}: the graph has {found} agents, but agents = {wanted}; make them agree")


def _agent(end: str | int, names: tuple[str, ...], known: set[str]) -> str:
    if isinstance(end, int):
        if not 0 <= end < len(names):
            raise TopologyError(f"edges: there is no agent number {end}; {len(names)} agents count from 0")
        return names[end]
    if end not in known:
        raise TopologyError(unknown_name("agent", end, names, "edges"))
    return end


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def parse_graph(path: Path, kind: str) -> AnyGraph:
    """Parse a file of the format `kind` as it is; raises TopologyError, naming the file, if it is not one."""
    import networkx as nx

    try:
        if kind == "graphml":
            return nx.read_graphml(path, node_type=str)
        if kind == "gml":
            return nx.read_gml(path)
        text = read_text(path, TopologyError)
        return _edge_list(text) if kind == "edges" else _json(parse_json(text), kind)
    except TopologyError as error:
        raise TopologyError(f"{path}: {error}") from None
    except OSError as error:
        raise TopologyError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # parsers of three formats, each with errors of its own
        raise TopologyError(f"{path} is not a {kind} graph: {_one_line(error)}") from error


def _edge_list(text: str) -> AnyGraph:
    """Parse lines `a b` or `a,b` (undirected) or `a -> b`; `#` starts a comment, one name alone is an agent."""
    names: dict[str, None] = {}
    ends: list[tuple[str, str]] = []
    arrows: set[bool] = set()
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].replace(",", " ").replace("->", " -> ").split()
        if not words:
            continue
        directed = words[1:2] == ["->"]
        nodes = [words[0], *words[2:]] if directed else words
        if len(nodes) > 2 or "->" in nodes or (directed and len(nodes) < 2):
            raise TopologyError(f"line {number}: expected two agents, 'a b' or 'a -> b', not {line.strip()!r}")
        names.update(dict.fromkeys(nodes))
        if len(nodes) == 2:
            ends.append((nodes[0], nodes[1]))
            arrows.add(directed)
    if len(arrows) > 1:
        raise TopologyError("'a b' and 'a -> b' are mixed; write a two-way link of a directed graph as two arrows")
    return _simple(tuple(names), ends, True in arrows, "edge list")


def _json(tree: Any, kind: str) -> AnyGraph:
    if not isinstance(tree, dict):
        raise TopologyError("expected a JSON object")
    table = cast("dict[str, Any]", tree)
    if kind == "dimat" or "connectivity" in table:
        return _connectivity(table)
    nodes, links = table.get("nodes"), table.get("edges", table.get("links"))
    if not isinstance(nodes, list) or not isinstance(links, list):
        raise TopologyError('expected node-link JSON {"nodes": […], "edges": […]} or {"connectivity": […], "pi": […]}')
    if table.get("multigraph"):
        raise TopologyError("the graph is a multigraph; give each link once")
    names = [str(node["id"]) for node in cast("list[dict[str, Any]]", nodes)]
    if len(set(names)) < len(names):
        raise TopologyError(f"agent {next(x for i, x in enumerate(names) if x in names[:i])!r} is there twice")
    ends = [(str(link["source"]), str(link["target"])) for link in cast("list[dict[str, Any]]", links)]
    known = set(names)
    stranger = next((x for end in ends for x in end if x not in known), None)
    if stranger is not None:
        raise TopologyError(unknown_name("agent", stranger, names, "edges"))
    return _simple(names, ends, bool(table.get("directed")), "node-link JSON")


def _connectivity(table: dict[str, Any]) -> AnyGraph:
    """Parse {"connectivity": rows, "pi": rows}: row i says whom agent i hears, with which weights.

    Connectivity rows are n numbers 0 or 1 (a diagonal of ones is allowed), or lists of neighbours' numbers; rows of
    pi are n weights, or one weight per entry of that neighbour list. A one-way link makes the graph directed.
    """
    rows: list[list[int]] = table.get("connectivity", [])
    n = len(rows)
    as_matrix = all(len(row) == n and all(x in (0, 1) for x in row) for row in rows)
    heard = [[j for j, x in enumerate(row) if x] if as_matrix else [int(j) for j in row] for row in rows]
    for i, row in enumerate(heard):
        if any(not 0 <= j < n for j in row) or len(set(row)) < len(row):
            raise TopologyError(f"connectivity row {i} must hold different agent numbers from 0 to {n - 1}")
    ways = {(j, i) for i, row in enumerate(heard) for j in row if j != i}
    directed = any((i, j) not in ways for j, i in ways)
    ends = sorted(ways if directed else {(min(way), max(way)) for way in ways})
    graph = _simple(tuple(map(str, range(n))), [(str(u), str(v)) for u, v in ends], directed, "connectivity")
    pi: list[list[float]] | None = table.get("pi")
    if pi is not None:
        if len(pi) != n:
            raise TopologyError(f"pi has {len(pi)} rows, connectivity has {n}")
        graph.graph["pi"] = [_weights(row, heard[i], n, i) for i, row in enumerate(pi)]
    return graph


def _weights(row: Sequence[float], heard: Sequence[int], n: int, i: int) -> list[float]:
    if len(row) == n:
        return [float(x) for x in row]
    if len(row) != len(heard):
        raise TopologyError(f"pi row {i} has {len(row)} weights; give {n}, or one for each neighbour that is listed")
    weights = [0.0] * n
    for j, weight in zip(heard, row, strict=True):
        weights[j] = float(weight)
    return weights
