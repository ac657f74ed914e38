"""Statistics by class of a classifier's inputs: checked, pooled, drawn from.

As they travel (`shared_statistics`), for a head whose weight W is (classes, features): `class_count.<W>` (classes,)
int64; `class_mean.<W>` and `class_variance.<W>` (classes, features) of the examples' features; `class_factor.<W>`
(classes, rank, features), rows F whose FᵀF is the leading part of the covariance. A class without examples has zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from dimat.errors import PeerError

COUNT, MEAN, VARIANCE, FACTOR = "class_count.", "class_mean.", "class_variance.", "class_factor."
KINDS = (COUNT, MEAN, VARIANCE, FACTOR)
"""Beginnings of the names of these statistics."""
FEATURE_AXIS: Mapping[str, int] = {MEAN: 1, VARIANCE: 1, FACTOR: 2}
"""The axis that holds features, which move as the inputs of the head's weight do."""
LARGER = 10.0
"""How many times as large as own's the features of a peer may be said to be."""
SLACK = 1e-3
"""Share by which a factor's squares may exceed the variances that they are part of, from rounding."""


@dataclass(frozen=True)
class ClassGaussians:
    """A Gaussian of features for each class: N(mean, FᵀF + diag(variance − Σ F²)), in float64.

    `count`: (C,) examples, 0 or more; `mean`, `variance`: (C, d), variances over all examples (not n − 1);
    `factor`: F, (C, R, d), R may be 0.
    """

    count: Tensor
    mean: Tensor
    variance: Tensor
    factor: Tensor

    @staticmethod
    def of(aux: Mapping[str, Tensor], weight: str) -> ClassGaussians:
        """Return those that stand among an agent's statistics, on the CPU; `weight` names the head's weight."""
        count, mean, variance = (aux[kind + weight].detach().cpu().double() for kind in (COUNT, MEAN, VARIANCE))
        key = FACTOR + weight
        none = mean.new_zeros(len(mean), 0, mean.shape[1])
        return ClassGaussians(count, mean, variance, aux[key].detach().cpu().double() if key in aux else none)

    def draw(self, classes: Sequence[int], each: int, generator: torch.Generator) -> Tensor:
        """Return `each` features of each of these classes, (len(classes) · each, d), in the order of the classes."""
        drawn: list[Tensor] = []
        rank, features = self.factor.shape[1:]
        rest = (self.variance - self.factor.square().sum(1)).clamp_min(0).sqrt()
        for c in classes:
            along = torch.randn(each, rank, generator=generator, dtype=torch.float64)
            apart = torch.randn(each, features, generator=generator, dtype=torch.float64)
            drawn.append(self.mean[c] + along @ self.factor[c] + apart * rest[c])
        return torch.cat(drawn)


def pooled(parts: Sequence[ClassGaussians]) -> ClassGaussians:
    """Return the Gaussians of all parts' examples together.

    With n = Σ n_k and s_k = n_k / n by class: mean = Σ s_k μ_k, and the covariance Σ s_k (Σ_k + δ_k δ_kᵀ) with
    δ_k = μ_k − mean, exactly: the rows √s_k F_k and √s_k δ_k of all parts are its factor. Where no part has examples of
    a class, all is zero.
    """
    counts = torch.stack([part.count for part in parts])
    total = counts.sum(0)
    shares = (counts / total.clamp_min(1))[:, :, None]
    mean = sum((share * part.mean for share, part in zip(shares, parts)), torch.zeros_like(parts[0].mean))
    variance = torch.zeros_like(mean)
    rows: list[Tensor] = []
    for share, part in zip(shares, parts):
        off = part.mean - mean
        variance += share * (part.variance + off.square())
        rows += [share.sqrt()[:, None] * part.factor, (share.sqrt() * off)[:, None]]
    return ClassGaussians(total, mean, variance, torch.cat(rows, 1))


