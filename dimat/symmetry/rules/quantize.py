"""Fake quantisation: each entry alone, with a scale for all or for each index of one axis."""

from __future__ import annotations

from dimat.symmetry.rules.call import Call, Result, Value, rule


@rule("aten.fake_quantize_per_tensor_affine", "aten.fake_quantize_per_tensor_affine_cachemask")
@rule(
    "aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams", "aten._fake_quantize_learnable_per_tensor_affine"
)
def per_tensor(call: Call) -> Result:
    """One scale for all entries."""
    return _outputs(call, call.tensors()[0])


@rule("aten.fake_quantize_per_channel_affine", "aten.fake_quantize_per_channel_affine_cachemask")
@rule("aten._fake_quantize_learnable_per_channel_affine")
def per_channel(call: Call) -> Result:
    """A scale and a zero point for each index of one axis."""
    x, scale, zero = (call.value(name) for name in ("self", "scale", "zero_point"))
    axis = call.dim("axis", x.ndim)
    call.domain.unify(x.dims[axis], scale.dims[0])
    call.domain.unify(x.dims[axis], zero.dims[0])
    return _outputs(call, x)


@rule("aten.fused_moving_avg_obs_fake_quant", "aten._fused_moving_avg_obs_fq_helper")
def observed(call: Call) -> Result:
    """As above, with the least and largest values that were seen: one of each, or for each index of an axis."""
    x = call.value("self")
    vectors = [call.value(name) for name in ("running_min", "running_max", "scale", "zero_point")]
    if call.constant("per_row_fake_quant", False):
        axis = call.dim("ch_axis", x.ndim)
        for vector in vectors:
            if vector.shape == (x.shape[axis],):
                call.domain.unify(x.dims[axis], vector.dims[0])
    return _outputs(call, x)


def _outputs(call: Call, x: Value) -> Result:
    return x if call.output_count == 1 else [x for _ in range(call.output_count)]
