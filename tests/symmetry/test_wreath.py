"""Units inside heads: which groups have a permutation of their own for each unit of another, and how it is applied."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimat.symmetry import derive_symmetry, permute_weights, random_permutations, verify_symmetry
from dimat.symmetry.spec import SymmetrySpec, groups_in


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Attention(nn.Module):
    """One layer in the spelling asked for; 3 heads of 4 units (2 key heads of 3 for "gqa" with 4 query heads)."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.into = nn.Linear(5, 12)
        fused = spelling in ("3HD", "H3D", "chunk")
        if fused:
            self.qkv = nn.Linear(12, 36)
        else:
            pairs = 6 if spelling == "gqa" else 12
            self.q, self.k, self.v = nn.Linear(12, 12), nn.Linear(12, pairs), nn.Linear(12, pairs)
        if spelling == "shared":
            self.scale = nn.Parameter(torch.randn(4))
        if spelling == "mixed":
            self.talk = nn.Linear(3, 3)
        self.out = nn.Linear(12, 12)
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        b, n, _ = x.shape
        if self.spelling == "3HD":
            q, k, v = self.qkv(x).view(b, n, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.spelling == "H3D":
            q, k, v = self.qkv(x).view(b, n, 3, 12).transpose(1, 2).chunk(3, -1)
        elif self.spelling == "chunk":
            q, k, v = (part.unflatten(-1, (3, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        elif self.spelling == "gqa":
            q = self.q(x).view(b, n, 4, 3).transpose(1, 2)
            k, v = (layer(x).view(b, n, 2, 3).transpose(1, 2) for layer in (self.k, self.v))
            x = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            return self.head(self.out(x.transpose(1, 2).flatten(2)).amax(1))
        else:
            q, k, v = (layer(x).view(b, n, 3, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.spelling == "shared":
            q = q * self.scale
        scores = q @ k.mT / 2
        if self.spelling == "mixed":
            scores = self.talk(scores.movedim(1, -1)).movedim(-1, 1)
        x = scores.softmax(-1) @ v
        return self.head(self.out(x.transpose(1, 2).flatten(2)).amax(1))


def _derived(spelling: str) -> tuple[Attention, Tensor, SymmetrySpec]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = Attention(spelling).eval(), torch.randn(2, 6, 5)
    return model, inputs, derive_symmetry(model, inputs)


@pytest.mark.parametrize("spelling", ["split", "3HD", "H3D", "chunk"])
def test_heads_and_units_inside_them_are_found_in_every_spelling(spelling: str) -> None:
    """Reference: by hand. The stream (12) and what leaves attention (12), heads (3), and inside each head the units
    that query and key share and those of value (4 each)."""
    model, inputs, spec = _derived(spelling)
    assert sorted(group.size for group in spec.groups) == [3, 4, 4, 12, 12]
    heads = next(group for group in spec.groups if group.size == 3)
    inner = [group for group in spec.groups if group.size == 4]
    assert [group.parents for group in inner] == [(heads.id,), (heads.id,)]
    assert not heads.parents
    assert verify_symmetry(model, spec, inputs, generator()) < 1e-12
    assert all(group.points for group in inner) or spelling == "H3D"


def test_query_heads_that_share_a_key_head() -> None:
    """Reference: by hand: key heads (2), query heads inside each (2), units of value inside each key head (3) and of
    query and key (3), each with a permutation of its own per key head."""
    model, inputs, spec = _derived("gqa")
    outer = next(group for group in spec.groups if group.size == 2 and not group.parents)
    nested = [group for group in spec.groups if group.parents == (outer.id,)]
    assert sorted(group.size for group in nested) == [2, 3, 3]
    assert verify_symmetry(model, spec, inputs, generator()) < 1e-12


def test_a_vector_shared_by_all_heads_forbids_units_of_their_own() -> None:
    """Reference: a scale per unit of the query, the same for all heads: only value's units are each head's own."""
    model, inputs, spec = _derived("shared")
    inner = [group for group in spec.groups if group.size == 4]
    assert sorted(bool(group.parents) for group in inner) == [False, True]
    assert verify_symmetry(model, spec, inputs, generator()) < 1e-12


def test_heads_that_are_mixed_are_two_groups() -> None:
    """Reference: talking heads: scores have the heads of query and key, what they become those of value."""
    model, inputs, spec = _derived("mixed")
    heads = [group for group in spec.groups if group.size == 3]
    assert len(heads) == 2
    assert {group.parents for group in spec.groups if group.size == 4} == {(heads[0].id,), (heads[1].id,)}
    assert verify_symmetry(model, spec, inputs, generator()) < 1e-12


class Norms(nn.Module):
    """Sums over heads in two ways: a softmax over heads for each unit, or a mean over heads."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.into, self.out = nn.Linear(5, 12), nn.Linear(12 if how == "softmax" else 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x).view(-1, 3, 4)
        x = x.softmax(1).flatten(1) if self.how == "softmax" else torch.relu(x).mean(1)
        return self.out(x)


@pytest.mark.parametrize("how", ["softmax", "mean"])
def test_heads_that_are_combined_unit_by_unit_forbid_units_of_their_own(how: str) -> None:
    """Reference: what combines unit j of all heads needs the same units at j in each."""
    model, inputs = Norms(how).eval(), torch.randn(3, 5)
    spec = derive_symmetry(model, inputs)
    assert [group.parents for group in spec.groups if group.size == 4] == [()]
    assert verify_symmetry(model, spec, inputs, generator()) < 1e-12


def test_merged_unit_is_old_unit_by_both_permutations() -> None:
    """Reference: row (h, j) of the value layer becomes old row (p_H[h], p_D[h, j]), by hand."""
    model, _, spec = _derived("split")
    p = random_permutations(spec, generator(1))
    state = model.state_dict()
    moved = permute_weights(state, spec, p)
    axis = next(axis for axis in spec.axes if (axis.tensor, axis.dim) == ("v.bias", 0))
    heads, units = (factor.group or "" for factor in axis.layout[0])
    assert p[units].shape == (3, 4)
    assert groups_in(axis.layout) == {heads, units}
    for h, j in itertools.product(range(3), range(4)):
        assert moved["v.bias"][4 * h + j] == state["v.bias"][4 * p[heads][h] + p[units][h, j]]


class Einsum(nn.Module):
    """Projections as (heads, units, inputs): heads and units on axes of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(3, 4, 6)) for _ in range(3))
        self.out = nn.Parameter(torch.randn(6, 3, 4))
        self.into, self.head = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        q, k, v = (torch.einsum("bni,hdi->bhnd", x, w) for w in (self.q, self.k, self.v))
        x = torch.einsum("bhnd,ohd->bno", (q @ k.mT).softmax(-1) @ v, self.out)
        return self.head(x.amax(1))


def test_heads_on_an_axis_of_their_own() -> None:
    """Reference: float64; the permutation of units reads the head from another axis of the same tensor."""
    model, inputs = Einsum().eval(), torch.randn(2, 6, 5)
    spec = derive_symmetry(model, inputs)
    assert sorted((group.size, len(group.parents)) for group in spec.groups) == [(3, 0), (4, 1), (4, 1), (6, 0), (6, 0)]
    assert verify_symmetry(model, spec, inputs, generator()) < 1e-12
