"""The settings that give an agent's weights their meaning, which peers compare.

Weights mean nothing by themselves: heads, activations and the eps of norms decide what they compute, the order of
classes decides the meaning of an output, a tokenizer decides which token a row belongs to. Each is a short text by
name, which peers compare (`dimat.net.compatibility`).
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

import torch
from blake3 import blake3
from torch import nn

from dimat.errors import HookError
from dimat.merge import MergePlan
from dimat.merge.models.config_keys import FUNCTION, flat_config
from dimat.net.compatibility import CLASSES, PROBE_SET
from dimat.tasks.base import Task
from dimat.tasks.data import input_batches
from dimat.train.contract import task_errors
from dimat.train.token_lesson import text_of

LONGEST = 2_000
"""Characters of one setting; a longer text is told by its hash."""
MOST = 100
"""Settings of a task's own, or of a model's configuration, that are told."""
ATTRIBUTES = (
    *("num_heads", "num_groups", "groups", "eps", "stride", "padding", "dilation", "padding_mode"),
    *("negative_slope", "approximate", "output_size", "upscale_factor", "scale_factor", "norm_type", "bidirectional"),
)
"""Settings of torch's modules that change what weights of the same shapes compute."""


def settings_of(task: Task, model: nn.Module, plan: MergePlan) -> dict[str, str]:
    """Return an agent's settings by name: classes, the model's configuration and modules, the probe set if networks
    are compared on it, and those of the task's `agreement`. Raises HookError if that is not a mapping of texts.

    For agents that exchange logits, only classes and the probe set: their models may differ, and their tokenizers.
    """
    config = _config_of(model)
    classes = [str(name) for name in task.classes] or _class_names(config)
    found = {CLASSES: _short(json.dumps(classes), f"{len(classes):,} names")} if classes else {}
    if plan.shares == "logits":
        return {**found, PROBE_SET: read_hash(task, plan.probe_samples)}
    found |= _modules(model)
    for key, value in sorted(config.items()):
        if FUNCTION.fullmatch(key) and len(found) < MOST:
            found[f"config.{key}"] = _short(json.dumps(value, default=str))
    if plan.align_data == "probe":
        found["probe"] = probe_hash(task, plan.probe_samples)
    return found | _told(task)


def _told(task: Task) -> dict[str, str]:
    """Return what the task itself wants to agree on."""
    told: Any = getattr(task, "agreement", None)
    if told is None:
        return {}
    pairs = cast("Mapping[Any, Any]", told).items() if isinstance(told, Mapping) else ()
    if not isinstance(told, Mapping) or len(pairs) > MOST or not all(isinstance(k, str) for k, _ in pairs):
        raise HookError(
            f"task {task.name}: its agreement is a {type(told).__name__}; give a mapping of up to {MOST} texts"
        )
    return {name: _short(str(value)) for name, value in pairs}


def _modules(model: nn.Module) -> dict[str, str]:
    """Return the settings of a model's modules, each with how many modules have it; and its activations."""
    counts: dict[str, Counter[str]] = {}
    activations: set[str] = set()
    for module in model.modules():
        kind = type(module)
        if kind.__module__ == "torch.nn.modules.activation" and not any(True for _ in module.parameters()):
            activations.add(kind.__name__)  # one may stand in many places
        if not kind.__module__.startswith("torch.nn.modules."):
            continue  # what others' modules call so may be anything
        for name in ATTRIBUTES:
            value: Any = getattr(module, name, None)
            if isinstance(value, int | float | str | tuple):
                counts.setdefault(name, Counter())[str(cast("Any", value))] += 1
    told = {
        name: ", ".join(f"{value} ×{count}" for value, count in sorted(found.items())) for name, found in counts.items()
    }
    if activations:
        told["activations"] = ", ".join(sorted(activations))
    return {f"model's {name}": _short(text) for name, text in told.items()}


def _config_of(model: nn.Module) -> dict[str, Any]:
    """Return the keys of a model's configuration: transformers' and diffusers', or a dataclass; dotted."""
    config: Any = getattr(model, "config", None)
    table: Any = None
    if callable(getattr(config, "to_dict", None)):
        table = config.to_dict()
    elif dataclasses.is_dataclass(config) and not isinstance(config, type):
        table = dataclasses.asdict(config)
    elif isinstance(config, Mapping):
        table = dict(cast("Mapping[Any, Any]", config))
    if not isinstance(table, dict):
        return {}
    return flat_config({str(key): value for key, value in cast("dict[Any, Any]", table).items()})


def _class_names(config: Mapping[str, Any]) -> list[str]:
    """Return the names of a configuration's classes in order; none where they are the library's own numbers."""
    names = {key.removeprefix("id2label."): str(v) for key, v in config.items() if key.startswith("id2label.")}
    if not all(key.isdecimal() for key in names) or all(name.startswith("LABEL_") for name in names.values()):
        return []
    return [names[key] for key in sorted(names, key=int)]


def probe_hash(task: Task, samples: int) -> str:
    """Return a hash of the inputs on which networks are compared, or that logits are of."""
    hasher = blake3()
    with task_errors(task, 'data("probe")'):
        for inputs in input_batches(task.data("probe"), 32, samples=samples):
            for tensor in inputs:
                hasher.update(f"{tuple(tensor.shape[1:])} {tensor.dtype} ".encode())
                hasher.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest(length=8)


def read_hash(task: Task, samples: int) -> str:
    """Return a hash of what logits are of: the probe text of a language model, whatever its tokens, else the inputs."""
    text = text_of(task)
    return probe_hash(task, samples) if text is None else f"text {text.hash}"


def _short(text: str, what: str = "") -> str:
    """Return a text, or its hash where it is long."""
    if len(text) <= LONGEST:
        return text
    return f"{what or f'{len(text):,} characters'}, hash {blake3(text.encode()).hexdigest(length=8)}"
