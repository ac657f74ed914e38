"""The ground an agent shares with its peers: base of task vectors, frozen parts, adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from blake3 import blake3
from torch import Tensor

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
from dimat.seeds import torch_generator
from dimat.tasks.base import Task
from dimat.weights.snapshot import checksum
from dimat.weights.tensors import encode, schema_hash


def load_base(config: ExperimentConfig, task: Task) -> dict[str, Tensor] | None:
    """Return the weights that task vectors are taken from; DataError for a file that cannot be read or does not fit
    the task's model."""
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
    """Return what agents compare when they meet: the address of the base of task vectors, the hash of the part of the
    model that is frozen, or a hash of both; empty where there is neither, or agents exchange no weights."""
    if config.merge.preset.shares == "logits":
        return ""
    weights = load_base(config, task)
    address = "" if weights is None else checksum(encode(weights)).root
    frozen: str = getattr(task, "base_hash", "")
    return blake3(f"{address} {frozen}".encode()).hexdigest() if address and frozen else address or frozen


def plan_for(config: MergeConfig, task: Task) -> MergePlan:
    """Return the plan of a merge configuration for a task: where its model is trained in part, with the stages that
    the part asks for in place of the preset's.

    Raises ConfigError where the configuration moves units of a part, which the frozen rest would not follow, or holds
    layers back that the model does not have.
    """
    plan = _plan_for(config, task)
    if plan.layers:
        model = task.build_model(torch_generator(0, "layers"))
        plan.factors(own := model.state_dict(), natures_of(own, model))
    return plan


def _plan_for(config: MergeConfig, task: Task) -> MergePlan:
    plan = plan_merge(config)
    stages: Mapping[str, str] | None = getattr(task, "merge_stages", None)
    if stages is None or plan.shares == "logits":
        return plan
    if config.align is not None and config.align.name != "none":
        raise ConfigError(
            f'merge.align = "{config.align.name}" would move the units of what {task.name} trains, and not those of '
            "its frozen base, which all agents share; leave merge.align out"
        )
    notes: list[str] = []
    if plan.align.name != "none":
        notes.append("the base is frozen and shared by all, so nothing is aligned")
        plan = replace(plan, align=align_registry.bind("none", {}))
    if config.repair is None:
        plan = replace(plan, repair=repair_registry.bind(stages.get("repair", plan.repair.name), {}))
    wanted = stages.get("combine", plan.combine.name)
    if config.combine is None and plan.combine.name == "average":
        plan = replace(plan, combine=combine_registry.bind(wanted, {}))
    if needs_symmetry(plan):
        raise ConfigError(
            f'combine method "{plan.combine.name}" pairs units of whole models, and {task.name} trains a part on a '
            f'frozen base; use merge.combine = "{wanted}"'
        )
    if wanted in product_methods() and not plan.combine.traits["lora_products"]:
        notes.append(
            f'"{plan.combine.name}" merges LoRA factors one by one, which is no merge of the changes that they stand '
            f'for; "{wanted}" is'
        )
    return replace(plan, notes=tuple(notes))
