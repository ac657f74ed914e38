"""Great circles: interpolation between two tensors taken as vectors, and inner products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dimat.errors import MergeError
from dimat.merge.fusion import real
from dimat.merge.stages import Weights


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


def inner(a: Tensor, b: Tensor) -> float:
    """Return Σ a_i b_i."""
    return float((a * b).sum())


def interpolate(
    start: Tensor,
    end: Tensor,
    t: float,
    *,
    lerp_above: float = 1.0,
    smallest_sine: float = 1e-6,
    dim: int | None = None,
) -> Tensor:
    """Return [sin((1−t)Ω) start + sin(tΩ) end] / sin Ω, with Ω the angle between the two; t = 0 and 1 are exact.

    Both are one vector each, or one vector along `dim` at every other index. Where |cos Ω| > `lerp_above`,
    sin Ω < `smallest_sine`, or one vector is zero: start + t (end − start). Of complex numbers, parts are entries.
    """
    if t in (0.0, 1.0):
        return end if t else start
    if start.is_complex():
        return torch.view_as_complex(
            interpolate(
                real(start), real(end), t, lerp_above=lerp_above, smallest_sine=smallest_sine, dim=dim
            ).contiguous()
        )
    axes = tuple(range(start.ndim)) if dim is None else (dim,)
    norms = (start.square().sum(axes, keepdim=True) * end.square().sum(axes, keepdim=True)).sqrt()
    cosine = ((start * end).sum(axes, keepdim=True) / torch.where(norms > 0, norms, 1.0)).clamp(-1.0, 1.0)
    angle = cosine.acos()
    sine = angle.sin()
    straight = (cosine.abs() > lerp_above) | (sine < smallest_sine) | (norms == 0)
    sine = torch.where(straight, 1.0, sine)
    first = torch.where(straight, 1 - t, ((1 - t) * angle).sin() / sine)
    second = torch.where(straight, t, (t * angle).sin() / sine)
    curved = first * start + second * end
    return torch.where(straight, start + t * (end - start), curved)
