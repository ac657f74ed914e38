"""From a configuration to an agent that can run: its task and data, its place on the network map, its rounds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from dimat.agent.learner.learner import Learner
from dimat.agent.learner.shared_base import base_address, plan_for
from dimat.agent.learner.statistics import sample_statistics
from dimat.agent.setup.followed_map import with_newest_map
from dimat.agent.setup.loaded_task import LoadedTask, kit_for
from dimat.agent.setup.schedule import RunSchedule, later_topologies, with_final_merge
from dimat.config import ExperimentConfig
from dimat.device import resolve_device
from dimat.errors import ConfigError, DimatError, HookError, PartitionError, unknown_agent
from dimat.merge import needs_symmetry, plan_merge
from dimat.merge.shared_statistics import beside
from dimat.net.compatibility import Profile
from dimat.net.transport import Neighbours
from dimat.seeds import derive_seed, numpy_generator
from dimat.symmetry import SymmetrySpec
from dimat.tasks import partition
from dimat.topology import Topology, build_topology
from dimat.topology.network_map import without_mixing
from dimat.train.trainer import ModelTrainer
from dimat.weights.encodings import ENCODINGS, encoded_bytes

DEFAULT_PORT = 7300
MOST_CLASSES = 1_000
"""With more classes a histogram tells nobody anything."""


@dataclass(frozen=True, slots=True)
class AgentSetup:
    """An agent that is ready to run. `indices`: its samples in the task's training split."""

    name: str
    config: ExperimentConfig
    programme: RunSchedule
    kit: LoadedTask
    indices: torch.Tensor

    @property
    def topology(self) -> Topology:
        """The network as the map says now."""
        return self.programme.schedules[0][1]

    def profile(self, schema: str) -> Profile:
        """Return what peers must agree with, given the hash of the model's weights."""
        spec = self._spec
        return Profile(schema, self.programme.base, ENCODINGS, groups="" if spec is None else spec.groups_hash)

    def histogram(self) -> tuple[int, ...]:
        """Return its samples by class; empty where the task does not tell classes."""
        labels = self.kit.task.data("train").labels
        if labels is None or labels.ndim != 1 or labels.is_floating_point() or int(labels.min()) < 0:
            return ()
        classes = int(labels.max()) + 1
        if classes > MOST_CLASSES:  # a language model's next token, say
            return ()
        return tuple(torch.bincount(labels[self.indices], minlength=classes).tolist())

    def local(self, store: Path, learner: ModelTrainer | None = None) -> Learner:
        """Return what does the agent's work; it records its snapshots in the folder `store`. `learner`: trains the
        model, where that is not dimat's own trainer."""
        task, spec, observers = self.kit.task, self._spec, self.kit.observers
        return Learner(self.name, self.config, task, self.indices, store, spec, observers=observers, learner=learner)

    @property
    def _spec(self) -> SymmetrySpec | None:
        """The model's symmetry groups, where the merge rests on them."""
        return self.kit.spec if needs_symmetry(self.programme.plan_of_merge) else None


def prepare_agent(config: ExperimentConfig, make_kit: Callable[[bool], LoadedTask] | None = None) -> AgentSetup:
    """Resolve an agent's configuration; raises ConfigError and its kin for what cannot be run. `make_kit` gives the
    task (with symmetry groups if it is told so), where it is not the configuration's."""
    name = _name(config)
    by_config = needs_symmetry(plan_merge(config.merge))
    if config.merge.preset.ceiling:
        raise ConfigError(f'merge.method "{config.merge.method}" has no agents; use it with dimat simulate')
    if config.merge.align_data == "pooled":
        raise ConfigError('merge.align_data = "pooled" is for simulation only: no agent sees the others\' data')
    if config.schedule.target is not None and config.agent.evaluate == "none":
        raise ConfigError('schedule.target needs test metrics, but agent.evaluate is "none"; use "after"')
    resolve_device(config.train.device)
    # a task may ask for another merge than the configuration's, which is known once it is loaded
    kit = kit_for(config, symmetry=False) if make_kit is None else make_kit(by_config)
    if make_kit is None and needs_symmetry(plan_for(config.merge, kit.task)):
        kit = kit_for(config, symmetry=True)
    try:
        train = kit.task.data("train")
        kit.task.data("test")
    except DimatError:
        raise
    except Exception as error:  # a user's code may fail in any way
        raise HookError(f"task {kit.task.name} failed: {type(error).__name__}: {error}; mend its code") from error
    programme, counts = programme_of(config, kit)
    if name not in programme.agents:
        raise ConfigError(unknown_agent("agent.name", name, programme.agents))
    indices = torch.arange(len(train)) if counts is None else _part(config, kit, programme, name)
    return AgentSetup(name, config, programme, kit, indices)


