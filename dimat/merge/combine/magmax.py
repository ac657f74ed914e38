"""MagMax: of each parameter, the change of largest magnitude."""

from __future__ import annotations

from collections.abc import Sequence

from dimat.merge.registry import combine_registry
from dimat.merge.stages import Weights
from dimat.merge.tensors.pieces import alike
from dimat.merge.tensors.streaming import needs_base
from dimat.merge.tensors.task_vectors import Coefficients, Number, copy_of, loudest, merge_elements, participants_of


@combine_registry.register("magmax", holds="pieces")
def magmax(
    own: Weights,
    peers: Sequence[Weights],
    mixing: Sequence[float],
    *,
    base: Weights | None = None,
    scaling: Number = 1.0,
    weights: Coefficients | None = None,
) -> Weights:
    """Return θ = θ_base + scaling · τ_{k*}, element by element, with k* = argmax_k w_k |τ_k|.

    `mixing`: own first, sum 1; a weight says how loud a model is, not how far the result goes: equal weights give
    the published rule, weight 0 is never heard. Equal scores take the larger value, so the order of peers does not
    matter. `weights`: coefficients instead of the mixing weights; only their ratios count.
    Raises MergeError as task-arithmetic does.

    Paper: Marczak et al., "MagMax: Leveraging Model Merging for Seamless Continual Learning", ECCV 2024,
    arXiv 2407.06322.
    """
    base = needs_base(base, "magmax")
    cast = participants_of(own, peers, mixing, weights)
    if cast is None:
        return copy_of(own)
    return merge_elements(cast, base, alike(lambda deltas: loudest(deltas, cast.coefficients)), scaling)
