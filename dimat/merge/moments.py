"""Optimizers' moments in a merge: peers' are checked, bounded and averaged like weights.

After a merge that was kept, a moment is Σ_i w_i m_i over this agent (first) and the peers in the merge, in this agent's
basis; if the weights went only a share s of the way to the merged ones, it is own + s (mean − own). w_i are the mixing
weights of the weights' merge, in which this agent has the weight of refused peers; the same holds for a parameter of
which a peer has no moments. Averages of squares are averaged as such: they are never negative, and those of agents with
similar gradients hardly change.

Counts of steps are averaged too, and rounded. A moment of t steps is (1 − βᵗ) times an average of gradients, so the
mean of moments is Σ w_i (1 − β^t_i) times one, and 1 − βᵗ of the mean t agrees with that to first order in the
differences of t_i; agents with equal counts keep them.

A peer's moments can do harm: a second moment that is too large freezes an agent, a first moment too large for the
second makes it diverge. Both are scaled down to at most `ratio` times the norm after the agent's own training
(`growth.py`; a merge does not change it); for averages of squares the norm is that of the root. Each element of a first
moment is limited to `limit` times the root of the second moment beside it, as holds if both are averages of the same
gradients: by Jensen's inequality, it then also holds for each mean of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt

import torch
from torch import Tensor

from dimat.errors import DataError, PeerError, nearest
from dimat.merge.growth import Reference
from dimat.merge.stages import Permutations, Weights
from dimat.merge.weight_views import PermutedWeights, WeightsView, axes_by_name, stacks_of
from dimat.symmetry.spec import AxisRef, Stack, SymmetrySpec
from dimat.symmetry.stacks import stacked
from dimat.weights.moments import MOMENT, SCALE, STEP, decode_moment, entry_of, is_known, is_squared

PREFIXES = (MOMENT, SCALE)
"""Prefixes of the names of moments beside a snapshot's weights."""
LIMIT = 10.0
"""The limit of a first moment if the optimizer's decays are not known."""
SURE = 0.999
"""A centred RMSprop subtracts the squared average of gradients from that of squares, which must stay positive."""
_PARTNERS = {"exp_avg": ("exp_avg_sq", "exp_inf"), "grad_avg": ("square_avg",)}


def parameter_of(name: str) -> str:
    """Return the parameter to which a moment belongs."""
    return name.partition(".")[2]


def names_of(tensors: Iterable[str]) -> list[str]:
    """Return the names of the moments in the names of tensors as they are sent."""
    return [name.removeprefix(MOMENT) for name in tensors if name.startswith(MOMENT)]


def limit_of(betas: tuple[float, float]) -> float:
    """Return the largest ratio of Adam's first moment to the root of its second moment.

    By Cauchy and Schwarz (1 − β₁) Σ β₁ᵏ |g_k| ≤ (1 − β₁) √(Σ (β₁² / β₂)ᵏ) √(Σ β₂ᵏ g_k²): the limit is
    (1 − β₁) / √((1 − β₂) (1 − β₁² / β₂)), 7.3 for β = (.9, .999). Infinite where β₁² ≥ β₂.
    """
    first, second = betas
    if not 0 <= first < 1 or not 0 < second < 1 or first * first >= second:
        return float("inf")
    return (1 - first) / sqrt((1 - second) * (1 - first * first / second))


