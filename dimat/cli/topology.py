"""`dimat topology …`: graphs, schedules and mixing weights."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dimat.cli.app import topology
from dimat.cli.shared import Json, say, show

Spec = Annotated[str, Parameter(help="Name of a graph (see `dimat topology list`) or a file.")]
Agents = Annotated[int | None, Parameter(name=["--agents", "-n"], help="Number of agents.")]
Options = Annotated[
    tuple[str, ...],
    Parameter(name="--set", negative="", consume_multiple=False, help="Key of [topology], e.g. options.degree=4."),
]


@topology.command(name="list")
def topology_list(*, as_json: Json = False) -> int:
    """List graphs, schedules and mixing rules, with their options."""
    from dimat.ui.terminal.topology import catalogue

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    show(catalogue(as_json=as_json, width=width))
    return 0


@topology.command(name="show")
def topology_show(
    spec: Spec,
    /,
    *,
    agents: Agents = None,
    set_: Options = (),
    draw: Annotated[Path | None, Parameter(help="Write a picture (PNG or SVG) to this file.")] = None,
    as_json: Json = False,
) -> int:
    """Show a topology's degree, diameter, spectral gap, rounds to consensus and cost."""
    from dimat.ui.terminal.topology import describe, draw_topology, open_topology

    opened = open_topology(spec, agents, set_)
    if draw is not None:
        draw_topology(opened, draw)
        say(f"wrote {draw}")
    show(describe(opened, as_json=as_json))
    return 0


@topology.command(name="check")
def topology_check(spec: Spec, /, *, agents: Agents = None, set_: Options = ()) -> int:
    """Check a topology: it is connected, rows of the mixing matrix sum to 1, and only edges have weights."""
    from dimat.ui.terminal.topology import check_topology, open_topology

    say(check_topology(open_topology(spec, agents, set_)))
    return 0


@topology.command(name="export")
def topology_export(
    spec: Spec,
    file: Annotated[Path, Parameter(help="File to write; its suffix selects the format.")],
    /,
    *,
    agents: Agents = None,
    set_: Options = (),
) -> int:
    """Write a topology to a file: TOML map, GraphML, GML, node-link JSON or edge list."""
    from dimat.ui.terminal.topology import export_topology, open_topology

    export_topology(open_topology(spec, agents, set_), file)
    say(f"wrote {file}")
    return 0
