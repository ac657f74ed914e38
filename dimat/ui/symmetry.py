"""`dimat symmetry …`: a model's symmetry groups as a table or JSON."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dimat.config import TaskConfig
from dimat.errors import HookError
from dimat.hooks import load_hook
from dimat.seeds import torch_generator
from dimat.symmetry import SymmetrySpec, derive_symmetry, verify_symmetry
from dimat.task import Task
from dimat.tasks import list_tasks, load_task
from dimat.ui.text import Table, as_text


def show_symmetry(hook: str, *, verify: bool, as_json: bool) -> str:
    """Derive the groups of the model that `hook` names, and return them as text or JSON.

    `hook`: `module:function` or `file.py:function` returning a Task or (model, example inputs), or a bundled task.
    """
    model, inputs = load_model(hook)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are in the spec and shown below
        spec = derive_symmetry(model, inputs)
    error = None
    if verify and spec.groups:
        error = verify_symmetry(model, spec, inputs, torch_generator(0, "symmetry", "verify"))
    if as_json:
        return json.dumps({**json.loads(spec.to_json()), "invariance_error": error})
    return "\n".join([*_lines(model, spec), *([] if error is None else [f"invariance error {error:.1e} (float64)"])])


def load_model(hook: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return model and example inputs of a hook or bundled task; HookError where it returns something else."""
    if hook in list_tasks():
        made: Any = load_task(TaskConfig(name=hook))
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # a hook may draw its initial weights from the global generator
            function = load_hook(hook, Path(), "model hook")
            try:
                made = function()
            except Exception as error:  # a user's code may fail in any way
                raise HookError(f"model hook {hook!r} failed: {type(error).__name__}: {error}") from error
    if isinstance(made, Task):
        return made.build_model(torch_generator(0, "symmetry", "model")), made.example_inputs()
    if isinstance(made, tuple) and len(cast("tuple[Any, ...]", made)) == 2:
        model, inputs = cast("tuple[Any, Any]", made)
        inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        if isinstance(model, nn.Module):
            return model, inputs
    raise HookError(f"model hook {hook!r} must return a Task or (model, example inputs), not {type(made).__name__}")


def _lines(model: nn.Module, spec: SymmetrySpec) -> list[str]:
    parameters = sum(p.numel() for p in model.parameters())
    rows = tuple(
        (group.id, str(group.size), str(len({t for t, _ in group.axes})), str(len(group.points)), group.method)
        for group in spec.groups
    )
    lines = as_text(Table("", ("group", "units", "tensors", "observed at", "by"), rows, left=frozenset({0, 4})))
    lines += [
        "",
        f"{len(spec.groups)} groups; {spec.coverage:.1%} of {parameters:,} parameters have an axis that moves; "
        f"traced by {spec.trace_kind}; arch {spec.arch_hash[:16]}",
    ]
    reasons: dict[str, int] = {}
    for axis in spec.frozen:
        reasons[axis.reason] = reasons.get(axis.reason, 0) + 1
    lines += [f"frozen: {count} axes ({reason})" for reason, count in sorted(reasons.items(), key=lambda i: -i[1])]
    return lines + list(spec.warnings)
