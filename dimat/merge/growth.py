"""Size of an agent's weights after its own training: a slow reference that bounds merges.

A merge changes own norm, and a bound by own norm moves along: a peer that stays within it every round makes weights
grow without end. The reference follows only own training; a merge does not change it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import isfinite, sqrt

import torch
from torch import Tensor

from dimat.merge.natures import Nature, Natures
from dimat.merge.stages import Weights

HORIZON = 16
"""Rounds in which the reference follows a norm that has fallen, to 1/e."""

BOUNDED = (Nature.PARAMETER, Nature.MEAN, Nature.VARIANCE)
"""Natures whose size a merge may change."""


@dataclass(frozen=True)
class Reference:
    """Norms by tensor after own training, and the tensors' numbers of entries.

    `pools`: by nature the root mean square of all entries: a tensor that is still zero, as biases are at first, may
    grow to the usual size in the model.
    """

    norms: Mapping[str, float]
    sizes: Mapping[str, int]
    pools: Mapping[str, float] = field(default_factory=dict[str, float])

    @staticmethod
    def of(norms: Mapping[str, float], own: Weights, natures: Natures) -> Reference:
        """Return the reference of norms of own's tensors; those of natures that are not bounded are left out."""
        norms = {name: norm for name, norm in norms.items() if natures.of(name) in BOUNDED and name in own}
        sizes = {name: own[name].numel() for name in norms}
        pools: dict[str, float] = {}
        for nature in BOUNDED:
            names = [name for name in norms if natures.of(name) is nature]
            entries = sum(sizes[name] for name in names)
            rms = sqrt(sum(norms[name] ** 2 for name in names) / entries) if entries else 0.0
            pools |= dict.fromkeys(names, rms)
        return Reference(norms, sizes, pools)

    def without(self, names: Collection[str]) -> Reference:
        """Return the reference of all tensors but these."""
        left = {name: norm for name, norm in self.norms.items() if name not in names}
        return Reference(left, self.sizes, self.pools)

    @property
    def total(self) -> float:
        """The norm of all tensors."""
        return sqrt(sum(norm * norm for norm in self.norms.values()))

    def usual(self, name: str) -> float:
        """Return a tensor's reference norm: its own, or the usual one of its nature."""
        return max(self.norms[name], self.pools[name] * sqrt(self.sizes[name]))

    def excess(self, norms: Mapping[str, float]) -> tuple[float, str]:
        """Return the largest factor by which norms exceed the reference, and the tensor concerned ("" for all)."""
        known = [name for name in self.norms if name in norms]
        ratios = {name: norms[name] / usual for name in known if (usual := self.usual(name))}
        ratios[""] = sqrt(sum(norms[name] ** 2 for name in known)) / self.total if self.total else 0.0
        most = max(ratios, key=ratios.__getitem__)
        return ratios[most], most

    def after_training(self, before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
        """Return the norms of a reference after a round's training, given own norms before and after it.

        A norm rises by as much as training made it grow, in one round to twice the usual one at most; one that has
        fallen is followed slowly.
        """
        new = dict(self.norms)
        for name, norm in self.norms.items():
            now = after.get(name, norm)
            if now < norm:
                new[name] = norm + (now - norm) / HORIZON
            else:
                grown = min(max(now - before.get(name, norm), 0.0), self.usual(name) or now)
                new[name] = min(now, norm + grown)
        return new

    def share(self, own: Weights, merged: Weights, ratio: float) -> tuple[float, str]:
        """Return how far on the way from own to merged weights norms stay within `ratio` times the reference.

        Own norms that exceed that already may stay, but not grow. 1 and "" if the merge is within bounds;
        else the tensor that exceeds its bound most ("" for all of them together).
        """
        share, where = 1.0, ""
        sums = [0.0, 0.0, 0.0]
        for name in self.norms:
            terms = segment(own[name], merged[name])
            sums = [total + term for total, term in zip(sums, terms)]
            bound = ratio * self.usual(name)
            if bound and (most := share_within(terms, bound)) < share:
                share, where = most, name
        if self.total and (most := share_within(sums, ratio * self.total)) < share:
            share, where = most, ""
        return share, where


def segment(own: Tensor, merged: Tensor) -> list[float]:
    """Return ‖o‖², 2⟨o, m − o⟩ and ‖m − o‖²: the squared norm of o + t(m − o) is the polynomial of these in t."""
    wide = torch.float32 if merged.device.type == "mps" else torch.float64
    o = own.detach().to(merged.device).flatten()
    m = merged.detach().flatten()
    if o.is_complex():
        o, m = (torch.view_as_real(one.resolve_conj()).flatten() for one in (o, m))
    if torch.equal(o, m):
        return [float(torch.linalg.vector_norm(o, dtype=wide)) ** 2, 0.0, 0.0]
    o = o.to(wide)
    step = m.to(wide) - o
    return [float(o @ o), 2 * float(o @ step), float(step @ step)]


def share_within(terms: list[float], bound: float) -> float:
    """Return the largest t in [0, 1] at which √(c + b t + a t²) is at most `bound`, or at most its value at 0."""
    c, b, a = terms
    if not isfinite(a + abs(b)):
        return 0.0
    free = max(bound * bound - c, 0.0)
    if a + b <= free:
        return 1.0
    # a t² + b t − free = 0, of which the larger root is the one wanted: a > 0 here, or b > 0
    root = sqrt(b * b + 4 * a * free)
    if b < 0:
        return min((root - b) / (2 * a), 1.0)
    return min(2 * free / (root + b), 1.0) if free else 0.0
