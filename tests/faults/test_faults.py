"""The round machine on thousands of seeded hostile schedules (reference: the promises in `agent.protocol.round`).

Each commit is tested on 1,000 schedules of its own, whose seeds come from its name; without a repository they begin at
0. `--fault-seed N` runs those of another one again. `make test-all` runs seeds 0 to 4,999 besides.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.hunt import explain, run_seeds
from tests.faults.run import run
from tests.faults.schedule import Schedule
from tests.faults.seeds import first_seed

SCHEDULES = 1000
ALL = 5000
CHUNK = 100


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "first" not in metafunc.fixturenames:
        return
    moving = first_seed(metafunc.config.getoption("fault_seed"))
    seeds = list(range(moving, moving + SCHEDULES, CHUNK))
    if metafunc.config.getoption("all"):
        seeds += [seed for seed in range(0, ALL, CHUNK) if seed not in seeds]
    metafunc.parametrize("first", seeds)


@pytest.mark.parametrize("file", sorted((Path(__file__).parent / "found").glob("*.json")), ids=lambda file: file.stem)
def test_what_was_found_once_stays_mended(file: Path) -> None:
    """Schedules that broke a promise, or that a check of these tests was wrong about, each in a file named after it."""
    outcome = run(Schedule.from_json(file.read_text()))
    assert not outcome.promise, outcome.text


def test_promises_hold(first: int) -> None:
    """Promises of the round machine, each checked by a reference of its own in `invariants` and `finals`."""
    totals, broken = run_seeds(range(first, first + CHUNK))
    assert not broken, f"{len(broken)} of {CHUNK} schedules break a promise; the first:\n{explain(broken[0])}"
    assert totals["merges"] > CHUNK, "the schedules must not be empty"
