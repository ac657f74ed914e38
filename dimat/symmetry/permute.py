"""Permutes units in weights and buffers; draws and composes permutations.

Permutations are {group id: LongTensor of shape (size,)}, and merged unit j is old unit p[j]. A group with parents has a
permutation for each of their units, (parents' sizes…, size): of heads H and units D inside them, merged (h, j) is old
(p_H[h], p_D[h, j]). Groups that are left out are not moved. Tensors that nothing moves are returned unchanged, not
copied.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod

import torch
from torch import Tensor

from dimat.errors import SymmetryError, nearest
from dimat.symmetry.spec import AxisRef, Factor, Layout, Stack, SymmetrySpec, groups_in
from dimat.symmetry.stacks import real_names, stacked

Permutations = Mapping[str, Tensor]


def permute_weights(
    state_dict: Mapping[str, Tensor], spec: SymmetrySpec, permutations: Permutations, *, strict: bool = True
) -> dict[str, Tensor]:
    """Return a state dict, parameters and buffers, with its units permuted: W' = W.index_select(dim, p).

    The input is untouched. Names that the spec does not know pass through; names tied to one tensor get one result.
    With `strict=False`, tensors of the spec may be missing (e.g. statistics of parameters alone). Raises SymmetryError,
    naming it, for an unknown group, an invalid permutation or one of the wrong length, a missing tensor, or one whose
    size does not fit; and for lists of tensors that change places if only some of them are there.
    """
    moves = CheckedPermutations.of(spec, permutations)
    aliases = {name: names for names in spec.tied for name in names}
    axes_of, shown = by_tensor(spec), real_names(spec)
    result = dict(state_dict)
    for name, stack in stacked(spec).items():
        if name in state_dict:
            result[name] = permute_listed(state_dict, name, stack, axes_of, moves)
        elif strict:
            raise SymmetryError(f"tensor {name!r} is missing{nearest(name, state_dict)}")
    for tensor, axes in axes_of.items():
        if tensor in shown:
            continue
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
                done[key] = permute_tensor(value, name, axes, moves)
            result[name] = done[key]
    return result


def random_permutations(spec: SymmetrySpec, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw a permutation of every group, uniformly, from a CPU generator."""
    drawn: dict[str, Tensor] = {}
    for group in spec.groups:
        shape = shape_of(spec, group.id)
        rows = [torch.randperm(group.size, generator=generator) for _ in range(prod(shape[:-1]))]
        drawn[group.id] = torch.stack(rows).view(shape)
    return drawn


def shape_of(spec: SymmetrySpec, group: str) -> tuple[int, ...]:
    """Return the shape of a permutation of a group: (parents' sizes…, size)."""
    sizes = spec.sizes
    return (*(sizes[parent] for parent in spec.group(group).parents), sizes[group])


def identity(shape: Sequence[int]) -> Tensor:
    """Return the permutation, or one for each unit of its parents, that leaves all units where they are."""
    return torch.arange(shape[-1]).expand(*shape).clone()


def invert_permutations(permutations: Permutations, spec: SymmetrySpec) -> dict[str, Tensor]:
    """Return the permutations that undo these."""
    parents = {group.id: group.parents for group in spec.groups}
    undone: dict[str, Tensor] = {}
    for group in sorted(permutations, key=lambda group: len(parents[group])):
        inverse = torch.argsort(permutations[group], -1)
        # rows are numbered as parents are after their own permutation: back to before it
        for position, parent in enumerate(parents[group]):
            if parent in undone:
                inverse = _rows(inverse, position, undone[parent], parents, group, parent)
        undone[group] = inverse
    return undone


def compose_permutations(first: Permutations, then: Permutations, spec: SymmetrySpec) -> dict[str, Tensor]:
    """Return the permutations that act like `first`, and `then` on its result: r[j] = first[then[j]]."""
    parents = {group.id: group.parents for group in spec.groups}
    result: dict[str, Tensor] = {}
    for group in dict.fromkeys((*first, *then)):
        p, q = first.get(group), then.get(group)
        if p is not None:
            for position, parent in enumerate(parents[group]):
                if parent in then:
                    p = _rows(p, position, then[parent], parents, group, parent)
        result[group] = q if p is None else p if q is None else p.gather(-1, q.to(p.device))  # type: ignore[assignment]
    return result


def _rows(
    p: Tensor, position: int, order: Tensor, parents: Mapping[str, Sequence[str]], group: str, parent: str
) -> Tensor:
    """Return a child's permutations with the rows of one parent in another order."""
    above = [parents[group].index(other) for other in parents[parent]]
    return p.gather(position, _spread(order, [*above, position], p.shape))