def programme_of(config: ExperimentConfig, kit: LoadedTask) -> tuple[RunSchedule, Mapping[str, int] | None]:
    """Return all rounds as the network map says now, and the samples of each agent where one data set is split among
    them (`task.partition` is given); None where each has data of its own."""
    config = with_newest_map(config)
    seed, folder = derive_seed(config.seed, "topology"), Path(config.folder)
    counts: dict[str, int] | None = None
    if "partition" in config.task.model_fields_set:
        names = build_topology(without_mixing(config.topology), seed, folder).names
        counts = {agent: len(part) for agent, part in zip(names, _parts(config, kit, len(names)), strict=True)}
    topology = build_topology(config.topology, seed, folder, counts)
    final, rounds = with_final_merge(config, topology.names)
    programme = RunSchedule(
        config=config,
        plan_of_merge=plan_for(config.merge, kit.task),
        metric=kit.task.metric,
        agents=topology.names,
        schedules=((1, topology), *later_topologies(config, topology.names, counts)),
        final=final,
        rounds=rounds,
        base=base_address(config, kit.task),
    )
    return programme, counts


def addresses_on_map(config: ExperimentConfig) -> Mapping[str, Collection[str]]:
    """Return where each agent of the map is reached, without loading the task; agents without addresses have none."""
    config = with_newest_map(config)
    seed = derive_seed(config.seed, "topology")
    topology = build_topology(without_mixing(config.topology), seed, Path(config.folder))
    return {name: tuple(topology.addresses.get(name, ())) for name in topology.names}


def neighbours_of(programme: RunSchedule, name: str) -> Neighbours:
    """Return whom an agent listens to, who may fetch from it, and where they are."""
    topology = programme.schedules[0][1]
    readers = frozenset(agent for agent in programme.agents if name in programme.plan(agent).peers)
    peers = programme.plan(name).peers if name in programme.agents else frozenset[str]()
    return Neighbours(peers, readers, programme.agents, topology.addresses)


def listen_address(setup: AgentSetup) -> str:
    """Return the `host:port` that an agent listens on: what is set, or the port of its first address on the map."""
    config = setup.config.agent
    if config.listen is not None:
        return config.listen
    addresses = setup.topology.addresses.get(setup.name, ())
    port = int(addresses[0].rpartition(":")[2]) if addresses else DEFAULT_PORT
    return f"127.0.0.1:{port}" if config.insecure else f"0.0.0.0:{port}"


def _name(config: ExperimentConfig) -> str:
    if config.agent.name is None:
        raise ConfigError("which agent is this? set agent.name to its name on the network map, or give --name")
    return config.agent.name


def _part(config: ExperimentConfig, kit: LoadedTask, programme: RunSchedule, name: str) -> torch.Tensor:
    return _parts(config, kit, len(programme.agents))[programme.agents.index(name)]


def _parts(config: ExperimentConfig, kit: LoadedTask, agents: int) -> list[torch.Tensor]:
    """Split the training data as the simulator does, so that equal seeds give equal parts."""
    train = kit.task.data("train")
    if agents > len(train):
        raise PartitionError(
            f"{agents} agents cannot share {len(train)} training samples; use fewer agents or more data"
        )
    draws = numpy_generator(config.seed, "partition")
    return partition(train.labels, agents, config.task.partition, draws, samples=len(train))


def largest_snapshot(setup: AgentSetup, model: torch.nn.Module) -> int:
    """Return the most bytes that a snapshot of this run takes, in any encoding, statistics beside it."""
    statistics = sample_statistics(setup.programme.plan_of_merge, setup.kit.task, model)
    schema = beside(model.state_dict(), statistics)
    return max(encoded_bytes(schema, encoding) for encoding in ENCODINGS)
