"""Failing schedules get short, and stay what they are: explicit data that replays to the letter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from tests.faults.__main__ import main
from tests.faults.draw import PROFILES, draw
from tests.faults.hunt import catch, explain
from tests.faults.mutants import BY_NAME
from tests.faults.run import run, trace_of
from tests.faults.schedule import Schedule
from tests.faults.shrink import ddmin, shrink


@pytest.mark.parametrize("needed", [(), (3,), (0, 19), (4, 5, 11)])
def test_ddmin_leaves_what_is_needed(needed: tuple[int, ...]) -> None:
    """Delta debugging (Zeller & Hildebrandt 2002): what is left fails, and exactly that for a monotone test."""

    def fails(things: Sequence[int]) -> bool:
        return set(needed) <= set(things)

    assert tuple(ddmin(range(20), fails)) == needed


@pytest.mark.parametrize("name", ["no-skip", "no-deadline", "newest-content", "no-momentum"])
def test_shrunk_schedule_breaks_the_same_promise_with_less(name: str) -> None:
    """By definition: the same promise is broken, and leaving out any one fault more would keep it."""
    mutant = BY_NAME[name]
    caught = catch(mutant, range(5000))
    assert caught is not None
    schedule = draw(caught.seed)
    with mutant.alive() as world:
        short = shrink(schedule, world)
        before, after = run(schedule, world), run(short, world)
        assert (after.promise, after.check) == (before.promise, before.check) == (caught.promise, before.check)
        assert len(short.faults) <= len(schedule.faults)
        assert short.agents <= schedule.agents
        for i in range(len(short.faults)):
            fewer = replace(short, faults=(*short.faults[:i], *short.faults[i + 1 :]))
            left = run(fewer, world)
            assert (left.promise, left.check) != (before.promise, before.check)
        again = Schedule.from_json(short.to_json())
        assert trace_of(again, world) == trace_of(short, world)
    assert not run(short).promise, "the machine as it is keeps the promise there"


@pytest.mark.parametrize("profile", PROFILES)
def test_schedules_are_data(profile: str) -> None:
    """A schedule is drawn from its seed alone, reads back from JSON, and replays to the same trace."""
    for seed in range(40):
        schedule = draw(seed, profile)
        assert schedule == draw(seed, profile)
        assert Schedule.from_json(schedule.to_json()) == schedule
    assert trace_of(schedule) == trace_of(Schedule.from_json(schedule.to_json()))


def test_every_kind_of_fault_is_drawn() -> None:
    """By counting: a kind that never comes up would go unchecked."""
    schedules = [draw(seed) for seed in range(3000)]
    kinds = {fault.kind for schedule in schedules for fault in schedule.faults}
    assert kinds == {
        "crash", "late", "leave", "cut", "pause", "clock", "stranger", "foreign", "flood", "lost", "noise",
        "equivocate", "time_up", "map", "tempt",
    }  # fmt: skip
    crashes = [fault for schedule in schedules for fault in schedule.faults if fault.kind == "crash"]
    assert {fault.where for fault in crashes if fault.step} == {"before", "torn", "after"}
    assert any(fault.damaged for fault in crashes)
    assert any(fault.until < 0 for fault in crashes)
    assert {schedule.rules["mode"] for schedule in schedules} == {"sync", "async"}
    assert any(schedule.agents == 50 for schedule in schedules)
    assert any(schedule.rules.get("target") for schedule in schedules)
    assert any(schedule.bases for schedule in schedules)


def test_failure_is_told_with_its_replay(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that a failure names shows the failure again and leaves with 1."""
    mutant = "publish-first"
    caught = catch(BY_NAME[mutant], range(100))
    assert caught is not None
    with BY_NAME[mutant].alive() as world:
        outcome = run(draw(caught.seed), world)
    text = explain(outcome, mutant=mutant)
    command = next(line for line in text.splitlines() if line.startswith("python -m tests.faults"))
    monkeypatch.setattr("sys.argv", command.split()[2:])
    assert main() == 1
    assert "BROKEN" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["faults", "--schedules", "5", "--profile", "calm"])
    assert main() == 0
    assert "a second" in capsys.readouterr().out
