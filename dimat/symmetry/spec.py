"""The result of a symmetry derivation: which axes of which tensors move together.

Plain frozen data, JSON-serialisable, so that a spec can be cached, compared between peers and shown. `derive.py`
derives specs, `permute.py` applies them. Terms: a *unit* is one channel, neuron or head; a *group* is the set of
(tensor, axis) pairs that must be permuted together.

An axis has a **layout**: an ordered concatenation of segments, each a row-major product of factors. A
factor belongs to a group (`Factor.group`) or is frozen (`None`). `("a", 3) × ("b", 4)` followed by a frozen
factor of size 2 describes an axis of 14 entries: 12 indexed as `i_a * 4 + i_b`, then 2 that never move.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import Literal

from blake3 import blake3

from dimat.reading import as_type, parse_json


@dataclass(frozen=True, slots=True)
class Factor:
    """One factor of a segment: `size` indices that move as group `group`, or never (`None`).

    A nested factor has `parts` instead: a separate layout for every index of the factors before it, for example if an
    axis is heads × (query, key, value).
    """

    size: int
    group: str | None = None
    parts: Layout | None = None


Segment = tuple[Factor, ...]
Layout = tuple[Segment, ...]


def groups_in(layout: Layout) -> set[str]:
    """Return the ids of the groups in an axis."""
    factors = [factor for segment in layout for factor in segment]
    nested = [groups_in(factor.parts) for factor in factors if factor.parts is not None]
    return {factor.group for factor in factors if factor.group is not None}.union(*nested)


@dataclass(frozen=True, slots=True)
class AxisRef:
    """Axis `dim` of the parameter or buffer named `tensor`, and the layout of its indices in group units."""

    tensor: str
    dim: int
    layout: Layout

    @property
    def size(self) -> int:
        return sum(prod(f.size for f in segment) for segment in self.layout)


@dataclass(frozen=True, slots=True)
class ObservationPoint:
    """A place in the traced graph where the units of a group can be seen.

    The output of graph node `node` (its first, if it has several) is narrowed to `length` entries from
    `start` along `dim`; that axis is then viewed as `factors` (row-major), of which number `position` runs
    over the group's units and those numbered in `outer` over its parents' (in the order of `Group.parents`). All
    other axes and factors are samples. `pre_activation` tells whether the node comes before the group's first
    non-linearity.
    """

    node: str
    dim: int
    start: int
    length: int
    factors: tuple[int, ...]
    position: int
    pre_activation: bool = False
    outer: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Group:
    """A symmetry group: `size` units that may be permuted freely, everywhere at once.

    A permutation of a group is an int64 tensor (size,); of one with parents (sizes of the parents…, size): one for
    each of their units, numbered as they are after the parents' own permutation.

    `id` is `<tensor>/<dim>`, or `<tensor>/<dim>+<offset>`, of the group's smallest (tensor, dim, offset), so it is the
    same at every peer; `.<k>` is appended if the group is factor k > 0 of a product there. `parents` names the groups
    (including those in `numbered`) for each of whose units this one has a separate permutation (heads); empty for plain
    groups. `axes` lists every (tensor, dim) in which the group occurs.
    """

    id: str
    size: int
    axes: tuple[tuple[str, int], ...]
    parents: tuple[str, ...] = ()
    points: tuple[ObservationPoint, ...] = ()
    method: Literal["activation", "weight"] = "activation"


@dataclass(frozen=True, slots=True)
class FrozenAxis:
    """An axis (or part of it) of a parameter or buffer that never moves, and why (`node`: where it was decided).

    `entries`: the number of entries of the axis that stay for that reason, and might move without it. Entries do not
    count if no symmetry could move them (`dimat.symmetry.coverage`), or if another factor in the same product moves.
    """

    tensor: str
    dim: int
    reason: str
    node: str = ""
    entries: int = 0


@dataclass(frozen=True, slots=True)
class UnknownOp:
    """An operation without a transfer rule: all axes it touched were frozen.

    `node`: its name in the graph; `location`: `file:line` of the user's code; `parameters_share`: elements of the
    parameters that it touched, as a share of all.
    """

    op: str
    node: str
    location: str
    parameters_share: float


@dataclass(frozen=True, slots=True)
class Stack:
    """Stacked tensors of one shape, as a tensor that only the spec knows.

    The first axis of `tensor` numbers `sources`: the units of its group are whole tensors (the experts of a list of
    modules). No tensor is in two stacks, and those in one have no axes of their own in the spec.
    """

    tensor: str
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SymmetrySpec:
    """Symmetry groups of one architecture.

    `axes` has one entry for each (tensor, dim) that holds at least one group; tensors not named there are never
    permuted. `tied` lists sets of names that are one tensor (permuted once). `arch_hash` is a hex blake3 of names,
    shapes, dtypes and the traced graph: equal hashes mean that specs are interchangeable. The graph differs between
    versions of torch, so that hash is for one machine; machines compare `groups_hash`. `coverage` is the share of
    parameters' entries, counted axis by axis, that moves (`dimat.symmetry.coverage`). `outputs` are the flat indices of
    the model outputs that the groups leave unchanged. `numbered` are groups that never move and are not symmetries:
    their units are distinguished by number, and only serve as parents. `stacks` are tensors that axes and groups name
    and that no state dict holds, with the tensors in them.
    """

    groups: tuple[Group, ...]
    axes: tuple[AxisRef, ...]
    frozen: tuple[FrozenAxis, ...] = ()
    unknown_ops: tuple[UnknownOp, ...] = ()
    tied: tuple[tuple[str, ...], ...] = ()
    trace_kind: Literal["export", "make_fx", "none"] = "export"
    arch_hash: str = ""
    coverage: float = 0.0
    warnings: tuple[str, ...] = field(default=())
    outputs: tuple[int, ...] = ()
    numbered: tuple[Group, ...] = ()
    stacks: tuple[Stack, ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        """Units of each group, and of each of `numbered`, by id."""
        return {group.id: group.size for group in (*self.groups, *self.numbered)}

    def group(self, group_id: str) -> Group:
        """Return the group with this id, or raise KeyError."""
        for group in self.groups:
            if group.id == group_id:
                return group
        raise KeyError(group_id)

    @property
    def groups_hash(self) -> str:
        """Hex blake3 of the sets of tensor entries that move together, on which agents that align must agree.

        It holds each moved axis with its layout, and each group with its size and parents; groups go by the order in
        which the axes, sorted by tensor and dim, name them first. The way of tracing, and the names of groups and graph
        nodes, are not included.
        """
        axes = sorted(self.axes, key=lambda axis: (axis.tensor, axis.dim))
        numbers: dict[str, int] = {}
        lines = [f"{axis.tensor!r} {axis.dim} {_spelled(axis.layout, numbers)}" for axis in axes]
        known = {group.id: group for group in (*self.groups, *self.numbered)}
        still = {group.id for group in self.numbered}
        # a group without an axis would be none; one that only its parents name comes last
        for group_id in sorted(known.keys() - numbers.keys()):
            numbers[group_id] = len(numbers)
        for group_id, number in numbers.items():
            group = known[group_id]
            parents = [numbers[parent] for parent in group.parents]
            lines.append(f"{number}: {group.size} {parents}" + " still" * (group_id in still))
        lines += [f"{stack.tensor!r}: {stack.sources!r}" for stack in self.stacks]
        return blake3("\n".join(lines).encode()).hexdigest()

    def to_json(self) -> str:
        """Return the spec as JSON text; `from_json` is its inverse."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> SymmetrySpec:
        """Rebuild a spec from `to_json` text; ValueError if it is something else."""
        return as_type(SymmetrySpec, parse_json(text))


