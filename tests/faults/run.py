"""One schedule, run: what came of it."""

from __future__ import annotations

import traceback
from collections import Counter
from dataclasses import dataclass, field

from tests.faults.schedule import Schedule
from tests.faults.violation import Violation
from tests.faults.world import World


@dataclass(frozen=True, slots=True)
class Outcome:
    """`promise`: the one that was broken, if any, `text`: how, and `check`: by which of the checks of a promise, as the
    place of that check; `totals`: how often what happened."""

    schedule: Schedule
    promise: str = ""
    text: str = ""
    check: str = ""
    totals: Counter[str] = field(default_factory=Counter)


def run(schedule: Schedule, world: type[World] = World, trace: list[str] | None = None) -> Outcome:
    """Run a schedule. A machine that raises breaks a promise too."""
    network = world(schedule, trace=trace)
    try:
        network.run()
    except Violation as violation:
        return Outcome(schedule, violation.promise, str(violation), _place(violation), network.totals)
    except Exception as error:
        place = _place(error)
        text = f"{type(error).__name__}: {error} ({place})"
        return Outcome(schedule, f"raises {type(error).__name__}", text, place, network.totals)
    return Outcome(schedule, totals=network.totals)


def _place(error: BaseException) -> str:
    """Return where an error was raised, or a demand was not met."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name != "_demand"]
    return f"{frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno}"


def trace_of(schedule: Schedule, world: type[World] = World) -> str:
    """Run a schedule once more and write down all that happened."""
    lines: list[str] = []
    outcome = run(schedule, world, lines)
    if outcome.promise:
        lines.append(f"BROKEN  {outcome.text}")
    return "\n".join(lines)
