"""DARE: drop most of a delta at random and rescale the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dimat.merge.registry import combine_registry
from dimat.merge.stages import Weights
from dimat.merge.tensors.pieces import MergePieces, Pieces, PlanPieces
from dimat.merge.tensors.sparsify import draws, dropped, norm_ratios, root_of
from dimat.merge.tensors.streaming import needs_base
from dimat.merge.tensors.task_vectors import (
    Coefficients,
    Densities,
    Number,
    copy_of,
    densities_of,
    elect,
    merge_elements,
    participants_of,
    weighted_sum,
)


@combine_registry.register("dare-linear", holds="pieces")
def dare_linear(
    own: Weights,
    peers: Sequence[Weights],
    mixing: Sequence[float],
    *,
    base: Weights | None = None,
    generator: torch.Generator | None = None,
    density: Densities = 0.5,
    rescale: bool | Literal["norm"] = True,
    scaling: Number = 1.0,
    normalize: bool = False,
    weights: Coefficients | None = None,
) -> Weights:
    """Return θ = θ_base + scaling · Σ_k w_k m_k τ_k / density, where each element of m_k is 1 with probability density.

    The expectation is task arithmetic's. One seed is drawn from `generator` for a merge; the masks follow from it,
    the tensor's name and the delta's content, so equal generators give equal bits, the order of peers does not
    matter, and equal deltas are masked alike. `rescale` = False leaves out the division by density, "norm"
    gives each delta instead the Σ|τ| that it had before, tensor by tensor (mergekit's).

    `mixing`: own first, sum 1, as in task-arithmetic; equal models merge to themselves at density 1.
    `normalize`: divide by the sum of the coefficients; `weights`: coefficients instead of the mixing weights;
    `density` may be a list too, one for each model, own first.
    Raises MergeError as task-arithmetic does, and without a generator.

    Paper: Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
    ICML 2024, arXiv 2311.03099.
    """
    base = needs_base(base, "dare-linear")
    cast = participants_of(own, peers, mixing, weights)
    if cast is None:
        return copy_of(own)
    if normalize:
        scaling = cast.normalised(scaling)
    kept = densities_of(density, cast, weights or mixing)
    root = root_of(generator, "dare-linear")

    plan = _plan(lambda deltas: weighted_sum(deltas, cast.coefficients), kept, root, rescale)
    return merge_elements(cast, base, plan, scaling, ordered=True)


@combine_registry.register("dare-ties", holds="pieces")
def dare_ties(
    own: Weights,
    peers: Sequence[Weights],
    mixing: Sequence[float],
    *,
    base: Weights | None = None,
    generator: torch.Generator | None = None,
    density: Densities = 0.5,
    rescale: bool | Literal["norm"] = True,
    scaling: Number = 1.0,
    normalize: bool = False,
    weights: Coefficients | None = None,
) -> Weights:
    """Return θ = θ_base + scaling · Σ_k w_k m_k τ_k / density over those k whose sign is elected as in TIES.

    Masks, options and errors are dare-linear's. `normalize` = True divides at each element by the weights of the
    models that are added (TIES' mean), which together with `rescale` goes further than the deltas do.

    Paper: Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
    ICML 2024, arXiv 2311.03099.
    """
    base = needs_base(base, "dare-ties")
    cast = participants_of(own, peers, mixing, weights)
    if cast is None:
        return copy_of(own)
    kept = densities_of(density, cast, weights or mixing)
    root = root_of(generator, "dare-ties")

    how = "mean" if normalize else "sum"
    plan = _plan(lambda deltas: elect(deltas, cast.coefficients, how), kept, root, rescale)
    return merge_elements(cast, base, plan, scaling, ordered=True)


def _plan(together: MergePieces, densities: Sequence[float], root: int, rescale: bool | Literal["norm"]) -> PlanPieces:
    """Return the plan that drops elements of each delta by its density, divides the rest by it, and puts the deltas
    `together`."""

    def plan(name: str, pieces: Pieces) -> MergePieces:
        ratios: list[float] = []
        if rescale == "norm":
            first = draws(pieces, root, name)
            ratios = norm_ratios(pieces, lambda deltas: dropped(deltas, first, densities))
        drawn = draws(pieces, root, name)

        def merge(deltas: list[Tensor]) -> Tensor:
            left = dropped(deltas, drawn, densities)
            if rescale == "norm":
                return together([delta.mul_(ratio) for delta, ratio in zip(left, ratios)])
            return together([delta.div_(density) for delta, density in zip(left, densities)] if rescale else left)

        return merge

    return plan
