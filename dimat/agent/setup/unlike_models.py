"""Agents with models of their own (`task.models`), whose tasks must differ in that alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from dimat.agent.setup.agreement import probe_hash
from dimat.agent.setup.loaded_task import LoadedTask, load_for
from dimat.config import ExperimentConfig
from dimat.errors import ConfigError, unknown_agent
from dimat.merge import plan_merge
from dimat.tasks import load_task
from dimat.tasks.base import Task
from dimat.train.contract import task_errors


def load_each(config: ExperimentConfig, loaded: LoadedTask, agents: Sequence[str]) -> list[LoadedTask]:
    """Return the tasks of all agents, one for each entry of `task.models` and that of the others, `loaded`.

    Raises ConfigError, naming the entry, for an agent that there is not and for options that change the data.
    """
    if config.merge.preset.ceiling:  # one model in the place of the network: that of `task.options`
        return [loaded]
    check_names(config, agents)
    found: list[LoadedTask] = []
    for i, entry in enumerate(config.task.models):
        own = load_for(config.of_agent(entry.agents[0]), symmetry=False)
        _check_data(config, loaded.task, own.task, i)
        found.append(own)
    others = len(agents) > sum(len(entry.agents) for entry in config.task.models)
    return [*found, *([loaded] if others else [])]


def check_own(config: ExperimentConfig, task: Task, agents: Sequence[str], agent: str) -> None:
    """Check the models of an experiment for one of its agents, whose task is loaded; it raises as `load_each` does."""
    check_names(config, agents)
    for i, entry in enumerate(config.task.models):
        if agent in entry.agents:  # the experiment's own task is not kept: only its data are looked at
            _check_data(config, load_task(config.task, Path(config.folder)), task, i)


def check_names(config: ExperimentConfig, agents: Sequence[str]) -> None:
    """Raise ConfigError where an entry names an agent that there is not."""
    for i, entry in enumerate(config.task.models):
        for agent in entry.agents:
            if agent not in agents:
                raise ConfigError(unknown_agent(f"task.models[{i}]", agent, agents))


def _check_data(config: ExperimentConfig, task: Task, other: Task, entry: int) -> None:
    samples = plan_merge(config.merge).probe_samples
    for what, ours, theirs in (
        ("the classes", task.classes, other.classes),
        ("the probe set", probe_hash(task, samples), probe_hash(other, samples)),
        ("the training data", _known(task, "train"), _known(other, "train")),
        ("the test data", _known(task, "test"), _known(other, "test")),
    ):
        if ours != theirs:
            raise ConfigError(
                f"task.models[{entry}]: its options change {what} of task {task.name}, and agents with other models "
                "need the same data; give options of the model alone, and those of the data in task.options"
            )


def _known(task: Task, split: str) -> tuple[int, bytes]:
    """Return what is compared of a split: how many examples it has, and their labels where they are classes."""
    with task_errors(task):
        data = task.data("train" if split == "train" else "test")
        labels = data.labels
    return len(data), b"" if labels is None else labels.to(torch.int64).numpy().tobytes()
