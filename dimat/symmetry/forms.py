"""Axes that consist of several: found in one run of the graph, split in the next.

A fused projection of query, key and value has one output axis of 3 · heads · units entries. A first run sees it
viewed as (3, heads, units) and every index of the "3" taken by itself, so that all three are tied to each other.
Its form is then three pieces with nothing in common, (heads · units) each; or, where it is viewed as
(heads, 3, units), heads times a concatenation of three.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from dimat.symmetry.atoms import Atom, Layout
from dimat.symmetry.layout import Domain

MOST_PIECES = 64
"""An axis of more indices than this is not a number of fused projections."""

Form = tuple[tuple["int | Form", ...], ...]
"""A concatenation of products of sizes, or of forms."""


def made(domain: Domain, form: Form) -> Layout:
    """Return a new axis of a form, all of its atoms new."""
    return domain.concat(
        domain.merge([domain.fresh(part) if isinstance(part, int) else made(domain, part) for part in segment])
        for segment in form
    )


def form_of(domain: Domain, layout: Layout) -> Form | None:
    """Return the form of an axis, as it was made, if part of it was taken apart index by index."""
    found = [_of_product(domain, segment) for segment in layout]
    if not any(found):
        return None
    whole = [(prod(atom.size for atom in segment),) for segment in layout]
    return tuple(piece for form, size in zip(found, whole) for piece in (form or (size,)))


def _of_product(domain: Domain, segment: Sequence[Atom]) -> Form | None:
    factors = _factors(domain, segment)
    sizes = [atom.size for atom in factors]
    for position, atom in enumerate(factors):
        before, after = prod(sizes[:position]), prod(sizes[position + 1 :])
        inner: Form | None = None
        if after > 1 and 1 < atom.size <= MOST_PIECES and _singles(domain, atom):
            inner, after = ((after,),) * atom.size, 1
        elif atom.parts is not None:
            inner = form_of(domain, atom.parts)
        if inner is not None:
            if before == after == 1:
                return inner
            return ((*_unless_one(before), inner, *_unless_one(after)),)
    return None


def _unless_one(size: int) -> tuple[int, ...]:
    return (size,) if size > 1 else ()


def _factors(domain: Domain, segment: Sequence[Atom]) -> list[Atom]:
    """Return the atoms of a product, those that were refined into products replaced by their factors."""
    factors: list[Atom] = []
    for atom in segment:
        root = domain.find(atom)
        if root.parts is not None and len(root.parts) == 1:
            factors.extend(_factors(domain, root.parts[0]))
        else:
            factors.append(root)
    return factors


def _singles(domain: Domain, atom: Atom) -> bool:
    """Tell whether an atom was refined into single indices."""
    root = domain.find(atom)
    if root.size == 1:
        return True
    pieces = root.parts or ()
    return len(pieces) > 1 and all(_singles(domain, part) for segment in pieces for part in segment)
