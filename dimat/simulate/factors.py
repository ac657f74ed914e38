"""The factors that `dimat advise` varies: options on a given experiment, or why none.

An option is a set of settings by dotted key, as written in the experiment's file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dimat.agent.learner.shared_base import plan_for
from dimat.agent.setup.class_shares import class_distance
from dimat.agent.setup.next_step import averages_exactly
from dimat.config import ExperimentConfig, build
from dimat.config.presets import WITH_MOMENTS
from dimat.seeds import torch_generator
from dimat.simulate.world.scenario import Scenario
from dimat.tasks.base import Task
from dimat.topology.base_k import base_k_rounds
from dimat.train.contract import task_errors
from dimat.train.losses import SKEWED, class_counts, skew

MIXING_STEPS = 3
"""Larger number of exchanges per round to try: on a ring of five, three nearly give the mean (docs/results.md)."""
ALL_LINKED = 8
"""Largest number of agents that the denser option links completely; above it, each has about log2 of them."""
SOURCES = ("map", "edges", "file", "python")


@dataclass(frozen=True, slots=True)
class Option:
    """A way to set a factor. `settings`: none for the experiment as it is."""

    label: str
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class World:
    """Facts beside the configuration on which options depend: the task, and the agents' data."""

    task: Task
    agents: int
    sparse: bool
    exact: bool
    base_k: bool
    apart: float | None
    skewed: bool

    @classmethod
    def of(cls, scenario: Scenario) -> World:
        """Return the facts of a resolved experiment."""
        counts = None if class_counts(scenario.task, scenario.task.data("train")) is None else scenario.histogram
        far = counts is not None and any(skew(torch.tensor(row)) > SKEWED for row in counts.values() if sum(row))
        return cls(
            scenario.task,
            len(scenario.agents),
            scenario.sparse,
            averages_exactly(scenario.schedule.first),
            scenario.schedule.first.schedule_config.name == "base-k",
            None if counts is None else class_distance(counts),
            far,
        )


Options = list[Option] | str
"""The options, simplest first, including the present one; or the reason why a factor is not varied."""


def start(config: ExperimentConfig, world: World) -> Options:
    """The initialisation: agents begin from the same weights, or each from its own."""
    if config.merge.base is not None:
        return "merge.base says where task vectors are taken from, which is where agents should begin"
    if _brings_weights(world.task):
        return "the task brings weights of its own, in which all agents begin alike"
    options = [Option("shared", {"train.initialisation": "shared"}), Option("own", {"train.initialisation": "own"})]
    return _with_present(options, config.train.initialisation)


def loss(config: ExperimentConfig, world: World) -> Options:
    """The loss of local training."""
    if world.apart is None:
        return "the task has no classes that losses could allow for, or there is one agent"
    if not world.skewed and config.train.loss.name in ("auto", "task"):
        return f"no agent's class shares are over {SKEWED} from equal ones, and \"auto\" is the task's loss then"
    options = [Option("task", {"train.loss": "task"}), Option("auto", {"train.loss": "auto"})]
    return _with_present(options, config.train.loss.name)


def optimizer_state(config: ExperimentConfig, world: World) -> Options:
    """The treatment of the optimizer's moments at a merge."""
    method = _combine(config, world)
    if method not in WITH_MOMENTS:
        return f'moments go with a mean of weights, and merge.combine is "{method}"'
    options = [Option(name, {"train.optimizer_state": name}) for name in ("kept", "merged")]
    return _with_present(options, config.optimizer_state)


def combine(config: ExperimentConfig, world: World) -> Options:
    """The method that combines several sets of weights into one."""
    if getattr(world.task, "merge_stages", None) is not None:
        return "the task says itself how its weights are merged"
    if config.merge.preset.shares == "logits":
        return f'merge.method "{config.merge.method}" exchanges logits: there are no weights to combine'
    options = [Option(name, {"merge.combine": name}) for name in ("average", "pleas", "regmean")]
    return _with_present(options, _combine(config, world))


def topology(config: ExperimentConfig, world: World) -> Options:
    """Who exchanges weights with whom: as it is, more links, and the exact average of a Base-(k+1) graph."""
    if world.agents < 3:
        return "two agents have one way to be linked"
    denser = "complete" if world.agents <= ALL_LINKED else "exponential"
    options = [Option("as it is")]
    if world.sparse and (config.topology.graph != denser or config.topology.schedule.name != "static"):
        options.append(Option(denser, _links(config, denser, "static", world.agents)))
    if not world.base_k and config.schedule.mode == "sync":
        pairs = _links(config, "complete", "base-k", world.agents)
        period = len(base_k_rounds(world.agents, 1))
        exact = {**pairs, "schedule.mixing_steps": period}
        options += [Option("base-k", pairs), Option(f"base-k, exact in {period}", exact)]
    return options


