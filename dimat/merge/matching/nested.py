"""Nested assignments: which head of a peer is which, and which unit in each of these heads.

A group with parents has a permutation of its own for each of their units: of shape (*parents' sizes, units), where
merged unit (h, j) is old unit (p_H[h], p_D[h, j]). Groups and their children make trees; plain groups are trees of one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from dimat.merge.matching.assignment import assign, assignment_value, margin
from dimat.merge.stages import Permutations
from dimat.symmetry.spec import Group, SymmetrySpec

EXACT = 256
"""Units inside one of a parent's up to which pairs of those are judged by their best assignment."""


@dataclass(frozen=True)
class GroupTree:
    """A group and the trees of its children: groups whose parents are its own and, last, the group itself.

    `above`: sizes of its parents.
    """

    group: Group
    above: tuple[int, ...]
    children: tuple[GroupTree, ...] = ()

    @property
    def outer(self) -> int:
        """Units of the parents, all in all; 1 for plain groups."""
        return prod(self.above)

    def ids(self) -> list[str]:
        """Return the ids of its groups, parents first."""
        return [node.group.id for node in self.nodes()]

    def nodes(self) -> Iterator[GroupTree]:
        """Yield this tree and all below it, parents first."""
        yield self
        for child in self.children:
            yield from child.nodes()


def trees(spec: SymmetrySpec) -> list[GroupTree]:
    """Return the spec's groups as trees, in the order of their roots.

    A group is a child of the last of its parents where that moves and has all the others as its own; else a root.
    """
    groups = {group.id: group for group in spec.groups}
    sizes = spec.sizes
    below: dict[str, list[Group]] = {}
    roots: list[Group] = []
    for group in spec.groups:
        last = groups.get(group.parents[-1]) if group.parents else None
        if last is not None and last.parents == group.parents[:-1]:
            below.setdefault(group.parents[-1], []).append(group)
        else:
            roots.append(group)

    def grow(group: Group) -> GroupTree:
        above = tuple(sizes[parent] for parent in group.parents)
        return GroupTree(group, above, tuple(grow(child) for child in below.get(group.id, ())))

    return [grow(root) for root in roots]


def assign_nested(
    tree: GroupTree, scores: Mapping[str, Tensor], held: Collection[str] = ()
) -> tuple[Permutations, float]:
    """Return the permutations of a tree's groups that maximise the sum of their scores, and that sum.

    scores[group]: (outer · units, outer · units), finite; row = own unit, column = peer's, each counted row-major by
    parents and unit; a group left out scores 0 everywhere. Where the root has parents, (their units, n, n) will do:
    pairs within one of their units only. A parent's pair (h, h') is worth its own score and, for
    every child, the best assignment within block (h, h'). Groups in `held` keep their order within their parents and
    are left out of the result. A root that has parents is assigned within theirs as they stand.
    """
    solver = _Solver(scores, held)
    value = 0.0
    for unit in range(tree.outer):
        value += solver.settle(tree, unit, unit)
    found: Permutations = {}
    for node in tree.nodes():
        rows = solver.rows.get(node.group.id)
        if rows is not None:
            found[node.group.id] = torch.stack([rows[unit] for unit in range(node.outer)]).view(*node.above, -1)
    return found, value


class _Solver:
    def __init__(self, scores: Mapping[str, Tensor], held: Collection[str]) -> None:
        self._scores = {group: s.to("cpu", torch.float64) for group, s in scores.items()}
        self._held = held
        self.rows: dict[str, dict[int, Tensor]] = {}

    def settle(self, tree: GroupTree, own: int, peer: int) -> float:
        """Assign within own's unit and the peer's of the parents; note permutations; return what they are worth."""
        size = tree.group.size
        if tree.group.id in self._held:
            value = float(self._block(tree, own, peer).diagonal().sum())
            permutation = torch.arange(size)
        else:
            pairs = self._pairs(tree, own, peer)
            permutation = assign(pairs)
            value = assignment_value(pairs, permutation)
            self.rows.setdefault(tree.group.id, {})[own] = permutation
        for child in tree.children:
            for j, i in enumerate(permutation.tolist()):
                inner = self.settle(child, own * size + j, peer * size + i)
                value += inner if tree.group.id in self._held else 0.0  # else it is in the pairs' worth already
        return value

    def _pairs(self, tree: GroupTree, own: int, peer: int) -> Tensor:
        """Return the worth of each pair of units, with the best assignments of those below: (units, units)."""
        pairs = self._block(tree, own, peer)
        size = tree.group.size
        if any(node.group.id in self._scores for child in tree.children for node in child.nodes()):
            below = [
                [self._best(tree.children, own * size + j, peer * size + i) for i in range(size)] for j in range(size)
            ]
            pairs = pairs + torch.tensor(below, dtype=torch.float64)
        return pairs

    def _best(self, children: tuple[GroupTree, ...], own: int, peer: int) -> float:
        total = 0.0
        for child in children:
            if child.group.id in self._held:
                size = child.group.size
                total += float(self._block(child, own, peer).diagonal().sum())
                total += sum(self._best(child.children, own * size + j, peer * size + j) for j in range(size))
            else:
                pairs = self._pairs(child, own, peer)
                # of very many units the best partner of each will do, to tell which of the parents' units go together
                total += assignment_value(pairs, assign(pairs)) if len(pairs) <= EXACT else float(pairs.amax(1).sum())
        return total

    def _block(self, tree: GroupTree, own: int, peer: int) -> Tensor:
        size = tree.group.size
        if tree.group.id not in self._scores:
            return torch.zeros(size, size, dtype=torch.float64)
        whole = self._scores[tree.group.id]
        if whole.ndim == 3:  # both lie in one unit of the root's parents
            number, own = divmod(own, whole.shape[1] // size)
            peer -= number * (whole.shape[1] // size)
            whole = whole[number]
        return whole[own * size : (own + 1) * size, peer * size : (peer + 1) * size]


def flat_permutations(tree: GroupTree, permutations: Mapping[str, Tensor]) -> Permutations:
    """Return, by group, where each unit comes from, units counted row-major by parents and unit: (outer · units,)."""
    flat: Permutations = {}

    def fill(node: GroupTree, above: Tensor) -> None:
        size = node.group.size
        p = permutations.get(node.group.id, torch.arange(size).expand(*node.above, size))
        flat[node.group.id] = (above.unsqueeze(1) * size + p.reshape(-1, size)).flatten()
        for child in node.children:
            fill(child, flat[node.group.id])

    fill(tree, torch.arange(tree.outer))
    return flat


def nested_value(tree: GroupTree, scores: Mapping[str, Tensor], permutations: Mapping[str, Tensor]) -> float:
    """Return what permutations of a tree's groups are worth; groups without one stay in their order."""
    flat = flat_permutations(tree, permutations)
    return sum(_value(s.double(), flat[group]) for group, s in scores.items())


def _value(scores: Tensor, flat: Tensor) -> float:
    if scores.ndim == 2:
        return assignment_value(scores, flat)
    blocks, size, _ = scores.shape
    inside = flat.view(blocks, size) - size * torch.arange(blocks).unsqueeze(1)
    return sum(assignment_value(block, p) for block, p in zip(scores, inside))


def nested_margin(tree: GroupTree, scores: Mapping[str, Tensor], permutations: Mapping[str, Tensor]) -> float:
    """Return the smallest `margin` of the tree's groups that have scores, units of all parents side by side."""
    flat = flat_permutations(tree, permutations)
    return min(margin(s, flat[group]) for group, s in scores.items())
