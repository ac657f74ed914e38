"""LoRA-LEGO: the ranks of all adapters as building blocks, clustered and put together anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from dimat.merge.lora.factors import Factors, merge_products, merged_rank, nothing_to_merge
from dimat.merge.lora.lora_units import assembled, clusters_of, units_of
from dimat.merge.registry import combine_registry
from dimat.merge.stages import Weights
from dimat.merge.tensors.task_vectors import Number


@combine_registry.register("lora-lego", lora_products=True)
def lora_lego(
    own: Weights,
    peers: Sequence[Weights],
    weights: Sequence[float],
    *,
    rank: Annotated[int, Field(ge=1)] | None = None,
    scaling: Number = 1.0,
) -> Weights:
    """Return LoRA factors whose ranks are the centroids of r clusters of all models' ranks.

    A unit is a row a of A (r, in) with its column b of B (out, r). As b aᵀ is the same for (c a, b/c) and (−a, −b), a
    unit counts as its direction v = [a/‖a‖; b/‖b‖]/√2 up to a sign, and a strength p = ‖a‖‖b‖. k-means over all
    models' units, with weights w_k p_i, finds r clusters and signs (Ward's clusters are where it begins: no draws, and
    the order of models does not matter). A cluster's unit is its centroid [a; b], brought back to the mean √p of its
    units, weighted by w_k, as averages of different directions are short (parameter reweighting); and all
    are scaled by (r̄/n)^½ (output reweighting), where r̄ is the mean number of units of the models that have some,
    weighted by w_k, and n ≤ r counts the clusters.

    `weights` (own first, sum 1) say how much a model's units count in their cluster. They are no shares of the
    result's size: units that nobody else has keep their strength. So the result is no average, and of about one
    model's size. A model of weight 0 takes no part. Factors that are equal in all models, or of one that is alone,
    are the result as they are; equal units are one, so that equal models also merge to themselves if their ranks are
    in different order. Permuting a model's ranks, flipping their signs or moving a factor from a to b changes nothing;
    another basis (B R, R⁻¹ A), of the same product, does. Tensors that are no LoRA factors are averaged.
    `rank`: another rank, at most Σ_k r_k; it changes shapes, which only adapters on disk can (`dimat merge`).
    `scaling` multiplies the result. See `dimat.merge.lora.factors` for names, shapes and scales. Raises MergeError as
    "lora-concat" does.

    Paper: Zhao et al., "Merging LoRAs like Playing LEGO: Pushing the Modularity of LoRA to Extremes Through Rank-Wise
    Clustering", ICLR 2025, arXiv 2409.16167, which has no mixing weights, and takes [a; b] as they are stored. That
    there are two reweightings, and against what, is the paper's; the formulas for them above are ours.
    """

    def merge(mine: Factors, parts: list[Factors], mixing: list[float]) -> Factors:
        size = merged_rank(rank, mine.rank, [part.rank for part in parts])
        if nothing_to_merge(parts, size, scaling):
            return parts[0]
        units = units_of(parts, mixing)
        if not len(units.weights):  # every B is zero: own's A stays, so that training can go on
            a = mine.a if size == mine.rank else mine.a.new_zeros(size, mine.a.shape[1])
            return Factors(a, mine.b.new_zeros(mine.b.shape[0], size))
        clusters = clusters_of(units, size)
        merged = assembled(units, clusters, size)
        factor = (units.rank / clusters.shape[1]) ** 0.5 * (scaling if len(parts) > 1 else 1.0)
        return Factors(merged.a, merged.b * factor)

    return merge_products(own, peers, weights, merge)