def check_moments(peer: str, tensors: Weights, own: Weights, moments: Mapping[str, Tensor]) -> None:
    """Check the moments beside a peer's weights, one tensor at a time; PeerError names the peer and the moment.

    `tensors`: as received, by names without `aux.`; `own`: this agent's weights; `moments`: its moments. A peer may
    lack the moments of some or all parameters, which it has not trained. For other parameters it must have the same
    entries as this agent, of the parameter's shape, finite, and not negative if they are averages of squares (by their
    name, or because this agent's have no negative value). If this agent has none at all, only entries for which that is
    known are accepted.
    """
    names = names_of(tensors)
    present = set(names)
    for key in tensors:
        if key.startswith(SCALE) and key.removeprefix(SCALE) not in present:
            raise PeerError(f"{peer}: {key!r} are scales without a moment")
    entries = {name.partition(".")[0] for name in moments}
    shared = {parameter_of(name) for name in names}
    for name in moments:
        if parameter_of(name) in shared and name not in present:
            raise PeerError(f"{peer}: moment {name!r} is missing; agents must train with the same train.optimizer")
    positive: dict[str, bool] = {}
    for name in names:
        entry, _, parameter = name.partition(".")
        if parameter not in own or (entry not in entries if entries else not is_known(name)):
            raise PeerError(
                f"{peer}: moment {name!r} is not one of this agent's{nearest(name, moments)}; agents must "
                "train with the same train.optimizer"
            )
        try:
            found = decode_moment(tensors, name)
        except DataError as error:
            raise PeerError(f"{peer}: moment {error}") from error
        shape = torch.Size([]) if entry_of(name) == STEP else own[parameter].shape
        if found.shape != shape:
            raise PeerError(f"{peer}: moment {name!r} is {[*found.shape]}, expected {[*shape]}")
        if is_known(name):
            continue
        if entry not in positive:
            ours = (tensor for key, tensor in moments.items() if key.partition(".")[0] == entry)
            positive[entry] = not any(bool((tensor < 0).any()) for tensor in ours)
        if positive[entry] and bool((found < 0).any()):
            raise PeerError(f"{peer}: moment {name!r} holds values below 0, which this moment cannot have")


