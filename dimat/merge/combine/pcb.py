"""PCB-Merging: parameters compete within a task and between tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dimat.merge.registry import combine_registry
from dimat.merge.stages import Weights
from dimat.merge.tensors.pieces import alike
from dimat.merge.tensors.sparsify import magnitudes, order_statistics
from dimat.merge.tensors.streaming import needs_base
from dimat.merge.tensors.task_vectors import (
    Coefficients,
    Density,
    Number,
    copy_of,
    merge_elements,
    participants_of,
    read_deltas,
    weighted_sum,
)


def scaled(values: Tensor, low: float, high: float) -> Tensor:
    """Return values clipped to [low, high] and mapped to [0, 1]; 1 where low is high, as all count alike."""
    return (values.clamp(low, high) - low) / (high - low) if high > low else torch.ones_like(values)


@combine_registry.register("pcb-merging", holds="pieces")
def pcb_merging(
    own: Weights,
    peers: Sequence[Weights],
    mixing: Sequence[float],
    *,
    base: Weights | None = None,
    ratio: Density = 0.1,
    clip: Annotated[float, Field(ge=0, lt=0.5)] = 1e-4,
    scaling: Number = 1.0,
    weights: Coefficients | None = None,
) -> Weights:
    """Return θ = θ_base + scaling · Σ_k w_k s_k τ̃_k / Σ_k w_k s_k, with scores s_k in [0, 1] for each parameter.

    Over the whole model of d elements and n models: τ̃_k is τ_k with |τ_k| clipped to its quantiles `clip` and
    1 − `clip`; within a task a_k = exp(n · N(|τ̃_k|)²), between tasks b_k = tanh(τ_k · Σ_j r_j τ_j), with N mapping
    the smallest value to 0 and the largest to 1 and r_j = n·w_j; β_k = a_k b_k; s_k = N(max(β_k, its 1 − `ratio`
    quantile)), so that a share `ratio` of each task's parameters scores at all. This is what the authors' program
    computes (the paper writes softmax for the two factors).

    `mixing`: own first, sum 1; with equal weights this is the published formula. A parameter that scores with no task
    falls back to the base, and the very largest deltas are clipped: equal models merge to themselves only in part,
    `ratio` = 1 included, which drops the lowest score. `weights`: coefficients instead of the mixing weights, only
    ratios count. The models are read five times. Raises MergeError as task-arithmetic does.

    Paper: Du et al., "Parameter Competition Balancing for Model Merging", NeurIPS 2024, arXiv 2410.02396.
    """
    base = needs_base(base, "pcb-merging")
    cast = participants_of(own, peers, mixing, weights)
    if cast is None:
        return copy_of(own)
    count, relative = len(cast.coefficients), cast.relative
    bounds = order_statistics(
        lambda: ([magnitudes(delta) for delta in deltas] for pieces in read_deltas(cast, base) for deltas in pieces),
        lambda d: (int(d * clip), max(0, int(d * (1 - clip) - 1))),
    )
    bounds = [(min(low, high), high) for low, high in bounds]

    def strengths(deltas: list[Tensor]) -> list[Tensor]:
        total = weighted_sum(deltas, relative)
        return [
            # in float32, as thresholds are, so that what lies at a threshold scores exactly 0
            ((count * scaled(delta.abs(), *bound).square()).exp() * (delta * total).tanh()).to(torch.float32)
            for delta, bound in zip(deltas, bounds)
        ]

    tops = order_statistics(
        lambda: (strengths(deltas) for pieces in read_deltas(cast, base) for deltas in pieces),
        lambda d: (min(d - 1, int(d * (1 - ratio))), d - 1),
    )

    def merge(deltas: list[Tensor]) -> Tensor:
        merged, share = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
        for delta, strength, bound, top, w in zip(deltas, strengths(deltas), bounds, tops, relative):
            score = scaled(strength.to(delta.dtype), *top).mul_(w)
            merged.add_(delta.sign() * delta.abs().clamp(*bound) * score)
            share.add_(score)
        return merged.div_(torch.where(share > 1e-12, share, 1.0))

    return merge_elements(cast, base, alike(merge), scaling)
