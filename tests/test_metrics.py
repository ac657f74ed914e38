"""Which way metrics are better, and what follows for a run that is judged by a perplexity. Reference: by hand."""

from __future__ import annotations

import math

import pytest

from dimat.agent.protocol.plan import Rules
from dimat.config import ScheduleConfig
from dimat.metrics import best_of, lower_is_better, score_of, within
from dimat.results import Comparison, MethodCurve, Timeline
from dimat.ui import tables
from dimat.ui.verdict import headlines, of_comparison


def curve(*values: float, mb: float = 1.0) -> MethodCurve:
    rounds = [float(i) for i in range(1, len(values) + 1)]
    timeline = Timeline(time_s=rounds, mb=[mb * each for each in rounds], value=list(values))
    more = {"seeds": [0], "curves": [list(values)], "timeline": timeline}
    return MethodCurve(after_merge=list(values), std=[0.0] * len(values), mb_sent_per_agent=mb, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name",
    [
        *("loss", "eval_loss", "test/WER", "val.nll", "word-error", "Perplexity", "val_loss_epoch", "word_error_rate"),
        *("cross_entropy", "bits_per_byte", "nats per token"),
    ],
)
def test_losses_and_perplexities_are_better_if_lower(name: str) -> None:
    """Reference: what the names mean."""
    assert lower_is_better(name)
    assert (score_of(name, 2.0), best_of(name, [3.0, 2.0, 4.0])) == (-2.0, 2.0)


@pytest.mark.parametrize(
    "name",
    [
        *("accuracy", "token_accuracy", "closeness", "f1", "lossless", "error_free", "", "neg_log_loss", "hit_rate"),
        *("neg_mean_squared_error", "negative loss", "accuracy_per_step"),
    ],
)
def test_all_others_are_better_if_higher(name: str) -> None:
    """A word within a name, or at its beginning, does not count."""
    assert not lower_is_better(name)
    assert (score_of(name, 2.0), best_of(name, [3.0, 2.0, 4.0])) == (2.0, 4.0)
    assert math.isnan(best_of(name, []))
    assert best_of(name, [math.nan, 3.0]) == best_of(name, [3.0, math.nan]) == 3.0


def test_a_share_of_the_best_is_never_better_than_the_best() -> None:
    """0.9 of an accuracy, a perplexity over 0.9; with the sign the other way round, the other."""
    assert within("accuracy", 0.5) == pytest.approx(0.45)
    assert within("perplexity", 4.5) == pytest.approx(5.0)
    assert within("closeness", -0.45) == pytest.approx(-0.5)
    assert within("loss", -0.5) == pytest.approx(-0.45)


@pytest.fixture
def by_perplexity() -> Comparison:
    rows = {"isolated": curve(9.0, 8.0, 7.0, mb=0.0), "average": curve(9.5, 8.5, 7.5), "dimat": curve(9.5, 7.0, 5.0)}
    return Comparison(metric="perplexity", splits={"iid": {**rows, "centralised": curve(5.0, 4.5, 4.7, mb=0.0)}})


def test_a_lower_perplexity_beats_training_alone(by_perplexity: Comparison) -> None:
    """7 − 5 = 2 in front from merge 2 on; the average is .5 behind, and comes last."""
    best, other = of_comparison(by_perplexity)["iid"]
    assert (best.what, best.ahead, best.by, best.from_merge) == ("dimat", True, -2.0, 2)
    assert (other.what, other.ahead, other.by) == ("average", False, 0.5)
    first, second = headlines(by_perplexity)
    assert "merging beat training alone by 2.000 (perplexity 5.000 against 7.000 after merge 3" in first
    assert second.endswith("average +0.500 (behind)")


def test_the_table_marks_the_lowest_perplexity_and_what_came_near_the_ceiling(by_perplexity: Comparison) -> None:
    """The ceiling's best is 4.5, so that 5.0 counts as near, which `dimat` reaches at merge 3."""
    (table,) = tables.comparison_tables(by_perplexity)
    assert "the ceiling's best (centralised) / 0.9 is 5.000" in table.note
    methods = [row[0] for row in table.rows]
    best = {(methods[row], table.headers[column]) for row, column in table.best}
    assert {("isolated", "merge 1"), ("dimat", "merge 3"), ("dimat", "rounds to 90 %")} <= best
    near = table.headers.index("rounds to 90 %")
    assert [row[near] for row in table.rows] == ["never", "never", "3", "1"]


def test_a_target_below_zero_can_be_reached() -> None:
    """The ceiling itself ends at −.45; 90 % of that would be better than it ever was."""
    rows = {"dimat": curve(-0.9, -0.48), "centralised": curve(-0.6, -0.45, mb=0.0)}
    (table,) = tables.comparison_tables(Comparison(metric="closeness", splits={"iid": rows}))
    assert "the ceiling's best (centralised) / 0.9 is -0.500" in table.note
    assert [row[table.headers.index("rounds to 90 %")] for row in table.rows] == ["2", "2"]


def test_an_agent_stops_once_its_perplexity_is_low_enough() -> None:
    """Reference: the target of 5; an accuracy is to be above its target, and what was not measured reaches nothing."""
    schedule = ScheduleConfig()
    rules = Rules.of(schedule, target=("perplexity", 5.0))
    assert [rules.reached({"perplexity": value}) for value in (6.0, 5.0, 4.0)] == [False, True, True]
    assert not rules.reached({})
    assert not rules.reached({"perplexity": math.nan})
    assert [Rules.of(schedule, target=("accuracy", 0.5)).reached({"accuracy": v}) for v in (0.4, 0.5)] == [False, True]
