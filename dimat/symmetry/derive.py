"""From a module to its `SymmetrySpec`: trace, interpret, name groups and observation points."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from blake3 import blake3
from torch import nn

from dimat.errors import SymmetryError
from dimat.symmetry.atoms import Atom, Frozen, Layout, segment_size
from dimat.symmetry.coverage import by_nature, costs, coverage_of
from dimat.symmetry.experts import with_experts
from dimat.symmetry.interpret import DEPENDS, Analysis, interpret
from dimat.symmetry.lists import with_lists
from dimat.symmetry.order_free import order_dependent
from dimat.symmetry.points import find_points
from dimat.symmetry.spec import (
    AxisRef,
    Factor,
    FrozenAxis,
    Group,
    ObservationPoint,
    SymmetrySpec,
    UnknownOp,
    groups_in,
    with_hash,
)
from dimat.symmetry.spec import Layout as SpecLayout
from dimat.symmetry.stacks import with_stacks
from dimat.symmetry.trace import SymmetryWarning, Trace, location_of, trace
from dimat.symmetry.wreath import Parents, find_parents

POINTS_PER_GROUP = 6
"""The number of observation points that a spec lists for each group."""


def derive_symmetry(model: nn.Module, example_inputs: Any, outputs: Sequence[int | str] | None = None) -> SymmetrySpec:
    """Derive which axes of a module's parameters and buffers can be permuted together.

    `example_inputs` is a tensor, a tuple of positional arguments, or a mapping of keyword arguments; only
    shapes and dtypes matter. `outputs` selects the outputs that must not change, by flat index or by name
    (`"logits"`, `"hidden.0"`, or `"hidden"` for all under it); all by default. The module is traced in eval
    mode and left as it was.

    A module that cannot be traced gets a spec without groups (`trace_kind` "none") and a `SymmetryWarning`;
    an operation without a transfer rule freezes what it touches, with a `SymmetryWarning`.
    Raises SymmetryError if `outputs` names no output.
    """
    try:
        traced = trace(model, example_inputs)
    except SymmetryError as error:
        message = f"SYM-E01 cannot trace: {error}; averaging without alignment"
        warnings.warn(message, SymmetryWarning, stacklevel=2)
        return _untraced(model, message)
    spec, loud = describe(traced, traced.select_outputs(outputs), all_outputs=outputs is None)
    spec, loud = exchange_experts(model, traced, example_inputs, spec, loud)
    for message in loud:
        warnings.warn(message, SymmetryWarning, stacklevel=2)
    return spec


def observation_points(
    model: nn.Module, example_inputs: Any, outputs: Sequence[int | str] | None = None
) -> dict[str, tuple[ObservationPoint, ...]]:
    """Return every observation point of every group, in graph order, including those that the spec leaves out."""
    traced = trace(model, example_inputs)
    spec, _ = describe(traced, traced.select_outputs(outputs), most_points=None)
    return {group.id: group.points for group in spec.groups}


def describe(
    traced: Trace,
    outputs: tuple[int, ...],
    *,
    all_outputs: bool = False,
    most_points: int | None = POINTS_PER_GROUP,
    hidden: Collection[str] = (),
) -> tuple[SymmetrySpec, list[str]]:
    """Return the spec of a traced module, and those of its warnings that should be raised as such.

    No group is observed at the nodes named in `hidden`.
    """
    analysis = interpret(traced, outputs)
    unused = [name for name in analysis.tensors if name not in analysis.used]
    for name in unused:
        for layout in analysis.tensors[name].dims:
            analysis.domain.freeze(layout, Frozen("unused in trace"))
    layouts = _resolved(analysis)
    occurrences = _occurrences(analysis, layouts)
    parents = _parents(analysis, occurrences)
    still = {above for listed in parents.values() for above in listed if above.frozen}
    occurrences = {atom: places for atom, places in occurrences.items() if atom in parents or atom in still}
    names = _named(occurrences)
    group_of = {atom: name for atom, name in names.items() if atom not in still}
    # a path that was run holds the sizes of its inputs, and other inputs take other paths: nothing is observed there,
    # nor where the graph enters `vmap`, which cannot be run node by node
    mapped = any("_add_batch_dim" in str(node.target) for node in traced.nodes)
    nodes = traced.nodes if traced.kind == "export" and not mapped else []
    points = find_points(nodes, analysis, names, parents, most_points, hidden)
    watched = set(points) | {names[above] for atom in group_of if group_of[atom] in points for above in parents[atom]}

    def group(atom: Atom) -> Group:
        return Group(
            id=names[atom],
            size=atom.size,
            axes=tuple(dict.fromkeys((place.tensor, place.dim) for place in occurrences[atom])),
            parents=tuple(names[above] for above in parents.get(atom, ())),
            points=points.get(names[atom], ()),
            method="activation" if names[atom] in watched else "weight",
        )

    groups = tuple(map(group, group_of))
    axes = _axes(analysis, layouts, names, {name: {names[a] for a in parents[atom]} for atom, name in group_of.items()})
    shapes = {name: traced.shapes[name] for name in _parameters(traced)}
    kept = outputs[:1] if all_outputs else outputs
    frozen = _frozen(analysis, layouts, {f"model output '{traced.outputs[number][0]}'" for number in kept})
    unknown, loud = _unknown(analysis, frozen, {name: prod(shape) for name, shape in shapes.items()})
    if all_outputs:
        loud.extend(_pinning(traced, frozen))
    quiet = _unseen(groups)
    quiet += [f"SYM-W06 parameter {name} unused in trace; left unpermuted" for name in unused if name in shapes]
    spec = SymmetrySpec(
        groups=groups,
        axes=axes,
        frozen=frozen,
        unknown_ops=unknown,
        tied=traced.tied,
        trace_kind=traced.kind,
        outputs=outputs,
        numbered=tuple(group(atom) for atom in names if atom in still),
    )
    loud.extend(_costly(spec, shapes))
    spec = replace(spec, coverage=coverage_of(spec, shapes), warnings=(*loud, *quiet))
    return with_hash(spec, traced.digest), loud


def exchange_experts(
    model: nn.Module, traced: Trace, example_inputs: Any, spec: SymmetrySpec, loud: list[str]
) -> tuple[SymmetrySpec, list[str]]:
    """Return the result of `describe` for a traced module, with groups for experts that are proven to be exchangeable.

    Other groups are observed only where the order of experts does not matter.
    """
    moved = with_experts(model, spec, example_inputs, traced.shapes)
    moved = with_lists(model, moved, example_inputs, traced.shapes)
    if moved is spec:
        return spec, loud
    experts = {group.id for group in moved.groups} - {group.id for group in spec.groups}
    experts = {group.id for group in moved.groups if group.id in experts and not experts & {*group.parents}}
    hidden = order_dependent(model, traced, moved, example_inputs, experts)
    seen = {group.id: group for group in describe(traced, spec.outputs, hidden=hidden)[0].groups}
    outside = [group.id for group in moved.groups if not experts & {group.id, *group.parents}]
    moved = replace(
        moved,
        groups=tuple(
            replace(group, points=seen[group.id].points, method=seen[group.id].method) if group.id in outside else group
            for group in moved.groups
        ),
    )
    shapes = with_stacks({name: traced.shapes[name] for name in _parameters(traced)}, moved.stacks)
    quiet = [message for message in spec.warnings[len(loud) :] if not message.startswith(_UNSEEN)]
    quiet = [*_unseen(moved.groups), *quiet]
    loud = [message for message in loud if not message.startswith(_COSTLY)] + _costly(moved, shapes)
    moved = replace(moved, coverage=coverage_of(moved, shapes), warnings=(*loud, *quiet))
    return with_hash(moved, traced.digest), loud


def fits(spec: SymmetrySpec, traced: Trace) -> bool:
    """Tell whether a spec was derived from this architecture, traced in this way."""
    return spec.arch_hash == with_hash(spec, traced.digest).arch_hash


_Layouts = Mapping[tuple[str, int], Layout]


@dataclass(frozen=True, slots=True)
class _Place:
    """An occurrence of an atom: entries of an axis from `offset` on, as factor `position` of a product.

    Inside a nested factor, positions continue from that of the factor.
    """

    tensor: str
    dim: int
    offset: int
    position: int


def _resolved(analysis: Analysis) -> dict[tuple[str, int], Layout]:
    return {
        (name, dim): analysis.domain.resolve(layout)
        for name, value in sorted(analysis.tensors.items())
        for dim, layout in enumerate(value.dims)
    }


def _occurrences(analysis: Analysis, layouts: _Layouts) -> dict[Atom, list[_Place]]:
    """Return the occurrences of each atom, frozen ones as in `Domain.identity`, ordered by the smallest."""
    found: dict[Atom, list[_Place]] = {}

    def look(layout: Layout, tensor: str, dim: int, offset: int, above: int) -> None:
        for segment in analysis.domain.resolve(layout):
            for position, atom in enumerate(segment, above):
                if atom.parts is not None:
                    look(atom.parts, tensor, dim, offset, position)
                else:
                    known = analysis.domain.identity(atom)
                    found.setdefault(known, []).append(_Place(tensor, dim, offset, position))
            offset += segment_size(segment)

    for (tensor, dim), layout in layouts.items():
        look(layout, tensor, dim, 0, 0)
    return found


def _named(occurrences: Mapping[Atom, Sequence[_Place]]) -> dict[Atom, str]:
    names: dict[Atom, str] = {}
    for atom, (first, *_) in occurrences.items():
        offset = f"+{first.offset}" if first.offset else ""
        names[atom] = f"{first.tensor}/{first.dim}{offset}" + (f".{first.position}" if first.position else "")
    return names


def _parents(analysis: Analysis, occurrences: Mapping[Atom, Sequence[_Place]]) -> Parents:
    def depth(atom: Atom) -> int:
        return max(place.position for place in occurrences[atom])

    moving = sorted((atom for atom in occurrences if atom.frozen is None), key=depth)
    numbered = [atom for atom in occurrences if atom.frozen]
    return find_parents(analysis.domain, analysis.all_values(), moving, numbered)


def _axes(
    analysis: Analysis, layouts: _Layouts, names: Mapping[Atom, str], parents: Mapping[str, set[str]]
) -> tuple[AxisRef, ...]:
    """Return the axes that move, and those whose numbers tell which permutation moves another of the same tensor."""
    found: dict[str, list[AxisRef]] = {}
    for (tensor, dim), layout in layouts.items():
        axis = AxisRef(tensor, dim, _spec_layout(analysis, layout, names))
        if groups_in(axis.layout):
            found.setdefault(tensor, []).append(axis)
    kept: list[AxisRef] = []
    for axes in found.values():
        moving = {name for axis in axes for name in groups_in(axis.layout) & parents.keys()}
        needed = moving.union(*(parents[name] for name in moving))
        kept += [axis for axis in axes if groups_in(axis.layout) & needed]
    return tuple(kept)


def _spec_layout(analysis: Analysis, layout: Layout, group_of: Mapping[Atom, str]) -> SpecLayout:
    def factor(atom: Atom) -> Factor:
        if atom.parts is None:
            return Factor(atom.size, group_of.get(analysis.domain.identity(atom)))
        return Factor(atom.size, None, _spec_layout(analysis, analysis.domain.resolve(atom.parts), group_of))

    return tuple(tuple(factor(atom) for atom in segment) or (Factor(1),) for segment in layout)


def _frozen(analysis: Analysis, layouts: _Layouts, outputs: Collection[str]) -> tuple[FrozenAxis, ...]:
    found: dict[tuple[str, int, Frozen], int] = {}

    def look(layout: Layout, tensor: str, dim: int, copies: int) -> None:
        for segment in analysis.domain.resolve(layout):
            size = copies * segment_size(segment)
            moves = any(atom.parts is None and atom.frozen is None for atom in segment)
            for atom in segment:
                if atom.parts is not None:
                    look(atom.parts, tensor, dim, 0 if moves else size // atom.size)
                elif atom.frozen is not None:
                    why = atom.frozen.reason
                    place = (tensor, dim, atom.frozen)
                    stay = 0 if moves or why in outputs or by_nature(why) else size
                    found[place] = found.get(place, 0) + stay
                    moves = True  # one reason is enough

    for (tensor, dim), layout in layouts.items():
        look(layout, tensor, dim, 1)
    return tuple(FrozenAxis(tensor, dim, why.reason, why.node, n) for (tensor, dim, why), n in found.items())


def _parameters(traced: Trace) -> list[str]:
    kinds = (source for source in traced.sources.values() if source.kind == "parameter")
    return sorted({traced.canonical(source.name) for source in kinds})


def _unknown(
    analysis: Analysis, frozen_axes: Sequence[FrozenAxis], sizes: Mapping[str, int]
) -> tuple[tuple[UnknownOp, ...], list[str]]:
    """Return the unknown operations, and one warning for each kind of them; all that follow from a data-dependent size
    are one kind."""
    blamed: dict[str, set[tuple[str, int]]] = {}
    for frozen in frozen_axes:
        blamed.setdefault(frozen.node, set()).add((frozen.tensor, frozen.dim))
    total = max(sum(sizes.values()), 1)
    listed: list[UnknownOp] = []
    first: dict[str, UnknownOp] = {}
    reasons: dict[str, str] = {}
    touched: dict[str, set[tuple[str, int]]] = {}

    def share_of(axes: set[tuple[str, int]]) -> float:
        return sum(sizes[name] for name in {name for name, _ in axes}) / total

    for node, (op, reason) in analysis.unknown.items():
        axes = {axis for axis in blamed.get(node.name, set()) if axis[0] in sizes}
        listed.append(UnknownOp(op, node.name, location_of(node), share_of(axes)))
        kind = DEPENDS if DEPENDS in reason else op
        first.setdefault(kind, listed[-1])
        reasons.setdefault(kind, reason)
        touched.setdefault(kind, set()).update(axes)
    messages = [
        f"SYM-W02 {_cause(kind, first[kind].op, reasons[kind])} at {first[kind].location}; froze {len(axes)} axes "
        f"({100 * share_of(axes):.1f} % of parameters); {_ADVICE if kind == DEPENDS else 'see register_rule'}"
        for kind, axes in touched.items()
    ]
    return tuple(listed), messages


def _cause(kind: str, op: str, reason: str) -> str:
    """Return the reason why an operation freezes, with its rule's message if it has a rule."""
    if kind == DEPENDS:
        return f"a shape depends on data from {op} on,"
    said = reason.partition(f"no rule for {op}: ")[2]
    return f"no rule for {op}" + f" ({said})" * bool(said)


