"""NuSLERP: spherical interpolation of two models or deltas, whole tensors or row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from dimat.merge.registry import combine_registry
from dimat.merge.stages import Weights
from dimat.merge.tensors.pieces import Pieces, accumulator
from dimat.merge.tensors.spheres import around, interpolate, two_models
from dimat.merge.tensors.streaming import MergedWeights, base_tensor, needs_base
from dimat.merge.tensors.task_vectors import copy_of, row_length, rows_of


@combine_registry.register("nuslerp", base_with="deltas")
def nuslerp(
    own: Weights,
    peers: Sequence[Weights],
    mixing: Sequence[float],
    *,
    base: Weights | None = None,
    t: Annotated[float, Field(ge=0, le=1)] | None = None,
    along: Literal["tensor", "rows", "columns"] = "tensor",
    deltas: bool = False,
) -> Weights:
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

    def merge(name: str, ours: Tensor, others: list[Tensor]) -> Tensor:
        origin = None if start is None else base_tensor(name, ours, start)
        if share == 1:
            return others[0].to(device=ours.device, dtype=ours.dtype, copy=True)
        if along == "tensor" or ours.ndim < 2:
            pieces = Pieces([ours, *others], ours, origin)
            return pieces.merged(around(pieces, share))
        if along == "rows":
            columns = row_length(ours)
            pieces = Pieces([ours, *others], ours, origin, rows_of(ours))
            return pieces.merged(
                lambda values: interpolate(*(v.view(-1, columns) for v in values), t=share, dim=1).flatten()
            )
        dtype = accumulator(ours)
        first, second = (tensor.to(ours.device, dtype) for tensor in (ours, *others))
        if origin is not None:
            first, second = first - origin, second - origin
        turned = interpolate(first.flatten(1), second.flatten(1), share, 0)
        turned = turned.reshape(ours.shape)
        return (turned if origin is None else turned + origin).to(ours.dtype)

    return MergedWeights(own, [peer], merge)
