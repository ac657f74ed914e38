"""A model's symmetry groups as tables, and the model that a command names."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dimat.config import TaskConfig, load_experiment
from dimat.errors import ConfigError, DataError, HookError
from dimat.hooks import load_hook, user_code
from dimat.merge.natures import natures_of
from dimat.reading import as_type, parse_json, read_text
from dimat.seeds import torch_generator
from dimat.symmetry import Group, SymmetrySpec, derive_symmetry
from dimat.symmetry.stacks import real_names
from dimat.tasks import list_tasks, load_task
from dimat.tasks.base import Task
from dimat.ui.text import Table, as_text


@dataclass(frozen=True)
class ModelSymmetry:
    """A model's groups, and its tensors: (shape, dtype) by name, empty if only groups are known."""

    name: str
    spec: SymmetrySpec
    tensors: Mapping[str, tuple[tuple[int, ...], str]]
    parameters: int | None
    trainable: frozenset[str] = frozenset()
    natures: Mapping[str, str] = field(default_factory=dict[str, str])
    """Nature of each tensor that is not a parameter, or is another name of one (`tied to …`)."""


def load_model(hook: str) -> tuple[nn.Module, Any]:
    """Return model and example inputs of a hook, an experiment or a bundled task; HookError if there are none."""
    made: Any
    if hook.endswith(".toml"):
        config = load_experiment(Path(hook))
        made = load_task(config.task, Path(config.folder))
    elif hook in list_tasks():
        made = load_task(TaskConfig(name=hook))
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # a hook may draw its initial weights from the global generator
            function = load_hook(hook, Path(), "model hook")
            with user_code(f"model hook {hook!r} failed"):
                made = function()
    if isinstance(made, Task):
        with user_code(f"task of {hook!r} failed"):
            return made.build_model(torch_generator(0, "symmetry", "model")), made.example_inputs()
    if isinstance(made, tuple) and len(cast("tuple[Any, ...]", made)) == 2:
        model, inputs = cast("tuple[Any, Any]", made)
        if isinstance(model, nn.Module) and isinstance(inputs, (Tensor, tuple, list, Mapping)):
            given: Any = (inputs,) if isinstance(inputs, Tensor) else inputs
            return model, given if isinstance(given, Mapping) else tuple(given)
    raise HookError(f"model hook {hook!r} must return a Task or (model, example inputs), not {type(made).__name__}")


def describe(name: str, model: nn.Module, inputs: Any, outputs: Sequence[str] = ()) -> ModelSymmetry:
    """Derive a model's groups; problems are in the spec's warnings."""
    chosen = [int(each) if each.lstrip("-").isdigit() else each for each in outputs] or None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec = derive_symmetry(model, inputs, chosen)
    state = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    tensors = {key: (tuple(v.shape), str(v.dtype).removeprefix("torch.")) for key, v in sorted(state.items())}
    trainable = frozenset(key for key, _ in model.named_parameters(remove_duplicate=False))
    count = sum(p.numel() for p in model.parameters())
    return ModelSymmetry(name, spec, tensors, count, trainable, _natures(state, model))


def _natures(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, str]:
    natures = natures_of(state, model)
    kinds = {name: nature.value for name, nature in natures.kinds.items()}
    return dict(sorted((kinds | {name: f"tied to {first}" for name, first in natures.first.items()}).items()))


def open_described(source: str) -> ModelSymmetry:
    """Open `source`: a file of `symmetry show --json` or `SymmetrySpec.to_json`, else a model as in `load_model`.

    Raises DataError for a JSON file that cannot be read or is not a spec, HookError and ConfigError as `load_model`.
    """
    if not source.endswith(".json"):
        model, inputs = load_model(source)
        return describe(source, model, inputs)
    text = read_text(source)
    try:
        spec = SymmetrySpec.from_json(text)
        summary = as_type(_Summary, parse_json(text).get("summary") or {})
    except ValueError as error:
        raise DataError(
            f"{source} is not a symmetry spec ({error}); write one with `dimat symmetry show MODEL --json`"
        ) from error
    return ModelSymmetry(source, spec, summary.tensors, summary.parameters)


@dataclass(frozen=True)
class _Summary:
    """The part of `summary_of` that a comparison needs."""

    tensors: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict[str, tuple[tuple[int, ...], str]])
    parameters: int | None = None


