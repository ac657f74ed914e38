"""A resolved experiment with its simulated world, checked as a whole.

Everything is worked out before the first step, so that an impossible experiment is refused before a run folder exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from dimat.agent.learner.shared_moments import sample_encoded
from dimat.agent.setup.experiment import Experiment, resolve
from dimat.agent.setup.loaded_task import load_for
from dimat.agent.setup.unlike_models import load_each, split_each
from dimat.config import ExchangeConfig, ExperimentConfig, NetworkConfig
from dimat.errors import ConfigError
from dimat.seeds import torch_generator
from dimat.simulate.world.checks import Pace, alone, check_crash_points, check_peers, check_times, listed
from dimat.simulate.world.compute_model import Compute
from dimat.simulate.world.faults import FaultPlan, plan_faults
from dimat.tasks import histogram
from dimat.tasks.base import Task
from dimat.topology.mixing import PUSH_SUM
from dimat.train.contract import task_errors
from dimat.weights.tensors import encode

MB = 1e6
PROCESS_MB = 260.0  # resident memory of a process with torch and this package loaded


@dataclass(frozen=True, kw_only=True)
class Scenario(Experiment):
    """An experiment ready to be simulated, with its sizes and the faults that will happen."""

    histogram: dict[str, tuple[int, ...]]
    parameters: int
    """Number of parameters of the largest model."""
    model_bytes: int
    """Bytes of that model's weights."""
    snapshot_bytes: int
    faults: FaultPlan
    warnings: tuple[str, ...] = ()

    @property
    def sparse(self) -> bool:
        """Whether some pair of agents is never linked, in either direction."""
        agents, linked = len(self.agents), {frozenset(edge) for edge in self.schedule.edges()}
        return len(linked) < agents * (agents - 1) // 2

    def estimate(self, workers: int) -> tuple[float, float, float]:
        """Return estimates of (memory of all processes, disk, sent by all agents over the run), in MB."""
        weights = self.snapshot_bytes / MB
        # every process loads the data; with workers there is also the one that they are forked from
        processes = 1 if workers == 1 else workers + 2
        example = sum(t[0].numel() * t[0].element_size() for t in self.task.example_inputs()) / MB
        data = example * (len(self.task.data("train")) + len(self.task.data("test")))
        # weights, gradients, two optimizer moments, and a merged copy that exists during a merge
        memory = processes * (PROCESS_MB + data) + 5.5 * self.model_bytes / MB * len(self.agents)
        rounds, kept = self.schedule.rounds, self.schedule.snapshots_kept(self.config.simulate.keep_snapshots)
        shown = min(rounds or 16, 16)
        per_round = [sum(len(self.schedule.readers(a, r)) for a in self.agents) for r in range(1, shown + 1)]
        sent = weights * sum(per_round) / len(per_round) * (rounds or 1)
        disk = weights * len(self.agents) * (kept + 2)
        return memory, disk, sent


def prepare(config: ExperimentConfig) -> Scenario:
    """Resolve an experiment for the simulator; raises ConfigError or a subclass if it cannot be run."""
    warnings: list[str] = []
    simulated = ExchangeConfig(encoding=config.exchange.encoding, moments=config.exchange.moments)
    if config.exchange != simulated:
        told = [key for key in ExchangeConfig.model_fields if getattr(config.exchange, key) != getattr(simulated, key)]
        warnings.append(
            f"exchange.{', exchange.'.join(told)}: only for real agents; the simulator uses encoding and moments"
        )
        config = config.model_copy(update={"exchange": simulated})
    if config.merge.preset.ceiling:
        config = _without_network(config)
    loaded = load_for(config, symmetry=False)  # what is merged is merged in the workers
    warnings += loaded.notes
    experiment = resolve(config, loaded, split=True)
    agents, schedule = experiment.agents, experiment.schedule
    found = load_each(config, loaded, agents)
    parts, tasks = split_each(config, found, experiment)
    largest, model = max(
        ((each, _model(config, each.task)) for each in found),
        key=lambda pair: _parameters(pair[1]),
    )
    moments = sample_encoded(config, model)
    faults = plan_faults(config, agents)
    scenario = Scenario(
        loaded=loaded,
        schedule=schedule,
        parts=parts,
        whole=experiment.whole,
        histogram=_histogram([tasks.get(agent, loaded.task) for agent in agents], agents, parts),
        parameters=_parameters(model),
        model_bytes=sum(tensor.nbytes for tensor in model.state_dict().values()),
        snapshot_bytes=len(encode(largest.sample_snapshot(model, moments))),
        faults=faults,
    )
    pace = Pace(config, scenario.counts, Compute(config.simulate.compute, agents, config.seed, faults.timed))
    check_crash_points(
        config,
        faults,
        schedule.rounds,
        pace,
        lambda agent, number: len(schedule.round_plan(agent, number).mixing) > 1,
        gossips=schedule.rules().basis_gossip,
    )
    if not schedule.exchanges:  # nobody waits for anybody, and nobody can be left alone
        return replace(scenario, warnings=tuple(warnings))
    for number, later in schedule.schedules[1:]:
        left_out = [agent for agent in agents if agent not in later.names]
        if left_out:
            warnings.append(f"from round {number} on the topology leaves {listed(left_out)} alone")
    warnings += check_times(config, pace, scenario.snapshot_bytes)
    for _, each in schedule.schedules:
        if config.merge.preset.push_sum and each.mixing_config.name != PUSH_SUM:
            raise ConfigError(
                f'method "{config.merge.method}" mixes by push-sum, but the network map says '
                f'{each.mixing_config.name!r}; set topology.mixing = "push-sum", or use method "dpsgd"'
            )
    check_peers(config, agents, lambda agent: len(schedule.round_plan(agent, 1).mixing) - 1)
    for _, each in schedule.schedules:
        # the union of a schedule that draws from all pairs is dense, and nobody is alone in it
        if each.base is not None or each.schedule.period is not None:
            warnings += alone(each.graph, faults)
    return replace(scenario, warnings=tuple(dict.fromkeys(warnings)))


def _model(config: ExperimentConfig, task: Task) -> nn.Module:
    with task_errors(task, "build_model()"):
        return task.build_model(torch_generator(config.seed, "measure"))


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _without_network(config: ExperimentConfig) -> ExperimentConfig:
    """Return the experiment without the agents' links and speeds: one model on all data has no agents to name."""
    compute = config.simulate.compute.model_copy(update={"speeds": {}, "speed": 1.0})
    simulate = config.simulate.model_copy(update={"network": NetworkConfig(), "compute": compute})
    return config.model_copy(update={"simulate": simulate})


def _histogram(
    tasks: Sequence[Task], agents: Sequence[str], parts: Sequence[torch.Tensor]
) -> dict[str, tuple[int, ...]]:
    """Return the samples by class of each agent, whose task and part stand at its place."""
    found: dict[str, tuple[int, ...]] = {}
    for task, agent, part in zip(tasks, agents, parts, strict=True):
        labels = task.data("train").labels
        if labels is None:
            found[agent] = (len(part),)
            continue
        counts = histogram(labels, [part], len(task.classes) or int(labels.max()) + 1)
        found[agent] = tuple(int(c) for c in counts[0])
    return found