def mixing_steps(config: ExperimentConfig, world: World) -> Options:
    """Exchanges after each training."""
    if config.schedule.mode != "sync":
        return 'schedule.mixing_steps needs mode = "sync"'
    exact = world.base_k
    present = config.schedule.mixing_steps
    if not world.sparse and not exact and present == 1:
        return "all agents are linked to all: one exchange is the mean"
    steps = {1, MIXING_STEPS, present} | ({len(base_k_rounds(world.agents, 1))} if exact else set())
    return _with_present(
        [Option(str(number), {"schedule.mixing_steps": number}) for number in sorted(steps - {0})], str(present)
    )


def local_steps(config: ExperimentConfig, world: World) -> Options:
    """Local training between merges: shorter and longer rounds of the same epochs (or steps) in all."""
    rounds, epochs, steps = config.schedule.rounds, config.train.epochs_per_round, config.train.steps_per_round
    few = (rounds + 1) // 2
    options = [Option("as it is")]
    if steps is None:
        total = rounds * (epochs or 2.0)
        options.insert(0, Option("longer", {"train.epochs_per_round": total / few, "schedule.rounds": few}))
        options.append(
            Option("shorter", {"train.epochs_per_round": total / (2 * rounds), "schedule.rounds": 2 * rounds})
        )
        return options if few < rounds else options[1:]
    if few < rounds and rounds * steps % few == 0:
        options.insert(0, Option("longer", {"train.steps_per_round": rounds * steps // few, "schedule.rounds": few}))
    if steps % 2 == 0:
        options.append(Option("shorter", {"train.steps_per_round": steps // 2, "schedule.rounds": 2 * rounds}))
    return options if len(options) > 1 else "a round of an odd number of steps cannot be cut in two"


@dataclass(frozen=True, slots=True)
class ProbedFactor:
    """One thing to vary. `by_traffic`: whether of equally good options the one that sends least is kept, and then what
    is there already; else it is the first, which is simplest."""

    options: Callable[[ExperimentConfig, World], Options]
    by_traffic: bool = True


FACTORS: Mapping[str, ProbedFactor] = {
    "start": ProbedFactor(start),
    "loss": ProbedFactor(loss),
    "optimizer state": ProbedFactor(optimizer_state),
    "combine": ProbedFactor(combine, by_traffic=False),
    "topology": ProbedFactor(topology),
    "mixing steps": ProbedFactor(mixing_steps),
    "local steps": ProbedFactor(local_steps),
}
"""The factors in the order in which they are varied: each starts from the best option of the one before."""


def with_settings(config: ExperimentConfig, settings: Mapping[str, Any], where: str) -> ExperimentConfig:
    """Return an experiment with settings by dotted key (one table deep) put in; None is a key that is not given.

    Keys that were not given stay so. ConfigError, which names `where`, for what cannot be.
    """
    tree = {key: getattr(config, key) for key in {*config.model_fields_set, "folder"}}
    for key, value in settings.items():
        table, _, name = key.rpartition(".")
        if not table:
            tree[name] = value
            continue
        held = tree.get(table, {})
        given = held if isinstance(held, dict) else {k: getattr(held, k) for k in held.model_fields_set}
        tree[table] = {**given, name: value}
    return build(ExperimentConfig, tree, where)


def present_of(options: list[Option]) -> int:
    """Return the index of the option that the experiment has at present."""
    return next(i for i, option in enumerate(options) if not option.settings)


def _with_present(options: list[Option], present: str) -> list[Option]:
    """Return the options with no settings at the present one, which comes last where it is none of them."""
    made = [Option(each.label) if each.label == present else each for each in options]
    return made if any(each.label == present for each in options) else [*made, Option(present)]


def _combine(config: ExperimentConfig, world: World) -> str:
    return plan_for(config.merge, world.task).combine.name


def _links(config: ExperimentConfig, graph: str, schedule: str, agents: int) -> dict[str, Any]:
    """Return the settings of another graph and schedule; those that they replace are None."""
    given = config.topology.model_fields_set
    settings: dict[str, Any] = {f"topology.{key}": None for key in SOURCES if getattr(config.topology, key) is not None}
    if config.topology.options:
        settings["topology.options"] = {}
    settings |= {"topology.graph": graph, "topology.agents": agents}
    if schedule != "static" or "schedule" in given:
        settings["topology.schedule"] = schedule
    if "mixing" in given and (schedule != "static" or config.topology.mixing.name != "metropolis"):
        settings["topology.mixing"] = "metropolis"
    return settings


def _brings_weights(task: Task) -> bool:
    """Whether models of the task have weights that no seed draws: equal under two seeds, and not all one number."""
    with task_errors(task, "build_model()"):
        one, other = (task.build_model(torch_generator(seed, "advise", "start")) for seed in (0, 1))
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return any(a.numel() > 1 and torch.equal(a, b) and bool((a != a.flatten()[0]).any()) for a, b in pairs)
