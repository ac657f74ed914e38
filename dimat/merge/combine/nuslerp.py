"""NuSLERP: spherical interpolation of two models, whole tensors or row by row, of weights or of deltas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from dimat.merge.deltas import combine_tensors, needs_base, task_vectors
from dimat.merge.fusion import copy_of
from dimat.merge.registry import combine_registry
from dimat.merge.spheres import interpolate, two_models
from dimat.merge.stages import Weights


@combine_registry.register("nuslerp")
def nuslerp(
    own: Weights,
    peers: Sequence[Weights],
    mixing: Sequence[float],
    *,
    base: Weights | None = None,
    t: Annotated[float, Field(ge=0, le=1)] | None = None,
    along: Literal["tensor", "rows", "columns"] = "tensor",
    deltas: bool = False,
) -> dict[str, Tensor]:
    """Return θ = [sin((1−t)Ω) θ_own + sin(tΩ) θ_peer] / sin Ω, with t = w_peer / (w_own + w_peer).

    `along` = "tensor": each tensor is one vector with one angle Ω; "rows": one angle for each index of the first
    axis (output unit); "columns": one for each column of the tensor laid out as (first axis, the rest). Tensors of
    one axis are one vector always. `deltas` = True interpolates θ − θ_base and adds the base again. Where
    sin Ω < 1e-6, or a vector is zero, the interpolation is linear; unlike "slerp", not before. Weight 0 and 1 return
    the models themselves.

    `mixing`: own first; `t` replaces the peer's share. Raises MergeError with more than one peer that has a weight
    ("karcher" merges any number), or with `deltas` and no base.

    NuSLERP is mergekit's name (its `weight` of two models, `nuslerp_flatten`, `nuslerp_row_wise`); the formula is
    Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985; no arXiv number.
    """
    start = needs_base(base, "nuslerp") if deltas else None
    peer, share = two_models("nuslerp", peers, mixing, t)
    if peer is None or not share:
        return copy_of(own)

    def between(ours: Tensor, theirs: Tensor) -> Tensor:
        if along == "tensor" or ours.ndim < 2:
            return interpolate(ours, theirs, share)
        dim = 1 if along == "rows" else 0
        return interpolate(ours.flatten(1), theirs.flatten(1), share, dim=dim).reshape(ours.shape)

    def merge(name: str, ours: Tensor, others: list[Tensor]) -> Tensor:
        if start is None or not ours.numel():
            return between(ours, others[0])
        origin, (first, second) = task_vectors(name, ours, others, start)
        return others[0] if share == 1 else origin + between(first, second)

    return combine_tensors(own, [peer], merge)
