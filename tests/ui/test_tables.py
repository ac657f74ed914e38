"""Results and comparisons as tables."""

from __future__ import annotations

import pytest

from dimat.results import Comparison, MethodCurve, Results
from dimat.ui import tables
from dimat.ui.text import NONE, as_text
from tests.ui.samples import SNAPSHOT, make_results


def test_summaries_are_the_means_over_agents(results: Results) -> None:
    """Reference: the rows themselves, and `Results.after_merge`, which counts on its own."""
    summaries = tables.summarise(results)
    assert [summary.round for summary in summaries] == list(range(1, 11))
    assert [summary.after_mean for summary in summaries] == pytest.approx(results.after_merge())
    second = [row for row in results.rows if row.round == 2]
    assert summaries[1].loss == pytest.approx(sum(row.loss or 0 for row in second) / 5)
    assert summaries[1].after_min == min(row.after for row in second if row.after is not None)
    assert (summaries[1].bases, summaries[1].heard, summaries[1].expected) == (3, 9, 10)
    assert [s.mb_sent for s in summaries] == pytest.approx([5 * 2 * SNAPSHOT * (n + 1) / 1e6 for n in range(10)])


def test_a_run_without_rounds_or_metrics_has_tables_too() -> None:
    """Reference: dashes where nothing was measured; no row that is made up."""
    blind = make_results(rounds=1, evaluated=False)
    assert tables.round_table(blind).rows[0][2:5] == (NONE, NONE, NONE)
    assert tables.final_table(blind).rows[-1][4:6] == (NONE, NONE)
    empty = blind.model_copy(update={"rows": [], "status": "stopped"})
    assert tables.summarise(empty) == []
    assert tables.final_table(empty).rows == ()
    untrained = blind.model_copy(update={"rows": [row.model_copy(update={"loss": None}) for row in blind.rows]})
    assert tables.round_table(untrained).rows[0][1] == NONE


def test_final_table_has_each_agent_once_and_the_mean(results: Results) -> None:
    """Reference: counted from the rows by hand."""
    table = tables.final_table(results)
    assert [row[0] for row in table.rows] == [*results.agents, "mean"]
    assert table.foot
    agent = table.rows[1]
    last = results.rows[-4]
    assert (last.agent, last.round) == ("agent-1", 10)
    assert agent[1:3] == (str(sum(results.histogram["agent-1"])), "10")
    assert agent[5] == f"{last.after:.3f}"
    assert agent[7:] == ("19/20", "18.8", "18.8")
    assert table.rows[-1][5] == f"{results.after_merge()[-1]:.3f}"


def test_histogram_shows_counts_or_the_largest_classes() -> None:
    """Reference: by hand; over 20 classes the counts give way to the largest three, over 16 agents to a number."""
    few = tables.histogram_table({"a": (3, 0), "b": (0, 1200)}, ["cat", "dog"])
    assert as_text(few) == ["agent  samples  cat   dog", "a            3    3     .", "b        1,200    .  1200"]
    many = tables.histogram_table({f"agent-{i}": tuple(range(100)) for i in range(40)})
    assert many.headers == ("agent", "samples", "classes", "largest")
    assert many.rows[0] == ("agent-0", "4,950", "99", "99: 99, 98: 98, 97: 97")
    assert len(many.rows) == 15
    assert many.note == "and 25 more agents"
    assert len(tables.histogram_table({f"{i}": (1,) for i in range(40)}, full=True).rows) == 40
    assert tables.histogram_table({}).rows == ()


def test_comparison_table(comparison: Comparison) -> None:
    """Reference: the curves; target, rounds and megabytes from `Comparison.target`, `rounds_to` and `mb_to`."""
    iid, skewed = tables.comparison_tables(comparison)
    assert iid.headers == (
        "method",
        *(f"merge {n}" for n in (1, 2, 3, 5, 10)),
        "rounds to 90 %",
        "MB to 90 %",
        "MB in all",
    )
    dimat = comparison.splits["iid"]["dimat"]
    row = next(row for row in iid.rows if row[0] == "dimat")
    assert row[1] == f"{dimat.after_merge[0]:.3f} ± {dimat.std[0]:.3f}"
    assert row[5] == f"{dimat.after_merge[9]:.3f} ± {dimat.std[9]:.3f}"
    target = comparison.target("iid")
    assert target is not None
    rounds, mb = dimat.rounds_to(target, "accuracy"), dimat.mb_to(target, "accuracy")
    assert row[6:] == (str(rounds), f"{mb:.2f}", "18.8")
    assert next(row for row in skewed.rows if row[0] == "isolated")[6:] == ("never", NONE, "0")
    assert "3 seeds" in iid.title


def test_best_cells_leave_out_the_ceiling_and_ties(comparison: Comparison) -> None:
    """Reference: by hand from the curves of the sample; the ceiling is above all and never marked."""
    skewed = tables.comparison_tables(comparison)[1]
    methods = [row[0] for row in skewed.rows]
    assert {(methods[row], skewed.headers[column]) for row, column in skewed.best} == {
        ("dimat", header) for header in ("merge 1", "merge 2", "merge 3", "merge 5", "merge 10")
    } | {("dimat", "rounds to 90 %"), ("dimat", "MB to 90 %")}  # in all, the three that send send the same
    cheap = {**comparison.splits["iid"]}
    cheap["average"] = cheap["average"].model_copy(update={"mb_sent_per_agent": 1.0})
    table = tables.comparison_tables(Comparison(metric="accuracy", splits={"iid": cheap}))[0]
    assert [row for row, column in table.best if column == 8] == [2]  # not isolated, which sends nothing
    same = MethodCurve(after_merge=[0.5], std=[0.0], mb_sent_per_agent=2.0)
    tied = Comparison(metric="accuracy", splits={"iid": {"average": same, "dimat": same}})
    assert tables.comparison_tables(tied)[0].best == frozenset()


def test_comparison_without_ceiling_or_spread() -> None:
    """Reference: one seed has no deviation to show; without a ceiling there is no 90 % of it."""
    one = MethodCurve(after_merge=[0.5, 0.6, 0.7, 0.8], std=[0.0] * 4, mb_sent_per_agent=8.0, seeds=[0])
    table = tables.comparison_tables(Comparison(metric="f1", splits={"iid": {"dimat": one}}))[0]
    assert table.headers[1:5] == ("merge 1", "merge 2", "merge 3", "merge 4")
    assert table.rows == (("dimat", "0.500", "0.600", "0.700", "0.800", NONE, NONE, "8.00"),)
    assert table.title == "iid: f1 after a merge"


def test_configuration_is_flattened() -> None:
    """Reference: written by hand; unset keys are left out."""
    tree = {"seed": 0, "merge": {"align": None, "combine": {"name": "average"}}, "x": [1, 2]}
    assert tables.flattened(tree) == [("seed", "0"), ("merge.combine.name", "average"), ("x", "[1, 2]")]
