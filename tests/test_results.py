"""A run over virtual time and traffic, and the mean of several runs. References: sums by hand, and step functions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dimat.results import MethodCurve, Timeline, mean_timeline
from tests.ui.samples import make_results


def test_timeline_by_hand() -> None:
    """a merges at 1 and 3, b at 2 and 3: the mean over those that have merged, and what both fetched."""
    sample = make_results(names=["a", "b"], rounds=2)
    when = {("a", 1): (1.0, 0.5), ("b", 1): (2.0, 0.7), ("a", 2): (3.0, 0.9), ("b", 2): (3.0, 0.9)}
    rows = [
        row.model_copy(
            update={
                "time_s": when[row.agent, row.round][0],
                "after": when[row.agent, row.round][1],
                "bytes_received": 2_000_000,
            }
        )
        for row in sample.rows
    ]
    timeline = sample.model_copy(update={"rows": rows}).timeline()
    assert timeline.time_s == [1.0, 2.0, 3.0]
    assert timeline.mb == [1.0, 2.0, 4.0]
    assert timeline.value == pytest.approx([0.5, 0.6, 0.9])
    assert not Timeline(time_s=[1.0, 2.5]).a_second_a_round
    assert Timeline(time_s=[1.0, 2.0, 3.0]).a_second_a_round


def test_runs_without_metrics_or_rows_have_no_timeline() -> None:
    """Nothing was evaluated, or no round was complete."""
    assert make_results(evaluated=False).timeline() == Timeline()
    assert make_results(rounds=0).timeline() == Timeline()
    assert mean_timeline([Timeline(), Timeline(time_s=[1.0], mb=[1.0], value=[0.1])]) == Timeline()


def test_targets_are_read_off_the_timeline() -> None:
    """Reference: the lists."""
    timeline = Timeline(time_s=[2.0, 5.0, 9.0], mb=[1.0, 2.0, 3.0], value=[0.2, 0.8, 0.7])
    curve = MethodCurve(after_merge=[0.2, 0.8], std=[0.0, 0.0], mb_sent_per_agent=3.0, timeline=timeline)
    assert (curve.rounds_to(0.7, "accuracy"), curve.time_to(0.7, "accuracy"), curve.mb_to(0.7, "accuracy")) == (
        2,
        5.0,
        2.0,
    )
    assert (curve.rounds_to(0.9, "accuracy"), curve.time_to(0.9, "accuracy"), curve.mb_to(0.9, "accuracy")) == (
        None,
        None,
        None,
    )


times = st.lists(st.integers(1, 20), min_size=1, max_size=8, unique=True).map(sorted)


@given(st.lists(times, min_size=1, max_size=4), st.integers(0, 99))
def test_mean_of_step_functions(runs: list[list[int]], seed: int) -> None:
    """At any time from when all have begun, the mean timeline is the mean of the single ones, looked up by numpy."""
    rng = np.random.default_rng(seed)
    timelines = [
        Timeline(time_s=[float(t) for t in run], mb=sorted(rng.random(len(run))), value=list(rng.random(len(run))))
        for run in runs
    ]
    made = mean_timeline(timelines)
    assert made.time_s[0] == max(run[0] for run in runs)
    for time in np.arange(made.time_s[0], 22, 0.5):
        for read in (lambda each: each.mb, lambda each: each.value):
            at = [read(each)[int(np.searchsorted(each.time_s, time, side="right")) - 1] for each in timelines]
            assert read(made)[int(np.searchsorted(made.time_s, time, side="right")) - 1] == pytest.approx(np.mean(at))
