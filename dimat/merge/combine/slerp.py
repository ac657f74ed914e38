"""Spherical linear interpolation of two models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from dimat.merge.registry import combine_registry
from dimat.merge.stages import Weights
from dimat.merge.tensors.pieces import MergePieces, Pieces
from dimat.merge.tensors.spheres import around, two_models
from dimat.merge.tensors.streaming import combine_elements
from dimat.merge.tensors.task_vectors import copy_of


@combine_registry.register("slerp", holds="pieces")
def slerp(
    own: Weights,
    peers: Sequence[Weights],
    mixing: Sequence[float],
    *,
    t: Annotated[float, Field(ge=0, le=1)] | None = None,
    lerp_above: Annotated[float, Field(ge=0, le=1)] = 0.9995,
) -> Weights:
    """Return θ = [sin((1−t)Ω) θ_own + sin(tΩ) θ_peer] / sin Ω, tensor by tensor, with Ω the angle between the two.

    Each tensor is one vector. Where |cos Ω| exceeds `lerp_above`, or one of the two is zero, θ = θ_own +
    t (θ_peer − θ_own): near 1 the two agree, near −1 the arc is not defined. Vectors are not made equally long first:
    with unequal norms the norm moves between them, as in mergekit. Weight 0 and 1 return the models themselves.

    `mixing`: own first; t is the peer's weight. `t` replaces it. Needs no base.
    Raises MergeError with more than one peer that has a weight: "karcher" merges any number.

    Paper: Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985; no arXiv number.
    """
    peer, share = two_models("slerp", peers, mixing, t)
    if peer is None or not share:
        return copy_of(own)

    def plan(_: str, pieces: Pieces) -> MergePieces:
        return (lambda values: values[1]) if share == 1 else around(pieces, share, lerp_above=lerp_above)

    return combine_elements(own, [peer], plan)
