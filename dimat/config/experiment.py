"""An experiment: the root of all tables, with [topology], [task] and [schedule]."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field, model_validator

from dimat.config.agent import AgentConfig, DhtConfig, ExchangeConfig
from dimat.config.merge import MergeConfig
from dimat.config.monitor import MonitorConfig
from dimat.config.presets import PRESETS, WITH_MOMENTS, apply_preset
from dimat.config.sharing import check_sharing
from dimat.config.simulate import SimulateConfig
from dimat.config.train import TrainConfig
from dimat.config.tree import Named, NamedConfig, Options, Tree
from dimat.config.variants import RIVALS, VariantConfig
from dimat.errors import ConfigError

_NO_FOLDER = re.compile(r"[/\\\x00-\x1f\x7f\ud800-\udfff]")
MOST_NAME = 200
"""Longest name of a run, in bytes: file systems allow 255, and the names of some files extend the run's name."""


class TopologyConfig(Tree):
    """Who exchanges weights with whom, and with which mixing weights. The graph has exactly one source."""

    map: str | None = None
    """Network map file (TOML) whose tables replace this one; a path, relative to the experiment's folder."""
    graph: str | None = None
    """Name of a generator, e.g. "ring"; `dimat topology list` shows all. Default: "ring" if nothing else is given."""
    edges: tuple[tuple[str | int, str | int], ...] | None = None
    """Explicit undirected edges between agents (names or indices)."""
    file: str | None = None
    """Path of a file with the graph: GraphML, GML, node-link JSON, edge list, map TOML or {connectivity, pi} JSON."""
    python: str | None = None
    """`file.py:function` that returns a networkx graph."""
    agents: Annotated[int, Field(ge=1)] | None = None
    """Number of agents; needed by generators, checked against files."""
    options: Options = Field(default_factory=dict)
    """Options of the generator, e.g. { degree = 4 } for "random-regular"."""
    schedule: Named = NamedConfig(name="static")
    """Time-varying schedule: "static", "one-peer-exponential", "random-matching", "epidemic", "base-k", "cycle"."""
    mixing: Named = NamedConfig(name="metropolis")
    """Mixing weights: "metropolis", "max-degree", "uniform", "samples", "matrix", "push-sum"; option lazy in
    [0, 1)."""
    most_agents: Annotated[int, Field(ge=1)] = 10_000
    """Largest number of agents allowed, so that a mistyped number is refused before it takes all memory."""
    most_links: Annotated[int, Field(ge=1)] = 1_000_000
    """Largest number of links allowed in a graph; a link takes about 1 kB of memory."""

    @model_validator(mode="after")
    def _one_source(self) -> TopologyConfig:
        sources = RIVALS["topology"]
        given = [k for k in sources if getattr(self, k) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of {', '.join(sources)}, not {' and '.join(given)}")
        if self.agents is not None and self.agents > self.most_agents:
            raise ValueError(
                f"{self.agents:,} agents are above most_agents = {self.most_agents:,}; raise that for more"
            )
        return self


class PartitionConfig(Tree):
    """How the training data are split among the agents."""

    kind: Literal["iid", "dirichlet", "classes", "shards"] = "iid"
    """"iid": class-balanced; "dirichlet": class shares drawn from Dirichlet(alpha); "classes": `classes_per_agent`
    classes each; "shards": sorted by label, cut, `shards_per_agent` each."""
    alpha: Annotated[float, Field(gt=0)] = 0.5
    """Dirichlet concentration (kind "dirichlet"); smaller is more skewed."""
    classes_per_agent: Annotated[int, Field(ge=1)] = 2
    """Classes that an agent holds (kind "classes")."""
    shards_per_agent: Annotated[int, Field(ge=1)] = 2
    """Shards that an agent holds (kind "shards")."""
    min_samples: Annotated[int, Field(ge=1)] = 8
    """No agent holds fewer samples than this; a draw that leaves one with fewer is drawn again."""


class AgentModels(Tree):
    """The model of some agents, if it differs from the others' model."""

    agents: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of the agents."""
    options: Options = Field(default_factory=dict)
    """Options of the task that choose their model, e.g. { model = "mlp" }; they override `task.options`, tables of them
    key by key. Options that change the data are refused, but language models may have tokenizers of their own."""


class TaskConfig(Tree):
    """The task that is trained: model, data, loss, metric."""

    name: str | None = None
    """Bundled task: "digits", "images", or with the extra `hf` "hf-image-classification" or "hf-causal-lm". Default
    "digits" if no hook is given."""
    hook: str | None = None
    """`package.module:function` or `file.py:function` that returns a Task."""
    options: Options = Field(default_factory=dict)
    """Keyword arguments of the task, e.g. { model = "mlp" } or { train = "data/train.parquet" }."""
    partition: PartitionConfig = PartitionConfig()
    """How the training data are split among the agents."""
    models: tuple[AgentModels, ...] = ()
    """Agents with models of their own, such as { agents = ["lab-a"], options = { model = "mlp" } }; only for methods
    that exchange no weights ("distil" and "isolated"). Must be the same in every agent's file."""

    @model_validator(mode="after")
    def _one_source(self) -> TaskConfig:
        if self.name is not None and self.hook is not None:
            raise ValueError("give name or hook, not both")
        placed: dict[str, int] = {}
        for i, entry in enumerate(self.models):
            for agent in entry.agents:
                if agent in placed:
                    raise ValueError(f"models[{i}] and models[{placed[agent]}] both name agent {agent!r}; remove one")
                placed[agent] = i
        return self

    def of_agent(self, agent: str) -> TaskConfig:
        """Return the task with an agent's own model: its options go over the task's, tables of them key by key."""
        own = next((entry.options for entry in self.models if agent in entry.agents), {})
        options = {**self.options, **{key: _over(self.options.get(key), value) for key, value in own.items()}}
        return self.model_copy(update={"options": options, "models": ()}) if self.models else self


def _over(options: Any, own: Any) -> Any:
    """Return an agent's own option; of two tables, own keys over the others. A model is named or described by a
    config, so that each of the two takes the other's place."""
    if not isinstance(options, dict) or not isinstance(own, dict):
        return own
    others, ours = cast("dict[str, Any]", options), cast("dict[str, Any]", own)
    replaced = {"name": "config", "config": "name"}
    return {k: v for k, v in others.items() if replaced.get(k) not in ours} | ours


class DistilConfig(Tree):
    """Distillation at a first merge, from the mean logits of the agent's and its peers' old models."""

    steps: Annotated[int, Field(ge=1)] = 80
    """Optimizer steps, on the agent's own examples."""
    weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share in [0, 1] of the loss on the teachers' logits; the rest is `train.loss` on the agent's own labels."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature by which the logits of teachers and student are divided."""


class MapChange(Tree):
    """A change to another topology at some round, as after an operator's change of the network map."""

    round: Annotated[int, Field(ge=2)]
    """First round that uses the new topology."""
    topology: TopologyConfig
    """The new topology, of the same agents."""


class ScheduleConfig(Tree):
    """When the run merges and when it ends."""

    rounds: Annotated[int, Field(ge=0)] = 10
    """Number of rounds (a round: train, publish, gather, merge); 0 = until `target`, `max_time_s` or Ctrl-C."""
    mixing_steps: Annotated[int, Field(ge=1)] = 1
    """Exchanges and merges after each training; more of them bring a sparse network nearer to its mean (mode "sync").
    Logs count each as a round of its own, up to `rounds` × `mixing_steps`."""
    round_deadline_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds that an agent waits for its peers' snapshots after its own training of a round; then it merges those that
    have arrived. It should exceed the difference in training time between the slowest and the fastest agent."""
    mode: Literal["sync", "async"] = "sync"
    """"sync": agents merge their peers' snapshots of the same round; "async": the newest ones, without waiting."""
    min_peers: Annotated[int, Field(ge=0)] = 0
    """Smallest number of peers' snapshots for a merge. An agent waits for them until the deadline; with fewer, it keeps
    its own weights."""
    max_staleness: Annotated[int, Field(ge=0)] = 4
    """Largest number of rounds that a peer's newest snapshot may be behind (mode "async")."""
    staleness_decay: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Factor on a peer's mixing weight for each round that it is behind; the agent itself gets the rest (mode
    "async")."""
    join: Literal["adopt", "align"] = "adopt"
    """How a newcomer joins a running network: "adopt" a neighbour's weights, or "align": keep its own weights, permuted
    into the network's basis. With method "distil", which exchanges no weights, it always keeps its own."""
    first_merge: Literal["align", "adopt", "adopt-distil"] = "align"
    """How an agent takes over another's basis, if agents begin with weights of their own. "align": it permutes its own
    weights; "adopt": it replaces its weights by the other's, a basis that needs no alignment; "adopt-distil": the same,
    and then distils its own old model and its neighbours' into the new weights (see `distil`)."""
    first_merge_rounds: Annotated[int, Field(ge=1)] = 8
    """Number of first rounds in which agents adopt weights with a basis; a basis spreads by one link per round. Later,
    agents take over a basis by "align", so that no weights are lost when parts of a network meet again."""
    distil: DistilConfig = DistilConfig()
    """The distillation of first_merge = "adopt-distil"."""
    join_wait_s: Annotated[float, Field(gt=0)] = 10.0
    """Seconds for which a newcomer listens for a running network before it starts one."""
    target: Annotated[float, Field()] | None = None
    """An agent stops once its test metric after a merge is as good as this value or better."""
    max_time_s: Annotated[float, Field(gt=0)] | None = None
    """Time in seconds (virtual in the simulator) at which an agent finishes its round and stops."""
    final_merge: bool = False
    """End with one cycle of the Base-(k+1) graph: an exact average of all agents without a server (mode "sync")."""
    final_merge_peers: Annotated[int, Field(ge=1)] = 1
    """k of that Base-(k+1) graph: peers per agent and round."""
    changes: tuple[MapChange, ...] = ()
    """Other topologies for later rounds, in order of their first rounds."""

    @property
    def adopt_rounds(self) -> int:
        """Number of first rounds in which agents adopt weights with a basis; 0 for none."""
        return 0 if self.first_merge == "align" else self.first_merge_rounds

    @model_validator(mode="after")
    def _possible(self) -> ScheduleConfig:
        if self.final_merge and self.mode == "async":
            raise ValueError('final_merge needs all agents in the same round; use it with mode = "sync"')
        if self.mixing_steps > 1 and self.mode == "async":
            raise ValueError('mixing_steps needs all agents in the same round; use it with mode = "sync"')
        if self.final_merge and self.rounds == 0:
            raise ValueError("final_merge comes after the last round, but rounds = 0 has none; give a number of rounds")
        starts = [change.round for change in self.changes]
        for i, (before, after) in enumerate(pairwise(starts), start=1):
            if after <= before:
                raise ValueError(f"changes[{i}] has round {after}, the one before it {before}; put them in order")
        return self

    @property
    def last_exchange(self) -> int:
        """The last exchange of the last round, counted from 1; 0 for no end."""
        return self.rounds * self.mixing_steps

    def learns(self, exchange: int) -> bool:
        """Whether agents train before an exchange (counted from 1): only before a round's first exchange, and never
        before those of the final merge."""
        return self.begins_round(exchange) and not self._is_final(exchange)

    def begins_round(self, exchange: int) -> bool:
        """Whether an exchange is the first of its round; each exchange of the final merge is a round by itself."""
        return (exchange - 1) % self.mixing_steps == 0 or self._is_final(exchange)

    def ends_round(self, exchange: int) -> bool:
        """Whether an exchange is the last of its round."""
        return exchange % self.mixing_steps == 0 or self._is_final(exchange)

    def _is_final(self, exchange: int) -> bool:
        return 0 < self.last_exchange < exchange

    def round_of(self, exchange: int) -> int:
        """Return the round that an exchange belongs to, both counted from 1."""
        return (exchange - 1) // self.mixing_steps + 1

    def first_exchange(self, round: int) -> int:
        """Return the first exchange of a round, both counted from 1."""
        return (round - 1) * self.mixing_steps + 1