def summary_of(described: ModelSymmetry) -> dict[str, Any]:
    """Return the additions of `--json` to the spec: counts, frozen axes by reason, and the tensors."""
    spec = described.spec
    return {
        "parameters": described.parameters,
        "groups": len(spec.groups),
        "nested_groups": sum(1 for group in spec.groups if group.parents),
        "frozen": [{"reason": r, "axes": n, "share": s} for r, n, s in frozen_by_reason(described)],
        "tensors": {name: [list(shape), dtype] for name, (shape, dtype) in described.tensors.items()},
        "natures": dict(described.natures),
    }


def units_text(group: Group, sizes: Mapping[str, int]) -> str:
    """Return a group's size; that of a group with parents as e.g. `64 in each of 12`."""
    each = " × ".join(str(sizes[name]) for name in group.parents)
    return f"{group.size} in each of {each}" if each else str(group.size)


def frozen_by_reason(described: ModelSymmetry) -> list[tuple[str, int, float]]:
    """Return (reason, axes, share of the parameters whose tensor has such an axis), most axes first."""
    by_reason: dict[str, set[tuple[str, int]]] = {}
    behind = real_names(described.spec)
    for axis in described.spec.frozen:
        by_reason.setdefault(axis.reason, set()).add((axis.tensor, axis.dim))
    rows: list[tuple[str, int, float]] = []
    for reason, axes in by_reason.items():
        held = {name for tensor, _ in axes for name in behind.get(tensor, (tensor,))} & described.trainable
        count = sum(prod(described.tensors[tensor][0]) for tensor in held)
        rows.append((reason, len(axes), count / max(described.parameters or 0, 1)))
    return sorted(rows, key=lambda row: (-row[1], row[0]))


def groups_table(spec: SymmetrySpec) -> Table:
    """Return the table of groups."""
    sizes, still = spec.sizes, {group.id for group in spec.numbered}
    numbers = {group.id: str(number) for number, group in enumerate((*spec.groups, *spec.numbered), 1)}
    behind = real_names(spec)
    rows = tuple(
        (
            numbers[group.id],
            group.id,
            units_text(group, sizes),
            " ".join(numbers[name] for name in group.parents),
            str(len({name for tensor, _ in group.axes for name in behind.get(tensor, (tensor,))})),
            group.points[0].node + (f" +{len(group.points) - 1}" if len(group.points) > 1 else "")
            if group.points
            else "",
            group.method if group.id not in still else "stays",
        )
        for group in (*spec.groups, *spec.numbered)
    )
    headers = ("#", "group", "units", "inside #", "tensors", "observed at", "by")
    return Table("", headers, rows, left=frozenset({1, 2, 5, 6}))


def frozen_table(described: ModelSymmetry) -> Table:
    """Return the table of frozen axes; shares overlap, as a tensor may have axes frozen for several reasons."""
    rows = tuple((reason, str(axes), f"{share:.1%}") for reason, axes, share in frozen_by_reason(described))
    return Table("", ("frozen because", "axes", "in parameters"), rows)


def natures_table(described: ModelSymmetry) -> Table:
    """Return the table of tensors that are not parameters: the number of each nature, and the first of them."""
    by_nature: dict[str, list[str]] = {}
    for name, nature in described.natures.items():
        by_nature.setdefault(nature, []).append(name)
    rows = tuple(
        (nature, str(len(names)), names[0] + (f" +{len(names) - 1}" if len(names) > 1 else ""))
        for nature, names in sorted(by_nature.items())
    )
    return Table("", ("nature (not a parameter)", "tensors", "names"), rows, left=frozenset({0, 2}))


def lines_of(described: ModelSymmetry) -> list[str]:
    """Return the output of `symmetry show`, except the invariance error."""
    spec = described.spec
    lines = as_text(groups_table(spec)) if spec.groups else []
    lines += ["", totals(described), ""]
    lines += as_text(frozen_table(described)) if spec.frozen else []
    if described.natures:
        lines += [*([""] if spec.frozen else []), *as_text(natures_table(described)), ""]
    return lines + list(spec.warnings)


def totals(described: ModelSymmetry) -> str:
    """Return a model's figures as one line."""
    spec = described.spec
    nested = sum(1 for group in spec.groups if group.parents)
    count = "unknown" if described.parameters is None else f"{described.parameters:,}"
    return (
        f"{len(spec.groups)} groups" + (f" ({nested} of them in each of another's units)" if nested else "") + "; "
        f"{spec.coverage:.1%} of the movable entries in {count} parameters move; "
        f"traced by {spec.trace_kind}; arch {spec.arch_hash[:16]}"
    )


def check_suffix(path: Path | None, suffix: str) -> None:
    """Raise ConfigError if an output file has another suffix than its format's."""
    if path is not None and path.suffix.lower() != suffix:
        raise ConfigError(f"cannot draw to {path}: the name must end in {suffix}")
