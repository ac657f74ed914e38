"""Pictures of a run and of a comparison (extra `plots`: matplotlib, without a display).

Equal results give equal PNG files, byte for byte: style, size and metadata are fixed here and no user settings are
read. Colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import importlib
import io
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import networkx as nx

from dimat.config import CEILING
from dimat.errors import ConfigError
from dimat.metrics import best_of
from dimat.ui.tables import timed
from dimat.ui.text import clean, count_text, mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from dimat.results import AgentRound, Comparison, MethodCurve, Results

BLUE, ORANGE, GREEN, RED, SKY, PINK, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#6B6B6B"
PALETTE = (BLUE, ORANGE, GREEN, RED, SKY, PINK)
METHOD_STYLE = {
    CEILING: ("#000000", "D"),
    "dimat": (BLUE, "o"),
    "average": (ORANGE, "s"),
    "isolated": (GREY, "x"),
    "dimat-paper": (GREEN, "^"),
}
"""Colour and marker of the standard methods; others take the rest of the palette."""
Dash = Literal["-", "--", ":"]
MANY_AGENTS = 8
"""With more agents, all are thin lines of one colour: more colours are hard to tell apart."""
STYLE: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib, so that pictures are equal on all machines
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.0,
    "figure.dpi": 110.0,
    "savefig.dpi": 110.0,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.w_pad": 0.1,
    "text.parse_math": False,  # a $ in the name of an agent is a $
    "path.simplify": False,
}


def results_pngs(results: Results) -> dict[str, bytes]:
    """Return the pictures of a run by name: "accuracy" (the metric per agent), "timeline" (over virtual time and over
    megabytes), "merge" (before and after), "consensus", "topology", "classes". Those for which a run has no data are
    left out. ConfigError without matplotlib."""
    drawn: dict[str, bytes] = {}
    wanted: list[tuple[str, bool, Callable[[Results], Figure]]] = [
        ("accuracy", any(row.after is not None for row in results.rows), _metric_figure),
        ("timeline", not results.timeline().a_second_a_round, _timeline_figure),
        ("merge", any(row.before is not None and row.after is not None for row in results.rows), _merge_figure),
        ("consensus", any(row.consensus_distance > 0 for row in results.rows), _consensus_figure),
        ("topology", bool(results.agents), _topology_figure),
        ("classes", any(any(counts) for counts in results.histogram.values()), _classes_figure),
    ]
    with _styled():
        for name, has_data, draw in wanted:
            if has_data:
                drawn[name] = _png(draw(results))
    return drawn


def comparison_png(comparison: Comparison) -> bytes:
    """Return one picture: a row of panels per split, the metric over merges and over megabytes sent per agent."""
    with _styled():
        return _png(_comparison_figure(comparison))


def line_png(lines: Mapping[str, tuple[Sequence[float], Mapping[str, Sequence[float]]]]) -> bytes:
    """Return one picture of ways from one network to another: a panel for each metric, a curve for each entry of
    `lines`, which has the places on the way, 0 to 1, and the metrics there."""
    with _styled():
        names = list(next(iter(lines.values()))[1])
        figure = _figure(1.0 + 4.5 * len(names), 3.6)
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            for i, (label, (shares, metrics)) in enumerate(lines.items()):
                axes.plot(shares, metrics[name], color=PALETTE[i % len(PALETTE)], marker="o", label=_label(label))
            axes.set_title(_label(name))
            axes.set_xlabel("share of the second network")
            axes.set_xlim(0, 1)
        figure.axes[0].legend()
        return _png(figure)


def require_matplotlib() -> None:
    """Raise ConfigError with the command that installs matplotlib if it is missing."""
    try:
        for name in ("matplotlib", "matplotlib.figure"):
            importlib.import_module(name)
    except ImportError as error:
        raise ConfigError('pictures need matplotlib: pip install "dimat[plots]"') from error


@contextmanager
def _styled() -> Generator[None]:
    require_matplotlib()
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)  # pyright: ignore[reportCallIssue, reportArgumentType]
        yield


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), facecolor="white")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # names in scripts that DejaVu lacks are drawn as boxes; the tables beside the pictures have them in full
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _label(name: str, longest: int = 24) -> str:
    text = clean(name)
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    return f" {text}" if text.startswith("_") else text  # matplotlib hides what starts with an underscore


def _whole_rounds(axes: Axes, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _by_agent(
    results: Results, value: Callable[[AgentRound], float | None]
) -> dict[str, tuple[list[int], list[float]]]:
    """Return rounds and values per agent, in the order of `results.agents`, without missing values."""
    series: dict[str, tuple[list[int], list[float]]] = {agent: ([], []) for agent in results.agents}
    for row in sorted(results.rows, key=lambda row: row.round):
        number = value(row)
        if number is not None and row.agent in series:
            series[row.agent][0].append(row.round)
            series[row.agent][1].append(number)
    return {agent: points for agent, points in series.items() if points[0]}


def _draw_agents(axes: Axes, series: Mapping[str, tuple[list[int], list[float]]], band: bool) -> None:
    """Draw a thin line per agent, the mean as a thick one and, if requested, the band from lowest to highest."""
    values: dict[int, list[float]] = {}
    for rounds, numbers in series.values():
        for round_, number in zip(rounds, numbers):
            values.setdefault(round_, []).append(number)
    rounds = sorted(values)
    few = len(series) <= MANY_AGENTS
    if band and len(series) > 1:
        low, high = [min(values[r]) for r in rounds], [max(values[r]) for r in rounds]
        axes.fill_between(rounds, low, high, color=BLUE, alpha=0.12, linewidth=0, label="lowest to highest")
    for index, (agent, (own, numbers)) in enumerate(series.items()):
        colour = PALETTE[index % len(PALETTE)] if few else SKY
        style = "-" if index < len(PALETTE) or not few else "--"
        label = _label(agent) if few else f"each of {len(series)} agents" if index == 0 else "_"
        alpha = 0.9 if few else 0.35
        axes.plot(own, numbers, style, color=colour, linewidth=1.1, alpha=alpha, marker=".", markersize=5, label=label)
    if len(series) > 1:
        means = [mean(values[r]) or 0.0 for r in rounds]
        axes.plot(rounds, means, color="black", linewidth=2.4, marker="o", label="mean of agents")


def _legend_beside(axes: Axes) -> None:
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _metric_figure(results: Results) -> Figure:
    figure = _figure(7.6, 4.2)
    axes = figure.subplots()
    _draw_agents(axes, _by_agent(results, lambda row: row.after), band=True)
    _whole_rounds(axes, "round")
    axes.set_ylabel(f"test {clean(results.metric)} after the merge")
    axes.set_title(f"Test {_label(results.metric).strip()} of each agent")
    _legend_beside(axes)
    return figure


def _timeline_figure(results: Results) -> Figure:
    timeline = results.timeline()
    figure = _figure(9.0, 3.8)
    left, right = figure.subplots(1, 2, sharey=True)
    left.step(timeline.time_s, timeline.value, where="post", color=BLUE)
    right.step(timeline.mb, timeline.value, where="post", color=BLUE)
    left.set_ylabel(f"test {clean(results.metric)}, mean of agents")
    left.set_title("Newest models over virtual time")
    left.set_xlabel("virtual seconds")
    right.set_xlabel("megabytes fetched per agent")
    for axes in (left, right):
        axes.set_xlim(left=0)
    return figure


def _consensus_figure(results: Results) -> Figure:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = _figure(7.6, 4.2)
    axes = figure.subplots()
    # a log axis has no zero: exact consensus is left out rather than drawn somewhere
    _draw_agents(axes, _by_agent(results, lambda row: row.consensus_distance or None), band=False)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=12))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    _whole_rounds(axes, "round")
    axes.set_ylabel("‖θ − mean θ‖ / ‖mean θ‖ after the merge")
    axes.set_title("Consensus distance: how far each agent is from the mean of all")
    _legend_beside(axes)
    return figure


def _merge_figure(results: Results) -> Figure:
    figure = _figure(7.6, 4.2)
    axes = figure.subplots()
    pairs: dict[int, list[tuple[float, float]]] = {}
    for row in results.rows:
        if row.before is not None and row.after is not None:
            pairs.setdefault(row.round, []).append((row.before, row.after))
    rounds = sorted(pairs)
    before = [mean([b for b, _ in pairs[r]]) or 0.0 for r in rounds]
    after = [mean([a for _, a in pairs[r]]) or 0.0 for r in rounds]
    colours = [BLUE if a >= b else RED for a, b in zip(after, before)]
    axes.vlines(rounds, before, after, colors=colours, linewidth=3.0, alpha=0.45)
    axes.scatter(rounds, before, s=48, facecolor="white", edgecolor=GREY, linewidth=1.6, zorder=3)
    axes.scatter(rounds, after, s=52, color=colours, zorder=4)
    # drawn off the picture: the legend shows each kind once, whether or not it occurs
    axes.scatter([], [], s=48, facecolor="white", edgecolor=GREY, linewidth=1.6, label="before the merge")
    axes.scatter([], [], s=52, color=BLUE, label="after it: gained")
    axes.scatter([], [], s=52, color=RED, label="after it: lost")
    _whole_rounds(axes, "round")
    axes.set_ylabel(f"test {clean(results.metric)}, mean of agents")
    axes.set_title("Gain of each merge")
    _legend_beside(axes)
    return figure


def _topology_figure(results: Results) -> Figure:
    from dimat.topology.draw import draw_graph

    graph: nx.Graph[str] = nx.Graph()
    graph.add_nodes_from(results.agents)
    graph.add_edges_from((a, b) for a, b in results.edges if a != b)
    final = {agent: numbers[-1] for agent, (_, numbers) in _by_agent(results, lambda row: row.after).items()}
    circle = len(graph) <= 10 or all(degree <= 2 for _, degree in graph.degree)
    figure = draw_graph(
        graph,
        values=final or None,
        labels={agent: _label(agent, 16) for agent in graph} if len(graph) <= 30 else False,
        layout="circular" if circle else "spring",
        title=f"Topology: {count_text(len(graph), 'agent')}, {count_text(graph.number_of_edges(), 'edge')}",
    )
    figure.set_size_inches(7.6, 4.2)
    if final:
        figure.axes[-1].set_ylabel(f"test {clean(results.metric)} after the last merge")  # the colour bar
    return figure


def _classes_figure(results: Results) -> Figure:
    agents = [agent for agent in results.agents if agent in results.histogram]
    width = max(len(results.histogram[agent]) for agent in agents)
    grid = [[*results.histogram[a], *([0] * (width - len(results.histogram[a])))] for a in agents]
    names = [_label(results.classes[i], 12) if i < len(results.classes) else str(i) for i in range(width)]
    figure = _figure(min(2.6 + 0.52 * width, 11.0), min(1.5 + 0.38 * len(agents), 10.0))
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="Blues", aspect="auto", vmin=0, interpolation="nearest")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    step_x, step_y = -(-width // 24), -(-len(agents) // 24)
    axes.set_xticks(range(0, width, step_x), names[::step_x], rotation=45 if max(map(len, names)) > 4 else 0)
    axes.set_yticks(range(0, len(agents), step_y), [_label(a, 16) for a in agents[::step_y]])
    axes.tick_params(length=0)
    if width <= 16 and len(agents) <= 16:
        dark = max(max(row) for row in grid) * 0.55
        for y, row in enumerate(grid):
            for x, count in enumerate(row):
                colour = "white" if count > dark else "#404040"
                axes.text(x, y, str(count) if count else "·", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, ax=axes, label="samples", pad=0.02)
    axes.set_xlabel("class")
    axes.set_title("Training samples per class and agent")
    return figure


def _comparison_figure(comparison: Comparison) -> Figure:
    splits, metric = list(comparison.splits), comparison.metric
    names = list(dict.fromkeys(method for curves in comparison.splits.values() for method in curves))
    styles = _method_styles(comparison)
    clock = any(timed(curves) for curves in comparison.splits.values())
    figure = _figure(13.0 if clock else 10.0, 3.5 * max(len(splits), 1) + 0.5)
    grid = figure.subplots(max(len(splits), 1), 3 if clock else 2, sharey="row", squeeze=False)
    for row, split in enumerate(splits):
        left, *middle, right = grid[row]
        for method, curve in comparison.splits[split].items():
            _draw_merges(left, curve, *styles[method])
            _draw_over(right, curve, curve.timeline.mb, styles[method][0], metric)
            for axes in middle:
                times = curve.timeline.time_s if method != CEILING else ()
                _draw_over(axes, curve, times, styles[method][0], metric)
        target = comparison.target(split)
        for axes in grid[row] if target is not None else ():
            axes.axhline(target, color="black", linewidth=0.9, linestyle=":")
        left.set_title(_label(split, 40))
        left.set_ylabel(f"test {clean(comparison.metric)}")
        _whole_rounds(left, "merges")
        right.set_xlabel("megabytes fetched per agent")
        for axes in middle:
            axes.set_xlabel("virtual seconds")
        for axes in (*middle, right):
            axes.set_xlim(left=0)
            axes.tick_params(labelleft=True)
    handles = [_handle(_label(name), *styles[name]) for name in names]
    if any(comparison.target(split) is not None for split in splits):
        handles.append(_handle("90 % of the ceiling", "black", "", ":"))
    figure.legend(handles=handles, loc="outside upper center", ncols=min(max(len(handles), 1), 7))
    return figure


def _draw_merges(axes: Axes, curve: MethodCurve, colour: str, marker: str) -> None:
    merges = list(range(1, len(curve.after_merge) + 1))
    low = [value - deviation for value, deviation in zip(curve.after_merge, curve.std)]
    high = [value + deviation for value, deviation in zip(curve.after_merge, curve.std)]
    axes.plot(merges, curve.after_merge, _dash(colour), color=colour, marker=marker)
    axes.fill_between(merges, low, high, color=colour, alpha=0.15, linewidth=0)


def _draw_over(axes: Axes, curve: MethodCurve, x: Sequence[float], colour: str, metric: str) -> None:
    """Draw a curve over time or megabytes; one without these is a horizontal line at its best for comparison."""
    if not any(x):
        if curve.after_merge:
            axes.axhline(best_of(metric, curve.after_merge), color=colour, linestyle="--", linewidth=1.4)
    else:
        axes.plot(x, curve.timeline.value, _dash(colour), color=colour, linewidth=1.5)


def _handle(name: str, colour: str, marker: str, dash: Dash | None = None) -> Line2D:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, marker=marker, linestyle=dash or _dash(colour), label=name)


def _dash(colour: str) -> Dash:
    return "--" if colour == METHOD_STYLE[CEILING][0] else "-"


def _method_styles(comparison: Comparison) -> dict[str, tuple[str, str]]:
    """Return colour and marker by name; other methods get the rest of the palette, separately in each split."""
    names = {name for curves in comparison.splits.values() for name in curves}
    known = {name: style for name, style in METHOD_STYLE.items() if name in names}
    pool = ((RED, "v"), (BLUE, "o"), (GREEN, "^"), (ORANGE, "s"), (PINK, "P"), (SKY, "*"), ("#8C6D1F", "<"))
    left = [style for style in pool if style[0] not in {colour for colour, _ in known.values()}]
    styles = dict(known)
    for curves in comparison.splits.values():
        others = [name for name in curves if name not in METHOD_STYLE]
        styles |= {name: left[i % len(left)] for i, name in enumerate(others) if name not in styles}
    return styles
