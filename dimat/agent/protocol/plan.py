"""The plan of the rounds (with whom, with what weights) and the rules they go by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

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

    `mixing`: weight by agent, self included, summing to 1; `learn`: train before it.

    With `push`, weights follow from the push-sum weights that travel with the snapshots; `mixing` then only names
    who is heard.
    """

    mixing: Mapping[str, float]
    learn: bool = True
    push: PushShares | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """All rounds as planned.

    `peers`: everybody whom the agent may ever hear; `of(round)`: one round, from 1.
    """

    peers: frozenset[str]
    of: Callable[[int], RoundPlan]


@dataclass(frozen=True, slots=True)
class Rules:
    """How rounds go.

    `mode`: "sync" merges neighbours' snapshots of the same round, "async" the newest ones that are at most
    `max_staleness` rounds behind, each round of staleness multiplying a peer's weight by `staleness_decay` (what
    is taken off goes to self). `min_peers`: a merge waits for at least this many peers while the deadline
    allows; with fewer the agent keeps its own weights. `rounds`: the last round, None for no end. `join`: what a
    newcomer does once it hears a living network, within `join_wait_s`. `target`: (metric, value); an agent whose
    metric after a merge is at least the value is through.
    """

    rounds: int | None
    deadline_s: float
    mode: Literal["sync", "async"] = "sync"
    min_peers: int = 0
    max_staleness: int = 4
    staleness_decay: float = 0.5
    basis_gossip: bool = False
    join: Literal["adopt", "align"] = "adopt"
    join_wait_s: float = 10.0
    target: tuple[str, float] | None = field(default=None)

    def beyond(self, number: int) -> bool:
        """Whether a round lies after the last one."""
        return number > (LAST_ROUND if self.rounds is None else self.rounds)
