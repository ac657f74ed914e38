"""Weight matching: coordinate descent on <this agent's weights, permuted peer's weights>.

One **move** reassigns the units of one tree of groups (a plain group; or heads together with the units in them)
while all others stay, which is a linear assignment. The peer's tensors are permuted as they are read, one at a time.

In two cases a move is not exact. If a group occurs twice in a tensor (the hidden units of an LSTM), a move is the best
step for the current gradient, taken only if it helps. If two children of one parent meet in a tensor (query heads of a
shared key head, and their units), they take turns, so that the parent's pairs are scored with the others' order fixed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor, nn

from dimat.errors import MergeError
from dimat.merge.matching.cells import Cell, Slot, cells, pair_up
from dimat.merge.matching.nested import GroupTree, assign_nested, nested_value, trees
from dimat.merge.models.batches import device_of
from dimat.merge.stages import Permutations, Weights
from dimat.merge.weight_views import PermutedWeights, StackedWeights, WeightsOn
from dimat.symmetry import compose_permutations
from dimat.symmetry.spec import AxisRef, SymmetrySpec
from dimat.symmetry.stacks import real_names

MOST_VISITS = 200
"""Visits of each move at most; a descent ends long before, but rounding must never make it go on for ever."""

_RELATIVE = {torch.float64: 1e-12}
"""By type of the sums: what counts as an improvement, as a share of the tensors' norms."""

_RELATIVE_SINGLE = 1e-7


@dataclass(frozen=True)
class Move:
    """Groups of one tree that are reassigned together; those of the tree in `held` keep their order.

    `curved`: one of its groups occurs twice in a tensor, so that its scores hold for small changes only.
    """

    tree: GroupTree
    free: frozenset[str]
    tensors: tuple[str, ...]
    curved: bool = False

    @cached_property
    def held(self) -> frozenset[str]:
        return frozenset(node.group.id for node in self.tree.nodes()) - self.free


class Matching:
    """The moves of a spec, and the axes of the counted tensors, by which they are scored."""

    def __init__(self, spec: SymmetrySpec, counted: Iterable[str], free: Collection[str] | None = None) -> None:
        """`counted`: names of tensors whose inner products count. `free`: groups that may move (None: all)."""
        self.spec = spec
        self.axes: dict[str, list[AxisRef]] = {}
        names = set(counted)
        for axis in spec.axes:
            if axis.tensor in names:
                self.axes.setdefault(axis.tensor, []).append(axis)
        self._parents = {group.id: group.parents for group in spec.groups}
        self._cut: dict[tuple[str, str], list[Cell]] = {}
        self.cells = {name: cells(axes) for name, axes in self.axes.items()}
        self.moves = [move for tree in trees(spec) for move in self._moves(tree, free)]

    def best(
        self,
        own: Weights,
        peer: Weights,
        start: Permutations,
        *,
        restarts: int = 0,
        generator: torch.Generator | None = None,
    ) -> tuple[Permutations, float]:
        """Return the best permutations found and their total, Σ over counted tensors of <own, permuted peer>.

        The first descent settles groups one by one, best anchored first (see `Descent.anchor`), and then improves;
        `restarts` more start from `start` and visit in random orders drawn from `generator`.
        """
        generator = generator or torch.Generator().manual_seed(0)
        descent = Descent(self, own, peer, start)
        descent.anchor()
        descent.improve(range(len(self.moves)))
        found, total = descent.permutations, descent.total()
        for _ in range(restarts):
            descent = Descent(self, own, peer, start)
            descent.improve(torch.randperm(len(self.moves), generator=generator).tolist())
            value = descent.total()
            if value > total:
                found, total = descent.permutations, value
        return found, total

    def places(self, move: Move, cell: Cell) -> list[tuple[str, list[int]]]:
        """Return the group of the move that a cell tells about, with the dimensions of its parents and its own.

        It is the innermost: what a cell says of its parents is in its blocks. A group that occurs twice has as many
        entries, each with the others as they stand.
        """
        present = [slot.group for slot in cell.slots if slot.group in move.free]
        if not present:
            return []
        group = max(present, key=lambda g: len(self._parents[g]))
        return [(group, [*self._above(cell, slot), slot.dim]) for slot in cell.slots if slot.group == group]

    def _above(self, cell: Cell, child: Slot) -> list[int]:
        """Return the dimensions of a slot's parents: those in its own axis where they are there."""
        dims: list[int] = []
        for parent in self._parents[child.group]:
            found = [slot for slot in cell.slots if slot.group == parent]
            dims.append(max(found, key=lambda slot: slot.axis == child.axis).dim)
        return dims

    def cut(self, tree: GroupTree, name: str) -> list[Cell]:
        """Return the cells of a tensor in which the axes without groups of a tree are whole."""
        key = (tree.group.id, name)
        if key not in self._cut:
            self._cut[key] = cells(self.axes[name], {id for n in tree.nodes() for id in (n.group.id, *n.group.parents)})
        return self._cut[key]

    def _moves(self, tree: GroupTree, free: Collection[str] | None) -> list[Move]:
        nodes = list(tree.nodes())
        inner = [node.group.id for node in nodes[1:]]
        classes: list[set[str]] = []
        for group in inner:
            # what meets in a cell is assigned in turns: one's scores depend on where the other is
            fits = (c for c in classes if not any(self._meet(group, other) for other in c))
            found = next(fits, None)
            if found is None:
                classes.append({group})
            else:
                found.add(group)
        moves: list[Move] = []
        for groups in classes or [set()]:
            allowed = frozenset(g for g in (tree.group.id, *groups) if free is None or g in free)
            tensors = {name: cs for name, cs in self.cells.items() if any(_holds(c, allowed) for c in cs)}
            if not tensors:
                continue
            move = Move(tree, allowed, tuple(tensors))
            curved = any(len(self.places(move, c)) > 1 for cs in tensors.values() for c in cs)
            moves.append(Move(tree, allowed, tuple(tensors), curved))
        return moves

    def _meet(self, one: str, other: str) -> bool:
        if one in self._parents[other] or other in self._parents[one]:
            return False
        return any({one, other} <= c.groups for cs in self.cells.values() for c in cs)


