"""Makes a failing schedule short enough to read: less goes wrong, fewer rounds and agents, while the same check fails
(delta debugging: Zeller & Hildebrandt 2002)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from tests.faults.run import run
from tests.faults.schedule import Fault, Map, Schedule
from tests.faults.world import World

T = TypeVar("T")
MOST_RUNS = 600


def shrink(schedule: Schedule, world: type[World] = World, most_runs: int = MOST_RUNS) -> Schedule:
    """Return a schedule in which the same check of the same promise fails, and from which nothing can be left out
    alone. One that breaks none comes back as it is."""
    broken = run(schedule, world)
    if not broken.promise:
        return schedule
    runs = 0

    def fails(candidate: Schedule) -> bool:
        nonlocal runs
        runs += 1
        if runs > most_runs:
            return False
        found = run(candidate, world)
        return (found.promise, found.check) == (broken.promise, broken.check)

    before = None
    while before != schedule and runs < most_runs:
        before = schedule
        schedule = _fewer_faults(schedule, fails)
        for make in (_calmer, _shorter, _smaller, _sparser, _plainer):
            schedule = _greedy(schedule, make, fails)
    return schedule


def ddmin(things: Sequence[T], fails: Callable[[Sequence[T]], bool]) -> Sequence[T]:
    """Return a part of `things` that still fails and from which no single one can be taken away."""
    parts = 2
    while len(things) > 0:
        size = -(-len(things) // parts)
        for start in range(0, len(things), size):
            rest = [*things[:start], *things[start + size :]]
            if fails(rest):
                things, parts = rest, max(parts - 1, 2)
                break
        else:
            if size == 1:
                break
            parts = min(2 * parts, len(things))
    return things


def _fewer_faults(schedule: Schedule, fails: Callable[[Schedule], bool]) -> Schedule:
    left = ddmin(schedule.faults, lambda faults: fails(replace(schedule, faults=tuple(faults))))
    return replace(schedule, faults=tuple(left))


def _greedy(
    schedule: Schedule, make: Callable[[Schedule], Iterator[Schedule]], fails: Callable[[Schedule], bool]
) -> Schedule:
    """Take the first simpler one that fails, again and again."""
    while True:
        for candidate in make(schedule):
            if candidate != schedule and fails(candidate):
                schedule = candidate
                break
        else:
            return schedule


def _calmer(s: Schedule) -> Iterator[Schedule]:
    for name in ("drop", "duplicate", "fetch_fails", "fetch_hangs", "refuses", "backs_off", "rebase_fails"):
        if getattr(s, name):
            yield replace(s, **{name: 0.0})


def _shorter(s: Schedule) -> Iterator[Schedule]:
    if s.rules["rounds"] is not None and s.rules["rounds"] > 1:
        for rounds in (s.rules["rounds"] // 2, s.rules["rounds"] - 1):
            yield replace(s, rules={**s.rules, "rounds": max(rounds, 1)})


def _smaller(s: Schedule) -> Iterator[Schedule]:
    """Leave one agent out; those after it move up."""
    for gone in reversed(range(s.agents)):
        if s.agents > 2:
            yield _without(s, gone)


def _without(s: Schedule, gone: int) -> Schedule:
    def moved(agent: int) -> int:
        return agent - (agent > gone)

    def fault(f: Fault) -> Fault:
        groups = tuple(tuple(moved(a) for a in group if a != gone) for group in f.groups)
        return replace(f, agent=moved(f.agent), peer=moved(f.peer), groups=groups)

    maps = tuple(
        replace(
            m, cycle=tuple(tuple((moved(a), moved(b)) for a, b in edges if gone not in (a, b)) for edges in m.cycle)
        )
        for m in s.maps
    )
    faults = tuple(fault(f) for f in s.faults if f.kind in ("cut", "map") or f.agent != gone)
    slow = tuple((moved(agent), factor) for agent, factor in s.slow if agent != gone)
    bases = tuple((moved(agent), base) for agent, base in s.bases if agent != gone)
    return replace(s, agents=s.agents - 1, maps=maps, faults=faults, slow=slow, bases=bases)


def _sparser(s: Schedule) -> Iterator[Schedule]:
    """Leave out the second map, a graph of the cycle, or a link."""
    if len(s.maps) > 1 and not any(f.kind == "map" for f in s.faults):
        yield replace(s, maps=s.maps[:1])
    for i, map_ in enumerate(s.maps):
        for changed in _sparser_map(map_):
            yield replace(s, maps=(*s.maps[:i], changed, *s.maps[i + 1 :]))


def _sparser_map(map_: Map) -> Iterator[Map]:
    for i, edges in enumerate(map_.cycle):
        if len(map_.cycle) > 1:
            yield replace(map_, cycle=(*map_.cycle[:i], *map_.cycle[i + 1 :]))
        for j in range(len(edges)):
            yield replace(map_, cycle=(*map_.cycle[:i], (*edges[:j], *edges[j + 1 :]), *map_.cycle[i + 1 :]))


def _plainer(s: Schedule) -> Iterator[Schedule]:
    plain = {"message_s": (0.1, 0.1), "fetch_s": (0.1, 0.1), "job_s": (0.0, 0.0), "train_s": (1.0, 1.0)}
    for name, span in plain.items():
        yield replace(s, **{name: span})
    for i in range(len(s.slow)):
        yield replace(s, slow=(*s.slow[:i], *s.slow[i + 1 :]))
    yield replace(s, in_order=True)
    if s.learn != "off":
        yield replace(s, learn="off")
    if s.base:
        yield replace(s, base="")
    if s.bases:
        yield replace(s, bases=())
    if s.rules.get("target"):
        yield replace(s, rules={**s.rules, "target": None})
    if s.rules["min_peers"]:
        yield replace(s, rules={**s.rules, "min_peers": 0})
    if s.rules.get("adopt_rounds"):
        yield replace(s, rules={**s.rules, "adopt_rounds": 0})
    if s.rules["basis_gossip"]:
        yield replace(s, rules={**s.rules, "basis_gossip": False})
    for i, fault in enumerate(s.faults):
        for change in ({"count": 1}, {"told": False}, {"damaged": False}):
            yield replace(s, faults=(*s.faults[:i], replace(fault, **change), *s.faults[i + 1 :]))
