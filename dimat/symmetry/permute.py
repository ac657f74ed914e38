"""Apply permutations of group units to weights, buffers and optimizer state; draw, invert, compose them.

Permutations are {group id: LongTensor of shape (size,)}, and merged unit j is old unit p[j]. Groups that are
left out stay as they are. Tensors that nothing moves are handed back as they are, not copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from dimat.errors import SymmetryError, nearest
from dimat.symmetry.spec import AxisRef, Layout, SymmetrySpec

Permutations = Mapping[str, Tensor]


def permute_weights(
    state_dict: Mapping[str, Tensor], spec: SymmetrySpec, permutations: Permutations, *, strict: bool = True
) -> dict[str, Tensor]:
    """Return a state dict, parameters and buffers, with its units permuted: W' = W.index_select(dim, p).

    The input is untouched. Names that the spec does not know pass through; names tied to one tensor get one
    result. With `strict=False`, tensors of the spec may be missing (e.g. statistics of parameters alone).
    Raises SymmetryError, naming it, for an unknown group, a permutation that is none or has the wrong
    length, a missing tensor, or one whose size does not fit.
    """
    indices = _axis_indices(spec, permutations)
    aliases = {name: names for names in spec.tied for name in names}
    result = dict(state_dict)
    for tensor, axes in _by_tensor(spec).items():
        present = [name for name in aliases.get(tensor, (tensor,)) if name in state_dict]
        if not present:
            if strict:
                raise SymmetryError(f"tensor {tensor!r} is missing{nearest(tensor, state_dict)}")
            continue
        done: dict[tuple[int, torch.Size, tuple[int, ...]], Tensor] = {}
        for name in present:
            value = state_dict[name]
            key = (value.data_ptr() if not value.is_meta else id(value), value.shape, value.stride())
            if key not in done:
                done[key] = _permute_tensor(value, name, axes, indices)
            result[name] = done[key]
    return result


def permute_optimizer(
    optimizer_state: Mapping[str, Any],
    spec: SymmetrySpec,
    permutations: Permutations,
    names: Sequence[str] | Mapping[str, Tensor],
) -> dict[str, Any]:
    """Return a torch `optimizer.state_dict()` with per-parameter tensors permuted as the parameters are.

    `names` are the parameters' state-dict names in the order in which the optimizer holds them, e.g.
    `[name for name, _ in model.named_parameters()]`. Every state tensor with the parameter's axes (momentum,
    Adam's moments) is permuted; numbers, tensors of one element and hyper-parameters are kept. The input is
    untouched; tensors that nothing moves are not copied.
    Raises SymmetryError where names do not fit the state, or a state tensor does not fit its parameter.
    """
    indices = _axis_indices(spec, permutations)
    by_tensor = _by_tensor(spec)
    first = {name: tied[0] for tied in spec.tied for name in tied}
    numbers = [number for group in optimizer_state["param_groups"] for number in group["params"]]
    listed = list(names)
    if len(listed) != len(numbers):
        raise SymmetryError(f"{len(listed)} parameter names for an optimizer of {len(numbers)} parameters")
    name_of = dict(zip(numbers, listed))
    state: dict[Any, Any] = {}
    for number, entries in optimizer_state["state"].items():
        name = name_of.get(number)
        if name is None:
            raise SymmetryError(f"optimizer state {number!r} belongs to no parameter of its groups")
        axes = by_tensor.get(first.get(name, name), [])
        state[number] = {
            key: _permute_tensor(value, f"{name} ({key})", axes, indices)
            if isinstance(value, Tensor) and value.numel() != 1
            else value
            for key, value in entries.items()
        }
    return {**optimizer_state, "state": state}


def random_permutations(spec: SymmetrySpec, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw a permutation of every group, uniformly, from a CPU generator."""
    return {group.id: torch.randperm(group.size, generator=generator) for group in spec.groups}


def invert_permutations(permutations: Permutations) -> dict[str, Tensor]:
    """Return the permutations that undo these."""
    return {group: torch.argsort(p) for group, p in permutations.items()}


def compose_permutations(first: Permutations, then: Permutations) -> dict[str, Tensor]:
    """Return the permutations that act like `first`, and `then` on its result: r[j] = first[then[j]]."""
    result = dict(first)
    for group, q in then.items():
        result[group] = first[group].to(q.device)[q] if group in first else q
    return result


def axis_index(layout: Layout, permutations: Permutations) -> Tensor | None:
    """Return the index (n,) by which an axis of n entries is to be selected, or None where nothing moves."""
    if not any(factor.group in permutations for segment in layout for factor in segment):
        return None
    parts: list[Tensor] = []
    offset = 0
    for segment in layout:
        sizes = [factor.size for factor in segment]
        index = torch.arange(prod(sizes)).view(sizes)
        for position, factor in enumerate(segment):
            if factor.group is not None and factor.group in permutations:
                index = index.index_select(position, permutations[factor.group])
        parts.append(index.flatten() + offset)
        offset += prod(sizes)
    return torch.cat(parts)


def _axis_indices(spec: SymmetrySpec, permutations: Permutations) -> dict[Layout, Tensor | None]:
    checked = _checked(spec, permutations)
    return {layout: axis_index(layout, checked) for layout in {axis.layout for axis in spec.axes}}


def _checked(spec: SymmetrySpec, permutations: Permutations) -> dict[str, Tensor]:
    """Return the permutations on the CPU, those that move nothing left out."""
    sizes = {group.id: group.size for group in spec.groups}
    moving: dict[str, Tensor] = {}
    for group, given in permutations.items():
        if group not in sizes:
            raise SymmetryError(f"unknown symmetry group {group!r}{nearest(group, sizes)}")
        p = given.detach().to("cpu")
        if p.is_floating_point() or p.is_complex() or p.dtype == torch.bool:
            raise SymmetryError(f"permutation of group {group!r} must hold integers, not {p.dtype}")
        if tuple(p.shape) != (sizes[group],):
            raise SymmetryError(
                f"permutation of group {group!r} has shape {tuple(p.shape)}; expected ({sizes[group]},)"
            )
        identity = torch.arange(sizes[group])
        if not torch.equal(p.long().sort().values, identity):
            raise SymmetryError(f"permutation of group {group!r} is not one: each unit must occur once")
        if not torch.equal(p.long(), identity):
            moving[group] = p.long()
    return moving


def _by_tensor(spec: SymmetrySpec) -> dict[str, list[AxisRef]]:
    grouped: dict[str, list[AxisRef]] = {}
    for axis in spec.axes:
        grouped.setdefault(axis.tensor, []).append(axis)
    return grouped


def _permute_tensor(
    value: Tensor, name: str, axes: Iterable[AxisRef], indices: Mapping[Layout, Tensor | None]
) -> Tensor:
    for axis in axes:
        if axis.dim >= value.ndim or value.shape[axis.dim] != axis.size:
            raise SymmetryError(
                f"tensor {name!r} has shape {tuple(value.shape)}; axis {axis.dim} should be {axis.size}"
            )
        index = indices[axis.layout]
        if index is not None:
            value = value.detach().index_select(axis.dim, index.to(value.device))
    return value
