"""A task as loaded in a process, with its symmetry groups: what the agents of one process may share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dimat.config import ExperimentConfig
from dimat.seeds import torch_generator
from dimat.symmetry import Observer, SymmetrySpec, verified_symmetry
from dimat.tasks import load_task
from dimat.tasks.base import Task


@dataclass(slots=True)
class LoadedTask:
    """A task as loaded in this process, with its symmetry groups once somebody needs them."""

    task: Task
    spec: SymmetrySpec | None = None
    observers: dict[str, Observer] = field(default_factory=dict[str, Observer])


_kits: dict[str, LoadedTask] = {}


def kit_for(config: ExperimentConfig, *, symmetry: bool) -> LoadedTask:
    """Return the task of an experiment, loaded once per process; with its verified symmetry spec if asked for."""
    key = f"{config.task.model_dump_json(exclude={'partition'})}@{Path(config.folder).resolve()}"
    if key not in _kits:
        _kits[key] = LoadedTask(load_task(config.task, Path(config.folder)))
    kit = _kits[key]
    if symmetry and kit.spec is None:
        kit.spec = derive_checked(kit.task)
    return kit


def derive_checked(task: Task) -> SymmetrySpec:
    """Derive a task's symmetry groups, freeze those that fail the proof on its model, and return what is left;
    its `warnings` say what was given up."""
    model = task.build_model(torch_generator(0, "symmetry", "model"))
    inputs = task.example_inputs()
    return verified_symmetry(model, inputs, torch_generator(0, "symmetry", "verify"))
