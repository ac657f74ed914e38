"""`dimat topology …`: graphs and schedules described, checked, drawn and written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dimat.config import TopologyConfig, load_experiment, quoted
from dimat.errors import ConfigError
from dimat.json_text import to_json
from dimat.topology import (
    build_topology,
    check,
    draw_graph,
    export,
    list_graphs,
    list_mixings,
    list_schedules,
    summarise,
)
from dimat.topology.analysis import DENSE
from dimat.ui.text import Table, as_text

if TYPE_CHECKING:
    from dimat.topology import Topology

LEFT_OUT = f"- (for up to {DENSE} agents)"
FILES = {".graphml", ".gml", ".json", ".edges", ".edgelist", ".txt", ".csv"}


def open_topology(spec: str, agents: int | None, settings: Sequence[str]) -> Topology:
    """Build a topology from a graph's name, a map (TOML), a graph file, or `file.py:function`.

    `settings`: keys of [topology] as KEY=VALUE. Raises ConfigError or a related error.
    """
    path = Path(spec)
    if spec.rpartition(":")[0].endswith(".py"):
        source = f"python={quoted(spec)}"
    elif path.suffix == ".toml":
        source = f"map={quoted(spec)}"
    elif path.suffix in FILES or path.is_file():
        source = f"file={quoted(spec)}"
    else:
        source = f"graph={quoted(spec)}"
    count = [f"topology.agents={agents}"] if agents is not None else []
    config: TopologyConfig = load_experiment(
        None, [f"topology.{source}", *count, *(f"topology.{item}" for item in settings)], env={}
    ).topology
    return build_topology(config)


def describe(topology: Topology, *, as_json: bool) -> str:
    """Return the figures of a topology as text or JSON."""
    summary = summarise(topology.schedule)
    if as_json:
        return to_json({"agents": list(topology.names), **asdict(summary), "count": summary.agents})

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    peers = (
        f"{summary.min_peers}"
        if summary.min_peers == summary.max_peers
        else (f"{summary.min_peers} to {summary.max_peers}")
    )
    n = summary.agents
    longest = f"{summary.diameter}"
    if summary.diameter_from < n:
        longest = f"at least {longest}: searched from {summary.diameter_from} of {n} agents"
    mixing = shown(summary.rounds_to_consensus)
    if summary.rounds_to_consensus is None:
        tried = f"more than the {summary.rounds_tried} that were tried"
        mixing = tried if summary.rounds_tried else LEFT_OUT
    rows = (
        ("agents", str(summary.agents)),
        ("links", f"{summary.links} {'one-way' if summary.directed else 'undirected'}"),
        ("schedule", topology.schedule_config.name + (f", period {summary.period}" if summary.period else "")),
        ("mixing", topology.mixing_config.name),
        ("peers heard per round", peers),
        ("models sent per agent and round", shown(summary.models_sent)),
        ("diameter", longest),
        ("|λ₂|", shown(summary.lambda_2) if n <= DENSE else LEFT_OUT),
        ("spectral gap", shown(summary.spectral_gap) if n <= DENSE else LEFT_OUT),
        ("rounds to 1e-3 consensus", mixing),
        ("keeps the mean", "yes" if summary.doubly_stochastic else "no (not doubly stochastic)"),
    )
    return "\n".join(as_text(Table("", ("", ""), rows, left=frozenset({0, 1})))).strip("\n")


def check_topology(topology: Topology) -> str:
    """Check a topology and say so; TopologyError names what is wrong."""
    check(topology)
    return f"{len(topology.names)} agents, connected; mixing rows sum to 1 and lie on the links"


def draw_topology(topology: Topology, file: Path) -> None:
    """Draw the base graph, or the union of a schedule's links, into a PNG or SVG file."""
    if file.suffix not in (".png", ".svg"):
        raise ConfigError(f"cannot draw to {file}: the name must end in .png or .svg")
    draw_graph(topology.graph, file)


def export_topology(topology: Topology, file: Path) -> None:
    """Write a topology in the format of the file's suffix."""
    export(topology, file)


def catalogue(*, as_json: bool, width: int | None = None) -> str:
    """Return all graphs, schedules and mixing rules with their options; `width`: columns of the terminal."""
    kinds = {"graphs": list_graphs(), "schedules": list_schedules(), "mixing rules": list_mixings()}
    if as_json:
        return to_json({kind: [asdict(entry) for entry in entries] for kind, entries in kinds.items()}, default=str)
    lines: list[str] = []
    for kind, entries in kinds.items():
        rows = tuple(
            (entry.name, ", ".join(f"{k}={v}" for k, v in entry.options.items()), entry.summary) for entry in entries
        )
        lines += as_text(Table(kind, ("name", "options", "what it is"), rows, left=frozenset({0, 1, 2})), width)
        lines.append("")
    return "\n".join(lines).strip("\n")
