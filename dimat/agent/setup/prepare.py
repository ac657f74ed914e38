"""From a configuration to an agent that can run: the experiment, and its place in it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dimat.agent.learner.learner import Learner
from dimat.agent.learner.own_data import part_of
from dimat.agent.learner.shared_moments import sample_encoded
from dimat.agent.setup.agreement import settings_of
from dimat.agent.setup.experiment import Experiment, resolve
from dimat.agent.setup.followed_map import with_map, with_newest_map
from dimat.agent.setup.loaded_task import load_for
from dimat.agent.setup.schedule import RunSchedule
from dimat.agent.setup.unlike_models import check_own
from dimat.config import ExchangeConfig, ExperimentConfig
from dimat.errors import ConfigError, unknown_agent
from dimat.net.compatibility import OPTIMIZER_STATE, Profile
from dimat.net.transport import Neighbours
from dimat.seeds import derive_seed
from dimat.tasks.base import Task
from dimat.topology import resolve_map
from dimat.train.base import ModelTrainer
from dimat.weights.encodings import ENCODINGS, encoded_bytes

DEFAULT_PORT = 7300
MOST_CLASSES = 1_000
"""With more classes a histogram tells nobody anything."""


@dataclass(frozen=True, slots=True)
class PreparedAgent:
    """An agent that is ready to run. `config`: the operator's; the experiment's configuration has the current network
    map, which may be newer. Both have the agent's own model as the task's."""

    name: str
    config: ExperimentConfig
    experiment: Experiment

    @property
    def schedule(self) -> RunSchedule:
        """All rounds, by the network map as it was when the agent was prepared."""
        return self.experiment.schedule

    @property
    def indices(self) -> torch.Tensor:
        """Its samples in the task's training split."""
        return self.experiment.part(self.name)

    def schedule_now(self) -> RunSchedule:
        """Return all rounds by the current network map, from its file or from the DHT."""
        return self._schedule_of(with_newest_map(self.config))

    def schedule_on(self, map_file: Path) -> RunSchedule:
        """Return all rounds by another network map; raises as `resolve` if it cannot be used."""
        return self._schedule_of(with_map(self.config, map_file))

    def _schedule_of(self, config: ExperimentConfig) -> RunSchedule:
        return resolve(config, self.experiment.loaded, whole=self.experiment.whole).schedule

    def profile(self, model: torch.nn.Module) -> Profile:
        """Return the profile with which peers must agree; `model`: that of the task."""
        loaded = self.experiment.loaded
        return Profile(
            loaded.schema(model),
            self.schedule.base,
            ENCODINGS,
            groups="" if loaded.spec is None else loaded.spec.groups_hash,
            settings=settings_of(loaded.task, model, loaded.plan)
            | {
                OPTIMIZER_STATE: "merged" if self.config.optimizer_state == "merged" else "own",
                "schedule.mixing_steps": str(self.config.schedule.mixing_steps),
            },
        )

    def histogram(self) -> tuple[int, ...]:
        """Return its samples by class; empty if the task has no classes."""
        labels = self.experiment.task.data("train").labels
        if labels is None or labels.ndim != 1 or labels.is_floating_point() or int(labels.min()) < 0:
            return ()
        classes = int(labels.max()) + 1
        if classes > MOST_CLASSES:  # a language model's next token, say
            return ()
        return tuple(torch.bincount(labels[self.indices], minlength=classes).tolist())

    def learner(self, store: Path, trainer: ModelTrainer | None = None) -> Learner:
        """Return the learner, which does the agent's work; it records its snapshots in the folder `store`. `trainer`:
        trains the model, if that is not dimat's own."""
        experiment = self.experiment
        agents = experiment.agents if experiment.parts else ()
        part = part_of(self.config, self.name, agents, str(experiment.loaded.plan.accept))
        return experiment.loaded.learner(self.name, self.config, self.indices, store, part=part, trainer=trainer)

    def largest_snapshot(self, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> int:
        """Return the largest size in bytes of a snapshot of this run, in any encoding, with statistics and moments.
        `optimizers`: the model's."""
        # peers may send moments in any type, and those in fp32 are the largest
        widest = self.config.model_copy(update={"exchange": ExchangeConfig(moments="fp32")})
        moments = sample_encoded(widest, model, optimizers)
        snapshot = self.experiment.loaded.sample_snapshot(model, moments, largest=True)
        return max(encoded_bytes(snapshot, encoding) for encoding in ENCODINGS)

    def listen_address(self) -> str:
        """Return the `host:port` to listen on: the setting, or the port of the agent's first address on the map."""
        agent = self.config.agent
        if agent.listen is not None:
            return agent.listen
        addresses = self.schedule.first.addresses.get(self.name, ())
        port = int(addresses[0].rpartition(":")[2]) if addresses else DEFAULT_PORT
        return f"127.0.0.1:{port}" if agent.insecure else f"0.0.0.0:{port}"


def prepare_agent(config: ExperimentConfig, task: Task | None = None) -> PreparedAgent:
    """Resolve an agent's configuration; raises ConfigError or a related error if it cannot run. `task`: one to use
    instead of the configuration's."""
    name = config.agent.name
    if name is None:
        raise ConfigError("which agent is this? set agent.name to its name on the network map, or give --name")
    if config.merge.preset.ceiling:
        raise ConfigError(f'merge.method "{config.merge.method}" has no agents; use it with dimat simulate')
    if config.merge.align_data == "pooled":
        raise ConfigError('merge.align_data = "pooled" is for simulation only: no agent sees the others\' data')
    if config.schedule.target is not None and config.agent.evaluate == "none":
        raise ConfigError('schedule.target needs test metrics, but agent.evaluate is "none"; use "after"')
    told, config = config, config.of_agent(name)
    loaded = load_for(config, task)
    experiment = resolve(with_newest_map(config), loaded)
    if name not in experiment.agents:
        raise ConfigError(unknown_agent("agent.name", name, experiment.agents))
    if told.task.models:
        # an agent that a followed map has no more, or has new, is no mistake in the operator's file
        written = resolve_map(told.topology, derive_seed(told.seed, "topology"), Path(told.folder)).names
        whole = check_own(told, loaded.task, (*experiment.agents, *written), name)
        if whole is not None:
            experiment = resolve(with_newest_map(config), loaded, whole=whole)
    return PreparedAgent(name, config, experiment)


def addresses_on_map(config: ExperimentConfig) -> Mapping[str, Collection[str]]:
    """Return the addresses of each agent on the map, without loading the task; some agents may have none."""
    config = with_newest_map(config)
    resolved = resolve_map(config.topology, derive_seed(config.seed, "topology"), config.folder)
    return {name: tuple(resolved.network.addresses.get(name, ())) for name in resolved.names}


def neighbours_of(schedule: RunSchedule, name: str) -> Neighbours:
    """Return the peers that an agent merges, those that may fetch from it, and their addresses."""
    readers = frozenset(agent for agent in schedule.agents if name in schedule.plan(agent).peers)
    peers = schedule.plan(name).peers if name in schedule.agents else frozenset[str]()
    return Neighbours(peers, readers, schedule.agents, schedule.first.addresses)
