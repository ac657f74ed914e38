"""Great circles: interpolation between two tensors taken as vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dimat.errors import MergeError
from dimat.merge.stages import Weights
from dimat.merge.tensors.pieces import MergePieces, Pieces


def two_models(
    method: str, peers: Sequence[Weights], mixing: Sequence[float], t: float | None
) -> tuple[Weights | None, float]:
    """Return the one peer that has a weight, if any, and how far to go towards it: `t`, or its share of the weights.

    MergeError where more than one has a weight.
    """
    kept = [(peer, w) for peer, w in zip(peers, mixing[1:]) if w]
    if t is not None and len(peers) == 1:
        return peers[0], t
    if len(kept) > 1:
        raise MergeError(
            f"combine method {method!r} merges two models, got {len(kept) + 1}; choose 'karcher' for more than two"
        )
    if not kept:
        return None, 0.0
    peer, weight = kept[0]
    return peer, weight / (mixing[0] + weight) if t is None else t


SMALLEST_SINE = 1e-6
"""Vectors with an angle of a smaller sine are interpolated along the chord."""


def interpolate(start: Tensor, end: Tensor, t: float, dim: int) -> Tensor:
    """Return [sin((1−t)Ω) start + sin(tΩ) end] / sin Ω, with Ω the angle between the two vectors along `dim` at every
    other index; see `around`. Of complex numbers, parts are entries."""
    if start.is_complex():
        first, second = (torch.view_as_real(tensor.resolve_conj()) for tensor in (start, end))
        axes = (dim, -1)
    else:
        first, second, axes = start, end, (dim,)
    sums = [(x * y).sum(axes, keepdim=True) for x, y in ((first, first), (second, second), (first, second))]
    a, b, straight = _arc(sums[0], sums[1], sums[2], t, 1.0)
    curved = torch.where(straight, first + t * (second - first), a * first + b * second)
    return torch.view_as_complex(curved) if start.is_complex() else curved


def around(pieces: Pieces, t: float, *, lerp_above: float = 1.0) -> MergePieces:
    """Return how the pieces of two tensors, each taken as one vector, are interpolated at t, 0 < t < 1:
    [sin((1−t)Ω) start + sin(tΩ) end] / sin Ω, with Ω the angle between them.

    Where |cos Ω| > `lerp_above`, sin Ω < `SMALLEST_SINE`, or one vector is zero: start + t (end − start).
    """
    products = pieces.products()
    a, b, straight = _arc(products[0, 0], products[1, 1], products[0, 1], t, lerp_above)
    first, second = float(a), float(b)
    if straight:
        return lambda values: values[0].add_(values[1].sub_(values[0]), alpha=t)
    return lambda values: values[0].mul_(first).add_(values[1], alpha=second)


def _arc(first: Tensor, second: Tensor, product: Tensor, t: float, lerp_above: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return sin((1−t)Ω) / sin Ω, sin(tΩ) / sin Ω, and where they are of no use, from squared norms and products."""
    norms = (first * second).sqrt()
    cosine = (product / torch.where(norms > 0, norms, 1.0)).clamp(-1.0, 1.0)
    angle = cosine.acos()
    sine = angle.sin()
    straight = (cosine.abs() > lerp_above) | (sine < SMALLEST_SINE) | (norms == 0)
    sine = torch.where(straight, 1.0, sine)
    return ((1 - t) * angle).sin() / sine, (t * angle).sin() / sine, straight
