"""Resolves a configuration: its task, each agent's samples, and the plan of all rounds.

The simulator and every agent resolve an experiment by this one function, so that all get the same result. The simulator
adds faults and checks to it, an agent its keys and addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dimat.agent.learner.shared_base import base_address
from dimat.agent.setup.loaded_task import LoadedTask
from dimat.agent.setup.schedule import RunSchedule, later_topologies, with_final_merge
from dimat.config import ExperimentConfig
from dimat.seeds import derive_seed, numpy_generator
from dimat.tasks import partition
from dimat.tasks.base import Data, Task
from dimat.topology import resolve_map
from dimat.train.contract import task_errors


@dataclass(frozen=True, slots=True)
class Whole:
    """Training data that are split among agents, as far as that goes by them. `labels`: (samples,), or None."""

    samples: int
    labels: Tensor | None

    @classmethod
    def of(cls, data: Data) -> Whole:
        """Return what counts of a training split."""
        return cls(len(data), data.labels)

    def followed(self, parts: Sequence[Tensor], own: Whole) -> tuple[Tensor, ...]:
        """Return parts of a task's own examples, where those are of the same data in the same order, cut otherwise
        (blocks of another tokenizer's tokens).

        Of each class an example goes to the agent that has the example of `parts` at the same share of the way through.
        """
        if not parts or (self.samples == own.samples and _equal(self.labels, own.labels)):
            return tuple(parts)
        owner = torch.zeros(self.samples, dtype=torch.int64)
        for agent, part in enumerate(parts):
            owner[part] = agent
        owners = torch.zeros(own.samples, dtype=torch.int64)
        for label in [None] if own.labels is None else own.labels.unique().tolist():
            theirs, ours = _places(self, label), _places(own, label)
            if len(theirs):
                owners[ours] = owner[theirs[torch.arange(len(ours)) * len(theirs) // len(ours)]]
        return tuple((owners == agent).nonzero()[:, 0] for agent in range(len(parts)))


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment that is resolved."""

    loaded: LoadedTask
    schedule: RunSchedule
    parts: tuple[Tensor, ...]
    """Training indices of each agent of the schedule, int64; empty where each has data of its own."""
    whole: Whole
    """The data that are split."""

    @property
    def config(self) -> ExperimentConfig:
        """Its configuration."""
        return self.schedule.config

    @property
    def task(self) -> Task:
        """Its task."""
        return self.loaded.task

    @property
    def agents(self) -> tuple[str, ...]:
        """All agents, in the order of the network map."""
        return self.schedule.agents

    def part(self, agent: str) -> Tensor:
        """Return the training indices of an agent: its part, or all if each agent has its own data."""
        if not self.parts:
            return torch.arange(len(self.task.data("train")))
        return self.parts[self.agents.index(agent)]

    @property
    def counts(self) -> dict[str, int]:
        """Training samples by agent; empty if each agent has its own data."""
        return _counts(self.agents, self.parts) if self.parts else {}


def resolve(
    config: ExperimentConfig, loaded: LoadedTask, *, split: bool = False, whole: Whole | None = None
) -> Experiment:
    """Return the experiment of a configuration, its task loaded.

    One data set is split among the agents if `task.partition` is given, and always with `split`, as in a simulation;
    otherwise each agent has its own data, and the map states the sample counts if mixing weights need them. `whole`:
    the data that are split, where they are cut into other examples than those of the loaded task.
    Raises TopologyError, PartitionError or ConfigError for impossible settings, HookError if the task's data cannot be
    read.
    """
    with task_errors(loaded.task):
        train = loaded.task.data("train")
        loaded.task.data("test")
    whole = whole or Whole.of(train)
    folder, seed = Path(config.folder), derive_seed(config.seed, "topology")
    resolved = resolve_map(config.topology, seed, folder)
    agents = resolved.names
    given = "partition" in config.task.model_fields_set
    if config.merge.preset.ceiling:  # one model on all data, in the place of the network
        agents = (config.merge.method,)
        parts: tuple[Tensor, ...] = (torch.arange(len(train)),)
        topology = resolved.topology(dict.fromkeys(resolved.names, 1))
        changes = []
    else:
        parts = ()
        if split or given:  # equal seeds give equal parts, in the simulator and in every agent
            draws = numpy_generator(config.seed, "partition")
            parts = tuple(partition(whole.labels, len(agents), config.task.partition, draws, samples=whole.samples))
        counts = _counts(agents, parts) if parts else None
        # in a simulation of a map whose agents have data of their own, its sample counts hold
        topology = resolved.topology(counts if given or config.topology.map is None else None)
        changes = later_topologies(config, agents, counts)
    final, rounds = with_final_merge(config, agents)
    schedule = RunSchedule(
        config=config,
        merge_plan=loaded.plan,
        metric=loaded.task.metric,
        agents=agents,
        schedules=((1, topology), *changes),
        final=final,
        rounds=rounds,
        base=base_address(config, loaded.task),
    )
    return Experiment(loaded=loaded, schedule=schedule, parts=whole.followed(parts, Whole.of(train)), whole=whole)


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def _places(whole: Whole, label: int | None) -> Tensor:
    """Return the indices of the examples of a class, or all if there are no classes."""
    if label is None or whole.labels is None:
        return torch.arange(whole.samples)
    return (whole.labels == label).nonzero()[:, 0]


def _counts(agents: Sequence[str], parts: Sequence[Tensor]) -> dict[str, int]:
    return {agent: len(part) for agent, part in zip(agents, parts, strict=True)}
