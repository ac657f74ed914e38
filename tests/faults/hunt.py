"""Runs many schedules: the machine as it is, or one of its mutants."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from tests.faults.draw import draw
from tests.faults.mutants import BY_NAME, Mutant
from tests.faults.run import Outcome, run, trace_of
from tests.faults.schedule import Schedule
from tests.faults.shrink import shrink

CHUNK = 50


@dataclass(frozen=True, slots=True)
class Caught:
    """A mutant was caught by `promise`, in the schedule `seed`, the `count`-th."""

    seed: int
    count: int
    promise: str
    text: str


def run_seeds(seeds: Iterable[int], profile: str | None = None, mutant: str = "") -> tuple[Counter[str], list[Outcome]]:
    """Run schedules; return how often what happened, and those that broke a promise."""
    totals: Counter[str] = Counter()
    broken: list[Outcome] = []
    with BY_NAME.get(mutant, Mutant("", "")).alive() as world:
        for seed in seeds:
            outcome = run(draw(seed, profile), world)
            totals.update(outcome.totals)
            totals["schedules"] += 1
            totals["broken"] += bool(outcome.promise)
            if outcome.promise:
                broken.append(outcome)
    return totals, broken


def hunt(
    seeds: range, profile: str | None = None, mutant: str = "", workers: int = 1
) -> Iterator[tuple[Counter[str], list[Outcome]]]:
    """Run schedules in chunks, in several processes; results come in the order of the seeds."""
    chunks = [seeds[i : i + CHUNK] for i in range(0, len(seeds), CHUNK)]
    if workers <= 1:
        yield from (run_seeds(chunk, profile, mutant) for chunk in chunks)
        return
    with ProcessPoolExecutor(min(workers, os.cpu_count() or 1)) as pool:
        yield from pool.map(run_seeds, chunks, [profile] * len(chunks), [mutant] * len(chunks))


def catch(mutant: Mutant, seeds: Iterable[int], profile: str | None = None) -> Caught | None:
    """Return the first schedule in which a mutant breaks a promise that the machine as it is keeps."""
    for count, seed in enumerate(seeds, 1):
        schedule = draw(seed, profile)
        with mutant.alive() as world:
            outcome = run(schedule, world)
        if outcome.promise and not run(schedule).promise:
            return Caught(seed, count, outcome.promise, outcome.text)
    return None


def replay_command(schedule: Schedule, profile: str | None = None, mutant: str = "") -> str:
    """Return the command that runs a drawn schedule again and shows what happened."""
    options = (f" --profile {profile}" if profile else "") + (f" --mutant {mutant}" if mutant else "")
    return f"python -m tests.faults --replay {schedule.seed} --shrink{options}"


def explain(outcome: Outcome, profile: str | None = None, mutant: str = "", lines: int = 80) -> str:
    """Return what a person needs of a failure: what broke, how to see it again, the shortest story that shows it."""
    with BY_NAME.get(mutant, Mutant("", "")).alive() as world:
        short = shrink(outcome.schedule, world)
        story = trace_of(short, world).splitlines()
    cut = [f"… {len(story) - lines} lines before"] if len(story) > lines else []
    head = [outcome.text, replay_command(outcome.schedule, profile, mutant), short.to_json()]
    return "\n".join([*head, *cut, *story[-lines:]])
