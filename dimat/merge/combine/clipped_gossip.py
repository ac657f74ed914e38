"""Self-centred clipping (ClippedGossip): no peer moves this agent further than a radius."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from dimat.merge.combine.average import average
from dimat.merge.registry import combine_registry
from dimat.merge.stages import Weights
from dimat.merge.tensors.distances import inner_products
from dimat.merge.tensors.streaming import taking_part

ROUNDING = 1e-9


@combine_registry.register("clipped-gossip", holds="pieces")
def clipped_gossip(
    own: Weights,
    peers: Sequence[Weights],
    weights: Sequence[float],
    *,
    radius: Annotated[float, Field(gt=0)] | None = None,
    byzantine: Annotated[float, Field(gt=0, lt=1)] = 0.34,
) -> Weights:
    """Return θ = θ_own + Σ_k w_k clip(θ_k − θ_own, τ), clip(z, τ) = z · min(1, τ/‖z‖), norms over the whole model.

    τ = `radius`, a length in weight space. None adapts it to this merge: τ² = Σ_{k ∈ H} w_k ‖θ_k − θ_own‖² / δ,
    the theorem's radius, with δ = `byzantine`, the weight that attackers may hold, and H, which the theorem has
    as the honest models, the nearest ones (own first) up to a weight of 1 − δ. `radius` makes `byzantine` idle.
    Norms are over all floating-point tensors of any shape; integer and boolean ones are own's.
    `weights` (own first, sum 1): those of gossip, times the clipping factor; what is clipped stays with own.
    Breakdown point: attackers of weight q ≤ δ move the result by at most q τ, and none ever by more than w_k τ,
    so this agent's own model must be honest. Nearest peers must add up to 1 − δ without attackers' help, else a
    far attacker enters H and sets τ. Models are read twice, tensor by tensor.
    Raises MergeError for values that are not finite.

    Paper: He, Karimireddy, Jaggi, "Byzantine-Robust Decentralized Learning via ClippedGossip", 2022,
    arXiv 2202.01545.
    """
    peers, weights = taking_part(peers, weights)
    lengths = inner_products(own, peers).diagonal()[1:].sqrt().tolist()
    limit = _adapted(lengths, weights, byzantine) if radius is None else radius
    factors = [min(1.0, limit / length) if length else 1.0 for length in lengths]
    return average(own, peers, [weights[0], *(w * factor for w, factor in zip(weights[1:], factors))])


def _adapted(lengths: list[float], weights: Sequence[float], byzantine: float) -> float:
    """Return the adaptive radius. Peers that are equally far are all taken in, so that their order does not matter."""
    mass, total, last = weights[0], 0.0, 0.0
    for length, weight in sorted(zip(lengths, weights[1:])):
        if mass >= 1 - byzantine - ROUNDING and length > last:
            break
        mass, total, last = mass + weight, total + weight * length**2, length
    return (total / byzantine) ** 0.5
