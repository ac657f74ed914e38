"""The base that an agent shares with its peers: of task vectors, or frozen below adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from blake3 import blake3
from torch import Tensor, nn

from dimat.config import ExperimentConfig, MergeConfig
from dimat.errors import ConfigError, DataError
from dimat.merge import (
    MergePlan,
    align_registry,
    combine_registry,
    needs_symmetry,
    open_weights,
    plan_merge,
    product_methods,
    repair_registry,
)
from dimat.merge.natures import natures_of
from dimat.merge.registry import is_mean
from dimat.merge.stages import Inputs
from dimat.seeds import torch_generator
from dimat.tasks.base import Task
from dimat.train.contract import task_errors
from dimat.weights.snapshot import checksum
from dimat.weights.tensors import encode, schema_hash


def load_base(config: ExperimentConfig, task: Task) -> dict[str, Tensor] | None:
    """Return the base of task vectors; raises DataError for a file that cannot be read or does not fit the task's
    model."""
    base = config.merge.base
    if base is None:
        return None
    # the stream of `train.initialisation = "shared"`: a base of the run's own seed is where its agents start
    own = task.build_model(torch_generator(base.seed or 0, "init")).state_dict()
    if base.file is None:
        return {name: tensor.clone() for name, tensor in own.items()}
    path = Path(config.folder) / base.file
    weights = dict(open_weights(path))
    if schema_hash(weights) != schema_hash(own):
        raise DataError(f"merge.base: {path} does not fit the task's model (other tensor names, shapes or types)")
    return weights


def base_address(config: ExperimentConfig, task: Task) -> str:
    """Return the base's identity, which agents compare when they connect: the address of the base of task vectors, the
    hash of the frozen part of the model, or a hash of both; empty if there is neither, or if agents exchange logits."""
    if config.merge.preset.shares == "logits":
        return ""
    weights = load_base(config, task)
    address = "" if weights is None else checksum(encode(weights)).root
    frozen: str = getattr(task, "base_hash", "")
    return blake3(f"{address} {frozen}".encode()).hexdigest() if address and frozen else address or frozen


def plan_for(config: MergeConfig, task: Task) -> MergePlan:
    """Return the plan of a merge configuration for a task: with the combine method that the preset has for agents, who
    have data, where it pays for the task's model; and if only part of this is trained, with the stages that the part
    needs in place of the preset's.

    Raises ConfigError if the configuration moves units of a part, which the frozen rest would not follow, or holds
    back layers that the model does not have.
    """
    plan = _plan_for(config, task)
    if plan.layers:
        with task_errors(task):
            model = task.build_model(torch_generator(0, "layers"))
        plan.factors(own := model.state_dict(), natures_of(own, model))
    return plan


def _plan_for(config: MergeConfig, task: Task) -> MergePlan:
    plan = plan_merge(config)
    stages: Mapping[str, str] | None = getattr(task, "merge_stages", None)
    if plan.shares == "logits":
        return plan
    if stages is None:
        on_data = config.preset.on_data
        if config.combine is None and on_data:
            pays: Callable[[nn.Module, Inputs], bool] = combine_registry.traits(on_data)["pays"]
            with task_errors(task):
                chosen = pays(task.build_model(torch_generator(0, "combine")), task.example_inputs())
            if chosen:
                return replace(plan, combine=combine_registry.bind(on_data, {}))
        return plan
    if config.align is not None and plan.aligns:
        raise ConfigError(
            f'merge.align = "{config.align.name}" would move the units of what {task.name} trains, and not those of '
            "its frozen base, which all agents share; leave merge.align out"
        )
    notes: list[str] = []
    if plan.aligns:
        notes.append("the base is frozen and shared by all, so nothing is aligned")
        plan = replace(plan, align=align_registry.bind("none", {}))
    if config.repair is None:
        plan = replace(plan, repair=repair_registry.bind(stages.get("repair", plan.repair.name), {}))
    wanted = stages.get("combine", plan.combine.name)
    if config.combine is None and is_mean(plan.combine.name):
        plan = replace(plan, combine=combine_registry.bind(wanted, {}))
    if needs_symmetry(plan):
        raise ConfigError(
            f'combine method "{plan.combine.name}" pairs units of whole models, and {task.name} trains a part on a '
            f'frozen base; use merge.combine = "{wanted}"'
        )
    if wanted in product_methods() and not plan.combine.traits["lora_products"]:
        notes.append(
            f'"{plan.combine.name}" merges LoRA factors one by one, which does not merge the changes that they '
            f'represent; "{wanted}" does'
        )
    return replace(plan, notes=tuple(notes))
