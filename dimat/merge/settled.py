"""Entries that no combine method may decide: hidden from it, settled afterwards.

shield = Shield.of(own, peers, weights, natures)
combined = method(shield.own, shield.peers, …)
merged = shield.settle(combined)

Tied names that a method has merged one by one are made equal here afterwards; `dimat merge` passes each of them to the
method only once, and they do not reach this module (`merge_files/tied.py`). `ties.py` finds the tied names for both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from dimat.errors import DataError, MergeError
from dimat.merge.natures import Nature, Natures, PowerIteration, as_matrix, is_constant, natures_of
from dimat.merge.stages import Weights
from dimat.merge.tensors.task_vectors import mean_of
from dimat.merge.ties import same_values
from dimat.merge.weight_views import WeightsView

MOST_STEPS = 500
"""Most steps of a power iteration on a merged weight."""

EQUAL = (Nature.CONSTANT, Nature.VARIANCE, Nature.COUNT)
"""Natures of entries that stay as they are where all models have the same, whatever a method does; they are not
below 0 either where no model's are."""

STEP_TOLERANCE = 1e-7
"""A power iteration ends when a step changes u by less than this."""


@dataclass(frozen=True)
class Shield:
    """The input of a combine method, and the treatment of its result.

    `fixed`: names whose tensors stay this agent's: constants that are equal in all models, masks of 0 and 1 (a mean of
    two is no mask), codes with their scales, vectors that belong to no known weight. `own` and `peers`: the models as
    the method sees them. There, all peers have this agent's fixed tensors, and values in these that are not finite are
    replaced by the largest finite number, so that differences and norms are finite.
    """

    own: Weights
    peers: Sequence[Weights]
    fixed: frozenset[str]
    natures: Natures
    weights: tuple[float, ...]
    _whole: tuple[Weights, ...]

    @staticmethod
    def of(
        own: Weights, peers: Sequence[Weights], weights: Sequence[float], natures: Natures, model_ties: bool = True
    ) -> Shield:
        """Return the shield of a merge.

        `weights`: mixing weights, this agent's first. `model_ties`: whether ties are known from the model; else they
        are found by own values, and peers' values must agree.
        """
        fixed: set[str] = set()
        taking = [peer for peer, weight in zip(peers, weights[1:]) if weight]
        for name, nature in natures.kinds.items():
            if nature in (Nature.VECTOR, Nature.CODE, Nature.SCALE, Nature.FRAME):
                fixed.add(name)
            elif nature in EQUAL and (own[name].is_floating_point() or own[name].is_complex()):
                ours = own[name].detach()
                theirs = [peer[name].detach().to(ours.device) for peer in taking]
                same = all(torch.equal(ours, other) for other in theirs)
                if same or (nature is Nature.CONSTANT and _are_masks([ours, *theirs])):
                    fixed.add(name)
        if not model_ties:
            natures = replace(natures, first={n: f for n, f in natures.first.items() if _agree(n, f, taking)})
        shielded = frozenset(fixed)
        if not shielded:
            return Shield(own, peers, shielded, natures, tuple(weights), (own, *peers))
        views = [_Shielded(theirs, own, shielded) for theirs in (own, *peers)]
        return Shield(views[0], views[1:], shielded, natures, tuple(weights), (own, *peers))

    def base(self, base: Weights | None) -> Weights | None:
        """Return the base as the method sees it: with this agent's fixed tensors, so that their deltas are 0."""
        return base if base is None or not self.fixed else _Shielded(base, self._whole[0], self.fixed)

    def settle(self, combined: Weights) -> Weights:
        """Return merged weights with each entry valid for its nature; each access makes one tensor.

        Fixed tensors are this agent's; a variance that became negative or not finite is replaced by the weighted mean
        of the models', and so is a count, or any other buffer, that became negative though no model's is; u and v are
        iterated on the merged weight, from this agent's, unless that is this agent's weight; a tied name has the values
        of its first name.
        """
        natures = self.natures
        plain = not natures.iterations and not natures.first and not self.fixed
        if plain and not any(nature in EQUAL for nature in natures.kinds.values()):
            return combined
        return _Settled(combined, self)

    def mean(self, name: str) -> Tensor:
        """Return the weighted mean of a tensor of all models, in this agent's type."""
        ours = self._whole[0][name].detach()
        values = [theirs[name].detach().to(ours.device, torch.float64) for theirs in self._whole]
        if not self.weights[0]:
            return mean_of(values[1:], self.weights[1:]).to(ours.dtype)
        return mean_of(values, self.weights).to(ours.dtype)

    def negative(self, name: str) -> bool:
        """Tell whether a tensor of any model that takes part holds a number below 0."""
        taking = [theirs for theirs, weight in zip(self._whole, self.weights) if weight]
        return any(bool((theirs[name] < 0).any()) for theirs in (self._whole[0], *taking))

    def whole_peers(self) -> Sequence[Weights]:
        """Return the peers as they are."""
        return self._whole[1:]

    def whole(self, name: str) -> Tensor:
        """Return this agent's tensor unchanged."""
        return self._whole[0][name].detach()