def _spread(order: Tensor, positions: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return `order`, whose axes are at these positions of `shape`, expanded to all of it."""
    ascending = sorted(range(len(positions)), key=lambda i: positions[i])
    sizes = [1] * len(shape)
    for position in positions:
        sizes[position] = shape[position]
    return order.permute(ascending).reshape(sizes).expand(*shape)


def _joint_index(layouts: Sequence[Layout], permutations: Permutations, parents: Mapping[str, Sequence[str]]) -> Tensor:
    """Return the index (n,) for some axes of a tensor, flattened row-major to one of n entries."""
    total = prod(layout_length(layout) for layout in layouts)
    index = torch.arange(total)
    for combination in product(*(list(pieces(layout)) for layout in layouts)):
        factors: list[tuple[int, str | None]] = []
        places = torch.zeros((), dtype=torch.long)
        for axis, ((piece, own), layout) in enumerate(zip(combination, layouts)):
            factors.extend((axis, factor.group) for factor in piece)
            places = places.reshape(*places.shape, *(1 for _ in own.shape)) * layout_length(layout) + own
        index[places.flatten()] = _permuted(factors, places, permutations, parents).flatten()
    return index


def layout_length(layout: Layout) -> int:
    """Return the number of entries of an axis."""
    return sum(prod(factor.size for factor in segment) for segment in layout)


def pieces(layout: Layout) -> Generator[tuple[tuple[Factor, ...], Tensor]]:
    """Yield products of factors without nested ones, and the entries that they are, of shape (factors' sizes…)."""
    offset = 0
    for segment in layout:
        sizes = [factor.size for factor in segment]
        yield from _expanded(segment, torch.arange(offset, offset + prod(sizes)).view(sizes))
        offset += prod(sizes)


def _expanded(factors: tuple[Factor, ...], places: Tensor) -> Generator[tuple[tuple[Factor, ...], Tensor]]:
    nested = next((k for k, factor in enumerate(factors) if factor.parts is not None), None)
    if nested is None:
        yield factors, places
        return
    for inner, own in pieces(factors[nested].parts or ()):
        chosen = places.index_select(nested, own.flatten()).unflatten(nested, own.shape)
        yield from _expanded((*factors[:nested], *inner, *factors[nested + 1 :]), chosen)


def _permuted(
    factors: Sequence[tuple[int, str | None]],
    places: Tensor,
    permutations: Permutations,
    parents: Mapping[str, Sequence[str]],
) -> Tensor:
    """Return entries in their new order. `factors`: (axis, group) of each axis of `places`."""
    moving = [k for k, (_, group) in enumerate(factors) if group is not None and group in permutations]
    for k in sorted(moving, key=lambda k: len(parents.get(factors[k][1] or "", ()))):
        axis, group = factors[k]
        assert group is not None, "a factor that moves has a group"
        above = [_find(factors, parent, axis) for parent in parents.get(group, ())]
        places = places.gather(k, _spread(permutations[group], [*above, k], places.shape))
    return places


def _find(factors: Sequence[tuple[int, str | None]], group: str, axis: int) -> int:
    """Return the place of a parent: in the child's own axis, or else in another one."""
    near = [k for k, factor in enumerate(factors) if factor == (axis, group)]
    far = [k for k, factor in enumerate(factors) if factor[1] == group]
    for found in (near, far):
        if len(found) == 1:
            return found[0]
    raise SymmetryError(f"group {group!r} is not in the place that its units' permutations need; derive the spec again")


@dataclass(frozen=True)
class CheckedPermutations:
    """Checked permutations, with the indices for the layouts seen so far."""

    permutations: Mapping[str, Tensor]
    parents: Mapping[str, Sequence[str]]
    _known: dict[tuple[Layout, ...], Tensor] = field(default_factory=dict[tuple[Layout, ...], Tensor])
    _inside: dict[tuple[str, int], CheckedPermutations] = field(
        default_factory=dict[tuple[str, int], "CheckedPermutations"]
    )

    @staticmethod
    def of(spec: SymmetrySpec, permutations: Permutations) -> CheckedPermutations:
        """Return permutations, checked against their groups."""
        return CheckedPermutations(
            _checked(spec, permutations), {group.id: group.parents for group in spec.groups if group.parents}
        )

    def index(self, layouts: tuple[Layout, ...]) -> Tensor:
        """Return the order in which axes of these layouts, flattened to one, are read."""
        if layouts not in self._known:
            self._known[layouts] = _joint_index(layouts, self.permutations, self.parents)
        return self._known[layouts]

    def inside(self, group: str, unit: int) -> CheckedPermutations:
        """Return the permutations inside one unit of a group, numbered as it is after the group's own permutation."""
        key = (group, unit)
        if key not in self._inside:
            parents = dict(self.parents)
            found = dict(self.permutations)
            for child, above in self.parents.items():
                if group in above:
                    parents[child] = tuple(parent for parent in above if parent != group)
                    if child in found:
                        found[child] = found[child].select(list(above).index(group), unit)
            self._inside[key] = CheckedPermutations(found, parents)
        return self._inside[key]

    def together(self, axes: Sequence[AxisRef]) -> list[list[AxisRef]]:
        """Return the axes that something moves, in sets that must be moved at once: a child and its far parents."""
        sets = [[axis] for axis in axes]
        for axis in axes:
            for lost in self._lost(axis.layout):
                mine = next(s for s in sets if axis in s)
                theirs = next((s for s in sets if any(lost in groups_in(other.layout) for other in s)), mine)
                if theirs is not mine:
                    sets.remove(theirs)
                    mine.extend(theirs)
        moving = [s for s in sets if any(groups_in(axis.layout) & self.permutations.keys() for axis in s)]
        return [sorted(s, key=lambda axis: axis.dim) for s in moving]

    def _lost(self, layout: Layout) -> set[str]:
        """Return parents of an axis's groups that are not in this axis."""
        if not self.parents:
            return set()
        lost: set[str] = set()
        for factors, _ in pieces(layout):
            near = {factor.group for factor in factors}
            lost |= {above for group in near if group for above in self.parents.get(group, ()) if above not in near}
        return lost


def _checked(spec: SymmetrySpec, permutations: Permutations) -> dict[str, Tensor]:
    """Return the permutations on the CPU, without those that move nothing."""
    known = {group.id for group in spec.groups}
    moving: dict[str, Tensor] = {}
    for group, given in permutations.items():
        if group not in known:
            raise SymmetryError(f"unknown symmetry group {group!r}{nearest(group, known)}")
        p = given.detach().to("cpu")
        if p.is_floating_point() or p.is_complex() or p.dtype == torch.bool:
            raise SymmetryError(f"permutation of group {group!r} must hold integers, not {p.dtype}")
        shape = shape_of(spec, group)
        if tuple(p.shape) != shape:
            raise SymmetryError(f"permutation of group {group!r} has shape {tuple(p.shape)}; expected {shape}")
        still = identity(shape)
        if not torch.equal(p.long().sort(-1).values, still):
            raise SymmetryError(f"permutation of group {group!r} is not valid: each unit must occur exactly once")
        if not torch.equal(p.long(), still):
            moving[group] = p.long()
    return moving


def by_tensor(spec: SymmetrySpec) -> dict[str, list[AxisRef]]:
    """Return the axes that have groups, by tensor."""
    grouped: dict[str, list[AxisRef]] = {}
    for axis in spec.axes:
        grouped.setdefault(axis.tensor, []).append(axis)
    return grouped


def permute_tensor(value: Tensor, name: str, axes: Sequence[AxisRef], moves: CheckedPermutations) -> Tensor:
    """Return a tensor with its axes moved; SymmetryError with its `name` if its shape does not fit."""
    for axis in axes:
        if axis.dim >= value.ndim or value.shape[axis.dim] != axis.size:
            raise SymmetryError(
                f"tensor {name!r} has shape {tuple(value.shape)}; axis {axis.dim} should be {axis.size}"
            )
    for at_once in moves.together(axes):
        dims = [axis.dim for axis in at_once]
        index = moves.index(tuple(axis.layout for axis in at_once)).to(value.device)
        if len(dims) == 1:
            value = value.detach().index_select(dims[0], index)
        else:
            front = list(range(len(dims)))
            moved = value.detach().movedim(dims, front)
            value = moved.flatten(0, len(dims) - 1).index_select(0, index).view(moved.shape).movedim(front, dims)
            value = value.contiguous()
    return value


def permute_listed(
    weights: Mapping[str, Tensor],
    name: str,
    stack: Stack,
    axes_of: Mapping[str, Sequence[AxisRef]],
    moves: CheckedPermutations,
) -> Tensor:
    """Return the tensor of a stack that moves to this place, with its units permuted.

    Raises SymmetryError if it is missing.
    """
    source, axes, inside = from_list(stack, name, axes_of, moves)
    if source not in weights:
        raise SymmetryError(f"tensor {source!r} is missing, which should move to the place of {name!r}")
    moved = permute_tensor(weights[source], name, axes, inside)
    return moved.detach().clone() if moved is weights[source] and source != name else moved


def from_list(
    stack: Stack, name: str, axes_of: Mapping[str, Sequence[AxisRef]], moves: CheckedPermutations
) -> tuple[str, list[AxisRef], CheckedPermutations]:
    """Return the tensor of a stack that moves to the place of this one, its axes, and its inner permutations."""
    axes = axes_of.get(stack.tensor, ())
    place = stack.sources.index(name)
    lower = [replace(axis, tensor=name, dim=axis.dim - 1) for axis in axes if axis.dim]
    group = next((axis.layout[0][0].group for axis in axes if not axis.dim), None)
    if group is None:
        return name, lower, moves
    p = moves.permutations.get(group)
    return stack.sources[place if p is None else int(p[place])], lower, moves.inside(group, place)
