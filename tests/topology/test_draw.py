"""Pictures: what is drawn, the same bytes each time, and what happens without matplotlib."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dimat.errors import ConfigError, TopologyError
from dimat.topology import build_graph, draw_graph


@pytest.mark.parametrize("name", ["ring", "exponential", "complete", "torus"])
def test_pictures_repeat(tmp_path: Path, name: str) -> None:
    """Law: the same graph gives the same SVG, with its names as text and without pyplot."""
    graph = build_graph(name, 9)
    files = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for file in files:
        draw_graph(graph, file, title="nine agents")
    assert files[0].read_bytes() == files[1].read_bytes()
    text = files[0].read_text()
    assert all(f">{agent}<" in text for agent in graph)
    assert "matplotlib.pyplot" not in sys.modules


def test_values_labels_and_layout(tmp_path: Path) -> None:
    """Reference: the brief; colours by value (missing ones too), texts of one's own, none for crowds."""
    graph = build_graph("star", 5)
    figure = draw_graph(graph, tmp_path / "a.png", values={"agent-0": 0.4, "agent-1": 0.9}, labels={"agent-0": "hub"})
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert len(figure.axes) == 2  # the graph and its colour bar
    assert [text.get_text() for text in figure.axes[0].texts] == ["hub"]
    assert not draw_graph(build_graph("ring", 30), layout="spring").axes[0].texts
    draw_graph(build_graph("exponential", 60))
    with pytest.raises(TopologyError, match="no agent 'x'"):
        draw_graph(graph, values={"x": 1.0})
    with pytest.raises(TopologyError, match="unknown layout 'square'"):
        draw_graph(graph, layout="square")


def test_large_networks_are_drawn_in_part_and_it_is_said(tmp_path: Path) -> None:
    """Reference: the bounds. A spring model of thousands of agents, or a million lines, would take minutes."""
    figure = draw_graph(build_graph("bipartite", 400), tmp_path / "x.svg", labels=False)
    assert "20,000 of 40,000 links" in (tmp_path / "x.svg").read_text()
    assert (
        max(len(each.get_segments()) for each in figure.axes[0].collections if hasattr(each, "get_segments")) == 20_000
    )
    assert not draw_graph(build_graph("torus", 2000)).axes[0].texts


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the brief, a ConfigError with the pip command."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'dimat\[plots\]'"):
        draw_graph(build_graph("ring", 3))