_ADVICE = "the graph could not be run on the example inputs to determine it"


_COSTLY = "SYM-W08"
_UNSEEN = "SYM-W04"


def _unseen(groups: Sequence[Group]) -> list[str]:
    """Return a warning for every group that is matched by weights, as it cannot be observed."""
    unseen = [group.id for group in groups if group.method == "weight"]
    return [f"{_UNSEEN} no observation point for {name}; weight matching" for name in unseen]


def _costly(spec: SymmetrySpec, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return a warning for every known reason that keeps much in place, except those reported elsewhere."""
    told = {op.node for op in spec.unknown_ops}
    told |= {axis.node for axis in spec.frozen if axis.reason.startswith("model output")}
    messages: list[str] = []
    for reason, share, axes in costs(spec, shapes, told):
        more = f" and {len(axes) - 1} more" if len(axes) > 1 else ""
        messages.append(
            f"{_COSTLY} {100 * share:.0f} % of the movable entries stay in place ({reason}): "
            f"{axes[0].tensor}/{axes[0].dim}{more}"
        )
    return messages


def _pinning(traced: Trace, frozen: Sequence[FrozenAxis]) -> list[str]:
    """Return a warning for every output after the first that keeps axes in place."""
    messages: list[str] = []
    for name, _ in traced.outputs[1:]:
        pinned = [f"{axis.tensor}/{axis.dim}" for axis in frozen if axis.reason == f"model output '{name}'"]
        if pinned:
            more = f" and {len(pinned) - 3} more" if len(pinned) > 3 else ""
            messages.append(f"SYM-W05 output '{name}' pins {', '.join(pinned[:3])}{more}; pass outputs=")
    return messages


def _untraced(model: nn.Module, message: str) -> SymmetrySpec:
    state = model.state_dict()
    frozen = tuple(
        FrozenAxis(name, dim, "not traced")
        for name, value in sorted(state.items())
        for dim in range(getattr(value, "ndim", 0))
    )
    shapes = "\n".join(f"{name} {tuple(getattr(v, 'shape', ()))}" for name, v in sorted(state.items()))
    spec = SymmetrySpec((), (), frozen=frozen, trace_kind="none", warnings=(message,))
    return with_hash(spec, blake3(shapes.encode()).hexdigest())