def _run_name(value: Any) -> Any:
    name = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(name, str) and (_NO_FOLDER.search(name) or name.strip(". ") == "" or len(name.encode()) > MOST_NAME):
        raise ValueError(
            f"must be able to name a folder: not empty, not . or .., no / or \\, no control characters, at most "
            f"{MOST_NAME} bytes"
        )
    return name


class ExperimentConfig(Tree):
    """One experiment."""

    run: Annotated[str, BeforeValidator(_run_name)] = "run"
    """Name of the run and of its folder; must not hold `/`, `\\` or control characters."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Root of all random draws: initialisations, partition, batches, augmentation, schedules."""
    topology: TopologyConfig = TopologyConfig()
    """Graph and mixing."""
    task: TaskConfig = TaskConfig()
    """Model and data."""
    train: TrainConfig = TrainConfig()
    """Local training."""
    merge: MergeConfig = MergeConfig()
    """How weights are merged."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Rounds and deadlines."""
    simulate: SimulateConfig = SimulateConfig()
    """The simulator."""
    agent: AgentConfig = AgentConfig()
    """A real agent."""
    exchange: ExchangeConfig = ExchangeConfig()
    """How weights are sent between real agents."""
    dht: DhtConfig = DhtConfig()
    """How real agents find each other."""
    monitor: MonitorConfig = MonitorConfig()
    """Metrics, experiment trackers and the dashboard."""
    variants: tuple[VariantConfig, ...] = ()
    """Other forms of this experiment, for `--compare`."""
    folder: Annotated[str, Field(exclude=True)] = "."
    """Folder to which relative paths refer; set when a file is read."""

    @property
    def optimizer_state(self) -> Literal["fresh", "kept", "merged"]:
        """The treatment of the optimizer's state at a merge: as `train` says, or the merge method's default.

        Moments help combine methods that take a kind of mean (`WITH_MOMENTS`); the weights that other methods make
        have other gradients.
        """
        preset, combine = self.merge.preset, self.merge.combine
        helps = (preset.combine if combine is None else combine.name) in WITH_MOMENTS
        return self.train.optimizer_state or ("merged" if preset.moments and helps else "kept")

    @property
    def join(self) -> Literal["adopt", "align"]:
        """How a newcomer joins: as `schedule` says, or with its own weights if no weights are exchanged."""
        return "align" if self.merge.preset.shares == "logits" else self.schedule.join

    def of_agent(self, agent: str) -> ExperimentConfig:
        """Return an agent's view of the experiment, with its own model (`task.models`)."""
        return self.model_copy(update={"task": self.task.of_agent(agent)}) if self.task.models else self

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        return apply_preset(values)

    @model_validator(mode="after")
    def _fits(self) -> ExperimentConfig:
        lr = self.train.lr_schedule.name
        if self.schedule.rounds == 0 and lr != "constant":
            raise ValueError(
                f"train.lr_schedule {lr!r} spans all rounds, but schedule.rounds = 0 has no end; "
                'give a number of rounds or use "constant"'
            )
        if self.schedule.target is not None and self.simulate.evaluate == "none":
            raise ValueError('schedule.target needs test metrics, but simulate.evaluate is "none"; use "after"')
        preset = PRESETS.get(self.merge.method)
        if self.schedule.first_merge != "align" and preset and (self.merge.align_to or preset.align_to) == "self":
            raise ValueError(
                f'schedule.first_merge = "{self.schedule.first_merge}" gives all agents one basis, in which '
                'merge.align_to = "self" has nothing to align; set merge.align_to = "shared"'
            )
        check_sharing(self)
        names = [variant.name for variant in self.variants]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise ValueError(f"variants[{i}] and variants[{names.index(name)}] are both named {name!r}; rename one")
        return self


def agent_folder(config: ExperimentConfig, agent: str) -> Path:
    """Return an agent's folder: `agent.folder`, relative to the configuration file's folder, or one named after run and
    agent. Raises ConfigError if no folder can have that name."""
    if config.agent.folder is not None:
        return Path(config.folder) / config.agent.folder
    if not agent.strip(". ") or _NO_FOLDER.search(agent):
        raise ConfigError(f"cannot name a folder after agent {agent!r}; set agent.folder")
    return Path("agents") / config.run / agent