class Descent:
    """One descent: permutations of one peer's units, each move of which makes the total larger."""

    def __init__(self, matching: Matching, own: Weights, peer: Weights, start: Permutations) -> None:
        self.permutations: Permutations = dict(start)
        self._matching = matching
        self._own = own
        self._peer = peer
        self._versions = dict.fromkeys(matching.axes, 0)
        self._seen: dict[int, tuple[int, ...]] = {}

    def total(self) -> float:
        """Return Σ over counted tensors that something may move of <own, permuted peer>."""
        return self._inner(sorted({name for move in self._matching.moves for name in move.tensors}))

    def anchor(self) -> None:
        """Assign the groups one after the other by what is settled already, best anchored first.

        At first only frozen axes are settled (inputs, outputs, single vectors); with each group more is. The next
        one is that with the largest share of its entries in cells whose other groups are settled. Unlike a start at
        the peer's own order, this one does not depend on that order.
        """
        moves = self._matching.moves
        unsettled = {group for move in moves for group in move.free}
        entries = [self._entries(move) for move in moves]
        left = list(range(len(moves)))
        while left:
            shares = {i: _settled_share(entries[i], unsettled) for i in left}
            chosen = max(left, key=lambda i: shares[i])
            left.remove(chosen)
            move = moves[chosen]
            scores, _ = self._scores(move, unsettled if shares[chosen] else None)
            found, _ = assign_nested(move.tree, scores, move.held)
            self._apply(move, found)
            unsettled -= move.free

    def improve(self, order: Iterable[int]) -> None:
        """Visit moves in this order, again and again, until none makes the total larger."""
        order = list(order)
        for _ in range(MOST_VISITS):
            better = [self._visit(number) for number in order]
            if not any(better):
                return

    def _visit(self, number: int) -> bool:
        move = self._matching.moves[number]
        versions = tuple(self._versions[name] for name in move.tensors)
        if self._seen.get(number) == versions:
            return False  # nothing that it depends on has changed
        self._seen[number] = versions
        scores, least = self._scores(move)
        found, value = assign_nested(move.tree, scores, move.held)
        gain = value - nested_value(move.tree, scores, {})
        if gain <= least:
            return False
        before = dict(self.permutations)
        worth = self._inner(move.tensors) if move.curved else 0.0
        self._apply(move, found)
        if not move.curved:
            self._seen[number] = tuple(self._versions[name] for name in move.tensors)
        elif self._inner(move.tensors) - worth <= least:
            self.permutations = before
            self._versions.update(zip(move.tensors, versions))
            return False
        return True

    def _apply(self, move: Move, found: Permutations) -> None:
        self.permutations = compose_permutations(self.permutations, found, self._matching.spec)
        for name in move.tensors:
            self._versions[name] += 1

    def _scores(self, move: Move, unsettled: Collection[str] | None = None) -> tuple[dict[str, Tensor], float]:
        """Return, by group, what own units gain from each of the peer's (in their present order); and the least gain
        that is more than rounding. With `unsettled` groups, cells that hold one of them beside the move's do not count.
        """
        matching = self._matching
        scores: dict[str, Tensor] = {}
        least = 0.0
        peer = self._permuted()
        for name in move.tensors:
            if unsettled is None:
                counted = matching.cut(move.tree, name)
            else:
                counted = [c for c in matching.cells[name] if _anchored(c, move.free, unsettled)]
            if not counted:
                continue
            mine, other = _numbers(self._own[name]), _numbers(peer[name])
            kind = torch.promote_types(mine.dtype, other.dtype)
            least += _RELATIVE.get(kind, _RELATIVE_SINGLE) * float(mine.norm()) * float(other.norm())
            for cell in counted:
                for group, dims in matching.places(move, cell):
                    pairs = pair_up(cell.spread(mine).to(kind), cell.spread(other).to(kind), dims, move.tree.outer)
                    if not bool(pairs.isfinite().all()):
                        raise MergeError(
                            f"tensor {name!r} cannot be matched: its products with a peer's are not finite"
                        )
                    scores[group] = scores[group].add_(pairs) if group in scores else pairs
        return scores, least

    def _entries(self, move: Move) -> list[tuple[float, frozenset[str] | None]]:
        """Return the sizes of a move's cells, with the other groups in each; None where a group occurs twice."""
        found: list[tuple[float, frozenset[str] | None]] = []
        for name in move.tensors:
            uncut = self._own[name].numel() / prod(axis.size for axis in self._matching.axes[name])
            for cell in self._matching.cells[name]:
                if _holds(cell, move.free):
                    size = uncut * prod(len(term.index) for _, term in cell.parts)
                    found.append((size, _others(cell, move.free)))
        return found

    def _inner(self, names: Iterable[str]) -> float:
        peer = self._permuted()
        total = 0.0
        for name in names:
            mine, other = (_numbers(tensor).flatten() for tensor in (self._own[name], peer[name]))
            for left, right in zip(mine.split(1 << 20), other.split(1 << 20)):
                total += float(left.double() @ right.double())
        return total

    def _permuted(self) -> Mapping[str, Tensor]:
        return PermutedWeights(self._peer, self._matching.spec, self.permutations)


