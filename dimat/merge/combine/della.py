"""DELLA: drop at random, small changes more often than large ones, then elect signs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from dimat.errors import ConfigError
from dimat.merge.registry import combine_registry
from dimat.merge.stages import Weights
from dimat.merge.tensors.pieces import MergePieces, Pieces
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
    row_length,
    weighted_sum,
)


def keep_probability(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """Return each element's probability to stay: density − ε/2 for the smallest magnitude of a row, density + ε/2
    for the largest, in equal steps between. A vector is one row; a row of one element has density."""
    rows = (delta.flatten(1) if delta.ndim > 1 else delta.reshape(1, -1)).abs()
    columns = rows.shape[1]
    if columns == 1:
        return torch.full_like(delta, density)
    rank = torch.empty_like(rows)
    steps = torch.arange(columns, dtype=rows.dtype, device=rows.device).expand_as(rows)
    rank.scatter_(1, rows.argsort(dim=1, stable=True), steps)
    return rank.mul_(epsilon / (columns - 1)).add_(density - epsilon / 2).reshape(delta.shape)


@combine_registry.register("della", holds="pieces")
def della(
    own: Weights,
    peers: Sequence[Weights],
    mixing: Sequence[float],
    *,
    base: Weights | None = None,
    generator: torch.Generator | None = None,
    density: Densities = 0.5,
    epsilon: Annotated[float, Field(ge=0, lt=1)] = 0.1,
    rescale: bool | Literal["norm"] = True,
    merge_func: Literal["mean", "sum", "linear"] = "mean",
    scaling: Number = 1.0,
    weights: Coefficients | None = None,
) -> Weights:
    """Return θ = θ_base + scaling · M(m_k τ_k / q_k), where each element stays with probability q_k.

    MagPrune: within each row (output unit; a vector is one row) elements are ranked by magnitude, and q goes in
    equal steps from density − epsilon/2 for the smallest to density + epsilon/2 for the largest (mergekit's window
    is twice as wide: its epsilon e is `epsilon` = 2e here). Kept elements are divided by q if `rescale`; "norm"
    gives each delta instead the Σ|τ| that it had before, tensor by tensor (mergekit's). Then signs are
    elected as in TIES and merged over those that agree: `merge_func` = "mean" (the paper's), "sum" (mergekit's
    `normalize` = false), or "linear": all signs, Σ_k w_k. Draws are as in dare-linear: equal generators give equal
    bits, and the order of peers does not matter.

    `mixing`: own first, sum 1; equal models merge to themselves at density 1 and epsilon 0. `weights`: coefficients
    instead of the mixing weights; `density` may be a list too, one for each model, own first. Raises MergeError as
    dare-linear does, ConfigError where q would leave (0, 1].

    Paper: Deep et al., "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling",
    2024, arXiv 2406.11617.
    """
    for share in [density] if isinstance(density, int | float) else density:
        if not (share - epsilon / 2 > 0 and share + epsilon / 2 <= 1 + 1e-9):
            raise ConfigError(
                f"combine method 'della': density {share:g} and epsilon {epsilon:g} make probabilities from "
                f"{share - epsilon / 2:g} to {share + epsilon / 2:g}; choose epsilon so that they lie in (0, 1]"
            )
    base = needs_base(base, "della")
    cast = participants_of(own, peers, mixing, weights)
    if cast is None:
        return copy_of(own)
    shares = densities_of(density, cast, weights or mixing)
    root = root_of(generator, "della")

    def plan(name: str, pieces: Pieces) -> MergePieces:
        columns = row_length(own[name])

        def kept(deltas: list[Tensor]) -> list[Tensor]:
            rows = [delta.view(-1, columns) for delta in deltas]
            return [keep_probability(row, share, epsilon).flatten() for row, share in zip(rows, shares)]

        ratios: list[float] = []
        if rescale == "norm":
            first = draws(pieces, root, name)
            ratios = norm_ratios(pieces, lambda deltas: dropped(deltas, first, kept(deltas)))
        drawn = draws(pieces, root, name)

        def merge(deltas: list[Tensor]) -> Tensor:
            keep = kept(deltas)
            pruned = dropped(deltas, drawn, keep)
            if rescale == "norm":
                pruned = [delta.mul_(ratio) for delta, ratio in zip(pruned, ratios)]
            elif rescale:
                pruned = [delta.div_(share) for delta, share in zip(pruned, keep)]
            if merge_func == "linear":
                return weighted_sum(pruned, cast.coefficients)
            return elect(pruned, cast.coefficients, merge_func)

        return merge

    return merge_elements(cast, base, plan, scaling, rows=True, ordered=True)
