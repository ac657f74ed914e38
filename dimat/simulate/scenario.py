"""An experiment resolved: its task, who holds which samples, and who merges with whom in every round.

Works out all that the simulator needs before the first step, so that whatever is impossible is refused before
a run folder exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dimat.agent.round import RoundPlan
from dimat.config import ExperimentConfig, NamedConfig
from dimat.device import resolve_device
from dimat.errors import ConfigError, DimatError, HookError, PartitionError
from dimat.merge import MergePlan, plan_merge
from dimat.seeds import derive_seed, numpy_generator, torch_generator
from dimat.simulate import worker
from dimat.snapshot import encode
from dimat.task import Task
from dimat.tasks import histogram, partition
from dimat.topology import BaseK, Schedule, build_topology

MB = 1e6
TRAIN_S = 1.0  # virtual seconds of a round's local training, alike for all agents
PROCESS_MB = 260.0  # resident memory of a process with torch and this package loaded


@dataclass(frozen=True, slots=True)
class Scenario:
    """An experiment ready to run. `parts[i]`: training indices of agent i; `rounds`: with the final merge's rounds."""

    config: ExperimentConfig
    task: Task
    plan: MergePlan
    agents: tuple[str, ...]
    schedule: Schedule
    final: Schedule | None
    parts: tuple[torch.Tensor, ...]
    histogram: dict[str, tuple[int, ...]]
    parameters: int
    snapshot_bytes: int
    rounds: int

    @property
    def exchanges(self) -> bool:
        """Whether agents exchange weights at all."""
        return self.config.merge.method not in ("isolated", "centralised") and len(self.agents) > 1

    def round_plan(self, agent: str, number: int) -> RoundPlan:
        """Return mixing weights of an agent for a round, and whether it trains before."""
        learn = number <= self.config.schedule.rounds
        if not self.exchanges:
            return RoundPlan({agent: 1.0}, learn)
        if learn or self.final is None:
            return RoundPlan(self.schedule.row(number, agent), learn)
        return RoundPlan(self.final.row(number - self.config.schedule.rounds, agent), learn=False)

    def readers(self, agent: str, number: int) -> Sequence[str]:
        """Return who merges an agent's snapshot of a round."""
        if not self.exchanges:
            return ()
        if number <= self.config.schedule.rounds or self.final is None:
            return self.schedule.out_neighbours(number, agent)
        return self.final.out_neighbours(number - self.config.schedule.rounds, agent)

    def edges(self) -> tuple[tuple[str, str], ...]:
        """Return (publisher, reader) pairs of the first round, each undirected edge once."""
        pairs = [(agent, reader) for agent in self.agents for reader in self.readers(agent, 1)]
        both = set(pairs)
        return tuple((a, b) for a, b in pairs if (b, a) not in both or a < b)

    def estimate(self, workers: int) -> tuple[float, float, float]:
        """Return estimates of (memory of all processes, disk, sent by all agents over the run), in MB."""
        weights = self.snapshot_bytes / MB
        # every process loads the data; with workers there is also the one that they are forked from
        processes = 1 if workers == 1 else workers + 2
        example = sum(t[0].numel() * t[0].element_size() for t in self.task.example_inputs()) / MB
        data = example * (len(self.task.data("train")) + len(self.task.data("test")))
        # weights, gradients, two optimizer moments, and a merged copy that exists during a merge
        memory = processes * (PROCESS_MB + data) + 5.5 * weights * len(self.agents)
        per_round = [sum(len(self.readers(a, r)) for a in self.agents) for r in range(1, min(self.rounds, 16) + 1)]
        sent = weights * sum(per_round) / len(per_round) * self.rounds
        disk = weights * len(self.agents) * (self.config.simulate.keep_snapshots + 2)
        return memory, disk, sent


def prepare(config: ExperimentConfig) -> Scenario:
    """Resolve an experiment; raises ConfigError and its kin for what cannot be run."""
    if config.schedule.round_deadline_s <= TRAIN_S:
        raise ConfigError(
            f"schedule.round_deadline_s is {config.schedule.round_deadline_s:g}, but a simulated round trains for "
            f"{TRAIN_S:g} s of virtual time: every peer would be late; give it more"
        )
    plan = plan_merge(config.merge)
    resolve_device(config.train.device)
    task = worker.kit_for(config, symmetry=False).task
    try:
        train = task.data("train")
        task.data("test")
        model = task.build_model(torch_generator(config.seed, "measure"))
    except DimatError:
        raise
    except Exception as error:  # a user's code may fail in any way
        raise HookError(f"task {task.name} failed: {type(error).__name__}: {error}; mend its code") from error
    folder = Path(config.folder)
    seed = derive_seed(config.seed, "topology")
    by_samples = config.topology.mixing.name == "samples" and config.topology.map is None
    # who the agents are comes first; weights by sample count can follow only when the data are split
    who = config.topology.model_copy(update={"mixing": NamedConfig(name="metropolis")} if by_samples else {})
    topology = build_topology(who, seed, folder)
    agents = topology.names
    centralised = config.merge.method == "centralised"
    if centralised:
        agents = ("centralised",)
        parts = [torch.arange(len(train))]
    else:
        if len(agents) > len(train):
            raise PartitionError(
                f"{len(agents)} agents cannot share {len(train)} training samples; use fewer agents or more data"
            )
        parts = partition(
            train.labels,
            len(agents),
            config.task.partition,
            numpy_generator(config.seed, "partition"),
            samples=len(train),
        )
        if by_samples:
            counts = {agent: len(part) for agent, part in zip(agents, parts, strict=True)}
            topology = build_topology(config.topology, seed, folder, counts)
    state = model.state_dict()
    final = None
    rounds = config.schedule.rounds
    if config.schedule.final_merge and len(agents) > 1 and config.merge.method != "isolated":
        final = BaseK(agents, config.schedule.final_merge_peers)
        rounds += final.period or 0
    return Scenario(
        config=config,
        task=task,
        plan=plan,
        agents=agents,
        schedule=topology.schedule,
        final=final,
        parts=tuple(parts),
        histogram=_histogram(task, agents, parts),
        parameters=sum(p.numel() for p in model.parameters()),
        snapshot_bytes=len(encode(state)),
        rounds=rounds,
    )


def _histogram(task: Task, agents: Sequence[str], parts: Sequence[torch.Tensor]) -> dict[str, tuple[int, ...]]:
    labels = task.data("train").labels
    if labels is None:
        return {agent: (len(part),) for agent, part in zip(agents, parts, strict=True)}
    classes = len(task.classes) or int(labels.max()) + 1
    counts = histogram(labels, parts, classes)
    return {agent: tuple(int(c) for c in row) for agent, row in zip(agents, counts, strict=True)}
