"""Pictures of graphs, with matplotlib (extra `plots`), no display needed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dimat.errors import ConfigError, TopologyError
from dimat.weights.durable import write_bytes

if TYPE_CHECKING:
    import networkx as nx
    from matplotlib.figure import Figure

CIRCULAR = ("ring", "exponential", "complete")
"""Generators drawn on a circle; all other graphs by a spring model."""
ROOMY = 24
"""Most agents whose names are written."""
SPRINGS = 1000
"""Most agents that a spring model places by itself: its time grows with their square."""
LINES = 20_000
"""Most links that are drawn; of more an even sample, and the picture says so."""


def draw_graph(
    graph: nx.Graph[str],
    path: str | Path | None = None,
    values: Mapping[str, float] | None = None,
    labels: bool | Mapping[str, str] | None = None,
    layout: Literal["auto", "circular", "spring"] = "auto",
    title: str = "",
    seed: int = 0,
) -> Figure:
    """Draw a graph and return the matplotlib Figure; with `path` write it there too (svg, png, pdf: by suffix).

    `values` colours the agents (viridis, with a colour bar); `labels`: True for names, False for none, a mapping for
    other texts, by default names up to 24 agents. Layout "auto" is a circle for rings, exponential and complete
    graphs and for more than 1,000 agents, else a spring model seeded with `seed`. Directed links carry arrows. Of more
    than 20,000 links a sample is drawn, which the picture says. Raises ConfigError with the pip
    command where matplotlib is missing, TopologyError for values or labels of unknown agents, DataError if the file
    cannot be written, which is then as it was.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("drawing needs matplotlib; install it with: pip install 'dimat[plots]'") from error

    for given in (values, labels if isinstance(labels, Mapping) else None):
        stranger = next((name for name in given or {} if name not in graph), None)
        if stranger is not None:
            raise TopologyError(f"there is no agent {stranger!r} in the graph to draw")
    places = _places(graph, layout, seed)
    figure = Figure(figsize=(4.0 if values is None else 4.6, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set_aspect("equal")
    axes.margins(0.15)
    if title:
        axes.set_title(title)
    _links(axes, graph, places)
    names = list(graph)
    size = max(20.0, min(420.0, 6000.0 / len(names)))
    colours = [math.nan if values is None else float(values.get(name, math.nan)) for name in names]
    dots = axes.scatter(
        [places[name][0] for name in names],
        [places[name][1] for name in names],
        s=size,
        c="#4c78a8" if values is None else colours,
        cmap=None if values is None else "viridis",
        edgecolors="white",
        plotnonfinite=values is not None,
        zorder=2,
    )
    if values is not None:
        figure.colorbar(dots, ax=axes, shrink=0.7)
    _texts(axes, graph, places, labels)
    if path is not None:
        # names stay text, and nothing in an SVG depends on time or chance: a picture in git changes with its graph only
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dimat"}):
            kind = Path(path).suffix.removeprefix(".") or "png"
            buffer = BytesIO()
            figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
        write_bytes(Path(path), buffer.getvalue(), durable=False)
    return figure


def _places(graph: nx.Graph[str], layout: str, seed: int) -> dict[str, tuple[float, float]]:
    import networkx as nx

    n = graph.number_of_nodes()
    if layout == "circular" or (layout == "auto" and (n > SPRINGS or graph.graph.get("generator") in CIRCULAR)):
        angles = [math.pi / 2 - 2 * math.pi * i / n for i in range(n)]  # the first agent on top, then clockwise
        return {name: (math.cos(angle), math.sin(angle)) for name, angle in zip(graph, angles, strict=True)}
    if layout not in ("auto", "spring"):
        raise TopologyError(f"unknown layout {layout!r} (known: auto, circular, spring)")
    found: dict[str, Any] = nx.spring_layout(graph, seed=seed, iterations=200)
    return {name: (float(place[0]), float(place[1])) for name, place in found.items()}


def _links(axes: Any, graph: nx.Graph[str], places: dict[str, tuple[float, float]]) -> None:
    from matplotlib.collections import LineCollection

    if graph.is_directed() and graph.number_of_edges() <= 200:
        style = {"arrowstyle": "-|>", "color": "#999999", "shrinkA": 8, "shrinkB": 8, "linewidth": 0.8}
        style["connectionstyle"] = "arc3,rad=0.08"  # two links that go opposite ways do not cover each other
        for u, v in graph.edges():
            axes.annotate("", xy=places[v], xytext=places[u], arrowprops=style, zorder=1)
        return
    count = graph.number_of_edges()
    every = -(-count // LINES)
    lines = [(places[u], places[v]) for i, (u, v) in enumerate(graph.edges()) if i % every == 0] if count else []
    if every > 1:
        axes.text(0.5, 0.0, f"{len(lines):,} of {count:,} links", transform=axes.transAxes, ha="center", fontsize=7)
    width = 1.2 if len(lines) <= 200 else 0.3
    axes.add_collection(LineCollection(lines, colors="#999999", linewidths=width, zorder=1))


def _texts(
    axes: Any,
    graph: nx.Graph[str],
    places: dict[str, tuple[float, float]],
    labels: bool | Mapping[str, str] | None,
) -> None:
    if labels is None:
        labels = graph.number_of_nodes() <= ROOMY
    texts = labels if isinstance(labels, Mapping) else {name: name for name in graph if labels}
    box = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.7}
    for name, text in texts.items():
        at = places[name]
        axes.annotate(text, at, xytext=(0, -17), textcoords="offset points", ha="center", fontsize=7, bbox=box)
