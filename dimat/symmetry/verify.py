"""Check a spec by numbers: random group elements must not change what a module computes."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dimat.errors import SymmetryError
from dimat.symmetry import tree
from dimat.symmetry.derive import with_hash
from dimat.symmetry.permute import permute_weights, random_permutations
from dimat.symmetry.spec import AxisRef, Factor, FrozenAxis, Layout, SymmetrySpec, groups_in
from dimat.symmetry.trace import SymmetryWarning, retrace

_TRIALS = 2


def verify_symmetry(model: nn.Module, spec: SymmetrySpec, example_inputs: Any, generator: torch.Generator) -> float:
    """Return the worst relative change of an output under random group elements (0 is perfect).

    A deep copy of the module runs in float64 and eval mode; its vectors, normalisation statistics and
    constant tensors are made random first, so that fresh layers (all ones, all zeros) cannot hide an error.
    Each selected output's largest absolute change is divided by its largest absolute value. Expect below
    1e-9, or 1e-5 where the module computes in float32 by itself. `generator` is a CPU generator.
    Raises SymmetryError where the module has no floating-point output, or the spec does not fit it.
    """
    copied = copy.deepcopy(model).double().eval()
    state = {name: value.detach() for name, value in copied.state_dict().items() if isinstance(value, Tensor)}
    weights = randomised(state, generator)
    args, kwargs = tree.map_tensors(_as_double, tree.as_arguments(example_inputs))
    for name in {name for tied in spec.tied for name in tied[1:]}:
        weights[name] = weights[next(tied[0] for tied in spec.tied if name in tied)]
    before = _run(copied, weights, args, kwargs, spec)
    worst = 0.0
    for _ in range(_TRIALS):
        moved = permute_weights(weights, spec, random_permutations(spec, generator))
        after = _run(copied, moved, args, kwargs, spec)
        for one, other in zip(before, after):
            scale = max(float(one.abs().max()), 1e-300)
            change = float((one - other).abs().max()) / scale
            worst = max(worst, change if change == change else float("inf"))
    return worst


def freeze_failing(
    model: nn.Module,
    spec: SymmetrySpec,
    example_inputs: Any,
    generator: torch.Generator,
    tolerance: float = 1e-9,
) -> SymmetrySpec:
    """Return the spec without the groups that fail `verify_symmetry`, found by halving; itself if none does.

    Each failing group is listed in `warnings`, with a `SymmetryWarning` (SYM-E03), and its axes as frozen.
    Raises SymmetryError as `verify_symmetry` does.
    """

    def error_of(kept: set[str]) -> float:
        others = {group.id for group in spec.groups} - kept
        return verify_symmetry(model, without_groups(spec, others, ""), example_inputs, generator)

    def failing(groups: list[str]) -> dict[str, float]:
        error = error_of(set(groups))
        if error <= tolerance:
            return {}
        if len(groups) == 1:
            return {groups[0]: error}
        half = len(groups) // 2
        # groups that fail together only are all given up
        return {**failing(groups[:half]), **failing(groups[half:])} or dict.fromkeys(groups, error)

    culprits = failing([group.id for group in spec.groups])
    if not culprits:
        return spec
    messages = [f"SYM-E03 group {name} failed invariance (err={err:.1e}); frozen" for name, err in culprits.items()]
    for message in messages:
        warnings.warn(message, SymmetryWarning, stacklevel=2)
    kept = without_groups(spec, set(culprits), "failed the invariance check")
    moved = {axis.tensor for axis in kept.axes}
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    coverage = sum(size for name, size in sizes.items() if name in moved) / max(sum(sizes.values()), 1)
    kept = replace(kept, warnings=(*kept.warnings, *messages), coverage=coverage)
    return with_hash(kept, retrace(model, example_inputs).digest)


def without_groups(spec: SymmetrySpec, gone: set[str], reason: str) -> SymmetrySpec:
    """Return the spec with the factors of some groups, and of those that hang on them, frozen."""
    gone = gone | {group.id for group in spec.groups if not gone.isdisjoint(group.parents)}
    axes = tuple(AxisRef(axis.tensor, axis.dim, _frozen(axis.layout, gone)) for axis in spec.axes)
    moving = tuple(axis for axis in axes if groups_in(axis.layout))
    frozen = tuple(FrozenAxis(t, d, reason) for group in spec.groups if group.id in gone for t, d in group.axes)
    groups = tuple(group for group in spec.groups if group.id not in gone)
    return replace(spec, groups=groups, axes=moving, frozen=spec.frozen + frozen)


def _frozen(layout: Layout, gone: set[str]) -> Layout:
    return tuple(
        tuple(
            Factor(f.size, None if f.group in gone else f.group, None if f.parts is None else _frozen(f.parts, gone))
            for f in segment
        )
        for segment in layout
    )


def randomised(state: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Return a state dict in which no two units are alike: vectors get noise, constant tensors new values."""
    result = dict(state)
    for name, value in state.items():
        if not value.is_floating_point() or value.ndim == 0:
            continue
        flat = value.ndim == 1 or name.endswith(("running_mean", "running_var"))
        if not flat and not bool((value == value.flatten()[0]).all()):
            continue
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
        if name.endswith("running_var"):
            result[name] = 0.5 + noise.abs()
        else:
            result[name] = value + noise * (0.3 if flat else max(value[0].numel(), 1) ** -0.5)
    return result


def _run(model: nn.Module, weights: dict[str, Tensor], args: Any, kwargs: Any, spec: SymmetrySpec) -> list[Tensor]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # what the module writes in place (inputs, buffers) must not reach the next run
        args, kwargs = tree.map_tensors(torch.clone, (args, kwargs))
        buffers = {name: weights[name].clone() for name, _ in model.named_buffers() if name in weights}
        result = torch.func.functional_call(model, {**weights, **buffers}, args, kwargs, tie_weights=False)
    leaves = tree.leaves(result)
    chosen = [leaves[index] for index in spec.outputs] if spec.outputs else leaves
    tensors = [leaf.double() for leaf in chosen if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not tensors:
        raise SymmetryError("the model returns no floating-point tensor, so invariance cannot be checked")
    return [tensor for tensor in tensors if tensor.numel()]


def _as_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
