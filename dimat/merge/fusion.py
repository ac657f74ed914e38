"""Task vectors put together: who takes part with which coefficient, and how signs are elected.

All task-vector methods follow one convention. With mixing weights w (own first, sum 1) and deltas τ_k = θ_k − θ_base

    θ = θ_base + scaling · Σ_k w_k τ̂_k        (or the mean, maximum, … that the method puts in the sum's place)

so with `scaling` 1 equal models merge to themselves. A paper's λ·Σ_k τ_k over n models is `scaling` = λ·n with equal
mixing weights. Where a formula compares a delta with the sum of all of them, the sum is Σ_k r_k τ_k with relative
weights r_k = n·w_k/Σw, which are 1 for equal weights. A model of weight 0 takes no part. The option
`weights` = [c_own, c_peer, …] replaces the mixing weights by coefficients that need not sum to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from dimat.errors import MergeError
from dimat.merge.deltas import accumulator, combine_tensors, task_vectors
from dimat.merge.stages import Weights

Number = Annotated[float, Field(allow_inf_nan=False)]
"""A finite number."""

Density = Annotated[float, Field(gt=0, le=1)]
"""The share of a delta's elements that is kept."""

Densities = Density | Annotated[list[Density], Field(min_length=1)]
"""A density for all models, or one for each, own first."""

Coefficients = Annotated[list[Number], Field(min_length=1)]
"""One number per model, own first."""

MergeDeltas = Callable[[str, list[Tensor]], Tensor]
"""(name, deltas of those that take part) → merged delta, all real and of one shape."""

SMALLEST_SHARE = 1e-8
"""Sums of coefficients below this divide nothing."""

CHUNK = 1 << 15
"""Elements that are worked on at a time on the CPU: the most that torch leaves to one thread. Short operations on
several threads wait for each other far longer than they work wherever a processor is busy with something else."""


@dataclass(frozen=True)
class Cast:
    """The models that take part in a merge. `own` also gives names, types and integer tensors, and is one of them
    where `with_own`; `coefficients` are in the order own (if it takes part), peers."""

    own: Weights
    peers: list[Weights]
    with_own: bool
    coefficients: list[float]

    @property
    def relative(self) -> list[float]:
        """Coefficients scaled to a mean of 1; all 1 where their sum is about 0."""
        count, total = len(self.coefficients), sum(self.coefficients)
        return [1.0] * count if abs(total) < SMALLEST_SHARE else [c * count / total for c in self.coefficients]


def cast_of(
    own: Weights, peers: Sequence[Weights], mixing: Sequence[float], weights: Sequence[float] | None = None
) -> Cast | None:
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
    return Cast(own, kept, bool(weights[0]), [c for c in weights if c])


def densities_of(density: float | Sequence[float], cast: Cast, mixing: Sequence[float]) -> list[float]:
    """Return the density of each model that takes part; `mixing`: what decided who does (see `cast_of`).

    Raises MergeError where `density` is a list that does not have one number per model.
    """
    if isinstance(density, int | float):
        return [density] * len(cast.coefficients)
    if len(density) != len(mixing):
        raise MergeError(
            f"option density has {len(density)} numbers for {len(mixing)} models; give one each, own first"
        )
    return [d for d, c in zip(density, mixing) if c]


def copy_of(own: Weights) -> dict[str, Tensor]:
    """Return own tensors as they are, in memory of their own."""
    return combine_tensors(own, [], lambda _, start, __: start.clone())


def real(tensor: Tensor) -> Tensor:
    """Return a tensor of real numbers: complex ones get a last axis of real and imaginary parts."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def read_deltas(cast: Cast, base: Weights) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield the deltas of all floating-point tensors, one tensor at a time: a pass for what is global."""
    for name, tensor in cast.own.items():
        if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex()):
            start = tensor.detach().to(accumulator(tensor))
            others = [peer[name].detach().to(device=start.device, dtype=start.dtype) for peer in cast.peers]
            deltas = task_vectors(name, start, others, base)[1]
            yield name, [real(delta) for delta in deltas[0 if cast.with_own else 1 :]]


