"""Convolutions of any number of spatial axes, grouped, depthwise and transposed."""

from __future__ import annotations

from dimat.symmetry.rules.call import Call, NoRule, Result, Value, rule


@rule("aten.conv1d", "aten.conv2d", "aten.conv3d")
def conv(call: Call) -> Result:
    """W has shape (out, in / groups, *kernel)."""
    return _conv(call, transposed=False)


@rule("aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d")
def conv_transpose(call: Call) -> Result:
    """W has shape (in, out / groups, *kernel)."""
    return _conv(call, transposed=True)


@rule("aten.convolution", "aten._convolution")
def convolution(call: Call) -> Result:
    """Either of the two, as the argument `transposed` says."""
    return _conv(call, transposed=bool(call.constant("transposed", False)))


def _conv(call: Call, *, transposed: bool) -> Result:
    x = call.value("input")
    weight, bias = call.value("weight"), call.optional("bias")
    channel = x.ndim - weight.ndim + 1
    if channel not in (0, 1):
        raise NoRule("convolution of an unusual shape")
    groups = int(call.constant("groups", 1))
    given, out = (weight.dims[0], weight.dims[1]) if transposed else (weight.dims[1], weight.dims[0])
    inner = shared = ()
    if groups > 1:
        # weight axis 0 is (group, inner); the other channel axis is made of the same groups and axis 1
        shared = call.domain.fresh(groups)
        inner = call.domain.fresh(weight.shape[0] // groups)
        call.domain.unify(weight.dims[0], call.domain.merge([shared, inner]))
        other = call.domain.merge([shared, weight.dims[1]])
        given, out = (weight.dims[0], other) if transposed else (other, weight.dims[0])
    call.domain.unify(x.dims[channel], given)
    if groups > 1:
        # inside a group all channels are combined, of different groups none; which axis holds them depends
        call.mix([inner if transposed else weight.dims[1]], [shared])
    else:
        call.mix([given], [*x.dims[:channel], out])
    if bias is not None:
        call.domain.unify(out, bias.dims[0])
    call.freeze(weight.dims[2:], "position in a kernel")
    spatial = x.dims[channel + 1 :]
    if _is_pointwise(call, weight.shape[2:], transposed):
        return Value((*x.dims[:channel], out, *spatial))
    call.freeze(spatial, "spatial axis of a convolution")
    shape = call.shape()[channel + 1 :]
    return Value((*x.dims[:channel], out, *(call.fixed(size, "spatial axis of a convolution") for size in shape)))


def _is_pointwise(call: Call, kernel: tuple[int, ...], transposed: bool) -> bool:
    stride = call.constant("stride", [1])
    padding = call.constant("padding", [0])
    steps = stride if isinstance(stride, list) else [stride]
    pads = padding if isinstance(padding, list) else [0 if padding in ("valid", "same") else padding]
    return not transposed and set(kernel) == {1} and set(steps) == {1} and set(pads) == {0}
