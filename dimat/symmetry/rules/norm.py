"""Normalisations: affine parameters and running statistics move with their axis."""

from __future__ import annotations

from dimat.symmetry.rules.call import Call, NoRule, Result, Value, rule

_PER_CHANNEL = ("weight", "bias", "running_mean", "running_var")


@rule(
    "aten.batch_norm",
    "aten.instance_norm",
    "aten.native_batch_norm",
    "aten._native_batch_norm_legit",
    "aten._native_batch_norm_legit_no_training",
    "aten.cudnn_batch_norm",
)
def batch_norm(call: Call) -> Result:
    """Per channel (axis 1): weight, bias, running mean and variance, each of shape (channels,)."""
    x = call.tensors()[0]
    _per_channel(call, x)
    call.mix((*x.dims[:1], *x.dims[2:]), x.dims[1:2])
    return _first_of(call, x)


@rule("aten.group_norm", "aten.native_group_norm")
def group_norm(call: Call) -> Result:
    """Channels are (group, inside); permuting inside a group, or whole groups, changes no statistic."""
    x = call.value("input")
    groups = int(call.constant("num_groups") or call.constant("group"))
    channels = x.shape[1]
    if groups > 1:
        inner, outer = call.domain.fresh(channels // groups), call.domain.fresh(groups)
        call.domain.unify(x.dims[1], call.domain.merge([outer, inner]))
        call.mix([inner, *x.dims[2:]], [x.dims[0], outer])
    _per_channel(call, x)
    return _first_of(call, x)


@rule("aten.layer_norm", "aten.rms_norm", "aten.native_layer_norm", "aten._fused_rms_norm")
def layer_norm(call: Call) -> Result:
    """Over the last axes: a mean or a mean square does not care for order; affine axes follow the input's."""
    x = call.value("input")
    for name in ("weight", "bias"):
        affine = call.optional(name)
        if affine is not None:
            for one, other in zip(x.dims[x.ndim - affine.ndim :], affine.dims, strict=True):
                call.domain.unify(one, other)
    kept = x.ndim - len(call.constant("normalized_shape"))
    call.mix(x.dims[kept:], x.dims[:kept])
    return _first_of(call, x)


@rule("aten._weight_norm", "aten._weight_norm_interface")
def weight_norm(call: Call) -> Result:
    """g v / ‖v‖, the norm being over all axes but one, along which `g` gives a length for each index."""
    direction, length = call.value("v"), call.value("g")
    call.broadcast([direction, length], direction.shape)
    mixed = [d for d, size in enumerate(length.shape) if size == 1]
    call.mix([direction.dims[d] for d in mixed], [direction.dims[d] for d in range(direction.ndim) if d not in mixed])
    return _first_of(call, direction)


@rule("aten.channel_shuffle", "aten.native_channel_shuffle")
def shuffle(call: Call) -> Result:
    """Channels are (group, inside), and become (inside, group)."""
    x = call.value("self")
    groups = int(call.constant("groups"))
    outer, inner = call.domain.factor(x.dims[1], [groups, x.shape[1] // groups])
    call.mix(x.dims[1:2], (*x.dims[:1], *x.dims[2:]))  # what never moves has another number from here on
    return Value((*x.dims[:1], call.domain.merge([inner, outer]), *x.dims[2:]))


@rule("aten.local_response_norm")
def neighbours(call: Call) -> Result:
    """Channels are mixed with their neighbours, so their order matters."""
    x = call.tensors()[0]
    call.freeze(x.dims[1:2], "order of channels matters")
    return x


def _per_channel(call: Call, x: Value) -> None:
    if x.ndim < 2:
        raise NoRule("normalisation of a tensor without a channel axis")
    for name in _PER_CHANNEL:
        vector = call.optional(name)
        if vector is not None:
            call.domain.unify(x.dims[1], vector.dims[0])


def _first_of(call: Call, x: Value) -> Result:
    """Return `x` as the first output; further ones (saved statistics) are not to be relied on."""
    if call.output_count == 1:
        return x
    others = (call.shape(i) for i in range(1, call.output_count))
    return [x, *(Value(tuple(call.fixed(n, "saved statistic") for n in shape)) for shape in others)]
