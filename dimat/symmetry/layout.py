"""The abstract domain of the derivation: how the indices of a tensor axis are made of units.

An axis is a `Layout`: an ordered concatenation of segments, each a row-major product of atoms. An atom
stands for a set of indices that may still be permuted at will. Three things can happen to it, all of them
global and none ever undone, so that relations found early stay true:

- it is *merged* with another of its size (union-find): both are permuted alike;
- it is *refined*, once, into a layout of smaller atoms: it may only be permuted piece by piece;
- it is *frozen*, with a reason: it is never permuted. A frozen atom is just a count of indices, so it can be
  split and joined at will.

Whatever the domain cannot express is frozen, which is always sound: fewer permutations are allowed, never
wrong ones. Two known losses: a concatenation inside a product below a free factor is frozen (an axis viewed
as heads x halves), and segments of an axis that is viewed as (pieces, size) are tied to each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

_MOST_COPIES = 1024
"""A frozen factor above a concatenation is written out as that many copies at most."""


class LayoutError(Exception):
    """Two layouts that should describe the same axis have different sizes: a rule is wrong."""


@dataclass(frozen=True, slots=True)
class Frozen:
    """Why an atom never moves, and the graph node at which that was decided."""

    reason: str
    node: str = ""


class Atom:
    """A set of `size` indices; compared by identity. Only `Domain` writes its fields."""

    __slots__ = ("frozen", "parent", "parts", "size")

    def __init__(self, size: int, frozen: Frozen | None = None) -> None:
        self.size = size
        self.frozen = frozen
        self.parent: Atom | None = None
        self.parts: Layout | None = None


Segment = tuple[Atom, ...]
Layout = tuple[Segment, ...]

ONE: Layout = ((),)
"""The layout of an axis of size 1."""


def segment_size(segment: Segment) -> int:
    """Return the number of indices of a product of atoms."""
    return prod(atom.size for atom in segment)


def layout_size(layout: Layout) -> int:
    """Return the number of indices of an axis."""
    return sum(segment_size(segment) for segment in layout)


class Domain:
    """Makes atoms and relates them. Layouts handed out may be stale: `resolve` gives the present form."""

    def fresh(self, size: int) -> Layout:
        """Return a new axis of `size` indices about which nothing is known yet."""
        return ONE if size == 1 else ((Atom(size),),) if size else ()

    def fixed(self, size: int, why: Frozen) -> Layout:
        """Return a new axis of `size` indices that never move."""
        return ONE if size == 1 else ((Atom(size, why),),) if size else ()

    def find(self, atom: Atom) -> Atom:
        """Return the atom that `atom` was merged into, or itself."""
        while atom.parent is not None:
            if atom.parent.parent is not None:
                atom.parent = atom.parent.parent
            atom = atom.parent
        return atom

    def resolve(self, layout: Layout) -> Layout:
        """Return the layout in terms of unrefined root atoms, neighbouring frozen parts joined."""
        segments: list[Segment] = []
        for segment in layout:
            pieces: list[Segment] = [()]
            for atom in segment:
                root = self.find(atom)
                inner = ((root,),) if root.parts is None else self.resolve(root.parts)
                pieces = self._times(pieces, inner)
            segments.extend(pieces)
        return _tidy(segments)

    def freeze(self, layout: Layout, why: Frozen) -> None:
        """Freeze all atoms of an axis; those frozen before keep their reason."""
        for segment in self.resolve(layout):
            for atom in segment:
                if atom.frozen is None:
                    atom.frozen = why

    def is_frozen(self, layout: Layout) -> bool:
        """Tell whether no index of the axis may move."""
        return all(atom.frozen for segment in self.resolve(layout) for atom in segment)

    def cut(self, layout: Layout, at: int) -> tuple[Layout, Layout]:
        """Split an axis before index `at`; free atoms across the boundary are refined there."""
        layout = self.resolve(layout)
        start = 0
        for number, segment in enumerate(layout):
            size = segment_size(segment)
            if at == start:
                return layout[:number], layout[number:]
            if at < start + size:
                left, right = self._cut_product(segment, at - start)
                return layout[:number] + left, right + layout[number + 1 :]
            start += size
        return layout, ()

    def slice(self, layout: Layout, start: int, stop: int) -> Layout:
        """Return the part of an axis from index `start` up to `stop`."""
        return self.cut(self.cut(layout, stop)[0], start)[1]

    def concat(self, layouts: Iterable[Layout]) -> Layout:
        """Return the axis made of these axes, one after the other."""
        return tuple(segment for layout in layouts for segment in layout)

    def unify(self, one: Layout, other: Layout) -> None:
        """Record that two axes are permuted alike.

        Raises LayoutError where their sizes differ.
        """
        work = [(one, other)]
        while work:
            a, b = (self.resolve(layout) for layout in work.pop())
            if a == b:
                continue
            if layout_size(a) != layout_size(b):
                raise LayoutError(f"axes of sizes {layout_size(a)} and {layout_size(b)} cannot be permuted alike")
            if why := _all_frozen(a):
                self.freeze(b, why)
            elif why := _all_frozen(b):
                self.freeze(a, why)
            elif len(a) == len(b) == 1:
                work.extend(self._unify_products(a[0], b[0]))
            else:
                at = min(segment_size(layout[0]) for layout in (a, b) if len(layout) > 1)
                heads, tails = zip(self.cut(a, at), self.cut(b, at), strict=True)
                work.append((tails[0], tails[1]))
                work.append((heads[0], heads[1]))

    def merge(self, layouts: Sequence[Layout]) -> Layout:
        """Return the axis that flattens these axes (row-major); `factor` is its inverse."""
        pieces: list[Segment] = [()]
        for layout in layouts:
            pieces = self._times(pieces, self.resolve(layout))
        return tuple(pieces)

    def factor(self, layout: Layout, sizes: Sequence[int]) -> list[Layout]:
        """Split an axis into axes of these sizes (row-major), refining or freezing where they do not fit."""
        layouts: list[Layout] = []
        for position, size in enumerate(sizes[:-1]):
            outer, layout = self._factor(layout, size, prod(sizes[position + 1 :]))
            layouts.append(outer)
        return [*layouts, layout]

    def reshape(self, layouts: Sequence[Layout], shape: Sequence[int]) -> list[Layout]:
        """Return the axes of a row-major view with sizes `shape` of a tensor with axes `layouts`."""
        old = [layout for layout in layouts if layout_size(layout) != 1]
        if 0 in shape:
            return [self.fixed(size, Frozen("empty tensor")) for size in shape]
        new: list[Layout] = []
        position = 0
        for part in _aligned_parts([layout_size(layout) for layout in old], shape):
            axis = self.merge(old[position : position + part.old])
            new.extend(self.factor(axis, part.new) if part.new else [])
            position += part.old
        return new

    def _times(self, outer: Sequence[Segment], inner: Layout) -> list[Segment]:
        """Distribute a product over a concatenation, where that can be written down; freeze where not."""
        if len(inner) == 1:
            return [segment + inner[0] for segment in outer]
        pieces: list[Segment] = []
        for segment in outer:
            copies = segment_size(segment)
            if all(atom.frozen for atom in segment) and copies * len(inner) <= _MOST_COPIES:
                pieces.extend(inner * copies)
            else:
                why = Frozen("concatenation inside a product")
                self.freeze(inner, why)
                pieces.append((*segment, Atom(layout_size(inner), why)))
        return pieces

    def _cut_product(self, segment: Segment, at: int) -> tuple[Layout, Layout]:
        head, rest = segment[0], segment[1:]
        whole, remainder = divmod(at, segment_size(rest))
        sizes = (whole, 1 if remainder else 0, head.size - whole - (1 if remainder else 0))
        parts = [((Atom(size, head.frozen),) if size > 1 else ()) if size else None for size in sizes]
        if head.frozen is None:
            head.parts = tuple(part for part in parts if part is not None)
        left, middle, right = [(() if part is None else ((*part, *rest),)) for part in parts]
        if not middle:
            return left, right
        inner = self.cut((rest,), remainder)
        return left + inner[0], inner[1] + right

    def _unify_products(self, p: Segment, q: Segment) -> list[tuple[Layout, Layout]]:
        """Unify the heads of two products of equal size; return what is left to unify."""
        if p[0].size < q[0].size:
            p, q = q, p
        large, small = p[0], q[0]
        if large.size == small.size:
            if large is not small:
                small.parent = large
                large.frozen = large.frozen or small.frozen
            return [((p[1:],), (q[1:],))]
        if large.size % small.size:
            why = _first_frozen((p, q)) or Frozen(f"sizes {large.size} and {small.size} do not divide")
            self.freeze((p, q), why)
            return []
        rest = Atom(large.size // small.size, large.frozen)
        if large.frozen is None:
            large.parts = ((small, rest),)
            return [((p,), (q,))]
        small.frozen = small.frozen or large.frozen
        return [(((rest, *p[1:]),), (q[1:],))]

    def _factor(self, layout: Layout, outer: int, inner: int) -> tuple[Layout, Layout]:
        """Split an axis into an outer and an inner one."""
        if inner == 1:
            return layout, ONE
        if outer == 1:
            return ONE, layout
        layout = self.resolve(layout)
        if len(layout) == 1:
            return self._factor_product(layout[0], outer)
        outers: list[Layout] = []
        inners: list[Layout] = []
        for chunk in _chunks(layout, inner):
            if len(chunk) == 1:
                pair = self._factor_product(chunk[0], segment_size(chunk[0]) // inner)
            elif layout_size(chunk) == inner:
                pair = (ONE, chunk)
            else:
                why = _first_frozen(layout) or Frozen(f"pieces of the axis do not fit a view by {inner}")
                self.freeze(layout, why)
                return self.fixed(outer, why), self.fixed(inner, why)
            outers.append(pair[0])
            inners.append(pair[1])
        for other in inners[1:]:
            self.unify(inners[0], other)
        return self.concat(outers), inners[0]

    def _factor_product(self, segment: Segment, outer: int) -> tuple[Layout, Layout]:
        done = 1
        for position, atom in enumerate(segment):
            need = outer // done
            if need == 1:
                return (segment[:position],), (segment[position:],)
            if need % atom.size == 0:
                done *= atom.size
                continue
            if atom.size % need:
                why = _first_frozen((segment,)) or Frozen(f"size {atom.size} does not divide by {need}")
                self.freeze((segment,), why)
                return self.fixed(outer, why), self.fixed(segment_size(segment) // outer, why)
            parts = (Atom(need, atom.frozen), Atom(atom.size // need, atom.frozen))
            if atom.frozen is None:
                atom.parts = (parts,)
            return ((*segment[:position], parts[0]),), ((parts[1], *segment[position + 1 :]),)
        return (segment,), ONE


def _tidy(segments: Sequence[Segment]) -> Layout:
    """Drop atoms of size 1; join neighbouring frozen factors, and neighbouring frozen segments."""
    tidy: list[Segment] = []
    for segment in segments:
        factors: list[Atom] = []
        for atom in segment:
            if atom.size == 1:
                continue
            if factors and atom.frozen and (before := factors[-1].frozen):
                factors[-1] = Atom(factors[-1].size * atom.size, before)
            else:
                factors.append(atom)
        if tidy and _still(tidy[-1]) and _still(factors):
            why = _first_frozen((tidy[-1], factors)) or Frozen("single index")
            tidy[-1] = (Atom(segment_size(tidy[-1]) + segment_size(tuple(factors)), why),)
        else:
            tidy.append(tuple(factors))
    return tuple(tidy)


def _still(segment: Sequence[Atom]) -> bool:
    return all(atom.frozen for atom in segment)


def _first_frozen(layout: Iterable[Sequence[Atom]]) -> Frozen | None:
    return next((atom.frozen for segment in layout for atom in segment if atom.frozen), None)


def _all_frozen(layout: Layout) -> Frozen | None:
    """Return the reason of a wholly frozen layout with something in it, else None."""
    return _first_frozen(layout) if all(_still(segment) for segment in layout) else None


def _chunks(layout: Layout, inner: int) -> list[Layout]:
    """Group segments into runs whose sizes are multiples of `inner`."""
    chunks: list[Layout] = []
    run: Layout = ()
    for segment in layout:
        run = (*run, segment)
        if layout_size(run) % inner == 0:
            chunks.append(run)
            run = ()
    return chunks


@dataclass(frozen=True, slots=True)
class _Part:
    old: int
    new: list[int]


def _aligned_parts(old: Sequence[int], new: Sequence[int]) -> list[_Part]:
    """Group old axes (none of size 1) and new sizes into the smallest parts with equal products."""
    parts: list[_Part] = []
    position = 0
    sizes: list[int] = []
    taken = 0
    have = 1
    for size in new:
        sizes.append(size)
        while have < prod(sizes):
            have *= old[position]
            position += 1
            taken += 1
        if have == prod(sizes):
            parts.append(_Part(taken, sizes))
            sizes, taken, have = [], 0, 1
    return parts
