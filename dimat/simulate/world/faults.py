"""Faults of a simulated network: crashes, joins, leaves, partitions and slow-downs.

The script (`simulate.faults`) is played through once before the run, so that a script that contradicts itself is
refused early; random faults (`simulate.random_faults`) are then drawn into the time that the script leaves free.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from dimat.config import ExperimentConfig, FaultConfig, Moment, RandomFaultsConfig
from dimat.errors import ConfigError, unknown_agent
from dimat.seeds import numpy_generator

HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class Heal:
    """The partition `id` ends."""

    at_s: float
    id: str


@dataclass(frozen=True, slots=True)
class Join:
    """A newcomer starts."""

    at_s: float
    agent: str


@dataclass(frozen=True, slots=True)
class Slow:
    """From now on training takes `factor` times as long as at the start of the run."""

    at_s: float
    agent: str
    factor: float


@dataclass(frozen=True, slots=True)
class Cut:
    """Agents of different `groups` cannot reach each other; those in none form one more group."""

    at_s: float
    id: str
    groups: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Leave:
    """An agent leaves for good, and tells its peers."""

    at_s: float
    agent: str


@dataclass(frozen=True, slots=True)
class Crash:
    """An agent's process dies; what is on its disk stays. `restart_after_s`: None = never."""

    at_s: float
    agent: str
    restart_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Restart:
    """An agent is started again from its newest checkpoint, if `crash` is the reason why it is down."""

    at_s: float
    agent: str
    crash: Crash


Fault = Heal | Restart | Join | Slow | Cut | Leave | Crash
ORDER = (Heal, Restart, Join, Slow, Cut, Leave, Crash)
"""Order of faults at the same time: repairs come before failures."""


@dataclass(frozen=True, slots=True)
class CrashPoint:
    """A crash of `agent` when it is asked to do `on` in `round`, and its restart `restart_after_s` later, or never.
    `entry`: its name in messages."""

    agent: str
    round: int
    on: Moment
    restart_after_s: float | None = None
    entry: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """All faults of a network. `timed`: faults in order of time; `on_action`: crashes that wait for an
    agent's action; `late`: agents that join later and are not there at first.

    The time of a crash point is not known beforehand: a timed crash may find its agent already down, and then has no
    effect, nor has its restart; an agent that leaves while it is down stays away.
    """

    timed: tuple[Fault, ...] = ()
    on_action: tuple[CrashPoint, ...] = ()
    late: frozenset[str] = field(default_factory=frozenset[str])

    @property
    def crashes(self) -> bool:
        """Whether any agent may crash."""
        return bool(self.on_action) or any(isinstance(fault, Crash) for fault in self.timed)


@dataclass(slots=True)
class _Life:
    """An agent while the script is played: where it is, since when it is up, and when it was up before."""

    state: str
    since: float = 0.0
    up: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])

    def ends(self, at_s: float, state: str) -> None:
        self.up.append((self.since, at_s))
        self.state = state

    def begins(self, at_s: float) -> None:
        self.since = at_s
        self.state = "up"


def plan_faults(config: ExperimentConfig, agents: Sequence[str]) -> FaultPlan:
    """Return the faults of `agents` in an experiment: its script, and random faults drawn from its seed.

    One model trained on all data (the ceiling) is not a network, and has no faults.
    Raises ConfigError, naming the entry, for a script that contradicts itself: an unknown agent; a crash of one that
    is down, has left or is not there yet; a second join; a leave while down; groups that overlap, or one group
    of all agents; no agent that starts the network.
    """
    if config.merge.preset.ceiling:
        return FaultPlan()
    script = config.simulate.faults
    _check_names(script, agents)
    late = _late(script, agents)
    lives = {agent: _Life("not there yet" if agent in late else "up") for agent in agents}
    played = _play(script, lives)
    chance = config.simulate.random_faults
    drawn = (*_random_crashes(chance, lives, config.seed), *_random_partitions(chance, agents, config.seed))
    # stable: faults at one time stay in the order in which they were played, and a random outage ends before them
    timed = sorted((*drawn, *played), key=lambda fault: fault.at_s)
    return FaultPlan(tuple(timed), _crash_points(script), late)


def _entry(i: int) -> str:
    return f"simulate.faults[{i}]"


def _check_names(script: Sequence[FaultConfig], agents: Sequence[str]) -> None:
    known = set(agents)

    def check(name: str, i: int) -> None:
        if name not in known:
            raise ConfigError(unknown_agent(_entry(i), name, agents))

    for i, fault in enumerate(script):
        if fault.agent is not None:
            check(fault.agent, i)
        seen: set[str] = set()
        for group in fault.groups:
            if not group:
                raise ConfigError(f"{_entry(i)}: a group is empty; name its agents, or leave it out")
            for name in group:
                check(name, i)
                if name in seen:
                    raise ConfigError(f"{_entry(i)}: agent {name!r} is in the groups twice; name it once")
                seen.add(name)
        if len(fault.groups) == 1 and len(seen) == len(known):
            raise ConfigError(
                f"{_entry(i)}: one group of all agents separates nobody; leave some out or name two groups"
            )


def _late(script: Sequence[FaultConfig], agents: Sequence[str]) -> frozenset[str]:
    joins: dict[str, int] = {}
    for i, fault in enumerate(script):
        if fault.kind == "join" and fault.agent is not None:
            first = joins.setdefault(fault.agent, i)
            if first != i:
                raise ConfigError(
                    f"{_entry(i)}: agent {fault.agent!r} already joins by {_entry(first)}; "
                    "to let it come back, use a crash with restart_after_s"
                )
    if joins and len(joins) == len(agents):
        raise ConfigError(
            f"{_entry(max(joins.values()))}: all {len(agents)} agents join later, so nobody starts the network; "
            "let one agent start without a join"
        )
    return frozenset(joins)


