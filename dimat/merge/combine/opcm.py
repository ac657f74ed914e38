"""OPCM: deltas folded one after the other, each outside the merged one's leading directions.

The merged delta keeps their mean norm.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from math import fsum, isfinite
from typing import Annotated, Any, Literal

import torch
from blake3 import blake3
from pydantic import Field
from torch import Tensor, nn

from dimat.errors import MergeError
from dimat.merge.registry import combine_registry
from dimat.merge.stages import PutAway, Weights
from dimat.merge.tensors.double_precision import by_parts, difference, distance, total_of
from dimat.merge.tensors.projection import FoldLayout, Split
from dimat.merge.tensors.streaming import MergedWeights, needs_base
from dimat.merge.tensors.task_vectors import copy_of
from dimat.merge.weight_views import absorb

OWN = ""
"""The name under which own weights stand among the contributors of a stream."""

VANISHED = 1e-12
"""A merged delta this small beside the deltas in it is what rounding left where they cancel: it counts as 0."""


@combine_registry.register("opcm")
def opcm(
    own: Weights,
    peers: Sequence[Weights],
    weights: Sequence[float],
    *,
    base: Weights | None = None,
    state: MutableMapping[str, Any] | None = None,
    model: nn.Module | None = None,
    names: Sequence[str] | None = None,
    put_away: PutAway | None = None,
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5,
    diagonal: bool = False,
    split: Mapping[str, Split] | None = None,
    mode: Literal["fold", "stream"] = "fold",
    products: Literal["float64", "float32"] | None = None,
    state_dtype: Literal["float32", "float64"] = "float32",
) -> Weights:
    """Return base + M, where M is folded from the deltas T_i = θ_i − base:

        M = UΣVᵀ,  A = Uᵀ T_i V,  A[:k, :k] = 0,  C = U A Vᵀ,  Y = λM + C,  λ ← ‖Y‖ / mean_{j≤i} ‖T_j‖,  M ← Y/λ

    with k the first index at which Σ_{j≤k} σ_j / Σ σ_j exceeds `alpha`, matrix by matrix; norms go over all parameters
    at once. The first delta enters whole. `alpha` = 1: k is the full rank; 0: plain sums at the mean norm. `diagonal`
    True zeroes A's diagonal too, False keeps it. (Both are about in public code. True is the golden vectors'
    `upstream_diagzero`; False is `fork_diagnoop`, which means to zero it and does so to a copy.)

    **Tensors.** Those of two or more dimensions are matrices (size of dim 0, product of the rest): linear layers,
    embeddings, convolutions (O, I·kh·kw), and parameters that modules hold directly. `split`, e.g. {"*.in_proj_weight":
    3} or {"*.c_attn.weight": [3, 1]}: names that match are that many equal parts along dim 0 (or the dim named
    second), projected one by one. Vectors, scalars and depthwise convolutions (those that `model` says are, else
    those of shape (O, 1, …)) are summed, C = T_i. Tied tensors (of `model`, or of one storage in `own`) are one
    parameter. Integers are own's. Buffers (`model`'s, else BatchNorm's running statistics by name) are no part of
    a delta: floating-point ones are averaged by `weights`.

    **Mixing weights** say who takes part: whoever has a weight above 0, own (the first) too, and all alike. Weight 1
    on self returns own bit for bit, and so do peers that equal it, for equal deltas are one. Nearly equal ones are no
    fixed point: what they share outside the leading directions is added up before all is scaled.

    **mode = "fold"** keeps nothing: the distinct deltas at hand are folded in the order of their content hashes, which
    all agents share (at alpha ≥ 0.5 orders differ by 14–39 %). **mode = "stream"** folds every update once and goes on
    from `state`, a dict that is kept and saved between calls (see `Stream`): what was folded before is passed over, and
    a newer update of a peer, known by `names`, enters as its difference to the last, while its norm replaces the
    last one's in the mean. Own's last is what the last merge returned, so that what it has merged is not folded again:
    use it with accept = "always" and without alignment. One copy of each peer's weights is kept for that.

    `state_dtype`: of M, apart from the base, which a sum in half precision would lose (float64 models: always theirs).
    `products`: of matrix products, as M if None; "float64" takes a quarter longer and has C exact to 1e-13 instead of
    2e-7; σ and k are in float64 always. Peak memory: own + M + one tensor per peer; files: one tensor of each and
    what a product needs, with M on disk. Models are read twice (hashes and norms, then folds).

    Raises MergeError without a base, for tensors that are missing, mis-shaped or not finite, for a split that does not
    fit, and in a stream without `state` or `names`, or with a state of another base; then `state` is as it was.

    Paper: Tang et al., "Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable Continual Model
    Merging", 2025, arXiv 2501.09522.
    """
    start = needs_base(base, "opcm")
    called = [f"peer {i}" for i in range(len(peers))] if names is None else list(names)
    if len(called) != len(peers) or len({OWN, *called}) != len(peers) + 1:
        raise MergeError(f"opcm: {len(peers)} peers need as many different names, got {called}")
    parties = [
        Party(name, party) for name, party, w in zip([OWN, *called], [own, *peers], weights, strict=True) if w > 0
    ]
    if not any(party.name != OWN for party in parties):
        return copy_of(own)
    layout = FoldLayout.of(own, model, split or {})
    fold = Fold(layout, start, alpha, diagonal, getattr(torch, products or state_dtype))
    if mode == "fold":
        folded = _once(fold, parties, getattr(torch, state_dtype), put_away)
    elif state is None:
        raise MergeError("opcm: mode 'stream' needs a state that is kept from merge to merge; use mode 'fold' without")
    elif names is None:
        raise MergeError("opcm: mode 'stream' needs the peers' names, to know whose update is newer; use mode 'fold'")
    else:
        folded = Stream(fold, state, getattr(torch, state_dtype)).advance(parties).pop
    known, shared = {*layout.folded}, {*layout.tied.values()}
    made: dict[str, Tensor] = {}  # of tied tensors, as M's are let go when they have been asked for

    def merge(name: str, tensor: Tensor, _: list[Tensor]) -> Tensor:
        source = layout.tied.get(name, name)
        if source in known and source in shared:
            if source not in made:
                made[source] = folded(source)
            return made[source].to(tensor.device, copy=True)
        if source in known:
            return folded(source).to(tensor.device)
        if name in layout.averaged:
            return _averaged(fold, name, tensor, [*zip(called, peers, weights[1:])])
        return tensor.clone()

    merged = MergedWeights(own, [], merge)
    return {**merged} if put_away is None else merged  # M in memory gives way to the result, tensor by tensor


@dataclass(frozen=True)
class Party:
    """Weights that take part in a fold. `digest`: hash of their parameters; `norm`: ‖θ − base‖; `former`: what they
    enter as a difference to, by tensor name; None: the base."""

    name: str
    weights: Weights
    digest: str = ""
    norm: float = 0.0
    former: Callable[[str], Tensor] | None = None

    @property
    def title(self) -> str:
        return "own weights" if self.name == OWN else self.name


@dataclass(frozen=True)
class Fold:
    """A layout of tensors, the base, and how deltas are folded. `dtype`: of products, float64 models apart."""

    layout: FoldLayout
    base: Weights
    alpha: float
    diagonal: bool
    dtype: torch.dtype

    def read(self, weights: Weights, name: str, title: str) -> Tensor:
        """Return a tensor as it is, once its name and shape are known to be right."""
        if name not in weights:
            raise MergeError(f"opcm: {title} has no tensor {name!r}; all must be of the same architecture")
        tensor, shape = weights[name].detach(), self.layout.meta[name].shape
        if tensor.shape != shape:
            raise MergeError(f"opcm: tensor {name!r} of {title} is {[*tensor.shape]}, own {[*shape]}")
        return tensor

    def wide(self, tensor: Tensor, name: str) -> Tensor:
        """Return a tensor in double precision, where own is (on the CPU for devices without it)."""
        dtype = torch.complex128 if tensor.is_complex() else torch.float64
        return tensor.to(device=self.layout.meta[name].device, dtype=dtype)

    def survey(self, parties: Sequence[Party], of_base: Any = None) -> list[Party]:
        """Return the parties with digests and norms; MergeError names what is not finite. The base goes into the hash
        `of_base` where there is one."""
        digests = [blake3() for _ in parties]
        squares: list[list[float]] = [[] for _ in parties]
        for name in self.layout.folded:
            base = self.read(self.base, name, "the base")
            if of_base is not None:
                absorb(of_base, name, base)
            device = self.layout.meta[name].device
            for party, digest, found in zip(parties, digests, squares):
                tensor = self.read(party.weights, name, party.title)
                absorb(digest, name, tensor)
                norm = distance(tensor.to(device), base.to(device))
                if not isfinite(norm):
                    title = party.title if torch.isfinite(base).all() else "the base"
                    raise MergeError(f"opcm: tensor {name!r} of {title} holds values that are not finite")
                found.append(norm * norm)
        return [
            replace(party, digest=digest.hexdigest(length=16), norm=fsum(found) ** 0.5)
            for party, digest, found in zip(parties, digests, squares)
        ]

    def totals(
        self, parties: Sequence[Party], before: Callable[[str], Tensor] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Give Y = λM + C_1 + C_2 + … by tensor name, where `before` gives λM: C needs no more than M's direction,
        so that λ, which rests on all tensors, can wait until the end."""
        for names in self.layout.batches():
            total = None if before is None else _stacked([self._narrow(before(name), name) for name in names])
            for party in parties:
                delta = _stacked([self._narrow(self._delta(party, name), name) for name in names])
                if total is None:
                    total = delta
                else:
                    self.layout.fold_(names[0], total, delta, self.alpha, self.diagonal)
            if total is not None:
                yield from zip(names, total)

    def _delta(self, party: Party, name: str) -> Tensor:
        former = self.read(self.base, name, "the base") if party.former is None else party.former(name)
        device = self.layout.meta[name].device
        own = self.read(party.weights, name, party.title)
        delta = torch.empty(own.shape, dtype=torch.complex128 if own.is_complex() else torch.float64, device=device)
        return by_parts(delta, difference, own.to(device), former.to(device))

    def _narrow(self, delta: Tensor, name: str) -> Tensor:
        exact = self.dtype == torch.float64 or delta.is_complex() or self.layout.meta[name].dtype == torch.float64
        return delta if exact else delta.to(self.dtype)

    def result(self, name: str, delta: Tensor, factor: float | None = None) -> Tensor:
        """Return base + factor · delta in own's type; the product is in the type of delta."""
        meta = self.layout.meta[name]
        result = torch.empty(meta.shape, dtype=meta.dtype, device=meta.device)
        base = self.read(self.base, name, "the base").to(meta.device)
        if factor is None:
            return by_parts(result, total_of, base, delta.to(meta.device))
        return by_parts(result, lambda one, other: total_of(one, other * factor), base, delta.to(meta.device))


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors of one shape as a dense batch that is worked in; a single one, held by nobody else, is not copied
    for it."""
    return tensors[0].contiguous()[None] if len(tensors) == 1 else torch.stack([*tensors])


def _once(
    fold: Fold, parties: Sequence[Party], dtype: torch.dtype, put_away: PutAway | None
) -> Callable[[str], Tensor]:
    """Fold the distinct deltas at hand in the order of their hashes; return what gives base + M by tensor name. M is in
    `dtype`; where it is not put away, each tensor is given once, as its part of M is let go then."""
    distinct: dict[str, Party] = {}
    for party in fold.survey(parties):
        distinct.setdefault(party.digest, party)
    if len(distinct) == 1:  # M = T, and base + T need not be its bits
        only = parties[0]
        meta = fold.layout.meta
        return lambda name: fold.read(only.weights, name, only.title).to(meta[name].dtype, copy=True)
    totals: dict[str, Tensor] = {}
    squares: list[float] = []
    for name, total in fold.totals([distinct[digest] for digest in sorted(distinct)]):
        squares.append(_square(total))
        kept = total.to(_stored(fold.layout.meta[name].dtype, dtype), copy=True)
        totals[name] = kept if put_away is None else put_away(kept)
    inverse = _length([party.norm for party in distinct.values()], squares)[1]
    take = totals.pop if put_away is None else totals.__getitem__
    return lambda name: fold.result(name, take(name), inverse)


class Stream:
    """A fold that goes on: each distinct update is folded once, whatever is sent again.

    `state` holds, under names that begin with "opcm/": `base` (digest of the base), `merged/<tensor>` (M), `lambda`,
    `norms` (JSON: contributor → ‖T‖ of its newest update; their mean is ‖M‖), `count` (updates folded), `hashes` (their
    digests, separated by spaces), `returned` (digest of the last result), `peers` (JSON: names in the order of their
    numbers) and `former/<number>/<tensor>` (each peer's newest update). Tensors are on the CPU. M is in `dtype`.
    """

    def __init__(self, fold: Fold, state: MutableMapping[str, Any], dtype: torch.dtype) -> None:
        self.fold = fold
        self.state = state
        self.dtype = dtype

    def advance(self, parties: Sequence[Party]) -> dict[str, Tensor]:
        """Fold what is new among the parties, in the order of digests, and return base + M by tensor name."""
        state, fold = self.state, self.fold
        of_base = blake3()
        surveyed = fold.survey(parties, of_base)
        base = of_base.hexdigest(length=16)
        known = state.get("opcm/base")
        if known not in (None, base):
            raise MergeError(f"opcm: the state is of base {known}, this is {base}; restore that base or drop the state")
        peers: list[str] = json.loads(state.get("opcm/peers", "[]"))
        norms: dict[str, float] = json.loads(state.get("opcm/norms", "{}"))
        hashes: list[str] = state.get("opcm/hashes", "").split()
        seen = {*hashes, state.get("opcm/returned", "")}
        fresh: dict[str, Party] = {}
        for party in surveyed:
            if party.digest not in seen:
                fresh.setdefault(party.digest, replace(party, former=self._former(party.name, peers)))
        order = [fresh[digest] for digest in sorted(fresh)]
        tensors, factor = self._fold(order, norms) if order else ({}, float(state.get("opcm/lambda", 0.0)))
        results: dict[str, Tensor] = {}
        returned = blake3()
        for name in fold.layout.folded:
            results[name] = fold.result(name, tensors.get(f"opcm/merged/{name}", self._merged(name)))
            absorb(returned, name, results[name])
        for party in surveyed:  # one that sent what another had sent is known by it from now on
            if party.name != OWN and (party.digest in fresh or party.name not in peers):
                if party.name not in peers:
                    peers.append(party.name)
                number = peers.index(party.name)
                for name in fold.layout.folded:
                    copy = fold.read(party.weights, name, party.title).to("cpu", copy=True)
                    tensors[f"opcm/former/{number}/{name}"] = copy.contiguous()
        state.update(tensors)
        state.update(
            {
                "opcm/base": base,
                "opcm/lambda": factor,
                "opcm/norms": json.dumps(norms),
                "opcm/count": len(hashes) + len(order),
                "opcm/hashes": " ".join([*hashes, *(party.digest for party in order)]),
                "opcm/returned": returned.hexdigest(length=16),
                "opcm/peers": json.dumps(peers),
            }
        )
        return results

    def _fold(self, order: Sequence[Party], norms: dict[str, float]) -> tuple[dict[str, Tensor], float]:
        """Return M as the state holds it, and λ; enter the parties' norms."""
        norms.update((party.name, party.norm) for party in order)
        before = self._before if "opcm/base" in self.state else None
        totals: dict[str, Tensor] = {}
        squares: list[float] = []
        for name, total in self.fold.totals(order, before):
            squares.append(_square(total))
            stored = _stored(self.fold.layout.meta[name].dtype, self.dtype)
            totals[f"opcm/merged/{name}"] = total.to(device="cpu", dtype=stored, copy=True)
        factor, inverse = _length(list(norms.values()), squares)
        for total in totals.values():
            total *= inverse
        return totals, factor

    def _before(self, name: str) -> Tensor:
        """Return Y = λM of what was folded so far."""
        return self.fold.wide(self._merged(name), name) * float(self.state["opcm/lambda"])

    def _merged(self, name: str) -> Tensor:
        kept: Tensor | None = self.state.get(f"opcm/merged/{name}")
        return torch.zeros(self.fold.layout.meta[name].shape) if kept is None else kept

    def _former(self, contributor: str, peers: Sequence[str]) -> Callable[[str], Tensor] | None:
        if contributor == OWN:
            return (lambda name: self.fold.result(name, self._merged(name))) if "opcm/base" in self.state else None
        if contributor not in peers:
            return None
        number = peers.index(contributor)
        return lambda name: self.state[f"opcm/former/{number}/{name}"]


def _length(norms: Sequence[float], squares: Sequence[float]) -> tuple[float, float]:
    """Return λ = ‖Y‖ / mean‖T‖ and 1/λ; 0 and 0 where Y or all T are zero, and so M is."""
    size, mean = fsum(squares) ** 0.5, fsum(norms) / len(norms)
    if mean == 0 or size <= VANISHED * mean:
        return 0.0, 0.0
    return size / mean, mean / size


def _square(total: Tensor) -> float:
    return float(torch.linalg.vector_norm(total, dtype=None if total.is_complex() else torch.float64)) ** 2


def _stored(tensor: torch.dtype, wanted: torch.dtype) -> torch.dtype:
    """Return the type in which deltas of such tensors are kept."""
    if tensor.is_complex:
        return torch.complex64 if wanted == torch.float32 and tensor != torch.complex128 else torch.complex128
    return torch.float64 if torch.float64 in (tensor, wanted) else torch.float32


def _averaged(fold: Fold, name: str, tensor: Tensor, parties: Sequence[tuple[str, Weights, float]]) -> Tensor:
    """Return a buffer's weighted average, as θ_own + Σ_k w_k (θ_k − θ_own)."""
    start = fold.wide(tensor.detach(), name)
    total = start.clone()
    for title, weights, weight in parties:
        if weight:
            other = fold.wide(fold.read(weights, name, title), name)
            if not torch.isfinite(other).all():
                raise MergeError(f"opcm: buffer {name!r} of {title} holds values that are not finite")
            total += weight * (other - start)
    return total.to(tensor.device, tensor.dtype)
