"""An experiment resolved: its task, who holds which samples, and who merges with whom in every round.

Works out all that the simulator needs before the first step, so that whatever is impossible is refused before
a run folder exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dimat.agent.learner.shared_base import base_address, plan_for
from dimat.agent.learner.statistics import sample_statistics
from dimat.agent.setup.loaded_task import kit_for
from dimat.agent.setup.schedule import RunSchedule, later_topologies, with_final_merge
from dimat.config import ExchangeConfig, ExperimentConfig, NamedConfig, NetworkConfig
from dimat.device import resolve_device
from dimat.errors import ConfigError, DimatError, HookError, PartitionError
from dimat.merge import plan_merge
from dimat.merge.shared_statistics import beside
from dimat.seeds import derive_seed, numpy_generator, torch_generator
from dimat.simulate.world.checks import Pace, alone, check_crash_points, check_peers, check_times, listed
from dimat.simulate.world.compute_model import Compute
from dimat.simulate.world.faults import FaultPlan, plan_faults
from dimat.tasks import histogram, partition
from dimat.tasks.base import Task
from dimat.topology import build_topology
from dimat.topology.mixing import PUSH_SUM
from dimat.weights.tensors import encode

MB = 1e6
PROCESS_MB = 260.0  # resident memory of a process with torch and this package loaded


@dataclass(frozen=True, kw_only=True)
class Scenario(RunSchedule):
    """An experiment ready to run. `parts[i]`: training indices of agent i."""

    task: Task
    parts: tuple[torch.Tensor, ...]
    histogram: dict[str, tuple[int, ...]]
    parameters: int
    snapshot_bytes: int
    faults: FaultPlan
    warnings: tuple[str, ...] = ()

    def estimate(self, workers: int) -> tuple[float, float, float]:
        """Return estimates of (memory of all processes, disk, sent by all agents over the run), in MB."""
        weights = self.snapshot_bytes / MB
        # every process loads the data; with workers there is also the one that they are forked from
        processes = 1 if workers == 1 else workers + 2
        example = sum(t[0].numel() * t[0].element_size() for t in self.task.example_inputs()) / MB
        data = example * (len(self.task.data("train")) + len(self.task.data("test")))
        # weights, gradients, two optimizer moments, and a merged copy that exists during a merge
        memory = processes * (PROCESS_MB + data) + 5.5 * weights * len(self.agents)
        shown = min(self.rounds or 16, 16)
        per_round = [sum(len(self.readers(a, r)) for a in self.agents) for r in range(1, shown + 1)]
        sent = weights * sum(per_round) / len(per_round) * (self.rounds or 1)
        disk = weights * len(self.agents) * (self.snapshots_kept(self.config.simulate.keep_snapshots) + 2)
        return memory, disk, sent


def prepare(config: ExperimentConfig) -> Scenario:
    """Resolve an experiment; raises ConfigError and its kin for what cannot be run."""
    plan_merge(config.merge)  # its faults come before the task is loaded
    resolve_device(config.train.device)
    task = kit_for(config, symmetry=False).task
    merge_plan = plan_for(config.merge, task)
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
    ceiling = config.merge.preset.ceiling
    if ceiling:
        agents = (config.merge.method,)
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
            topology = build_topology(config.topology, seed, folder, counts_of(agents, parts))
    changes = [] if ceiling else later_topologies(config, agents, counts_of(agents, parts))
    warnings: list[str] = []
    if config.exchange != ExchangeConfig():
        warnings.append("[exchange] is for real agents: the simulator moves weights in fp32")
        config = config.model_copy(update={"exchange": ExchangeConfig()})
    for number, later in changes:
        left_out = [agent for agent in agents if agent not in later.names]
        if left_out:
            warnings.append(f"from round {number} on the topology leaves {listed(left_out)} alone")
    snapshot = beside(model.state_dict(), sample_statistics(merge_plan, task, model))
    final, rounds = with_final_merge(config, agents)
    faults = plan_faults(config, agents)
    pace = Pace(
        config,
        counts_of(agents, parts),
        Compute(_plain(config).simulate.compute, agents, config.seed, faults.timed),
    )
    scenario = Scenario(
        config=_plain(config),
        metric=task.metric,
        task=task,
        plan_of_merge=merge_plan,
        agents=agents,
        schedules=((1, topology), *changes),
        final=final,
        parts=tuple(parts),
        histogram=_histogram(task, agents, parts),
        parameters=sum(p.numel() for p in model.parameters()),
        snapshot_bytes=len(encode(snapshot)),
        rounds=rounds,
        faults=faults,
        base=base_address(config, task),
    )
    check_crash_points(
        config,
        faults,
        rounds,
        pace,
        lambda agent, number: len(scenario.round_plan(agent, number).mixing) > 1,
        gossips=scenario.rules().basis_gossip,
    )
    if not scenario.exchanges:  # nobody waits for anybody, and nobody can be left alone
        return replace(scenario, warnings=())
    warnings += check_times(config, pace, scenario.snapshot_bytes)
    for _, each in scenario.schedules:
        if config.merge.preset.push_sum and each.mixing_config.name != PUSH_SUM:
            raise ConfigError(
                f'method "{config.merge.method}" mixes by push-sum, but the network map says '
                f'{each.mixing_config.name!r}; set topology.mixing = "push-sum", or use method "dpsgd"'
            )
    check_peers(config, agents, lambda agent: len(scenario.round_plan(agent, 1).mixing) - 1)
    for _, each in scenario.schedules:
        # the union of a schedule that draws from all pairs is dense, and nobody is alone in it
        if each.base is not None or each.schedule.period is not None:
            warnings += alone(each.graph, faults)
    return replace(scenario, warnings=tuple(dict.fromkeys(warnings)))


def counts_of(agents: Sequence[str], parts: Sequence[torch.Tensor]) -> dict[str, int]:
    """Return the number of samples of each agent."""
    return {agent: len(part) for agent, part in zip(agents, parts, strict=True)}


def _plain(config: ExperimentConfig) -> ExperimentConfig:
    """Return the experiment without the network where one model holds all data: no agent there has a name."""
    if not config.merge.preset.ceiling:
        return config
    compute = config.simulate.compute.model_copy(update={"speeds": {}, "speed": 1.0})
    simulate = config.simulate.model_copy(update={"network": NetworkConfig(), "compute": compute})
    return config.model_copy(update={"simulate": simulate})


def _histogram(task: Task, agents: Sequence[str], parts: Sequence[torch.Tensor]) -> dict[str, tuple[int, ...]]:
    labels = task.data("train").labels
    if labels is None:
        return {agent: (len(part),) for agent, part in zip(agents, parts, strict=True)}
    classes = len(task.classes) or int(labels.max()) + 1
    counts = histogram(labels, parts, classes)
    return {agent: tuple(int(c) for c in row) for agent, row in zip(agents, counts, strict=True)}
