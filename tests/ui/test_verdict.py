"""The verdict on merging against training alone. Reference: differences worked out by hand from rows made by hand."""

from __future__ import annotations

import pytest

from dimat.agent.protocol.messages import MergeRecord
from dimat.events import Contribution, MergeResult
from dimat.results import ONE_SEED, Comparison, MethodCurve, Results
from dimat.ui.verdict import headlines, of_agent, of_comparison, of_run
from tests.ui.samples import make_comparison, make_results


def curve(*runs: list[float], mb: float = 1.0, **more: object) -> MethodCurve:
    means = [sum(column) / len(column) for column in zip(*runs, strict=True)]
    values = {"after_merge": means, "std": [0.0] * len(means), "mb_sent_per_agent": mb, "curves": list(runs)}
    return MethodCurve.model_validate(values | {"seeds": list(range(len(runs)))} | more)


def comparison(**rows: MethodCurve) -> Comparison:
    return Comparison(metric="accuracy", splits={"iid": rows})


def test_ahead_by_the_mean_over_the_seeds_from_the_merge_on_which_it_stays_so() -> None:
    """Seeds' differences at the end are .30 and .20; in the mean it is ahead at merge 1, behind at 2, ahead from 3."""
    merged = curve([0.5, 0.3, 0.6, 0.8], [0.5, 0.3, 0.6, 0.7])
    alone = curve([0.4, 0.4, 0.5, 0.5], [0.4, 0.4, 0.5, 0.5], mb=0.0)
    (found,) = of_comparison(comparison(isolated=alone, dimat=merged))["iid"]
    assert (found.ahead, found.from_merge, found.next_step) == (True, 3, "")
    assert found.by == pytest.approx(0.25)
    (line,) = headlines(comparison(isolated=alone, dimat=merged))
    assert line.startswith(
        "iid: dimat: merging beat training alone by 0.250 (accuracy 0.750 against 0.500 after merge 4"
    )
    assert "2 seeds, ± 0.071" in line
    assert line.endswith("ahead from merge 3 on")


def test_differences_are_of_the_same_seeds_alone() -> None:
    """The row that trains alone has lost seed 0, on which everything is worse: what is left is seed 1's difference."""
    merged = curve([0.1], [0.8])
    alone = curve([0.6], mb=0.0, seeds=[1])
    (found,) = of_comparison(comparison(isolated=alone, dimat=merged))["iid"]
    assert found.by == pytest.approx(0.2)
    assert "1 seed" in found.text


@pytest.mark.parametrize(
    ("ends", "ahead"),
    [
        (([0.5 + ONE_SEED / 2],), None),
        (([0.5 + 2 * ONE_SEED],), True),
        (([0.5 - 2 * ONE_SEED],), False),
        (([0.50], [0.58]), None),  # 0.04 ± 0.057
        (([0.53], [0.55]), True),  # 0.04 ± 0.014
    ],
)
def test_what_seeds_cannot_tell_is_not_claimed(ends: tuple[list[float], ...], ahead: bool | None) -> None:
    """One seed tells what is above `ONE_SEED`, several what is above the standard deviation of their differences."""
    alone = curve(*([0.5] for _ in ends), mb=0.0)
    rows = comparison(isolated=alone, dimat=curve(*ends, next_step="train.loss = …"))
    (found,) = of_comparison(rows)["iid"]
    assert found.ahead is ahead
    assert found.next_step == ("" if ahead else "train.loss = …")
    assert ("beat training alone by" in found.text) == (ahead is True)


def test_other_training_is_no_measure() -> None:
    """A row with another loss than the one that trains alone gets no difference, whatever its accuracy is."""
    rows = comparison(isolated=curve([0.5], mb=0.0), other=curve([0.9], unlike=["train.loss"]))
    (found,) = of_comparison(rows)["iid"]
    assert (found.ahead, found.by) == (None, None)
    assert "not a fair comparison: the rows differ in train.loss" in found.line


