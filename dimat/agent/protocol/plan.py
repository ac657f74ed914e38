"""The plan of the rounds (with whom, with what weights) and the rules they follow."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from dimat.config import ScheduleConfig
from dimat.metrics import score_of

LAST_ROUND = 2**40
"""The last round of a schedule without an end: no agent gets there by itself, and its manifests could still say it."""


@dataclass(frozen=True, slots=True)
class PushShares:
    """How an agent splits its push-sum weight in one round: `keep` stays, `to[reader]` goes.

    They sum to 1.
    """

    keep: float
    to: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class RoundPlan:
    """One round as planned.

    `mixing`: weight by agent, itself included, summing to 1; `learn`: train before it.

    With `push`, weights follow from the push-sum weights sent with the snapshots; `mixing` then only names
    the agents that are heard.
    """

    mixing: Mapping[str, float]
    learn: bool = True
    push: PushShares | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """All rounds as planned.

    `peers`: all agents that this one may ever hear; `of(round)`: one round, from 1; `readers(round)`: the agents that
    merge its snapshot of that round.
    """

    peers: frozenset[str]
    of: Callable[[int], RoundPlan]
    readers: Callable[[int], Collection[str]] = lambda _: ()


def last_planned(plan: Plan, peers: Collection[str], number: int, most: int = 64) -> dict[str, int]:
    """Return for each peer the last round before `number` in which it is planned, of the last `most`; the one before
    those if in none of them."""
    first = max(number - 1 - most, 0)
    found: dict[str, int] = {}
    for r in range(number - 1, first, -1):
        if len(found) == len(peers):
            break
        row = plan.of(r).mixing
        found |= {peer: r for peer in peers if peer not in found and row.get(peer, 0.0) > 0}
    return {peer: found.get(peer, first) for peer in peers}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How rounds go: the settings of `ScheduleConfig` with the same names (see there for meaning and defaults), and:

    `rounds`: the last round, None for no end. `deadline_s`: `round_deadline_s`. `basis_gossip`: agents come to share
    one basis. `adopt_rounds`: last round in which they adopt the weights in it too, and merge none in another basis.
    `target`: (metric, value); an agent whose metric after a merge is as good as the value has finished.
    """

    rounds: int | None
    deadline_s: float
    mode: Literal["sync", "async"]
    min_peers: int
    max_staleness: int
    staleness_decay: float
    join: Literal["adopt", "align"]
    join_wait_s: float
    adopt_rounds: int = 0
    basis_gossip: bool = False
    target: tuple[str, float] | None = None

    @classmethod
    def of(cls, schedule: ScheduleConfig, **more: Any) -> Rules:
        """Return the rules of a configuration; `more` adds fields or replaces them."""
        names = {field.name for field in fields(cls)} & {*type(schedule).model_fields} - {"rounds", "target"}
        said: dict[str, Any] = {name: getattr(schedule, name) for name in names}
        said |= {"rounds": schedule.rounds or None, "deadline_s": schedule.round_deadline_s}
        return cls(**{**said, **more})

    def reached(self, after: Mapping[str, float]) -> bool:
        """Whether the metrics after a merge are as good as the target."""
        if self.target is None or self.target[0] not in after:
            return False
        metric, value = self.target
        return score_of(metric, after[metric]) >= score_of(metric, value)

    def beyond(self, number: int) -> bool:
        """Whether a round lies after the last one."""
        return number > (LAST_ROUND if self.rounds is None else self.rounds)
