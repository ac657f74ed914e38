"""Atoms of layouts (see `dimat.symmetry.layout`), and functions on them that relate no axes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

SINGLE = "single index"
"""The reason for freezing an index that is taken by itself."""


class LayoutError(Exception):
    """Two layouts that should describe the same axis have different sizes: a rule is wrong."""


@dataclass(frozen=True, slots=True)
class Frozen:
    """The reason why an atom never moves, and the graph node at which that was decided."""

    reason: str
    node: str = ""


class Atom:
    """A set of `size` indices; compared by identity. Only `Domain` writes its fields.

    `parts`: its refinement, or the concatenation that it stands for below a free factor. `cases`: its
    layouts, one for each index of the atom `choice`, whose `chooses` is True. `twin`: another frozen atom whose indices
    correspond to this one's, number by number.
    """

    __slots__ = ("cases", "choice", "chooses", "frozen", "joins", "parent", "parts", "size", "twin")

    def __init__(self, size: int, frozen: Frozen | None = None) -> None:
        self.size = size
        self.frozen = frozen
        self.parent: Atom | None = None
        self.parts: Layout | None = None
        self.cases: tuple[Layout, ...] = ()
        self.choice: Atom | None = None
        self.chooses = False
        self.twin: Atom | None = None
        self.joins: dict[Atom, Atom] = {}

    def joined(self, inner: Atom) -> Atom:
        """Return the frozen atom for the product of this frozen one and another, the same at every call."""
        if inner not in self.joins:
            self.joins[inner] = Atom(self.size * inner.size, self.frozen)
        return self.joins[inner]


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


def tidy(segments: Sequence[Segment]) -> Layout:
    """Drop atoms of size 1; join neighbouring frozen factors, and neighbouring frozen segments."""
    tidy: list[Segment] = []
    for segment in segments:
        factors: list[Atom] = []
        for atom in segment:
            if atom.size == 1:
                continue
            if factors and still(factors[-1:]) and still((atom,)):
                factors[-1] = factors[-1].joined(atom)
            else:
                factors.append(atom)
        if tidy and still(tidy[-1]) and still(factors):
            why = first_frozen((tidy[-1], factors)) or Frozen(SINGLE)
            tidy[-1] = (Atom(segment_size(tidy[-1]) + segment_size(tuple(factors)), why),)
        else:
            tidy.append(tuple(factors))
    return tuple(tidy)


def still(segment: Sequence[Atom]) -> bool:
    """Tell whether no index of a product moves, none of its atoms being a choice."""
    return all(atom.frozen and not atom.chooses for atom in segment)


def first_frozen(layout: Iterable[Sequence[Atom]]) -> Frozen | None:
    """Return the reason of the first frozen atom, if any."""
    return next((atom.frozen for segment in layout for atom in segment if atom.frozen), None)


def all_frozen(layout: Layout) -> Frozen | None:
    """Return the reason of an entirely frozen, non-empty layout, else None."""
    return first_frozen(layout) if all(still(segment) for segment in layout) else None


def chunks(layout: Layout, inner: int) -> list[Layout]:
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


def aligned_parts(old: Sequence[int], new: Sequence[int]) -> list[_Part]:
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
