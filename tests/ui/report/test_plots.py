"""The pictures: there, readable as PNG, equal for equal results, and not fragile."""

from __future__ import annotations

import struct
import sys

import pytest

from dimat.errors import ConfigError
from dimat.results import Comparison, MethodCurve, Results
from dimat.ui.report import plots
from tests.ui.samples import make_results


def _size(png: bytes) -> tuple[int, int]:
    """Return width and height from the header of a PNG file."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def test_pictures_of_a_run_are_equal_for_equal_runs(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the PNG signature, and bytes of a second drawing under other settings of the user's."""
    import matplotlib

    first = plots.results_pngs(results)
    assert list(first) == ["accuracy", "merge", "consensus", "topology", "classes"]
    for png in first.values():
        width, height = _size(png)
        assert 300 < width < 1300
        assert 200 < height < 1300
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 30)
    monkeypatch.setitem(matplotlib.rcParams, "lines.linewidth", 9)
    assert plots.results_pngs(make_results()) == first
    assert matplotlib.rcParams["font.size"] == 30  # the user's settings are as they were


def test_pictures_of_a_comparison_are_equal(comparison: Comparison) -> None:
    """Reference: bytes of a second drawing; one row of panels per split."""
    first = plots.comparison_png(comparison)
    assert first == plots.comparison_png(comparison.model_copy(deep=True))
    half = comparison.model_copy(update={"splits": {"iid": comparison.splits["iid"]}})
    assert _size(plots.comparison_png(half))[1] < 0.6 * _size(first)[1]


def test_what_was_not_measured_is_not_drawn() -> None:
    """Reference: without evaluation there is no metric to draw; without rounds only who holds what."""
    blind = make_results(rounds=2, evaluated=False)
    assert list(plots.results_pngs(blind)) == ["consensus", "topology", "classes"]
    empty = blind.model_copy(update={"rows": [], "histogram": {}})
    assert list(plots.results_pngs(empty)) == ["topology"]


def test_odd_names_and_numbers_are_drawn() -> None:
    """Reference: mathematics, underscores, scripts without glyphs and one single agent raise nothing and warn of
    nothing (warnings are errors here)."""
    odd = make_results(names=["$x_{", "_hidden", "東京", "a" * 60], rounds=1)
    assert len(plots.results_pngs(odd)) == 5
    alone = make_results(names=["alone"], rounds=1)
    same = [row.model_copy(update={"consensus_distance": 0.0}) for row in alone.rows]
    assert list(plots.results_pngs(alone.model_copy(update={"rows": same}))) == [
        "accuracy",
        "merge",
        "topology",
        "classes",
    ]


def test_many_agents_and_methods_are_drawn() -> None:
    """Reference: more agents than colours, labels or ticks; more methods than named styles; unequal lengths."""
    many = make_results(agents=64, rounds=2)
    assert len(plots.results_pngs(many)) == 5
    curves = {
        f"method-{i}": MethodCurve(after_merge=[0.5] * (i + 1), std=[0.0] * (i + 1), mb_sent_per_agent=i)
        for i in range(7)
    }
    assert _size(plots.comparison_png(Comparison(metric="$f_1", splits={"iid": curves})))[0] > 500
    assert _size(plots.comparison_png(Comparison(metric="f1", splits={})))[0] > 500


def test_without_matplotlib_the_error_names_the_command(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: an interpreter in which matplotlib cannot be imported."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r'pip install "dimat\[plots\]"'):
        plots.results_pngs(results)
