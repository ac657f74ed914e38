"""Groups of experts in a list of modules, like those of experts in one tensor.

A loop over modules makes nodes for each, and nothing in the graph says that the modules are alike. So a list is guessed
to hold experts if it has the size of some axis that chooses by number, and all of its modules have the same tensors
with the same axes; the guess is tested like that for experts in one tensor (`dimat.symmetry.experts`). In the spec, a
list's tensors are a `Stack`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from dimat.symmetry.experts import exchangeable, router
from dimat.symmetry.spec import AxisRef, Factor, Group, Layout, Stack, SymmetrySpec

_List = Mapping[str, tuple[str, ...]]
"""The tensors of a list of modules: by their name with `*` for the number, those of all modules in order."""


def with_lists(
    model: nn.Module, spec: SymmetrySpec, example_inputs: Any, shapes: Mapping[str, tuple[int, ...]]
) -> SymmetrySpec:
    """Return the spec with those lists of modules as groups that are proven to be exchangeable experts.

    `shapes`: of all parameters and buffers. The spec itself is returned where there are none.
    """
    found = list(_lists(model, spec))
    # side by side, as one list for each matrix of the experts; then one list that stands beside another
    together = [{name: listed for each in lists for name, listed in each.items()} for lists in found]
    spec = _proven(model, spec, example_inputs, shapes, together)
    return _proven(model, spec, example_inputs, shapes, [listed for lists in found if lists[1:] for listed in lists])


def _proven(
    model: nn.Module, spec: SymmetrySpec, inputs: Any, shapes: Mapping[str, tuple[int, ...]], supposed: Sequence[_List]
) -> SymmetrySpec:
    """Return the spec with these lists as groups: all of them if they are experts, else recursively those of each
    half."""
    moved, groups = spec, list[str]()
    for listed in supposed:
        taken = {name for stack in moved.stacks for name in stack.sources}
        if taken.isdisjoint(name for names in listed.values() for name in names):
            stacked = _Stacking(moved, listed, shapes).spec()
            if stacked is not None:
                moved = stacked
                groups.append(_id(listed))
    if not groups or exchangeable(model, moved, inputs, groups):
        return moved
    if len(groups) == 1:
        return spec
    half = len(supposed) // 2
    for part in (supposed[:half], supposed[half:]):
        spec = _proven(model, spec, inputs, shapes, part)
    return spec


def _lists(model: nn.Module, spec: SymmetrySpec) -> Iterator[list[_List]]:
    """Yield lists of modules that all have tensors of the same names, shapes and types; those side by side together."""
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    tied = {name for names in spec.tied for name in names}
    members: dict[tuple[str, ...], dict[int, dict[tuple[str, ...], str]]] = {}
    for name in state:
        words = tuple(name.split("."))
        for place, word in enumerate(words):
            if word.isdecimal():
                members.setdefault(words[:place], {}).setdefault(int(word), {})[words[place + 1 :]] = name
    found: dict[tuple[tuple[str, ...], int], list[_List]] = {}
    for before, modules in members.items():
        first, *others = (modules[number] for number in sorted(modules))
        alike = bool(others) and all(
            other.keys() == first.keys() and all(_alike(state[first[end]], state[other[end]]) for end in first)
            for other in others
        )
        if not alike or not tied.isdisjoint(name for module in (first, *others) for name in module.values()):
            continue
        listed = {
            ".".join((*before, "*", *end)): (first[end], *(other[end] for other in others)) for end in sorted(first)
        }
        found.setdefault((before[:-1], len(modules)), []).append(listed)
    yield from found.values()


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def _id(listed: _List) -> str:
    return f"{min(listed)}/0"


class _Unlike(Exception):
    """The modules of a list do not have the same axes."""


@dataclass
class _Stacking:
    """Stacks the tensors of a list in a spec. `_inner`: for groups that every module has, by the first module's: the id
    of the new group, and all modules' ids."""

    whole: SymmetrySpec
    listed: _List
    shapes: Mapping[str, tuple[int, ...]]
    _inner: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])

    def spec(self) -> SymmetrySpec | None:
        """Return the spec with the list's modules as units of a group, or None if they cannot be."""
        spec, group = self.whole, _id(self.listed)
        count = len(next(iter(self.listed.values())))
        place = Group(group, count, tuple((name, 0) for names in self.listed.values() for name in names))
        if not self._choosing(place, 1):
            return None
        axes = {(axis.tensor, axis.dim): axis for axis in spec.axes}
        held = {name: (view, number) for view, names in self.listed.items() for number, name in enumerate(names)}
        stacked: list[AxisRef] = []
        try:
            for view, names in self.listed.items():
                stacked.append(AxisRef(view, 0, ((Factor(count, group),),)))
                for dim in range(len(self.shapes.get(names[0], ()))):
                    found = [axes.pop((name, dim), None) for name in names]
                    there = [axis.layout for axis in found if axis is not None]
                    if there:
                        stacked.append(AxisRef(view, dim + 1, self._layout(there, count)))
            children = [self._child(names, group, held) for names in [*self._inner.values()]]
        except _Unlike:
            return None
        places = tuple((view, 0) for view in self.listed)
        choosing = self._choosing(place, max((child.size for child in children), default=1))
        if not choosing:
            return None
        axes.update({chosen: AxisRef(*chosen, ((Factor(count, group),),)) for chosen in choosing})
        inner = {name for names in self._inner.values() for name in names}
        others = [replace(g, axes=self._moved(g.axes, held)) for g in spec.groups if g.id not in inner]
        return replace(
            spec,
            groups=(*others, *children, Group(group, count, (*places, *choosing), method="weight")),
            axes=tuple(sorted((*axes.values(), *stacked), key=lambda axis: (axis.tensor, axis.dim))),
            numbered=tuple(replace(g, axes=self._moved(g.axes, held)) for g in spec.numbered),
            frozen=tuple(axis for axis in spec.frozen if (axis.tensor, axis.dim) not in choosing),
            stacks=(*spec.stacks, *(Stack(view, names) for view, names in self.listed.items())),
        )

    def _choosing(self, place: Group, units: int) -> tuple[tuple[str, int], ...]:
        """Return the router's axes, for a list with `inside` units in each of its modules."""
        for singly in (False, True):
            found = router(self.whole, place, self.shapes, units, singly=singly)
            if found:
                return found
        return ()

    def _layout(self, layouts: Sequence[Layout], count: int) -> Layout:
        """Return the layout of an axis in all modules; _Unlike if they differ."""
        if len(layouts) != count or len({tuple(map(len, layout)) for layout in layouts}) > 1:
            raise _Unlike
        return tuple(
            tuple(self._factor(factors, count) for factors in zip(*segments, strict=True))
            for segments in zip(*layouts, strict=True)
        )

    def _factor(self, factors: Sequence[Factor], count: int) -> Factor:
        first = factors[0]
        if any(factor.size != first.size or (factor.parts is None) != (first.parts is None) for factor in factors):
            raise _Unlike
        if first.parts is not None:
            return replace(first, parts=self._layout([f.parts for f in factors if f.parts is not None], count))
        return replace(first, group=self._group([factor.group for factor in factors]))

    def _group(self, names: Sequence[str | None]) -> str | None:
        """Return the group that all modules share, or the one that replaces their groups."""
        first = names[0]
        if first is None or all(name == first for name in names):
            if any(name != first for name in names) or first in self._inner:
                raise _Unlike
            return first
        known = tuple(name for name in names if name is not None)
        if len({*known}) != len(names) or self._inner.setdefault(first, known) != known:
            raise _Unlike
        if any(number and name in self._inner for number, name in enumerate(known)):
            raise _Unlike
        return self._name(first)

    def _name(self, group: str) -> str:
        """Return the id of the group that replaces the first module's and those of the others."""
        for view, names in self.listed.items():
            tensor, _, place = group.rpartition("/")
            if tensor == names[0]:
                dim = place.split("+")[0].split(".")[0]
                return f"{view}/{int(dim) + 1}{place.removeprefix(dim)}"
        raise _Unlike

    def _child(self, names: Sequence[str], group: str, held: Mapping[str, tuple[str, int]]) -> Group:
        """Return the group, inside the list's group, that replaces groups of its modules."""
        known = {g.id: g for g in self.whole.groups}
        if any(name not in known for name in names):
            raise _Unlike  # it never moves, and its parents are not known
        ours = [known[name] for name in names]
        for number, one in enumerate(ours):
            if any(held.get(tensor, ("", -1))[1] != number for tensor, _ in one.axes):
                raise _Unlike
        above = [self._group(parents) for parents in zip(*(one.parents for one in ours), strict=False)]
        if len({len(one.parents) for one in ours}) > 1:
            raise _Unlike
        parents = (group, *(parent for parent in above if parent is not None))
        return Group(self._name(names[0]), ours[0].size, self._moved(ours[0].axes, held), parents, method="weight")

    @staticmethod
    def _moved(axes: Sequence[tuple[str, int]], held: Mapping[str, tuple[str, int]]) -> tuple[tuple[str, int], ...]:
        """Return axes, with those of the list's tensors as axes of its stacks."""
        found = [(held[name][0], dim + 1) if name in held else (name, dim) for name, dim in axes]
        return tuple(dict.fromkeys(found))
