"""EMR: elect one task vector for all, then mask and rescale it for each agent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from dimat.merge.registry import combine_registry
from dimat.merge.stages import Weights
from dimat.merge.tensors.pieces import alike
from dimat.merge.tensors.streaming import needs_base
from dimat.merge.tensors.task_vectors import (
    Coefficients,
    Number,
    Participants,
    copy_of,
    elect,
    merge_elements,
    participants_of,
    read_deltas,
)


@combine_registry.register("emr", holds="pieces")
def emr(
    own: Weights,
    peers: Sequence[Weights],
    mixing: Sequence[float],
    *,
    base: Weights | None = None,
    output: Literal["own", "unified"] = "own",
    balance: Literal["tensor", "element"] = "tensor",
    scaling: Number = 1.0,
    weights: Coefficients | None = None,
) -> Weights:
    """Return θ = θ_base + scaling · λ · [τ_own · τ > 0] · τ: the elected task vector, masked and rescaled for own.

    τ has at each element the sign of Σ_k w_k τ_k (a tie is +) and the largest magnitude among the deltas of that
    sign (largest by w_k |τ_k|). λ = Σ|τ_own| / Σ|[τ_own · τ > 0] · τ| keeps own's mean magnitude; `balance` = "tensor"
    sums the means of all tensors, so that each counts alike (as the authors' program does), "element" the elements (as
    the paper writes it). `output` = "unified" returns θ_base + scaling · τ, neither masked nor rescaled. Each agent
    gets a model of its own, as the paper gives each task one.

    `mixing`: own first, sum 1; equal weights give the published τ. Equal models merge to themselves. `weights`:
    coefficients instead of the mixing weights, only ratios count. Reads the models twice. Raises MergeError as
    task-arithmetic does.

    Paper: Huang et al., "EMR-Merging: Tuning-Free High-Performance Model Merging", NeurIPS 2024, arXiv 2405.17461.
    """
    base = needs_base(base, "emr")
    cast = participants_of(own, peers, mixing, weights)
    if cast is None:
        return copy_of(own)
    if output == "unified":
        return merge_elements(cast, base, alike(lambda deltas: elect(deltas, cast.coefficients, "max")), scaling)
    if not cast.with_own:  # it has no vote, but the mask and the scale are its own
        cast = Participants(own, cast.peers, True, [0.0, *cast.coefficients])
    ours, theirs = 0.0, 0.0
    for pieces in read_deltas(cast, base):
        size = pieces.elements if balance == "tensor" else 1
        for deltas in pieces:
            ours += float(deltas[0].abs().sum()) / size
            theirs += float(_masked(deltas, cast.coefficients).abs().sum()) / size
    scale = ours / theirs if theirs else 1.0
    return merge_elements(cast, base, alike(lambda deltas: _masked(deltas, cast.coefficients)), scaling * scale)


def _masked(deltas: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """The elected task vector where own, the first, has its sign."""
    elected = elect(deltas, coefficients, "max")
    return elected * (elected * deltas[0] > 0)
