"""Groups with one permutation for each unit of another group: units inside heads.

A set of units D may be permuted anew for each index of H where (1) wherever D occurs, in tensors and in everything
that is computed, H occurs with it exactly once, in the same product or as an axis of its own; and (2) nothing
combines the indices of H with each other while those of D stay apart. Such a D is a child of H, and their
permutations together form a wreath product.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence

from dimat.symmetry.atoms import Atom, Layout
from dimat.symmetry.layout import Domain
from dimat.symmetry.rules import Value

Parents = Mapping[Atom, tuple[Atom, ...]]
"""By atom those for each of whose indices it has a permutation of its own, outer ones first."""


def find_parents(domain: Domain, values: Iterable[Value], order: Sequence[Atom]) -> Parents:
    """Return the parents of each atom of `order`, which lists outer atoms before the inner ones of a product.

    `values`: all tensors, and everything that was computed from them.
    """
    named = {atom: number for number, atom in enumerate(order)}
    candidates: dict[Atom, set[Atom]] = {}
    for value in values:
        for dims in _cases(domain, value.dims):
            for atom, companions in _companions(domain, dims, named):
                known = candidates.get(atom)
                candidates[atom] = companions if known is None else known & companions
    for mixed, apart in domain.mixes:
        together = _atoms(domain, mixed, named)
        for inner in _atoms(domain, apart, named) - together:
            candidates.get(inner, set()).difference_update(together)
    return _closed(candidates, order, named)


def _closed(
    candidates: Mapping[Atom, set[Atom]], order: Sequence[Atom], named: Mapping[Atom, int]
) -> dict[Atom, tuple[Atom, ...]]:
    """Return parents without cycles: an outer atom has no inner one for parent, and a parent's parents are its own."""
    parents: dict[Atom, tuple[Atom, ...]] = {}
    for atom in order:
        outer = [other for other in order[: named[atom]] if other in candidates.get(atom, ())]
        kept: list[Atom] = []
        for other in outer:
            if all(above in kept for above in parents[other]):
                kept.append(other)
        parents[atom] = tuple(kept)
    return parents


def _cases(domain: Domain, dims: tuple[Layout, ...]) -> Generator[tuple[Layout, ...]]:
    """Yield the axes of a value, once for each index of an axis that chooses among layouts of the others."""
    case = next((case for layout in dims for case in domain.cases_of(layout)), None)
    if case is None or case.choice is None:
        yield dims
        return
    for index in range(case.choice.size):
        yield from _cases(domain, tuple(domain.choose(layout, case.choice, index) for layout in dims))


def _companions(domain: Domain, dims: Sequence[Layout], named: Mapping[Atom, int]) -> Generator[tuple[Atom, set[Atom]]]:
    """Yield every occurrence of an atom with the atoms that occur with it exactly once."""
    resolved = [domain.resolve(layout) for layout in dims]
    occurrences = [list(_paths(domain, layout, (), named)) for layout in resolved]
    total: dict[Atom, int] = {}
    for listed in occurrences:
        for atom, _ in listed:
            total[atom] = total.get(atom, 0) + 1
    # an axis of one product: every index of it stands for one unit of each factor
    whole = [{atom for atom in layout[0] if atom in named} if len(layout) == 1 else set[Atom]() for layout in resolved]
    for axis, listed in enumerate(occurrences):
        elsewhere = {other for number, atoms in enumerate(whole) if number != axis for other in atoms}
        single = {other for other in elsewhere if total[other] == 1}
        for atom, path in listed:
            with_it = {other for other in path if path.count(other) == 1 and other is not atom}
            yield atom, with_it | (single - {atom})


def _paths(
    domain: Domain, layout: Layout, above: tuple[Atom, ...], named: Mapping[Atom, int]
) -> Generator[tuple[Atom, tuple[Atom, ...]]]:
    """Yield every occurrence of a named atom, with the named atoms of its product and of those around it."""
    for segment in domain.resolve(layout):
        path = above + tuple(atom for atom in segment if atom in named)
        for atom in segment:
            if atom.parts is not None:
                yield from _paths(domain, atom.parts, path, named)
            elif atom in named:
                yield atom, path


def _atoms(domain: Domain, layouts: Iterable[Layout], named: Mapping[Atom, int]) -> set[Atom]:
    return {atom for layout in layouts for atom in domain.leaves(layout) if atom in named}
