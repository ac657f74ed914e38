"""Agents with models of their own (`task.models`), whose tasks must differ in that alone.

Language models may have tokenizers of their own too. Their examples are then other blocks of the same text, and each
task's are split as those of the experiment's own task are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dimat.agent.setup.agreement import probe_hash
from dimat.agent.setup.experiment import Experiment, Whole
from dimat.agent.setup.loaded_task import LoadedTask, load_for
from dimat.config import ExperimentConfig
from dimat.errors import ConfigError, unknown_agent
from dimat.merge import plan_merge
from dimat.tasks import load_task
from dimat.tasks.base import Task
from dimat.tasks.token_text import ProbeText
from dimat.train.contract import task_errors
from dimat.train.token_lesson import text_of


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


def check_own(config: ExperimentConfig, task: Task, agents: Sequence[str], agent: str) -> Whole | None:
    """Check the models of an experiment for one of its agents, whose task is loaded; it raises as `load_each` does.

    Return the data that are split, if its own are cut otherwise: those of the experiment's own task.
    """
    check_names(config, agents)
    for i, entry in enumerate(config.task.models):
        if agent in entry.agents:  # the experiment's own task is not kept: only its data are looked at
            whole = load_task(config.task, Path(config.folder))
            _check_data(config, whole, task, i)
            return Whole.of(whole.data("train")) if text_of(task) is not None else None
    return None


def check_names(config: ExperimentConfig, agents: Sequence[str]) -> None:
    """Raise ConfigError where an entry names an agent that there is not."""
    for i, entry in enumerate(config.task.models):
        for agent in entry.agents:
            if agent not in agents:
                raise ConfigError(unknown_agent(f"task.models[{i}]", agent, agents))


def split_each(
    config: ExperimentConfig, found: Sequence[LoadedTask], experiment: Experiment
) -> tuple[tuple[Tensor, ...], dict[str, Task]]:
    """Return the agents' parts, each as indices into the data of its own task, and the tasks that are not the
    experiment's. `found`: of `load_each`."""
    parts, tasks = list(experiment.parts), dict[str, Task]()
    for entry, own in zip(() if config.merge.preset.ceiling else config.task.models, found, strict=False):
        followed = experiment.whole.followed(experiment.parts, Whole.of(own.task.data("train")))
        for agent in entry.agents:
            place = experiment.agents.index(agent)
            parts[place], tasks[agent] = followed[place], own.task
    return tuple(parts), tasks


def _check_data(config: ExperimentConfig, task: Task, other: Task, entry: int) -> None:
    if task.classes == other.classes and (texts := (text_of(task), text_of(other))) != (None, None):
        _check_text(*texts, entry)
        return
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


def _check_text(one: ProbeText | None, other: ProbeText | None, entry: int) -> None:
    """Raise ConfigError where two language models, which may cut a text into other blocks, have not one probe text."""
    if one is None or other is None or one.hash != other.hash:
        raise ConfigError(
            f"task.models[{entry}]: its options change the text of the probe set, on which agents with other "
            "tokenizers learn from each other; set task.options.probe.name to a text of its own, and probe.count to no "
            "less than all of its blocks, with every tokenizer"
        )


def _known(task: Task, split: str) -> tuple[int, bytes]:
    """Return what is compared of a split: how many examples it has, and their labels where they are classes."""
    with task_errors(task):
        data = task.data("train" if split == "train" else "test")
        labels = data.labels
    return len(data), b"" if labels is None else labels.to(torch.int64).numpy().tobytes()
