"""Groups with one permutation for each unit of another group: units inside heads.

A set of units D may be permuted anew for each index of H where (1) wherever D occurs, in tensors and in everything
that is computed, H occurs with it exactly once, in the same product or as an axis of its own; and (2) nothing
combines the indices of H with each other while those of D stay apart. Such a D is a child of H, and their
permutations together form a wreath product.

H need not move itself. If an axis is frozen (experts that are chosen by number, heads with slopes of their own, stacked
layers), the units inside still have a separate permutation for each of its numbers.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence

from dimat.symmetry.atoms import ONE, Atom, Layout
from dimat.symmetry.layout import Domain, Lookup
from dimat.symmetry.rules import Value

Parents = Mapping[Atom, tuple[Atom, ...]]
"""By atom its parents, for each index of which it has a separate permutation; outer ones first."""


def find_parents(
    domain: Domain, values: Iterable[Value], order: Sequence[Atom], numbered: Sequence[Atom] = ()
) -> Parents:
    """Return the parents of each atom of `order`, which lists outer atoms before the inner ones of a product.

    `values`: all tensors, and everything that was computed from them. `numbered`: frozen atoms, as `Domain.identity`
    returns them, that may be parents too.
    """
    named = _Named(domain, (*numbered, *order))
    candidates: dict[Atom, set[Atom]] = {}
    for value in values:
        for dims in _cases(domain, value.all_dims):
            for atom, companions in _companions(domain, dims, named):
                known = candidates.get(atom)
                candidates[atom] = companions if known is None else known & companions
    for mixed, apart in (*domain.mixes, *named.mixes):
        together = _atoms(domain, mixed, named)
        for inner in _atoms(domain, apart, named) - together:
            candidates.get(inner, set()).difference_update(together)
    return _closed({atom: candidates.get(atom, set()) for atom in order}, named.order)


class _Named:
    """Atoms whose parents are requested, or that may be parents; and axes that represent one of the latter.

    An axis represents another if each of its places looked up the entry of one and the same number: rows of tokens,
    each with the weights of its expert.
    """

    def __init__(self, domain: Domain, order: Sequence[Atom]) -> None:
        self.order = {atom: number for number, atom in enumerate(order)}
        self.mixes: list[tuple[tuple[Layout, ...], tuple[Layout, ...]]] = []
        self._domain = domain
        self._stands: dict[Atom, Atom] = {}
        found: dict[Atom, list[tuple[Atom, Lookup]]] = {}
        for lookup in domain.lookups:
            axis, places = self._frozen((lookup.axis,)), self._frozen(lookup.places)
            if axis in self.order and places is not None and places not in self.order:
                found.setdefault(places, []).append((axis, lookup))
            else:
                self.mixes.append(((lookup.axis,), lookup.apart))
        for places, by in found.items():
            if len({axis for axis, _ in by}) == len({lookup.by for _, lookup in by}) == 1:
                self._stands[places] = by[0][0]
            else:
                self.mixes += [((lookup.axis,), lookup.apart) for _, lookup in by]

    def get(self, atom: Atom) -> Atom | None:
        """Return the atom that represents another one, or None if it is none of these."""
        if atom in self.order:
            return atom
        if atom.frozen is None:
            return None
        known = self._domain.identity(atom)
        known = self._stands.get(known, known)
        return known if known in self.order else None

    def _frozen(self, layouts: Sequence[Layout]) -> Atom | None:
        """Return the frozen atom of a value whose axes, except one, have size 1, if that axis consists of one."""
        wide = [layout for layout in map(self._domain.resolve, layouts) if layout != ONE]
        atoms = [atom for layout in wide for segment in layout for atom in segment]
        return self._domain.identity(atoms[0]) if len(atoms) == 1 and atoms[0].frozen else None


def _closed(candidates: Mapping[Atom, set[Atom]], order: Mapping[Atom, int]) -> dict[Atom, tuple[Atom, ...]]:
    """Return parents without cycles: an outer atom has no inner one as parent, and a parent's parents are included."""
    parents: dict[Atom, tuple[Atom, ...]] = {}
    for atom, number in order.items():
        outer = sorted((other for other in candidates.get(atom, ()) if order[other] < number), key=order.__getitem__)
        kept: list[Atom] = []
        for other in outer:
            if all(above in kept for above in parents[other]):
                kept.append(other)
        parents[atom] = tuple(kept)
    return {atom: parents[atom] for atom in candidates}


def _cases(domain: Domain, dims: tuple[Layout, ...]) -> Generator[tuple[Layout, ...]]:
    """Yield the axes of a value, once for each index of an axis that chooses among layouts of the others."""
    case = next((case for layout in dims for case in domain.cases_of(layout)), None)
    if case is None or case.choice is None:
        yield dims
        return
    for index in range(case.choice.size):
        yield from _cases(domain, tuple(domain.choose(layout, case.choice, index) for layout in dims))


def _companions(domain: Domain, dims: Sequence[Layout], named: _Named) -> Generator[tuple[Atom, set[Atom]]]:
    """Yield every occurrence of an atom with the atoms that occur with it exactly once."""
    resolved = [domain.resolve(layout) for layout in dims]
    occurrences = [list(_paths(domain, layout, (), named)) for layout in resolved]
    total: dict[Atom, int] = {}
    for listed in occurrences:
        for atom, _ in listed:
            total[atom] = total.get(atom, 0) + 1
    # an axis of one product: every index of it stands for one unit of each factor
    whole = [set(_known(layout[0], named)) if len(layout) == 1 else set[Atom]() for layout in resolved]
    for axis, listed in enumerate(occurrences):
        elsewhere = {other for number, atoms in enumerate(whole) if number != axis for other in atoms}
        single = {other for other in elsewhere if total[other] == 1}
        for atom, path in listed:
            with_it = {other for other in path if path.count(other) == 1 and other is not atom}
            yield atom, with_it | (single - {atom})


def _paths(
    domain: Domain, layout: Layout, above: tuple[Atom, ...], named: _Named
) -> Generator[tuple[Atom, tuple[Atom, ...]]]:
    """Yield every occurrence of a named atom, with the named atoms of its product and of those around it."""
    for segment in domain.resolve(layout):
        path = above + tuple(_known(segment, named))
        for atom in segment:
            if atom.parts is not None:
                yield from _paths(domain, atom.parts, path, named)
            elif known := named.get(atom):
                yield known, path


def _known(segment: Sequence[Atom], named: _Named) -> list[Atom]:
    return [known for atom in segment if (known := named.get(atom))]


def _atoms(domain: Domain, layouts: Iterable[Layout], named: _Named) -> set[Atom]:
    return set(_known([atom for layout in layouts for atom in domain.leaves(layout)], named))
