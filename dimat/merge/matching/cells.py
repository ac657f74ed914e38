"""Tensors cut into cells: blocks whose axes are products of units, for pairing units.

An axis that concatenates segments holds different units in each; a cell takes one segment of each such axis. Pairing
own units with a peer's, cell by cell, gives each pair's inner product over all that they share.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

from dimat.symmetry.permute import pieces
from dimat.symmetry.spec import AxisRef, Layout

COLUMNS = 2048
"""Products of this many entries are summed up in the tensors' own type, float32 mostly; sums of them in float64."""


@dataclass(frozen=True)
class Term:
    """A part of an axis that is a row-major product of factors: their groups (None: frozen) and sizes.

    `index` (entries,): which entries of the axis it holds.
    """

    groups: tuple[str | None, ...]
    sizes: tuple[int, ...]
    index: Tensor

    def part_of(self, tensor: Tensor, dim: int) -> Tensor:
        """Return the tensor's entries that lie in this part of axis `dim`; a view where they are neighbours."""
        first, count = int(self.index[0]), len(self.index)
        if count == int(self.index[-1]) - first + 1 and torch.equal(self.index, torch.arange(first, first + count)):
            return tensor.narrow(dim, first, count)
        return tensor.index_select(dim, self.index.to(tensor.device))


def terms(layout: Layout) -> list[Term]:
    """Return the parts of an axis."""
    return [
        Term(tuple(f.group for f in factors), tuple(f.size for f in factors), places.flatten())
        for factors, places in pieces(layout)
    ]


@dataclass(frozen=True)
class Slot:
    """A factor of a cell: its group, the tensor's axis, and the dimension of the tensor that `Cell.spread` gives."""

    group: str
    axis: int
    dim: int


@dataclass(frozen=True)
class Cell:
    """One part of some of a tensor's axes, the others whole."""

    parts: tuple[tuple[int, Term], ...]

    @cached_property
    def slots(self) -> list[Slot]:
        """Where the cell's groups are."""
        found: list[Slot] = []
        shift = 0
        for dim, term in self.parts:
            found += [Slot(g, dim, dim + shift + i) for i, g in enumerate(term.groups) if g is not None]
            shift += len(term.sizes) - 1
        return found

    @cached_property
    def groups(self) -> frozenset[str]:
        """The cell's groups."""
        return frozenset(slot.group for slot in self.slots)

    def spread(self, tensor: Tensor) -> Tensor:
        """Return the cell of a tensor, with a dimension for each factor."""
        for dim, term in self.parts:
            tensor = term.part_of(tensor, dim)
        for dim, term in reversed(self.parts):
            tensor = tensor.reshape(tensor.shape[:dim] + term.sizes + tensor.shape[dim + 1 :])
        return tensor


def cells(axes: Sequence[AxisRef], groups: Collection[str] | None = None) -> list[Cell]:
    """Return the cells of a tensor with these axes; axes that hold none of `groups` stay whole (None: all are cut)."""
    split: list[tuple[int, list[Term]]] = []
    for axis in sorted(axes, key=lambda axis: axis.dim):
        parts = terms(axis.layout)
        if groups is None or any(g in groups for part in parts for g in part.groups):
            split.append((axis.dim, parts))
    return [Cell(tuple(zip((dim for dim, _ in split), chosen))) for chosen in product(*(parts for _, parts in split))]


def pair_up(own: Tensor, peer: Tensor, slots: Sequence[int], blocks: int = 1) -> Tensor:
    """Return inner products of own's units with a peer's: (units, units), float64, on the CPU.

    The units are those of dimensions `slots`, row-major; all other dimensions are summed over. With several `blocks`,
    runs of equally many units, only pairs within one block are computed: (blocks, units of each, units of each).
    """
    x, y = (_rows(tensor, slots).unflatten(0, (blocks, -1)) for tensor in (own, peer))
    total = torch.zeros(blocks, x.shape[1], y.shape[1], dtype=torch.float64)
    for left, right in zip(x.split(COLUMNS, 2), y.split(COLUMNS, 2)):
        total += torch.bmm(left, right.mT).cpu().double()
    return total if blocks > 1 else total[0]


def _rows(tensor: Tensor, slots: Sequence[int]) -> Tensor:
    moved = tensor.movedim(tuple(slots), tuple(range(len(slots))))
    units = moved.shape[: len(slots)].numel()
    return moved.reshape(units, -1)
