"""Schedules drawn from a seed, by profile: how much goes wrong, and what may be expected in spite of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.faults.schedule import Edges, Fault, Map, Schedule

SHARES = {"calm": 20, "exact": 14, "lossy": 20, "crashy": 18, "hostile": 16, "partitioned": 8, "push": 4}
"""How many in a hundred schedules are of each profile."""

BIG = 0.006
"""Chance of a network of fifty agents."""


def draw(seed: int, profile: str | None = None) -> Schedule:
    """Draw a schedule; without `profile` that too is drawn."""
    rng = random.Random(seed)
    drawn = rng.choices(list(SHARES), list(SHARES.values()))[0]
    name = profile or drawn
    return _more(random.Random(seed ^ 0xADD), PROFILES[name](rng, replace(_network(rng, name), seed=seed)))


# ── the network ──────────────────────────────────────────────────────────────────────────────────────────────────
def _network(rng: random.Random, profile: str) -> Schedule:
    push = profile == "push" or (profile in ("calm", "exact") and rng.random() < 0.15)
    big = rng.random() < BIG and profile in ("calm", "lossy", "crashy", "hostile")
    agents = 50 if big else rng.choices(range(2, 9), [3, 5, 5, 4, 2, 1, 1])[0]
    directed = push or (rng.random() < 0.2 and not big)
    varying = not push and rng.random() < 0.2
    asynchronous = rng.random() < (0.15 if profile in ("calm", "exact") else 0.35)
    rounds = rng.randint(2, 4) if big else rng.randint(2, 7)
    rules: dict[str, Any] = {
        "rounds": rounds,
        "deadline_s": 1000.0,
        "mode": "async" if asynchronous else "sync",
        "min_peers": rng.choice([0, 0, 0, 1, 2]),
        "max_staleness": rng.choice([1, 2, 4]),
        "staleness_decay": rng.choice([0.5, 0.7, 1.0]),
        "basis_gossip": rng.random() < 0.7,
        "join": rng.choice(["adopt", "align"]),
        "join_wait_s": rng.choice([2.0, 5.0]),
    }
    return Schedule(
        seed=0,
        profile=profile,
        agents=agents,
        maps=(Map(_cycle(rng, agents, directed, varying), directed, push),),
        rules=rules,
        message_s=rng.choice([(0.0, 0.0), (0.01, 0.3), (0.01, 2.0)]),
        train_s=rng.choice([(1.0, 1.0), (0.5, 1.5), (0.1, 3.0)]),
        job_s=rng.choice([(0.0, 0.0), (0.0, 0.3)]),
        fetch_s=rng.choice([(0.0, 0.1), (0.01, 1.0)]),
        in_order=rng.random() < 0.5,
        learn=rng.choices(["on", "off", "half"], [6, 2, 2])[0],
        base=rng.choice(["", "base"]),
        slow=_slow(rng, agents) if rng.random() < 0.25 else (),
    )


def _slow(rng: random.Random, agents: int) -> tuple[tuple[int, float], ...]:
    chosen = rng.sample(range(agents), rng.randint(1, max(agents // 2, 1)))
    return tuple((agent, round(rng.uniform(1.5, 5), 1)) for agent in sorted(chosen))


def _cycle(rng: random.Random, agents: int, directed: bool, varying: bool) -> tuple[Edges, ...]:
    edges = (_directed if directed else _undirected)(rng, agents)
    if not varying:
        return (edges,)
    parts: list[list[tuple[int, int]]] = [[] for _ in range(rng.choice([2, 3]))]
    for edge in edges:
        rng.choice(parts).append(edge)
    return tuple(tuple(part) for part in parts)


def _undirected(rng: random.Random, agents: int) -> Edges:
    kind = rng.choice(["ring", "path", "star", "complete", "random"])
    if agents > 12:
        kind = rng.choice(["ring", "random"])
    match kind:
        case "ring":
            edges = {(i, (i + 1) % agents) for i in range(agents)}
        case "path":
            edges = {(i, i + 1) for i in range(agents - 1)}
        case "star":
            edges = {(0, i) for i in range(1, agents)}
        case "complete":
            edges = {(i, j) for i in range(agents) for j in range(i)}
        case _:
            edges = {(rng.randrange(i), i) for i in range(1, agents)}
            edges |= {(rng.randrange(agents), rng.randrange(agents)) for _ in range(agents // 2)}
    return tuple(sorted({(min(e), max(e)) for e in edges if e[0] != e[1]}))


def _directed(rng: random.Random, agents: int) -> Edges:
    """A ring one way, so that everybody reaches everybody, and some more links."""
    edges = {(i, (i + 1) % agents) for i in range(agents)}
    edges |= {(rng.randrange(agents), rng.randrange(agents)) for _ in range(rng.randrange(agents + 1))}
    return tuple(sorted(e for e in edges if e[0] != e[1]))


# ── profiles ─────────────────────────────────────────────────────────────────────────────────────────────────────
def _calm(rng: random.Random, s: Schedule) -> Schedule:
    """Nothing but delays: the trajectory is the matrix product."""
    return replace(s, exact=True)


def _exact(rng: random.Random, s: Schedule) -> Schedule:
    """Crashes and pauses that the patient get over without loss: the trajectory is still the matrix product."""
    faults = [_crash(rng, s, damaged=0.0, never=0.0, told=0.0) for _ in range(rng.randint(1, 4))]
    faults += [_pause(rng, s) for _ in range(rng.randint(0, 1))]
    return replace(s, exact=True, faults=_sorted(faults))


def _lossy(rng: random.Random, s: Schedule) -> Schedule:
    """Messages get lost, fetches fail, snapshots are refused; nobody crashes."""
    return _careless(rng, _impatient(rng, s), [_lost, _stranger, _foreign, _flood, _noise, _clock, _pause])


def _crashy(rng: random.Random, s: Schedule) -> Schedule:
    s = _impatient(rng, s)
    faults = [_crash(rng, s, damaged=0.25, never=0.15, told=0.5) for _ in range(rng.randint(1, 5))]
    return replace(s, faults=_sorted(faults))


def _hostile(rng: random.Random, s: Schedule) -> Schedule:
    """All of it."""
    s = _impatient(rng, s)
    if rng.random() < 0.3:
        s = replace(s, maps=(*s.maps, Map(_cycle(rng, s.agents, s.maps[0].directed, False), s.maps[0].directed)))
    kinds: list[Callable[[random.Random, Schedule], Fault]] = [
        _any_crash, _any_crash, _any_crash, _late, _leave, _cut, _pause, _clock,
        _stranger, _foreign, _flood, _lost, _noise, _equivocate, _time_up,
    ]  # fmt: skip
    s = _careless(rng, s, kinds, most=8)
    if len(s.maps) > 1:
        s = replace(s, faults=_sorted([*s.faults, Fault("map", at=rng.uniform(0, _length(s)))]))
    return _endless(rng, s) if rng.random() < 0.2 else s


def _partitioned(rng: random.Random, s: Schedule) -> Schedule:
    """Networks that fall apart and heal, with crashes and late joins, and then time to settle."""
    s = replace(_impatient(rng, s), keep=rng.choice([2, 3, 5]), linger_s=-1.0)
    s = replace(s, rules={**s.rules, "deadline_s": rng.choice([12.0, 20.0]), "min_peers": 0, "basis_gossip": True})
    s = replace(s, message_s=(0.01, 0.3), train_s=rng.choice([(0.5, 1.5), (1.5, 1.7)]))
    faults = [_cut(rng, s) for _ in range(rng.randint(1, 2))]
    if s.slow and rng.random() < 0.5:
        faults = [_slow_from_quick(rng, s)]
    faults += [_late(rng, s) for _ in range(rng.randint(0, 2))]
    faults += [_crash(rng, s, damaged=0.2, never=0.1, told=0.5) for _ in range(rng.randint(0, 2))]
    if s.slow:  # a deadline that the slowest can keep, from one meeting to the next
        slowest = max(factor for _, factor in s.slow) * s.train_s[1] * len(s.maps[0].cycle)
        s = replace(s, rules={**s.rules, "deadline_s": max(s.rules["deadline_s"], round(1.5 * slowest, 1))})
    return _endless(rng, replace(s, faults=_sorted(faults)))


def _push(rng: random.Random, s: Schedule) -> Schedule:
    """Push-sum on directed links: weight is never lost, whatever gets lost and whoever crashes (and comes back)."""
    s = _impatient(rng, s)
    s = _careless(rng, s, [_lost, _stranger, _foreign, _noise, _clock, _pause])
    crashes = [_crash(rng, s, damaged=0.0, never=0.1, told=0.5) for _ in range(rng.randint(0, 3))]
    return replace(s, faults=_sorted([*s.faults, *crashes]))


PROFILES = {
    "calm": _calm,
    "exact": _exact,
    "lossy": _lossy,
    "crashy": _crashy,
    "hostile": _hostile,
    "partitioned": _partitioned,
    "push": _push,
}


def _more(rng: random.Random, s: Schedule) -> Schedule:
    """What came to be drawn later, from a stream of its own, so that what a seed stands for stays: a target that ends
    runs early, agents on another base, newcomers that are offered what they must not take, and bases that are taken
    over with their weights."""
    if not s.exact and s.profile != "partitioned" and rng.random() < 0.2:
        s = replace(s, rules={**s.rules, "target": ("score", float(rng.randint(5, 7)))})
    if s.base and s.profile in ("lossy", "crashy", "hostile") and rng.random() < 0.2:
        others = rng.sample(range(s.agents), rng.randint(1, s.agents - 1))
        s = replace(s, bases=tuple((agent, "other") for agent in sorted(others)))
    tempted = [fault for fault in s.faults if fault.kind == "late" and rng.random() < 0.5]
    faults = [
        Fault("tempt", at=round(fault.at + rng.uniform(0, 2), 3), agent=fault.agent, count=rng.randint(1, 3))
        for fault in tempted
    ]
    s = replace(s, faults=_sorted([*s.faults, *faults])) if faults else s
    if s.rules["basis_gossip"] and not s.exact and rng.random() < 0.3:
        s = replace(s, rules={**s.rules, "adopt_rounds": rng.randint(1, 6)})
    return s


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────────────────────
def _impatient(rng: random.Random, s: Schedule) -> Schedule:
    rules = {**s.rules, "deadline_s": rng.choice([2.0, 4.0, 8.0, 20.0])}
    return replace(s, rules=rules, keep=rng.choice([1, 2, 3, 5]), linger_s=rng.choice([-1.0, 0.0, 3.0]))


def _careless(
    rng: random.Random, s: Schedule, kinds: list[Callable[[random.Random, Schedule], Fault]], most: int = 5
) -> Schedule:
    def chance(most: float) -> float:
        return rng.choice([0.0, 0.0, rng.uniform(0, most)])

    faults = [rng.choice(kinds)(rng, s) for _ in range(rng.randint(0, most))]
    return replace(
        s,
        drop=chance(0.3),
        duplicate=chance(0.3),
        fetch_fails=chance(0.3),
        fetch_hangs=chance(0.2),
        refuses=chance(0.3),
        backs_off=chance(0.3),
        rebase_fails=chance(0.5),
        faults=_sorted(faults),
        quiet_s=1e9,
    )


def _endless(rng: random.Random, s: Schedule) -> Schedule:
    """Without a last round: faults cease, the network settles, then everybody is stopped."""
    quiet = max([_length(s), *(max(f.at, f.until if f.kind in ("cut", "pause") else 0.0) for f in s.faults)]) + 1
    cycle = max(len(m.cycle) for m in s.maps)
    settle = cycle * (s.agents + 13) if s.agents < 20 else 3
    settle += 60 if s.slow else 12  # parts whose rounds have drifted apart first make up ground
    return replace(s, rules={**s.rules, "rounds": None}, quiet_s=quiet, settle=settle, linger_s=-1.0)


def _sorted(faults: list[Fault]) -> tuple[Fault, ...]:
    return tuple(sorted(faults, key=lambda f: (f.at, f.kind, f.agent)))


def _length(s: Schedule) -> float:
    return (s.rules["rounds"] or 6) * (s.train_s[1] + 1.0)


def _when(rng: random.Random, s: Schedule) -> float:
    return round(rng.uniform(0, _length(s)), 3)


def _who(rng: random.Random, s: Schedule) -> int:
    return rng.randrange(s.agents)


def _crash(rng: random.Random, s: Schedule, *, damaged: float, never: float, told: float) -> Fault:
    by_step = rng.random() < 0.7
    return Fault(
        "crash",
        at=0.0 if by_step else _when(rng, s),
        agent=_who(rng, s),
        step=rng.randint(1, 9 * (s.rules["rounds"] or 6)) if by_step else 0,
        where=rng.choice(["before", "torn", "after"]),
        until=-1.0 if rng.random() < never else round(rng.choice([0.0, rng.uniform(0, 4), rng.uniform(0, 20)]), 3),
        damaged=rng.random() < damaged,
        told=rng.random() < told,
    )


def _any_crash(rng: random.Random, s: Schedule) -> Fault:
    return _crash(rng, s, damaged=0.25, never=0.15, told=0.5)


def _pause(rng: random.Random, s: Schedule) -> Fault:
    at = _when(rng, s)
    return Fault("pause", at=at, agent=_who(rng, s), until=round(at + rng.uniform(0.1, 6), 3))


def _late(rng: random.Random, s: Schedule) -> Fault:
    return Fault("late", at=rng.choice([0.0, _when(rng, s)]), agent=_who(rng, s))


def _leave(rng: random.Random, s: Schedule) -> Fault:
    return Fault("leave", at=_when(rng, s), agent=_who(rng, s))


def _time_up(rng: random.Random, s: Schedule) -> Fault:
    return Fault("time_up", at=_when(rng, s), agent=_who(rng, s))


def _cut(rng: random.Random, s: Schedule) -> Fault:
    at, groups = _when(rng, s), [[], []]
    for agent in range(s.agents):
        rng.choice(groups).append(agent)
    until = round(at + rng.uniform(1, 12), 3)
    return Fault("cut", at=at, until=until, groups=tuple(tuple(g) for g in groups), told=rng.random() < 0.5)


def _slow_from_quick(rng: random.Random, s: Schedule) -> Fault:
    """A partition between the slow and the rest, long enough for their rounds to drift far apart."""
    slow = tuple(agent for agent, _ in s.slow)
    rest = tuple(agent for agent in range(s.agents) if agent not in slow)
    return Fault("cut", at=0.5, until=round(rng.uniform(25, 40), 3), groups=(slow, rest), told=rng.random() < 0.5)


def _clock(rng: random.Random, s: Schedule) -> Fault:
    return Fault("clock", at=_when(rng, s), agent=_who(rng, s), factor=rng.choice([0.0, 0.3, 3.0]))


def _message(kind: str, most: int = 1) -> Callable[[random.Random, Schedule], Fault]:
    def make(rng: random.Random, s: Schedule) -> Fault:
        return Fault(kind, at=_when(rng, s), agent=_who(rng, s), peer=_who(rng, s), count=rng.randint(1, most))

    return make


_stranger = _message("stranger", 40)
_foreign = _message("foreign", 3)
_flood = _message("flood", 200)
_lost = _message("lost")
_noise = _message("noise")
_equivocate = _message("equivocate", 3)
