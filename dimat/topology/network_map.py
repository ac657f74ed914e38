"""Network maps: the agents of a network, their addresses, and the links between them.

A map is a TOML file that says who is in the network (`[[agents]]` with name, addresses, samples) and how they are
linked (one of graph, edges, file, python; schedule; mixing). An experiment holds the same keys inline.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import Field

from dimat.config import NamedConfig, TopologyConfig, Tree, build, read_toml
from dimat.errors import TopologyError
from dimat.topology.rounds import Schedule

if TYPE_CHECKING:
    import networkx as nx

DEFAULT_GRAPH = "ring"
DEFAULT_AGENTS = 5
MOST_NAME_BYTES = 64
"""Longest name of an agent, in UTF-8: certificates hold no longer one (`dimat.net.limits.MAX_NAME_BYTES`)."""
_NAME = re.compile(r"\w[\w.-]*")
_ADDRESS = re.compile(r"(?:\[[0-9A-Fa-f:.]+(?:%[\w.-]+)?\]|[^\s:/\[\]]+):([0-9]{1,5})")


class MapAgent(Tree):
    """One `[[agents]]` table of a map."""

    name: str
    """Name, as in the agent's certificate and folder: letters, digits, `_`, `.` and `-`, at most 64 bytes of UTF-8."""
    addresses: tuple[str, ...] = ()
    """Where the agent listens: `host:port`, the first that answers is used."""
    samples: Annotated[int, Field(ge=1)] | None = None
    """Training samples that it holds, for mixing "samples"."""


@dataclass(frozen=True)
class NetworkMap:
    """A map file's content; `names` is empty if it only gives a number of agents, or none."""

    config: TopologyConfig
    names: tuple[str, ...] = ()
    addresses: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    samples: Mapping[str, int] = field(default_factory=dict[str, int])
    folder: Path = Path(".")
    """Folder that the map's relative paths are taken from."""
    version: int = 0
    """Grows with each change, where the map is published in the DHT; 0 where the map states none."""


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
    """Read a network map; raises ConfigError or TopologyError, naming file and key, for faults in it.

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
    check_names(names, str(path))
    owners: dict[str, str] = {}
    for entry in entries:
        for address in entry.addresses:
            parts = _ADDRESS.fullmatch(address)
            if parts is None or not 0 < int(parts[1]) < 65536:
                raise TopologyError(f"{path}: agent {entry.name!r}: address {address!r} is not host:port")
            if (owner := owners.setdefault(address.lower(), entry.name)) != entry.name:
                raise TopologyError(f"{path}: agents {owner!r} and {entry.name!r} have one address, {address!r}")
    return NetworkMap(
        config,
        names,
        {entry.name: entry.addresses for entry in entries if entry.addresses},
        {entry.name: entry.samples for entry in entries if entry.samples is not None},
        Path(path).parent,
        version,
    )


def check_alone(path: str | Path) -> None:
    """Raise TopologyError if a map needs other files or runs code: a map from the network must not."""

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
    """Return the same network with Metropolis weights, which need no sample counts: to list its agents."""
    mixing = config.mixing.model_copy(update={"name": "metropolis", "options": {}})
    return config.model_copy(update={"mixing": mixing})


def check_names(names: tuple[str, ...], where: str) -> None:
    """Raise TopologyError for a repeated name, or one that cannot name a folder and a certificate."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise TopologyError(f"{where}: agent {name!r} is there twice")
        if not _NAME.fullmatch(name):
            raise TopologyError(f"{where}: agent name {name!r} may only hold letters, digits, '_', '.' and '-'")
        if len(name.encode()) > MOST_NAME_BYTES:
            raise TopologyError(
                f"{where}: agent name {name[:40] + '…'!r} has {len(name.encode()):,} bytes of UTF-8; certificates hold "
                f"at most {MOST_NAME_BYTES}"
            )
        seen.add(name)
