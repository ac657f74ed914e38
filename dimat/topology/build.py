"""Make a checked graph or topology from a configuration, a network map or a graph file.

`read_graph` reads one file; `build_topology` resolves a `TopologyConfig`, with the map that it names, to agents, graph
and schedule; `check` tells whether one can be used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dimat.config import NamedConfig, TopologyConfig, build
from dimat.errors import TopologyError
from dimat.seeds import derive_seed
from dimat.topology.files import format_of, from_edges, from_python, named, parse_graph
from dimat.topology.graphs import agent_names, build_graph, check_graph, check_links
from dimat.topology.mixing import Mixer
from dimat.topology.network_map import DEFAULT_AGENTS, DEFAULT_GRAPH, NetworkMap, Topology, check_names, load_map
from dimat.topology.rounds import check_schedule
from dimat.topology.schedule import Setting, make_schedule

if TYPE_CHECKING:
    import networkx as nx

    AnyGraph = nx.Graph[Any]


def read_graph(
    path: str | Path,
    format: str | None = None,
    agents: int | Sequence[str] | None = None,
    seed: int = 0,
    within: Sequence[Path] = (),
) -> nx.Graph[str]:
    """Read and check a graph; `agents` (a number, or names in order) must fit it.

    The mixing matrix of a {connectivity, pi} file becomes the graph attribute `pi`. Of a TOML map only the graph is
    used (`seed` is for maps that name a random one). `within`: the maps that led here, none of which may be named
    again. Raises TopologyError, naming the file, if it cannot be read or used.
    """
    kind = format_of(path, format)
    if kind == "toml":
        network = load_map(path)
        graph = graph_of(network, seed, (*within, Path(path)))
        if graph is None:
            raise TopologyError(f"{path}: the map gives no graph")
    else:
        graph = parse_graph(Path(path), kind)
    return named(graph, agents, str(path))


def graph_of(network: NetworkMap, seed: int = 0, within: Sequence[Path] = ()) -> nx.Graph[str] | None:
    """Return a map's graph, or None if it names neither graph, edges, file nor python and is not static. `within`:
    the map's own file after those that led to it."""
    return _graph(network.config, network.names or network.config.agents, seed, network.folder, within)


@dataclass(frozen=True)
class ResolvedMap:
    """A network map whose agents and graph are known. Its mixing weights come last: they may need sample counts, which
    are only known once the data are split among the agents."""

    network: NetworkMap
    names: tuple[str, ...]
    graph: nx.Graph[str] | None
    """None where the schedule makes its own from the names alone."""
    seed: int

    def topology(self, samples: Mapping[str, int] | None = None) -> Topology:
        """Return the checked topology. `samples`: the agents' sample counts, if known; they override the map's."""
        chosen = self.network.config
        counts = dict(self.network.samples if samples is None else samples)
        pi = self.graph.graph.get("pi") if self.graph is not None else None
        mixing = chosen.mixing
        if pi is not None and "mixing" not in chosen.model_fields_set:
            mixing = NamedConfig(name="matrix")  # a file's own mixing matrix holds unless another rule is asked for
        setting = Setting(
            self.names,
            self.graph,
            Mixer(mixing.name, mixing.options, counts or None, pi),
            derive_seed(self.seed, "topology", "schedule", chosen.schedule.name),
            partial(_resolve, names=self.names, seed=self.seed, folder=self.network.folder, limits=chosen),
        )
        schedule = make_schedule(setting, chosen.schedule.name, chosen.schedule.options)
        return Topology(self.names, schedule, self.graph, self.network.addresses, counts, chosen.schedule, mixing)


