"""Karcher mean: the weighted mean of any number of models on the sphere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dimat.merge.registry import combine_registry
from dimat.merge.stages import Weights
from dimat.merge.tensors.pieces import MergePieces, Pieces
from dimat.merge.tensors.streaming import combine_elements
from dimat.merge.tensors.task_vectors import copy_of, participants_of, weighted_sum


def mean_direction(gram: Tensor, weights: Tensor, iterations: int, tolerance: float) -> Tensor | None:
    """Return a with Σ_k a_k u_k the Fréchet mean of unit vectors u_k, given their inner products; None where the
    weighted sum of the vectors, from which the search starts, is zero.

    x = Σ a_k u_k stays in the span of the vectors, so every step needs their inner products alone:
    Log_x(u_k) = (Ω_k / sin Ω_k)(u_k − cos Ω_k x), v = Σ_k w_k Log_x(u_k), x ← cos|v| x + sin|v| v/|v|.
    """
    a = weights.clone()
    length = float((a @ gram @ a).clamp(min=0).sqrt())
    if length < 1e-9:
        return None
    a = a / length
    for _ in range(iterations):
        cosine = (gram @ a).clamp(-1, 1)
        angle = cosine.acos()
        sine = angle.sin()
        pull = weights * torch.where(sine > 1e-9, angle / sine.clamp(min=1e-9), 1.0)
        step = pull - (pull @ cosine) * a
        size = float((step @ gram @ step).clamp(min=0).sqrt())
        if size <= tolerance:
            break
        a = torch.cos(torch.tensor(size)) * a + torch.sin(torch.tensor(size)) / size * step
        a = a / (a @ gram @ a).clamp(min=1e-30).sqrt()
    return a


@combine_registry.register("karcher", holds="pieces")
def karcher(
    own: Weights,
    peers: Sequence[Weights],
    mixing: Sequence[float],
    *,
    iterations: Annotated[int, Field(ge=1)] = 100,
    tolerance: Annotated[float, Field(gt=0)] = 1e-10,
) -> Weights:
    """Return θ = (Σ_k w_k ‖θ_k‖) · x, tensor by tensor, with x the Fréchet mean of the directions θ_k/‖θ_k‖.

    x minimises Σ_k w_k Ω(x, θ_k)² over unit vectors, Ω the angle, found by Riemannian gradient steps from the
    normalised weighted sum until a step is shorter than `tolerance` (radians) or `iterations` are done. Each tensor
    is one vector. For two models of equal norm this is SLERP. Only inner products are iterated on, so memory is one
    tensor per model and the cost hardly depends on the number of steps.

    `mixing`: own first, sum 1: w_k above. A zero tensor has no direction and counts with norm 0. Where the
    weighted sum of directions is zero (two opposite ones), no direction is better than another, and the plain weighted
    average is returned. Equal models merge to themselves. Needs no base, raises nothing of its own.

    Paper: Karcher, "Riemannian center of mass and mollifier smoothing", 1977 (no arXiv number); on spheres: Buss and
    Fillmore, "Spherical averages and applications to spherical splines and interpolation", TOG 2001.
    """
    cast = participants_of(own, peers, mixing)
    if cast is None:
        return copy_of(own)
    total = sum(cast.coefficients)
    shares = [c / total for c in cast.coefficients]

    def plan(_: str, pieces: Pieces) -> MergePieces:
        products = pieces.products()
        norms = products.diagonal().clamp_min(0).sqrt()
        used = [i for i, norm in enumerate(norms.tolist()) if norm > 0]
        if not used:
            return lambda values: values[0]
        gram = products[used][:, used] / torch.outer(norms[used], norms[used])
        weights = torch.tensor([shares[i] for i in used], dtype=torch.float64)
        a = mean_direction(gram.fill_diagonal_(1.0), weights / weights.sum(), iterations, tolerance)
        if a is None:
            return lambda values: weighted_sum(values, shares)
        scale = sum(w * norm for w, norm in zip(shares, norms.tolist()))
        factors = [float(x) * scale / float(norms[i]) for x, i in zip(a, used)]
        return lambda values: weighted_sum([values[i] for i in used], factors)

    return combine_elements(own, cast.peers, plan, cast.with_own)
