"""Finds each group's observation points: graph nodes whose outputs show the group's units.

Matching by activations uses them. A node shows a group if exactly one axis of its output, or a run of that axis,
contains the group's units (and its parents' units) once and nothing else that any group moves, and if the output
depends on a model input.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import fx

from dimat.symmetry.atoms import Atom, Segment, segment_size
from dimat.symmetry.interpret import Analysis
from dimat.symmetry.rules import Value, find_rule, join, pointwise, recurrent, reduce, shape, spatial
from dimat.symmetry.rules.call import op_name
from dimat.symmetry.spec import ObservationPoint
from dimat.symmetry.trace import shape_of
from dimat.symmetry.wreath import Parents

_LINEAR = {"add", "sub", "rsub", "mul", "div", "neg", "copy", "where", "masked_fill", "fill", "addcmul", "lerp"}
_BENT = {"softmax", "log_softmax", "_softmax", "_log_softmax", "glu", "prelu"}


_COPYING = {module.__name__ for module in (join, shape, spatial)}
"""Modules with the rules of operations that move or copy values, or blend neighbouring ones."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """An observation point, and whether its node is a non-linearity (`bends`) or copies or averages (`repeats`)."""

    point: ObservationPoint
    bends: bool
    repeats: bool


def find_points(
    nodes: Sequence[fx.Node],
    analysis: Analysis,
    group_of: Mapping[Atom, str],
    parents: Parents,
    most: int | None,
    hidden: Collection[str] = (),
) -> dict[str, tuple[ObservationPoint, ...]]:
    """Return the observation points of every group, in graph order; at most `most` per group (None: all).

    `group_of` maps the atoms of `parents`, also the frozen ones among them, to their groups. Nodes that only view, copy
    or summarise the values at another point (averages over positions, pooling to a single position, resizing,
    concatenation) are left out, unless a group has no others or `most` is None. If more than `most` points remain, the
    outputs of non-linearities near the end are preferred. Nodes named in `hidden` count for none.
    """
    seen: dict[str, list[_Seen]] = {}
    for node in nodes:
        value = analysis.values.get(node)
        if node not in analysis.from_input or not isinstance(value, Value):
            continue
        bends, repeats = _bends(node), _repeats(node)
        for group, point in _points_of(node, value, analysis, group_of, parents).items():
            seen.setdefault(group, []).append(_Seen(point, bends, repeats))
    shown = {group: [s for s in _mark(found) if s.point.node not in hidden] for group, found in seen.items()}
    return {group: _choose(found, most) for group, found in shown.items() if found}


def _points_of(
    node: fx.Node, value: Value, analysis: Analysis, group_of: Mapping[Atom, str], parents: Parents
) -> dict[str, ObservationPoint]:
    made = node.meta.get("val")
    if not isinstance(made, torch.Tensor) or not made.is_floating_point():
        return {}
    layouts = [analysis.domain.resolve(layout) for layout in value.dims]
    moving = [any(atom in parents for atom in analysis.domain.leaves(layout)) for layout in layouts]
    if moving.count(True) != 1 or any(analysis.domain.cases_of(layout) for layout in layouts):
        return {}
    dim = moving.index(True)
    if isinstance(made.shape[dim], torch.SymInt):  # pyright: ignore[reportUnnecessaryIsInstance]
        return {}  # the axis grows with the batch
    points: dict[str, ObservationPoint] = {}
    start = 0
    for segment in layouts[dim]:
        length = segment_size(segment)
        segment = tuple(map(analysis.domain.identity, segment))
        for position, atom in enumerate(segment):
            if atom in parents and group_of[atom] not in points and _shows(segment, atom, parents):
                factors = tuple(atom.size for atom in segment)
                outer = tuple(segment.index(above) for above in parents[atom])
                points[group_of[atom]] = ObservationPoint(node.name, dim, start, length, factors, position, outer=outer)
        start += length
    return points


def _shows(segment: Segment, atom: Atom, parents: Parents) -> bool:
    """Tell whether a product contains an atom and its parents once each, and nothing else that moves."""
    above = parents[atom]
    telling = [other for other in segment if other in parents or other in above or other.parts is not None]
    return len(telling) == 1 + len(above) and set(telling) == {atom, *above}


def _bends(node: fx.Node) -> bool:
    """Tell whether a node is a non-linearity."""
    if find_rule(_maker(node).target) in (recurrent.recurrent, recurrent.cell):
        return True
    name = op_name(node.target).split(".")[1].rstrip("_") if op_name(node.target) else ""
    return name in _BENT or (find_rule(node.target) is pointwise.pointwise and name not in _LINEAR)


def _maker(node: fx.Node) -> fx.Node:
    """Return the node of the operation that made a value, also where the value is one of several results."""
    while node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _repeats(node: fx.Node) -> bool:
    """Tell whether a node only repeats or summarises its input."""
    node = _maker(node)
    function = find_rule(node.target)
    if function is None:
        return False
    made = shape_of(node.meta.get("val"))
    if function is spatial.over_positions and "max_pool" in op_name(node.target):
        return made is not None and prod(made[2:]) == 1
    return function is reduce.reduction or function.__module__ in _COPYING or function is pointwise.identity


def _mark(found: Sequence[_Seen]) -> list[_Seen]:
    """Mark the points before the first non-linearity as pre-activations (all points if there is none)."""
    first = next((number for number, seen in enumerate(found) if seen.bends), len(found))
    marked: list[_Seen] = []
    for number, seen in enumerate(found):
        p = seen.point
        point = replace(p, pre_activation=number < first)
        marked.append(_Seen(point, seen.bends, seen.repeats))
    return marked


def _choose(found: Sequence[_Seen], most: int | None) -> tuple[ObservationPoint, ...]:
    if most is None:
        return tuple(seen.point for seen in found)
    kept = [seen for seen in found if not seen.repeats] or list(found[:1])
    if len(kept) > most:
        order = list(range(len(kept)))
        bent = [number for number in order if kept[number].bends]
        wanted = dict.fromkeys([order[-1], *bent[::-1][: most - 2], 0, *order[::-1]])
        kept = [kept[number] for number in sorted(list(wanted)[:most])]
    return tuple(seen.point for seen in kept)
