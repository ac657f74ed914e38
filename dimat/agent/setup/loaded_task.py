"""A task loaded in a process, with the merge that its agents do; shared among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dimat.agent.learner.learner import Learner
from dimat.agent.learner.shared_base import plan_for
from dimat.agent.learner.shared_logits import layout_of
from dimat.agent.learner.statistics import sample_statistics
from dimat.config import ExperimentConfig
from dimat.device import resolve_device
from dimat.errors import DimatError
from dimat.merge import MergePlan, needs_symmetry, plan_merge
from dimat.merge.shared_statistics import beside
from dimat.seeds import torch_generator
from dimat.symmetry import Observer, SymmetrySpec, verified_symmetry
from dimat.tasks import load_task
from dimat.tasks.base import Task
from dimat.train.base import ModelTrainer
from dimat.train.check_task import check_task
from dimat.train.contract import task_errors
from dimat.weights.tensors import schema_hash


@dataclass(slots=True)
class _Shared:
    """A task as a process keeps it, for every experiment that has it."""

    task: Task
    spec: SymmetrySpec | None = None
    observers: dict[str, Observer] = field(default_factory=dict[str, Observer])
    checked: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """By settings of training with which the task was tried, what may be meant."""


_loaded: dict[str, _Shared] = {}


@dataclass(frozen=True, slots=True)
class LoadedTask:
    """A loaded task, and how its models are merged. `plan`: the configuration's merge, or the one that the
    task asks for in its place; `spec`: the model's symmetry groups, None if the merge does not need them or they
    were not asked for; `observers`: of activations, shared by all agents of the process; `notes`: oddities of the task
    that may be intended."""

    task: Task
    plan: MergePlan
    spec: SymmetrySpec | None
    observers: dict[str, Observer]
    notes: tuple[str, ...] = ()

    def learner(
        self,
        agent: str,
        config: ExperimentConfig,
        indices: Tensor,
        store: Path,
        *,
        durable: bool = True,
        part: str = "",
        trainer: ModelTrainer | None = None,
    ) -> Learner:
        """Return what does an agent's work. `indices`: its samples in the task's training split; `store`: folder in
        which it records its snapshots; `part`: what decides which samples are its; `trainer`: trains the model, where
        that is not dimat's own."""
        return Learner(
            agent,
            config,
            self.task,
            indices,
            store,
            self.spec,
            durable=durable,
            observers=self.observers,
            part=part,
            plan=self.plan,
            custom_trainer=trainer,
        )

    def sample_snapshot(
        self, model: torch.nn.Module, moments: Mapping[str, Tensor], *, largest: bool = False
    ) -> dict[str, Tensor]:
        """Return tensors of the names, shapes and types of a snapshot: what agents share, and beside it statistics and
        the optimizer's moments as they travel. `largest`: of the largest that a peer may send, where they differ."""
        if self.plan.shares == "logits":
            layout = layout_of(self.plan, self.task, model)
            return layout.largest() if largest else layout.sample()
        return beside(model.state_dict(), {**sample_statistics(self.plan, self.task, model), **moments})

    def schema(self, model: torch.nn.Module) -> str:
        """Return the hash of what is the same in all agents' snapshots: names, shapes and types of what they share."""
        if self.plan.shares == "logits":
            return layout_of(self.plan, self.task, model).schema
        return schema_hash(model.state_dict())


def load_for(config: ExperimentConfig, task: Task | None = None, *, symmetry: bool = True) -> LoadedTask:
    """Load the task of an experiment, once per process, and all that its merge needs. `task`: one to use instead of
    the configuration's; `symmetry`: False leaves the symmetry groups out, for a process in which nothing is merged.

    The task is tried on a few examples (`check_task`), unless `task` is given: that one is trained elsewhere.

    Raises ConfigError for an impossible merge or device, HookError if the task cannot be loaded or its code breaks
    its contract, DataError if its data are faulty.
    """
    plan_merge(config.merge)  # its faults come before the task is loaded
    resolve_device(config.train.device)
    shared = _shared(config) if task is None else _Shared(task)
    plan = plan_for(config.merge, shared.task)
    notes = _tried(config, shared, plan) if task is None else ()
    wanted = symmetry and needs_symmetry(plan)
    if wanted and shared.spec is None:
        shared.spec = derive_checked(shared.task)
    return LoadedTask(shared.task, plan, shared.spec if wanted else None, shared.observers, notes)


def derive_checked(task: Task) -> SymmetrySpec:
    """Derive a task's symmetry groups, freeze those that fail verification on its model, and return the spec;
    its `warnings` name the frozen ones."""
    with task_errors(task):
        model = task.build_model(torch_generator(0, "symmetry", "model"))
        inputs = task.example_inputs()
    return verified_symmetry(model, inputs, torch_generator(0, "symmetry", "verify"))


def _tried(config: ExperimentConfig, shared: _Shared, plan: MergePlan) -> tuple[str, ...]:
    """Try the task once for each way to train it; errors and notes name the hook that it is of."""
    train = config.train
    probe = plan.align_data == "probe" or plan.accept.settings.get("on") == "probe"
    key = f"{train.device} {train.precision} {train.accumulate > 1} {train.grad_clip_norm} {train.optimizer} {probe}"
    if key not in shared.checked:
        with task_errors(shared.task):
            for split in ("train", "test"):
                shared.task.data(split)
        where = "" if config.task.hook is None else f"{config.task.hook}: "
        try:
            notes = check_task(shared.task, train, Path(config.folder), probe=probe)
        except DimatError as error:
            raise type(error)(f"{where}{error}") from error
        shared.checked[key] = tuple(f"{where}{note}" for note in notes)
    return shared.checked[key]


def _shared(config: ExperimentConfig) -> _Shared:
    key = f"{config.task.model_dump_json(exclude={'partition'})}@{Path(config.folder).resolve()}"
    if key not in _loaded:
        _loaded[key] = _Shared(load_task(config.task, Path(config.folder)))
    return _loaded[key]
