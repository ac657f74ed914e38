"""What happens in one simulated network, as explicit data: drawn from a seed, written as JSON, replayed and shrunk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from dimat.agent.protocol.plan import Plan, PushShares, RoundPlan, Rules
from dimat.config import ScheduleConfig

Edges = tuple[tuple[int, int], ...]
Span = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong. `at`: when, in seconds; what the other fields mean depends on `kind` (see `inject`).

    A crash with a `step` strikes at that action of the agent, counted over its lives, `where`: before it, "torn" in
    the middle of it, or after it; `until`: when what is wrong is over, for a crash the seconds until the restart
    (negative: never).
    """

    kind: str
    at: float = 0.0
    agent: int = 0
    peer: int = -1
    until: float = 0.0
    step: int = 0
    where: str = "after"
    damaged: bool = False
    told: bool = False
    count: int = 1
    factor: float = 1.0
    groups: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Map:
    """A network map: in round r the links are `cycle[(r - 1) % len(cycle)]`, directed ones from sender to reader."""

    cycle: tuple[Edges, ...]
    directed: bool = False
    push: bool = False


@dataclass(frozen=True, slots=True)
class Schedule:
    """All that a simulated network is made of.

    Spans are (least, most) seconds; `slow`: agents that train so many times as long; chances from 0 to 1 hold until
    `quiet_s`. `keep`: snapshots that a publisher offers; `linger_s`: how long an agent that is through still serves
    them (negative: for good). `base`: of all agents but those in `bases`. `learn`: "on", "off", or "half" (odd rounds).
    `exact`: nothing is lost for good, so that
    the trajectory is known beforehand. `settle`: rounds that an endless run goes on for after `quiet_s`.
    """

    seed: int
    profile: str
    agents: int
    maps: tuple[Map, ...]
    rules: Mapping[str, Any]
    message_s: Span = (0.01, 0.5)
    train_s: Span = (0.5, 1.5)
    slow: tuple[tuple[int, float], ...] = ()
    job_s: Span = (0.0, 0.2)
    fetch_s: Span = (0.01, 0.5)
    in_order: bool = False
    drop: float = 0.0
    duplicate: float = 0.0
    fetch_fails: float = 0.0
    fetch_hangs: float = 0.0
    refuses: float = 0.0
    backs_off: float = 0.0
    rebase_fails: float = 0.0
    learn: str = "on"
    keep: int = 20
    linger_s: float = -1.0
    base: str = ""
    bases: tuple[tuple[int, str], ...] = ()
    quiet_s: float = 0.0
    settle: int = 0
    exact: bool = False
    faults: tuple[Fault, ...] = field(default=())

    @property
    def push(self) -> bool:
        return any(map_.push for map_ in self.maps)

    def base_of(self, agent: int) -> str:
        return dict(self.bases).get(agent, self.base)

    def to_json(self) -> str:
        """Write what differs from the defaults."""
        return json.dumps(_brief(self))

    @staticmethod
    def from_json(text: str) -> Schedule:
        values = json.loads(text)
        values["maps"] = tuple(
            Map(**{**m, "cycle": tuple(tuple((a, b) for a, b in edges) for edges in m["cycle"])})
            for m in values["maps"]
        )
        values["faults"] = tuple(
            Fault(**{**f, "groups": tuple(tuple(g) for g in f.get("groups", ()))}) for f in values.get("faults", ())
        )
        values["bases"] = tuple((agent, base) for agent, base in values.get("bases", ()))
        values["slow"] = tuple((agent, factor) for agent, factor in values.get("slow", ()))
        for name in ("message_s", "train_s", "job_s", "fetch_s"):
            if name in values:
                values[name] = tuple(values[name])
        if values["rules"].get("target"):
            values["rules"]["target"] = tuple(values["rules"]["target"])
        return Schedule(**values)


