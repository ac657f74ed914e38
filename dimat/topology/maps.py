"""Network maps and `build_topology`: from what an operator wrote to a checked topology.

A map is a TOML file that says who is in the network (`[[agents]]` with name, addresses, samples) and how they are
linked (one of graph, edges, file, python; schedule; mixing). An experiment holds the same keys inline.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import Field

from dimat.config import NamedConfig, TopologyConfig, Tree, build, read_toml
from dimat.errors import TopologyError
from dimat.seeds import derive_seed
from dimat.topology import files
from dimat.topology.graphs import agent_names, build_graph, check_graph
from dimat.topology.mixing import Mixer
from dimat.topology.rounds import Schedule, check_schedule
from dimat.topology.schedule import Setting, make_schedule

if TYPE_CHECKING:
    import networkx as nx

DEFAULT_GRAPH = "ring"
DEFAULT_AGENTS = 5
_NAME = re.compile(r"\w[\w.-]*")


class MapAgent(Tree):
    """One `[[agents]]` table of a map."""

    name: str
    """Name, as in the agent's certificate and folder: letters, digits, `_`, `.` and `-`."""
    addresses: tuple[str, ...] = ()
    """Where the agent listens: `host:port`, the first that answers is used."""
    samples: Annotated[int, Field(ge=1)] | None = None
    """Training samples that it holds, for mixing "samples"."""


@dataclass(frozen=True)
class NetworkMap:
    """What a map file says; `names` is empty where it only gives a number of agents, or none."""

    config: TopologyConfig
    names: tuple[str, ...] = ()
    addresses: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    samples: Mapping[str, int] = field(default_factory=dict[str, int])
    folder: Path = Path(".")
    """Folder that the map's relative paths are taken from."""
    version: int = 0
    """Grows with each change, where the map is published in the DHT; 0 where the map states none."""

    def graph(self, seed: int = 0) -> nx.Graph[str] | None:
        """Return the map's graph, or None where it names neither graph, edges, file nor python and is not static."""
        return _graph(self.config, self.names or self.config.agents, seed, self.folder)


@dataclass(frozen=True)
class Topology:
    """Who is in the network and who exchanges with whom, round by round."""

    names: tuple[str, ...]
    """Agents in their stable order; index i is row i of every mixing matrix."""
    schedule: Schedule
    base: nx.Graph[str] | None
    """The graph that was given; None where the schedule makes its own from the names alone."""
    addresses: Mapping[str, tuple[str, ...]]
    """`host:port`s of the agents that the map gives any for."""
    samples: Mapping[str, int]
    """Training samples of the agents whose count is known."""
    schedule_config: NamedConfig
    mixing_config: NamedConfig

    @cached_property
    def graph(self) -> nx.Graph[str]:
        """The base graph, or the union of all links that the schedule ever uses (dense if it draws from all pairs)."""
        return self.schedule.union() if self.base is None else self.base


def load_map(path: str | Path) -> NetworkMap:
    """Read a network map; ConfigError or TopologyError, naming file and key, for what is wrong in it.

    `agents` is a list of tables (name, addresses, samples), of names, or a number; relative paths in the map are taken
    from its folder.
    """
    tree = read_toml(path)
    if "map" in tree:
        raise TopologyError(f"{path}: a map cannot point to another map")
    version = tree.pop("version", 0)
    if type(version) is not int or not 0 <= version < 2**53:
        raise TopologyError(f"{path}: version must be a whole number from 1 on, not {version!r}")
    listed = tree.pop("agents", None)
    entries: list[MapAgent] = []
    if isinstance(listed, list):
        for number, entry in enumerate(cast("list[Any]", listed), start=1):
            table = {"name": entry} if isinstance(entry, str) else entry
            if not isinstance(table, Mapping):
                raise TopologyError(f"{path}: agents entry {number} must be a table with a name, not {entry!r}")
            entries.append(build(MapAgent, cast("Mapping[str, Any]", table), f"{path}: agents entry {number}"))
        if not entries:
            raise TopologyError(f"{path}: the map lists no agents")
        tree["agents"] = len(entries)
    elif listed is not None:
        tree["agents"] = listed
    config = build(TopologyConfig, tree, str(path))
    names = tuple(entry.name for entry in entries)
    _check_names(names, str(path))
    for entry in entries:
        for address in entry.addresses:
            host, sign, port = address.rpartition(":")
            if not (sign and host and port.isdecimal() and 0 < int(port) < 65536):
                raise TopologyError(f"{path}: agent {entry.name!r}: address {address!r} is not host:port")
    return NetworkMap(
        config,
        names,
        {entry.name: entry.addresses for entry in entries if entry.addresses},
        {entry.name: entry.samples for entry in entries if entry.samples is not None},
        Path(path).parent,
        version,
    )


def check_alone(path: str | Path) -> None:
    """Raise TopologyError where a map needs other files, or runs code: one that comes from elsewhere may not."""

    def look(tree: Any) -> None:
        if isinstance(tree, Mapping):
            table = cast("Mapping[str, Any]", tree)
            for key in ("map", "file", "python"):
                if key in table:
                    raise TopologyError(f"{path}: a map in the DHT has to stand alone: it may not name {key} = …")
            for value in table.values():
                look(value)
        elif isinstance(tree, list):
            for value in cast("list[Any]", tree):
                look(value)

    look(read_toml(path))


