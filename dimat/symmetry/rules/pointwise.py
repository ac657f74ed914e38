"""Operations that act on each entry alone, and those that return their input as it is."""

from __future__ import annotations

from dimat.symmetry.rules.call import Call, Result, Value, rule


@rule(
    # found by torch.Tag.pointwise: see `find_rule`; the others named here lack the tag
    "pointwise",
    *(f"aten.{name}" for name in ("where", "masked_fill", "copy", "lerp", "rsub", "hardswish", "log_sigmoid")),
    *(f"aten.{name}" for name in ("multiply", "divide", "subtract", "negative", "absolute", "floor_divide")),
    *(f"aten.{name}" for name in ("special_expit", "real", "imag", "polar", "complex", "__and__", "__or__")),
    *(f"aten.{name}" for name in ("greater", "greater_equal", "less", "less_equal", "not_equal", "clip", "rrelu")),
    *(f"aten.special_{name}" for name in ("erf", "erfc", "erfinv", "exp2", "expm1", "log1p", "sinc", "xlogy")),
    *(f"aten.special_{name}" for name in ("round", "digamma", "gammaln", "psi", "polygamma", "logit", "i0", "i0e")),
    *(f"aten.special_{name}" for name in ("i1", "i1e", "erfcx", "entr", "ndtr", "ndtri", "log_ndtr", "xlog1py")),
    *(f"aten.special_{name}" for name in ("zeta", "gammainc", "gammaincc", "multigammaln")),
    *(f"aten.{name}" for name in ("float_power", "arctan2", "arcsin", "arccos", "arctan", "arcsinh", "arccosh")),
    *(f"aten.{name}" for name in ("arctanh", "fix", "true_divide", "isclose", "isfinite", "isreal", "isinf", "isnan")),
    *(f"aten.{name}" for name in ("logical_not", "selu", "celu", "relu6", "softplus", "threshold", "square", "mish")),
    *(f"aten.{name}" for name in ("__xor__", "__lshift__", "__rshift__", "ldexp", "nan_to_num")),
    *(f"aten.{name}" for name in ("addcmul", "addcdiv", "relu", "gelu", "silu", "leaky_relu", "elu", "hardtanh")),
)
def pointwise(call: Call) -> Result:
    """Axes that meet by broadcasting are permuted alike. Covers in-place variants: the result is `self`."""
    return Value(call.broadcast(call.tensors(), call.shape()))


@rule(
    "aten.alias",
    "aten.clone",
    "aten.contiguous",
    "aten.detach",
    "aten.dropout",
    "aten.alpha_dropout",
    "aten.feature_dropout",
    "aten.fill",
    "aten.lift_fresh_copy",
    "aten.to",
    "aten._to_copy",
    "aten.type_as",
    "aten.zero",
    "aten.positive",
    "aten.cpu",
    "aten.cuda",
)
def identity(call: Call) -> Result:
    """The result has the axes of the first argument. (Dropout does nothing in eval mode.)"""
    return call.tensors()[0]


@rule("aten.prelu")
def prelu(call: Call) -> Result:
    """A slope for each channel, axis 1, or one for all."""
    x, slope = call.value("self"), call.value("weight")
    if slope.shape != (1,) and x.ndim > 1 and slope.ndim == 1:
        call.domain.unify(x.dims[1], slope.dims[0])
    elif slope.shape != (1,):
        call.domain.unify(x.dims[-1], slope.dims[0])
    return x


@rule("aten.softmax", "aten.log_softmax", "aten._softmax", "aten._log_softmax", "aten.special_softmax")
def same_shape(call: Call) -> Result:
    """Softmax over a permuted axis is the permuted softmax."""
    x = call.value("self")
    axis = call.dim("dim", x.ndim)
    call.mix(x.dims[axis : axis + 1], (*x.dims[:axis], *x.dims[axis + 1 :]))
    return x


@rule("aten.glu")
def glu(call: Call) -> Result:
    """The two halves of an axis are permuted alike."""
    x = call.value("self")
    axis = call.dim("dim", x.ndim)
    half = call.shape()[axis]
    first, second = call.domain.cut(x.dims[axis], half)
    call.domain.unify(first, second)
    return Value((*x.dims[:axis], first, *x.dims[axis + 1 :]))
