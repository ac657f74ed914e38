"""The ranks of LoRA adapters as units to cluster: each a row of A with its column of B.

A unit's product b aᵀ is the same for (a, b), (c a, b / c) and (−a, −b). So a unit is represented by a direction
v = [a/‖a‖; b/‖b‖] / √2, known up to its sign, and a strength p = ‖a‖ ‖b‖. Everything is computed from the Gram matrix
of the directions, which is as small as the number of units, whatever the layer's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dimat.merge.lora.factors import Factors

SAME = 4096
"""Units whose squared distance is below this, in units of rounding, are one unit, however many may stay."""

TINY = 1e-30
"""Least mass of a unit, as a share of the largest, so that none counts as absent."""

ROUNDS = 100
"""Most passes of k-means after the first clusters; few are needed."""


@dataclass(frozen=True)
class Units:
    """Units of all models, none of strength 0. `a` and `b` hold unit vectors (n, columns) and (n, rows); `rank` is the
    weighted mean of how many a model has, over those that have any."""

    a: Tensor
    b: Tensor
    strengths: Tensor
    weights: Tensor
    rank: float


def units_of(parts: Sequence[Factors], weights: Sequence[float]) -> Units:
    """Return the units of all models, each with its model's weight, in an order that does not depend on the models'."""
    a, b = torch.cat([part.a for part in parts]), torch.cat([part.b.mT for part in parts])
    size_a, size_b = a.norm(dim=1), b.norm(dim=1)
    alive = (size_a > 0) & (size_b > 0)
    counts = [int(each.sum()) for each in alive.split([part.rank for part in parts])]
    mass = torch.cat([a.new_full((count,), weight) for count, weight in zip(counts, weights)])
    heard = sum(weight for count, weight in zip(counts, weights) if count)
    a, b, strengths = a[alive] / size_a[alive, None], b[alive] / size_b[alive, None], (size_a * size_b)[alive]
    likeness = (a @ a.mT + b @ b.mT).abs().sum(1)
    order = sorted(range(len(a)), key=lambda i: (-float(mass[i] * strengths[i]), -float(likeness[i])))
    return Units(a[order], b[order], strengths[order], mass[order], float(mass.sum()) / heard if heard else 0.0)


def clusters_of(units: Units, count: int) -> Tensor:
    """Return the clusters of k-means as a matrix (n, ≤ count): a unit's weight, with the sign in which it counts.

    Minimises Σ_i w_i p_i ‖σ_i v_i − c_j‖² over clusters j and signs σ, where c_j = Σ w_i p_i σ_i v_i / Σ w_i p_i is a
    cluster's centroid. Ward's clustering (the two clusters whose union costs least become one, until `count` are left)
    is where it begins, so that nothing is drawn at random; it also unites units that are the same.
    """
    gram = (units.a @ units.a.mT + units.b @ units.b.mT) / 2
    mass = units.weights * units.strengths
    mass = (mass / mass.max()).clamp_min(TINY)
    signed = _refined(gram, mass, _united(gram, mass, count))
    return signed[:, signed.abs().sum(0) > 0]


def _united(gram: Tensor, mass: Tensor, count: int) -> Tensor:
    """Return Ward's clusters (n, k), k ≤ `count`."""
    same = SAME * torch.finfo(gram.dtype).eps
    signed = mass.diag()  # a row per cluster: what its units add to its sum of vectors
    inner = mass[:, None] * gram * mass  # products of the clusters' sums
    total = mass.clone()

    def costs(i: Tensor) -> Tensor:
        """Return the cost of a union of clusters `i` with each."""
        square = inner.diagonal()
        joint = (square[i][:, None] + square + 2 * inner[i].abs()) / (total[i][:, None] + total)
        cost = (square / total)[i][:, None] + square / total - joint
        return cost.masked_fill_(i[:, None] == every, torch.inf).masked_fill_(gone, torch.inf)

    every = torch.arange(len(mass), device=mass.device)
    gone = torch.zeros_like(mass, dtype=torch.bool)
    cost = costs(every)
    for left in range(len(mass), 1, -1):
        i, j = divmod(int(cost.argmin()), len(mass))
        if left <= count and float(cost[i, j]) > same * float(torch.minimum(total[i], total[j])):
            break
        sign = -1.0 if float(inner[i, j]) < 0 else 1.0
        signed[i] += sign * signed[j]
        inner[i] += sign * inner[j]
        inner[:, i] += sign * inner[:, j]
        total[i] += total[j]
        gone[j] = True
        cost[j], cost[:, j] = torch.inf, torch.inf
        cost[i] = costs(every[i : i + 1])[0]
        cost[:, i] = cost[i]
    return signed[~gone].mT


def _refined(gram: Tensor, mass: Tensor, signed: Tensor) -> Tensor:
    """Return clusters in which each unit is nearest to its own centroid, or what `ROUNDS` passes made."""
    for _ in range(ROUNDS if signed.shape[1] > 1 else 0):
        total = signed.abs().sum(0)
        live = total > 0
        centroids = signed / torch.where(live, total, 1.0)
        near = gram @ centroids
        length = (centroids * near).sum(0)
        distance = (1 + length - 2 * near.abs()).masked_fill(~live, torch.inf)
        present = signed.abs().argmax(1)
        best = distance.argmin(1)
        stays = (
            distance.gather(1, best[:, None])
            >= distance.gather(1, present[:, None]) - SAME * torch.finfo(gram.dtype).eps
        )
        chosen = torch.where(stays[:, 0], present, best)
        sign = torch.where(near.gather(1, chosen[:, None])[:, 0] < 0, -1.0, 1.0)
        moved = torch.zeros_like(signed)
        moved[torch.arange(len(mass), device=mass.device), chosen] = (sign * mass).to(signed)
        if torch.equal(moved, signed):
            break
        signed = moved
    return signed


def assembled(units: Units, clusters: Tensor, rank: int) -> Factors:
    """Return one unit for each cluster: its centroid at the mean √p of its units, weighted; zeros for the rest."""
    a = torch.zeros(rank, units.a.shape[1], dtype=units.a.dtype, device=units.a.device)
    b = torch.zeros(units.b.shape[1], rank, dtype=units.b.dtype, device=units.b.device)
    member = (clusters != 0).to(units.weights.dtype) * units.weights[:, None]
    size = (units.strengths.sqrt() @ member) / member.sum(0)
    total_a, total_b = clusters.mT @ units.a, clusters.mT @ units.b
    length = ((total_a.square().sum(1) + total_b.square().sum(1)) / 2).sqrt()
    factor = torch.where(length > 0, size / torch.where(length > 0, length, 1.0), 0.0)[:, None]
    a[: len(size)] = total_a * factor
    b[:, : len(size)] = (total_b * factor).mT
    return Factors(a, b)
