"""Weighted average, tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence

from dimat.merge.registry import combine_registry
from dimat.merge.stages import Weights
from dimat.merge.tensors.pieces import alike
from dimat.merge.tensors.streaming import combine_elements, taking_part
from dimat.merge.tensors.task_vectors import mean_of


@combine_registry.register("average", holds="pieces", linear=True)
def average(own: Weights, peers: Sequence[Weights], weights: Sequence[float]) -> Weights:
    """Return θ = w_0 θ_own + Σ_k w_k θ_k, computed as θ_own + Σ_k w_k (θ_k − θ_own).

    `weights`: own first, sum 1. All floating-point tensors are averaged, BatchNorm's running statistics too;
    integer and boolean ones are own's. float32 accumulates in float64, half types in float32. Merging with
    equal copies returns own bit for bit, and so does weight 1 on self. Peers are read one tensor at a time.

    Paper: the consensus step of Lian et al., "Can Decentralized Algorithms Outperform Centralized Algorithms?",
    NeurIPS 2017, arXiv 1705.09056 (there on whole models without alignment).
    """

    peers, weights = taking_part(peers, weights)

    return combine_elements(own, peers, alike(lambda values: mean_of(values, weights)))