def merge_deltas(cast: Cast, base: Weights, merge: MergeDeltas, scaling: float = 1.0) -> dict[str, Tensor]:
    """Return θ_base + scaling · merge(τ), tensor by tensor, in own's types; integer and boolean tensors are own's."""

    def one(name: str, own: Tensor, others: list[Tensor]) -> Tensor:
        if not own.numel():
            return own
        start, deltas = task_vectors(name, own, others, base)
        merged = merge(name, [real(delta) for delta in deltas[0 if cast.with_own else 1 :]])
        return start + scaling * (torch.view_as_complex(merged.contiguous()) if own.is_complex() else merged)

    return combine_tensors(cast.own, cast.peers, one)


def weighted_sum(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Return Σ_k c_k x_k."""
    total = tensors[0] * coefficients[0]
    for tensor, c in zip(tensors[1:], coefficients[1:]):
        total.add_(tensor, alpha=c)
    return total


def in_chunks(function: Callable[[Sequence[Tensor]], Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """Return an element-by-element function of tensors of one shape; on the CPU it is computed some elements at a time,
    so that what it holds in between stays in the processor's cache."""
    if tensors[0].device.type != "cpu" or tensors[0].numel() <= CHUNK:
        return function(tensors)
    result = torch.empty(tensors[0].shape, dtype=tensors[0].dtype)
    parts = zip(*(tensor.reshape(-1).split(CHUNK) for tensor in (result, *tensors)))
    for out, *chunk in parts:
        out.copy_(function(chunk))
    return result


def elected_sign(deltas: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Return the sign of Σ_k c_k τ_k at each element as 1 or −1; a tie is 1.

    A sum within rounding of zero is a tie, so that neither the order of models nor the type of numbers decides.
    """
    total, spread = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta, c in zip(deltas, coefficients):
        vote = delta * c
        total.add_(vote)
        spread.add_(vote.abs_())
    positive = total >= spread.mul_(-len(deltas) * torch.finfo(total.dtype).eps)
    return positive.to(total.dtype).mul_(2).sub_(1)


def elect(
    deltas: Sequence[Tensor], coefficients: Sequence[float], how: Literal["mean", "sum", "max"] = "mean"
) -> Tensor:
    """Return the deltas put together at each element over those whose sign is the elected one.

    The sign is that of Σ_k c_k τ_k (a tie elects +); zeros agree with neither. Over the k that agree:
    "mean": Σ c_k τ_k / Σ c_k, "sum": Σ c_k τ_k, "max": the τ_k of the largest |c_k τ_k|.
    """

    def chosen(deltas: Sequence[Tensor]) -> Tensor:
        sign = elected_sign(deltas, coefficients)
        if how == "max":
            heard = [delta.masked_fill((delta * c).mul_(sign) <= 0, 0.0) for delta, c in zip(deltas, coefficients)]
            return _loudest(heard, coefficients)
        merged, share = torch.zeros_like(sign), torch.zeros_like(sign)
        for delta, c in zip(deltas, coefficients):
            vote = (delta * c).mul_(sign).clamp_(min=0)
            merged.add_(vote)
            if how == "mean":
                share.add_(vote > 0, alpha=c)
        if how == "mean":
            merged.div_(share.masked_fill_(share.abs() < SMALLEST_SHARE, 1.0))
        return merged.mul_(sign)

    return in_chunks(chosen, deltas)


def loudest(deltas: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Return at each element the τ_k of the largest |c_k τ_k|, whatever its sign; of equal ones the larger τ_k,
    so that the order of models does not matter."""
    return in_chunks(lambda parts: _loudest(parts, coefficients), deltas)


def _loudest(deltas: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    merged, best = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta, c in zip(deltas, coefficients):
        score = (delta * c).abs_()
        louder = (score > best) | ((score == best) & (score > 0) & (delta > merged))
        best = torch.where(louder, score, best)
        merged = torch.where(louder, delta, merged)
    return merged
