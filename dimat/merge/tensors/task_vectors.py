"""Task vectors put together: who takes part with which coefficient, and elected signs.

All task-vector methods follow one convention. With mixing weights w (own first, sum 1) and deltas τ_k = θ_k − θ_base

    θ = θ_base + scaling · Σ_k w_k τ̂_k        (or the mean, maximum, … that the method puts in the sum's place)

so with `scaling` 1 equal models merge to themselves. A paper's λ·Σ_k τ_k over n models is `scaling` = λ·n with equal
mixing weights. Where a formula compares a delta with the sum of all of them, the sum is Σ_k r_k τ_k with relative
weights r_k = n·w_k/Σw, which are 1 for equal weights. A model of weight 0 takes no part. The option
`weights` = [c_own, c_peer, …] replaces the mixing weights by coefficients that need not sum to 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from dimat.errors import MergeError
from dimat.merge.stages import Weights
from dimat.merge.tensors.pieces import PIECE, Pieces, PlanPieces, real
from dimat.merge.tensors.streaming import MergedWeights, base_tensor

Number = Annotated[float, Field(allow_inf_nan=False)]
"""A finite number."""

Density = Annotated[float, Field(gt=0, le=1)]
"""The share of a delta's elements that is kept."""

Densities = Density | Annotated[list[Density], Field(min_length=1)]
"""A density for all models, or one for each, own first."""

Coefficients = Annotated[list[Number], Field(min_length=1)]
"""One number per model, own first."""

SMALLEST_SHARE = 1e-8
"""Sums of coefficients below this divide nothing."""

LARGE = 1 << 18
"""Elements of a piece where values are counted, which has a cost for each piece."""


@dataclass(frozen=True)
class Participants:
    """The models that take part in a merge. `own` also gives names, types and integer tensors, and is one of them
    where `with_own`; `coefficients` are in the order own (if it takes part), peers."""

    own: Weights
    peers: list[Weights]
    with_own: bool
    coefficients: list[float]

    def normalised(self, scaling: float) -> float:
        """Return a factor divided by the coefficients' sum, where that is not about 0."""
        total = sum(self.coefficients)
        return scaling / total if abs(total) >= SMALLEST_SHARE else scaling

    @property
    def relative(self) -> list[float]:
        """Coefficients scaled to a mean of 1; all 1 where their sum is about 0."""
        count, total = len(self.coefficients), sum(self.coefficients)
        return [1.0] * count if abs(total) < SMALLEST_SHARE else [c * count / total for c in self.coefficients]


def participants_of(
    own: Weights, peers: Sequence[Weights], mixing: Sequence[float], weights: Sequence[float] | None = None
) -> Participants | None:
    """Return who takes part: the models whose coefficient (`weights`, or else `mixing`) is not 0.

    None means that own alone has a mixing weight: the merge is own, bit for bit.
    Raises MergeError where `weights` does not have one finite number per model, or only zeros.
    """
    if weights is None:
        if not any(mixing[1:]):
            return None
        weights = mixing
    elif len(weights) != len(peers) + 1:
        raise MergeError(
            f"option weights has {len(weights)} numbers for {len(peers) + 1} models; give one each, own first"
        )
    if not any(weights) or not all(isfinite(c) for c in weights):
        raise MergeError(f"weights must be finite and not all 0, got {[*weights]}")
    kept = [peer for peer, c in zip(peers, weights[1:]) if c]
    return Participants(own, kept, bool(weights[0]), [c for c in weights if c])


def densities_of(density: float | Sequence[float], cast: Participants, mixing: Sequence[float]) -> list[float]:
    """Return the density of each model that takes part; `mixing`: what decided who does (see `participants_of`).

    Raises MergeError where `density` is a list that does not have one number per model.
    """
    if isinstance(density, int | float):
        return [density] * len(cast.coefficients)
    if len(density) != len(mixing):
        raise MergeError(
            f"option density has {len(density)} numbers for {len(mixing)} models; give one each, own first"
        )
    return [d for d, c in zip(density, mixing) if c]


def copy_of(own: Weights) -> Weights:
    """Return own tensors as they are, in memory of their own."""
    return MergedWeights(own, [], lambda _, start, __: start.clone())


def read_deltas(cast: Participants, base: Weights) -> Iterator[Pieces]:
    """Yield the deltas of all floating-point tensors, one tensor at a time: a pass for what is global."""
    for name, tensor in cast.own.items():
        if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex()):
            own = tensor.detach()
            taking = [*([own] if cast.with_own else []), *(peer[name] for peer in cast.peers)]
            yield Pieces(taking, own, base_tensor(name, own, base), LARGE)