def with_hash(spec: SymmetrySpec, digest: str) -> SymmetrySpec:
    """Return the spec with the hash of its groups and the digest of its trace."""
    groups = [(group.id, group.size) for group in spec.groups]
    told = (digest, spec.outputs, groups, spec.axes, *([spec.stacks] if spec.stacks else []))
    return replace(spec, arch_hash=blake3(repr(told).encode()).hexdigest())


def _spelled(layout: Layout, numbers: dict[str, int]) -> str:
    """Return a layout as text, with groups by number (new ones get the next); adjacent frozen segments are one
    piece."""
    said: list[str] = []
    still = 0
    for segment in layout:
        if not any(factor.group is not None or factor.parts is not None for factor in segment):
            still += prod(factor.size for factor in segment)
            continue
        if still:
            said.append(str(still))
            still = 0
        said.append("*".join(_factors(segment, numbers)))
    if still:
        said.append(str(still))
    return "+".join(said)


def _factors(segment: Segment, numbers: dict[str, int]) -> list[str]:
    said: list[str] = []
    still = 1
    for factor in segment:
        if factor.group is None and factor.parts is None:
            still *= factor.size
            continue
        if still > 1:
            said.append(str(still))
            still = 1
        if factor.parts is not None:
            said.append(f"({_spelled(factor.parts, numbers)})")
        elif factor.group is not None:
            said.append(f"g{numbers.setdefault(factor.group, len(numbers))}")
    if still > 1:
        said.append(str(still))
    return said