def norms_of_moments(moments: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the 2-norms of moments; for squares that of their root, for a count its value."""
    return {name: _norm(name, tensor) for name, tensor in moments.items()}


def reference_of(norms: Mapping[str, float], moments: Mapping[str, Tensor]) -> Reference:
    """Return the reference norms of this agent's moments; a moment that is still zero has the typical norm of its
    entry."""
    norms = {name: norm for name, norm in norms.items() if name in moments}
    sizes = {name: moments[name].numel() for name in norms}
    sums: dict[str, tuple[float, int]] = {}
    for name, norm in norms.items():
        total, elements = sums.get(name.partition(".")[0], (0.0, 0))
        sums[name.partition(".")[0]] = (total + norm * norm, elements + sizes[name])
    usual = {entry: sqrt(total / elements) if elements else 0.0 for entry, (total, elements) in sums.items()}
    return Reference(norms, sizes, {name: usual[name.partition(".")[0]] for name in norms})


@dataclass(frozen=True)
class PeerMoments:
    """A peer's moments as sent (`tensors`), its mixing weight, and the permutations into this agent's order."""

    name: str
    weight: float
    tensors: Weights
    permutations: Permutations = field(default_factory=dict[str, Tensor])


class MergedMoments(WeightsView):
    """This agent's moments merged with peers' that `check_moments` has accepted, each computed when accessed.

    `own`: the current ones, by name; `own_weight` and the peers' sum to 1; `share`: how far the weights went towards
    the merged ones, and `factors` by parameter if `merge.layers` limited one; `reference` and `ratio` bound the peers',
    `limit` their first moments (`limit_of`). `exceeded`: for each peer with moments that were scaled down, their
    largest ratio to the reference.
    """

    def __init__(
        self,
        own: Mapping[str, Tensor],
        own_weight: float,
        peers: Sequence[PeerMoments],
        spec: SymmetrySpec | None,
        reference: Reference,
        *,
        ratio: float,
        limit: float = LIMIT,
        share: float = 1.0,
        factors: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(own)
        self._own = own
        self._own_weight = own_weight
        self._share = share
        self._factors = factors or {}
        self._ratio, self._limit = ratio, limit
        self._reference = reference
        self.exceeded: dict[str, float] = {}
        self._peers = [(peer.name, peer.weight, self._view(peer, spec)) for peer in peers]

    def __getitem__(self, name: str) -> Tensor:
        own = self._own[name]
        theirs = [(peer, weight, moments) for peer, weight, moments in self._peers if name in moments]
        if not theirs:
            return own
        wide = own.dtype if own.dtype == torch.float64 else torch.float32
        weight = self._own_weight + sum(w for _, w, moments in self._peers if name not in moments)
        mean = own.to(wide, copy=True)
        share = self._share * self._factors.get(parameter_of(name), 1.0)
        values = mean.clone() if share < 1 else mean
        mean *= weight
        for peer, part, moments in theirs:
            mean.add_(self._bounded(peer, name, moments).to(mean.device, wide), alpha=part)
        if share < 1:
            mean = values.lerp_(mean, share)
        return mean.round_() if entry_of(name) == STEP else mean

    def _view(self, peer: PeerMoments, spec: SymmetrySpec | None) -> Weights:
        listed = {} if spec is None else stacked(spec)  # they come to the places of others, of which we may have them
        known = [n for n in names_of(peer.tensors) if n in self._own or parameter_of(n) in listed]
        decoded = _Decoded(peer.tensors, known)
        if spec is None or not peer.permutations:
            return decoded
        return PermutedWeights(decoded, spec_of_moments(decoded, spec), peer.permutations)

    def _bounded(self, peer: str, name: str, moments: Weights) -> Tensor:
        """Return a peer's moment, scaled down to its bound."""
        found = self._scaled(peer, name, moments)
        entry, _, rest = name.partition(".")
        family = entry.removesuffix(entry_of(name))
        for partner in _PARTNERS.get(entry_of(name), ()):
            if (beside := f"{family}{partner}.{rest}") in moments:
                scale = self._scaled(peer, beside, moments)
                most = scale * self._limit if partner == "exp_inf" else scale.sqrt() * self._limit_of(partner)
                return torch.minimum(torch.maximum(found, -most), most)
        return found

    def _limit_of(self, partner: str) -> float:
        return SURE if partner == "square_avg" else self._limit

    def _scaled(self, peer: str, name: str, moments: Weights) -> Tensor:
        found = moments[name]
        norm = _norm(name, found)
        most = self._ratio * self._reference.usual(name) if name in self._reference.norms else 0.0
        if norm <= most:
            return found
        if most:
            self.exceeded[peer] = max(self.exceeded.get(peer, 0.0), norm / most * self._ratio)
        factor = most / norm
        return found * (factor * factor if is_squared(name) else factor)


class _Decoded(WeightsView):
    """Moments as numbers, each decoded when it is accessed."""

    def __init__(self, tensors: Weights, names: Sequence[str]) -> None:
        super().__init__(dict.fromkeys(names))
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return decode_moment(self._tensors, name)


def decoded_moments(tensors: Weights) -> Weights:
    """Return moments that `check_moments` has accepted as numbers by name, each decoded when it is accessed."""
    return _Decoded(tensors, names_of(tensors))


def spec_of_moments(names: Collection[str], spec: SymmetrySpec) -> SymmetrySpec:
    """Return a spec whose axes are those of moments: each moves with its parameter."""
    by_name = axes_by_name(spec)
    axes: list[AxisRef] = []
    for name in names:
        if entry_of(name) != STEP:
            axes += [replace(axis, tensor=name) for axis in by_name.get(parameter_of(name), [])]
    stacks: list[Stack] = []
    for kind in {f"{name.partition('.')[0]}." for name in names}:
        for stack in stacks_of(kind, names, spec):
            stacks.append(stack)
            numbers_only = entry_of(kind) == STEP
            moving = [axis for axis in by_name[stack.tensor.removeprefix(kind)] if not (numbers_only and axis.dim)]
            axes += [replace(axis, tensor=stack.tensor) for axis in moving]
    apart = {name for stack in stacks for name in stack.sources}
    return replace(spec, axes=tuple(axis for axis in axes if axis.tensor not in apart), tied=(), stacks=tuple(stacks))


def _norm(name: str, moment: Tensor) -> float:
    wide = torch.float32 if moment.device.type == "mps" else torch.float64
    if is_squared(name):
        return sqrt(max(float(moment.sum(dtype=wide)), 0.0))
    return float(torch.linalg.vector_norm(moment, dtype=wide))
