"""Run seeded hostile schedules against the round machine: `python -m tests.faults --help`.

A schedule that has found a fault stays a test as a file in `found/`, named after the fault:
`python -m tests.faults --replay SEED --shrink --save tests/faults/found/waits-for-the-dead.json`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

from tests.faults.draw import PROFILES, draw
from tests.faults.hunt import explain, hunt, replay_command
from tests.faults.mutants import BY_NAME, Mutant
from tests.faults.run import Outcome, run, trace_of
from tests.faults.schedule import Schedule
from tests.faults.shrink import shrink

SHOWN = 10


def main() -> int:
    """Run schedules, or one again."""
    args = _arguments()
    return _replay(args) if args.replay else _hunt(args)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--schedules", type=int, default=1000, help="how many (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--profile", choices=list(PROFILES), help="draw only such schedules")
    parser.add_argument("--mutant", choices=list(BY_NAME), default="", help="break the machine on purpose")
    parser.add_argument("--replay", metavar="SEED|FILE", help="run one schedule again and tell what happens")
    parser.add_argument("--save", metavar="FILE", type=Path, help="write the schedule that is run again there")
    parser.add_argument("--shrink", action="store_true", help="make failing schedules short first")
    return parser.parse_args()


def _hunt(args: argparse.Namespace) -> int:
    seeds = range(args.seed, args.seed + args.schedules)
    began = time.perf_counter()
    totals: Counter[str] = Counter()
    promises: Counter[str] = Counter()
    first: Outcome | None = None
    for counted, broken in hunt(seeds, args.profile, args.mutant, args.workers):
        totals += counted
        for outcome in broken:
            first = first or outcome
            promises[outcome.promise] += 1
            if sum(promises.values()) <= SHOWN:
                print(f"seed {outcome.schedule.seed}: {outcome.text}")
                print(f"    {replay_command(outcome.schedule, args.profile, args.mutant)}")
    seconds = time.perf_counter() - began
    print(f"{totals['schedules']} schedules in {seconds:.1f} s: {totals['schedules'] / seconds:.0f} a second")
    print(", ".join(f"{name} {count}" for name, count in totals.most_common() if name != "schedules"))
    if first is None:
        return 0
    print("broken: " + ", ".join(f"{promise} {count}" for promise, count in promises.most_common()))
    if args.shrink:
        print(explain(first, args.profile, args.mutant))
    return 1


def _replay(args: argparse.Namespace) -> int:
    file = Path(args.replay)
    schedule = Schedule.from_json(file.read_text()) if file.exists() else draw(int(args.replay), args.profile)
    with BY_NAME.get(args.mutant, Mutant("", "")).alive() as world:
        if args.shrink:
            schedule = shrink(schedule, world)
        print(schedule.to_json())
        if args.save:
            args.save.write_text(schedule.to_json() + "\n")
        print(trace_of(schedule, world))
        return 1 if run(schedule, world).promise else 0


if __name__ == "__main__":
    sys.exit(main())
