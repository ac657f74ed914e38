"""Krum and multi-Krum: the models that stand closest to their neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from dimat.errors import MergeError
from dimat.merge.combine.average import average
from dimat.merge.registry import combine_registry
from dimat.merge.stages import Weights
from dimat.merge.tensors.distances import inner_products, squared_distances
from dimat.merge.tensors.streaming import taking_part

TIE = 1e-9
"""Scores that differ by no more than this, relatively, are equal."""


@combine_registry.register("krum", holds="pieces")
def krum(
    own: Weights,
    peers: Sequence[Weights],
    weights: Sequence[float],
    *,
    f: Annotated[int, Field(ge=0)] | None = None,
    m: Annotated[int, Field(ge=1)] = 1,
) -> Weights:
    """Return the mean of the `m` models with the lowest score: m = 1 is Krum, more is multi-Krum.

    score(k) = Σ ‖θ_k − θ_l‖² over the n − f − 2 models l nearest to k (at least one), norms over the whole model
    (all floating-point tensors of any shape; integer and boolean ones are own's). n counts own and all peers whose
    weight is not 0. `f`: how many of them may be Byzantine; None takes the most that n allows, ⌊(n − 3)/2⌋.
    No more than n − f − 2 models are chosen, and models that tie with the last one chosen are chosen too, so that
    the order of peers does not matter (of two models alone, the mean).
    `weights` (own first): 0 leaves a model out, and otherwise all models count alike, as in the paper; weight
    would not tell who is honest. Breakdown point: f of n ≥ 2f + 3 models. m = 1 discards the most: it returns
    one agent's model, with that agent's noise. An attack that stays within the honest spread can be chosen.
    Models are read twice, tensor by tensor.
    Raises MergeError where n < 2f + 3 with f ≥ 1 given, and for values that are not finite.

    Paper: Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS
    2017, arXiv 1703.02757.
    """
    peers, weights = taking_part(peers, weights)
    counted = [0] if weights[0] else []
    counted += range(1, len(peers) + 1)
    n = len(counted)
    if f and n < 2 * f + 3:
        raise MergeError(f"krum with f = {f} needs at least {2 * f + 3} models, got {n}: lower f or leave it out")
    byzantine = max(0, (n - 3) // 2) if f is None else f
    near = max(1, n - byzantine - 2)
    distances = squared_distances(inner_products(own, peers))[counted][:, counted].sort(1).values
    scores = distances[:, 1 : near + 1].sum(1)  # the nearest of all is the model itself
    bar = float(scores.sort().values[min(m, near) - 1])
    chosen = [k for k, score in zip(counted, scores.tolist()) if score <= bar * (1 + TIE)]
    return average(own, peers, [(k in chosen) / len(chosen) for k in range(len(peers) + 1)])
