"""The rounds of an experiment as planned: who merges with whom, and with what weights.

It is computed only from the configuration and the network map, so that every agent of a network, and the simulator, get
the same plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dimat.agent.protocol.offers import ROUNDS_KEPT
from dimat.agent.protocol.plan import Plan, PushShares, RoundPlan, Rules
from dimat.config import ExperimentConfig
from dimat.errors import ConfigError
from dimat.merge import MergePlan
from dimat.seeds import derive_seed
from dimat.topology import BaseK, CycleSchedule, Mixer, Schedule, Topology, build_topology
from dimat.topology.mixing import PUSH_SUM
from dimat.topology.rounds import longest_lead


@dataclass(frozen=True, kw_only=True)
class RunSchedule:
    """All rounds of all agents. `metric`: of the task; `rounds`: exchanges in all, those of `mixing_steps` and of the
    final merge too, 0 for no end. From here on each exchange is a round."""

    config: ExperimentConfig
    merge_plan: MergePlan
    metric: str
    agents: tuple[str, ...]
    schedules: tuple[tuple[int, Topology], ...]
    """Topologies with the rounds from which on they hold, in order."""
    final: Schedule | None
    rounds: int
    base: str = ""
    """Address of the weights that task vectors are taken from."""

    @property
    def exchanges(self) -> bool:
        """Whether agents exchange weights at all."""
        return self.config.merge.preset.exchanges and len(self.agents) > 1

    @property
    def first(self) -> Topology:
        """The network of the first round: as the map says, before any of `schedule.changes`."""
        return self.schedules[0][1]

    def schedule_at(self, number: int) -> tuple[Schedule, int]:
        """Return the schedule that applies in a round, and the round's number in that schedule."""
        planned = self.config.schedule.last_exchange
        if self.final is not None and number > planned:
            return self.final, number - planned
        start, topology = next((s, t) for s, t in reversed(self.schedules) if s <= number)
        return topology.schedule, number - start + 1

    def round_plan(self, agent: str, number: int) -> RoundPlan:
        """Return mixing weights of an agent for a round, and whether it trains before."""
        learn = self.config.schedule.learns(number)
        if not self.exchanges:
            return RoundPlan({agent: 1.0}, learn)
        schedule, number = self.schedule_at(number)
        if agent not in schedule.names:
            return RoundPlan({agent: 1.0}, learn)
        mixer = self._mixing(schedule)
        if mixer is None:
            return RoundPlan(schedule.row(number, agent), learn)
        # weights come from the masses that travel with the snapshots; the row only says who is heard
        share = (1 - mixer.lazy) / (len(schedule.out_neighbours(number, agent)) + 1)
        to = dict.fromkeys(schedule.out_neighbours(number, agent), share)
        heard = dict.fromkeys((agent, *schedule.in_neighbours(number, agent)), 1.0)
        return RoundPlan(heard, learn, PushShares(1.0 - share * len(to), to))

    def plan(self, agent: str) -> Plan:
        """Return all rounds of an agent as planned."""
        peers: set[str] = set()
        if self.exchanges:
            for schedule in (*(topology.schedule for _, topology in self.schedules), self.final):
                if schedule is not None and agent in schedule.names:
                    peers.update(schedule.sources(agent))
        return Plan(
            frozenset(peers), lambda number: self.round_plan(agent, number), lambda number: self.readers(agent, number)
        )

    def rules(self) -> Rules:
        """Return the rules of all agents' rounds."""
        schedule = self.config.schedule
        return Rules.of(
            schedule,
            rounds=self.rounds or None,
            join=self.config.join,
            adopt_rounds=schedule.adopt_rounds,
            basis_gossip=schedule.adopt_rounds > 0 or (self.merge_plan.aligns and self.merge_plan.align_to == "shared"),
            target=None if schedule.target is None else (self.metric, schedule.target),
        )

    def readers(self, agent: str, number: int) -> Sequence[str]:
        """Return the agents that merge an agent's snapshot of a round."""
        if not self.exchanges:
            return ()
        schedule, number = self.schedule_at(number)
        return schedule.out_neighbours(number, agent) if agent in schedule.names else ()

    def _mixing(self, schedule: Schedule) -> Mixer | None:
        """Return the push-sum rule of a schedule, None where its weights are fixed."""
        return schedule.mixer if isinstance(schedule, CycleSchedule) and schedule.mixer.name == PUSH_SUM else None

    def edges(self) -> tuple[tuple[str, str], ...]:
        """Return (publisher, reader) pairs of the first round, each undirected edge once."""
        pairs = [(agent, reader) for agent in self.agents for reader in self.readers(agent, 1)]
        both = set(pairs)
        return tuple((a, b) for a, b in pairs if (b, a) not in both or a < b)

    def snapshots_kept(self, kept: int) -> int:
        """Return how many snapshots an agent offers: `kept`, or as many as the reader that may be furthest behind still
        merges."""
        if not self.exchanges:
            return kept
        if self.config.schedule.mode == "async":
            return max(kept, self.config.schedule.max_staleness + 1)
        schedules = [topology.schedule for _, topology in self.schedules]
        return max(kept, *(1 + longest_lead(schedule, ROUNDS_KEPT - 1) for schedule in schedules))


def with_final_merge(config: ExperimentConfig, agents: Sequence[str]) -> tuple[Schedule | None, int]:
    """Return the schedule of the final merge, if there is one, and the number of rounds with it."""
    rounds = config.schedule.last_exchange
    if not config.schedule.final_merge or len(agents) < 2 or not config.merge.preset.exchanges:
        return None, rounds
    final = BaseK(tuple(agents), config.schedule.final_merge_peers)
    return final, rounds + (final.period or 0)


def later_topologies(
    config: ExperimentConfig, agents: Sequence[str], samples: Mapping[str, int] | None
) -> list[tuple[int, Topology]]:
    """Return the topologies that replace the first one later, with the rounds from which on they hold; ConfigError for
    one that comes after the last round or names an agent that is not in the first. `samples`: by agent, where known."""
    changes: list[tuple[int, Topology]] = []
    for i, change in enumerate(config.schedule.changes):
        if 0 < config.schedule.rounds < change.round:
            raise ConfigError(
                f"schedule.changes[{i}]: holds from round {change.round} on, but the last one is "
                f"{config.schedule.rounds}; remove it, or give schedule.rounds more"
            )
        draws = derive_seed(config.seed, "topology", change.round)
        later = build_topology(change.topology, draws, Path(config.folder), samples)
        new = sorted(set(later.names) - set(agents))
        if new:
            raise ConfigError(
                f"schedule.changes[{i}]: agent {new[0]!r} is not in the first topology; name all agents there, and let "
                'later ones join with a fault of kind "join"'
            )
        changes.append((config.schedule.first_exchange(change.round), later))
    return changes