def resolve_map(config: TopologyConfig, seed: int = 0, folder: str | Path = ".") -> ResolvedMap:
    """Return the agents and the graph of a configuration; by default a ring of 5.

    `seed` is the experiment's root seed (random graphs and schedules draw from streams under it); relative paths start
    at `folder`. With `config.map` the map decides, but `schedule` and `mixing` set beside it override the map's.
    Raises TopologyError, HookError or ConfigError, in one line, if the configuration is impossible.
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
    graph = graph_of(network, seed, () if config.map is None else (Path(folder) / config.map,))
    if graph is not None:
        names = tuple(graph)
    else:
        names = network.names or agent_names(network.config.agents or DEFAULT_AGENTS)
    check_names(names, "topology")
    return ResolvedMap(network, names, graph, seed)


def build_topology(
    config: TopologyConfig,
    seed: int = 0,
    folder: str | Path = ".",
    samples: Mapping[str, int] | None = None,
) -> Topology:
    """Return the checked topology of a configuration. Arguments and errors are those of `resolve_map` and of
    `ResolvedMap.topology`, which it calls."""
    return resolve_map(config, seed, folder).topology(samples)


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
    config: TopologyConfig,
    agents: tuple[str, ...] | int | None,
    seed: int,
    folder: Path,
    within: Sequence[Path] = (),
) -> nx.Graph[str] | None:
    """Return the graph that a configuration gives, None if it gives none and the schedule needs none."""
    graph = _unbounded(config, agents, seed, folder, within)
    if graph is not None:
        check_agents(len(graph), config.most_agents)
        check_links(graph.number_of_edges(), config.most_links, "topology")
    return graph


def _unbounded(
    config: TopologyConfig,
    agents: tuple[str, ...] | int | None,
    seed: int,
    folder: Path,
    within: Sequence[Path],
) -> nx.Graph[str] | None:
    if config.options and config.graph is None and (config.edges or config.file or config.python):
        raise TopologyError("options belong to a generator (graph = …), not to edges, file or python")
    most = config.most_agents
    if config.edges is not None:
        check_agents(1 + max((end for pair in config.edges for end in pair if isinstance(end, int)), default=0), most)
        return from_edges(config.edges, agents)
    if config.file is not None:
        file = folder / config.file
        if any(_same_file(file, before) for before in within):
            raise TopologyError(f"{within[-1]}: file = {config.file!r} leads back to {file}; name a file with a graph")
        return read_graph(file, agents=agents, seed=seed, within=within)
    if config.python is not None:
        return from_python(config.python, folder, agents)
    if config.graph is not None:
        if agents is None:
            raise TopologyError(f"graph {config.graph!r} needs the number of agents: agents = {DEFAULT_AGENTS}, say")
        return build_graph(config.graph, agents, seed, config.options, config.most_links)
    if config.schedule.name == "static":
        return build_graph(DEFAULT_GRAPH, agents or DEFAULT_AGENTS, seed, config.options, config.most_links)
    if config.options:
        raise TopologyError("options belong to a generator: name it with graph = …")
    return None


def check_agents(count: int, most: int) -> None:
    """Raise TopologyError for more agents than `topology.most_agents`."""
    if count > most:
        raise TopologyError(f"topology: {count:,} agents are above most_agents = {most:,}; raise that for more")


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except (OSError, ValueError):  # one that is not there is told where it is read
        return False


def _resolve(entry: Any, names: tuple[str, ...], seed: int, folder: Path, limits: TopologyConfig) -> nx.Graph[str]:
    """Return the graph of one entry of schedule "cycle": a generator's name or a table as in a map."""
    if not isinstance(entry, str | Mapping):
        raise TopologyError(f"schedule 'cycle': an entry of graphs is a name or a table, not {entry!r}")
    tree: dict[str, Any] = {"graph": entry} if isinstance(entry, str) else dict(cast("Mapping[str, Any]", entry))
    extra = tree.keys() - {"graph", "options", "edges", "file", "python"}
    if extra:
        raise TopologyError(f"schedule 'cycle': unknown key {min(extra)!r} in graphs; use graph, options, edges, file")
    tree |= {"most_agents": limits.most_agents, "most_links": limits.most_links}
    graph = _graph(build(TopologyConfig, tree, "schedule 'cycle'"), names, seed, folder)
    if graph is None:
        raise TopologyError("schedule 'cycle': an entry of graphs names no graph")
    return graph