def without_mixing(config: TopologyConfig) -> TopologyConfig:
    """Return the same network mixed by Metropolis weights, which need no sample counts: to ask who is there."""
    mixing = config.mixing.model_copy(update={"name": "metropolis", "options": {}})
    return config.model_copy(update={"mixing": mixing})


def build_topology(
    config: TopologyConfig,
    seed: int = 0,
    folder: str | Path = ".",
    samples: Mapping[str, int] | None = None,
) -> Topology:
    """Return the checked topology of a configuration; a ring of 5 where it says nothing.

    `seed` is the experiment's root seed (random graphs and schedules draw from streams under it), `folder` the one
    that relative paths are taken from, `samples` the agents' sample counts where they are known (they win over the
    map's). With `config.map` the map decides; `schedule` and `mixing` that are set beside it win over the map's.
    Raises TopologyError, HookError or ConfigError, in one line, for anything that cannot be.
    """
    if config.map is None:
        network = NetworkMap(config, folder=Path(folder))
    else:
        network = load_map(Path(folder) / config.map)
        beside = {key: getattr(config, key) for key in ("schedule", "mixing") if key in config.model_fields_set}
        network = NetworkMap(
            network.config.model_copy(update=beside), network.names, network.addresses, network.samples, network.folder
        )
        if config.agents is not None and config.agents != (network.config.agents or config.agents):
            raise TopologyError(f"{config.map}: the map has {network.config.agents} agents, agents = {config.agents}")
        if config.agents is not None and network.config.agents is None:
            network = NetworkMap(network.config.model_copy(update={"agents": config.agents}), folder=network.folder)
    chosen = network.config
    counts = dict(network.samples if samples is None else samples)
    graph = network.graph(seed)
    if graph is not None:
        names = tuple(graph)
    else:
        names = network.names or agent_names(chosen.agents or DEFAULT_AGENTS)
    _check_names(names, "topology")
    pi = graph.graph.get("pi") if graph is not None else None
    mixing = chosen.mixing
    if pi is not None and "mixing" not in chosen.model_fields_set:
        mixing = NamedConfig(name="matrix")  # a file's own mixing matrix holds unless another rule is asked for
    setting = Setting(
        names,
        graph,
        Mixer(mixing.name, mixing.options, counts or None, pi),
        derive_seed(seed, "topology", "schedule", chosen.schedule.name),
        partial(_resolve, names=names, seed=seed, folder=network.folder),
    )
    schedule = make_schedule(setting, chosen.schedule.name, chosen.schedule.options)
    return Topology(names, schedule, graph, network.addresses, counts, chosen.schedule, mixing)


def check(topology: Topology | nx.Graph[str], rounds: int | None = None) -> None:
    """Raise TopologyError unless a topology, or a graph by itself, can be used.

    A graph has to be simple and connected; of a topology's schedule every row of `rounds` rounds (default: one
    period, at most 64) is checked too: weights >= 0, sum 1 within 1e-9, above zero exactly on links and self.
    """
    if isinstance(topology, Topology):
        if topology.base is not None:
            check_graph(topology.base)
        check_schedule(topology.schedule, rounds)
    else:
        check_graph(topology)


def _graph(
    config: TopologyConfig, agents: tuple[str, ...] | int | None, seed: int, folder: Path
) -> nx.Graph[str] | None:
    """Return the graph that a configuration gives, None if it gives none and the schedule needs none."""
    if config.options and config.graph is None and (config.edges or config.file or config.python):
        raise TopologyError("options belong to a generator (graph = …), not to edges, file or python")
    if config.edges is not None:
        return files.from_edges(config.edges, agents)
    if config.file is not None:
        return files.read_graph(folder / config.file, agents=agents, seed=seed)
    if config.python is not None:
        return files.from_python(config.python, folder, agents)
    if config.graph is not None:
        if agents is None:
            raise TopologyError(f"graph {config.graph!r} needs the number of agents: agents = {DEFAULT_AGENTS}, say")
        return build_graph(config.graph, agents, seed, config.options)
    if config.schedule.name == "static":
        return build_graph(DEFAULT_GRAPH, agents or DEFAULT_AGENTS, seed, config.options)
    if config.options:
        raise TopologyError("options belong to a generator: name it with graph = …")
    return None


def _resolve(entry: Any, names: tuple[str, ...], seed: int, folder: Path) -> nx.Graph[str]:
    """Return the graph of one entry of schedule "cycle": a generator's name or a table as in a map."""
    tree: dict[str, Any] = {"graph": entry} if isinstance(entry, str) else dict(entry)
    extra = tree.keys() - {"graph", "options", "edges", "file", "python"}
    if extra:
        raise TopologyError(f"schedule 'cycle': unknown key {min(extra)!r} in graphs; use graph, options, edges, file")
    graph = _graph(build(TopologyConfig, tree, "schedule 'cycle'"), names, seed, folder)
    if graph is None:
        raise TopologyError("schedule 'cycle': an entry of graphs names no graph")
    return graph


def _check_names(names: tuple[str, ...], where: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise TopologyError(f"{where}: agent {name!r} is there twice")
        if not _NAME.fullmatch(name):
            raise TopologyError(f"{where}: agent name {name!r} may only hold letters, digits, '_', '.' and '-'")
        seen.add(name)