def _are_masks(constants: Sequence[Tensor]) -> bool:
    """Tell whether constants say of each place whether it counts: all hold only 0 and 1, and at least one holds both;
    before anything is masked a mask is all ones."""
    binary = all(bool(((each == 0) | (each == 1)).all()) for each in constants)
    return binary and any(bool((each == 1).any()) and bool((each == 0).any()) for each in constants)


def _agree(name: str, first: str, peers: Sequence[Weights]) -> bool:
    return all(
        first in peer and name in peer and same_values(peer[name].detach(), peer[first].detach()) for peer in peers
    )


class _Shielded(WeightsView):
    """A model with this agent's fixed tensors, all finite."""

    def __init__(self, weights: Weights, own: Weights, fixed: Collection[str]) -> None:
        super().__init__(weights)
        self._weights = weights
        self._own = own
        self._fixed = fixed

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._fixed:
            return self._weights[name]
        ours = self._own[name]
        return ours.nan_to_num() if ours.is_floating_point() and ours.itemsize > 1 else ours


class _Settled(WeightsView):
    """Merged weights, each tensor settled when it is accessed."""

    def __init__(self, combined: Weights, shield: Shield) -> None:
        super().__init__(combined)
        self._combined = combined
        self._shield = shield
        self._vectors = {name: it for it in shield.natures.iterations for name in (it.u, it.v)}
        self._made: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._combined)

    def __getitem__(self, name: str) -> Tensor:
        shield = self._shield
        first = shield.natures.first.get(name, name)
        if first != name and first in self._combined:
            return self[first].clone()
        iteration = self._vectors.get(name)
        if iteration is not None and iteration.weight in self._combined:
            return self._iterated(name, iteration)
        if name in shield.fixed:
            return shield.whole(name).clone()
        merged = self._combined[name]
        nature = shield.natures.of(name)
        if nature not in EQUAL or not merged.is_floating_point() or merged.itemsize == 1:
            return merged
        if nature is Nature.VARIANCE and bool((~merged.isfinite() | (merged < 0)).any()):
            return shield.mean(name)
        if nature is not Nature.VARIANCE and bool((merged < 0).any()) and not shield.negative(name):
            return shield.mean(name)
        return merged

    def _iterated(self, name: str, iteration: PowerIteration) -> Tensor:
        if name in self._made:
            return self._made.pop(name)
        u, v = self._shield.whole(iteration.u), self._shield.whole(iteration.v)
        weight = self._combined[iteration.weight].detach()
        if torch.equal(weight, self._shield.whole(iteration.weight).to(weight.device)):
            return self._shield.whole(name).clone()
        new_u, new_v = iterate(as_matrix(weight, iteration.dim), u, v)
        made = {iteration.u: new_u, iteration.v: new_v}
        self._made |= {other: vector for other, vector in made.items() if other != name}
        return made[name]