def _timed(script: Sequence[FaultConfig]) -> Iterator[tuple[int, Fault]]:
    """Yield each entry that has a time, with its number."""
    for i, fault in enumerate(script):
        at_s, agent = fault.at_s, fault.agent or ""
        if at_s is None:
            continue
        if fault.kind == "crash":
            yield i, Crash(at_s, agent, fault.restart_after_s)
        elif fault.kind == "join":
            yield i, Join(at_s, agent)
        elif fault.kind == "leave":
            yield i, Leave(at_s, agent)
        elif fault.kind == "slow":
            yield i, Slow(at_s, agent, fault.factor or 1.0)
        else:
            yield i, Cut(at_s, _entry(i), fault.groups)


def _play(script: Sequence[FaultConfig], lives: dict[str, _Life]) -> list[Fault]:
    """Play the timed entries through, keeping account of the agents in `lives`; return what happens, in order."""
    queue = [(fault.at_s, ORDER.index(type(fault)), i, fault) for i, fault in _timed(script)]
    heapq.heapify(queue)
    played: list[Fault] = []

    def then(fault: Fault, i: int) -> None:
        heapq.heappush(queue, (fault.at_s, ORDER.index(type(fault)), i, fault))

    while queue:
        at_s, _, i, fault = heapq.heappop(queue)
        played.append(fault)
        entry = script[i]
        match fault:
            case Cut():
                if entry.heal_after_s is not None:
                    then(Heal(at_s + entry.heal_after_s, fault.id), i)
            case Heal():
                pass
            case Restart() | Join():
                lives[fault.agent].begins(at_s)
            case Slow():
                if lives[fault.agent].state == "gone":
                    raise _contradiction(i, fault.agent, "is slowed down", at_s, "it has left")
            case Leave() | Crash():
                life = lives[fault.agent]
                verb = "crashes" if isinstance(fault, Crash) else "leaves"
                if life.state != "up":
                    why = {"down": "it is down", "gone": "it has left"}.get(life.state, "it has not joined yet")
                    raise _contradiction(i, fault.agent, verb, at_s, why)
                life.ends(at_s, "down" if isinstance(fault, Crash) else "gone")
                if isinstance(fault, Crash) and fault.restart_after_s is not None:
                    then(Restart(at_s + fault.restart_after_s, fault.agent, fault), i)
    for life in lives.values():
        if life.state == "up":
            life.ends(math.inf, "up")
    return played


def _contradiction(i: int, agent: str, verb: str, at_s: float, why: str) -> ConfigError:
    return ConfigError(f"{_entry(i)}: agent {agent!r} {verb} at {at_s:g} s, but {why} then; change the script")


def _crash_points(script: Sequence[FaultConfig]) -> tuple[CrashPoint, ...]:
    points: list[CrashPoint] = []
    seen: dict[tuple[str, int, str], int] = {}
    ends: dict[str, tuple[int, int]] = {}
    for i, fault in enumerate(script):
        if fault.round is None or fault.on is None or fault.agent is None:
            continue
        first = seen.setdefault((fault.agent, fault.round, fault.on), i)
        if first != i:
            raise ConfigError(f"{_entry(i)} is the same crash as {_entry(first)}; remove one")
        if fault.restart_after_s is None:
            ends[fault.agent] = min(ends.get(fault.agent, (fault.round, i)), (fault.round, i))
        points.append(CrashPoint(fault.agent, fault.round, fault.on, fault.restart_after_s, _entry(i)))
    for (agent, number, _), i in seen.items():
        last, by = ends.get(agent, (number, i))
        if number > last:
            raise ConfigError(
                f"{_entry(i)}: agent {agent!r} crashes in round {number}, but {_entry(by)} takes it down for good in "
                f"round {last}; give that one restart_after_s"
            )
    return tuple(points)


def _random_crashes(chance: RandomFaultsConfig, lives: dict[str, _Life], seed: int) -> Iterable[Fault]:
    """Draw each agent's crashes as a Poisson process in the time that the script leaves it up; an outage ends when
    the script next does something to the agent."""
    if chance.crashes_per_hour == 0 or chance.until_s is None:
        return
    gap = HOUR_S / chance.crashes_per_hour
    for agent, life in lives.items():
        rng = numpy_generator(seed, "faults", "crash", agent)
        for begin, end in life.up:
            time = begin + rng.exponential(gap)
            while time < min(end, chance.until_s):
                back = min(time + rng.exponential(chance.mean_down_s), end)
                crash = Crash(time, agent, back - time)
                yield crash
                yield Restart(back, agent, crash)
                time = back + rng.exponential(gap)


def _random_partitions(chance: RandomFaultsConfig, agents: Sequence[str], seed: int) -> Iterable[Fault]:
    """Draw partitions of the network as a Poisson process, each agent on either side with probability 1/2."""
    if chance.partitions_per_hour == 0 or chance.until_s is None or len(agents) < 2:
        return
    rng = numpy_generator(seed, "faults", "partition")
    gap = HOUR_S / chance.partitions_per_hour
    time, number = rng.exponential(gap), 0
    while time < chance.until_s:
        number += 1
        id = f"random partition {number}"
        yield Cut(time, id, _two_groups(agents, rng))
        yield Heal(time + rng.exponential(chance.mean_partition_s), id)
        time += rng.exponential(gap)


def _two_groups(agents: Sequence[str], rng: np.random.Generator) -> tuple[tuple[str, ...], tuple[str, ...]]:
    while True:
        sides = rng.integers(2, size=len(agents))
        groups = tuple(tuple(a for a, s in zip(agents, sides, strict=True) if s == side) for side in (0, 1))
        if all(groups):
            return groups[0], groups[1]
