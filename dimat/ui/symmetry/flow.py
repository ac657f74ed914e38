"""A traced graph reduced to a readable size: a box per module with tensors, and per join.

Operations without tensors of their own (activations, views, pooling) vanish into the edges.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from dimat.symmetry import Trace

_MOST_USES = 3
"""A module that is used again further down gets a new box each time, up to this number; then edges go back."""


_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float)
"""Operations on a tensor's shape: no data flows there, and edges from it would lead everywhere."""


@dataclass
class Box:
    """`title`: a module's path, an input's or output's name, or an operation. `tensors`: names, in order of use."""

    title: str
    kind: str
    tensors: list[str] = field(default_factory=list)


@dataclass
class Flow:
    """Boxes in an order of the data flow, and edges (from, to); edges that go back are in `back`."""

    boxes: list[Box] = field(default_factory=list)
    edges: dict[tuple[int, int], None] = field(default_factory=dict)
    back: dict[tuple[int, int], None] = field(default_factory=dict)

    def layers(self) -> list[int]:
        """Return the length of the longest path from an input to each box."""
        result: list[int] = []
        before: dict[int, list[int]] = {}
        for start, end in self.edges:
            before.setdefault(end, []).append(start)
        for number in range(len(self.boxes)):
            result.append(1 + max((result[start] for start in before.get(number, ())), default=-1))
        return result

    def add(self, title: str, kind: str) -> int:
        self.boxes.append(Box(title, kind))
        return len(self.boxes) - 1

    def link(self, starts: Iterable[int], end: int) -> None:
        for start in sorted(starts):
            if start < end:
                self.edges[start, end] = None
            elif start > end:
                self.back[start, end] = None


def loose(tensors: Iterable[str]) -> Flow:
    """Return boxes without edges, for a model without a graph."""
    flow = Flow()
    known: dict[str, int] = {}
    for name in tensors:
        owner = name.rpartition(".")[0]
        if owner not in known:
            known[owner] = flow.add(owner or "(model)", "module")
        flow.boxes[known[owner]].tensors.append(name)
    return flow


def flow_of(traced: Trace) -> Flow:
    """Return the boxes and edges of a traced module (of its first path, if it was traced by running it)."""
    flow = Flow()
    carried: dict[Node, set[str]] = {}
    origin: dict[Node, int] = {}
    uses: dict[str, list[int]] = {}
    for node in traced.nodes:
        source = traced.sources.get(node.name) if node.op == "placeholder" else None
        if source is not None and source.kind in ("parameter", "buffer"):
            carried[node] = {traced.canonical(source.name)}
            continue
        if source is not None and source.kind == "input":
            if node.users:
                origin[node] = flow.add(source.name, "input")
            continue
        if node.op == "output" or isinstance(node.meta.get("val"), _NUMBERS):
            continue
        given = node.all_input_nodes
        tensors = sorted(set[str]().union(*(carried.get(each, set()) for each in given)))
        starts = {origin[each] for each in given if each in origin}
        if not starts and not tensors:
            continue
        if not starts:
            carried[node] = set(tensors)
        elif tensors:
            origin[node] = _module(flow, uses, tensors, starts)
        elif len(starts) == 1:
            (origin[node],) = starts
        else:
            origin[node] = flow.add(str(node.target).removeprefix("aten.").partition(".")[0], "join")
            flow.link(starts, origin[node])
    for name, node in traced.outputs:
        if node is not None and (node in origin or node in carried):
            end = flow.add(name, "output")
            flow.boxes[end].tensors = sorted(carried.get(node, ()))
            flow.link({origin[node]} if node in origin else (), end)
    return flow


def _module(flow: Flow, uses: dict[str, list[int]], tensors: list[str], starts: set[int]) -> int:
    """Return the box of the module that owns the tensors, a new one if it would come before its inputs."""
    owner = tensors[0].rpartition(".")[0]
    known = uses.setdefault(owner, [])
    box = known[-1] if known else None
    if box is None or (any(start > box for start in starts) and len(known) < _MOST_USES):
        again = f" ({len(known) + 1})" if known else ""
        box = flow.add((owner or "(model)") + again, "module")
        known.append(box)
    mine = flow.boxes[box].tensors
    mine.extend(name for name in tensors if name not in mine)
    flow.link(starts, box)
    return box