def _holds(cell: Cell, groups: Collection[str]) -> bool:
    return not cell.groups.isdisjoint(groups)


def _others(cell: Cell, free: Collection[str]) -> frozenset[str] | None:
    """Return the groups of a cell beside the free ones; None where one of those occurs twice."""
    present = [slot.group for slot in cell.slots]
    moving = [group for group in present if group in free]
    return frozenset(present) - frozenset(free) if len(moving) == len(set(moving)) else None


def _anchored(cell: Cell, free: Collection[str], unsettled: Collection[str]) -> bool:
    others = _others(cell, free)
    return others is not None and others.isdisjoint(unsettled)


def _settled_share(entries: Sequence[tuple[float, frozenset[str] | None]], unsettled: Collection[str]) -> float:
    held = sum(size for size, _ in entries)
    return sum(size for size, others in entries if others is not None and others.isdisjoint(unsettled)) / max(held, 1)


def _numbers(tensor: Tensor) -> Tensor:
    """Return a tensor in a type to multiply in: float32 or float64; complex numbers as pairs in a last dimension."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def fill_in(
    own: Weights,
    peers: Sequence[Weights],
    spec: SymmetrySpec,
    start: Sequence[Permutations],
    free: Sequence[set[str]],
    *,
    model: nn.Module | None,
    generator: torch.Generator,
    restarts: int = 0,
    buffers: bool = False,
) -> list[Permutations]:
    """Return each peer's permutations, those of its groups in `free` by weights while the others stay as in `start`.

    Each peer is matched with the same draws, whatever their order and number.
    """
    seed = int(torch.randint(1 << 62, (1,), generator=generator))
    counted = counted_tensors(spec, model, buffers)
    device = device_of(model)
    mine = StackedWeights(WeightsOn(own, device), spec)
    matchings: dict[frozenset[str], Matching] = {}
    found: list[Permutations] = []
    for peer, permutations, groups in zip(peers, start, free, strict=True):
        if not groups:
            found.append(dict(permutations))
            continue
        key = frozenset(groups)
        if key not in matchings:
            matchings[key] = Matching(spec, counted, key)
        draws = torch.Generator().manual_seed(seed)
        other = WeightsOn(peer, device)
        best, _ = matchings[key].best(mine, other, permutations, restarts=restarts, generator=draws)
        found.append(best)
    return found


def counted_tensors(spec: SymmetrySpec, model: nn.Module | None, buffers: bool) -> set[str]:
    """Return the tensors with moved axes that weight matching counts: parameters, and buffers if asked for.

    Without a model, buffers are recognised by the names in torch's normalisation layers.
    """
    behind = real_names(spec)
    sources = {axis.tensor: behind.get(axis.tensor, (axis.tensor,)) for axis in spec.axes}
    if buffers:
        return {*sources}
    if model is not None:
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        return {name for name, real in sources.items() if parameters.issuperset(real)}
    return {name for name, real in sources.items() if not real[0].endswith(("running_mean", "running_var"))}
