"""Pooling, resizing, reflection padding, pixel shuffle: positions fixed, channels pass."""

from __future__ import annotations

import re

from dimat.symmetry.rules.call import Call, NoRule, Result, Value, op_name, rule

_SPATIAL = "spatial axis"


@rule(
    *(f"aten.{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)),
    *(f"aten.max_pool{n}d_with_indices" for n in (1, 2, 3)),
    *(f"aten._adaptive_avg_pool{n}d" for n in (2, 3)),
    *(f"aten.fractional_max_pool{n}d" for n in (2, 3)),
    *(f"aten.upsample_nearest{n}d" for n in (1, 2, 3)),
    *(f"aten._upsample_nearest_exact{n}d" for n in (1, 2, 3)),
    *(f"aten.{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)),
    "aten.upsample_linear1d",
    "aten.upsample_bilinear2d",
    "aten.upsample_bicubic2d",
    "aten.upsample_trilinear3d",
    "aten._upsample_bilinear2d_aa",
    "aten._upsample_bicubic2d_aa",
)
def over_positions(call: Call) -> Result:
    """The last n axes are positions (n as in the operation's name); the axes before them pass."""
    found = re.search(r"([123])d", op_name(call.node.target))
    if found is None:
        raise NoRule("number of spatial axes not known")
    x = call.tensors()[0]
    kept = x.dims[: x.ndim - int(found.group(1))]
    call.freeze(x.dims[len(kept) :], _SPATIAL)
    outputs = [
        Value((*kept, *(call.fixed(size, _SPATIAL) for size in call.shape(i)[len(kept) :])))
        for i in range(call.output_count)
    ]
    return outputs[0] if len(outputs) == 1 else list(outputs)


@rule("aten.pixel_shuffle")
def pixel_shuffle(call: Call) -> Result:
    """(C r², H, W) becomes (C, H r, W r): channels are (C, r²), of which r² is a position."""
    x = call.value("self")
    factor = int(call.constant("upscale_factor"))
    channels, inner = call.domain.factor(x.dims[-3], [x.shape[-3] // factor**2, factor**2])
    call.freeze([inner, *x.dims[-2:]], _SPATIAL)
    return Value((*x.dims[:-3], channels, *(call.fixed(size, _SPATIAL) for size in call.shape()[-2:])))


@rule("aten.pixel_unshuffle")
def pixel_unshuffle(call: Call) -> Result:
    """(C, H r, W r) becomes (C r², H, W)."""
    x = call.value("self")
    square = int(call.constant("downscale_factor")) ** 2
    call.freeze(x.dims[-2:], _SPATIAL)
    channels = call.domain.merge([x.dims[-3], call.fixed(square, _SPATIAL)])
    return Value((*x.dims[:-3], channels, *(call.fixed(size, _SPATIAL) for size in call.shape()[-2:])))


@rule("aten.im2col")
def im2col(call: Call) -> Result:
    """(N, C, H, W) becomes (N, C · kernel positions, places)."""
    x = call.value("self")
    if x.ndim != 4:
        raise NoRule("im2col without a batch axis")
    call.freeze(x.dims[2:], _SPATIAL)
    shape = call.shape()
    channels = call.domain.merge([x.dims[1], call.fixed(shape[1] // x.shape[1], _SPATIAL)])
    return Value((x.dims[0], channels, call.fixed(shape[2], _SPATIAL)))


@rule("aten.col2im")
def col2im(call: Call) -> Result:
    """(N, C · kernel positions, places) becomes (N, C, H, W)."""
    x, shape = call.value("self"), call.shape()
    if x.ndim != 3:
        raise NoRule("col2im without a batch axis")
    channels, inner = call.domain.factor(x.dims[1], [shape[1], x.shape[1] // shape[1]])
    call.freeze([inner, x.dims[2]], _SPATIAL)
    return Value((x.dims[0], channels, *(call.fixed(size, _SPATIAL) for size in shape[2:])))


@rule("aten.grid_sampler", "aten.grid_sampler_2d", "aten.grid_sampler_3d", "aten.cudnn_grid_sampler")
def grid_sampler(call: Call) -> Result:
    """Values at the places that a grid names: spatial axes are positions, channels pass."""
    x, grid = call.tensors()[:2]
    call.domain.unify(x.dims[0], grid.dims[0])
    call.freeze([*x.dims[2:], *grid.dims[1:]], _SPATIAL)
    return Value((*x.dims[:2], *(call.fixed(size, _SPATIAL) for size in call.shape()[2:])))


@rule("aten.affine_grid_generator")
def affine_grid(call: Call) -> Result:
    """A grid of coordinates for each matrix of the batch."""
    theta = call.value("theta")
    call.freeze(theta.dims[1:], _SPATIAL)
    return Value((theta.dims[0], *(call.fixed(size, _SPATIAL) for size in call.shape()[1:])))