def merge_elements(
    cast: Participants,
    base: Weights,
    plan: PlanPieces,
    scaling: float = 1.0,
    *,
    rows: bool = False,
    ordered: bool = False,
) -> Weights:
    """Return θ_base + scaling · merge(τ), merge = plan(name, τ), in own's types; integer and boolean tensors are own's.

    Pieces of deltas come each once and may be written to; in order, one at a time, where `ordered`, else several at a
    time. `rows`: pieces are of whole rows, one for each index of the first axis (a vector is one row).
    """

    def one(name: str, own: Tensor, others: list[Tensor]) -> Tensor:
        taking = [own, *others] if cast.with_own else others
        pieces = Pieces(taking, own, base_tensor(name, own, base), rows_of(own) if rows else PIECE)
        return pieces.merged(plan(name, pieces), scaling, ordered)

    return MergedWeights(cast.own, cast.peers, one)


def row_length(tensor: Tensor) -> int:
    """Return the elements of a row, the real ones of complex tensors."""
    return real(tensor)[0].numel() if tensor.ndim > 1 else real(tensor).numel()


def rows_of(tensor: Tensor) -> int:
    """Return the size of pieces that hold whole rows."""
    length = row_length(tensor)
    return max(1, PIECE // length) * length


def mean_of(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return x_0 + Σ_k w_k (x_k − x_0), `weights` of all but with no use for w_0: equal values are returned bit for
    bit, whatever the weights round to."""
    start, *others = values
    total = start.clone()
    for other, weight in zip(others, weights[1:]):
        if weight:
            total.add_(other - start, alpha=weight)
    return total


def weighted_sum(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Return Σ_k c_k x_k."""
    total = tensors[0] * coefficients[0]
    for tensor, c in zip(tensors[1:], coefficients[1:]):
        total.add_(tensor, alpha=c)
    return total


def elected_sign(deltas: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Return the sign of Σ_k c_k τ_k at each element as 1 or −1; a tie is 1.

    A sum within rounding of zero is a tie, so that neither the order of models nor the type of numbers decides.
    """
    return _sign_of([delta * c for delta, c in zip(deltas, coefficients)])


def _sign_of(votes: Sequence[Tensor]) -> Tensor:
    total, spread = votes[0].clone(), votes[0].abs()
    for vote in votes[1:]:
        total.add_(vote)
        spread.add_(vote.abs())
    total.add_(spread, alpha=len(votes) * torch.finfo(total.dtype).eps)
    return torch.copysign(spread.fill_(1.0), total)


def elect(
    deltas: Sequence[Tensor], coefficients: Sequence[float], how: Literal["mean", "sum", "max"] = "mean"
) -> Tensor:
    """Return the deltas put together at each element over those whose sign is the elected one.

    The sign is that of Σ_k c_k τ_k (a tie elects +); zeros agree with neither. Over the k that agree:
    "mean": Σ c_k τ_k / Σ c_k, "sum": Σ c_k τ_k, "max": the τ_k of the largest |c_k τ_k|.
    """
    votes = [delta * c for delta, c in zip(deltas, coefficients)]
    sign = _sign_of(votes)
    if how == "max":
        heard = [delta.masked_fill(vote.mul_(sign) <= 0, 0.0) for delta, vote in zip(deltas, votes)]
        return loudest(heard, coefficients)
    merged, share = torch.zeros_like(sign), torch.zeros_like(sign)
    for vote, c in zip(votes, coefficients):
        merged.add_(vote.mul_(sign).clamp_(min=0))
        if how == "mean":
            share.add_(vote.sign_(), alpha=c)
    if how == "mean":
        if min(coefficients) >= SMALLEST_SHARE:
            share.clamp_(min=SMALLEST_SHARE)
        else:  # some may cancel
            share.masked_fill_(share.abs() < SMALLEST_SHARE, 1.0)
        merged.div_(share)
    return merged.mul_(sign)


def loudest(deltas: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Return at each element the τ_k of the largest |c_k τ_k|, whatever its sign; of equal ones the larger τ_k,
    so that the order of models does not matter."""
    merged, best = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta, c in zip(deltas, coefficients):
        score = (delta * c).abs_()
        louder = (score > best) | ((score == best) & (score > 0) & (delta > merged))
        best = torch.where(louder, score, best)
        merged = torch.where(louder, delta, merged)
    return merged
