"""Contents of a traced module: origins of placeholders, tied names, and a hash."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from blake3 import blake3
from torch import fx
from torch.fx.node import map_arg


@dataclass(frozen=True, slots=True)
class Origin:
    """The tensor that a placeholder of the graph stands for; `name` is a state-dict name or an input's name."""

    kind: Literal["parameter", "buffer", "constant", "input"]
    name: str


def aliases(tensors: Mapping[str, torch.Tensor]) -> tuple[tuple[tuple[str, ...], ...], frozenset[str]]:
    """Return sets of names of the very same tensor, and names that share memory in any other way."""
    views: dict[Any, list[str]] = {}
    memories: dict[int, set[Any]] = {}
    for name, value in sorted(tensors.items()):
        if value.numel() == 0 or value.is_meta:
            continue
        view = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        views.setdefault(view, []).append(name)
        memories.setdefault(value.untyped_storage().data_ptr(), set()).add(view)
    tied = tuple(tuple(names) for names in views.values() if len(names) > 1)
    entangled: set[str] = set()
    for group in memories.values():
        spans = sorted((view[0], view[0] + _extent(view), view) for view in group)
        for (_, stop, one), (start, _, other) in pairwise(spans):
            if start < stop:
                entangled.update(views[one], views[other])
    return tied, frozenset(entangled)


def _extent(view: Any) -> int:
    _, shape, stride, dtype = view
    return (1 + sum((size - 1) * step for size, step in zip(shape, stride))) * dtype.itemsize


def digest_of(
    module: fx.GraphModule | None,
    sources: Mapping[str, Origin],
    constants: Mapping[str, torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    tied: tuple[tuple[str, ...], ...],
) -> str:
    """Hash the module's structure and its graph, without anything that changes with processes, batch sizes or
    weights."""
    digest = blake3()

    def add(*words: Any) -> None:
        digest.update("\x1f".join(map(str, words)).encode() + b"\x1e")

    for name, shape in sorted(shapes.items()):
        add(name, shape, dtypes[name])
    add(tied)
    number: dict[fx.Node, str] = {}
    label: Callable[[fx.Node], Any] = lambda node: f"%{number.get(node, node.name)}"  # noqa: E731
    for count, node in enumerate(module.graph.nodes if module else ()):
        number[node] = str(count)
        source = sources.get(node.name) if node.op == "placeholder" else None
        target = (source.kind, source.name) if source else ("output",) if node.op == "output" else (node.target,)
        given = f"{map_arg(node.args, label)} {map_arg(node.kwargs, label)}"
        add(node.op, *target, re.sub(r"device\(.*?\)", "device", given))
        part = getattr(module, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(part, fx.GraphModule):
            add(part.code)
    for name, value in sorted(constants.items()):
        add(name, tuple(value.shape), value.dtype)
    return digest.hexdigest()