def _brief(thing: Any) -> dict[str, Any]:
    values = {}
    for spec in fields(thing):
        value = getattr(thing, spec.name)
        if spec.default is not MISSING and value == spec.default:
            continue
        if spec.name in ("maps", "faults"):
            value = [_brief(entry) for entry in value]
        values[spec.name] = dict(value) if isinstance(value, Mapping) else value
    return values


def name_of(agent: int) -> str:
    return f"a{agent}"


def rules_of(schedule: Schedule) -> Rules:
    return Rules.of(ScheduleConfig(), **schedule.rules)


class Plans:
    """The plans of all agents, worked out from the maps alone. One is made per schedule and kept: rows are cached."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._rounds: dict[tuple[int, int], dict[int, RoundPlan]] = {}
        self._plans: dict[tuple[int, int], Plan] = {}
        self._readers: dict[tuple[int, int], list[list[str]]] = {}

    def plan(self, map_: int, agent: int) -> Plan:
        """Return an agent's plan by a map."""
        known = self._plans.get((map_, agent))
        if known is None:
            cycle = range(len(self._schedule.maps[map_].cycle))
            peers = {peer for i in cycle for peer in self._round(map_, i)[agent].mixing}
            known = Plan(
                frozenset(peers - {name_of(agent)}),
                lambda number: self.of(map_, number)[agent],
                lambda number: self.readers(map_, number)[agent],
            )
            self._plans[map_, agent] = known
        return known

    def of(self, map_: int, number: int) -> dict[int, RoundPlan]:
        """Return everybody's plan of a round."""
        learn = {"on": True, "off": False, "half": number % 2 == 1}[self._schedule.learn]
        cycle = len(self._schedule.maps[map_].cycle)
        phase = (number - 1) % cycle
        return self._round(map_, phase if learn else phase + cycle)

    def readers(self, map_: int, number: int) -> list[list[str]]:
        """Return who merges each agent's snapshot of a round."""
        phase = (number - 1) % len(self._schedule.maps[map_].cycle)
        known = self._readers.get((map_, phase))
        if known is None:
            agents = self._schedule.agents
            heard = sources_of(self._schedule.maps[map_], phase, agents)
            known = [[name_of(b) for b in range(agents) if a in heard[b]] for a in range(agents)]
            self._readers[map_, phase] = known
        return known

    def _round(self, map_: int, phase: int) -> dict[int, RoundPlan]:
        known = self._rounds.get((map_, phase))
        if known is None:
            cycle = self._schedule.maps[map_].cycle
            known = _rows(self._schedule.agents, self._schedule.maps[map_], phase % len(cycle), phase < len(cycle))
            self._rounds[map_, phase] = known
        return known


def sources_of(map_: Map, phase: int, agents: int) -> list[list[int]]:
    """Return whom each agent hears."""
    heard: list[set[int]] = [set() for _ in range(agents)]
    for a, b in map_.cycle[phase]:
        heard[b].add(a)
        if not map_.directed:
            heard[a].add(b)
    return [sorted(peers) for peers in heard]


def _rows(agents: int, map_: Map, phase: int, learn: bool) -> dict[int, RoundPlan]:
    """Metropolis weights on undirected links, 1 / (1 + heard) on directed ones; push-sum shares 1 / (1 + readers)."""
    heard = sources_of(map_, phase, agents)
    readers: list[list[int]] = [[b for b in range(agents) if a in heard[b]] for a in range(agents)]
    rows = {}
    for a in range(agents):
        if map_.directed:
            others = {b: 1 / (1 + len(heard[a])) for b in heard[a]}
        else:
            others = {b: 1 / (1 + max(len(heard[a]), len(heard[b]))) for b in heard[a]}
        mixing = {name_of(a): 1 - sum(others.values()), **{name_of(b): w for b, w in others.items()}}
        share = 1 / (1 + len(readers[a]))
        push = PushShares(share, {name_of(b): share for b in readers[a]}) if map_.push else None
        rows[a] = RoundPlan(mixing, learn, push)
    return rows
