"""The share of a model's parameters that moves, and the reasons that keep the rest in place.

It counts pairs of an entry and one of its tensor's axes: a matrix with one moving axis is half moved. It leaves out
pairs that no symmetry could move: along inputs and outputs, positions, vocabularies, and axes of size 1.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from math import prod

from dimat.symmetry.atoms import SINGLE
from dimat.symmetry.spec import AxisRef, FrozenAxis, Layout, SymmetrySpec

LARGE = 0.1
"""The share above which a reason causes a warning."""

_BY_NATURE = (
    *("model input", "position in a kernel", "spatial axis", "looked up by index", SINGLE),
    "unused in trace",
)
"""Prefixes of the reasons for which no symmetry could move an axis."""


def by_nature(reason: str) -> bool:
    """Tell whether an axis frozen for this reason could not move in any model of its kind."""
    return reason.startswith(_BY_NATURE)


def moved_entries(layout: Layout, groups: Collection[str]) -> int:
    """Return the number of entries of an axis that some of these groups move."""
    moved = 0
    for segment in layout:
        size = prod(factor.size for factor in segment)
        if any(factor.group in groups for factor in segment):
            moved += size
        else:
            inner = [size // f.size * moved_entries(f.parts, groups) for f in segment if f.parts is not None]
            moved += max(inner, default=0)
    return moved


def coverage_of(spec: SymmetrySpec, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Return the share of the parameters of these shapes, entry by entry and axis by axis, that moves."""
    groups = {group.id for group in spec.groups}
    moved = sum(_weighed(shapes, axis, moved_entries(axis.layout, groups)) for axis in spec.axes)
    stay = sum(_weighed(shapes, axis, axis.entries) for axis in spec.frozen)
    return moved / (moved + stay) if moved else 0.0


def costs(
    spec: SymmetrySpec, shapes: Mapping[str, tuple[int, ...]], told: Collection[str] = ()
) -> list[tuple[str, float, list[FrozenAxis]]]:
    """Return the reasons that keep more than a tenth in place, with their shares and axes, the largest first.

    `told`: graph nodes whose reasons are reported elsewhere.
    """
    by_reason: dict[str, list[FrozenAxis]] = {}
    for axis in spec.frozen:
        if axis.entries and axis.tensor in shapes and axis.node not in told:
            by_reason.setdefault(axis.reason, []).append(axis)
    groups = {group.id for group in spec.groups}
    total = sum(_weighed(shapes, axis, moved_entries(axis.layout, groups)) for axis in spec.axes)
    total += sum(_weighed(shapes, axis, axis.entries) for axis in spec.frozen)
    shares = [(why, _sum(shapes, axes) / total, axes) for why, axes in by_reason.items()]
    return sorted((row for row in shares if row[1] > LARGE), key=lambda row: -row[1])


def _sum(shapes: Mapping[str, tuple[int, ...]], axes: Iterable[FrozenAxis]) -> float:
    return sum(_weighed(shapes, axis, axis.entries) for axis in axes)


def _weighed(shapes: Mapping[str, tuple[int, ...]], axis: AxisRef | FrozenAxis, entries: int) -> float:
    """Return the number of entries of a parameter at some indices of one of its axes; 0 for other tensors."""
    shape = shapes.get(axis.tensor, ())
    return entries * prod(shape) / shape[axis.dim] if axis.dim < len(shape) and shape[axis.dim] > 1 else 0.0