def test_without_a_row_that_trains_alone_nothing_is_claimed() -> None:
    """The command that would tell has it."""
    (found,) = of_comparison(comparison(dimat=curve([0.9])))["iid"]
    assert found.ahead is None
    assert "was not measured" in found.text
    assert "--compare isolated,dimat" in found.next_step
    assert headlines(comparison(centralised=curve([0.9], mb=0.0))) == []  # nothing merges there


def test_the_best_row_of_each_split_comes_first() -> None:
    """Reference: the sample's ends, .955, .95 and .93 against .88 on equal parts."""
    lines = headlines(make_comparison())
    assert [line.partition(":")[0] for line in lines[::2]] == ["iid", "dirichlet(0.5)"]
    assert lines[0].startswith("iid: dimat: merging beat training alone by 0.0")
    assert lines[1].index("dimat-paper") < lines[1].index("average")


def test_a_run_by_itself_tells_what_its_merges_changed() -> None:
    """After − before, mean over agents; that of round 1 is against training alone, and is told apart."""
    results = make_results(rounds=4)
    found = of_run(results)
    gains = {
        number: sum(r.after - r.before for r in results.rows if r.round == number and r.after and r.before) / 5
        for number in range(1, 5)
    }
    assert (found.ahead, found.by) == (None, None)
    assert "was not measured" in found.text
    assert f"4 merges changed test accuracy, mean over agents, by {sum(gains.values()) / 4:+.3f} each" in found.text
    assert f"the first, before which all had trained alone, by {gains[1]:+.3f}" in found.text
    assert "--compare isolated,dimat" in found.line


def test_several_mixing_steps_are_one_merge() -> None:
    """Metrics are taken before the first step and after the last: their difference is the round's."""

    def step(number: int, before: float | None, after: float | None) -> Results:
        rows = make_results(agents=2, rounds=1).rows
        changes = {"round": number, "before": before, "after": after}
        return make_results().model_copy(update={"rows": [row.model_copy(update=changes) for row in rows]})

    rows = [*step(1, 0.5, None).rows, *step(2, None, None).rows, *step(3, None, 0.6).rows]
    found = of_run(make_results().model_copy(update={"rows": rows}))
    assert "1 merge changed test accuracy, mean over agents, by +0.100 each" in found.text
    assert "had trained alone, by +0.100" in found.text


def test_runs_that_say_nothing_of_merging() -> None:
    """One without metrics, and one that merges nothing."""
    assert "nor what merges changed" in of_run(make_results(evaluated=False)).text
    alone = of_run(make_results().model_copy(update={"method": "isolated"}))
    assert (alone.ahead, alone.next_step) == (None, "")
    assert "not a test of merging" in alone.line


def record(number: int, before: float | None, after: float, accepted: float = 1.0, kind: str = "merge") -> MergeRecord:
    parts = tuple(Contribution(agent=a, snapshot=f"{a}{number}", round=number, weight=0.5) for a in ("a", "b"))
    result = MergeResult(
        accepted=accepted,
        before={} if before is None else {"loss": 1.0, "accuracy": before},
        after={"loss": 0.5, "accuracy": after},
    )
    return MergeRecord("a", number, f"a{number}", parts, result, kind=kind)


def test_an_agent_by_its_own_records() -> None:
    """Of two records of a round the last counts; a merge that its hold-out turned down is counted; taking a peer's
    weights over is no merge."""
    joined = record(1, 0.1, 0.9, kind="join")
    found = of_agent([joined, record(1, 0.5, 0.9), record(1, 0.5, 0.4), record(2, 0.6, 0.8), record(3, 0.8, 0.8, 0.0)])
    assert found.ahead is None
    assert "3 merges changed this agent's accuracy, by +0.033 each" in found.text
    assert "had trained alone, by -0.100" in found.text
    assert "rejected 1 of 3 merges" in found.text
    assert 'agent.evaluate = "all"' in of_agent([record(1, None, 0.5)]).text
    assert "nothing was merged yet" in of_agent([]).line
