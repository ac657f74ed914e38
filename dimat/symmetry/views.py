"""Tensors that only a spec knows (`View`), and what they are made of.

Experts in a list of modules are units of no tensor's axis, and layers in one tensor that are taken out by number are no
units at all. With the former on top of each other, and the latter one by one, both are like any other tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dimat.symmetry.spec import SymmetrySpec, View


def part_name(name: str, dim: int, index: int) -> str:
    """Return the name of the part of a tensor at an index of one of its axes, as code has it: `w[:, 2]`."""
    return f"{name}[{', '.join([*[':'] * dim, str(index)])}]"


def read_view(view: View, weights: Mapping[str, Tensor]) -> Tensor:
    """Return the tensor that a view shows; of a stack a new one, of a part one that shares its memory."""
    if view.index is None:
        return torch.stack([weights[name] for name in view.sources])
    return weights[view.sources[0]].select(view.dim, view.index)


def views_behind(spec: SymmetrySpec) -> dict[str, list[View]]:
    """Return the views of each tensor that is seen through any, by all of its names: a stack, or all of its parts in
    order."""
    if not spec.views:
        return {}
    aliases = {name: names for names in spec.tied for name in names}
    found: dict[str, list[View]] = {}
    for view in spec.views:
        for source in view.sources:
            for name in aliases.get(source, (source,)):
                found.setdefault(name, []).append(view)
    return found


def with_views(shapes: Mapping[str, tuple[int, ...]], views: Iterable[View]) -> dict[str, tuple[int, ...]]:
    """Return shapes of tensors with those of the views of some of them."""
    result = dict(shapes)
    for view in views:
        if all(name in shapes for name in view.sources):
            shape = shapes[view.sources[0]]
            part = (*shape[: view.dim], *shape[view.dim + 1 :])
            result[view.tensor] = (len(view.sources), *shape) if view.index is None else part
    return result


def real_names(spec: SymmetrySpec) -> dict[str, tuple[str, ...]]:
    """Return, for each view, the names of the tensors that it is made of."""
    return {view.tensor: view.sources for view in spec.views}
