"""What an experiment's times, faults and topology do not fit together with: refused, or warned of, before it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import networkx as nx

from dimat.config import ExperimentConfig
from dimat.errors import ConfigError
from dimat.simulate.compute import Compute
from dimat.simulate.faults import Crash, FaultPlan, Join, Leave, Restart
from dimat.tasks.data import batch_bounds
from dimat.train import round_steps


def check_times(config: ExperimentConfig, samples: Mapping[str, int], compute: Compute) -> list[str]:
    """Check the deadline against training times; return a warning for agents that will always be late.

    `samples`: by agent. Raises ConfigError for a deadline that no agent can keep.
    """
    deadline = config.schedule.round_deadline_s
    times: dict[str, float] = {}
    for agent, count in samples.items():
        steps = round_steps(config.train, len(batch_bounds(count, config.train.batch_size)) - 1, 2)
        times[agent] = compute.train_s(agent, steps, True, 0.0)
    quickest = min(times.values())
    if deadline <= quickest:
        raise ConfigError(
            f"schedule.round_deadline_s is {deadline:g}, but the quickest agent trains for {quickest:g} s of virtual "
            "time in a round: every peer would be late; give it more"
        )
    late = [agent for agent, seconds in times.items() if seconds >= deadline]
    if not late or config.schedule.mode == "async":
        return []
    return [
        f"{listed(late)} need longer to train than schedule.round_deadline_s ({deadline:g} s) and will be late in "
        'every round; give it more, or use mode = "async"'
    ]


def check_peers(config: ExperimentConfig, agents: Sequence[str], expected: Callable[[str], int]) -> None:
    """Raise ConfigError where `schedule.min_peers` is more than any agent has. `expected`: peers of an agent."""
    most = max(expected(agent) for agent in agents)
    if config.schedule.min_peers > most:
        raise ConfigError(
            f"schedule.min_peers is {config.schedule.min_peers}, but no agent has more than {most} peers; give it less"
        )


def alone(graph: nx.Graph[str], faults: FaultPlan) -> list[str]:
    """Return a warning for each agent of a graph whose peers all go for good."""
    warnings: list[str] = []
    away: set[str] = set()
    left: dict[str, float] = {}
    for fault in faults.timed:
        match fault:
            case Crash(agent=agent) | Leave(agent=agent):
                away.add(agent)
                left[agent] = fault.at_s
            case Restart(agent=agent) | Join(agent=agent):
                away.discard(agent)
            case _:
                pass
    for agent in graph:
        peers = set(graph.neighbors(agent))
        if isinstance(graph, nx.DiGraph):
            peers |= set(graph.predecessors(agent))
        if agent not in away and peers and peers <= away:
            since = max(left[peer] for peer in peers)
            warnings.append(
                f"{agent} is alone from {since:g} s on: its peers ({listed(sorted(peers))}) have gone for good by then"
            )
    return warnings


def listed(names: Sequence[str], limit: int = 4) -> str:
    """Return names for a message, the first few of many."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
