"""Task arithmetic: deltas from a base, added up."""

from __future__ import annotations

from collections.abc import Sequence

from dimat.merge.registry import combine_registry
from dimat.merge.stages import Weights
from dimat.merge.tensors.pieces import alike
from dimat.merge.tensors.streaming import needs_base
from dimat.merge.tensors.task_vectors import (
    Coefficients,
    Number,
    copy_of,
    merge_elements,
    participants_of,
    weighted_sum,
)


@combine_registry.register("task-arithmetic", holds="pieces")
def task_arithmetic(
    own: Weights,
    peers: Sequence[Weights],
    mixing: Sequence[float],
    *,
    base: Weights | None = None,
    scaling: Number = 1.0,
    normalize: bool = False,
    weights: Coefficients | None = None,
) -> Weights:
    """Return θ = θ_base + scaling · Σ_k w_k τ_k with τ_k = θ_k − θ_base.

    `mixing`: own first, sum 1; with `scaling` 1 the result is the weighted average. The paper's λ Σ_k τ_k over n
    models is `scaling` = λ·n with equal weights.
    Options: `weights`: coefficients instead of the mixing weights, any sum and sign (a negative one takes a task
    away); `normalize`: divide by their sum. Shapes: any; element by element, one tensor of each model at a time.
    Raises MergeError without a base, where its tensors do not fit, or where `weights` is not one number per model.

    Paper: Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, arXiv 2212.04089.
    """
    base = needs_base(base, "task-arithmetic")
    cast = participants_of(own, peers, mixing, weights)
    if cast is None:
        return copy_of(own)
    if normalize:
        scaling = cast.normalised(scaling)
    return merge_elements(cast, base, alike(lambda deltas: weighted_sum(deltas, cast.coefficients)), scaling)
