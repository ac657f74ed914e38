"""The abstract domain of the derivation: how the indices of a tensor axis are made of units.

An axis is a `Layout`: an ordered concatenation of segments, each a row-major product of atoms. An atom
stands for a set of indices that may still be permuted freely. Three things can happen to an atom. All of them are
global and none is ever undone, so relations found early stay true:

- it is *merged* with another atom of the same size (union-find): both are permuted alike;
- it is *refined*, once, into a layout of smaller atoms: it may only be permuted piece by piece;
- it is *frozen*, with a reason: it is never permuted. A frozen atom is only a count of indices, so it can be
  split and joined freely.

Two kinds of atoms stand for more than a set of indices. A *nested* atom is a concatenation below a free factor
(an axis viewed as heads × (query, key, value)); `resolve` leaves it in place, with its `parts`. A *case* arises when a
concatenation of equal pieces is viewed as (pieces, size): the axis of the pieces is a *choice*, and the case is
the other axis, which has one of several layouts, depending on the choice. `choose` picks one of these layouts. Every
other operation on a case settles it: from then on its layouts are permuted alike.

The domain freezes every atom whose behaviour it cannot express. This is always sound: it allows fewer permutations,
never wrong ones.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from math import prod

from dimat.symmetry.atoms import (
    ONE,
    Atom,
    Frozen,
    Layout,
    LayoutError,
    Segment,
    aligned_parts,
    all_frozen,
    chunks,
    first_frozen,
    layout_size,
    segment_size,
    still,
    tidy,
)

_MOST_CASES = 64
"""If a concatenation has more equal pieces than this, a view as (pieces, size) ties the pieces to each other."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """A lookup of entries of `axis` by index.

    `places` are the result's axes, `by` is the graph node that holds the indices, and `apart` are the axes that were
    not looked up.
    """

    axis: Layout
    places: tuple[Layout, ...]
    by: object
    apart: tuple[Layout, ...]


class Domain:
    """Makes atoms and relates them. A returned layout may become stale; `resolve` gives its current form.

    `mixes` lists the operations that combined the indices of some axes with each other and kept those of other axes
    apart, as (mixed, apart). `lookups` lists the operations that looked up entries of an axis by index. These lists
    determine which axes may be permuted separately for each index of another axis.
    """

    def __init__(self) -> None:
        self.mixes: list[tuple[tuple[Layout, ...], tuple[Layout, ...]]] = []
        self.lookups: list[Lookup] = []
        self.has_cases = False

    def fresh(self, size: int) -> Layout:
        """Return a new, unconstrained axis of `size` indices."""
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

    def identity(self, atom: Atom) -> Atom:
        """Return the atom that represents this one; frozen atoms whose indices mean the same share one."""
        while (above := atom.parent or atom.twin) is not None:
            atom = above
        return atom

    def resolve(self, layout: Layout) -> Layout:
        """Return the layout in terms of unrefined root atoms and nested atoms, with adjacent frozen parts joined."""
        segments: list[Segment] = []
        for segment in layout:
            pieces: list[Segment] = [()]
            for atom in segment:
                root = self.find(atom)
                if root.parts is None:
                    pieces = [(*piece, root) for piece in pieces]
                else:
                    pieces = self._times(pieces, self.resolve(root.parts), root)
            segments.extend(pieces)
        return tidy(segments)

    def leaves(self, layout: Layout) -> Generator[Atom]:
        """Yield the unrefined atoms of an axis, including those inside nested atoms and cases."""
        for segment in self.resolve(layout):
            for atom in segment:
                if atom.parts is not None:
                    yield from self.leaves(atom.parts)
                elif atom.cases:
                    for case in atom.cases:
                        yield from self.leaves(case)
                else:
                    yield atom

    def freeze(self, layout: Layout, why: Frozen) -> None:
        """Freeze all atoms of an axis; atoms that are frozen already keep their reason."""
        for atom in list(self.leaves(layout)):
            if atom.frozen is None:
                atom.frozen = why

    def choice_of(self, layout: Layout) -> Atom | None:
        """Return the axis's only atom if it is a choice, that is, if it numbers the layouts of cases; else None."""
        layout = self.resolve(layout)
        return layout[0][0] if len(layout) == 1 and len(layout[0]) == 1 and layout[0][0].chooses else None

    def cases_of(self, layout: Layout) -> list[Atom]:
        """Return the cases in an axis."""
        if not self.has_cases:
            return []
        atoms = [atom for segment in self.resolve(layout) for atom in segment]
        inner = [case for atom in atoms if atom.parts is not None for case in self.cases_of(atom.parts)]
        return [atom for atom in atoms if atom.cases] + inner

    def choose(self, layout: Layout, choice: Atom, index: int) -> Layout:
        """Return the axis with each case under `choice` replaced by its layout for `index`."""
        segments: list[Segment] = []
        for segment in self.resolve(layout):
            pieces: list[Segment] = [()]
            for atom in segment:
                chosen: Layout = ((atom,),)
                if atom.choice is choice:
                    chosen = self.resolve(atom.cases[index])
                elif atom.parts is not None and self.cases_of(atom.parts):
                    chosen = self.choose(atom.parts, choice, index)
                pieces = self._times(pieces, chosen)
            segments.extend(pieces)
        return tuple(segments)

    def settle(self, case: Atom) -> None:
        """Tie the layouts of a case to each other; from then on the case stands for the first of them."""
        if case.parts is None:
            case.parts = case.cases[0]
            for other in case.cases[1:]:
                self.unify(case.cases[0], other)

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
        """Return the concatenation of some axes."""
        return tuple(segment for layout in layouts for segment in layout)

    def unify(self, one: Layout, other: Layout) -> None:
        """Record that two axes are permuted alike.

        Raises LayoutError if their sizes differ.
        """
        work = [(one, other)]
        while work:
            a, b = (self.resolve(layout) for layout in work.pop())
            if a == b:
                continue
            if layout_size(a) != layout_size(b):
                raise LayoutError(f"axes of sizes {layout_size(a)} and {layout_size(b)} cannot be permuted alike")
            if why := all_frozen(a):
                self.freeze(b, why)
                self.pair(a, b)
            elif why := all_frozen(b):
                self.freeze(a, why)
                self.pair(a, b)
            elif len(a) == len(b) == 1:
                work.extend(self._unify_products(a[0], b[0]))
            else:
                at = min(segment_size(layout[0]) for layout in (a, b) if len(layout) > 1)
                heads, tails = zip(self.cut(a, at), self.cut(b, at), strict=True)
                work.append((tails[0], tails[1]))
                work.append((heads[0], heads[1]))

    def merge(self, layouts: Sequence[Layout]) -> Layout:
        """Flatten axes into one (row-major); `factor` is the inverse."""
        if len(layouts) > 1 and (choice := self.choice_of(layouts[0])):
            rest = self.merge(layouts[1:])
            return self.concat(self.choose(rest, choice, index) for index in range(choice.size))
        pieces: list[Segment] = [()]
        for layout in layouts:
            pieces = self._times(pieces, self.resolve(layout))
        return tuple(pieces)

    def factor(self, layout: Layout, sizes: Sequence[int]) -> list[Layout]:
        """Split an axis into axes of the given sizes (row-major); refine or freeze atoms that do not fit."""
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
        for part in aligned_parts([layout_size(layout) for layout in old], shape):
            axis = self.merge(old[position : position + part.old])
            new.extend(self.factor(axis, part.new) if part.new else [])
            position += part.old
        return new

    def pair(self, a: Layout, b: Layout) -> None:
        """Record that the indices of two frozen axes mean the same, if each axis is a single atom."""
        a, b = self.resolve(a), self.resolve(b)
        if len(a) == len(b) == 1 and len(a[0]) == len(b[0]) == 1:
            one, other = self.identity(a[0][0]), self.identity(b[0][0])
            plain = not any(atom.parts or atom.cases or atom.chooses for atom in (one, other))
            if one is not other and plain and one.frozen and other.frozen:
                other.twin = one

    def pair_lookups(self) -> None:
        """Record that axes' indices mean the same where lookups with the same indices and places used these axes."""
        first: dict[tuple[object, tuple[Atom, ...]], Layout] = {}
        for lookup in self.lookups:
            atoms = (a for layout in lookup.places for segment in self.resolve(layout) for a in segment)
            places = tuple(map(self.identity, atoms))
            self.pair(first.setdefault((lookup.by, places), lookup.axis), lookup.axis)

    def _times(self, outer: Sequence[Segment], inner: Layout, whole: Atom | None = None) -> list[Segment]:
        """Distribute a product over a concatenation; below a free factor, make it a nested atom (`whole`, if given)."""
        if len(inner) == 1:
            return [segment + inner[0] for segment in outer]
        pieces: list[Segment] = []
        for segment in outer:
            copies = segment_size(segment)
            if copies == 1 or (still(segment) and not any(a.frozen is None for part in inner for a in part)):
                pieces.extend(inner * copies)
            else:
                if whole is None:
                    whole = Atom(layout_size(inner))
                    whole.parts = inner
                pieces.append((*segment, whole))
        return pieces

    def _cut_product(self, segment: Segment, at: int) -> tuple[Layout, Layout]:
        head, rest = segment[0], segment[1:]
        if head.cases:
            self.settle(head)
            return self.cut((segment,), at)
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
        """Unify the heads of two products of equal size; return the pairs that are left to unify."""
        if p[0].size < q[0].size:
            p, q = q, p
        if p[0] is not q[0] and (p[0].cases or q[0].cases):
            if p[0].size == q[0].size and p[0].choice is q[0].choice:
                q[0].parent = p[0]
                return [*zip(p[0].cases, q[0].cases), ((p[1:],), (q[1:],))]
            for case in (p[0], q[0]):
                if case.cases:
                    self.settle(case)
            return [((p,), (q,))]
        large, small = p[0], q[0]
        if large.size == small.size:
            if large is not small:
                small.parent = large
                large.frozen = large.frozen or small.frozen
            return [((p[1:],), (q[1:],))]
        if large.size % small.size:
            why = first_frozen((p, q)) or Frozen(f"sizes {large.size} and {small.size} do not divide")
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
        runs = chunks(layout, inner)
        if 1 < len(runs) == outer <= _MOST_CASES and any(run != runs[0] for run in runs[1:]):
            choice = Atom(outer, Frozen("numbers pieces of an axis"))
            choice.chooses = True
            return ((choice,),), self._case(choice, runs)
        outers: list[Layout] = []
        inners: list[Layout] = []
        for chunk in runs:
            if len(chunk) == 1:
                pair = self._factor_product(chunk[0], segment_size(chunk[0]) // inner)
            elif layout_size(chunk) == inner:
                pair = (ONE, chunk)
            else:
                why = first_frozen(layout) or Frozen(f"pieces of the axis do not fit a view by {inner}")
                self.freeze(layout, why)
                return self.fixed(outer, why), self.fixed(inner, why)
            outers.append(pair[0])
            inners.append(pair[1])
        for other in inners[1:]:
            self.unify(inners[0], other)
        return self.concat(outers), inners[0]

    def _case(self, choice: Atom, cases: Sequence[Layout]) -> Layout:
        case = Atom(layout_size(cases[0]))
        if case.size == 1:
            return ONE
        case.choice, case.cases = choice, tuple(cases)
        self.has_cases = True
        return ((case,),)

    def _factor_product(self, segment: Segment, outer: int) -> tuple[Layout, Layout]:
        done = 1
        for position, atom in enumerate(segment):
            need = outer // done
            before, after = segment[:position], segment[position + 1 :]
            if need == 1:
                return (before,), (segment[position:],)
            if need % atom.size == 0:
                done *= atom.size
                continue
            if atom.size % need:
                why = first_frozen((segment,)) or Frozen(f"size {atom.size} does not divide by {need}")
                self.freeze((segment,), why)
                return self.fixed(outer, why), self.fixed(segment_size(segment) // outer, why)
            if atom.parts is not None or atom.cases:
                halves = self._factor_special(atom, need)
                return self.merge([(before,), halves[0]]), self.merge([halves[1], (after,)])
            parts = (Atom(need, atom.frozen), Atom(atom.size // need, atom.frozen))
            if atom.frozen is None:
                atom.parts = (parts,)
            return ((*before, parts[0]),), ((parts[1], *after),)
        return (segment,), ONE

    def _factor_special(self, atom: Atom, outer: int) -> tuple[Layout, Layout]:
        """Split a nested atom, or each layout of a case."""
        if atom.parts is not None:
            return self._factor(atom.parts, outer, atom.size // outer)
        choice = atom.choice
        assert choice is not None, "a case without a choice"
        pairs = [self._factor(case, outer, atom.size // outer) for case in atom.cases]
        halves = self._case(choice, [pair[0] for pair in pairs]), self._case(choice, [pair[1] for pair in pairs])
        atom.parts = tuple(self._times(*halves))
        return halves
