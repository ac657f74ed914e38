"""Stacked tensors of a list of modules (`Stack`).

Experts in such a list are then units of an axis, as in one tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dimat.symmetry.spec import Stack, SymmetrySpec


def read_stack(stack: Stack, weights: Mapping[str, Tensor]) -> Tensor:
    """Return the tensors of a stack as a new one."""
    return torch.stack([weights[name] for name in stack.sources])


def stacked(spec: SymmetrySpec) -> dict[str, Stack]:
    """Return the stack of each tensor that is in one."""
    return {name: stack for stack in spec.stacks for name in stack.sources}


def with_stacks(shapes: Mapping[str, tuple[int, ...]], stacks: Iterable[Stack]) -> dict[str, tuple[int, ...]]:
    """Return shapes of tensors, and of the stacks of some of them."""
    result = dict(shapes)
    for stack in stacks:
        if all(name in shapes for name in stack.sources):
            result[stack.tensor] = (len(stack.sources), *shapes[stack.sources[0]])
    return result


def real_names(spec: SymmetrySpec) -> dict[str, tuple[str, ...]]:
    """Return, for each stack, the names of its tensors."""
    return {stack.tensor: stack.sources for stack in spec.stacks}
