"""Checks before a run that an experiment's times, faults and topology fit together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import networkx as nx

from dimat.config import ExperimentConfig, NetworkConfig, Span
from dimat.errors import ConfigError
from dimat.simulate.world.compute_model import Compute
from dimat.simulate.world.faults import Crash, FaultPlan, Leave
from dimat.simulate.world.link_model import BYTES_PER_MBIT
from dimat.tasks.data import batch_bounds
from dimat.train.progress import round_steps


class Pace:
    """How fast an experiment's rounds can be. `samples`: training samples by agent."""

    def __init__(self, config: ExperimentConfig, samples: Mapping[str, int], compute: Compute) -> None:
        self._config = config
        self._compute = compute
        self._batches = {
            agent: len(batch_bounds(count, config.train.batch_size)) - 1 for agent, count in samples.items()
        }

    def train_s(self, number: int, now: float = 0.0) -> dict[str, float]:
        """Return, by agent, how long its training of a round takes if it begins now."""
        schedule = self._config.schedule
        learn, trained = schedule.learns(number), schedule.round_of(number)
        return {
            agent: self._compute.train_s(agent, round_steps(self._config.train, batches, trained), learn, now)
            for agent, batches in self._batches.items()
        }

    def reaches(self, number: int, by_s: float) -> bool:
        """Return whether any agent can be in a round before a time, given the fastest agent of each round before."""
        time = 0.0
        for earlier in range(1, number):
            if time >= by_s:
                break
            time += min(self.train_s(earlier, time).values())
        return time < by_s


def check_times(config: ExperimentConfig, pace: Pace, snapshot_bytes: int) -> list[str]:
    """Check the round deadline against the times for training and for sending snapshots.

    The deadline counts from the end of an agent's own training. Returns a warning for agents whose snapshots always
    reach the fastest agent too late.
    """
    deadline = config.schedule.round_deadline_s
    times = pace.train_s(config.schedule.first_exchange(2))  # the first round may have epochs of its own
    quickest = min(times.values())
    travel = travel_s(config.simulate.network, snapshot_bytes)
    late = [agent for agent, seconds in times.items() if seconds + travel >= quickest + deadline]
    if not late or config.schedule.mode == "async":
        return []
    who = listed(late) if len(late) < len(times) else f"all {len(times)} agents"
    sending = f" and about {travel:.3g} s until peers have their snapshot" if travel else ""
    return [
        f"{who} need {min(times[agent] for agent in late):g} s or more to train{sending}; the fastest agent trains "
        f"for {quickest:g} s and then waits for {deadline:g} s (schedule.round_deadline_s): their snapshots will come "
        'too late in every round; increase the deadline, or use mode = "async"'
    ]


def travel_s(network: NetworkConfig, size_bytes: int) -> float:
    """Return how long a snapshot takes to reach a peer over a typical link, with the median of ranges.

    The time covers two small messages (offer and request) and the transfer.
    """
    rates = [_median(span, log=True) for span in (network.bandwidth_mbit_s, network.uplink_mbit_s) if span is not None]
    transfer = size_bytes / (min(rates) * BYTES_PER_MBIT) if rates else 0.0
    return 3 * _median(network.latency_s, log=False) + transfer


def _median(span: Span, *, log: bool) -> float:
    if not isinstance(span, tuple):
        return span
    return math.sqrt(span[0] * span[1]) if log else (span[0] + span[1]) / 2


def check_crash_points(
    config: ExperimentConfig,
    faults: FaultPlan,
    rounds: int,
    pace: Pace,
    hears: Callable[[str, int], bool],
    *,
    gossips: bool,
) -> None:
    """Raise ConfigError, naming the entry, for a crash at a step that its agent never reaches: a round beyond the last
    or after it has gone for good, a fetch when it hears nobody, an adoption when there is none.

    `rounds`: 0 = without end; `hears(agent, round)`: whether an agent hears anybody; `gossips`: whether agents adopt
    each other's basis.
    """
    ends: dict[str, tuple[float, str]] = {}
    for fault in faults.timed:
        if isinstance(fault, Leave):
            ends[fault.agent] = (fault.at_s, "leaves")
        elif isinstance(fault, Crash) and fault.restart_after_s is None:
            ends[fault.agent] = (fault.at_s, "crashes for good")
    for point in faults.on_action:
        agent, number = point.agent, point.round
        who = f"{point.entry}: agent {agent!r}"
        if rounds and number > rounds:
            raise ConfigError(
                f"{who} is to crash in round {number}, but the last round is {rounds}; choose an earlier one"
            )
        joins = agent in faults.late
        takes_over = joins and config.join == "adopt"
        if point.on == "adopt" and not takes_over and not (gossips and hears(agent, number)):
            raise ConfigError(
                f"{who} never adopts anything in round {number}: that is done by methods that align in a shared basis, "
                'with somebody to hear, and by an agent that joins late with schedule.join = "adopt"; choose another '
                "moment"
            )
        if point.on == "fetch" and not hears(agent, number):
            raise ConfigError(f"{who} hears nobody in round {number} and fetches nothing; choose another moment")
        at_s, verb = ends.get(agent, (math.inf, ""))
        if at_s < math.inf and not pace.reaches(number, at_s):
            raise ConfigError(
                f"{who} is to crash in round {number}, but it {verb} at {at_s:g} s, which is before anybody can be in "
                "that round; change the script"
            )


def check_peers(config: ExperimentConfig, agents: Sequence[str], expected: Callable[[str], int]) -> None:
    """Raise ConfigError if `schedule.min_peers` exceeds every agent's peers. `expected`: number of an agent's peers."""
    most = max(expected(agent) for agent in agents)
    if config.schedule.min_peers > most:
        raise ConfigError(
            f"schedule.min_peers is {config.schedule.min_peers}, but no agent has more than {most} peers; lower it"
        )


def alone(graph: nx.Graph[str], faults: FaultPlan) -> list[str]:
    """Return a warning for each agent of a graph whose peers all leave or crash for good by the script."""
    gone = {
        fault.agent: f"at {fault.at_s:g} s"
        for fault in faults.timed
        if isinstance(fault, Leave) or (isinstance(fault, Crash) and fault.restart_after_s is None)
    }
    gone = {p.agent: f"in round {p.round}" for p in faults.on_action if p.restart_after_s is None} | gone
    warnings: list[str] = []
    for agent in graph:
        peers = set(graph.neighbors(agent))
        if isinstance(graph, nx.DiGraph):
            peers |= set(graph.predecessors(agent))
        if agent not in gone and peers and peers <= gone.keys():
            when = listed([f"{peer} {gone[peer]}" for peer in sorted(peers)])
            warnings.append(f"{agent} is alone in the end: its peers go for good ({when})")
    return warnings


def listed(names: Sequence[str], limit: int = 4) -> str:
    """Return names for a message, with only the first few of many."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
