"""Laws of the layout domain, on random layouts. Reference: what layouts mean, index by index (`meaning`)."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dimat.symmetry.atoms import Atom, Frozen, Layout, LayoutError, layout_size
from dimat.symmetry.layout import Domain

_WHY = Frozen("test")
atoms = st.builds(lambda size, still: Atom(size, _WHY if still else None), st.integers(1, 6), st.booleans())
layouts = st.lists(st.lists(atoms, max_size=3).map(tuple), min_size=1, max_size=3).map(tuple)


def is_frozen(domain: Domain, layout: Layout) -> bool:
    """Tell whether no index of the axis may move."""
    return all(atom.frozen for atom in domain.leaves(layout))


def meaning(domain: Domain, layout: Layout, seed: int) -> Tensor:
    """Return the index by which an axis is permuted when every free atom gets a permutation, by its identity."""
    parts: list[Tensor] = []
    offset = 0
    for segment in domain.resolve(layout):
        index = torch.arange(prod(atom.size for atom in segment)).view([atom.size for atom in segment])
        for position, atom in enumerate(segment):
            if atom.parts is not None:
                index = index.index_select(position, meaning(domain, atom.parts, seed))
            elif atom.frozen is None:
                generator = torch.Generator().manual_seed(seed * 7919 + id(atom) % 1000003)
                index = index.index_select(position, torch.randperm(atom.size, generator=generator))
        parts.append(index.flatten() + offset)
        offset += index.numel()
    return torch.cat(parts)


@settings(max_examples=200, deadline=None)
@given(layouts, st.integers(0, 9))
def test_resolve_keeps_the_size(layout: Layout, seed: int) -> None:
    """Reference: the sum of products of atom sizes; the meaning is a permutation of that many indices."""
    domain = Domain()
    assert layout_size(domain.resolve(layout)) == layout_size(layout)
    assert meaning(domain, layout, seed).sort().values.tolist() == list(range(layout_size(layout)))


@settings(max_examples=200, deadline=None)
@given(layouts, layouts, st.integers(0, 9))
def test_unify_makes_two_axes_move_alike(one: Layout, other: Layout, seed: int) -> None:
    """Reference: after unify, any choice of permutations moves both axes by the same index; sizes stay."""
    domain = Domain()
    size = min(layout_size(one), layout_size(other))
    one, other = domain.slice(one, 0, size), domain.slice(other, 0, size)
    domain.unify(one, other)
    for _ in range(2):  # resolving one may freeze what the other shares
        domain.resolve(one), domain.resolve(other)
    assert layout_size(domain.resolve(one)) == layout_size(domain.resolve(other)) == size
    assert torch.equal(meaning(domain, one, seed), meaning(domain, other, seed))


@settings(max_examples=200, deadline=None)
@given(layouts, st.data())
def test_cut_is_undone_by_concat(layout: Layout, data: st.DataObject) -> None:
    """Reference: a cut axis moves piece by piece, so that no index crosses the boundary."""
    domain = Domain()
    at = data.draw(st.integers(0, layout_size(layout)))
    left, right = domain.cut(layout, at)
    assert (layout_size(left), layout_size(right)) == (at, layout_size(layout) - at)
    whole = domain.concat([left, right])
    for _ in range(2):
        domain.resolve(whole), domain.resolve(layout)
    index = meaning(domain, layout, 3)
    assert torch.equal(index, meaning(domain, whole, 3))
    assert bool((index[:at] < at).all())


@settings(max_examples=200, deadline=None)
@given(st.lists(layouts, min_size=1, max_size=3), st.integers(0, 9))
def test_factor_undoes_merge(axes: list[Layout], seed: int) -> None:
    """Reference: flattening axes and splitting them again gives axes that move as before."""
    domain = Domain()
    sizes = [layout_size(axis) for axis in axes]
    again = domain.factor(domain.merge(axes), sizes)
    for case in [case for axis in again for case in domain.cases_of(axis)]:
        domain.settle(case)
    for _ in range(2):
        for axis in (*axes, *again):
            domain.resolve(axis)
    assert [layout_size(axis) for axis in again] == sizes
    for axis, back in zip(axes, again):
        if not is_frozen(domain, back):
            assert torch.equal(meaning(domain, axis, seed), meaning(domain, back, seed))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_reshape_moves_entries_as_the_tensor_does(shape: list[int], data: st.DataObject) -> None:
    """Reference: permuting a tensor's axes and viewing it equals viewing it and permuting by the new axes."""
    domain = Domain()
    count = prod(shape)
    divisors = [d for d in range(1, count + 1) if count % d == 0]
    first = data.draw(st.sampled_from(divisors))
    second = data.draw(st.sampled_from([d for d in divisors if (count // first) % d == 0]))
    target = [first, second, count // first // second]
    old = [domain.fresh(size) for size in shape]
    new = domain.reshape(old, target)
    tensor = torch.arange(count).view(shape)
    for layout, dim in zip(old, range(len(shape))):
        tensor = tensor.index_select(dim, meaning(domain, layout, 5))
    viewed = torch.arange(count).view(target)
    for dim, layout in enumerate(new):
        viewed = viewed.index_select(dim, meaning(domain, layout, 5))
    assert torch.equal(tensor.view(target), viewed)


def test_unify_refuses_axes_of_different_sizes() -> None:
    """Reference: only axes of one size can be permuted alike."""
    domain = Domain()
    with pytest.raises(LayoutError, match="sizes 3 and 4"):
        domain.unify(domain.fresh(3), domain.fresh(4))


def test_frozen_axis_freezes_the_other_with_its_reason() -> None:
    """Reference: one side entirely frozen freezes the other, which reports the first cause."""
    domain = Domain()
    free = domain.fresh(6)
    domain.unify(free, domain.fixed(6, Frozen("model input", "x")))
    assert is_frozen(domain, free)
    assert domain.resolve(free)[0][0].frozen == Frozen("model input", "x")


def test_channels_flattened_with_positions_keep_their_group() -> None:
    """Reference: flatten(C, H·W) moves in blocks of H·W, once for each channel (LeNet's first linear layer)."""
    domain = Domain()
    channels, linear = domain.fresh(5), domain.fresh(20)
    flat = domain.merge([channels, domain.fixed(2, _WHY), domain.fixed(2, _WHY)])
    domain.unify(linear, flat)
    segment = domain.resolve(linear)[0]
    assert [atom.size for atom in segment] == [5, 4]
    assert segment[0] is domain.resolve(channels)[0][0]


def test_pieces_of_an_axis_are_told_apart_by_their_number() -> None:
    """Reference: (3, heads, units) of three different pieces: piece i is what index i of the first axis chooses."""
    domain = Domain()
    pieces = [domain.fresh(12) for _ in range(3)]
    first, heads, units = domain.factor(domain.concat(pieces), [3, 3, 4])
    choice = domain.choice_of(first)
    assert choice is not None
    for index, piece in enumerate(pieces):
        chosen = [domain.choose(layout, choice, index) for layout in (heads, units)]
        assert domain.resolve(domain.merge(chosen)) == domain.resolve(piece)
    assert domain.resolve(domain.merge([first, heads, units])) == domain.resolve(domain.concat(pieces))
    assert len({atom for piece in pieces for atom in domain.leaves(piece)}) == 6


def test_a_case_that_is_settled_ties_its_layouts() -> None:
    """Reference: without the axis that chooses, entry j of all pieces is one entry: they move alike."""
    domain = Domain()
    pieces = [domain.fresh(5) for _ in range(2)]
    _, inner = domain.factor(domain.concat(pieces), [2, 5])
    (case,) = domain.cases_of(inner)
    domain.settle(case)
    assert domain.resolve(pieces[0]) == domain.resolve(pieces[1]) == domain.resolve(inner)


def test_a_concatenation_below_a_free_factor_is_kept() -> None:
    """Reference: heads × (query, key, value): cut inside each head, no piece is tied to another or frozen."""
    domain = Domain()
    axis = domain.fresh(2 * 9)
    heads, inner = domain.factor(axis, [2, 9])
    parts = [domain.slice(inner, start, start + 3) for start in (0, 3, 6)]
    (segment,) = domain.resolve(axis)
    assert [atom.size for atom in segment] == [2, 9]
    assert segment[1].parts is not None
    assert len({*domain.leaves(axis)}) == 4
    assert domain.resolve(domain.merge([heads, domain.concat(parts)]))[0][0] is segment[0]
    assert not is_frozen(domain, axis)