class _Checked(WeightsView):
    """Merged weights, each checked when it is accessed."""

    def __init__(self, merged: Weights, shield: Shield, names: Sequence[str], finite: bool) -> None:
        super().__init__(merged)
        self._finite = finite
        self._merged = merged
        self._shield = shield
        self._peers = names

    def __iter__(self) -> Iterator[str]:
        return iter(self._merged)

    def __getitem__(self, name: str) -> Tensor:
        shield = self._shield
        if shield.natures.of(name) is Nature.FRAME:
            for peer, weights in zip(self._peers, shield.whole_peers()):
                if not torch.equal(weights[name].to(shield.whole(name)), shield.whole(name)):
                    raise DataError(
                        f"{peer}: tensor {name!r} is what another one is written in, and differs from the first model's"
                    )
        if shield.natures.of(name) is Nature.VARIANCE:
            for peer, weights in self._taking():
                if negative := int((weights[name] < 0).sum()):
                    raise DataError(f"{peer}: tensor {name!r} is a variance and holds {negative} values below 0")
        merged = self._merged[name]
        if name in shield.fixed or not (fault := not_finite({name: merged}, ())):
            return merged
        ours = shield.whole(name)
        if not is_constant(name, ours):
            if self._finite:
                raise MergeError(f"{fault}; keep_not_finite = true in the recipe writes it anyway")
            return merged
        for peer, weights in self._taking():
            if not torch.equal(weights[name].to(ours), ours):
                raise DataError(
                    f"{peer}: tensor {name!r} is a constant that is not finite, and differs from the first model's"
                )
        return ours.clone()

    def _taking(self) -> list[tuple[str, Weights]]:
        return [pair for pair, weight in zip(zip(self._peers, self._shield.peers), self._shield.weights[1:]) if weight]


def merge_checked(
    method: Callable[[Weights, Sequence[Weights], Weights | None], Weights],
    own: Weights,
    peers: Sequence[Weights],
    weights: Sequence[float],
    base: Weights | None,
    names: Sequence[str],
    model: nn.Module | None = None,
    *,
    finite: bool = True,
) -> Weights:
    """Return method(own, peers, base) with each entry valid for its nature: for merges outside the pipeline.

    `names`: of the peers, for messages. Each access makes one tensor; it raises DataError for a peer's negative
    variance, or constant that differs and must not, and MergeError, if results must be `finite`, for a tensor that is
    neither finite nor a constant.
    """
    shield = Shield.of(own, peers, weights, natures_of(own, model), model is not None)
    return _Checked(shield.settle(method(shield.own, shield.peers, shield.base(base))), shield, names, finite)


def iterate(matrix: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the leading singular vectors of a matrix (rows, columns) by power iteration from u (rows,), in the types
    and shapes of `u` and `v`."""
    wide = matrix.to(torch.float32 if matrix.device.type == "mps" else torch.float64)
    left = normalize(u.reshape(-1).to(wide), dim=0)
    if not left.isfinite().all() or not left.any():
        left = normalize(torch.ones_like(left), dim=0)
    right = v.reshape(-1).to(wide)
    for _ in range(MOST_STEPS):
        right = normalize(wide.mT @ left, dim=0, eps=1e-12)
        before, left = left, normalize(wide @ right, dim=0, eps=1e-12)
        if float((left - before).norm()) < STEP_TOLERANCE:
            break
    if not left.any():  # of a weight that is 0: any vectors will do
        return u.clone(), v.clone()
    return left.to(u).reshape(u.shape), right.to(v).reshape(v.shape)


def not_finite(weights: Weights, fixed: Collection[str]) -> str:
    """Return a line that names the first tensor of a merge that is not finite, or ""; constants are exempt."""
    for name, tensor in weights.items():
        if name in fixed or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        count = int((~torch.isfinite(tensor)).sum()) if tensor.itemsize > 1 else 0
        if count:
            return f"the merge's tensor {name!r} holds {count} values that are not finite"
    return ""
