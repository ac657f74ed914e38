"""The types that the stages of a merge take and return, and their CPU time.

    align(own, peers, *, …)             -> Aligned    one set of permutations per peer
    combine(own, peers, weights, *, …)  -> Weights    one state dict, which may be lazy; `weights` lists self first
    repair(weights, *, …)               -> Repaired   the same weights with what averaging broke estimated anew
    accept(own, merged, *, …)           -> Accepted   the weights to go on with

`own`, `peers` and `merged` are mappings from tensor names to tensors; peers may be files that are read one
tensor at a time, so a method asks for a tensor once and releases it. No method changes its arguments. A combine
method may return a mapping that merges a tensor when it is asked for it (`dimat.merge.tensors.streaming`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from time import process_time

from torch import Tensor

from dimat.symmetry.spec import ObservationPoint

Weights = Mapping[str, Tensor]
"""Tensor name → tensor: a state dict, or a lazily read file of one."""

Permutations = dict[str, Tensor]
"""Group id → int64 tensor p: unit j of the result is unit p[j] of what is permuted; of groups with parents, one such
row for each of the parents' units (see dimat.symmetry.permute). Groups left out stay put."""

Inputs = tuple[Tensor, ...]
"""Positional arguments of the model, each with examples along dim 0."""

Data = Iterable[Inputs]
"""Batches of model inputs; can be iterated more than once."""

Points = Mapping[str, Sequence[ObservationPoint | str]]
"""Group id → where to observe it: observation points of the spec, or names of their graph nodes."""

Score = Callable[[Weights], float]
"""Judges weights on a named set; higher is better."""

PutAway = Callable[[Tensor], Tensor]
"""Puts a tensor away, out of memory, and returns it as one that is read from there."""


@dataclass(frozen=True)
class Aligned:
    """Result of align. `permutations[k]` brings peer k into own's basis; `images`: examples used;
    `cpu_s`: CPU seconds by part of the work."""

    permutations: list[Permutations]
    images: int = 0
    notes: tuple[str, ...] = ()
    cpu_s: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class Repaired:
    """Result of repair. `images`: examples used."""

    weights: dict[str, Tensor]
    images: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Accepted:
    """Result of accept. `share`: how far the weights are on the way from own (0) to merged (1)."""

    weights: dict[str, Tensor]
    share: float
    notes: tuple[str, ...] = ()


class StageTimer:
    """CPU seconds by part of the work: of this process (all its threads), or by another `clock`."""

    def __init__(self, clock: Callable[[], float] = process_time) -> None:
        self.seconds: dict[str, float] = {}
        self._clock = clock
        self._last = clock()

    def lap(self, part: str) -> None:
        """Count the time since the last lap as spent on `part`."""
        now = self._clock()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now