def shape_of(key: str, found: Tensor, weight: torch.Size) -> tuple[int, ...] | None:
    """Return the shape that a statistic by class must have, beside a head's weight (classes, features) of this shape.

    None where there is none. The rank of a factor is its own, from 0 to the number of features.
    """
    if len(weight) != 2:
        return None
    if key.startswith(COUNT):
        return (weight[0],)
    if key.startswith(FACTOR):
        return (weight[0], min(found.shape[1] if found.ndim > 1 else 0, weight[1]), weight[1])
    return tuple(weight)


def check_classes(
    name: str,
    aux: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    most_examples: int,
) -> None:
    """Check a peer's statistics by class; PeerError names the peer and the statistic.

    `own`: own tensors by name; `expected`: own's statistics, where a merge rests on them. Shapes are ours (a
    factor's rank too, where ours are known); counts are whole and not negative, and sum to at most `most_examples`, or
    own's number where that is larger; all else is finite, variances are not negative, a factor's squares are within
    them, and features are at most `LARGER` times as large (root mean square over a class) as own's largest.
    """
    for key in (key for key in aux if key.startswith(KINDS)):
        weight = key.partition(".")[2]
        if weight not in own:
            raise PeerError(f"{name}: statistic {key!r} belongs to no tensor of the model")
        found = aux[key]
        shape = tuple(expected[key].shape) if key in expected else shape_of(key, found, own[weight].shape)
        if shape is None or tuple(found.shape) != shape:
            raise PeerError(f"{name}: statistic {key!r} is {[*found.shape]}, expected {[*(shape or ())]}")
        if key.startswith(COUNT):
            most = max(most_examples, int(expected[key].sum()) if key in expected else 0)
            if found.dtype != torch.int64 or bool((found < 0).any()) or bool((found > most).any()):
                raise PeerError(f"{name}: statistic {key!r} holds counts that are not whole, negative or above {most}")
            if int(found.sum()) > most:
                raise PeerError(
                    f"{name}: statistic {key!r} counts {int(found.sum())} examples, more than {most}; agents must have "
                    "the same merge.statistics_samples"
                )
        elif not is_finite(found):
            raise PeerError(f"{name}: statistic {key!r} holds values that are not finite numbers")
        if key.startswith(VARIANCE) and bool((found < 0).any()):
            raise PeerError(f"{name}: statistic {key!r} holds variances below 0")
    for key in (key for key in aux if key.startswith(MEAN)):
        _check_sizes(name, aux, expected, key.partition(".")[2])


def is_finite(found: Tensor) -> bool:
    """Tell whether a tensor from a peer holds finite real numbers, of a type that torch computes with (no float8)."""
    return found.is_floating_point() and found.itemsize > 1 and bool(found.isfinite().all())


def _check_sizes(name: str, aux: Mapping[str, Tensor], expected: Mapping[str, Tensor], weight: str) -> None:
    if COUNT + weight not in aux or VARIANCE + weight not in aux:
        raise PeerError(f"{name}: statistic {MEAN + weight!r} came without its counts and variances")
    theirs = ClassGaussians.of(aux, weight)
    squares = theirs.factor.square().sum(1)
    if bool((squares > theirs.variance * (1 + SLACK) + SLACK * theirs.variance.mean()).any()):
        raise PeerError(f"{name}: statistic {FACTOR + weight!r} is larger than the variances beside it")
    if MEAN + weight not in expected:
        return
    ours, size = _size(ClassGaussians.of(expected, weight)), _size(theirs)
    if ours and size > LARGER * ours:
        raise PeerError(
            f"{name}: statistic {MEAN + weight!r} has features {size / ours:.3g} times as large as the agent's "
            f"own, more than {LARGER:g} times"
        )


def _size(found: ClassGaussians) -> float:
    """Return the largest root mean square of the norm of a class's features."""
    return sqrt(float((found.mean.square() + found.variance).sum(1).amax()))
